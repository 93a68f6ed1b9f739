//! The region memfd: moves runs of pages into it and back to private memory.
//!
//! Does what it is told: which pages may be moved, and when, is decided by its caller, who holds the world's lock.
//!
//! Nothing is allocated or written between the copy of a page and the switch of its mapping: programs register
//! ranges rounded to pages, so the page may hold anything, this module's own heap memory included.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

use super::maps::Mapping;
use super::pagemap::Pagemap;
use super::{overlap, page_size};

/// Most bytes that exist twice while pages are moved.
const CHUNK: usize = 2 << 20;

/// Highest file offset, and so the end of the addresses that can be moved.
pub(super) const REGION_LEN: usize = 1 << 47;

/// A run of mapped pages of the region, wherever the program may have moved it with `mremap`.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) range: Range<usize>,
    pub(super) offset: usize,
    pub(super) prot: ProtFlags,
}

impl Piece {
    /// The part of `mapping`, a mapping of the region, whose file offsets lie in `offsets`.
    pub(super) fn of(mapping: &Mapping, offsets: &Range<usize>) -> Option<Piece> {
        let start = mapping.offset as usize;
        let part = overlap(&(start..start.saturating_add(mapping.range.len())), offsets);
        let address = mapping.range.start + (part.start - start.min(part.start));
        (!part.is_empty()).then(|| Piece {
            range: address..address + part.len(),
            offset: part.start,
            prot: mapping.prot,
        })
    }

    /// The same in parts of at most `len` bytes. (The kernel refuses to map more than its memory in one call.)
    pub(super) fn slices(&self, len: usize) -> impl Iterator<Item = Piece> + '_ {
        let starts = (0..self.range.len()).step_by(len);
        starts.map(move |at| {
            let address = self.range.start + at;
            let range = address..self.range.end.min(address + len);
            Piece { range, offset: self.offset + at, prot: self.prot }
        })
    }

    /// Whether the pages lie where they were registered.
    pub(super) fn is_at_home(&self) -> bool {
        self.range.start == self.offset
    }
}

/// The client's memfd.
#[derive(Debug)]
pub(super) struct Region {
    fd: OwnedFd,
    file: (u32, u32, u64),
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Region {
    pub(super) fn new(fd: OwnedFd) -> Result<Region, Errno> {
        let stat = rustix::fs::fstat(&fd)?;
        let file = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev), stat.st_ino);
        Ok(Region { fd, file })
    }

    /// Whether `mapping` shows this file.
    pub(super) fn is_shown_by(&self, mapping: &Mapping) -> bool {
        mapping.shared && mapping.file == self.file
    }

    /// Moves private pages into the file and maps them back. On an error, part of them may have been moved. There
    /// must be [`super::peace::Peace`]. Where pages of the process are pinned, only those that are not there are moved:
    /// EBUSY for others.
    pub(super) fn move_in(
        &self,
        range: &Range<usize>,
        prot: ProtFlags,
        pagemap: &Pagemap,
        pinned: bool,
    ) -> Result<(), Errno> {
        // Untouched pages are not written, so whatever an earlier life of this address left must go.
        self.punch(range)?;
        let window = Pagemap::window().min(CHUNK);
        let mut at = range.start;
        while at < range.end {
            // Windows end at their own multiples, so that a huge page is given up as a whole.
            let end = range.end.min((at + window) & !(window - 1));
            let touched = pagemap.touched(&(at..end));
            if pinned && touched.runs().next().is_some() {
                return Err(Errno::BUSY);
            }
            touched.runs().try_for_each(|run| self.write(&run))?;
            self.map(&(at..end), at, prot)?;
            touched.runs().for_each(|run| prefault(&run));
            at = end;
        }
        // A child that shared these pages would write into its parent's memory.
        // SAFETY: the advice changes only what fork does with the range, which was mapped just now.
        unsafe { rustix::mm::madvise(pointer(range.start), range.len(), Advice::LinuxDontFork) }
    }

    /// Makes `piece` private anonymous memory again and empties its place in the file. On an error the rest stays in
    /// the file, as it was. There must be [`super::peace::Peace`]: pages are mapped before they are filled. Where pages
    /// of the process are pinned, those that are there stay: EBUSY.
    pub(super) fn move_back(&self, piece: &Piece, pinned: bool) -> Result<(), Errno> {
        let mut at = 0;
        while at < piece.range.len() {
            let left = piece.range.len() - at;
            let (address, offset) = (piece.range.start + at, piece.offset + at);
            let hole = match self.next_data(offset, offset + left)? {
                Some(data) => data.start - offset,
                None => left,
            };
            if pinned && hole < left {
                return Err(Errno::BUSY);
            }
            let step = if hole == left || hole >= CHUNK { hole } else { left.min(CHUNK) };
            if hole >= step {
                map_private(address..address + step, piece.prot)?;
            } else {
                self.refill(address..address + step, offset, piece.prot)?;
            }
            self.punch(&(offset..offset + step))?;
            at += step;
        }
        Ok(())
    }

    /// Empties a part of the file.
    pub(super) fn punch(&self, range: &Range<usize>) -> Result<(), Errno> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, how, range.start as u64, range.len() as u64)
    }

    /// Writes the pages of `run` into the file at their own address.
    fn write(&self, run: &Range<usize>) -> Result<(), Errno> {
        let mut at = run.start;
        while at < run.end {
            // SAFETY: the kernel reads the program's own memory and reports EFAULT where that is gone. The raw call
            // makes no Rust reference to memory that other threads may write, and is no cancellation point.
            let written = unsafe {
                libc::syscall(libc::SYS_pwrite64, self.fd.as_raw_fd(), at, run.end - at, at as libc::off_t)
            };
            at += advance(written)?;
        }
        Ok(())
    }

    /// Puts the file's pages at `offset` in place of whatever is mapped at `range`.
    fn map(&self, range: &Range<usize>, offset: usize, prot: ProtFlags) -> Result<(), Errno> {
        // SAFETY: replaces memory with the same content at the same address; the caller holds the world's lock and
        // answers for the range.
        let mapped = unsafe {
            rustix::mm::mmap(
                pointer(range.start),
                range.len(),
                prot,
                MapFlags::SHARED | MapFlags::FIXED,
                &self.fd,
                offset as u64,
            )
        };
        mapped.map(|_| ())
    }

    /// Fresh private pages, then their content.
    fn refill(&self, range: Range<usize>, offset: usize, prot: ProtFlags) -> Result<(), Errno> {
        map_private(range.clone(), ProtFlags::READ | ProtFlags::WRITE)?;
        if let Err(error) = self.read_data(offset, &range).and_then(|()| protect(&range, prot)) {
            self.map(&range, offset, prot)?;
            return Err(error);
        }
        Ok(())
    }

    /// Reads what the file has from `offset` on into fresh memory at `range`, holes left out.
    fn read_data(&self, offset: usize, range: &Range<usize>) -> Result<(), Errno> {
        copy_data(self.as_fd(), offset, range, usize::MAX).map(|_| ())
    }

    /// The first run of the file that is not a hole, between two offsets.
    fn next_data(&self, offset: usize, end: usize) -> Result<Option<Range<usize>>, Errno> {
        next_data(self.as_fd(), offset, end)
    }
}

