//! Device memory: memory that only the device and its two copy functions touch.
//!
//! It is memory of this process, like the region that registered memory is moved to; an MR on it moves its pages as
//! any other does. As on real devices, copies are made of aligned words of four bytes.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use verbs_abi::ffi::{ibv_alloc_dm_attr, ibv_context, ibv_dm, ibv_mr, ibv_pd};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::PAGE;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
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
    pages: Arc<Pages>,
    /// Whether it is another context's.
    is_imported: bool,
    /// MRs on it.
    mrs: AtomicU32,
}

/// What device memory is made of; it ends with its last import.
#[derive(Debug)]
pub(crate) struct Pages {
    /// The first one.
    base: usize,
    /// Bytes asked for.
    length: u64,
    /// Bytes of device memory in use, these among them.
    used: Arc<AtomicU64>,
}

impl Dm {
    /// An MR on it is gone.
    pub(crate) fn let_go(&self) {
        self.mrs.fetch_sub(1, Ordering::SeqCst);
    }

    fn object(context: *mut ibv_context, handle: u32, pages: Arc<Pages>, is_imported: bool) -> *mut ibv_dm {
        let public = ibv_dm {
            context,
            memcpy_to_dm: Some(copy_to),
            memcpy_from_dm: Some(copy_from),
            comp_mask: 0,
            handle,
        };
        Box::into_raw(Box::new(Dm { public, pages, is_imported, mrs: AtomicU32::new(0) })).cast()
    }
}

impl Pages {
    /// Pages of zeros, counted in `used`.
    fn new(length: u64, used: &Arc<AtomicU64>) -> Result<Pages, Errno> {
        let more = |used: u64| used.checked_add(length).filter(|&used| used <= MAX_TOTAL);
        used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).map_err(|_| Errno::NOMEM)?;
        let base = map(length).inspect_err(|_| {
            used.fetch_sub(length, Ordering::SeqCst);
        })?;
        Ok(Pages { base, length, used: Arc::clone(used) })
    }

    /// Bytes of them all.
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

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: from `new`; no MR is on them, for each keeps its `Dm`.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut c_void, self.room()) };
        self.used.fetch_sub(self.length, Ordering::SeqCst);
    }
}

/// The device memory of these pages, for another context than the one that made it.
pub(crate) fn import(context: *mut ibv_context, handle: u32, pages: Arc<Pages>) -> *mut ibv_dm {
    Dm::object(context, handle, pages, true)
}

/// Forgets imported device memory, unless an MR is on it.
///
/// # Safety
/// `dm` must be live device memory of ours; it is gone afterwards.
pub(crate) unsafe fn release_import(dm: *mut ibv_dm) {
    // SAFETY: the caller's promise.
    let own = unsafe { &*dm.cast::<Dm>() };
    // Libibverbs has no way to hear of a refusal: what an MR is on stays for as long as the process.
    if own.is_imported && own.mrs.load(Ordering::SeqCst) == 0 {
        // SAFETY: from `import`.
        drop(unsafe { Box::from_raw(dm.cast::<Dm>()) });
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
        let pages = Arc::new(Pages::new(length, &device.dm_bytes)?);
        let handle = device.importable.enter_dm(&pages);
        Ok(Dm::object(context, handle, pages, false))
    })
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
        if own.is_imported {
            return Err(Errno::INVAL);
        }
        if own.mrs.load(Ordering::SeqCst) > 0 {
            return Err(Errno::BUSY);
        }
        device.importable.forget_dm(own.public.handle);
        // SAFETY: from `alloc`, and gone for C when this returns 0.
        drop(unsafe { Box::from_raw(dm.cast::<Dm>()) });
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
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= dm.pages.length);
        if !inside || !flags.contains(AccessFlags::ZERO_BASED) || !flags.valid_for_mr() {
            return Err(Errno::INVAL);
        }
        // All of its pages are its own: they move as a whole.
        let moved = device.mover.register(dm.pages.base, dm.pages.room(), true);
        let moved = moved.map_err(|error| error::from_router(error.errno()))?;
        let wanted =
            Wanted { pd: own.id, addr: dm.pages.base + offset as usize, length, iova: 0, access: flags };
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
        let to = unsafe { &*dm.cast::<Dm>() }.pages.place(offset, length)?;
        // SAFETY: the application passes `length` readable bytes; the place lies inside the device memory.
        unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), to, length) };
        Ok(())
    })
}

unsafe extern "C" fn copy_from(to: *mut c_void, dm: *mut ibv_dm, offset: u64, length: usize) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes live device memory of ours.
        let from = unsafe { &*dm.cast::<Dm>() }.pages.place(offset, length)?;
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
        let used = Arc::default();
        let pages = Arc::new(Pages::new(100, &used).unwrap());
        let at = Dm::object(ptr::null_mut(), 1, pages, true);
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
            release_import(at);
        }
        assert_eq!(used.load(Ordering::SeqCst), 0);
        assert!(Pages::new(MAX_TOTAL + 1, &used).is_err());
    }
}
