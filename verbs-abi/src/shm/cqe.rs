//! Completion rings: one for each QP and direction, one producer (the seat holder), one consumer (the owner).
//!
//! An entry is believed when its sequence word says so; that word is written last, so a producer killed
//! before it leaves nothing behind. A ring cannot overflow: the owner never has more requests outstanding or
//! unpolled than the ring has entries.

use std::sync::atomic::Ordering;

use super::Window;
use crate::verbs::WcStatus;

/// Bytes of an entry.
pub const CQE_LEN: usize = 32;

/// What an adapter of the field's main vendor says in `ibv_wc.sl` of a datagram over Ethernet, where there are no
/// service levels: bit 3 for UDP (RoCE v2), 2 for IPv4 below. UCX before 1.19 looks for the GRH by it.
pub const SL_IPV4: u8 = 0xa;
/// The same with 1 for IPv6.
pub const SL_IPV6: u8 = 0x9;

/// A completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cqe {
    /// The application's id.
    pub wr_id: u64,
    /// Bytes received, read or written.
    pub byte_len: u32,
    /// Immediate data.
    pub imm: u32,
    /// Source QP (UD).
    pub src_qp: u32,
    /// Low 32 bits of the number of the WQE it completes.
    pub wqe: u32,
    /// `enum ibv_wc_status`.
    pub status: u8,
    /// `enum ibv_wc_opcode`, with bit 7 standing for `IBV_WC_RECV`.
    pub opcode: u8,
    /// `enum ibv_wc_flags`.
    pub flags: u8,
    /// `ibv_wc.sl`: of a datagram, the kind of packet that it came in ([`SL_IPV4`], [`SL_IPV6`]).
    pub sl: u8,
}

/// Number that marks position `at` as written; never that of an older lap.
fn sequence(at: u64) -> u32 {
    (at as u32).wrapping_add(1)
}

/// The producer's end.
#[derive(Clone, Debug)]
pub struct CompletionWriter {
    ring: Window,
    mask: u64,
    tail: u64,
}

impl CompletionWriter {
    /// A writer that continues at position `tail`.
    #[must_use]
    pub fn new(ring: Window, tail: u64) -> Self {
        let mask = (ring.len() / CQE_LEN) as u64 - 1;
        Self { ring, mask, tail }
    }

    /// Completions written so far.
    #[inline]
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Completions that the ring has room for.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.mask.wrapping_add(1)
    }

    /// Continues at another position (a seat changed hands).
    pub fn seek(&mut self, tail: u64) {
        self.tail = tail;
    }

    /// Publishes a completion. Release: pairs with the Acquire in [`CompletionReader::pop`].
    #[inline]
    pub fn push(&mut self, cqe: &Cqe) {
        let at = (self.tail & self.mask) as usize * CQE_LEN;
        self.ring.u64(at).store(cqe.wr_id, Ordering::Relaxed);
        self.ring.u64(at + 8).store(u64::from(cqe.byte_len) | u64::from(cqe.imm) << 32, Ordering::Relaxed);
        self.ring.u64(at + 16).store(u64::from(cqe.src_qp) | u64::from(cqe.wqe) << 32, Ordering::Relaxed);
        let kind = u64::from(cqe.status) | u64::from(cqe.opcode) << 8 | u64::from(cqe.flags) << 16;
        let kind = kind | u64::from(cqe.sl) << 24;
        self.ring.u64(at + 24).store(kind | u64::from(sequence(self.tail)) << 32, Ordering::Release);
        // It can begin anywhere: a seat's counts lie where the owner can write.
        self.tail = self.tail.wrapping_add(1);
    }

    /// Whether the entry at the tail was already published: its writer died before it could say so.
    #[must_use]
    pub fn tail_is_published(&self) -> bool {
        let at = (self.tail & self.mask) as usize * CQE_LEN;
        (self.ring.u64(at + 24).load(Ordering::Acquire) >> 32) as u32 == sequence(self.tail)
    }
}

