//! A CQ in the arena: the request for an event, which of its rings hold something, and how much that is.
//!
//! ```text
//! 0     notify   2 bits: what is asked for; 1: held back; 16: completions until the event; above: events so far
//! 8     limit    completions that may wait to be polled, 0 where nobody counts; then whether there were more
//! 24    quiet    non-zero: the owner looks into each ring and asks for nothing; owner writes
//! 64    summary  8 words, one bit a ready word
//! 128   ready    512 words, one bit a completion ring
//! 4224  written  completions, where they are counted       producers add
//! 4288  polled   of these                                  owner writes
//! ```
//!
//! A CQ is the completion rings of its QPs. Setting a ready bit is idempotent, so a producer killed between
//! publishing an entry and setting the bit costs a sweep.
//!
//! The rings hold all that can be posted, so an overrun loses nothing here; but it is one, and is told. Counting is needed
//! only where more can be posted than the CQ has entries. Whoever is killed between an entry and its count, or
//! publishes while the count begins, leaves it too low: an overrun may be told late, and never for nothing.

use std::sync::atomic::{Ordering, fence};

use super::{BLOCK, PAGE, Window, barrier};

/// Rings one CQ can gather.
pub const MAX_RINGS: u32 = 512 * 64;
/// Bytes of a CQ.
pub const CQ_LEN: usize = 2 * PAGE;

const QUIET: usize = 24;
const SUMMARY: usize = BLOCK;
const READY: usize = 2 * BLOCK;
const LIMIT: usize = 8;
const OVERRUN: usize = 16;
const WRITTEN: usize = READY + MAX_RINGS as usize / 8;
const POLLED: usize = WRITTEN + BLOCK;
const _: () = assert!(POLLED + BLOCK <= CQ_LEN);

