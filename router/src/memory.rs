//! One client's memory as the router's seat reaches it: the engine's `Memory` over mapped regions, and the helper for
//! what is not mapped.
//!
//! The keys that count are those in this process; the table in the arena is a copy for direct peers' eyes,
//! which the client itself can overwrite.

use std::{cell::Cell, collections::HashMap, ptr::NonNull, sync::Arc};

use engine::{Access, Bound, CHOSEN_BITS, Memory, MemoryWindow};
use verbs_abi::shm::{
    Window,
    mr_table::{MrEntry, MrTable, WINDOW, index_of},
};
use verbs_abi::verbs::AccessFlags;

use crate::{guard::Health, helper::Helper};

/// Memory and keys of one client.
#[derive(Debug)]
pub(crate) struct ClientMemory {
    mrs: Vec<Option<Mr>>,
    /// Memory windows, by the index in their keys.
    windows: HashMap<u32, Cell<MemoryWindow>>,
    table: MrTable,
    /// Reaches what is not mapped; started when there is such memory.
    helper: Option<Helper>,
    health: Arc<Health>,
}

#[derive(Debug)]
struct Mr {
    entry: MrEntry,
    /// The shared sub-range, where there is one.
    shared: Option<Window>,
    /// Windows that are bound to it.
    windows: Cell<u32>,
}

impl ClientMemory {
    /// No memory yet. `table` is the copy in the client's arena, `health` that of all it shares.
    pub(crate) fn new(table: MrTable, health: Arc<Health>) -> Self {
        Self { mrs: Vec::new(), windows: HashMap::new(), table, helper: None, health }
    }

    /// Sets who reaches what is not mapped.
    pub(crate) fn set_helper(&mut self, helper: Helper) {
        self.helper = Some(helper);
    }

    /// Has an access to what is not mapped performed. Never waits.
    ///
    /// # Errors
    /// The access, if nobody can.
    pub(crate) fn submit(&self, access: Access) -> Result<(), Access> {
        match &self.helper {
            Some(helper) => helper.submit(access),
            None => Err(access),
        }
    }

    /// Makes a key valid that stands for no memory.
    pub(crate) fn insert_null(&mut self, key: u32, pd: u32) {
        let entry = MrEntry::null(key, pd);
        self.put(entry, None);
        // Nobody else knows what it is, so it is out of reach for everybody: nothing of it is shared, and its owner leaves
        // what is found at each access to the router.
        let access = entry.access | AccessFlags::ON_DEMAND.bits();
        self.table.publish(&MrEntry { access, shared_start: 0, shared_end: 0, ..entry });
    }

    /// Makes a key valid. `shared` is the window of exactly the entry's shared sub-range.
    pub(crate) fn insert(&mut self, entry: MrEntry, shared: Option<Window>) {
        debug_assert_eq!(
            shared.as_ref().map_or(0, |window| window.len() as u64),
            entry.shared_end - entry.shared_start
        );
        self.put(entry, shared);
        self.table.publish(&entry);
    }

    fn put(&mut self, entry: MrEntry, shared: Option<Window>) {
        let index = index_of(entry.key) as usize;
        if self.mrs.len() <= index {
            self.mrs.resize_with(index + 1, || None);
        }
        self.mrs[index] = Some(Mr { entry, shared, windows: Cell::new(0) });
    }

    /// Makes a key invalid. The region keeps the memory mapped until it is told that nobody uses it.
    pub(crate) fn remove(&mut self, key: u32) {
        if let Some(slot) = self.mrs.get_mut(index_of(key) as usize)
            && slot.take_if(|mr| mr.entry.key == key).is_some()
        {
            self.table.invalidate(key);
        }
    }

    /// Whether a window is bound to the MR of this key.
    pub(crate) fn is_bound(&self, key: u32) -> bool {
        self.mr(key).is_some_and(|mr| mr.windows.get() > 0)
    }

    /// Adds a window that is bound to nothing.
    pub(crate) fn add_window(&mut self, window: MemoryWindow) {
        self.windows.insert(index_of(window.key), Cell::new(window));
    }

    /// Removes a window; its key dies at once.
    pub(crate) fn remove_window(&mut self, key: u32) {
        if let Some(window) = self.window(key) {
            self.set_window(MemoryWindow { bound: None, ..window });
            self.windows.remove(&index_of(key));
        }
    }

    /// Counts a window that is bound to an MR, or no longer.
    fn count(&self, bound: Option<&Bound>, change: i32) {
        if let Some(mr) = bound.and_then(|bound| self.mr(bound.mr)) {
            mr.windows.set(mr.windows.get().saturating_add_signed(change));
        }
    }

    /// What the window of this key is bound to.
    fn bound(&self, key: u32) -> Option<Bound> {
        self.windows.get(&index_of(key))?.get().bound.filter(|bound| bound.entry.key == key)
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
    fn lookup_remote(&self, key: u32, qpn: u32) -> Option<MrEntry> {
        self.lookup(key).or_else(|| {
            let bound = self.bound(key).filter(|bound| bound.qpn == 0 || bound.qpn == qpn)?;
            Some(bound.entry)
        })
    }

    fn has_windows(&self) -> bool {
        true
    }

    fn window(&self, key: u32) -> Option<MemoryWindow> {
        let window = self.windows.get(&index_of(key))?.get();
        (window.key | CHOSEN_BITS == key | CHOSEN_BITS).then_some(window)
    }

    fn set_window(&self, window: MemoryWindow) {
        let Some(place) = self.windows.get(&index_of(window.key)) else { return };
        let before = place.replace(window);
        self.count(before.bound.as_ref(), -1);
        self.count(window.bound.as_ref(), 1);
        match window.bound {
            // Direct peers see that there is such a key, and leave what is behind it to the router.
            Some(Bound { entry, .. }) => self.table.publish(&MrEntry {
                access: entry.access | WINDOW,
                shared_start: 0,
                shared_end: 0,
                ..entry
            }),
            None => self.table.invalidate(before.key),
        }
    }

    #[inline]
    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        let mr = self.mr(mr.key).or_else(|| self.mr(self.bound(mr.key)?.mr))?;
        let window = mr.shared.as_ref()?;
        let offset = usize::try_from(addr.checked_sub(mr.entry.shared_start)?).ok()?;
        if offset.checked_add(len)? > window.len() {
            return None;
        }
        NonNull::new(window.as_ptr().wrapping_add(offset))
    }

    fn shared(&self, mr: &MrEntry) -> Option<Window> {
        self.mr(mr.key)?.shared.clone()
    }

    #[inline]
    fn is_intact(&self) -> bool {
        !self.health.is_spoilt()
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::{BLOCK, arena, mr_table::KEY_RANDOM_BITS};

    use super::*;

    fn memory() -> ClientMemory {
        let arena = Window::heap(arena::MR_TABLE as usize + arena::MAX_MR as usize * BLOCK);
        ClientMemory::new(MrTable::new(&arena).unwrap(), Arc::default())
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
}
