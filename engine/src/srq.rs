//! Shared receive queues, as the router's seat sees them: who consumes which receive, and when few are left.
//!
//! A responder claims a receive when a message begins, and keeps it until the message is complete: other QPs take the
//! next ones meanwhile. Those of an XRC queue are completed to the queue's own CQ.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use verbs_abi::shm::{cqe::Cqe, srq::SrqArea, wqe::BadWqe, wqe::RecvWqe};

use crate::Completions;

/// A shared receive queue.
#[derive(Debug)]
pub(crate) struct SharedReceives {
    /// Its number, by which XRC requests name it.
    pub(crate) number: u32,
    /// The protection domain that receives are checked in.
    pub(crate) pd: u32,
    state: Mutex<State>,
    limit_reached: AtomicBool,
}

#[derive(Debug)]
struct State {
    area: SrqArea,
    head: u64,
    /// Receives that were claimed and not consumed.
    returned: VecDeque<(u32, RecvWqe)>,
    /// Fewer receives than this raise an event, once; 0 for none.
    limit: u32,
    completions: Option<Completions>,
}

/// A receive that a message has begun to fill.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) queue: Arc<SharedReceives>,
    pub(crate) slot: u32,
}

impl SharedReceives {
    /// The queue at `area`. With `completions` it is an XRC queue.
    #[must_use]
    pub(crate) fn new(number: u32, pd: u32, area: SrqArea, completions: Option<Completions>) -> Arc<Self> {
        let state = State { area, head: 0, returned: VecDeque::new(), limit: 0, completions };
        Arc::new(Self { number, pd, state: Mutex::new(state), limit_reached: AtomicBool::new(false) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a receive is posted that nobody has claimed.
    pub(crate) fn has_receive(&self) -> bool {
        let state = self.state();
        !state.returned.is_empty() || state.area.posted_since(state.head) != 0
    }

    /// Asks whoever posts a receive to ring the router, or stops asking.
    pub(crate) fn set_ring_me(&self, on: bool) {
        self.state().area.ring_me().store(u32::from(on), Ordering::SeqCst);
    }

    /// Whether whoever posts a receive is asked to ring.
    pub(crate) fn rings_me(&self) -> bool {
        self.state().area.ring_me().load(Ordering::SeqCst) != 0
    }

    /// Claims the next receive. `None`: there is none.
    pub(crate) fn claim(self: &Arc<Self>, wqe: &mut RecvWqe) -> Result<Option<Claim>, BadWqe> {
        let mut state = self.state();
        let slot = match state.returned.pop_front() {
            Some((slot, returned)) => {
                *wqe = returned;
                slot
            }
            None => {
                let Some(slot) = state.area.read(state.head, wqe)? else { return Ok(None) };
                state.head = state.head.wrapping_add(1);
                slot
            }
        };
        let left = state.area.posted_since(state.head).saturating_add(state.returned.len() as u64);
        if left < u64::from(state.limit) {
            state.limit = 0;
            self.limit_reached.store(true, Ordering::Relaxed);
        }
        Ok(Some(Claim { queue: Arc::clone(self), slot }))
    }

    /// Takes a receive back whose message will not come.
    pub(crate) fn give_back(&self, slot: u32, wqe: &RecvWqe) {
        self.state().returned.push_back((slot, wqe.clone()));
    }

    /// Completes a receive of an XRC queue. False: it is none, the QP completes it.
    pub(crate) fn complete(&self, cqe: &Cqe, solicited: bool) -> bool {
        match &mut self.state().completions {
            Some(completions) => {
                completions.push(cqe, solicited);
                true
            }
            None => false,
        }
    }

    /// Asks for an event when fewer receives than `limit` are left.
    pub(crate) fn set_limit(&self, limit: u32) {
        self.state().limit = limit;
    }

    /// The limit that has not been reached yet, 0 for none.
    pub(crate) fn limit(&self) -> u32 {
        self.state().limit
    }

    /// Whether the limit was reached, once.
    pub(crate) fn take_limit_reached(&self) -> bool {
        self.limit_reached.swap(false, Ordering::Relaxed)
    }
}
