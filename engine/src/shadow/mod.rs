//! Shadow QPs, free of I/O: what a NIC does for a virtual QP whose peer lives behind another router with a NIC.
//!
//! ```text
//!   SQ --> Sender --(translated)--> shadow QP ==NIC== shadow QP --> Receiver --> receive completions
//!            |                                                          ^
//!            +--> Initiator ---------------link---------------> Target -+--(announced)
//! ```
//!
//! The NIC carries messages between memory that it reaches: the shared parts of memory regions, registered when a
//! connection first needs them, and bounce memory for the edges of local lists. What it cannot do goes over the link as
//! between hosts without NICs, alone: the NIC's queue is empty before, and the link's answer is there before the next
//! request goes to the NIC. So requests are executed in order, whichever way they take.
//! Leaves to others: the handshake and turns (`fabric`), what goes over the link (`wire`).

mod bounce;
mod parts;
mod receiver;
mod sender;
mod word;

use std::collections::VecDeque;

use crate::nic::{Endpoint, Nic, ShadowId};

pub(crate) use bounce::{Pool, Slot};
pub(crate) use parts::Reach;
pub(crate) use receiver::{Landed, Receiver, Taken};
pub(crate) use sender::{Finished, Grant, Known, Sender, Step, goes_by_link};
pub(crate) use word::Word;

/// How far a shadow QP has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Whether there can be one is not known yet: the link must be there first.
    Awaiting,
    /// It is being made.
    Opening,
    /// It is there, and the peer is told.
    Offered,
    /// It is being connected.
    Connecting,
    /// It hears its peer, and says so when it has the receives: it does not decline any more.
    Connected,
    /// It is being ended.
    Closing,
}

/// The shadow of a virtual QP.
#[derive(Debug)]
pub(crate) struct Shadow {
    pub(crate) id: ShadowId,
    pub(crate) stage: Stage,
    pub(crate) mine: Endpoint,
    /// The peer's number for its shadow, and its end.
    pub(crate) theirs: Option<(u32, Endpoint)>,
    /// RTS was asked for.
    pub(crate) is_starting: bool,
    /// In RTS.
    pub(crate) is_started: bool,
    /// The peer was told that it is heard.
    pub(crate) has_said: bool,
    /// The peer's shadow hears this one.
    pub(crate) is_heard: bool,
    /// The NIC is gone.
    pub(crate) is_lost: bool,
    /// It is in error.
    pub(crate) is_spoilt: bool,
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
}

impl Shadow {
    pub(crate) fn new(id: ShadowId) -> Self {
        Self {
            id,
            stage: Stage::Awaiting,
            mine: Endpoint::default(),
            theirs: None,
            is_starting: false,
            is_started: false,
            has_said: false,
            is_heard: false,
            is_lost: false,
            is_spoilt: false,
            sender: Sender::default(),
            receiver: Receiver::default(),
        }
    }

    /// Whether which way requests take is still open.
    pub(crate) fn is_undecided(&self) -> bool {
        match self.stage {
            Stage::Connected => !self.is_heard,
            Stage::Closing => false,
            Stage::Awaiting | Stage::Opening | Stage::Offered | Stage::Connecting => true,
        }
    }

    /// Whether the NIC has nothing of the application's memory.
    pub(crate) fn is_unused(&self) -> bool {
        !matches!(self.stage, Stage::Connected | Stage::Closing)
    }

    /// Whether requests may be posted.
    pub(crate) fn is_live(&self) -> bool {
        self.stage == Stage::Connected && self.is_started && self.is_heard
    }

    /// Whether the NIC knows of it.
    pub(crate) fn is_made(&self) -> bool {
        self.stage != Stage::Awaiting
    }
}

/// What the next receive's completion says, beside what the NIC knows: told over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    /// The bytes of an RDMA WRITE that went over the link.
    Written(u32),
    /// The key that a SEND invalidates.
    Invalidates(u32),
}

/// Announcements, oldest first.
pub(crate) type Announcements = VecDeque<Announced>;

/// What posting needs beside the queues.
pub(crate) struct Tools<'a> {
    pub(crate) nic: &'a mut dyn Nic,
    pub(crate) pool: &'a mut Pool,
    pub(crate) shadow: ShadowId,
    /// Work requests that the NIC's queue takes.
    pub(crate) wr: u32,
    /// SGEs that a work request may have.
    pub(crate) sge: u32,
    /// How the NIC reaches a memory region.
    pub(crate) reach: &'a mut dyn FnMut(&verbs_abi::shm::mr_table::MrEntry) -> Reach,
}
