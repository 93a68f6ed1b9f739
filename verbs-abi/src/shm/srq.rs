//! A shared receive queue as it lies in the arena: receives that any of several QPs may consume.
//!
//! ```text
//! 0    owner line    index tail                                      owner writes
//! 64   router line   "ring me" flag                                  router writes
//! 128  index ring    one slot number (4 bytes) for each receive posted
//! then slots         a receive WQE each
//! ```
//!
//! Receives are consumed in the order of the ring, and completed in any. So a receive lies in a slot that the owner
//! uses again when its completion was polled, and the ring tells the order. Only the router consumes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{
    BLOCK, PAGE, Window,
    wqe::{self, BadWqe, RecvWqe},
};

const HEADER: usize = 2 * BLOCK;

/// Sizes of a shared receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SrqGeometry {
    /// Slots, and entries of the index ring; a power of two.
    pub entries: u32,
    /// Blocks of a slot.
    pub stride: u32,
}

impl SrqGeometry {
    /// The geometry for what `ibv_create_srq` asked for, with as much room again for a later `ibv_modify_srq`; `None`
    /// beyond what any device gives.
    #[must_use]
    pub fn new(max_wr: u32, max_sge: u32) -> Option<Self> {
        if max_wr == 0 || max_wr > wqe::MAX_WR || max_sge as usize > wqe::MAX_SGE {
            return None;
        }
        let entries = (max_wr * 2).next_power_of_two().min(wqe::MAX_WR);
        Some(Self { entries, stride: wqe::recv_blocks(max_sge as usize) as u32 })
    }

    fn slots(self) -> usize {
        (HEADER + self.entries as usize * 4).next_multiple_of(BLOCK)
    }

    /// Bytes of the whole, in pages.
    #[must_use]
    pub fn len(self) -> usize {
        (self.slots() + self.entries as usize * self.stride as usize * BLOCK).next_multiple_of(PAGE)
    }

    /// Never true; there is at least a header.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }
}

/// A shared receive queue in an arena.
#[derive(Clone, Debug)]
pub struct SrqArea {
    window: Window,
    geometry: SrqGeometry,
}

impl SrqArea {
    /// The queue at `offset` of `arena`.
    #[must_use]
    pub fn new(arena: &Window, offset: u64, geometry: SrqGeometry) -> Option<Self> {
        Some(Self { window: arena.sub(offset, geometry.len())?, geometry })
    }

    /// Sizes.
    #[must_use]
    pub fn geometry(&self) -> SrqGeometry {
        self.geometry
    }

    /// Receives posted.
    #[inline]
    #[must_use]
    pub fn tail(&self) -> &AtomicU64 {
        self.window.u64(0)
    }

    /// Non-zero: whoever posts a receive rings the router.
    #[inline]
    #[must_use]
    pub fn ring_me(&self) -> &AtomicU32 {
        self.window.u32(BLOCK)
    }

    /// Writes a receive into a slot that is free, and the slot into the ring at `at` (owner, before the tail).
    pub fn write(&self, at: u64, slot: u32, wr_id: u64, sges: &[wqe::Sge]) {
        debug_assert!(slot < self.geometry.entries);
        let place = self.slot_at(slot);
        RecvWqe::encode(wr_id, sges, |part, block| self.window.write_block(place + part * BLOCK, block));
        self.window.u32(self.index_at(at)).store(slot, Ordering::Relaxed);
    }

    /// Receives from `head` on; more than there are slots is a lie.
    #[inline]
    #[must_use]
    pub fn posted_since(&self, head: u64) -> u64 {
        self.tail().load(Ordering::SeqCst).wrapping_sub(head)
    }

    /// Copies the receive at `head` into `wqe` and tells its slot. `None`: nothing is posted there.
    ///
    /// # Errors
    /// [`BadWqe`] when the owner published something that cannot be a WQE.
    pub fn read(&self, head: u64, wqe: &mut RecvWqe) -> Result<Option<u32>, BadWqe> {
        let available = self.tail().load(Ordering::Acquire).wrapping_sub(head);
        if available == 0 {
            return Ok(None);
        }
        let capacity = self.geometry.entries;
        if available > u64::from(capacity) {
            return Err(BadWqe::Tail { ahead: available, capacity });
        }
        // A number outside names some slot, of the same owner.
        let slot = self.window.u32(self.index_at(head)).load(Ordering::Relaxed) & (capacity - 1);
        let place = self.slot_at(slot);
        let read = |part: usize| self.window.read_block(place + part * BLOCK);
        wqe.decode(self.geometry.stride as usize, read)?;
        Ok(Some(slot))
    }

    fn index_at(&self, at: u64) -> usize {
        HEADER + (at as usize & (self.geometry.entries as usize - 1)) * 4
    }

    fn slot_at(&self, slot: u32) -> usize {
        self.geometry.slots() + slot as usize * self.geometry.stride as usize * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(max_wr: u32) -> SrqArea {
        let geometry = SrqGeometry::new(max_wr, 5).unwrap();
        SrqArea::new(&Window::heap(geometry.len()), 0, geometry).unwrap()
    }

    #[test]
    fn receives_come_in_the_order_of_the_ring_whatever_their_slots() {
        let area = area(3);
        let mut wqe = RecvWqe::default();
        assert_eq!(area.read(0, &mut wqe), Ok(None));
        for (at, slot) in [(0, 6), (1, 0), (2, 3)] {
            let sge = wqe::Sge { addr: at, length: 1, lkey: 2 };
            area.write(at, slot, at + 10, &[sge; 5]);
            area.tail().store(at + 1, Ordering::Release);
        }
        for (at, slot) in [(0, 6), (1, 0), (2, 3)] {
            assert_eq!(area.read(at, &mut wqe), Ok(Some(slot)));
            assert_eq!((wqe.wr_id, wqe.sges().len(), wqe.sges()[4].addr), (at + 10, 5, at));
        }
        assert_eq!(area.posted_since(1), 2);
    }

    #[test]
    fn what_an_owner_makes_up_is_refused_or_its_own() {
        let area = area(3);
        let mut wqe = RecvWqe::default();
        area.tail().store(9, Ordering::Release);
        assert!(area.read(0, &mut wqe).is_err(), "more than there are slots");
        area.tail().store(1, Ordering::Release);
        area.window.u32(area.index_at(0)).store(u32::MAX, Ordering::Relaxed);
        assert_eq!(area.read(0, &mut wqe), Ok(Some(7)));
    }

    #[test]
    fn sizes_have_room_to_grow_and_bounds() {
        assert_eq!(SrqGeometry::new(1000, 1).unwrap().entries, 2048);
        assert_eq!(SrqGeometry::new(wqe::MAX_WR, 1).unwrap().entries, wqe::MAX_WR);
        assert!(SrqGeometry::new(0, 1).is_none() && SrqGeometry::new(wqe::MAX_WR + 1, 1).is_none());
        assert!(SrqGeometry::new(1, wqe::MAX_SGE as u32 + 1).is_none());
    }
}
