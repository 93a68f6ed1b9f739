//! Every request and reply.

use serde::{Deserialize, Serialize};

use super::cm::{CmAnswer, CmRequest};
use crate::shm::{queue::Geometry, srq::SrqGeometry};

/// A 16-byte GID in network order.
pub type Gid = [u8; 16];

/// How a client wants its data path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The router executes each work request on its own checked copy.
    #[default]
    Isolated,
    /// The application's own thread executes, where both ends of one tenant want it.
    Direct,
}

/// What a client asks of the router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Opens a client. Descriptors: the async eventfd, then optionally `/proc/self/mem` opened for writing.
    Hello {
        /// [`crate::shm::LAYOUT_VERSION`] of the client.
        version: u32,
        /// The mode wanted.
        mode: Mode,
    },
    /// The GID table now.
    Gids,
    /// `ibv_alloc_pd`.
    AllocPd,
    /// `ibv_dealloc_pd`.
    DeallocPd {
        /// The PD.
        pd: u32,
    },
    /// `ibv_reg_mr`.
    RegMr(RegMr),
    /// `ibv_dereg_mr`. When the reply arrives nobody touches the memory any more.
    DeregMr {
        /// Its key.
        key: u32,
    },
    /// `ibv_rereg_mr`: what the key stands for becomes this. When the reply arrives nobody touches the memory that it
    /// stood for before.
    ReregMr {
        /// Its key, which stays.
        key: u32,
        /// The whole of what it is from now on.
        reg: RegMr,
    },
    /// `ibv_alloc_null_mr`. It ends by [`Request::DeregMr`].
    AllocNullMr {
        /// Protection domain.
        pd: u32,
    },
    /// `ibv_alloc_mw`. The answer is [`Answer::Mr`]: the key of a window that is bound to nothing.
    AllocMw {
        /// Protection domain.
        pd: u32,
        /// Whether it is of type 2.
        is_type_2: bool,
    },
    /// `ibv_dealloc_mw`.
    DeallocMw {
        /// The key that it had at first, or any that it was bound under.
        key: u32,
    },
    /// Makes a completion channel known. Descriptor: its eventfd.
    CreateChannel,
    /// Forgets a completion channel.
    DestroyChannel {
        /// The channel.
        channel: u32,
    },
    /// `ibv_create_cq`.
    CreateCq {
        /// Entries wanted.
        cqe: u32,
        /// Completion channel, if any.
        channel: Option<u32>,
    },
    /// `ibv_destroy_cq`. EBUSY while a QP uses it.
    DestroyCq {
        /// The CQ.
        cq: u32,
    },
    /// `ibv_create_srq`.
    CreateSrq(CreateSrq),
    /// `ibv_modify_srq`: an event when fewer receives than this are left, once; 0 for none.
    LimitSrq {
        /// The SRQ number.
        srqn: u32,
        /// The limit.
        limit: u32,
    },
    /// The limit of an SRQ that was not reached yet. The answer is [`Answer::Handle`].
    QuerySrq {
        /// The SRQ number.
        srqn: u32,
    },
    /// `ibv_destroy_srq`. EBUSY while a QP uses it.
    DestroySrq {
        /// The SRQ number.
        srqn: u32,
    },
    /// `ibv_open_xrcd`. Descriptor: the file that stands for the domain, if any.
    OpenXrcd {
        /// Whether it is made if there is none.
        creates: bool,
        /// Whether there may be none yet.
        exclusive: bool,
    },
    /// `ibv_open_qp`: opens a receiver of an XRC domain that some client of the tenant has made. Answered by
    /// [`Answer::Qp`]; everybody who has it open ends it by [`Request::DestroyQp`], and it ends with the last.
    OpenQp {
        /// The domain, opened by this client.
        xrcd: u32,
        /// The QP number.
        qpn: u32,
    },
    /// `ibv_close_xrcd`. EBUSY while a QP or an SRQ of this client uses it.
    CloseXrcd {
        /// The domain.
        xrcd: u32,
    },
    /// `ibv_create_qp`.
    CreateQp(CreateQp),
    /// `ibv_modify_qp`.
    ModifyQp {
        /// The QP number.
        qpn: u32,
        /// `enum ibv_qp_attr_mask`.
        mask: u32,
        /// The attributes; those outside the mask are ignored.
        attr: QpAttr,
    },
    /// `ibv_query_qp`.
    QueryQp {
        /// The QP number.
        qpn: u32,
    },
    /// Connects a QP directly, as its header offers. Answered by [`Answer::Direct`], or by [`Answer::Done`] where the
    /// offer has expired.
    PairQp {
        /// The QP number.
        qpn: u32,
    },
    /// `ibv_destroy_qp`. When the reply arrives no peer touches its queues any more. EBUSY while it is attached to a
    /// multicast group.
    DestroyQp {
        /// The QP number.
        qpn: u32,
    },
    /// `ibv_attach_mcast`. A QP that is attached to the group already stays so.
    AttachMcast {
        /// The QP number.
        qpn: u32,
        /// The group.
        group: Gid,
    },
    /// `ibv_detach_mcast`.
    DetachMcast {
        /// The QP number.
        qpn: u32,
        /// The group.
        group: Gid,
    },
    /// What `freeflow status` shows. Allowed as the first request. The reply's descriptor holds JSON.
    Status,
    /// Opens the connection manager for a process, in place of a device. Answered by [`Answer::CmWelcome`].
    CmHello {
        /// [`crate::shm::LAYOUT_VERSION`] of the client.
        version: u32,
    },
    /// Asks the connection manager, after [`Request::CmHello`]. Answered by [`Answer::Handle`] or [`Answer::Cm`].
    Cm(CmRequest),
}

