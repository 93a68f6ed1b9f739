//! Device memory: memory that only the device and its two copy functions touch.
//!
//! It is memory of this process, like the region that registered memory is moved to; an MR on it moves its pages as
//! any other does. As on real devices, copies are made of aligned words of four bytes.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use verbs_abi::ffi::{ibv_alloc_dm_attr, ibv_context, ibv_dm, ibv_mr, ibv_pd};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::PAGE;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
use crate::context::Context;
use crate::device;
use crate::error;
use crate::mr::{self, Backing, Wanted};
use crate::pd::Pd;

/// Device memory of one opened device, bytes.
pub(crate) const MAX_TOTAL: u64 = 1 << 20;
/// What offsets and lengths of a copy are multiples of.
const WORD: u64 = 4;

/// Device memory. C sees the first member.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Dm {
    public: ibv_dm,
    /// The first of its pages.
    base: usize,
    /// Bytes asked for.
    length: u64,
    /// MRs on it.
    mrs: AtomicU32,
}

impl Dm {
    /// An MR on it is gone.
    pub(crate) fn let_go(&self) {
        self.mrs.fetch_sub(1, Ordering::SeqCst);
    }

    /// Bytes of its pages.
    fn room(&self) -> usize {
        (self.length as usize).next_multiple_of(PAGE)
    }

    /// Where a copy begins, if it lies inside and is made of words.
    fn place(&self, offset: u64, length: usize) -> Result<*mut u8, Errno> {
        let end = offset.checked_add(length as u64).filter(|&end| end <= self.length).ok_or(Errno::FAULT)?;
        if !offset.is_multiple_of(WORD) || !end.is_multiple_of(WORD) {
            return Err(Errno::INVAL);
        }
        Ok((self.base + offset as usize) as *mut u8)
    }
}

pub(crate) unsafe extern "C" fn alloc(
    context: *mut ibv_context,
    attr: *mut ibv_alloc_dm_attr,
) -> *mut ibv_dm {
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours and the application's attributes.
        let (device, attr) = unsafe { (device::state(context), &*attr) };
        let length = attr.length as u64;
        if attr.comp_mask != 0 || length == 0 || attr.log_align_req > PAGE.trailing_zeros() {
            return Err(Errno::INVAL);
        }
        take_bytes(device, length)?;
        let base = map(length).inspect_err(|_| give_bytes(device, length))?;
        let public = ibv_dm {
            context,
            memcpy_to_dm: Some(copy_to),
            memcpy_from_dm: Some(copy_from),
            comp_mask: 0,
            handle: 0,
        };
        let dm = Dm { public, base, length, mrs: AtomicU32::new(0) };
        Ok(Box::into_raw(Box::new(dm)).cast())
    })
}

fn take_bytes(device: &Context, length: u64) -> Result<(), Errno> {
    let more = |used: u64| used.checked_add(length).filter(|&used| used <= MAX_TOTAL);
    let taken = device.dm_bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
    taken.map(|_| ()).map_err(|_| Errno::NOMEM)
}

fn give_bytes(device: &Context, length: u64) {
    device.dm_bytes.fetch_sub(length, Ordering::SeqCst);
}

/// Pages of zeros.
fn map(length: u64) -> Result<usize, Errno> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let room = (length as usize).next_multiple_of(PAGE);
    // SAFETY: a fresh mapping at an address that the kernel chooses aliases nothing.
    let base = unsafe {
        mmap_anonymous(ptr::null_mut(), room, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
    };
    Ok(base as usize)
}

