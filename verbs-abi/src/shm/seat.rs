//! The seat token of a QP: who executes its send queue now.
//!
//! ```text
//!             owner parks                          owner enters
//!   ROUTER  <----------------------- RUNNING <---------------------- OWNER
//!     |   ^                             |  owner leaves                ^ ^
//!     |   +----- router takes ----------|------------------------------+ |
//!     +----------------- router gives back ------------------------------+
//! ```
//!
//! Two words, each with one writer: what the router grants, and what the owner does. The owner says that it runs and
//! looks once more whether it may; the router says that it wants the seat and looks whether the owner runs. Between
//! the two is a fence on each side ([`barrier`]), of which the router pays for both where it can. The router never
//! waits for a seat on a lane: a running owner is looked at again later, and a dead one's seat is taken by force.

use std::sync::atomic::{AtomicU32, Ordering};

use super::barrier;

/// Grant: the router executes.
const ROUTER: u32 = 0;
/// Grant: the owner may execute.
const OWNER: u32 = 1;
/// Grant: the owner may go on with what it has begun, and not begin anything.
const WANTED: u32 = 2;
/// The bits that say so. Those above count how often the router gave the seat, so that an owner knows whether anybody
/// else has executed since it left.
const HOLDER: u32 = 3;

/// The owner does nothing.
const IDLE: u32 = 0;
/// The owner executes.
const RUNNING: u32 = 1;
/// The owner has handed back what it was granted in the term above.
const PARKED: u32 = 2;

/// The token, as it lies in the QP's header.
#[derive(Clone, Copy, Debug)]
pub struct Seat<'a> {
    grant: &'a AtomicU32,
    action: &'a AtomicU32,
}

impl<'a> Seat<'a> {
    /// Wraps the words: the router's and the owner's.
    #[inline]
    #[must_use]
    pub fn new(grant: &'a AtomicU32, action: &'a AtomicU32) -> Self {
        Self { grant, action }
    }

    /// Owner: starts to execute. False: the router holds the seat. `light`: the router makes heavy fences.
    #[inline]
    #[must_use]
    pub fn enter(self, light: bool) -> bool {
        let (granted, before) = (self.grant.load(Ordering::Relaxed), self.action.load(Ordering::Relaxed));
        if granted & HOLDER != OWNER || before == parked(granted) {
            return false;
        }
        self.action.store(RUNNING, Ordering::Relaxed);
        barrier::light(light);
        if self.grant.load(Ordering::Acquire) == granted {
            return true;
        }
        self.action.store(before, Ordering::Release);
        false
    }

    /// Owner, while it runs: which of its terms this is. Another than last time: the router was here in between.
    #[inline]
    #[must_use]
    pub fn term(self) -> u32 {
        self.grant.load(Ordering::Relaxed) / (HOLDER + 1)
    }

    /// Owner, while it runs: whether the router waits for it to leave.
    #[inline]
    #[must_use]
    pub fn is_wanted(self) -> bool {
        self.grant.load(Ordering::Relaxed) & HOLDER != OWNER
    }

    /// Owner: stops executing and keeps the seat. Everything published before is visible to whoever takes it.
    #[inline]
    pub fn leave(self) {
        self.action.store(IDLE, Ordering::Release);
    }

    /// Owner: stops executing and hands the seat to the router (a doorbell follows).
    pub fn park(self) {
        self.action.store(parked(self.grant.load(Ordering::Relaxed)), Ordering::SeqCst);
    }

    /// Router: asks for the seat, so that the owner begins nothing more. True: a heavy fence must follow before
    /// [`Self::take`], one for any number of seats.
    #[must_use]
    pub fn ask(self) -> bool {
        let granted = self.grant.load(Ordering::Relaxed);
        let is_new = granted & HOLDER == OWNER;
        if is_new {
            self.grant.store(granted & !HOLDER | WANTED, Ordering::SeqCst);
        }
        is_new
    }

    /// Router: takes an idle owner's seat. False: the owner runs at this moment, and does not begin anew.
    #[must_use]
    pub fn take(self) -> bool {
        if self.ask() {
            barrier::heavy();
        }
        let granted = self.grant.load(Ordering::Relaxed);
        if granted & HOLDER == WANTED {
            if self.action.load(Ordering::Acquire) == RUNNING {
                return false;
            }
            self.grant.store(granted & !HOLDER | ROUTER, Ordering::SeqCst);
        }
        true
    }

