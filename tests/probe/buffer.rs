//! Memory of the application that a device writes to behind the program's back.
//!
//! Does: mappings, reached by copies and atomics only. Leaves to others: registering them.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use anyhow::{Result, bail};

/// A mapping, private and anonymous unless asked otherwise.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the value, and its bytes are reached only by raw copies and atomics.
unsafe impl Send for Buffer {}
// SAFETY: as above; who races with the device or another thread on a byte reads garbage, which is what tests look for.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Maps `len` bytes of zeros; nothing is touched, so a huge one costs nothing.
    pub(crate) fn new(len: usize) -> Result<Self> {
        Self::with_protection(len, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// The same with another protection.
    pub(crate) fn with_protection(len: usize, protection: i32) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(len, protection, flags, None)
    }

    /// Memory of another kind, from the start of a file if there is one.
    pub(crate) fn map(len: usize, protection: i32, flags: i32, file: Option<&File>) -> Result<Self> {
        Self::map_at(len, protection, flags, file.map_or(-1, AsRawFd::as_raw_fd), 0)
    }

    /// Shared memory that the kernel offers at an offset of a descriptor.
    pub(crate) fn of(fd: i32, len: usize, offset: i64) -> Result<Self> {
        Self::map_at(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, offset)
    }

    fn map_at(len: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            bail!("cannot map {len} bytes: {}", io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }

    /// Its address.
    pub(crate) fn addr(&self) -> usize {
        self.start as usize
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "{at} + {} is outside", bytes.len());
        // SAFETY: within the mapping, by the assertion.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
        fence(Ordering::SeqCst);
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len, "{at} + {len} is outside");
        fence(Ordering::SeqCst);
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping, by the assertion.
        unsafe { ptr::copy_nonoverlapping(self.start.add(at), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Sets every byte of a part.
    pub(crate) fn fill(&self, at: usize, len: usize, byte: u8) {
        assert!(at + len <= self.len, "{at} + {len} is outside");
        // SAFETY: within the mapping, by the assertion.
        unsafe { ptr::write_bytes(self.start.add(at), byte, len) };
        fence(Ordering::SeqCst);
    }

    /// An aligned word.
    pub(crate) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len, "{at} is no place of a word");
        // SAFETY: aligned and within the mapping, by the assertion; the mapping lives as long as the borrow.
        unsafe { AtomicU64::from_ptr(self.start.add(at).cast()) }
    }

    /// An aligned half of a word.
    pub(crate) fn half_word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len, "{at} is no place of half a word");
        // SAFETY: as for a word.
        unsafe { AtomicU32::from_ptr(self.start.add(at).cast()) }
    }

    /// `madvise` on a part.
    pub(crate) fn advise(&self, at: usize, len: usize, advice: i32) -> Result<()> {
        assert!(at + len <= self.len, "{at} + {len} is outside");
        // SAFETY: within the mapping, by the assertion; the advice of tests changes contents at most.
        if unsafe { libc::madvise(self.start.add(at).cast(), len, advice) } != 0 {
            bail!("madvise({advice}): {}", io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A dma-buf whose pages are those of a file in memory.
#[derive(Debug)]
pub(crate) struct DmaBuf {
    fd: OwnedFd,
    pages: Buffer,
}

impl DmaBuf {
    pub(crate) fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        self.pages.read(at, len)
    }
}

/// Makes a dma-buf of `len` bytes, whole pages, by udmabuf; `None` where the kernel has none.
pub(crate) fn udmabuf(len: usize) -> Result<Option<DmaBuf>> {
    /// `UDMABUF_CREATE` of `linux/udmabuf.h`, and its argument.
    const CREATE: libc::c_ulong = 0x4018_7542;
    #[repr(C)]
    struct Create {
        memfd: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    let device = match File::options().read(true).write(true).open("/dev/udmabuf") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    // SAFETY: a new file in memory, which becomes ours.
    let memory = unsafe { libc::memfd_create(c"probe".as_ptr(), libc::MFD_ALLOW_SEALING) };
    if memory < 0 {
        bail!("memfd_create: {}", io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    let memory = unsafe { File::from_raw_fd(memory) };
    memory.set_len(len as u64)?;
    // SAFETY: a seal on an own file.
    unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    let create = Create { memfd: memory.as_raw_fd() as u32, flags: 1, offset: 0, size: len as u64 };
    // SAFETY: the argument is the one that this request takes.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), CREATE, &raw const create) };
    if fd < 0 {
        bail!("UDMABUF_CREATE: {}", io::Error::last_os_error());
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let pages = Buffer::map(len, protection, libc::MAP_SHARED, Some(&memory))?;
    // SAFETY: the kernel has just made it for us.
    Ok(Some(DmaBuf { fd: unsafe { OwnedFd::from_raw_fd(fd) }, pages }))
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is the value's own, and nobody borrows it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}
