//! What the two ends of a connection say to each other: the MADs of the InfiniBand connection manager, without what
//! a reliable way makes needless.
//!
//! A message can be serialised and cross a link between two routers. There the receiving router replaces
//! [`CommId::host`] by its own name for the sender and takes [`Message::namespace`] away, so that neither can be
//! forged, and checks that the tenant is one that the sender may speak for.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The name of one end, never used twice in the life of its manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CommId {
    /// The host of the end, as the receiver of a message names it; 0 is the receiver's own.
    pub host: u32,
    /// Counted by that host's manager.
    pub serial: u64,
}

/// A message from one end to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The tenant of both.
    pub tenant: u32,
    /// The sending end.
    pub from: CommId,
    /// Its network namespace, on the host of the receiver only.
    pub namespace: Option<u64>,
    /// Its address.
    pub source: SocketAddr,
    /// The other end's address, by which a message finds its host.
    pub destination: SocketAddr,
    /// What it says.
    pub body: Body,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// REQ.
    ConnectRequest {
        /// The port space.
        space: u16,
        /// The asking end.
        offer: Offer,
    },
    /// REP.
    ConnectReply {
        /// To whom.
        to: CommId,
        /// The accepting end.
        reply: Reply,
    },
    /// RTU.
    ReadyToUse {
        /// To whom.
        to: CommId,
    },
    /// REJ.
    Reject {
        /// To whom.
        to: CommId,
        /// Why, see [`crate::reason`].
        reason: u16,
        /// The application's bytes.
        private_data: Vec<u8>,
    },
    /// A request is taken back that may not have been answered (REJ with a time-out, in InfiniBand).
    Withdraw {
        /// The port space it was asked in.
        space: u16,
    },
    /// DREQ.
    DisconnectRequest {
        /// To whom.
        to: CommId,
    },
    /// DREP.
    DisconnectReply {
        /// To whom.
        to: CommId,
    },
    /// SIDR_REQ.
    DatagramRequest {
        /// The port space.
        space: u16,
        /// The application's bytes.
        private_data: Vec<u8>,
    },
    /// SIDR_REP.
    DatagramReply {
        /// To whom.
        to: CommId,
        /// See [`crate::sidr`].
        status: u16,
        /// The QP that takes datagrams.
        qpn: u32,
        /// Its Q_Key.
        qkey: u32,
        /// The application's bytes.
        private_data: Vec<u8>,
    },
}

/// The asking end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its QP.
    pub qpn: u32,
    /// The PSN it starts with.
    pub psn: u32,
    /// Reads and atomics it answers at once.
    pub responder_resources: u8,
    /// Reads and atomics it asks at once.
    pub initiator_depth: u8,
    /// Whether it offers flow control.
    pub flow_control: u8,
    /// Transport retries, at both ends.
    pub retry_count: u8,
    /// RNR retries of the accepting end.
    pub rnr_retry_count: u8,
    /// Whether its QP uses an SRQ.
    pub srq: u8,
    /// The application's bytes.
    pub private_data: Vec<u8>,
}

/// The accepting end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Its QP.
    pub qpn: u32,
    /// The PSN it starts with.
    pub psn: u32,
    /// Reads and atomics it answers at once.
    pub responder_resources: u8,
    /// Reads and atomics it asks at once.
    pub initiator_depth: u8,
    /// Whether it offers flow control.
    pub flow_control: u8,
    /// RNR retries of the asking end.
    pub rnr_retry_count: u8,
    /// Whether its QP uses an SRQ.
    pub srq: u8,
    /// The application's bytes.
    pub private_data: Vec<u8>,
}
