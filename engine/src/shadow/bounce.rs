//! Memory of the host's own that payload bounces through where the NIC does not reach the application's.

use std::collections::BTreeMap;

use crate::{
    nic::{Bounce, NicSge},
    place::{copy_in, copy_out},
};

/// Pieces begin at multiples of this.
const GRAIN: u64 = 64;

/// A piece of a pool.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    generation: u32,
    offset: u64,
    len: u64,
}

/// The memory of one tenant, and what of it is free.
#[derive(Debug)]
pub(crate) struct Pool {
    bounce: Bounce,
    /// Length by offset.
    free: BTreeMap<u64, u64>,
}

impl Pool {
    pub(crate) fn new(bounce: Bounce) -> Self {
        let free = BTreeMap::from([(0, bounce.window.len() as u64 / GRAIN * GRAIN)]);
        Self { bounce, free }
    }

    /// Whether it is that of this device.
    pub(crate) fn is_of(&self, bounce: &Bounce) -> bool {
        self.bounce.generation == bounce.generation
    }

    /// Bytes that a piece may have at the most.
    pub(crate) fn capacity(&self) -> u64 {
        self.bounce.window.len() as u64 / GRAIN * GRAIN
    }

    /// A piece of so many bytes, if there is one.
    pub(crate) fn take(&mut self, len: u64) -> Option<Slot> {
        let need = len.max(1).next_multiple_of(GRAIN);
        let (offset, room) =
            self.free.iter().find(|(_, room)| **room >= need).map(|(offset, room)| (*offset, *room))?;
        self.free.remove(&offset);
        if room > need {
            self.free.insert(offset + need, room - need);
        }
        Some(Slot { generation: self.bounce.generation, offset, len: need })
    }

    /// Takes a piece back, and joins it with its free neighbours.
    pub(crate) fn give(&mut self, slot: Slot) {
        let Slot { generation, mut offset, mut len } = slot;
        if generation != self.bounce.generation {
            return;
        }
        if let Some(next) = self.free.remove(&(offset + len)) {
            len += next;
        }
        if let Some((&before, &room)) = self.free.range(..offset).next_back()
            && before + room == offset
        {
            self.free.remove(&before);
            (offset, len) = (before, len + room);
        }
        self.free.insert(offset, len);
    }

    /// The piece as the NIC names it, `len` bytes of it.
    pub(crate) fn sge(&self, slot: &Slot, len: u64) -> NicSge {
        let len = len.min(slot.len) as u32;
        NicSge { addr: self.bounce.base.wrapping_add(slot.offset), len, lkey: self.bounce.lkey }
    }

    /// Copies bytes into a piece, which is long enough.
    pub(crate) fn put(&self, slot: &Slot, bytes: &[u8]) {
        copy_in(&self.bounce.window, slot.offset, &bytes[..bytes.len().min(slot.len as usize)]);
    }

    /// Copies `len` bytes out of a piece.
    pub(crate) fn get(&self, slot: &Slot, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len.min(slot.len) as usize];
        copy_out(&self.bounce.window, slot.offset, &mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::Window;

    use super::*;

    fn pool(len: usize) -> Pool {
        Pool::new(Bounce { window: Window::heap(len), base: 0x1000, lkey: 9, generation: 3 })
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_whole() {
        let mut pool = pool(4096);
        let mut slots: Vec<Slot> = (0..8).map(|_| pool.take(500).unwrap()).collect();
        assert_eq!(pool.take(1), None, "eight times 512 is all of it");
        // In an order in which neighbours on both sides, one or none are free.
        for i in [3, 0, 4, 1, 0, 2, 1, 0] {
            pool.give(slots.remove(i.min(slots.len() - 1)));
        }
        assert_eq!(pool.take(4096), Some(Slot { generation: 3, offset: 0, len: 4096 }));
    }

    #[test]
    fn bytes_come_out_as_they_went_in_and_the_nic_finds_them_by_its_own_name() {
        let mut pool = pool(4096);
        let (first, second) = (pool.take(10).unwrap(), pool.take(10).unwrap());
        pool.put(&first, b"0123456789");
        pool.put(&second, b"abcdefghij");
        assert_eq!((pool.get(&first, 10), pool.get(&second, 3)), (b"0123456789".to_vec(), b"abc".to_vec()));
        assert_eq!(pool.sge(&second, 10), NicSge { addr: 0x1040, len: 10, lkey: 9 });
    }
}
