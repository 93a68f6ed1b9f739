//! Protection domains.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use verbs_abi::ffi::{ibv_context, ibv_pd};
use verbs_abi::proto::Request;

use crate::abi::edge::{self, Errno};
use crate::device;

/// A PD. C sees the first member.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Pd {
    public: ibv_pd,
    /// The router's name for it.
    pub(crate) id: u32,
    /// Address handles in it, of which the router knows nothing.
    pub(crate) ahs: AtomicU32,
}

impl Pd {
    /// The PD that C names.
    ///
    /// # Safety
    /// `pd` must be a live PD of ours, and the reference must not outlive it.
    pub(crate) unsafe fn of<'a>(pd: *mut ibv_pd) -> &'a Pd {
        // SAFETY: the caller's promise; the public part comes first.
        unsafe { &*pd.cast() }
    }
}

pub(crate) unsafe extern "C" fn alloc(context: *mut ibv_context) -> *mut ibv_pd {
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        let id = device.link.handle(&Request::AllocPd, &[])?;
        let pd = Pd { public: ibv_pd { context, handle: id }, id, ahs: AtomicU32::new(0) };
        Ok(Box::into_raw(Box::new(pd)).cast())
    })
}

pub(crate) unsafe extern "C" fn dealloc(pd: *mut ibv_pd) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        if own.ahs.load(Ordering::SeqCst) > 0 {
            return Err(Errno::BUSY);
        }
        device.link.release(&Request::DeallocPd { pd: own.id })?;
        // SAFETY: from `alloc`, and gone for C when this returns 0.
        drop(unsafe { Box::from_raw(ptr::from_ref(own).cast_mut()) });
        Ok(())
    })
}
