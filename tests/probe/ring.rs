//! An io_uring with one registered buffer, spoken to by system calls: stock libraries need not know it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Result, ensure};

use crate::buffer::Buffer;

const ENTRIES: u32 = 4;
/// Offsets in `struct io_uring_params`, in words: what the kernel says of the two rings.
const FEATURES: usize = 5;
const SQ_OFFSETS: usize = 10;
const CQ_OFFSETS: usize = 20;
const SINGLE_MMAP: u32 = 1;
/// Where to map the submission entries.
const SQES: i64 = 0x1000_0000;
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;
const GETEVENTS: u32 = 1;
/// Bytes of the mapping of both rings: more than they have.
const RINGS: usize = 4096;

/// What is done with the registered buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// From a file into the buffer.
    Read = 4,
    /// From the buffer into a file.
    Write = 5,
}

/// The ring.
#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    rings: Buffer,
    entries: Buffer,
    params: [u32; 30],
}

impl Ring {
    /// A ring, unless this kernel has none for this process.
    pub(crate) fn new() -> io::Result<Self> {
        let mut params = [0_u32; 30];
        // SAFETY: the kernel fills a structure of that size.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, params.as_mut_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        if params[FEATURES] & SINGLE_MMAP == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let map = |len, offset| Buffer::of(fd.as_raw_fd(), len, offset).map_err(io::Error::other);
        let (rings, entries) = (map(RINGS, 0)?, map(ENTRIES as usize * 64, SQES)?);
        Ok(Self { fd, rings, entries, params })
    }

    /// Registers a buffer: the kernel keeps its pages.
    pub(crate) fn register(&self, buffer: &Buffer) -> io::Result<()> {
        let piece = libc::iovec { iov_base: buffer.addr() as *mut libc::c_void, iov_len: buffer.len() };
        self.call(REGISTER_BUFFERS, (&raw const piece).cast(), 1)
    }

    /// Lets it go.
    pub(crate) fn unregister(&self) -> io::Result<()> {
        self.call(UNREGISTER_BUFFERS, std::ptr::null(), 0)
    }

    fn call(&self, what: u32, argument: *const libc::c_void, count: u32) -> io::Result<()> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: callers pass what the operation reads.
        let result = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, what, argument, count) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Moves bytes between the registered buffer and the start of a file, and waits for it.
    pub(crate) fn execute(
        &self,
        operation: Operation,
        file: &impl AsRawFd,
        addr: usize,
        len: usize,
    ) -> Result<()> {
        let sq = |field: usize| self.word(self.params[SQ_OFFSETS + field]);
        let cq = |field: usize| self.word(self.params[CQ_OFFSETS + field]);
        let entry = (operation as u64 | (file.as_raw_fd() as u64) << 32, 0_u64, addr as u64, len as u64);
        let words = [entry.0, entry.1, entry.2, entry.3, 7, 0, 0, 0];
        words
            .iter()
            .enumerate()
            .for_each(|(at, word)| self.entries.word(at * 8).store(*word, Ordering::Relaxed));
        // The first entry of the array names the first entry of all; a ring's tail is used modulo its length.
        let tail = sq(1).load(Ordering::Relaxed);
        let slot = tail & sq(2).load(Ordering::Relaxed);
        self.word(self.params[SQ_OFFSETS + 6] + 4 * slot).store(0, Ordering::Relaxed);
        sq(1).store(tail + 1, Ordering::Release);
        let (fd, none) = (self.fd.as_raw_fd(), std::ptr::null::<u8>());
        // SAFETY: everything is in the rings.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, 1, 1, GETEVENTS, none, 0) };
        ensure!(done == 1, "io_uring_enter: {done}, {}", io::Error::last_os_error());
        let head = cq(0).load(Ordering::Relaxed);
        ensure!(cq(1).load(Ordering::Acquire) == head + 1, "no completion");
        let at = self.params[CQ_OFFSETS + 5] + 16 * (head & cq(2).load(Ordering::Relaxed));
        let result = self.word(at + 8).load(Ordering::Relaxed) as i32;
        cq(0).store(head + 1, Ordering::Release);
        ensure!(result == len as i32, "{operation:?} of {len} bytes ended with {result}");
        Ok(())
    }

    fn word(&self, at: u32) -> &AtomicU32 {
        self.rings.half_word(at as usize)
    }
}
