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

    /// Clears the set bits and calls `found` with each slot (router). A slot is below `MAX_QP`, whatever the client wrote.
    pub fn take(&self, mut found: impl FnMut(u32)) {
        for group in 0..SUMMARY_WORDS {
            if self.0.u64(group * 8).load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Summary first: a bit set after this swap sets its summary bit again.
            let mut summary = self.0.u64(group * 8).swap(0, Ordering::SeqCst);
            while summary != 0 {
                let word = group * 64 + summary.trailing_zeros() as usize;
                summary &= summary - 1;
                let mut bits = self.0.u64(BITS + word * 8).swap(0, Ordering::SeqCst);
                while bits != 0 {
                    found(word as u32 * 64 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
            }
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
        let mut found = Vec::new();
        bells.take(|slot| found.push(slot));
        assert_eq!(found, rung);
        assert!(!bells.pending());
    }
}
