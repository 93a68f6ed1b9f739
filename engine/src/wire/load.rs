//! Packets on their way to a socket, and how far they are.
//!
//! Headers and short payloads are bytes of the load. Long payload stays in the registered memory that it comes from
//! until the moment when the socket takes it: then it is looked up anew, and a packet that nobody waits for any more is
//! left out. A packet that was begun is finished from a copy, whatever becomes of the memory.
//! Leaves to others: finding the memory (`fabric`), the socket (the host).

use std::{collections::VecDeque, ptr::NonNull};

use super::packet::HEADER;
use crate::transfer::copy_out;

/// Pieces of one write; Linux takes 1024.
const PIECES: usize = 512;

/// A packet whose payload is read when it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Late {
    /// Where its header ends in the load's bytes.
    pub(crate) end: usize,
    /// Index and number of its QP.
    pub(crate) qp: usize,
    pub(crate) qpn: u32,
    pub(crate) psn: u64,
    /// Which life of the QP it belongs to.
    pub(crate) life: u32,
    pub(crate) len: usize,
    /// Of how many pieces it was when it was listed last.
    pub(crate) pieces: usize,
}

/// A piece of memory to be written to a socket, or read into from one. It may be used as long as nothing changes the
/// fabric that told it.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Its first byte.
    pub start: NonNull<u8>,
    /// Bytes.
    pub len: usize,
}

impl Piece {
    /// Bytes of this process.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { start: NonNull::from(bytes).cast(), len: bytes.len() }
    }

    /// Bytes of this process that may be written to.
    #[must_use]
    pub fn of_mut(bytes: &mut [u8]) -> Self {
        let len = bytes.len();
        Self { start: NonNull::from(bytes).cast(), len }
    }

    /// Where it is, for comparing it with another one.
    #[must_use]
    pub fn place(&self) -> (usize, usize) {
        (self.start.addr().get(), self.len)
    }

    /// What is left of it behind its first bytes.
    #[must_use]
    pub fn behind(&self, count: usize) -> Self {
        let count = count.min(self.len);
        // Inside the piece or just behind it.
        let start = self.start.as_ptr().wrapping_add(count);
        Self { start: NonNull::new(start).unwrap_or(self.start), len: self.len - count }
    }
}

/// Packets that were taken out of an outbox.
#[derive(Debug, Default)]
pub struct Load {
    /// The end of a packet that was begun, which comes first.
    rest: Vec<u8>,
    rest_at: usize,
    bytes: Vec<u8>,
    /// Everything before was sent.
    at: usize,
    late: VecDeque<Late>,
}

/// The pieces of one write.
#[derive(Debug, Default)]
pub struct Pieces {
    all: Vec<Piece>,
    /// Those of payload alone.
    payload: Vec<Piece>,
}

impl Pieces {
    /// The memory, in order.
    #[must_use]
    pub fn as_slice(&self) -> &[Piece] {
        &self.all
    }

    /// Appends what lies there; says how much.
    pub fn copy(&self, into: &mut Vec<u8>) -> usize {
        let before = into.len();
        copy_out(&self.all, 0, into);
        into.len() - before
    }

    fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.all.push(Piece::of(bytes));
        }
    }
}

impl Load {
    /// One that begins with bytes that are no packet.
    #[must_use]
    pub fn beginning_with(bytes: Vec<u8>) -> Self {
        Self { rest: bytes, ..Self::default() }
    }