/// The consumer's end.
#[derive(Clone, Debug)]
pub struct CompletionReader {
    ring: Window,
    mask: u64,
    head: u64,
}

impl CompletionReader {
    /// A reader that starts at position `head`.
    #[must_use]
    pub fn new(ring: Window, head: u64) -> Self {
        let mask = (ring.len() / CQE_LEN) as u64 - 1;
        Self { ring, mask, head }
    }

    /// Completions taken so far.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Completions that could be taken now.
    #[must_use]
    pub fn available(&self) -> u64 {
        let written = |at: &u64| {
            let word = self.ring.u64((at & self.mask) as usize * CQE_LEN + 24).load(Ordering::Acquire);
            (word >> 32) as u32 == sequence(*at)
        };
        (self.head..=self.head.saturating_add(self.mask)).take_while(written).count() as u64
    }

    /// Whether the next completion is there.
    #[inline]
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let at = (self.head & self.mask) as usize * CQE_LEN;
        (self.ring.u64(at + 24).load(Ordering::Acquire) >> 32) as u32 == sequence(self.head)
    }

    /// Whether the next completion is there and says `WR_FLUSH_ERR`.
    #[inline]
    #[must_use]
    pub fn is_flushing(&self) -> bool {
        let at = (self.head & self.mask) as usize * CQE_LEN;
        let kind = self.ring.u64(at + 24).load(Ordering::Acquire);
        (kind >> 32) as u32 == sequence(self.head) && u32::from(kind as u8) == WcStatus::WrFlushErr.value()
    }

    /// Takes the next completion.
    #[inline]
    pub fn pop(&mut self) -> Option<Cqe> {
        let at = (self.head & self.mask) as usize * CQE_LEN;
        let kind = self.ring.u64(at + 24).load(Ordering::Acquire);
        if (kind >> 32) as u32 != sequence(self.head) {
            return None;
        }
        let (lengths, origin) = (self.ring.u64(at + 8), self.ring.u64(at + 16));
        let (lengths, origin) = (lengths.load(Ordering::Relaxed), origin.load(Ordering::Relaxed));
        self.head += 1;
        Some(Cqe {
            wr_id: self.ring.u64(at).load(Ordering::Relaxed),
            byte_len: lengths as u32,
            imm: (lengths >> 32) as u32,
            src_qp: origin as u32,
            wqe: (origin >> 32) as u32,
            status: kind as u8,
            opcode: (kind >> 8) as u8,
            flags: (kind >> 16) as u8,
            sl: (kind >> 24) as u8,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_come_out_in_order_over_many_laps() {
        let ring = Window::heap(4 * CQE_LEN);
        let mut writer = CompletionWriter::new(ring.clone(), 0);
        let mut reader = CompletionReader::new(ring, 0);
        assert_eq!(reader.pop(), None);
        for lap in 0..10u32 {
            let written: Vec<_> = (0..3u8)
                .map(|i| Cqe {
                    wr_id: u64::from(lap),
                    byte_len: 1,
                    imm: 2,
                    src_qp: 3,
                    wqe: lap,
                    status: i,
                    opcode: 5,
                    flags: 6,
                    sl: 7,
                })
                .collect();
            written.iter().for_each(|cqe| writer.push(cqe));
            assert_eq!(reader.available(), 3);
            let read: Vec<_> = std::iter::from_fn(|| reader.pop()).collect();
            assert_eq!(read, written);
        }
    }

    #[test]
    fn a_new_writer_finds_what_a_dead_one_published() {
        let ring = Window::heap(4 * CQE_LEN);
        let mut dead = CompletionWriter::new(ring.clone(), 0);
        (0..6).for_each(|_| dead.push(&Cqe::default()));
        let mut next = CompletionWriter::new(ring, 5);
        assert!(next.tail_is_published());
        next.seek(6);
        assert!(!next.tail_is_published());
    }
}