pub(crate) unsafe extern "C" fn free(dm: *mut ibv_dm) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes live device memory of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*dm).context), &*dm.cast::<Dm>()) };
        if own.mrs.load(Ordering::SeqCst) > 0 {
            return Err(Errno::BUSY);
        }
        // SAFETY: from `alloc`, and gone for C when this returns 0; no MR is on its pages.
        unsafe {
            let _ = rustix::mm::munmap(own.base as *mut c_void, own.room());
            give_bytes(device, own.length);
            drop(Box::from_raw(dm.cast::<Dm>()));
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn register(
    pd: *mut ibv_pd,
    dm: *mut ibv_dm,
    offset: u64,
    length: usize,
    access: u32,
) -> *mut ibv_mr {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open, and live device memory.
        let (device, own, dm) = unsafe { (device::state((*pd).context), Pd::of(pd), &mut *dm.cast::<Dm>()) };
        device.health().check_owner()?;
        let flags = AccessFlags::try_from(access).map_err(|_| Errno::INVAL)?;
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= dm.length);
        if !inside || !flags.contains(AccessFlags::ZERO_BASED) || !flags.valid_for_mr() {
            return Err(Errno::INVAL);
        }
        // All of its pages are its own: they move as a whole.
        let moved = device.mover.register(dm.base, dm.room(), true);
        let moved = moved.map_err(|error| error::from_router(error.errno()))?;
        let wanted = Wanted { pd: own.id, addr: dm.base + offset as usize, length, iova: 0, access: flags };
        let mut request = wanted.request(Some(&moved));
        // The router wants no more than the pages of the region.
        let page = PAGE as u64;
        request.shared_start = request.shared_start.max(request.addr / page * page);
        request.shared_end = request.shared_end.min((request.addr + request.len).next_multiple_of(page));
        request.shared_end = request.shared_end.max(request.shared_start);
        match device.link.ask(&Request::RegMr(request), &[]) {
            Ok((Answer::Mr { key }, _)) => {
                dm.mrs.fetch_add(1, Ordering::SeqCst);
                // Nobody else may take its address for the application's.
                let shown = Wanted { addr: 0, ..wanted };
                // SAFETY: as above.
                Ok(unsafe { mr::object(pd, &shown, access as c_int, key, Backing::Device(moved, dm)) })
            }
            other => {
                device.mover.deregister(moved);
                Err(other.err().unwrap_or(Errno::PROTO))
            }
        }
    })
}

unsafe extern "C" fn copy_to(dm: *mut ibv_dm, offset: u64, from: *const c_void, length: usize) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes live device memory of ours.
        let to = unsafe { &*dm.cast::<Dm>() }.place(offset, length)?;
        // SAFETY: the application passes `length` readable bytes; the place lies inside the device memory.
        unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), to, length) };
        Ok(())
    })
}

unsafe extern "C" fn copy_from(to: *mut c_void, dm: *mut ibv_dm, offset: u64, length: usize) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes live device memory of ours.
        let from = unsafe { &*dm.cast::<Dm>() }.place(offset, length)?;
        // SAFETY: the application passes `length` writable bytes; the place lies inside the device memory.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), to.cast::<u8>(), length) };
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_of_words_and_stay_inside() {
        let base = map(100).unwrap();
        // SAFETY: pointers and integers, for which zero is a value.
        let public: ibv_dm = unsafe { std::mem::zeroed() };
        let mut dm = Dm { public, base, length: 100, mrs: AtomicU32::new(0) };
        let at = (&raw mut dm).cast::<ibv_dm>();
        let (words, mut back) = (*b"eightytw", [0_u8; 8]);
        // SAFETY: the device memory and the arrays live here.
        unsafe {
            assert_eq!(copy_to(at, 4, words.as_ptr().cast(), 8), 0);
            assert_eq!(copy_from(back.as_mut_ptr().cast(), at, 4, 8), 0);
            assert_eq!(back, words);
            assert_eq!(copy_to(at, 3, words.as_ptr().cast(), 4), libc::EINVAL);
            assert_eq!(copy_to(at, 4, words.as_ptr().cast(), 3), libc::EINVAL);
            assert_eq!(copy_from(back.as_mut_ptr().cast(), at, 96, 8), libc::EFAULT);
            assert_eq!(copy_from(back.as_mut_ptr().cast(), at, u64::MAX - 3, 8), libc::EFAULT);
            rustix::mm::munmap(base as *mut c_void, dm.room()).unwrap();
        }
    }
}
