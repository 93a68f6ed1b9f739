//! What waits to go over one stream of a link.

use std::collections::{HashSet, VecDeque};

use super::{
    load::{Late, Load},
    packet::{HEADER, Header},
};

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

/// The outbox of one stream.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    /// Packets among them whose payload is read when they are sent.
    late: VecDeque<Late>,
    /// Bytes of that payload.
    late_bytes: usize,
    pub(crate) condition: Condition,
    /// QPs that wait for room, by index and number.
    waiting: VecDeque<(usize, u32)>,
    among_waiting: HashSet<(usize, u32)>,
    /// Since when a datagram to a group finds no room, unless something was taken in between.
    stuck_since: Option<u64>,
}

impl Outbox {
    fn len(&self) -> usize {
        self.bytes.len() + self.late_bytes
    }

    /// Whether a QP may add a packet with payload.
    pub(crate) fn has_room(&self) -> bool {
        self.condition == Condition::Up && self.len() < ROOM
    }

    /// Whether a packet without payload may be added.
    pub(crate) fn has_reply_room(&self) -> bool {
        self.condition == Condition::Up && self.len() < REPLY_ROOM
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

    /// Adds a packet of the QP at `qp` whose payload stays where it is until it is sent.
    pub(crate) fn push_late(&mut self, header: &Header, qp: usize) {
        if self.condition == Condition::Up {
            self.bytes.extend_from_slice(&header.encode());
            let (qpn, len) = (header.path.source_qpn, header.len as usize);
            let (end, psn, life) = (self.bytes.len(), header.psn, header.stream);
            debug_assert!(end >= HEADER);
            self.late.push_back(Late { end, qp, qpn, psn, life, len, pieces: 0 });
            self.late_bytes += len;
        }
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

    /// Swaps what waits for a load that is done with. False: nothing waits.
    pub(crate) fn take(&mut self, into: &mut Load) -> bool {
        self.late_bytes = 0;
        if !self.bytes.is_empty() {
            self.stuck_since = None;
        }
        into.refill(&mut self.bytes, &mut self.late);
        !into.is_empty()
    }

    /// Whether something waits.
    pub(crate) fn has_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The stream is new: nothing of an earlier one goes over it.
    pub(crate) fn open(&mut self) {
        self.stuck_since = None;
        self.close(Condition::Up);
    }

    /// The stream is gone.
    pub(crate) fn close(&mut self, condition: Condition) {
        self.bytes.clear();
        self.late.clear();
        self.late_bytes = 0;
        self.condition = condition;
    }
}
