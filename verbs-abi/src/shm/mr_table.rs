//! The MR table of a client: what a seat needs to know of a memory region, 64 bytes each.
//!
//! The router writes an entry under its sequence word; anyone may invalidate it by clearing the key.
//! A key is `index << 15 | random`, compared whole.

use std::sync::atomic::{Ordering, fence};

use super::{BLOCK, Window, arena};
use crate::verbs::AccessFlags;

/// Bits of a key that are random.
pub const KEY_RANDOM_BITS: u32 = 15;

/// In `access`: the key is a memory window's, which only the router looks into, and no lkey.
pub const WINDOW: u32 = 1 << 31;

/// In `access`: the key is a null MR's, which has no memory. Only the router knows what that means.
pub const NULL: u32 = 1 << 30;

const SEQ: usize = 0;
const KEY: usize = 4;

/// A memory region, as a seat sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MrEntry {
    /// lkey and rkey.
    pub key: u32,
    /// Protection domain.
    pub pd: u32,
    /// `enum ibv_access_flags`.
    pub access: u32,
    /// First address as keys' users name it.
    pub iova: u64,
    /// First address in the application.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// First application address that lies in the region memfd.
    pub shared_start: u64,
    /// End of the shared sub-range (exclusive).
    pub shared_end: u64,
}

/// The index that a key names. Always below `MAX_MR`.
#[must_use]
pub fn index_of(key: u32) -> u32 {
    key >> KEY_RANDOM_BITS
}

const _: () = assert!(arena::MAX_MR == 1 << (32 - KEY_RANDOM_BITS));

/// The table in an arena.
#[derive(Clone, Debug)]
pub struct MrTable(Window);

impl MrEntry {
    /// A null MR: whatever is written to it is dropped, and what is read are zeros.
    #[must_use]
    pub fn null(key: u32, pd: u32) -> Self {
        let access = AccessFlags::LOCAL_WRITE.bits() | NULL;
        Self { key, pd, access, iova: 0, addr: 0, len: u64::MAX, shared_start: 0, shared_end: u64::MAX }
    }

    /// Whether it is one.
    #[inline]
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.access & NULL != 0
    }
}

impl MrTable {
    /// The table of `arena`.
    #[must_use]
    pub fn new(arena: &Window) -> Option<Self> {
        Some(Self(arena.sub(arena::MR_TABLE, arena::MAX_MR as usize * BLOCK)?))
    }

    /// Publishes an entry (router).
    pub fn publish(&self, entry: &MrEntry) {
        let at = index_of(entry.key) as usize * BLOCK;
        let seq = self.0.u32(at + SEQ).load(Ordering::Relaxed);
        self.0.u32(at + SEQ).store(seq.wrapping_add(1) | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.0.u64(at + 8).store(u64::from(entry.pd) << 32 | u64::from(entry.access), Ordering::Relaxed);
        let words = [entry.iova, entry.addr, entry.len, entry.shared_start, entry.shared_end];
        for (i, word) in words.into_iter().enumerate() {
            self.0.u64(at + 16 + i * 8).store(word, Ordering::Relaxed);
        }
        self.0.u32(at + KEY).store(entry.key, Ordering::Relaxed);
        self.0.u32(at + SEQ).store((seq | 1).wrapping_add(1), Ordering::Release);
    }

    /// Makes a key useless (router; the owner may, too).
    pub fn invalidate(&self, key: u32) {
        self.0.u32(index_of(key) as usize * BLOCK + KEY).store(0, Ordering::SeqCst);
    }

    /// What changes with whatever changes of the entry that `key` names: it is the same as long as this is.
    #[inline]
    #[must_use]
    pub fn stamp(&self, key: u32) -> u64 {
        self.0.u64(index_of(key) as usize * BLOCK).load(Ordering::Acquire)
    }

    /// Copies the entry of `key` out, if the key is valid and no writer is at work on it.
    #[inline(always)]
    #[must_use]
    pub fn lookup(&self, key: u32) -> Option<MrEntry> {
        let at = index_of(key) as usize * BLOCK;
        let seq = self.0.u32(at + SEQ).load(Ordering::Acquire);
        if key == 0 || seq & 1 == 1 || self.0.u32(at + KEY).load(Ordering::Relaxed) != key {
            return None;
        }
        let words = self.0.block(at);
        let word = |i: usize| words[i].load(Ordering::Relaxed);
        let entry = MrEntry {
            key,
            pd: (word(1) >> 32) as u32,
            access: word(1) as u32,
            iova: word(2),
            addr: word(3),
            len: word(4),
            shared_start: word(5),
            shared_end: word(6),
        };
        fence(Ordering::Acquire);
        (self.0.u32(at + SEQ).load(Ordering::Relaxed) == seq).then_some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_compared_whole_and_dies_when_invalidated() {
        let table = MrTable(Window::heap(8 * BLOCK));
        let entry = MrEntry {
            key: 3 << KEY_RANDOM_BITS | 77,
            pd: 5,
            access: 7,
            iova: 0x1000,
            addr: 0x2000,
            len: 99,
            shared_start: 0,
            shared_end: 0,
        };
        table.publish(&entry);
        assert_eq!(table.lookup(entry.key), Some(entry));
        assert_eq!(table.lookup(entry.key ^ 1), None);
        let stamp = table.stamp(entry.key);
        table.invalidate(entry.key);
        assert_eq!(table.lookup(entry.key), None);
        assert_ne!(table.stamp(entry.key), stamp);
        table.publish(&entry);
        assert_ne!(table.stamp(entry.key), stamp, "as good, and not the same");
    }
}
