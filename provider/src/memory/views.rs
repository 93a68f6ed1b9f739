//! Parts of regions that this library maps for itself, as direct peers do: no memory of the program's.
//!
//! Two devices of one process may be each other's peers, so a region that this process moves pages into may be mapped
//! here once more. Such mappings are known here, lest they be taken for memory that the program has moved elsewhere.

use std::io;
use std::ops::{Deref, Range};
use std::os::fd::AsFd;

use rustix::mm::Advice;
use verbs_abi::shm::Window;

use super::region::pointer;
use super::world::{self, World};

/// Where views lie.
#[derive(Debug)]
pub(super) struct Views(Vec<Range<usize>>);

impl Views {
    pub(super) const fn new() -> Views {
        Views(Vec::new())
    }

    /// Whether the mapping that starts here is a view.
    pub(super) fn cover(&self, address: usize) -> bool {
        self.0.iter().any(|range| range.contains(&address))
    }
}

/// A part of a region, mapped for this library alone. Children do not get it.
#[derive(Debug)]
pub(crate) struct View {
    /// Taken at the end only.
    window: Option<Window>,
    range: Range<usize>,
}

impl View {
    /// Maps `len` bytes of a region from `offset`, writable.
    pub(crate) fn map(region: impl AsFd, offset: u64, len: usize) -> io::Result<View> {
        // Under the lock, so that nobody meets a view that is not known.
        let mut world = world::lock();
        let window = Window::map(region, offset, len, true)?;
        let range = window.as_ptr() as usize..window.as_ptr() as usize + len;
        // SAFETY: the advice changes only what a child gets of a mapping that was made just now.
        let _ = unsafe { rustix::mm::madvise(pointer(range.start), len, Advice::LinuxDontFork) };
        world.books.views.0.push(range.clone());
        Ok(View { window: Some(window), range })
    }
}

impl Deref for View {
    type Target = Window;

    fn deref(&self) -> &Window {
        self.window.as_ref().expect("it is taken when nobody can ask any more")
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let mut world = world::lock();
        // Unmapped first, and forgotten under the same lock.
        drop(self.window.take());
        let World { books, .. } = &mut *world;
        if let Some(at) = books.views.0.iter().position(|range| *range == self.range) {
            books.views.0.swap_remove(at);
        }
    }
}
