//! The audited copy routines: how bytes are placed into memory that others watch.
//!
//! Programs poll on the last byte of an RDMA WRITE, so the aligned word that holds it becomes visible after
//! all the rest, and an aligned word of eight bytes is one store.

use std::{
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering, fence},
};

use verbs_abi::shm::Window;

/// Copies `len` bytes, the last aligned word last. The ranges may overlap.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes. Others may touch both at any time, processes and the other worker.
#[inline]
pub(crate) unsafe fn place(from: *const u8, to: *mut u8, len: usize) {
    if len == 8 && to.addr().is_multiple_of(8) {
        // SAFETY: eight bytes as the caller vouches, and `to` is aligned.
        unsafe { ptr::write_volatile(to.cast::<u64>(), ptr::read_unaligned(from.cast::<u64>())) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { place_any(from, to, len) }
}

/// The same for any length and place.
///
/// # Safety
/// As for [`place`].
#[inline(never)]
unsafe fn place_any(from: *const u8, to: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    let end = to as usize + len;
    let head = ((end - 1) & !7).saturating_sub(to as usize);
    // SAFETY: `head < len`, so both ranges lie inside what the caller vouches for; `copy` permits overlap.
    // The tail is read before the head is copied, for an overlap would change it.
    unsafe {
        let mut tail = [0u8; 8];
        let rest = len - head;
        ptr::copy_nonoverlapping(from.add(head), tail.as_mut_ptr(), rest);
        if head > 0 {
            ptr::copy(from, to, head);
        }
        // Also without a head: what earlier pieces of the message brought comes before its last word.
        fence(Ordering::Release);
        let to = to.add(head);
        if rest == 8 && to.addr().is_multiple_of(8) {
            ptr::write_volatile(to.cast::<u64>(), u64::from_ne_bytes(tail));
        } else {
            place_tail(&tail[..rest], to);
        }
    }
}

/// Stores up to eight bytes in the largest aligned pieces, ascending, so that the last byte comes last.
///
/// # Safety
/// `to` is writable for `tail.len()` bytes.
#[inline]
unsafe fn place_tail(tail: &[u8], to: *mut u8) {
    let mut at = 0;
    while at < tail.len() {
        let left = tail.len() - at;
        // SAFETY: each store lies inside `tail.len()` bytes and is aligned to its size.
        unsafe {
            let here = to.add(at);
            let from = tail.as_ptr().add(at);
            at += if left >= 4 && here.addr().is_multiple_of(4) {
                ptr::write_volatile(here.cast::<u32>(), ptr::read_unaligned(from.cast::<u32>()));
                4
            } else if left >= 2 && here.addr().is_multiple_of(2) {
                ptr::write_volatile(here.cast::<u16>(), ptr::read_unaligned(from.cast::<u16>()));
                2
            } else {
                ptr::write_volatile(here, *from);
                1
            };
        }
    }
}

/// A piece to be placed by whoever has the time.
#[derive(Debug)]
pub(crate) struct Placement {
    from: NonNull<u8>,
    to: NonNull<u8>,
    len: usize,
}

// SAFETY: two addresses and a length; whether they may be used, and when, is what `perform` asks for.
unsafe impl Send for Placement {}

impl Placement {
    /// `len` bytes, so many into both.
    pub(crate) fn inside(from: NonNull<u8>, to: NonNull<u8>, (at, len): (usize, usize)) -> Option<Self> {
        let inside = |start: NonNull<u8>| NonNull::new(start.as_ptr().wrapping_add(at));
        Some(Self { from: inside(from)?, to: inside(to)?, len })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Places it.
    ///
    /// # Safety
    /// Both addresses are still those of memory that is mapped for so many bytes.
    pub(crate) unsafe fn perform(&self) {
        // SAFETY: the caller's promise.
        unsafe { place(self.from.as_ptr(), self.to.as_ptr(), self.len) };
    }
}

/// What an atomic does to the word it finds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Atomic {
    /// Stores `swap` if the word equals `compare`.
    CompareSwap {
        /// Value to compare with.
        compare: u64,
        /// Value to store.
        swap: u64,
    },
    /// Adds, wrapping.
    FetchAdd(u64),
}

impl Atomic {
    /// The word after the operation.
    pub(crate) fn apply(self, old: u64) -> u64 {
        match self {
            Self::CompareSwap { compare, swap } => {
                if old == compare {
                    swap
                } else {
                    old
                }
            }
            Self::FetchAdd(add) => old.wrapping_add(add),
        }
    }
}

/// Executes an atomic with the CPU's own atomics and returns the word it found.
///
/// # Safety
/// `to` is aligned to eight bytes, readable and writable.
pub(crate) unsafe fn atomic(to: *mut u8, operation: Atomic) -> u64 {
    // SAFETY: aligned and mapped as the caller vouches; an atomic tolerates other writers.
    let word = unsafe { &*to.cast::<AtomicU64>() };
    match operation {
        Atomic::CompareSwap { compare, swap } => word
            .compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst)
            .unwrap_or_else(|found| found),
        Atomic::FetchAdd(add) => word.fetch_add(add, Ordering::SeqCst),
    }
}

/// Copies bytes into shared memory of the host's own, as far as they fit.
pub(crate) fn copy_in(window: &Window, offset: u64, bytes: &[u8]) {
    if let Some(part) = window.sub(offset, bytes.len()) {
        // SAFETY: the part is mapped for `bytes.len()` bytes while the window lives, and no reference to it exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), part.as_ptr(), bytes.len()) };
    }
}

/// Copies bytes out of shared memory of the host's own. Outside of it nothing is copied.
pub(crate) fn copy_out(window: &Window, offset: u64, bytes: &mut [u8]) {
    if let Some(part) = window.sub(offset, bytes.len()) {
        // SAFETY: as above; a NIC that still writes there changes bytes, not their validity.
        unsafe { ptr::copy_nonoverlapping(part.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    /// Waits until something is so; gives up after a time in which it is sure to be.
    fn wait_for(what: impl Fn() -> bool) -> bool {
        let limit = Instant::now() + Duration::from_secs(30);
        while Instant::now() < limit {
            // Whoever yields too early looks too late.
            if (0..20_000).any(|_| what()) {
                return true;
            }
            thread::yield_now();
        }
        false
    }

    fn words(len: usize) -> Vec<AtomicU64> {
        (0..len).map(|_| AtomicU64::new(0)).collect()
    }

    /// Places `source` onto `target` whenever the watcher asks, until it has seen the last round.
    fn watched(len: usize, rounds: u64, watcher: impl Fn(u64, &[AtomicU64])) {
        let (source, target, asked) = (words(len), words(len), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=rounds {
                    source.iter().for_each(|word| word.store(round << 32 | round, Ordering::Relaxed));
                    let (from, to) = (source.as_ptr().cast(), target.as_ptr().cast_mut().cast());
                    // SAFETY: two vectors of that length, whose words may change at any time.
                    unsafe { place(from, to, len * 8) };
                    if !wait_for(|| asked.load(Ordering::Acquire) >= round) {
                        return;
                    }
                }
            });
            for round in 1..=rounds {
                watcher(round, &target);
                asked.store(round, Ordering::Release);
            }
        });
    }

    #[test]
    fn the_last_word_becomes_visible_after_all_the_rest() {
        for len in [1, 2, 9, 512, 1000, 40_000] {
            watched(len, 500, |round, target| {
                let done = round << 32 | round;
                let last = &target[len - 1];
                assert!(wait_for(|| last.load(Ordering::Acquire) == done), "round {round} was never seen");
                // From the end, where the rest comes latest.
                let whole = target.iter().rev().all(|word| word.load(Ordering::Relaxed) == done);
                assert!(whole, "round {round} of {len}");
            });
        }
    }

    #[test]
    fn an_aligned_word_is_one_store() {
        let (target, done) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                let limit = Instant::now() + Duration::from_millis(500);
                // Rarely a look at the clock, or the two threads seldom meet.
                for batch in (0..1_000_000_u64).take_while(|_| Instant::now() < limit) {
                    for round in batch * 1000..(batch + 1) * 1000 {
                        let word = [round << 32 | round & 0xffff_ffff];
                        // SAFETY: eight bytes each; the target may change at any time.
                        unsafe { place(word.as_ptr().cast(), target.as_ptr().cast(), 8) };
                    }
                }
                done.store(1, Ordering::Release);
            });
            while done.load(Ordering::Relaxed) == 0 {
                let word = target.load(Ordering::Relaxed);
                assert_eq!(word >> 32, word & 0xffff_ffff, "half a word became visible");
            }
        });
    }

    #[test]
    fn every_length_and_alignment_is_placed_whole_and_nothing_beyond() {
        let source: Vec<u8> = (0..200u8).collect();
        for from in 0..8 {
            for to in 0..16 {
                for len in 0..100 {
                    let mut target = vec![0xee_u8; 200];
                    // SAFETY: all within the two vectors.
                    unsafe { place(source.as_ptr().add(from), target.as_mut_ptr().add(to), len) };
                    assert_eq!(target[to..to + len], source[from..from + len]);
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0xee));
                }
            }
        }
    }

    #[test]
    fn overlapping_ranges_are_moved_as_memmove_does() {
        for (from, to) in [(0, 5), (5, 0), (3, 3), (0, 64)] {
            let mut bytes: Vec<u8> = (0..200u8).collect();
            let mut expected = bytes.clone();
            expected.copy_within(from..from + 90, to);
            let base = bytes.as_mut_ptr();
            // SAFETY: all within the vector.
            unsafe { place(base.add(from), base.add(to), 90) };
            assert_eq!(bytes, expected);
        }
    }
}
