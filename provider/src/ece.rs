//! ECE: enhancements that two devices of one vendor agree upon. This device has none to offer, and says so in the form
//! that programs expect: it answers by its vendor's id, and what it is asked for comes down to nothing.

use std::ffi::c_int;

use verbs_abi::ffi::{ibv_ece, ibv_qp};

use crate::abi::edge::{self, Errno};
use crate::attributes::VENDOR;
use crate::qp::Qp;

pub(crate) unsafe extern "C" fn query(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours.
        unsafe { Qp::of(qp) }.bell.health().check_owner()?;
        // SAFETY: the application passes room for the answer.
        unsafe { ece.write(ibv_ece { vendor_id: VENDOR, options: 0, comp_mask: 0 }) };
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn set(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours and the application's wishes, which are answered in place.
        let (own, ece) = unsafe { (Qp::of(qp), &mut *ece) };
        own.bell.health().check_owner()?;
        if ece.comp_mask != 0 || ece.vendor_id != VENDOR {
            return Err(Errno::INVAL);
        }
        ece.options = 0;
        Ok(())
    })
}
