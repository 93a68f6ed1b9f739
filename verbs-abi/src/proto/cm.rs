//! What a process asks of the router's connection manager, and what it hears.
//!
//! One connection a process, opened by `CmHello`. Its event channels are event counters: the router adds one for each
//! event that it queues, the process takes one and asks for the event by [`Command::NextEvent`]. Where an answer
//! says that queued events were taken back, the process takes as many counts back.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{AhAttr, Gid, QpAttr};

/// Bytes of private data that any message can carry.
pub const MAX_PRIVATE_DATA: usize = 256;

/// A request about event channels and ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CmRequest {
    /// Makes an event channel known. Descriptor: its event counter. Answered by a handle.
    OpenChannel,
    /// Ends a channel and every id on it.
    CloseChannel {
        /// The channel.
        channel: u32,
    },
    /// A command on a channel.
    Ask {
        /// The channel that it was written to.
        channel: u32,
        /// The command.
        command: Command,
    },
}

/// A command of `rdma_user_cm.h`, freed from its two dialects and from pointers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A new id.
    CreateId {
        /// The caller's word, given back with each event.
        uid: u64,
        /// `enum rdma_ucm_port_space`.
        space: u16,
        /// `enum ibv_qp_type`, which matters in the space `RDMA_PS_IB` alone.
        qp_type: u8,
    },
    /// Ends an id. Answered by [`CmAnswer::Reported`].
    DestroyId {
        /// The id.
        id: u32,
    },
    /// Names the id's own address.
    Bind {
        /// The id.
        id: u32,
        /// The address; unspecified for all of the namespace's.
        address: Address,
    },
    /// Looks for the way to an address.
    ResolveAddr {
        /// The id.
        id: u32,
        /// The own address, where it is not to be chosen.
        source: Option<Address>,
        /// Where to.
        destination: Address,
        /// How long to look, in milliseconds.
        timeout_ms: u32,
    },
    /// Looks for the route to the resolved address.
    ResolveRoute {
        /// The id.
        id: u32,
    },
    /// What is known of an id's addresses and route. Answered by [`CmAnswer::Route`].
    Query {
        /// The id.
        id: u32,
    },
    /// Asks the other end for a connection.
    Connect {
        /// The id.
        id: u32,
        /// What the other end gets to know.
        param: ConnParam,
    },
    /// Takes requests for connections.
    Listen {
        /// The id.
        id: u32,
        /// Requests that may wait; 0 for the default.
        backlog: u32,
    },
    /// Accepts a request or, without parameters, confirms the other end's acceptance.
    Accept {
        /// The id.
        id: u32,
        /// The caller's word for the id from now on; with parameters only.
        uid: u64,
        /// What the other end gets to know.
        param: Option<ConnParam>,
    },
    /// Refuses a request.
    Reject {
        /// The id.
        id: u32,
        /// An `ib_cm_rej_reason`; 0 stands for "consumer defined".
        reason: u8,
        /// Bytes for the other end.
        private_data: Vec<u8>,
    },
    /// Ends a connection, or confirms its end.
    Disconnect {
        /// The id.
        id: u32,
    },
    /// The attributes with which a QP follows the connection. Answered by [`CmAnswer::QpAttr`].
    InitQpAttr {
        /// The id.
        id: u32,
        /// `enum ibv_qp_state` to go to.
        state: u32,
    },
    /// The next event of the channel. Answered by [`CmAnswer::Event`].
    NextEvent,
    /// Changes an id.
    SetOption {
        /// The id.
        id: u32,
        /// What to change.
        option: CmOption,
    },
    /// Tells what the QP of an id saw.
    Notify {
        /// The id.
        id: u32,
        /// `enum ib_event_type`.
        event: u32,
    },
    /// Joins a multicast group. Answered by [`CmAnswer::Id`], which names the membership.
    JoinMulticast {
        /// The id.
        id: u32,
        /// The caller's word for the membership.
        uid: u64,
        /// The group.
        address: Address,
        /// Whether to send only.
        send_only: bool,
    },
    /// Leaves a multicast group. Answered by [`CmAnswer::Reported`].
    LeaveMulticast {
        /// The membership.
        id: u32,
    },
    /// Moves an id from another channel to this one. Answered by [`CmAnswer::Reported`], where what was taken back
    /// is the other channel's.
    MigrateId {
        /// The id.
        id: u32,
        /// The channel it is on.
        from: u32,
    },
}

impl Command {
    /// The id that it is about.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        match *self {
            Self::CreateId { .. } | Self::NextEvent | Self::LeaveMulticast { .. } => None,
            Self::DestroyId { id }
            | Self::Bind { id, .. }
            | Self::ResolveAddr { id, .. }
            | Self::ResolveRoute { id }
            | Self::Query { id }
            | Self::Connect { id, .. }
            | Self::Listen { id, .. }
            | Self::Accept { id, .. }
            | Self::Reject { id, .. }
            | Self::Disconnect { id }
            | Self::InitQpAttr { id, .. }
            | Self::SetOption { id, .. }
            | Self::Notify { id, .. }
            | Self::JoinMulticast { id, .. }
            | Self::MigrateId { id, .. } => Some(id),
        }
    }
}

