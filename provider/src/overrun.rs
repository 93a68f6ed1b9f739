//! Whether a CQ can get more completions than it has entries: if so, they are counted.
//!
//! Its rings hold all that can be posted. Where that is no more than the CQ has entries nothing can go wrong, and nothing
//! is counted. Whoever publishes a completion that is one too many tells the router, which brings CQ and QPs into error.

use std::collections::HashMap;

use verbs_abi::shm::cq::CqArea;

/// What a ring can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// So many completions.
    Own(u32),
    /// Those of receives of the SRQ with this number, of which there are so many at a time for all rings together.
    Shared(u32, u32),
}

/// How full a CQ can get.
#[derive(Debug, Default)]
pub(crate) struct Overrun {
    /// Its entries; 0 for one that does not mind.
    entries: u32,
    /// Completions that can wait in all rings.
    bound: u64,
    /// SRQs by number: the rings that they complete to.
    shared: HashMap<u32, u32>,
    /// Completions polled since they are counted.
    polled: Option<u64>,
}

impl Overrun {
    /// A ring more.
    pub(crate) fn add(&mut self, ring: Bound) {
        match ring {
            Bound::Own(most) => self.bound += u64::from(most),
            Bound::Shared(srq, most) => {
                let rings = self.shared.entry(srq).or_default();
                if *rings == 0 {
                    self.bound += u64::from(most);
                }
                *rings += 1;
            }
        }
    }

    /// A ring less.
    pub(crate) fn remove(&mut self, ring: Bound) {
        match ring {
            Bound::Own(most) => self.bound -= u64::from(most),
            Bound::Shared(srq, most) => {
                let Some(rings) = self.shared.get_mut(&srq) else { return };
                *rings -= 1;
                if *rings == 0 {
                    self.shared.remove(&srq);
                    self.bound -= u64::from(most);
                }
            }
        }
    }

    /// The CQ has so many entries from now on.
    pub(crate) fn set_entries(&mut self, entries: u32, area: &CqArea) {
        self.entries = entries;
        if self.polled.is_some() {
            area.set_limit(entries, None);
        }
    }

    /// Whether it is an error.
    pub(crate) fn is_heeded(&self) -> bool {
        self.entries != 0
    }

    /// Begins to count if it must; `waiting` tells how many completions wait.
    pub(crate) fn check(&mut self, area: &CqArea, waiting: impl FnOnce() -> u64) {
        if self.polled.is_none() && self.entries != 0 && self.bound > u64::from(self.entries) {
            self.polled = Some(0);
            area.set_limit(self.entries, Some(waiting()));
        }
    }

    /// So many were polled.
    #[inline]
    pub(crate) fn took(&mut self, taken: usize, area: &CqArea) {
        if let Some(polled) = &mut self.polled {
            *polled = polled.wrapping_add(taken as u64);
            area.set_polled(*polled);
        }
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::{Window, cq::CQ_LEN};

    use super::*;

    #[test]
    fn completions_are_counted_where_more_can_be_posted_than_there_are_entries() {
        let area = CqArea::new(&Window::heap(CQ_LEN), 0).unwrap();
        let mut overrun = Overrun::default();
        overrun.set_entries(10, &area);
        overrun.add(Bound::Own(4));
        overrun.add(Bound::Shared(7, 6));
        overrun.add(Bound::Shared(7, 6));
        overrun.check(&area, || 0);
        assert!(!area.is_counted());
        overrun.remove(Bound::Own(4));
        overrun.add(Bound::Own(5));
        overrun.check(&area, || 9);
        assert!(area.is_counted());
        assert!(!area.count());
        overrun.took(3, &area);
        assert!((0..3).all(|_| !area.count()) && area.count(), "nine and one, less three, and four more");
    }

    #[test]
    fn a_cq_that_does_not_mind_is_never_counted() {
        let area = CqArea::new(&Window::heap(CQ_LEN), 0).unwrap();
        let mut overrun = Overrun::default();
        overrun.add(Bound::Own(1 << 20));
        overrun.check(&area, || 0);
        assert!(!area.is_counted());
    }
}
