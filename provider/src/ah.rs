//! Address handles: purely local, since the whole address goes into each datagram's work request.

use std::ffi::c_int;

use verbs_abi::ffi::{ibv_ah, ibv_ah_attr, ibv_pd};
use verbs_abi::shm::wqe::Address;

use crate::abi::edge::{self, Errno};
use crate::device;
use crate::gid::TABLE_LEN;
use crate::pd::Pd;

/// An AH. C sees the first member.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Ah {
    public: ibv_ah,
    /// Where it leads, without QP number and Q_Key.
    pub(crate) address: Address,
}

impl Ah {
    /// The AH that C names.
    ///
    /// # Safety
    /// `ah` must be a live AH of ours, and the reference must not outlive it.
    #[inline]
    pub(crate) unsafe fn of<'a>(ah: *mut ibv_ah) -> &'a Ah {
        // SAFETY: the caller's promise; the public part comes first.
        unsafe { &*ah.cast() }
    }
}

pub(crate) unsafe extern "C" fn create(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours and the application's attributes.
        let (context, own, attr) = unsafe { ((*pd).context, Pd::of(pd), &*attr) };
        // SAFETY: the PD's context is open.
        unsafe { device::state(context) }.health().check_owner()?;
        if attr.port_num != 1 || attr.is_global == 0 || usize::from(attr.grh.sgid_index) >= TABLE_LEN {
            return Err(Errno::INVAL);
        }
        let address = Address {
            // SAFETY: both members of the union are 16 bytes of any value.
            dgid: unsafe { attr.grh.dgid.raw },
            sgid_index: attr.grh.sgid_index,
            hop_limit: attr.grh.hop_limit,
            traffic_class: attr.grh.traffic_class,
            flow_label: attr.grh.flow_label & 0xf_ffff,
            qpn: 0,
            qkey: 0,
        };
        own.hold();
        let public = ibv_ah { context, pd, handle: 0 };
        Ok(Box::into_raw(Box::new(Ah { public, address })).cast())
    })
}

pub(crate) unsafe extern "C" fn destroy(ah: *mut ibv_ah) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes what `create` returned, once; its PD outlives it.
        unsafe {
            Pd::of((*ah).pd).let_go();
            drop(Box::from_raw(ah.cast::<Ah>()));
        }
        Ok(())
    })
}
