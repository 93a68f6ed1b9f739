//! A CQ in the arena: the request for an event, and which of its rings hold something.
//!
//! ```text
//! 0    notify   low 2 bits: what is asked for; above: events raised so far
//! 64   summary  8 words, one bit a ready word
//! 128  ready    512 words, one bit a completion ring
//! ```
//!
//! A CQ is the completion rings of its QPs. Setting a ready bit is idempotent, so a producer killed between
//! publishing an entry and setting the bit costs a sweep.

use std::sync::atomic::{Ordering, fence};

use super::{BLOCK, PAGE, Window};

/// Rings one CQ can gather.
pub const MAX_RINGS: u32 = 512 * 64;
/// Bytes of a CQ.
pub const CQ_LEN: usize = 2 * PAGE;

const SUMMARY: usize = BLOCK;
const READY: usize = 2 * BLOCK;
const ARM_MASK: u64 = 3;

/// What `ibv_req_notify_cq` asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// The next solicited or failed completion.
    Solicited = 1,
    /// The next completion.
    Any = 2,
}

/// A CQ's shared words.
#[derive(Clone, Debug)]
pub struct CqArea(Window);

impl CqArea {
    /// The CQ at `offset` of `arena`.
    #[must_use]
    pub fn new(arena: &Window, offset: u64) -> Option<Self> {
        Some(Self(arena.sub(offset, CQ_LEN)?))
    }

    /// Says that ring `slot` holds something, after the entry is published (producer). True: the caller
    /// rings the completion channel. `solicited` also for completions with an error.
    #[inline]
    #[must_use]
    pub fn publish(&self, slot: u32, solicited: bool) -> bool {
        debug_assert!(slot < MAX_RINGS);
        let word = slot as usize / 64;
        // Orders the entry before the looks below. Partners: the read-modify-writes in `arm` and `take_ready`.
        fence(Ordering::SeqCst);
        if self.0.u64(READY + word * 8).load(Ordering::Relaxed) & 1 << (slot % 64) == 0 {
            self.0.u64(READY + word * 8).fetch_or(1 << (slot % 64), Ordering::SeqCst);
        }
        if self.0.u64(SUMMARY + word / 64 * 8).load(Ordering::Relaxed) & 1 << (word % 64) == 0 {
            self.0.u64(SUMMARY + word / 64 * 8).fetch_or(1 << (word % 64), Ordering::SeqCst);
        }
        self.fire(solicited)
    }

    /// Raises an event if one was asked for: disarms and counts in one step, so that a producer killed here
    /// has either done nothing or left a count that a sweep can see.
    #[inline]
    fn fire(&self, solicited: bool) -> bool {
        let notify = self.0.u64(0);
        let mut seen = notify.load(Ordering::Relaxed);
        loop {
            let wanted = match seen & ARM_MASK {
                0 => false,
                arm if arm == Arm::Solicited as u64 => solicited,
                _ => true,
            };
            if !wanted {
                return false;
            }
            let next = (seen & !ARM_MASK).wrapping_add(ARM_MASK + 1);
            match notify.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }

    /// Asks for an event (owner). A completion published before this call raises none, as the man page says.
    pub fn arm(&self, arm: Arm) {
        // `Any` is the stronger request and is not weakened by a later `Solicited`.
        let notify = self.0.u64(0);
        let mut seen = notify.load(Ordering::Relaxed);
        loop {
            let next = seen & !ARM_MASK | (seen & ARM_MASK).max(arm as u64);
            match notify.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Events raised since the CQ was made (owner).
    #[must_use]
    pub fn events(&self) -> u64 {
        self.0.u64(0).load(Ordering::SeqCst) >> 2
    }

    /// Clears the ready bits and calls `found` with each ring (owner). `found` drains the ring; a ring in
    /// which it leaves something is marked again by [`Self::mark`].
    pub fn take_ready(&self, mut found: impl FnMut(u32)) {
        for group in 0..MAX_RINGS as usize / 64 / 64 {
            if self.0.u64(SUMMARY + group * 8).load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut summary = self.0.u64(SUMMARY + group * 8).swap(0, Ordering::SeqCst);
            while summary != 0 {
                let word = group * 64 + summary.trailing_zeros() as usize;
                summary &= summary - 1;
                let mut bits = self.0.u64(READY + word * 8).swap(0, Ordering::SeqCst);
                while bits != 0 {
                    found(word as u32 * 64 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
            }
        }
    }

    /// Marks a ring as ready without raising an event (owner, or a sweep).
    pub fn mark(&self, slot: u32) {
        let word = slot as usize / 64;
        self.0.u64(READY + word * 8).fetch_or(1 << (slot % 64), Ordering::SeqCst);
        self.0.u64(SUMMARY + word / 64 * 8).fetch_or(1 << (word % 64), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_gives_one_event() {
        let cq = CqArea(Window::heap(CQ_LEN));
        assert!(!cq.publish(0, true), "nothing asked for");
        cq.arm(Arm::Any);
        assert!(cq.publish(0, false));
        assert!(!cq.publish(0, false));
        assert_eq!(cq.events(), 1);
    }

    #[test]
    fn solicited_only_waits_for_a_solicited_completion() {
        let cq = CqArea(Window::heap(CQ_LEN));
        cq.arm(Arm::Solicited);
        assert!(!cq.publish(1, false));
        assert!(cq.publish(1, true));
        cq.arm(Arm::Any);
        cq.arm(Arm::Solicited);
        assert!(cq.publish(1, false), "the stronger request stands");
    }

    #[test]
    fn each_ready_ring_is_found_once() {
        let cq = CqArea(Window::heap(CQ_LEN));
        let ready = [0, 63, 64, 5000, MAX_RINGS - 1];
        for slot in ready.iter().chain(&ready) {
            let _ = cq.publish(*slot, false);
        }
        let mut found = Vec::new();
        cq.take_ready(|slot| found.push(slot));
        assert_eq!(found, ready);
        cq.take_ready(|slot| panic!("{slot} found twice"));
    }
}
