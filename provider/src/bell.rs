//! Telling the router that a QP has something new, and giving the processor to whoever can go on with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use verbs_abi::shm::doorbell::Doorbells;
use verbs_abi::shm::lane::{Doing, FEW_CORES, LanePage, MAX_WORKERS, WakeWord};

use crate::health::Health;

/// The doorbells of one opened device.
#[derive(Debug)]
pub(crate) struct Bell {
    doorbells: Doorbells,
    lane: LanePage,
    words: [WakeWord; MAX_WORKERS],
    is_crowded: bool,
    /// A doorbell was rung, and the processor kept.
    left: AtomicBool,
    health: Arc<Health>,
}

impl Bell {
    /// `cores` is how many processors the router may use.
    pub(crate) fn new(
        doorbells: Doorbells,
        lane: LanePage,
        words: [WakeWord; MAX_WORKERS],
        cores: u32,
        health: Arc<Health>,
    ) -> Bell {
        let ours = std::thread::available_parallelism().map_or(1, usize::from);
        let is_crowded = ours.min(cores as usize) <= FEW_CORES;
        Bell { doorbells, lane, words, is_crowded, left: AtomicBool::new(false), health }
    }

    /// Says that QP `slot` has something new; a full fence. Wakes the router if it sleeps. `streams`: more is to come
    /// soon, so this thread need not give its processor away for each piece.
    #[inline]
    pub(crate) fn ring(&self, slot: u32, streams: bool) {
        self.doorbells.ring(slot);
        if self.is_crowded {
            self.hand_over(streams);
        } else if self.lane.is_asleep() && !self.health.is_dead() {
            self.words[0].wake();
        }
    }

    /// Sees to it that a worker of the lane looks at the doorbells, where it may need this processor for that.
    fn hand_over(&self, streams: bool) {
        let does = |doing| move |worker: &usize| self.lane.doing(*worker) == doing;
        if (0..MAX_WORKERS).any(|worker| does(Doing::Work)(&worker)) || self.health.is_dead() {
            return;
        }
        let own = self.own_worker();
        if streams && own.is_some() {
            self.left.store(true, Ordering::Relaxed);
            let mut others = (0..MAX_WORKERS).filter(|worker| Some(*worker) != own && self.lane.has(*worker));
            if others.clone().any(|worker| does(Doing::Yield)(&worker)) {
                return;
            }
            if let Some(sleeper) = others.find(does(Doing::Sleep)) {
                return self.words[sleeper].wake();
            }
        }
        if own.map_or(self.lane.is_asleep(), |worker| does(Doing::Sleep)(&worker)) {
            self.words[own.unwrap_or(0)].wake();
        } else if streams {
            return;
        }
        // Where the wake-up has put the worker in front of this thread, it has been here already.
        if self.doorbells.pending() {
            self.step_aside();
        }
    }

    /// The worker on the processor that this thread runs on.
    fn own_worker(&self) -> Option<usize> {
        self.lane.worker_on(rustix::thread::sched_getcpu())
    }

    /// Lets the worker on this processor run if it waits for that and has not been let after the last doorbell. True:
    /// it has been let now.
    #[inline]
    pub(crate) fn give_way(&self) -> bool {
        self.left.load(Ordering::Relaxed) && {
            self.left.store(false, Ordering::Relaxed);
            let waits = self.own_worker().is_some_and(|worker| self.lane.doing(worker) == Doing::Yield);
            waits && self.step_aside()
        }
    }

    /// Lets the router run, where there are not processors enough for all. True: there are not.
    #[inline]
    pub(crate) fn step_aside(&self) -> bool {
        if self.is_crowded {
            rustix::thread::sched_yield();
        }
        self.is_crowded
    }

    /// The health of the device.
    #[inline]
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Whether a bit is set that the router has not taken.
    #[cfg(test)]
    pub(crate) fn is_pending(&self) -> bool {
        self.doorbells.pending()
    }
}
