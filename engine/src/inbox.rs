//! Datagrams that have arrived and wait for their receive's memory, which is foreign.
//!
//! A datagram's sender never waits for its receiver. So what cannot be placed at once is kept here, each with a
//! posted receive to go to, within what one client may keep.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use verbs_abi::shm::cqe::Cqe;

use crate::stage::Stage;

/// Bytes that the inboxes of one client may hold.
pub(crate) const ROOM: u64 = 16 << 20;

/// The inbox of one QP.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    parcels: VecDeque<Parcel>,
    /// What accesses have done for the first one.
    pub(crate) stage: Stage,
    /// What its client's inboxes hold in all.
    held: Arc<AtomicU64>,
}

/// A datagram.
#[derive(Debug)]
pub(crate) struct Parcel {
    /// Header and payload.
    pub(crate) bytes: Vec<u8>,
    /// Its completion, but for the receive that it consumes.
    pub(crate) receipt: Cqe,
    /// Whether its receiver asked to be told of such.
    pub(crate) solicited: bool,
}

impl Inbox {
    /// An empty one of the client whose inboxes hold `held` bytes.
    pub(crate) fn new(held: Arc<AtomicU64>) -> Self {
        Self { held, parcels: VecDeque::new(), stage: Stage::default() }
    }

    /// Datagrams in it.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.parcels.len()
    }

    /// Takes a datagram in. One for which there is no room is lost.
    pub(crate) fn push(&mut self, parcel: Parcel) {
        let bytes = parcel.bytes.len() as u64;
        if self.held.load(Ordering::Relaxed) + bytes <= ROOM {
            self.held.fetch_add(bytes, Ordering::Relaxed);
            self.parcels.push_back(parcel);
        }
    }

    /// Takes the first one out.
    pub(crate) fn pop(&mut self) -> Option<Parcel> {
        let parcel = self.parcels.pop_front()?;
        self.held.fetch_sub(parcel.bytes.len() as u64, Ordering::Relaxed);
        Some(parcel)
    }

    /// Puts it back.
    pub(crate) fn put_back(&mut self, parcel: Parcel) {
        self.held.fetch_add(parcel.bytes.len() as u64, Ordering::Relaxed);
        self.parcels.push_front(parcel);
    }

    /// Loses all of them.
    pub(crate) fn clear(&mut self) {
        while self.pop().is_some() {}
        self.stage.clear();
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.clear();
    }
}
