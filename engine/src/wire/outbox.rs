//! What waits to go over one stream of a link.

use std::collections::VecDeque;

use super::{
    line::Line,
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
    line: Line,
    /// Since when a datagram to a group finds no room, unless something was taken in between.
    stuck_since: Option<u64>,
}

impl Outbox {
    fn len(&self) -> usize {
        self.bytes.len() + self.late_bytes
    }

    /// Whether a QP may add a packet with payload.
    pub(crate) fn has_room(&self, qpn: u32) -> bool {
        self.condition == Condition::Up && self.len() < ROOM && self.line.admits(qpn)
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
        } else {
            self.line.charge(header.path.source_qpn, self.bytes.len() - before);
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
            self.line.charge(qpn, HEADER + len);
        }
    }

    /// Lets a QP wait for room.
    pub(crate) fn wait(&mut self, qpn: u32) {
        self.line.wait(qpn);
    }

    /// Calls a QP that waits, if there is room beside what those that were called may still use.
    pub(crate) fn call_next(&mut self) -> Option<u32> {
        let has_room = self.condition == Condition::Up && self.len() + self.line.promised() < ROOM;
        if has_room { self.line.call() } else { None }
    }

    /// Those that were called and have no turn any more leave room for others. False: nobody was called.
    pub(crate) fn settle(&mut self, has_turn: impl FnMut(u32) -> bool) -> bool {
        let had_called = self.line.has_called();
        self.line.settle(has_turn);
        had_called
    }

    /// Whether anybody waits or was called.
    pub(crate) fn has_line(&self) -> bool {
        !self.line.is_idle()
    }

    /// All that waited, who need not wait any longer.
    pub(crate) fn dissolve_line(&mut self) -> Vec<u32> {
        self.line.dissolve()
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