/// The length that stands for all of a process, in an on-demand registration from address 0.
pub const WHOLE_PROCESS: u64 = u64::MAX;

/// `ibv_reg_mr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegMr {
    /// Protection domain.
    pub pd: u32,
    /// First address in the application.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// First address as keys' users name it.
    pub iova: u64,
    /// `enum ibv_access_flags`. With `ON_DEMAND` nothing is moved and every access finds the pages of that moment; from
    /// address 0 with [`WHOLE_PROCESS`] bytes it covers whatever the process has.
    pub access: u32,
    /// First page of the part that lies in the region memfd.
    pub shared_start: u64,
    /// End of that part, exclusive; equal to the start when nothing was moved.
    pub shared_end: u64,
}

/// `ibv_create_qp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateQp {
    /// Protection domain; 0 for an XRC receiver, which has none.
    pub pd: u32,
    /// CQ of the send queue; 0 for an XRC receiver.
    pub send_cq: u32,
    /// CQ of the receive queue; 0 for either side of XRC.
    pub recv_cq: u32,
    /// The SRQ that it takes its receives from.
    pub srq: Option<u32>,
    /// The XRC domain of an XRC receiver.
    pub xrcd: Option<u32>,
    /// `enum ibv_qp_type`.
    pub qp_type: u32,
    /// Capacities wanted.
    pub cap: QpCap,
    /// Whether what it sends to a multicast group does not come back to it, though it is attached (UD).
    pub block_self_mcast: bool,
    /// Whether every send raises a completion (for `query_qp`; the provider sets the flag on each WQE).
    pub sq_sig_all: bool,
}

/// `ibv_create_srq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSrq {
    /// Protection domain.
    pub pd: u32,
    /// Outstanding receives.
    pub max_wr: u32,
    /// SGEs in a receive.
    pub max_sge: u32,
    /// For an XRC queue its domain and the CQ that it completes to.
    pub xrc: Option<(u32, u32)>,
}

/// `struct ibv_qp_cap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpCap {
    /// Outstanding send WRs.
    pub max_send_wr: u32,
    /// Outstanding receive WRs.
    pub max_recv_wr: u32,
    /// SGEs in a send WR.
    pub max_send_sge: u32,
    /// SGEs in a receive WR.
    pub max_recv_sge: u32,
    /// Inline bytes in a send WR.
    pub max_inline_data: u32,
}

/// `struct ibv_ah_attr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AhAttr {
    /// Destination GID.
    pub dgid: Gid,
    /// Flow label.
    pub flow_label: u32,
    /// Index of the source GID.
    pub sgid_index: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Destination LID (unused on Ethernet, kept for `query_qp`).
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Source path bits.
    pub src_path_bits: u8,
    /// Static rate.
    pub static_rate: u8,
    /// Whether the GRH is present; RoCE needs it.
    pub is_global: u8,
    /// Port.
    pub port_num: u8,
}

