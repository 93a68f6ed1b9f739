//! One client's memory as the router's seat reaches it: the engine's `Memory` over mapped regions and `/proc/PID/mem`.
//!
//! The keys that count are those in this process; the table in the arena is a copy for direct peers' eyes,
//! which the client itself can overwrite.

use std::{fs::File, os::unix::fs::FileExt, ptr::NonNull};

use engine::{Fault, Memory};
use verbs_abi::shm::{
    Window,
    mr_table::{MrEntry, MrTable, index_of},
};

/// Memory and keys of one client.
#[derive(Debug)]
pub(crate) struct ClientMemory {
    mrs: Vec<Option<Mr>>,
    table: MrTable,
    /// `/proc/PID/mem` of the client, open for writing.
    process: Option<File>,
}

#[derive(Debug)]
struct Mr {
    entry: MrEntry,
    /// The shared sub-range, where there is one.
    shared: Option<Window>,
}

impl ClientMemory {
    /// No memory yet. `table` is the copy in the client's arena.
    pub(crate) fn new(table: MrTable, process: Option<File>) -> Self {
        Self { mrs: Vec::new(), table, process }
    }

    /// Makes a key valid. `shared` is the window of exactly the entry's shared sub-range.
    pub(crate) fn insert(&mut self, entry: MrEntry, shared: Option<Window>) {
        debug_assert_eq!(
            shared.as_ref().map_or(0, |window| window.len() as u64),
            entry.shared_end - entry.shared_start
        );
        let index = index_of(entry.key) as usize;
        if self.mrs.len() <= index {
            self.mrs.resize_with(index + 1, || None);
        }
        self.mrs[index] = Some(Mr { entry, shared });
        self.table.publish(&entry);
    }

    /// Makes a key invalid. The region keeps the memory mapped until it is told that nobody uses it.
    pub(crate) fn remove(&mut self, key: u32) {
        if let Some(slot) = self.mrs.get_mut(index_of(key) as usize)
            && slot.take_if(|mr| mr.entry.key == key).is_some()
        {
            self.table.invalidate(key);
        }
    }

    fn mr(&self, key: u32) -> Option<&Mr> {
        self.mrs.get(index_of(key) as usize)?.as_ref().filter(|mr| mr.entry.key == key)
    }
}

impl Memory for ClientMemory {
    #[inline]
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        self.mr(key).map(|mr| mr.entry)
    }

    #[inline]
    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        let mr = self.mr(mr.key)?;
        let window = mr.shared.as_ref()?;
        let offset = usize::try_from(addr.checked_sub(mr.entry.shared_start)?).ok()?;
        if offset.checked_add(len)? > window.len() {
            return None;
        }
        NonNull::new(window.as_ptr().wrapping_add(offset))
    }

    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let process = self.process.as_ref().ok_or(Fault)?;
        process.read_exact_at(into, addr).map_err(|_| Fault)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let process = self.process.as_ref().ok_or(Fault)?;
        process.write_all_at(from, addr).map_err(|_| Fault)
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::{BLOCK, arena, mr_table::KEY_RANDOM_BITS};

    use super::*;

    fn memory() -> ClientMemory {
        let arena = Window::heap(arena::MR_TABLE as usize + arena::MAX_MR as usize * BLOCK);
        let process = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
        ClientMemory::new(MrTable::new(&arena).unwrap(), Some(process))
    }

    fn entry(key: u32) -> MrEntry {
        MrEntry {
            key,
            pd: 1,
            access: 1,
            iova: 0x10_800,
            addr: 0x10_800,
            len: 0x3000,
            shared_start: 0x11_000,
            shared_end: 0x13_000,
        }
    }

    #[test]
    fn only_the_shared_part_is_mapped() {
        let mut memory = memory();
        let entry = entry(2 << KEY_RANDOM_BITS | 9);
        memory.insert(entry, Some(Window::heap(0x2000)));
        assert!(memory.mapped(&entry, 0x11_000, 0x2000).is_some());
        assert!(memory.mapped(&entry, 0x10_fff, 1).is_none());
        assert!(memory.mapped(&entry, 0x12_000, 0x1001).is_none());
        assert!(memory.mapped(&entry, u64::MAX, usize::MAX).is_none());
    }

    #[test]
    fn a_key_is_compared_whole_and_dies_with_its_memory() {
        let mut memory = memory();
        let entry = entry(2 << KEY_RANDOM_BITS | 9);
        memory.insert(entry, Some(Window::heap(0x2000)));
        assert_eq!(memory.lookup(entry.key), Some(entry));
        assert_eq!(memory.table.lookup(entry.key), Some(entry));
        assert_eq!(memory.lookup(entry.key ^ 1), None);
        memory.remove(entry.key ^ 1);
        assert_eq!(memory.table.lookup(entry.key), Some(entry));
        memory.remove(entry.key);
        assert_eq!(memory.lookup(entry.key), None);
        assert_eq!(memory.table.lookup(entry.key), None);
        assert!(memory.mapped(&entry, 0x11_000, 1).is_none());
    }

    #[test]
    fn private_memory_is_reached_through_the_process() {
        let memory = memory();
        let mut word = [1u8, 2, 3, 4];
        let addr = word.as_mut_ptr().addr() as u64;
        let mut seen = [0; 4];
        memory.read(addr, &mut seen).unwrap();
        assert_eq!(seen, [1, 2, 3, 4]);
        memory.write(addr, &[9, 8]).unwrap();
        memory.read(addr, &mut seen).unwrap();
        assert_eq!(seen, [9, 8, 3, 4]);
        assert_eq!(memory.read(8, &mut seen), Err(Fault));
        assert_eq!(memory.write(u64::MAX, &seen), Err(Fault));
    }
}
