//! Doorbells: one bit for each QP slot of a client, and a summary of the words that hold set bits.
//!
//! ```text
//! summary  4 words, one bit a word below
//! bits     256 words, one bit a QP slot
//! ```
//!
//! Setting a bit is idempotent, so a client killed between the two stores costs a sweep and nothing else.
//! The router clears; it pays for QPs with work, not for idle ones.

use std::sync::atomic::Ordering;

use super::{Window, arena};

const WORDS: usize = arena::MAX_QP as usize / 64;
const SUMMARY_WORDS: usize = WORDS / 64;
const BITS: usize = 64;
/// Bytes of the doorbell words.
pub const LEN: usize = BITS + WORDS * 8;

/// The doorbells of one client.
#[derive(Clone, Debug)]
pub struct Doorbells(Window);

impl Doorbells {
    /// The doorbells in `arena`.
    #[must_use]
    pub fn new(arena: &Window) -> Option<Self> {
        Some(Self(arena.sub(arena::DOORBELLS, LEN)?))
    }

    /// Says that QP `slot` has something new (owner). A full fence: what was written before is visible to
    /// the router before it can miss the bit, and the caller may look at the lane's flag afterwards.
    #[inline]
    pub fn ring(&self, slot: u32) {
        let word = slot as usize / 64 % WORDS;
        self.0.u64(BITS + word * 8).fetch_or(1 << (slot % 64), Ordering::SeqCst);
        self.0.u64(word / 64 * 8).fetch_or(1 << (word % 64), Ordering::SeqCst);
    }

    /// Whether any bit may be set (router).
    #[inline]
    #[must_use]
    pub fn pending(&self) -> bool {
        (0..SUMMARY_WORDS).any(|i| self.0.u64(i * 8).load(Ordering::SeqCst) != 0)
    }

    /// Clears the set bits of `words` words at most and calls `found` with each slot (router). A slot is below
    /// `MAX_QP`, whatever the client wrote. It begins at word `next` and leaves there where to go on, so that a
    /// client that sets bits all the time gets all its words looked at, and holds nobody up.
    pub fn take(&self, next: &mut usize, words: usize, mut found: impl FnMut(u32)) {
        let (mut group, mut ahead) = (*next / 64 % SUMMARY_WORDS, u64::MAX << (*next % 64));
        let mut left = words;
        // The group in which it begins comes twice: its end first, its beginning last.
        for _ in 0..=SUMMARY_WORDS {
            let mut summary = self.0.u64(group * 8).load(Ordering::Relaxed) & ahead;
            while summary != 0 && left > 0 {
                let bit = summary.trailing_zeros();
                summary &= summary - 1;
                // Summary first: a bit set after this sets its summary bit again.
                self.0.u64(group * 8).fetch_and(!(1 << bit), Ordering::SeqCst);
                let word = group * 64 + bit as usize;
                let mut bits = self.0.u64(BITS + word * 8).swap(0, Ordering::SeqCst);
                while bits != 0 {
                    found(word as u32 * 64 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
                (left, *next) = (left - 1, (word + 1) % WORDS);
            }
            if left == 0 {
                return;
            }
            (group, ahead) = ((group + 1) % SUMMARY_WORDS, u64::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rung_slot_is_found_once() {
        let bells = Doorbells(Window::heap(LEN));
        let rung = [0, 63, 64, 4095, 4096, arena::MAX_QP - 1];
        for slot in rung.iter().chain(&rung) {
            bells.ring(*slot);
        }
        assert!(bells.pending());
        for start in [0, 1, 63, 64, WORDS - 1] {
            rung.iter().for_each(|slot| bells.ring(*slot));
            let (mut found, mut next) = (Vec::new(), start);
            bells.take(&mut next, WORDS, |slot| found.push(slot));
            found.sort_unstable();
            assert_eq!(found, rung, "from word {start}");
            assert!(!bells.pending());
        }
    }

    #[test]
    fn a_client_that_rings_everywhere_all_the_time_has_each_word_looked_at_in_turn() {
        let bells = Doorbells(Window::heap(LEN));
        let (mut next, mut seen) = (0, std::collections::HashSet::new());
        for _ in 0..WORDS {
            (0..arena::MAX_QP).for_each(|slot| bells.ring(slot));
            let mut found = 0;
            bells.take(&mut next, 1, |slot| {
                found += 1;
                seen.insert(slot);
            });
            assert_eq!(found, 64);
        }
        assert_eq!(seen.len(), arena::MAX_QP as usize);
    }
}
