//! A client's arena as the router holds it: the file, its heap, and the pieces of it that are mapped here.
//!
//! Mapped chunk by chunk as the heap grows into it: whole arenas of a few thousand clients would not fit into
//! one address space. The first chunk holds the fixed part and is always mapped.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    mm::{Advice, madvise},
};
use verbs_abi::shm::{
    Window,
    arena::{self, ARENA_LEN},
    barrier,
};

use crate::{
    guard::{self, Health},
    heap::{CHUNK, Heap, pages},
    segment,
};

/// One client's arena.
#[derive(Debug)]
pub(crate) struct Arena {
    file: OwnedFd,
    fixed: Window,
    chunks: BTreeMap<u64, Window>,
    heap: Heap,
    health: Arc<Health>,
}

/// A piece of an arena, given to one QP or CQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where it lies in the arena.
    pub(crate) offset: u64,
    /// Its bytes.
    pub(crate) len: usize,
}

impl Arena {
    /// A new arena with its header written. What happens to its memory concerns `health`.
    pub(crate) fn new(health: &Arc<Health>) -> io::Result<Self> {
        let file = segment::sealed(c"freeflow-arena", ARENA_LEN as u64)?;
        let fixed = map(&file, 0, CHUNK as usize, health)?;
        arena::initialise(&fixed, barrier::heavy());
        let (chunks, heap) = (BTreeMap::from([(0, fixed.clone())]), Heap::new());
        Ok(Self { file, fixed, chunks, heap, health: Arc::clone(health) })
    }

    /// The fixed part: header, doorbells, events, MR table.
    pub(crate) fn fixed(&self) -> &Window {
        &self.fixed
    }

    /// Places an object of `len` zeroed bytes and gives exactly its window.
    pub(crate) fn place(&mut self, len: usize) -> io::Result<(Place, Window)> {
        let offset = self.heap.allocate(len).ok_or(io::ErrorKind::OutOfMemory)?;
        let place = Place { offset, len };
        match self.window(place) {
            Ok(window) => Ok((place, window)),
            Err(error) => {
                self.heap.release(offset, len);
                Err(error)
            }
        }
    }

    /// Takes an object back that nobody uses any more. Its pages go, so whatever comes next finds zeros.
    pub(crate) fn release(&mut self, place: Place) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where old bytes cannot be dropped they must not be found by the next object: the room is lost instead.
        if fallocate(&self.file, punch, place.offset, pages(place.len)).is_ok() {
            self.heap.release(place.offset, place.len);
        }
    }

    fn window(&mut self, place: Place) -> io::Result<Window> {
        let chunk = match self.chunks.entry(place.offset / CHUNK) {
            Entry::Occupied(chunk) => chunk.into_mut(),
            Entry::Vacant(room) => {
                let start = place.offset / CHUNK * CHUNK;
                room.insert(map(&self.file, start, CHUNK as usize, &self.health)?)
            }
        };
        chunk.sub(place.offset % CHUNK, place.len).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

impl AsFd for Arena {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Maps part of a client's file, for reading and writing; left out of core dumps, and guarded.
pub(crate) fn map(file: impl AsFd, offset: u64, len: usize, health: &Arc<Health>) -> io::Result<Window> {
    let window = Window::map(file, offset, len, true)?;
    // SAFETY: the range is exactly the fresh mapping; the advice changes what a core dump holds, not the bytes.
    unsafe { madvise(window.as_ptr().cast(), len, Advice::LinuxDontDump) }?;
    Ok(guard::guarded(window, health))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use verbs_abi::shm::PAGE;

    use super::*;

    #[test]
    fn a_client_finds_the_layout_it_knows() {
        let arena = Arena::new(&Arc::default()).unwrap();
        let whole = Window::map(&arena, 0, ARENA_LEN, true).unwrap();
        assert!(arena::is_known(&whole));
    }

    #[test]
    fn an_object_lies_where_its_offset_says_and_comes_back_as_zeros() {
        let mut arena = Arena::new(&Arc::default()).unwrap();
        let whole = Window::map(&arena, 0, ARENA_LEN, true).unwrap();
        // The third object of this size lies in the second chunk.
        let len = 400 << 20;
        let placed: Vec<_> = (0..3).map(|_| arena.place(len).unwrap()).collect();
        let (place, window) = &placed[2];
        assert!(place.offset >= CHUNK);
        window.u64(8).store(7, Ordering::Relaxed);
        assert_eq!(whole.u64(place.offset as usize + 8).load(Ordering::Relaxed), 7);
        arena.release(*place);
        let (again, window) = arena.place(len).unwrap();
        assert_eq!(again, *place);
        assert_eq!(window.u64(8).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_arena_is_an_error() {
        let mut arena = Arena::new(&Arc::default()).unwrap();
        assert!(arena.place(2 * CHUNK as usize).is_err());
        assert!(arena.place(PAGE).is_ok());
    }
}
