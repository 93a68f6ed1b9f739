//! Memory files that clients can map but never resize.

use std::{ffi::CStr, io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    io::Errno,
};
use verbs_abi::shm::{
    PAGE, Window,
    lane::{LanePage, MAX_WORKERS, WakeWord},
};

use crate::guard::{self, Health};

/// A sparse file of `len` bytes. Its size is sealed: a truncated file would be a SIGBUS in whoever maps it.
pub(crate) fn sealed(name: &CStr, len: u64) -> io::Result<OwnedFd> {
    let file = plain(name)?;
    ftruncate(&file, len)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

/// The page of a lane, mapped for writing here, and a file with which nobody else can write it.
pub(crate) fn lane_page() -> io::Result<(LanePage, OwnedFd)> {
    let file = plain(c"freeflow-lane")?;
    ftruncate(&file, PAGE as u64)?;
    let window = Window::map(&file, 0, PAGE, true)?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals | SealFlags::FUTURE_WRITE)?;
    Ok((LanePage::new(window), file))
}

/// The words that the workers of a lane sleep on, and a file by which clients wake them. Its memory concerns `health`.
pub(crate) fn wake_page(health: &Arc<Health>) -> io::Result<([WakeWord; MAX_WORKERS], OwnedFd)> {
    let file = sealed(c"freeflow-wake", PAGE as u64)?;
    let window = guard::guarded(Window::map(&file, 0, PAGE, true)?, health);
    let words = WakeWord::all(&window).ok_or(io::ErrorKind::InvalidData)?;
    Ok((words, file))
}

/// A file with `bytes` in it, read from its start.
pub(crate) fn holding(name: &CStr, bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = plain(name)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = rustix::io::pwrite(&file, rest, (bytes.len() - rest.len()) as u64)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(file)
}

fn plain(name: &CStr) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know that flag.
        Err(Errno::INVAL) => Ok(memfd_create(name, flags)?),
        made => Ok(made?),
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::lane::Doing;

    use super::*;

    #[test]
    fn a_sealed_file_keeps_its_size() {
        let file = sealed(c"test", 1 << 47).unwrap();
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(&file, SealFlags::WRITE), Err(Errno::PERM));
    }

    #[test]
    fn the_lane_page_is_written_here_and_only_here() {
        let (page, file) = lane_page().unwrap();
        assert!(Window::map(&file, 0, PAGE, true).is_err());
        assert_eq!(rustix::io::pwrite(&file, &[1], 0), Err(Errno::PERM));
        let read_only = LanePage::new(Window::map(&file, 0, PAGE, false).unwrap());
        assert!(read_only.is_asleep());
        page.set_doing(0, Doing::Work);
        assert!(!read_only.is_asleep());
    }
}
