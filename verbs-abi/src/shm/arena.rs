//! Where things lie in a client's arena.

use std::sync::atomic::Ordering;

use super::{LAYOUT_VERSION, PAGE, Window};

/// Bytes of an arena. Sparse: only touched pages exist.
pub const ARENA_LEN: usize = 1 << 35;
/// Bytes of a region memfd: every address an application can have.
pub const REGION_LEN: u64 = 1 << 47;
/// QPs a client can have; also the number of doorbell bits.
pub const MAX_QP: u32 = 16_384;
/// MRs a client can have.
pub const MAX_MR: u32 = 1 << 17;
/// Offset of the doorbell words.
pub const DOORBELLS: u64 = PAGE as u64;
/// Offset of the async event ring.
pub const EVENTS: u64 = 2 * PAGE as u64;
/// Offset of the MR table.
pub const MR_TABLE: u64 = 1 << 16;
/// Offset of the first heap object.
pub const HEAP: u64 = 1 << 24;

const MAGIC: u64 = u64::from_le_bytes(*b"ffarena1");
const _: () = assert!(MR_TABLE + MAX_MR as u64 * 64 <= HEAP);

/// Writes the header of a new arena (router). `heavy`: the router makes heavy fences ([`super::barrier`]).
pub fn initialise(arena: &Window, heavy: bool) {
    arena.u64(16).store(heavy.into(), Ordering::Relaxed);
    arena.u64(8).store(u64::from(LAYOUT_VERSION), Ordering::Relaxed);
    arena.u64(0).store(MAGIC, Ordering::Release);
}

/// Whether the arena has the layout this build knows (provider, before anything else is read).
#[must_use]
pub fn is_known(arena: &Window) -> bool {
    arena.len() == ARENA_LEN
        && arena.u64(0).load(Ordering::Acquire) == MAGIC
        && arena.u64(8).load(Ordering::Relaxed) == u64::from(LAYOUT_VERSION)
}

/// Whether the router of a known arena makes heavy fences, so that its clients need only light ones.
#[must_use]
pub fn has_heavy_fences(arena: &Window) -> bool {
    arena.u64(16).load(Ordering::Relaxed) != 0
}