/// Reads at most `budget` bytes of data of a region from `offset` on into fresh zero memory at `range`; returns
/// how many bytes were read and, if the budget did not suffice, the address where it ended.
///
/// Calls nothing but the kernel: a forked child may use it.
pub(super) fn copy_data(
    region: BorrowedFd<'_>,
    offset: usize,
    range: &Range<usize>,
    budget: usize,
) -> Result<(usize, Option<usize>), Errno> {
    let mut at = 0;
    let mut copied = 0;
    while let Some(data) = next_data(region, offset + at, offset + range.len())? {
        let target = range.start + (data.start - offset);
        let len = data.len().min(budget - copied);
        read_exactly(region, data.start, &(target..target + len))?;
        copied += len;
        if len < data.len() {
            return Ok((copied, Some(target + len)));
        }
        at = data.end - offset;
    }
    Ok((copied, None))
}

/// The first run of a region that is not a hole, between two offsets, in whole pages.
fn next_data(region: BorrowedFd<'_>, offset: usize, end: usize) -> Result<Option<Range<usize>>, Errno> {
    if offset >= end {
        return Ok(None);
    }
    let start = match rustix::fs::seek(region, SeekFrom::Data(offset as u64)) {
        Ok(start) if (start as usize) < end => start as usize,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error),
    };
    let hole = rustix::fs::seek(region, SeekFrom::Hole(start as u64))? as usize;
    Ok(Some(start..hole.next_multiple_of(page_size()).min(end)))
}

fn read_exactly(region: BorrowedFd<'_>, offset: usize, target: &Range<usize>) -> Result<(), Errno> {
    let mut at = target.start;
    while at < target.end {
        let from = (offset + (at - target.start)) as libc::off_t;
        // SAFETY: callers name fresh writable memory of their own; the raw call is no cancellation point.
        let read = unsafe { libc::syscall(libc::SYS_pread64, region.as_raw_fd(), at, target.end - at, from) };
        at += advance(read)?;
    }
    Ok(())
}

/// Fills the page tables of pages that the program had touched, which it may expect to use without a fault:
/// at once is half the price of one by one. Reading suffices, as for shared memory both are the same.
fn prefault(run: &Range<usize>) {
    // SAFETY: the advice changes no content. Kernels before 5.14 refuse it, and the faults come later.
    let _ = unsafe { rustix::mm::madvise(pointer(run.start), run.len(), Advice::LinuxPopulateRead) };
}

/// What a raw read or write says about its progress.
fn advance(result: libc::c_long) -> Result<usize, Errno> {
    match result {
        // A file of sealed size neither ends nor takes nothing; never loop on it.
        0 => Err(Errno::IO),
        done if done > 0 => Ok(done as usize),
        _ => match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::INTR) => Ok(0),
            Some(error) => Err(error),
            None => Err(Errno::IO),
        },
    }
}

/// Puts fresh zero pages in place of whatever is mapped at `range`.
fn map_private(range: Range<usize>, prot: ProtFlags) -> Result<(), Errno> {
    // SAFETY: the caller holds the world's lock and answers for the content of the range.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(
            pointer(range.start),
            range.len(),
            prot,
            MapFlags::PRIVATE | MapFlags::FIXED,
        )
    };
    mapped.map(|_| ())
}

/// Gives fresh writable memory its final protection.
pub(super) fn protect(range: &Range<usize>, prot: ProtFlags) -> Result<(), Errno> {
    if prot == ProtFlags::READ | ProtFlags::WRITE {
        return Ok(());
    }
    // SAFETY: callers pass memory that they mapped just now.
    unsafe {
        rustix::mm::mprotect(pointer(range.start), range.len(), MprotectFlags::from_bits_retain(prot.bits()))
    }
}

/// An address as the kernel's calls want it. Never dereferenced here.
pub(super) fn pointer(address: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address)
}