    /// Router: whether the owner executes at this moment.
    #[must_use]
    pub fn is_running(self) -> bool {
        self.grant.load(Ordering::Relaxed) & HOLDER != ROUTER && self.action.load(Ordering::SeqCst) == RUNNING
    }

    /// Router: takes the seat of an owner that is dead.
    pub fn take_from_dead(self) {
        self.grant.store(self.grant.load(Ordering::Relaxed) & !HOLDER | ROUTER, Ordering::SeqCst);
    }

    /// Router: gives the seat to the owner. The caller then looks at the queue's tail once more.
    pub fn give(self) {
        let term = (self.grant.load(Ordering::Relaxed) & !HOLDER).wrapping_add(HOLDER + 1);
        self.grant.store(term | OWNER, Ordering::SeqCst);
    }

    /// Whether the router may execute. A grant that nobody writes counts as the router's.
    #[inline]
    #[must_use]
    pub fn is_router(self) -> bool {
        let granted = self.grant.load(Ordering::SeqCst);
        !matches!(granted & HOLDER, OWNER | WANTED) || self.action.load(Ordering::SeqCst) == parked(granted)
    }
}

/// What an owner does that has handed back this grant.
#[inline]
fn parked(granted: u32) -> u32 {
    granted & !HOLDER | PARKED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_has_the_seat_until_it_is_wanted() {
        let (grant, action) = (AtomicU32::new(0), AtomicU32::new(0));
        let seat = Seat::new(&grant, &action);
        assert!(seat.is_router() && !seat.enter(false), "the router's at first");
        seat.give();
        let mut terms = Vec::new();
        for _ in 0..3 {
            assert!(seat.enter(false));
            terms.push(seat.term());
            seat.leave();
        }
        assert!(terms.iter().all(|term| *term == terms[0]));
        assert!(seat.enter(false));
        assert!(!seat.take() && seat.is_wanted() && seat.is_running());
        seat.leave();
        assert!(!seat.enter(false), "it does not begin anew");
        assert!(seat.take() && seat.is_router() && !seat.is_running());
        seat.give();
        assert!(seat.enter(false));
        assert_ne!(seat.term(), terms[0]);
    }

    #[test]
    fn what_was_handed_over_is_the_routers_until_it_is_given_back() {
        let (grant, action) = (AtomicU32::new(0), AtomicU32::new(0));
        let seat = Seat::new(&grant, &action);
        for _ in 0..3 {
            seat.give();
            assert!(seat.enter(false));
            seat.park();
            assert!(!seat.enter(false) && seat.is_router() && !seat.is_running());
            assert!(seat.take());
            assert!(!seat.enter(false));
        }
    }

    #[test]
    fn a_dead_owners_seat_is_taken_by_force() {
        let (grant, action) = (AtomicU32::new(0), AtomicU32::new(0));
        let seat = Seat::new(&grant, &action);
        seat.give();
        assert!(seat.enter(false));
        assert!(!seat.take());
        seat.take_from_dead();
        assert!(seat.is_router() && !seat.is_running());
    }

    /// Two threads: the owner enters all the time, the router takes the seat and gives it back.
    #[test]
    fn owner_and_router_never_execute_at_once() {
        for light in [false, barrier::register()] {
            let (grant, action) = (AtomicU32::new(0), AtomicU32::new(0));
            let (inside, ended) = (AtomicU32::new(0), AtomicU32::new(0));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let seat = Seat::new(&grant, &action);
                    while ended.load(Ordering::Relaxed) == 0 {
                        if seat.enter(light) {
                            // Not atomic on purpose: two at once lose one.
                            inside.store(inside.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                            assert_eq!(inside.load(Ordering::Relaxed), 1, "the router is here, too");
                            inside.store(inside.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
                            seat.leave();
                        }
                    }
                });
                let seat = Seat::new(&grant, &action);
                let limit = std::time::Instant::now() + std::time::Duration::from_millis(300);
                while std::time::Instant::now() < limit {
                    seat.give();
                    let mut looks = 0_u32;
                    while !seat.take() {
                        looks += 1;
                        if looks.is_multiple_of(64) {
                            std::thread::yield_now();
                        }
                    }
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "the owner is here, too");
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
                ended.store(1, Ordering::Relaxed);
            });
        }
    }
}
