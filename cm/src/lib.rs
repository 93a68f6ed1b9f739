//! The connection manager behind rdma_cm: ids, addresses, listeners, connections, events.
//!
//! What Linux does in `ucma` and `cma`, as a state machine without sockets, threads and clocks. Commands come from
//! [clients](Manager::open), time is passed in as what has gone by since some fixed moment. The two ends of a
//! connection share nothing and speak by [`Message`]s, which the caller delivers: to this manager, or over a link to
//! another one. Leaves to others: the C structures (the provider), sockets and event counters (the router), QPs
//! (the application).
//!
//! Field values and orders of events follow recordings of Soft-RoCE, see `tests/golden.rs`.

mod address;
mod attributes;
mod client;
mod connect;
mod datagram;
mod error;
mod events;
mod far;
mod grace;
mod id;
mod manager;
mod message;
mod multicast;
mod passive;
mod place;
mod ports;

pub use error::Refusal;
pub use far::Routes;
pub use manager::{Listener, Manager, Settings};
pub use message::{Body, CommId, Message, Offer, Reply};
pub use place::Place;

/// Port spaces, `enum rdma_ucm_port_space`.
pub mod space {
    /// Datagrams, as IPoIB uses them.
    pub const IPOIB: u16 = 0x0002;
    /// Connections.
    pub const TCP: u16 = 0x0106;
    /// Datagrams.
    pub const UDP: u16 = 0x0111;
    /// Whatever the QP type says, by service ids.
    pub const IB: u16 = 0x013f;
}

/// Reasons of a rejection, `enum ib_cm_rej_reason`.
pub mod reason {
    /// No resources.
    pub const NO_RESOURCES: u16 = 3;
    /// The other end gave up waiting.
    pub const TIMEOUT: u16 = 4;
    /// Nobody listens.
    pub const INVALID_SERVICE_ID: u16 = 8;
    /// The application's decision.
    pub const CONSUMER_DEFINED: u16 = 28;
    /// The application's decision over a vendor's option.
    pub const VENDOR_OPTION_NOT_SUPPORTED: u16 = 35;
}

/// Answers to a datagram request, `enum ib_cm_sidr_status`.
pub mod sidr {
    /// Accepted.
    pub const SUCCESS: u16 = 0;
    /// Nobody listens.
    pub const UNSUPPORTED: u16 = 1;
    /// Refused.
    pub const REJECT: u16 = 2;
}

/// Lengths of private data as Linux delivers it, whatever was sent: what its messages have room for.
pub mod private_data {
    /// Of a request for a connection.
    pub const REQUEST: usize = 56;
    /// Of its acceptance.
    pub const REPLY: usize = 196;
    /// Of its refusal.
    pub const REJECT: usize = 148;
    /// Of a request for datagrams.
    pub const DATAGRAM_REQUEST: usize = 180;
    /// Of its answer.
    pub const DATAGRAM_REPLY: usize = 136;
}

/// Q_Key of the datagrams of rdma_cm, `RDMA_UDP_QKEY`.
pub const UDP_QKEY: u32 = 0x0123_4567;
