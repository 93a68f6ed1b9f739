//! What waits to go over one link.

use std::collections::{HashMap, HashSet, VecDeque};

use super::packet::Header;

/// Bytes that may wait before a QP must: two of these (one here, one being written) are what a QP that has just woken
/// waits behind.
const ROOM: usize = 256 * 1024;
/// Bytes up to which acknowledgements are still added.
const REPLY_ROOM: usize = 4 * ROOM;

/// What a link is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It is there, or will be: what is for it waits.
    #[default]
    Awaited,
    /// It is there.
    Up,
    /// It could not be made, and is tried again: what is unreliable is lost.
    Down,
}

/// The outbox of one link.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    pub(crate) condition: Condition,
    /// QPs that wait for room, by index and number.
    waiting: VecDeque<(usize, u32)>,
    among_waiting: HashSet<(usize, u32)>,
    /// Tenants that both ends have: the peer's number, and ours.
    tenants: HashMap<u32, u32>,
    /// Since when a datagram to a group finds no room, unless something was taken in between.
    stuck_since: Option<u64>,
}

impl Outbox {
    /// Whether a QP may add a packet with payload.
    pub(crate) fn has_room(&self) -> bool {
        self.condition == Condition::Up && self.bytes.len() < ROOM
    }

    /// Whether a packet without payload may be added.
    pub(crate) fn has_reply_room(&self) -> bool {
        self.condition == Condition::Up && self.bytes.len() < REPLY_ROOM
    }

    /// Whether the link is there.
    pub(crate) fn is_up(&self) -> bool {
        self.condition == Condition::Up
    }

    /// Whether there has been no room for so long. `now` in ns.
    pub(crate) fn is_stuck(&mut self, now: u64, patience: u64) -> bool {
        now >= self.stuck_since.get_or_insert(now).saturating_add(patience)
    }

    /// Adds a packet without payload.
    pub(crate) fn push(&mut self, header: &Header) {
        if self.condition == Condition::Up {
            self.bytes.extend_from_slice(&header.encode());
        }
    }

    /// Adds a packet whose payload `fill` appends.
    pub(crate) fn push_with<E>(
        &mut self,
        header: &Header,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(&header.encode());
        let filled = fill(&mut self.bytes);
        if filled.is_err() || self.condition != Condition::Up {
            self.bytes.truncate(before);
        }
        filled
    }

    /// Lets a QP wait for room.
    pub(crate) fn wait(&mut self, at: usize, qpn: u32) {
        if self.among_waiting.insert((at, qpn)) {
            self.waiting.push_back((at, qpn));
        }
    }

    /// Those that waited for room.
    pub(crate) fn take_waiting(&mut self) -> VecDeque<(usize, u32)> {
        self.among_waiting.clear();
        std::mem::take(&mut self.waiting)
    }

    /// Swaps what waits for an empty buffer. False: nothing waits.
    pub(crate) fn take(&mut self, into: &mut Vec<u8>) -> bool {
        into.clear();
        std::mem::swap(&mut self.bytes, into);
        if !into.is_empty() {
            self.stuck_since = None;
        }
        !into.is_empty()
    }

    /// Whether something waits.
    pub(crate) fn has_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The link is new: nothing of an earlier one goes over it.
    pub(crate) fn open(&mut self, tenants: HashMap<u32, u32>) {
        self.bytes.clear();
        self.stuck_since = None;
        (self.condition, self.tenants) = (Condition::Up, tenants);
    }

    /// The link is gone.
    pub(crate) fn close(&mut self, condition: Condition) {
        self.bytes.clear();
        self.condition = condition;
    }

    /// Whether the peer has a tenant of ours.
    pub(crate) fn has_tenant(&self, ours: u32) -> bool {
        self.tenants.values().any(|tenant| *tenant == ours)
    }

    /// Our number of a tenant of the peer's.
    pub(crate) fn tenant(&self, theirs: u32) -> Option<u32> {
        self.tenants.get(&theirs).copied()
    }
}
