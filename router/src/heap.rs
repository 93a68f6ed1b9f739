//! Places QPs and CQs in a client's arena.
//!
//! Offsets only; the pages behind them are the arena's business. Page granular, first grown upwards, then from
//! what was given back, smallest fit first. A program creates queues of few sizes, so equal sizes are kept
//! together and neighbours are not joined again.

use std::collections::BTreeMap;

use verbs_abi::shm::{PAGE, arena};

/// No object crosses a multiple of this, so that the router can map the arena piece by piece.
pub(crate) const CHUNK: u64 = 1 << 30;

/// What is free in one arena.
#[derive(Debug)]
pub(crate) struct Heap {
    /// Everything from here on was never used.
    next: u64,
    end: u64,
    /// Offsets given back, by size.
    free: BTreeMap<u64, Vec<u64>>,
}

impl Heap {
    /// The heap of a new arena.
    pub(crate) fn new() -> Self {
        Self { next: arena::HEAP, end: arena::ARENA_LEN as u64, free: BTreeMap::new() }
    }

    /// An offset for `len` bytes, rounded up to pages. `None` when the arena is full or `len` is beyond a chunk.
    pub(crate) fn allocate(&mut self, len: usize) -> Option<u64> {
        let len = pages(len);
        if len == 0 || len > CHUNK {
            return None;
        }
        self.take_free(len, len).or_else(|| self.grow(len)).or_else(|| self.take_free(len, u64::MAX))
    }

    /// Gives back what [`Self::allocate`] returned for the same `len`.
    pub(crate) fn release(&mut self, offset: u64, len: usize) {
        self.free.entry(pages(len)).or_default().push(offset);
    }

    /// A free object of `len` to `most` bytes; what is too much of it stays free.
    fn take_free(&mut self, len: u64, most: u64) -> Option<u64> {
        let size = *self.free.range(len..=most).next()?.0;
        let offsets = self.free.get_mut(&size)?;
        let offset = offsets.pop()?;
        if offsets.is_empty() {
            self.free.remove(&size);
        }
        if size > len {
            self.free.entry(size - len).or_default().push(offset + len);
        }
        Some(offset)
    }

    /// Room that was never used.
    fn grow(&mut self, len: u64) -> Option<u64> {
        let left = CHUNK - self.next % CHUNK;
        let offset = if len <= left { self.next } else { self.next + left };
        let next = offset.checked_add(len).filter(|next| *next <= self.end)?;
        if offset > self.next {
            self.free.entry(left).or_default().push(self.next);
        }
        self.next = next;
        Some(offset)
    }
}

/// `len` in whole pages.
pub(crate) fn pages(len: usize) -> u64 {
    len.next_multiple_of(PAGE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_page_aligned_above_the_fixed_part_and_apart() {
        let mut heap = Heap::new();
        let mut seen = Vec::new();
        for len in [1, PAGE, PAGE + 1, 100_000] {
            let offset = heap.allocate(len).unwrap();
            assert!(offset >= arena::HEAP && offset.is_multiple_of(PAGE as u64));
            assert!(seen.iter().all(|(at, size)| offset >= at + size || offset + pages(len) <= *at));
            seen.push((offset, pages(len)));
        }
    }

    #[test]
    fn what_is_given_back_is_used_again() {
        let mut heap = Heap::new();
        let first = heap.allocate(5 * PAGE).unwrap();
        heap.release(first, 5 * PAGE);
        assert_eq!(heap.allocate(5 * PAGE), Some(first));
        for _ in 0..1_000_000 {
            let offset = heap.allocate(3 * PAGE).unwrap();
            heap.release(offset, 3 * PAGE);
        }
        assert!(heap.next < arena::HEAP + 16 * PAGE as u64);
    }

    #[test]
    fn no_object_crosses_a_chunk_and_the_gap_is_not_lost() {
        let mut heap = Heap::new();
        let big = (CHUNK / 2 + PAGE as u64) as usize;
        for _ in 0..10 {
            let offset = heap.allocate(big).unwrap();
            assert_eq!(offset / CHUNK, (offset + pages(big) - 1) / CHUNK);
        }
        let small = heap.allocate(PAGE).unwrap();
        assert!(small < heap.next);
    }

    #[test]
    fn a_full_arena_says_so_and_serves_again_what_comes_back() {
        let mut heap = Heap::new();
        let len = 64 << 20;
        let all: Vec<_> = std::iter::from_fn(|| heap.allocate(len)).collect();
        assert_eq!(all.len() as u64, arena::ARENA_LEN as u64 / len as u64 - 1);
        heap.release(all[0], len);
        let most = heap.allocate(len - PAGE).unwrap();
        assert_eq!(most, all[0]);
        assert!(heap.allocate(len).is_none());
        assert_eq!(heap.allocate(PAGE), Some(most + (len - PAGE) as u64), "the rest of it");
        assert!(heap.allocate(usize::MAX / 2).is_none());
        assert!(heap.allocate(0).is_none());
    }
}
