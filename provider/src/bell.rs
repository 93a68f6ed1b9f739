//! Telling the router that a QP has something new, and giving the processor to whoever can go on with it.

use std::sync::Arc;

use verbs_abi::shm::doorbell::Doorbells;
use verbs_abi::shm::lane::{LanePage, WakeWord};

use crate::health::Health;

/// With as few processors as this, a waiting thread is in the way of what it waits for.
const FEW_CORES: usize = 2;

/// The doorbells of one opened device.
#[derive(Debug)]
pub(crate) struct Bell {
    doorbells: Doorbells,
    lane: LanePage,
    word: WakeWord,
    is_crowded: bool,
    health: Arc<Health>,
}

impl Bell {
    /// `cores` is how many processors the router may use.
    pub(crate) fn new(
        doorbells: Doorbells,
        lane: LanePage,
        word: WakeWord,
        cores: u32,
        health: Arc<Health>,
    ) -> Bell {
        let ours = std::thread::available_parallelism().map_or(1, usize::from);
        let is_crowded = ours.min(cores as usize) <= FEW_CORES;
        Bell { doorbells, lane, word, is_crowded, health }
    }

    /// Says that QP `slot` has something new; a full fence. Wakes the router if it sleeps.
    #[inline]
    pub(crate) fn ring(&self, slot: u32) {
        self.doorbells.ring(slot);
        if self.lane.is_asleep() && !self.health.is_dead() {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        self.word.wake();
        // Where the wake-up has put the router in front of this thread, it has been here already.
        if self.doorbells.pending() {
            self.step_aside();
        }
    }

    /// Lets the router run, where there are not processors enough for all.
    #[inline]
    pub(crate) fn step_aside(&self) {
        if self.is_crowded {
            rustix::thread::sched_yield();
        }
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
