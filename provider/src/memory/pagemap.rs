//! Which pages of a range were ever touched: `/proc/self/pagemap`.
//!
//! A page that was never touched reads as zeros, and so does a hole of the region file: it need not be copied.

use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::page_size;

/// Bit 63: in memory; bit 62: swapped out.
const TOUCHED: u64 = 1 << 63 | 1 << 62;

/// Pages that one look covers.
const PAGES: usize = 512;

/// The open file, if this process may read it (a process that is not dumpable may not).
#[derive(Debug)]
pub(super) struct Pagemap {
    file: Option<OwnedFd>,
}

impl Pagemap {
    pub(super) fn open() -> Pagemap {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Pagemap { file: rustix::fs::open(c"/proc/self/pagemap", flags, Mode::empty()).ok() }
    }

    /// Most bytes that [`Pagemap::touched`] takes at once.
    pub(super) fn window() -> usize {
        PAGES * page_size()
    }

    /// The touched pages of `range`; all of it when that cannot be known.
    pub(super) fn touched(&self, range: &Range<usize>) -> Touched {
        let page = page_size();
        let pages = (range.len() / page).min(PAGES);
        let mut touched = Touched { start: range.start, pages, entries: [TOUCHED; PAGES] };
        if let Some(file) = &self.file {
            let offset = (range.start / page * size_of::<u64>()) as libc::off_t;
            // SAFETY: the buffer is an array of at least `pages` entries, any bytes are valid in it. An error or a
            // short read leaves the rest as it was: touched.
            unsafe {
                libc::syscall(
                    libc::SYS_pread64,
                    file.as_raw_fd(),
                    touched.entries.as_mut_ptr(),
                    pages * size_of::<u64>(),
                    offset,
                )
            };
        }
        touched
    }
}

/// What one look found.
pub(super) struct Touched {
    start: usize,
    pages: usize,
    entries: [u64; PAGES],
}

impl Touched {
    /// The runs of touched pages.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let page = page_size();
        let is_touched = |index: &usize| self.entries[*index] & TOUCHED != 0;
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = (next..self.pages).find(is_touched)?;
            let end = (first..self.pages).find(|index| !is_touched(index)).unwrap_or(self.pages);
            next = end;
            Some(self.start + first * page..self.start + end * page)
        })
    }
}
