//! What the two ends of a connection say to each other: the MADs of the InfiniBand connection manager, without what
//! a reliable way makes needless.
//!
//! A message crosses a link between two routers as words ([`Message::to_words`]) from one address to another. What a
//! sender could forge does not travel: the receiving router says itself who the sender is, for which tenant it speaks,
//! and that the address is its own.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::private_data;

/// QP numbers and PSNs have so many bits.
const BITS: u32 = 24;

/// The name of one end, never used twice in the life of its manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CommId {
    /// The host of the end, as the receiver of a message names it; 0 is the receiver's own.
    pub host: u32,
    /// Counted by that host's manager.
    pub serial: u64,
}

/// A message from one end to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The host that it goes to, as the sender names it; 0 is the sender's own.
    pub towards: u32,
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

/// What travels of a message, beside both addresses.
#[derive(Debug, Serialize, Deserialize)]
struct Words {
    serial: u64,
    source_port: u16,
    destination_port: u16,
    body: Body,
}

impl Message {
    /// What travels, beside the tenant and the IP addresses.
    #[must_use]
    pub fn to_words(&self) -> Vec<u8> {
        let words = Words {
            serial: self.from.serial,
            source_port: self.source.port(),
            destination_port: self.destination.port(),
            body: self.body.clone(),
        };
        // Only a full memory keeps it from being written.
        postcard::to_stdvec(&words).unwrap_or_default()
    }

    /// The message that came as `words` from an address behind a host to another one of the same tenant. `None`: no
    /// manager says such a thing.
    #[must_use]
    pub fn from_words(
        words: &[u8],
        host: u32,
        tenant: u32,
        [source, destination]: [IpAddr; 2],
    ) -> Option<Self> {
        let (words, rest) = postcard::take_from_bytes::<Words>(words).ok()?;
        let somebodys = |ip: IpAddr| !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast();
        if !rest.is_empty() || !somebodys(source) || !somebodys(destination) || !words.body.may_be() {
            return None;
        }
        let mut body = words.body;
        if let Some(to) = body.to_mut() {
            to.host = 0;
        }
        Some(Self {
            towards: 0,
            tenant,
            from: CommId { host, serial: words.serial },
            namespace: None,
            source: SocketAddr::new(source, words.source_port),
            destination: SocketAddr::new(destination, words.destination_port),
            body,
        })
    }
}

impl Body {
    /// The end that it names, unless it asks for one.
    pub(crate) fn to(&self) -> Option<CommId> {
        match self {
            Self::ConnectRequest { .. } | Self::Withdraw { .. } | Self::DatagramRequest { .. } => None,
            Self::ConnectReply { to, .. }
            | Self::ReadyToUse { to }
            | Self::Reject { to, .. }
            | Self::DisconnectRequest { to }
            | Self::DisconnectReply { to }
            | Self::DatagramReply { to, .. } => Some(*to),
        }
    }

    fn to_mut(&mut self) -> Option<&mut CommId> {
        match self {
            Self::ConnectRequest { .. } | Self::Withdraw { .. } | Self::DatagramRequest { .. } => None,
            Self::ConnectReply { to, .. }
            | Self::ReadyToUse { to }
            | Self::Reject { to, .. }
            | Self::DisconnectRequest { to }
            | Self::DisconnectReply { to }
            | Self::DatagramReply { to, .. } => Some(to),
        }
    }

    /// Whether its numbers and lengths are inside their fields.
    fn may_be(&self) -> bool {
        let fits = |number: u32| number >> BITS == 0;
        match self {
            Self::ConnectRequest { offer, .. } => {
                fits(offer.qpn) && fits(offer.psn) && offer.private_data.len() <= private_data::REQUEST
            }
            Self::ConnectReply { reply, .. } => {
                fits(reply.qpn) && fits(reply.psn) && reply.private_data.len() <= private_data::REPLY
            }
            Self::Reject { private_data, .. } => private_data.len() <= private_data::REJECT,
            Self::DatagramRequest { private_data, .. } => {
                private_data.len() <= private_data::DATAGRAM_REQUEST
            }
            Self::DatagramReply { qpn, private_data, .. } => {
                fits(*qpn) && private_data.len() <= private_data::DATAGRAM_REPLY
            }
            Self::ReadyToUse { .. }
            | Self::Withdraw { .. }
            | Self::DisconnectRequest { .. }
            | Self::DisconnectReply { .. } => true,
        }
    }
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