/// `struct ibv_qp_attr`, as `ibv_modify_qp` takes and `ibv_query_qp` returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpAttr {
    /// `enum ibv_qp_state`.
    pub qp_state: u32,
    /// `enum ibv_qp_state` the caller believes in.
    pub cur_qp_state: u32,
    /// `enum ibv_mtu`.
    pub path_mtu: u32,
    /// `enum ibv_mig_state`.
    pub path_mig_state: u32,
    /// Q_Key.
    pub qkey: u32,
    /// PSN of the receive queue.
    pub rq_psn: u32,
    /// PSN of the send queue.
    pub sq_psn: u32,
    /// QP number of the peer.
    pub dest_qp_num: u32,
    /// `enum ibv_access_flags` for remote operations.
    pub qp_access_flags: u32,
    /// Capacities.
    pub cap: QpCap,
    /// Path to the peer.
    pub ah_attr: AhAttr,
    /// Alternate path.
    pub alt_ah_attr: AhAttr,
    /// P_Key index.
    pub pkey_index: u16,
    /// Alternate P_Key index.
    pub alt_pkey_index: u16,
    /// Whether SQD raises an event.
    pub en_sqd_async_notify: u8,
    /// Whether the queue is draining.
    pub sq_draining: u8,
    /// Outstanding reads and atomics as initiator.
    pub max_rd_atomic: u8,
    /// Outstanding reads and atomics as responder.
    pub max_dest_rd_atomic: u8,
    /// RNR NAK timer code.
    pub min_rnr_timer: u8,
    /// Port.
    pub port_num: u8,
    /// ACK timeout code.
    pub timeout: u8,
    /// Transport retries.
    pub retry_cnt: u8,
    /// RNR retries, 7 for ever.
    pub rnr_retry: u8,
    /// Alternate port.
    pub alt_port_num: u8,
    /// Alternate timeout.
    pub alt_timeout: u8,
    /// Rate limit, kbit/s.
    pub rate_limit: u32,
    /// What may be sent at once in spite of it, bytes; 0 for the device's default.
    pub max_burst_size: u32,
}

/// The router's answer: what was asked for, or an errno.
pub type Reply = Result<Answer, i32>;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// To [`Request::Hello`]. Descriptors: arena, region, lane page (read-only), wake page.
    Hello(Welcome),
    /// To [`Request::Gids`].
    Gids(Vec<Gid>),
    /// A new handle: PD, completion channel.
    Handle(u32),
    /// A new MR.
    Mr {
        /// lkey and rkey.
        key: u32,
    },
    /// A new CQ.
    Cq {
        /// Its id.
        cq: u32,
        /// Entries given.
        cqe: u32,
        /// Where it lies in the arena.
        offset: u64,
    },
    /// A new SRQ.
    Srq(NewSrq),
    /// A new QP.
    Qp(NewQp),
    /// To [`Request::ModifyQp`] that made or ended a direct connection. Descriptors: the peer's arena, its
    /// region, and the eventfd of its receive CQ's channel if it has one.
    Direct(DirectPeer),
    /// To [`Request::QueryQp`].
    Attr(QpAttr),
    /// To [`Request::CmHello`].
    CmWelcome {
        /// Node GUID of this router's device, network order.
        guid: [u8; 8],
    },
    /// To [`Request::Cm`].
    Cm(CmAnswer),
}

/// To [`Request::Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The client's id.
    pub client: u32,
    /// Node GUID of this router's device, network order.
    pub guid: [u8; 8],
    /// What `ibv_query_device` reports.
    pub limits: Limits,
    /// Mode granted.
    pub mode: Mode,
    /// Cores the router may use, which tells the provider whether to yield.
    pub cores: u32,
}

/// What `ibv_query_device` reports and the router enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// QPs a client may have.
    pub max_qp: u32,
    /// CQs a client may have.
    pub max_cq: u32,
    /// MRs a client may have.
    pub max_mr: u32,
    /// Bytes that a client may have registered, all its MRs together.
    pub max_mr_size: u64,
    /// PDs a client may have.
    pub max_pd: u32,
    /// Entries of a CQ.
    pub max_cqe: u32,
    /// Attachments of QPs to multicast groups that a client may have.
    pub max_mcast: u32,
}

/// A new SRQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewSrq {
    /// Its number, unique on this host.
    pub number: u32,
    /// Its doorbell slot.
    pub slot: u32,
    /// Where it lies in the arena.
    pub offset: u64,
    /// Its sizes.
    pub geometry: SrqGeometry,
    /// Where the completion ring of an XRC queue lies in the arena.
    pub ring_offset: u64,
    /// That ring's slot in the CQ.
    pub ring_slot: u32,
}

/// A new QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewQp {
    /// Its number, unique on this host.
    pub qpn: u32,
    /// Its doorbell slot.
    pub slot: u32,
    /// Where it lies in the arena.
    pub offset: u64,
    /// Sizes of its queues.
    pub geometry: Geometry,
    /// Its ring's slot in the send CQ.
    pub send_slot: u32,
    /// Its ring's slot in the receive CQ.
    pub recv_slot: u32,
}

/// The other end of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectPeer {
    /// The peer's client id; the descriptors of one client are the same each time.
    pub client: u32,
    /// The peer QP's number.
    pub qpn: u32,
    /// Where the peer QP lies in its arena.
    pub offset: u64,
    /// Sizes of its queues.
    pub geometry: Geometry,
    /// Its protection domain.
    pub pd: u32,
    /// Where its receive CQ lies in its arena.
    pub cq_offset: u64,
    /// Its receive ring's slot in that CQ.
    pub recv_slot: u32,
}
