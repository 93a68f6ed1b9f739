//! How many registrations hold each moved page: a map of disjoint address ranges with a count each.
//!
//! Knows nothing of the address space; whether a page really lies in the region file is asked elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;

use super::overlap;

#[derive(Debug, Clone, Copy)]
struct Extent {
    end: usize,
    holders: u32,
}

/// Disjoint ranges by start address, each held by at least one registration.
#[derive(Debug, Default)]
pub(super) struct Extents {
    by_start: BTreeMap<usize, Extent>,
}

impl Extents {
    pub(super) const fn new() -> Extents {
        Extents { by_start: BTreeMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    /// All held ranges.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.by_start.iter().map(|(&start, extent)| start..extent.end)
    }

    /// Adds a holder to every page of `range`.
    pub(super) fn hold(&mut self, range: &Range<usize>) {
        if range.is_empty() {
            return;
        }
        self.split_at(range.start);
        self.split_at(range.end);
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (&start, extent) in self.by_start.range_mut(range.clone()) {
            if at < start {
                gaps.push(at..start);
            }
            extent.holders += 1;
            at = extent.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        for gap in gaps {
            self.by_start.insert(gap.start, Extent { end: gap.end, holders: 1 });
        }
        self.join_around(range);
    }

    /// Takes a holder from every page of `range`; returns the parts that nobody holds any more.
    pub(super) fn release(&mut self, range: &Range<usize>) -> Vec<Range<usize>> {
        if range.is_empty() {
            return Vec::new();
        }
        self.split_at(range.start);
        self.split_at(range.end);
        let mut free: Vec<Range<usize>> = Vec::new();
        for (&start, extent) in self.by_start.range_mut(range.clone()) {
            extent.holders -= 1;
            if extent.holders > 0 {
                continue;
            }
            match free.last_mut() {
                Some(last) if last.end == start => last.end = extent.end,
                _ => free.push(start..extent.end),
            }
        }
        for part in &free {
            let starts: Vec<usize> = self.by_start.range(part.clone()).map(|(&start, _)| start).collect();
            for start in starts {
                self.by_start.remove(&start);
            }
        }
        self.join_around(range);
        free
    }

    /// Makes `address` a boundary between two extents if it lies inside one.
    fn split_at(&mut self, address: usize) {
        let Some((_, extent)) = self.by_start.range_mut(..address).next_back() else { return };
        if extent.end <= address {
            return;
        }
        let tail = *extent;
        extent.end = address;
        self.by_start.insert(address, tail);
    }

    /// Joins neighbours with equal counts in and beside `range`, so that the map does not grow with history.
    fn join_around(&mut self, range: &Range<usize>) {
        let first = self.by_start.range(..range.start).next_back().map_or(range.start, |(&start, _)| start);
        let near: Vec<(usize, Extent)> =
            self.by_start.range(first..=range.end).map(|(&start, &extent)| (start, extent)).collect();
        let mut last: Option<(usize, Extent)> = None;
        for (start, extent) in near {
            match last {
                Some((head, mut grown)) if grown.end == start && grown.holders == extent.holders => {
                    grown.end = extent.end;
                    self.by_start.remove(&start);
                    self.by_start.insert(head, grown);
                    last = Some((head, grown));
                }
                _ => last = Some((start, extent)),
            }
        }
    }

    /// The parts of `range` that are held.
    pub(super) fn held_in(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let before = self.by_start.range(..range.start).next_back();
        let parts = before.into_iter().chain(self.by_start.range(range.clone()));
        let parts = parts.map(|(&start, extent)| overlap(&(start..extent.end), range));
        parts.filter(|part| !part.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_holders_free_only_what_nobody_holds() {
        let mut sut = Extents::default();
        sut.hold(&(0..100));
        sut.hold(&(50..150));
        assert_eq!(sut.release(&(0..100)), vec![0..50]);
        assert_eq!(sut.held_in(&(60..200)), vec![60..150]);
        assert_eq!(sut.release(&(50..150)), vec![50..150]);
        assert!(sut.is_empty());
    }

    #[test]
    fn a_holder_over_gaps_fills_them_and_leaves_them_again() {
        let mut sut = Extents::default();
        sut.hold(&(10..20));
        sut.hold(&(30..40));
        sut.hold(&(0..50));
        assert_eq!(sut.held_in(&(0..50)).iter().map(|part| part.len()).sum::<usize>(), 50);
        assert_eq!(sut.release(&(0..50)), vec![0..10, 20..30, 40..50]);
        assert_eq!(sut.ranges().collect::<Vec<_>>(), vec![10..20, 30..40]);
    }

    #[test]
    fn neighbours_with_equal_counts_are_one_extent() {
        let mut sut = Extents::default();
        for start in (0..1000).step_by(10) {
            sut.hold(&(start..start + 10));
        }
        assert_eq!(sut.ranges().count(), 1);
        assert_eq!(sut.release(&(0..500)), vec![0..500]);
        assert_eq!(sut.ranges().collect::<Vec<_>>(), vec![500..1000]);
    }

    #[test]
    fn the_counts_match_a_page_by_page_model() {
        let mut sut = Extents::default();
        let mut model = [0u32; 64];
        let mut live: Vec<Range<usize>> = Vec::new();
        let mut seed = 7u32;
        let mut next = |below: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as usize % below
        };
        for _ in 0..5000 {
            if live.len() < 8 && next(2) == 0 {
                let start = next(63);
                let range = start..start + 1 + next(63 - start);
                sut.hold(&range);
                range.clone().for_each(|page| model[page] += 1);
                live.push(range);
            } else if !live.is_empty() {
                let range = live.swap_remove(next(live.len()));
                let free: Vec<usize> = sut.release(&range).into_iter().flatten().collect();
                range.clone().for_each(|page| model[page] -= 1);
                assert_eq!(free, range.filter(|&page| model[page] == 0).collect::<Vec<_>>());
            }
            let held: Vec<usize> = sut.ranges().flatten().collect();
            assert_eq!(held, (0..64).filter(|&page| model[page] > 0).collect::<Vec<_>>());
        }
    }
}
