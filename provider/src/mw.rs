//! Memory windows. The router makes the key; binding and invalidating are work requests.

use std::ffi::c_int;
use std::ptr;

use verbs_abi::ffi::{
    IBV_MW_TYPE_1, IBV_MW_TYPE_2, IBV_SEND_FENCE, IBV_SEND_SIGNALED, ibv_mw, ibv_mw_bind, ibv_mw_bind_info,
    ibv_pd, ibv_qp,
};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::wqe::SendWqe;
use verbs_abi::verbs::Opcode;

use crate::abi::edge::{self, Errno};
use crate::device;
use crate::pd::Pd;
use crate::post;
use crate::qp::Qp;

pub(crate) unsafe extern "C" fn alloc(pd: *mut ibv_pd, kind: u32) -> *mut ibv_mw {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (context, own) = unsafe { ((*pd).context, Pd::of(pd)) };
        let is_type_2 = match kind {
            IBV_MW_TYPE_1 => false,
            IBV_MW_TYPE_2 => true,
            _ => return Err(Errno::INVAL),
        };
        // SAFETY: as above.
        let device = unsafe { device::state(context) };
        let answer = device.link.ask(&Request::AllocMw { pd: own.id, is_type_2 }, &[])?;
        let (Answer::Mr { key }, _) = answer else { return Err(Errno::PROTO) };
        own.hold();
        Ok(Box::into_raw(Box::new(ibv_mw { context, pd, rkey: key, handle: key, type_: kind })))
    })
}

pub(crate) unsafe extern "C" fn dealloc(mw: *mut ibv_mw) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live window of ours, whose context is open; the PD lives as long as it.
        unsafe {
            let device = device::state((*mw).context);
            device.link.release(&Request::DeallocMw { key: (*mw).handle })?;
            Pd::of((*mw).pd).let_go();
            drop(Box::from_raw(mw));
        }
        Ok(())
    })
}

/// Binds a window of type 1: a work request under the next key, which is the window's from then on.
pub(crate) unsafe extern "C" fn bind(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes live objects of ours and its attributes.
        let (own, bind, pd) = unsafe { (Qp::of(qp), &*bind, (*mw).pd) };
        // SAFETY: as above.
        if !ptr::eq(pd, unsafe { (*qp).pd }) {
            return Err(Errno::PERM);
        }
        if bind.send_flags & !(IBV_SEND_FENCE | IBV_SEND_SIGNALED) != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above.
        let key = next_key(unsafe { (*mw).rkey });
        post::one(own, Opcode::BindMw, bind.wr_id, bind.send_flags, |wqe| {
            // SAFETY: the application names a live MR or none.
            unsafe { fill(wqe, key, &bind.bind_info) };
        })?;
        // SAFETY: as above; the field is the binder's to write.
        unsafe { (*mw).rkey = key };
        Ok(())
    })
}

/// The key with its low byte counted up, in a circle, as `ibv_inc_rkey` does.
fn next_key(key: u32) -> u32 {
    key & !0xff | key.wrapping_add(1) & 0xff
}

/// Says in the WQE what the window is bound to.
///
/// # Safety
/// The MR that `info` names, if any, must be live.
pub(crate) unsafe fn fill(wqe: &mut SendWqe, key: u32, info: &ibv_mw_bind_info) {
    // SAFETY: the caller's promise.
    let mr = unsafe { info.mr.as_ref() }.map_or(0, |mr| mr.lkey);
    (wqe.rkey, wqe.remote_addr, wqe.compare_add) = (key, info.addr, info.length);
    wqe.swap = u64::from(info.mw_access_flags) << 32 | u64::from(mr);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_window_go_round_in_their_low_byte() {
        assert_eq!(next_key(0x1234_5601), 0x1234_5602);
        assert_eq!(next_key(0x1234_56ff), 0x1234_5600);
    }
}
