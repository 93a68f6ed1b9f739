//! A piece of shared memory and the only ways to touch it: as atomics, or by copies through them.
//!
//! Leaves to others: what the words mean (the sibling modules), who created the descriptor (the router).

use std::{
    any::Any,
    fmt, io,
    os::fd::AsFd,
    ptr::NonNull,
    sync::Arc,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::BLOCK;

/// What keeps the bytes of a window alive.
enum Backing {
    /// Pages mapped from a descriptor; unmapped when the last window goes.
    Mapping { base: NonNull<u8>, len: usize },
    /// Ordinary memory of this process, for tests and models.
    Heap { _words: Vec<u64> },
    /// Any of these, with something that goes before it does.
    Attended { _attendant: Box<dyn Any + Send + Sync>, _backing: Arc<Backing> },
}

// SAFETY: the mapping is plain memory; all access goes through atomics or raw copies.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Self::Mapping { base, len } = *self {
            // SAFETY: this value owns the mapping made in `Window::map` and no window outlives it.
            let _ = unsafe { munmap(base.as_ptr().cast(), len) };
        }
    }
}

/// A bounds-checked view of shared memory. Cheap to clone; keeps the mapping alive.
#[derive(Clone)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
    backing: Arc<Backing>,
}

// SAFETY: a window hands out atomics and raw pointers only; sharing those between threads is what atomics are for.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("base", &self.base).field("len", &self.len).finish()
    }
}

impl Window {
    /// Maps `len` bytes of `fd` from `offset`, shared, readable and (if `writable`) writable.
    ///
    /// # Errors
    /// The errno of mmap(2).
    pub fn map(fd: impl AsFd, offset: u64, len: usize, writable: bool) -> io::Result<Self> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address the kernel chooses aliases no Rust object.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED | MapFlags::NORESERVE, fd, offset)?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, backing: Arc::new(Backing::Mapping { base, len }) })
    }

    /// Zeroed memory of this process alone, at least `len` bytes.
    #[must_use]
    pub fn heap(len: usize) -> Self {
        let mut words = vec![0u64; len.div_ceil(8) + 8];
        // Start on a block boundary, as a mapping would.
        let skip = words.as_ptr().align_offset(BLOCK);
        let base = NonNull::from(&mut words[skip]).cast::<u8>();
        Self { base, len, backing: Arc::new(Backing::Heap { _words: words }) }
    }

    /// The same bytes, with something that is dropped when nobody uses them any more, and before they are unmapped.
    #[must_use]
    pub fn attended(self, attendant: Box<dyn Any + Send + Sync>) -> Self {
        let backing = Backing::Attended { _attendant: attendant, _backing: self.backing };
        Self { backing: Arc::new(backing), ..self }
    }

    /// Bytes in this window.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset`, or `None` if they do not lie inside.
    #[must_use]
    pub fn sub(&self, offset: u64, len: usize) -> Option<Self> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= len of the mapping, checked above.
        let base = unsafe { self.base.add(offset) };
        Some(Self { base, len, backing: Arc::clone(&self.backing) })
    }

    /// First byte, for the audited copy routines; valid for `len()` bytes while a clone of the window lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Panics
    /// If the word lies outside or is not aligned: offsets are ours, never a peer's.
    #[inline]
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        if offset + 4 > self.len || !offset.is_multiple_of(4) {
            outside(offset, self.len);
        }
        // SAFETY: in bounds and aligned (the base is aligned to at least 8); atomics tolerate any bit pattern
        // and concurrent writers; the window keeps the memory mapped for the returned lifetime.
        unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU32>() }
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// If the word lies outside or is not aligned: offsets are ours, never a peer's.
    #[inline]
    #[must_use]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        if offset + 8 > self.len || !offset.is_multiple_of(8) {
            outside(offset, self.len);
        }
        // SAFETY: as in `u32`.
        unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// The block at `offset` as words: one look at the bounds for all eight.
    ///
    /// # Panics
    /// As [`Self::u64`].
    #[inline]
    #[must_use]
    pub fn block(&self, offset: usize) -> &[AtomicU64; BLOCK / 8] {
        if offset + BLOCK > self.len || !offset.is_multiple_of(8) {
            outside(offset, self.len);
        }
        // SAFETY: as in `u32`, for eight words in a row.
        unsafe { &*self.base.as_ptr().add(offset).cast::<[AtomicU64; BLOCK / 8]>() }
    }

    /// Has the processor bring the block at `offset` nearer, which somebody else has written and is read soon.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        debug_assert!(offset + BLOCK <= self.len);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which faults at no address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().wrapping_add(offset).cast());
        }
    }

    /// Copies the block at `offset` out, word by word.
    #[inline]
    #[must_use]
    pub fn read_block(&self, offset: usize) -> [u64; BLOCK / 8] {
        let words = self.block(offset);
        std::array::from_fn(|i| words[i].load(Ordering::Relaxed))
    }

    /// Writes the block at `offset`, word by word.
    #[inline]
    pub fn write_block(&self, offset: usize, block: &[u64; BLOCK / 8]) {
        for (to, word) in self.block(offset).iter().zip(block) {
            to.store(*word, Ordering::Relaxed);
        }
    }

    /// Zeroes the whole window.
    pub fn clear(&self) {
        for offset in (0..self.len & !7).step_by(8) {
            self.u64(offset).store(0, Ordering::Relaxed);
        }
    }
}

#[cold]
#[inline(never)]
fn outside(offset: usize, len: usize) -> ! {
    panic!("offset {offset} is not one of a window of {len}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_refuses_ranges_outside() {
        let window = Window::heap(256);
        assert!(window.sub(0, 256).is_some());
        assert!(window.sub(1, 256).is_none());
        assert!(window.sub(u64::MAX, 2).is_none());
    }

    #[test]
    fn an_attendant_goes_with_the_last_user() {
        let attendant = Arc::new(());
        let window = Window::heap(256).attended(Box::new(Arc::clone(&attendant)));
        let part = window.sub(64, 64).unwrap();
        drop(window);
        assert_eq!(Arc::strong_count(&attendant), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&attendant), 1);
    }

    #[test]
    fn sub_windows_see_the_same_bytes() {
        let window = Window::heap(256);
        let part = window.sub(64, 64).unwrap();
        part.u64(8).store(7, Ordering::Relaxed);
        assert_eq!(window.read_block(64)[1], 7);
    }
}