const ARM_MASK: u64 = 3;
/// The event waits for more completions, or for its owner's clock.
const HELD: u64 = 1 << 2;
/// Completions until then.
const LEFT_SHIFT: u32 = 3;
const LEFT_MASK: u64 = 0xffff << LEFT_SHIFT;
const EVENTS_SHIFT: u32 = 19;
const REQUEST_MASK: u64 = (1 << EVENTS_SHIFT) - 1;

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

    /// Says that nobody need be told of completions for now, as the owner looks into each ring (owner).
    pub fn be_quiet(&self) {
        self.0.u64(QUIET).store(1, Ordering::SeqCst);
    }

    /// Ends that: from now on producers set ready bits and raise events. What they published before is in the rings
    /// when this returns (owner).
    pub fn end_quiet(&self) {
        if self.is_quiet() {
            self.0.u64(QUIET).store(0, Ordering::SeqCst);
            barrier::heavy();
        }
    }

    /// Whether nobody need be told of completions. A producer that goes by it must be in a process that is registered
    /// for light fences, and look after it has published.
    #[inline]
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        barrier::light(true);
        self.0.u64(QUIET).load(Ordering::Relaxed) != 0
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
            let waits = seen & HELD != 0 && seen & LEFT_MASK > 1 << LEFT_SHIFT;
            let next = if waits { seen - (1 << LEFT_SHIFT) } else { raised(seen) };
            match notify.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return !waits,
                Err(now) => seen = now,
            }
        }
    }

    /// Asks for an event (owner), `held` back for so many completions if there are any. A completion published before
    /// this call raises none, as the man page says. True: none was asked for before.
    pub fn arm(&self, arm: Arm, held: u16) -> bool {
        // `Any` is the stronger request and is not weakened by a later `Solicited`.
        let notify = self.0.u64(0);
        let hold = if held == 0 { 0 } else { HELD | u64::from(held) << LEFT_SHIFT };
        let mut seen = notify.load(Ordering::Relaxed);
        loop {
            // What waits already goes on waiting.
            let request = if seen & ARM_MASK == 0 { hold } else { seen & REQUEST_MASK & !ARM_MASK };
            let next = seen & !REQUEST_MASK | request | (seen & ARM_MASK).max(arm as u64);
            match notify.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return seen & ARM_MASK == 0,
                Err(now) => seen = now,
            }
        }
    }

    /// Holds an event for `held` completions back no longer (owner). True: some came meanwhile, and the caller rings the
    /// completion channel; else the next one raises it.
    #[must_use]
    pub fn release(&self, held: u16) -> bool {
        let notify = self.0.u64(0);
        let mut seen = notify.load(Ordering::Relaxed);
        loop {
            if seen & ARM_MASK == 0 || seen & HELD == 0 {
                return false;
            }
            let came = seen & LEFT_MASK != u64::from(held) << LEFT_SHIFT;
            let next = if came { raised(seen) } else { seen & !(HELD | LEFT_MASK) };
            match notify.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return came,
                Err(now) => seen = now,
            }
        }
    }

    /// Events raised since the CQ was made (owner).
    #[must_use]
    pub fn events(&self) -> u64 {
        self.0.u64(0).load(Ordering::SeqCst) >> EVENTS_SHIFT
    }

    /// Begins to count (owner), with `waiting` completions unpolled, or changes how many of them may be.
    pub fn set_limit(&self, limit: u32, waiting: Option<u64>) {
        if let Some(waiting) = waiting {
            self.0.u64(WRITTEN).store(waiting, Ordering::Relaxed);
            self.0.u64(POLLED).store(0, Ordering::Relaxed);
        }
        self.0.u64(LIMIT).store(limit.into(), Ordering::Release);
    }

    /// Whether completions are counted.
    #[inline]
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.0.u64(LIMIT).load(Ordering::Relaxed) != 0
    }

    /// Counts a completion that was published (producer). True: it was one too many, and the first such.
    #[must_use]
    pub fn count(&self) -> bool {
        let written = self.0.u64(WRITTEN).fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        let waiting = written.wrapping_sub(self.0.u64(POLLED).load(Ordering::Acquire)).cast_signed();
        let limit = self.0.u64(LIMIT).load(Ordering::Acquire).cast_signed();
        limit != 0 && waiting > limit && self.0.u32(OVERRUN).swap(1, Ordering::AcqRel) == 0
    }

    /// Tells how many of the counted completions were polled (owner).
    pub fn set_polled(&self, polled: u64) {
        self.0.u64(POLLED).store(polled, Ordering::Release);
    }

    /// Completions that were counted are gone, and nobody will poll them (router).
    pub fn forget(&self, completions: u64) {
        if self.is_counted() {
            self.0.u64(WRITTEN).fetch_sub(completions, Ordering::AcqRel);
        }
    }

    /// Whether there were more completions than the CQ has entries.
    #[must_use]
    pub fn is_overrun(&self) -> bool {
        self.0.u32(OVERRUN).load(Ordering::Acquire) != 0
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

/// The request is fulfilled, and one more event raised.
fn raised(notify: u64) -> u64 {
    (notify & !REQUEST_MASK).wrapping_add(1 << EVENTS_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_is_held_back_comes_with_the_last_completion_or_with_the_clock() {
        let cq = CqArea(Window::heap(CQ_LEN));
        cq.arm(Arm::Any, 3);
        assert_eq!([0; 3].map(|_| cq.publish(0, false)), [false, false, true]);
        assert!(!cq.release(3), "it has come");
        cq.arm(Arm::Any, 3);
        assert!(!cq.release(3), "nothing came");
        assert!(cq.publish(0, false), "not held back any longer");
        cq.arm(Arm::Any, 3);
        assert!(!cq.publish(0, false));
        cq.arm(Arm::Any, 3);
        assert!(cq.release(3), "asking again loses nothing");
        assert_eq!(cq.events(), 3);
    }

    #[test]
    fn one_completion_too_many_is_told_once() {
        let cq = CqArea(Window::heap(CQ_LEN));
        assert!(!cq.is_counted());
        cq.set_limit(2, Some(1));
        assert!(!cq.count());
        cq.set_polled(1);
        assert!(!cq.count());
        cq.forget(1);
        assert!(!cq.count() && !cq.is_overrun());
        assert!(cq.count() && cq.is_overrun());
        assert!(!cq.count());
    }

    #[test]
    fn one_request_gives_one_event() {
        let cq = CqArea(Window::heap(CQ_LEN));
        assert!(!cq.publish(0, true), "nothing asked for");
        cq.arm(Arm::Any, 0);
        assert!(cq.publish(0, false));
        assert!(!cq.publish(0, false));
        assert_eq!(cq.events(), 1);
    }

    #[test]
    fn solicited_only_waits_for_a_solicited_completion() {
        let cq = CqArea(Window::heap(CQ_LEN));
        cq.arm(Arm::Solicited, 0);
        assert!(!cq.publish(1, false));
        assert!(cq.publish(1, true));
        cq.arm(Arm::Any, 0);
        cq.arm(Arm::Solicited, 0);
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
