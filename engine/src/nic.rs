//! A real NIC, as the engine sees it: orders that take time, posts that do not, and events.
//!
//! What a NIC's kernel driver does may take long, so it is ordered and performed elsewhere, one order after the other
//! ([`Nic::order`]); posting and polling touch the NIC's own queues only. Leaves to others: the library and the device
//! (the router), which QPs have shadows and what travels by them (`fabric`, `shadow`).

use std::fmt::Debug;

use verbs_abi::{
    shm::Window,
    verbs::{EventType, Opcode, WcStatus},
};

/// Number of a shadow QP, never used twice.
pub type ShadowId = u32;

/// Where a port is reached, and what it can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// The address by which it sends.
    pub gid: [u8; 16],
    /// Its local identifier; 0 on Ethernet.
    pub lid: u16,
    /// `enum ibv_mtu`.
    pub mtu: u8,
    /// READs and atomics that it serves for one peer.
    pub dest_rd_atomic: u8,
}

/// What a NIC allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The port in use.
    pub port: Port,
    /// Work requests of one queue.
    pub wr: u32,
    /// SGEs of one work request.
    pub sge: u32,
    /// READs and atomics under way to one peer.
    pub rd_atomic: u8,
}

/// What the peer of a QP may do, and how soon it is asked to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// `qp_access_flags`.
    pub access: u32,
    /// `min_rnr_timer`.
    pub min_rnr_timer: u8,
}

/// What a shadow QP is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowInit {
    /// The tenant, in whose protection domain it lives.
    pub tenant: u32,
    /// Work requests of the send queue.
    pub send_wr: u32,
    /// Work requests of the receive queue.
    pub recv_wr: u32,
    /// `qp_access_flags`.
    pub access: u32,
}

/// One end of a pair of shadow QPs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its number on the NIC.
    pub qpn: u32,
    /// Where its packets are counted from.
    pub psn: u32,
    /// The port.
    pub port: Port,
}

/// Memory of the host's own, registered for the QPs of a tenant.
#[derive(Clone, Debug)]
pub struct Bounce {
    /// The memory.
    pub window: Window,
    /// How the NIC names its first byte.
    pub base: u64,
    /// Its local key.
    pub lkey: u32,
    /// Of which device: memory of one that is gone is not that of the next.
    pub generation: u32,
}

/// The two keys of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicKey {
    /// For the NIC's own work requests.
    pub lkey: u32,
    /// For the peer's.
    pub rkey: u32,
}

/// What the NIC's driver is to do.
#[derive(Debug)]
pub enum Order {
    /// Make a shadow QP and bring it to INIT. Answered by [`Event::Opened`].
    Open(ShadowId, ShadowInit),
    /// Bring it to RTR. Answered by [`Event::Connected`].
    Connect {
        /// Which.
        shadow: ShadowId,
        /// Its peer.
        remote: Endpoint,
        /// `enum ibv_mtu`.
        mtu: u8,
        /// `min_rnr_timer`.
        min_rnr_timer: u8,
        /// READs and atomics that it serves.
        dest_rd_atomic: u8,
    },
    /// Bring it to RTS. Answered by [`Event::Started`].
    Start {
        /// Which.
        shadow: ShadowId,
        /// Where its packets are counted from.
        psn: u32,
        /// The virtual QP's `timeout`.
        timeout: u8,
        /// Its `retry_cnt`.
        retry_cnt: u8,
        /// Its `rnr_retry`.
        rnr_retry: u8,
        /// READs and atomics under way.
        rd_atomic: u8,
        /// What its peer may do, which may have changed since it was made.
        rights: Rights,
    },
    /// Change what the peer of one in RTS may do. Answered by [`Event::Started`] if that cannot be.
    Change(ShadowId, Rights),
    /// End it: when [`Event::Closed`] comes, the NIC touches nothing more on its behalf.
    Close(ShadowId),
    /// Register memory of a client. Answered by [`Event::Registered`].
    Register {
        /// The client and its key.
        owner: (u32, u32),
        /// Its tenant.
        tenant: u32,
        /// The memory.
        window: Window,
        /// The application's address of its first byte, by which the NIC knows it, too.
        addr: u64,
        /// `ibv_access_flags`.
        access: u32,
    },
    /// End a registration. Answered by [`Event::Deregistered`].
    Deregister((u32, u32)),
}

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A shadow QP is there, with its memory to bounce through; or not.
    Opened(ShadowId, Result<(Endpoint, Bounce), ()>),
    /// It hears its peer; or cannot.
    Connected(ShadowId, bool),
    /// It can send; or cannot.
    Started(ShadowId, bool),
    /// It is gone.
    Closed(ShadowId),
    /// Memory of a client is registered, or cannot be.
    Registered((u32, u32), Option<NicKey>),
    /// It is not any more.
    Deregistered((u32, u32)),
    /// A work request has completed.
    Completion(Completion),
    /// A shadow QP has met this.
    Async(ShadowId, EventType),
    /// The port works, or not: new connections may use it, or not.
    Usable(bool),
    /// The device is gone, and with it all that was on it.
    Lost,
}

/// How a work request ended.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Whose.
    pub shadow: ShadowId,
    /// Which: what it was posted with.
    pub id: u32,
    /// Whether it was a receive.
    pub is_receive: bool,
    /// How.
    pub status: WcStatus,
    /// Bytes that were received.
    pub byte_len: u32,
    /// Immediate data, as the wire carries it.
    pub imm: Option<u32>,
    /// Whether an RDMA WRITE with immediate data took the receive.
    pub is_write: bool,
}

/// A piece of memory, as the NIC names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicSge {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Local key.
    pub lkey: u32,
}

/// A send work request for the NIC.
#[derive(Clone, Copy, Debug)]
pub struct NicSend<'a> {
    /// Comes back with the completion.
    pub id: u32,
    /// What to do.
    pub opcode: Opcode,
    /// Wait for earlier READs.
    pub is_fenced: bool,
    /// The peer's event is asked for.
    pub is_solicited: bool,
    /// Immediate data, as the wire carries it.
    pub imm: u32,
    /// Remote address, as the peer's NIC knows it.
    pub remote_addr: u64,
    /// The peer's NIC's key.
    pub rkey: u32,
    /// The list.
    pub sges: &'a [NicSge],
}

/// Why something was not posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full: when something completes there is room.
    Full,
    /// The NIC does not take it at all.
    Broken,
}

/// A NIC.
pub trait Nic: Send + Debug {
    /// What it allows.
    fn limits(&self) -> Limits;

    /// Has something done; must not wait. Orders are performed in the order in which they were given. After a `Close`
    /// nothing is posted to that QP.
    fn order(&mut self, order: Order);

    /// What has happened, if anything; must not wait.
    fn next_event(&mut self) -> Option<Event>;

    /// Posts to a send queue.
    ///
    /// # Errors
    /// [`Refusal`].
    fn post_send(&mut self, shadow: ShadowId, send: &NicSend<'_>) -> Result<(), Refusal>;

    /// Posts to a receive queue.
    ///
    /// # Errors
    /// [`Refusal`].
    fn post_receive(&mut self, shadow: ShadowId, id: u32, sges: &[NicSge]) -> Result<(), Refusal>;

    /// Asks for a wake-up when something happens from now on: nobody will look until then.
    fn arm(&mut self) {}
}
