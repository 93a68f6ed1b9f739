//! All movers of this process behind one lock: moves, deregistrations and forks exclude each other.
//!
//! One lock for all, because they all change one address space and a fork must find all of them at rest.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::extents::Extents;
use super::holding::Holding;
use super::maps;
use super::peace::PeaceMaker;
use super::views::Views;

/// Everything that moves pages in this process.
#[derive(Debug)]
pub(super) struct World {
    pub(super) holdings: BTreeMap<u64, Holding>,
    pub(super) next_id: u64,
    pub(super) books: Books,
    pub(super) fork_callbacks: Vec<fn()>,
}

/// What all movers have in common.
#[derive(Debug)]
pub(super) struct Books {
    pub(super) budget: MappingBudget,
    pub(super) peace: PeaceMaker,
    /// Pages that a router reaches through `/proc/PID/mem`, by their registrations.
    pub(super) staying: Extents,
    /// Mappings of regions that are not the program's.
    pub(super) views: Views,
}

static WORLD: Mutex<World> = Mutex::new(World {
    holdings: BTreeMap::new(),
    next_id: 0,
    books: Books {
        budget: MappingBudget { limit: None, counted: 0, added: 0, refused: 0 },
        peace: PeaceMaker::new(),
        staying: Extents::new(),
        views: Views::new(),
    },
    fork_callbacks: Vec::new(),
});

/// Takes the lock. A panic under it leaves books that are verified at each use, so it is not passed on.
pub(super) fn lock() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps moved pages from using up the mappings that the kernel grants a process.
///
/// Each move may cut a mapping in three. Half of what is granted is left to the program; a registration beyond
/// that is served without moving.
#[derive(Debug)]
pub(super) struct MappingBudget {
    limit: Option<usize>,
    counted: usize,
    added: usize,
    /// Refusals since the last count.
    refused: usize,
}

impl MappingBudget {
    /// Linux' own default of `vm.max_map_count`.
    const USUAL_MAXIMUM: usize = 65_530;

    /// Most mappings beside which small runs are moved where all mappings must be read at each registration:
    /// about a millisecond's worth.
    const FEW: usize = 2048;

    /// Bytes from which a run is worth any wait.
    const LARGE: usize = 1 << 20;

    /// Refusals after which mappings are counted anew, as the program may have given some back; again after twice as
    /// many, and so on, for counting takes long where there are many.
    const REFUSALS: usize = 64;
    /// But never after more than these.
    const MOST_REFUSALS: usize = 4096;

    /// Notes that up to `count` mappings were added.
    pub(super) fn spend(&mut self, count: usize) {
        self.added += count;
    }

    /// Whether a run of `len` bytes may be moved. Counts anew only when the estimate, which never shrinks, says no,
    /// and not at each refusal.
    pub(super) fn allows(&mut self, len: usize) -> Result<bool, Errno> {
        let known = self.limit.is_some();
        let mut limit = *self.limit.get_or_insert_with(|| maximum_mappings() / 2);
        if maps::must_be_read() && len < Self::LARGE {
            limit = limit.min(Self::FEW);
        }
        let over = self.counted + self.added > limit;
        if !known || (over && self.may_have_changed()) {
            self.counted = maps::count()?;
            self.added = 0;
        }
        let allowed = self.counted + self.added <= limit;
        self.refused = if allowed { 0 } else { self.refused + 1 };
        Ok(allowed)
    }

    fn may_have_changed(&self) -> bool {
        match self.refused {
            0 => true,
            few if few < Self::REFUSALS => false,
            many => many.is_power_of_two() || many.is_multiple_of(Self::MOST_REFUSALS),
        }
    }
}

fn maximum_mappings() -> usize {
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(MappingBudget::USUAL_MAXIMUM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_mappings_is_left_to_the_program() {
        let now = maps::count().unwrap();
        let mut sut = MappingBudget { limit: Some(now + 1000), counted: now, added: 0, refused: 0 };
        assert_eq!(sut.allows(1 << 30), Ok(true));
        sut.spend(100_000);
        assert_eq!(sut.allows(1 << 30), Ok(true), "counted anew: they are not there");
        let mut sut = MappingBudget { limit: Some(1), counted: 0, added: 2, refused: 0 };
        assert_eq!(sut.allows(1 << 30), Ok(false));
    }
}
