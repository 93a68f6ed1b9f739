//! MRs over a dma-buf: it is mapped here, and is memory of the process like other shared memory from then on.
//!
//! Which dma-bufs can be mapped, and reached by others than the processor that maps them, is their exporter's business:
//! udmabuf's can, those of most GPUs cannot. No file of a client's is mapped by the router, so it reaches them through
//! the process.

use std::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags};
use verbs_abi::ffi::{ibv_mr, ibv_pd};
use verbs_abi::ffi_private::{MR_TYPE_DMABUF_MR, VerbsMr};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::PAGE;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
use crate::device;
use crate::error;
use crate::mr::{self, Backing, Wanted};
use crate::pd::Pd;

/// The rights that an MR over a dma-buf may have, as in the kernel.
const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_ATOMIC)
    .union(AccessFlags::RELAXED_ORDERING);

/// A mapping of a part of a dma-buf.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut c_void,
    length: usize,
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, offset: u64, length: usize, writable: bool) -> Result<Mapping, Errno> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases nothing.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, fd, offset)? };
        Ok(Mapping { base, length })
    }

    /// Whether it can be reached through the process, as the router does.
    fn is_reachable(&self) -> bool {
        let reads = |memory: std::fs::File, at: usize| memory.read_exact_at(&mut [0], at as u64);
        let first = self.base as usize;
        [first, first + self.length - 1]
            .into_iter()
            .all(|at| std::fs::File::open("/proc/self/mem").and_then(|memory| reads(memory, at)).is_ok())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: from `new`, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.base, self.length) };
    }
}

/// Whether the descriptor is a dma-buf's.
fn check_kind(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::fs::fstat(fd)?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let name = rustix::fs::readlink(path, Vec::new())?;
    if name.as_bytes().starts_with(b"/dmabuf:") { Ok(()) } else { Err(Errno::INVAL) }
}

pub(crate) unsafe extern "C" fn register(
    pd: *mut ibv_pd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut ibv_mr {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        device.health().check_owner()?;
        let (flags, iova) = mr::check(offset, length, iova, access as u32)?;
        let end = offset.checked_add(length as u64).ok_or(Errno::INVAL)?;
        if !flags.difference(RIGHTS).is_empty() {
            return Err(Errno::INVAL);
        }
        if fd < 0 {
            return Err(Errno::BADF);
        }
        // SAFETY: the application names a descriptor that stays open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        check_kind(fd)?;
        if rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))? < end {
            return Err(Errno::INVAL);
        }
        let page = PAGE as u64;
        let start = offset / page * page;
        let room = (end.next_multiple_of(page) - start) as usize;
        let mapping = Mapping::new(fd, start, room, flags.contains(AccessFlags::LOCAL_WRITE))?;
        if !mapping.is_reachable() {
            return Err(Errno::OPNOTSUPP);
        }
        let addr = mapping.base as usize + (offset - start) as usize;
        let wanted = Wanted { pd: own.id, addr, length, iova, access: flags };
        let moved = device.mover.register(addr, length, flags.contains(AccessFlags::LOCAL_WRITE));
        let moved = moved.map_err(|error| error::from_router(error.errno()))?;
        match device.link.ask(&Request::RegMr(wanted.request(Some(&moved))), &[]) {
            Ok((Answer::Mr { key }, _)) => {
                // To the application it has no address.
                let shown = Wanted { addr: offset as usize, ..wanted };
                // SAFETY: as above.
                let mr = unsafe { mr::object(pd, &shown, access, key, Backing::DmaBuf(moved, mapping)) };
                // SAFETY: just made.
                unsafe { (*mr.cast::<VerbsMr>()).mr_type = MR_TYPE_DMABUF_MR };
                Ok(mr)
            }
            other => {
                device.mover.deregister(moved);
                Err(other.err().unwrap_or(Errno::PROTO))
            }
        }
    })
}