    /// Whether all of it was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest_at == self.rest.len() && self.at == self.bytes.len()
    }

    /// Takes new packets when the old ones are done with, and leaves their buffers for more.
    pub(super) fn refill(&mut self, bytes: &mut Vec<u8>, late: &mut VecDeque<Late>) {
        if self.is_empty() {
            self.rest.clear();
            self.bytes.clear();
            (self.rest_at, self.at) = (0, 0);
            std::mem::swap(&mut self.bytes, bytes);
            std::mem::swap(&mut self.late, late);
        }
    }

    /// The packets whose payload is read when it is sent.
    pub(crate) fn late(&self) -> impl Iterator<Item = &Late> {
        self.late.iter()
    }

    /// Lists what is to be written next. `find` says where a packet's payload is; what it does not find is left out.
    pub(crate) fn list(
        &mut self,
        pieces: &mut Pieces,
        mut find: impl FnMut(&Late, &mut dyn FnMut(Piece)) -> bool,
    ) {
        pieces.all.clear();
        pieces.payload.clear();
        let mut found = 0;
        while let Some(late) = self.late.get(found).filter(|_| pieces.payload.len() < PIECES / 2) {
            let before = pieces.payload.len();
            let is_there = find(late, &mut |piece| pieces.payload.push(piece));
            let listed: usize = pieces.payload[before..].iter().map(|piece| piece.len).sum();
            if is_there && listed == late.len {
                self.late[found].pieces = pieces.payload.len() - before;
                found += 1;
            } else {
                pieces.payload.truncate(before);
                self.leave_out(found);
            }
        }
        pieces.push(&self.rest[self.rest_at..]);
        let (mut at, mut piece) = (self.at, 0);
        for late in self.late.iter().take(found) {
            pieces.push(&self.bytes[at..late.end]);
            pieces.all.extend_from_slice(&pieces.payload[piece..piece + late.pieces]);
            (at, piece) = (late.end, piece + late.pieces);
        }
        if found == self.late.len() {
            pieces.push(&self.bytes[at..]);
        }
    }

    /// Forgets a packet that was not begun.
    fn leave_out(&mut self, index: usize) {
        let Some(late) = self.late.remove(index) else { return };
        self.bytes.drain(late.end - HEADER..late.end);
        self.late.iter_mut().skip(index).for_each(|late| late.end -= HEADER);
    }

    /// The socket has taken so many bytes of what was listed. Tells of a packet that was begun and copied for the rest.
    pub(crate) fn advance(&mut self, pieces: &Pieces, mut count: usize) -> Option<Late> {
        let mut copied = None;
        let taken = count.min(self.rest.len() - self.rest_at);
        self.rest_at += taken;
        count -= taken;
        let mut payload = &pieces.payload[..];
        while count > 0 {
            let own_end = self.late.front().map_or(self.bytes.len(), |late| late.end);
            let taken = count.min(own_end - self.at);
            self.at += taken;
            count -= taken;
            let begun = |late: &Late| self.at > late.end - HEADER;
            let Some(late) = self.late.front().copied().filter(begun) else { break };
            let (own, others) = payload.split_at(late.pieces);
            let taken = count.min(late.len);
            count -= taken;
            if self.at + taken < late.end + late.len {
                self.rest.clear();
                self.rest.extend_from_slice(&self.bytes[self.at..late.end]);
                copy_out(own, taken, &mut self.rest);
                self.rest_at = 0;
                copied = Some(late);
            }
            self.at = late.end;
            self.late.pop_front();
            payload = others;
        }
        copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A load of packets of these payload lengths, numbered; the payload of those of 100 bytes and more is late.
    fn load(lengths: &[usize]) -> (Load, Vec<Vec<u8>>, Vec<u8>) {
        let (mut bytes, mut late, mut whole) = (Vec::new(), VecDeque::new(), Vec::new());
        let mut payloads = Vec::new();
        for (psn, len) in (0_u64..).zip(lengths) {
            let header = [psn as u8 | 0x80; HEADER];
            let payload = vec![psn as u8; *len];
            bytes.extend(header);
            whole.extend(header);
            whole.extend(&payload);
            if *len >= 100 {
                late.push_back(Late { end: bytes.len(), qp: 0, qpn: 0, psn, life: 1, len: *len, pieces: 0 });
            } else {
                bytes.extend(&payload);
            }
            payloads.push(payload);
        }
        let mut load = Load::default();
        load.refill(&mut bytes, &mut late);
        (load, payloads, whole)
    }

    /// What a socket gets that takes so many bytes at a time.
    fn drain(load: &mut Load, payloads: &[Vec<u8>], step: usize, lost_from: usize) -> Vec<u8> {
        let (mut pieces, mut got) = (Pieces::default(), Vec::new());
        for _ in 0..100_000 {
            let gone = got.len() >= lost_from;
            load.list(&mut pieces, |late, tell| {
                let payload = &payloads[late.psn as usize];
                let (head, tail) = payload.split_at(payload.len() / 3);
                [head, tail].iter().for_each(|part| {
                    tell(Piece::of(part));
                });
                !gone
            });
            let mut all = Vec::new();
            copy_out(pieces.as_slice(), 0, &mut all);
            if all.is_empty() {
                assert!(load.is_empty());
                return got;
            }
            let count = all.len().min(step);
            got.extend_from_slice(&all[..count]);
            load.advance(&pieces, count);
        }
        panic!("no end");
    }

    #[test]
    fn a_socket_gets_every_byte_once_however_little_it_takes_at_a_time() {
        for step in [1, 7, HEADER - 1, HEADER, HEADER + 1, 300, 1000, 100_000] {
            let (mut load, payloads, whole) = load(&[0, 500, 8, 100, 0, 2000, 700, 3]);
            assert!(drain(&mut load, &payloads, step, usize::MAX) == whole, "{step}");
        }
    }

    #[test]
    fn a_packet_whose_memory_has_gone_is_left_out_unless_it_was_begun() {
        let lengths = [500, 8, 1000, 300];
        for lost_from in [1, HEADER, HEADER + 500, 2 * HEADER + 508, 2 * HEADER + 509] {
            let (mut load, payloads, whole) = load(&lengths);
            let got = drain(&mut load, &payloads, 1, lost_from);
            let second = 2 * HEADER + 508;
            let begun_third = lost_from > second;
            let expected = if begun_third { &whole[..3 * HEADER + 1508] } else { &whole[..second] };
            assert!(got == expected, "{lost_from}: {} bytes", got.len());
        }
    }
}
