//! The seat token of a QP: who executes its send queue now.
//!
//! ```text
//!             owner parks (store)                owner runs (CAS)
//!   ROUTER  <----------------------- RUNNING <---------------------- OWNER
//!     |   ^                             |  owner done (store)          ^ ^
//!     |   +----- router takes (CAS) ----|------------------------------+ |
//!     +----------------- router gives back (store) ----------------------+
//! ```
//!
//! Only the owner's process and the router write it. The router never waits for it on a lane: a RUNNING seat
//! is looked at again later, and a dead owner's seat is taken by force.

use std::sync::atomic::{AtomicU32, Ordering};

const ROUTER: u32 = 0;
const OWNER: u32 = 1;
const RUNNING: u32 = 2;
/// The bits that name the holder. Those above count how often the router gave the seat, so that an owner knows
/// whether anybody else has executed since it left.
const HOLDER: u32 = 3;

/// The token, as it lies in the QP's header.
#[derive(Clone, Copy, Debug)]
pub struct Seat<'a>(&'a AtomicU32);

impl<'a> Seat<'a> {
    /// Wraps the word.
    #[must_use]
    pub fn new(word: &'a AtomicU32) -> Self {
        Self(word)
    }

    /// Owner: starts to execute. False: the router holds the seat.
    #[inline]
    #[must_use]
    pub fn enter(self) -> bool {
        let seen = self.0.load(Ordering::Relaxed);
        let running = seen & !HOLDER | RUNNING;
        seen & HOLDER == OWNER
            && self.0.compare_exchange(seen, running, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Owner, while it runs: which of its terms this is. Another than last time: the router was here in between.
    #[inline]
    #[must_use]
    pub fn term(self) -> u32 {
        self.0.load(Ordering::Relaxed) / (HOLDER + 1)
    }

    /// Owner: stops executing and keeps the seat. Everything published before is visible to whoever takes it.
    #[inline]
    pub fn leave(self) {
        self.0.store(self.0.load(Ordering::Relaxed) & !HOLDER | OWNER, Ordering::Release);
    }

    /// Owner: stops executing and hands the seat to the router (a doorbell follows).
    pub fn park(self) {
        self.0.store(self.0.load(Ordering::Relaxed) & !HOLDER | ROUTER, Ordering::SeqCst);
    }

    /// Router: takes an idle owner's seat. False: the owner runs at this moment.
    #[must_use]
    pub fn take(self) -> bool {
        let seen = self.0.load(Ordering::SeqCst);
        if seen & HOLDER != OWNER {
            return seen & HOLDER != RUNNING;
        }
        match self.0.compare_exchange(seen, seen & !HOLDER, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(now) => now & HOLDER != RUNNING,
        }
    }

    /// Router: whether the owner executes at this moment.
    #[must_use]
    pub fn is_running(self) -> bool {
        self.0.load(Ordering::SeqCst) & HOLDER == RUNNING
    }

    /// Router: takes the seat of an owner that is dead.
    pub fn take_from_dead(self) {
        self.0.store(self.0.load(Ordering::Relaxed) & !HOLDER | ROUTER, Ordering::SeqCst);
    }

    /// Router: gives the seat to the owner. The caller then looks at the queue's tail once more.
    pub fn give(self) {
        let term = (self.0.load(Ordering::Relaxed) & !HOLDER).wrapping_add(HOLDER + 1);
        self.0.store(term | OWNER, Ordering::SeqCst);
    }

    /// Whether the router may execute. A value that nobody writes counts as the router's.
    #[inline]
    #[must_use]
    pub fn is_router(self) -> bool {
        !matches!(self.0.load(Ordering::SeqCst) & HOLDER, OWNER | RUNNING)
    }
}
