//! Attaching QPs to multicast groups. The router delivers; here is kept what each QP is attached to, so that one
//! which is attached is not destroyed half.

use std::ffi::c_int;

use verbs_abi::ffi::{ibv_gid, ibv_qp};
use verbs_abi::ids;
use verbs_abi::proto::{Gid, Request};
use verbs_abi::verbs::QpType;

use crate::abi::edge::{self, Errno};
use crate::device;
use crate::qp::Qp;

/// Whether a QP is attached to any group.
pub(crate) fn is_attached(qp: &Qp) -> bool {
    !qp.groups.lock().is_empty()
}

/// The LID says nothing on Ethernet.
pub(crate) unsafe extern "C" fn attach(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours, whose context is open, and the application's GID.
        let (device, own, group) = unsafe { (device::state((*qp).context), Qp::of(qp), read(gid)) };
        device.health().check_owner()?;
        if own.limits.qp_type != QpType::Ud || !ids::Gid(group).is_multicast() {
            return Err(Errno::INVAL);
        }
        let mut groups = own.groups.lock();
        if !groups.contains(&group) {
            device.link.tell(&Request::AttachMcast { qpn: own.number, group })?;
            groups.insert(group);
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn detach(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    edge::status(|| {
        // SAFETY: as in `attach`.
        let (device, own, group) = unsafe { (device::state((*qp).context), Qp::of(qp), read(gid)) };
        device.health().check_owner()?;
        let mut groups = own.groups.lock();
        if !groups.contains(&group) {
            return Err(Errno::INVAL);
        }
        device.link.release(&Request::DetachMcast { qpn: own.number, group })?;
        groups.remove(&group);
        Ok(())
    })
}

/// # Safety
/// `gid` must be readable.
unsafe fn read(gid: *const ibv_gid) -> Gid {
    // SAFETY: the caller's promise; both members of the union are 16 bytes of any value.
    unsafe { (*gid).raw }
}