/// An option of an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CmOption {
    /// Type of service.
    Tos(u8),
    /// Whether others may bind to the same address.
    ReuseAddr(bool),
    /// Whether a wildcard means one address family only.
    AfOnly(bool),
    /// The ACK timeout code of connections.
    AckTimeout(u8),
    /// The route was found by other means.
    Path,
}

/// An address as an id has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Address {
    /// `sockaddr_in` and `sockaddr_in6`.
    Ip(SocketAddr),
    /// `sockaddr_ib`.
    Ib(IbAddress),
}

/// `struct sockaddr_ib`, in host order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IbAddress {
    /// P_Key.
    pub pkey: u16,
    /// Flow label.
    pub flow_label: u32,
    /// GID.
    pub gid: Gid,
    /// Service id.
    pub sid: u64,
    /// Which bits of the service id count.
    pub sid_mask: u64,
    /// Scope.
    pub scope_id: u64,
}

/// `struct rdma_ucm_conn_param`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnParam {
    /// QP number.
    pub qpn: u32,
    /// Q_Key.
    pub qkey: u32,
    /// Bytes for the other end.
    pub private_data: Vec<u8>,
    /// Whether the QP uses an SRQ.
    pub srq: u8,
    /// Reads and atomics to answer at once.
    pub responder_resources: u8,
    /// Reads and atomics to ask at once.
    pub initiator_depth: u8,
    /// Whether flow control is offered.
    pub flow_control: u8,
    /// Transport retries.
    pub retry_count: u8,
    /// RNR retries.
    pub rnr_retry_count: u8,
}

/// `struct rdma_ucm_ud_param`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdParam {
    /// QP number.
    pub qpn: u32,
    /// Q_Key.
    pub qkey: u32,
    /// Where datagrams go.
    pub ah: AhAttr,
    /// Bytes from the other end.
    pub private_data: Vec<u8>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The word of the id, of the listener for a request, or of the membership.
    pub uid: u64,
    /// The id, the new id of a request, or the membership.
    pub id: u32,
    /// What happened.
    pub kind: EventKind,
    /// 0, a reason of the connection manager, or a negated errno.
    pub status: i32,
    /// What the other end said.
    pub param: EventParam,
    /// What the process is about to ask for next.
    pub known: Option<Box<Known>>,
}

/// What is known of an id when one of its events is handed out, so that nobody need ask. It holds until a command
/// about the id, or another event of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The answer to [`Command::Query`].
    pub route: Option<Route>,
    /// Answers to [`Command::InitQpAttr`]: mask and attributes, for the states named there.
    pub attrs: Vec<(u32, QpAttr)>,
}

/// What an event carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventParam {
    /// Of a connection, or of an id that will have one.
    Conn(ConnParam),
    /// Of an id for datagrams.
    Ud(UdParam),
}

/// `enum rdma_cm_event_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names of rdma_cma.h, without their prefix")]
pub enum EventKind {
    AddrResolved = 0,
    AddrError = 1,
    RouteResolved = 2,
    RouteError = 3,
    ConnectRequest = 4,
    ConnectResponse = 5,
    ConnectError = 6,
    Unreachable = 7,
    Rejected = 8,
    Established = 9,
    Disconnected = 10,
    DeviceRemoval = 11,
    MulticastJoin = 12,
    MulticastError = 13,
    AddrChange = 14,
    TimewaitExit = 15,
}

/// What an id knows of its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Its port space.
    pub space: u16,
    /// Its own address.
    pub source: Option<Address>,
    /// The other end's.
    pub destination: Option<Address>,
    /// The GIDs of both, once the id is bound to the device.
    pub device: Option<[Gid; 2]>,
    /// The path, once the route is resolved.
    pub path: Option<Path>,
}

/// A path between two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Path {
    /// The service id it was asked for with; 0 at the asking end.
    pub sid: u64,
    /// `enum ibv_mtu`.
    pub mtu: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Packet life time code.
    pub life_time: u8,
}

/// What the connection manager answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CmAnswer {
    /// Done.
    Done,
    /// A new id or membership.
    Id(u32),
    /// How many events of what ends or moves were handed out, and how many queued ones left the channel.
    Reported {
        /// Events handed out.
        events: u32,
        /// Counts to take back.
        revoked: u32,
    },
    /// To [`Command::Query`].
    Route(Route),
    /// To [`Command::InitQpAttr`].
    QpAttr {
        /// `enum ibv_qp_attr_mask`.
        mask: u32,
        /// The attributes.
        attr: QpAttr,
    },
    /// To [`Command::NextEvent`]; `None` when it was taken back, or another thread was faster.
    Event(Option<Event>),
}
