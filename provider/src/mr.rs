//! Memory regions: first the memory is moved to where the router reaches it, then the router makes the key.

use std::ffi::{c_int, c_void};

use verbs_abi::ffi::{ibv_mr, ibv_pd};
use verbs_abi::ffi_private::{MR_TYPE_MR, VerbsMr};
use verbs_abi::proto::{Answer, RegMr, Request};
use verbs_abi::shm::PAGE;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
use crate::context::Context;
use crate::device;
use crate::error;
use crate::log::{self, Level};
use crate::memory::Registration;
use crate::pd::Pd;

/// An MR. libibverbs sees the first member.
#[repr(C)]
#[derive(Debug)]
struct Mr {
    public: VerbsMr,
    registration: Registration,
}

pub(crate) unsafe extern "C" fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (context, own) = unsafe { ((*pd).context, Pd::of(pd)) };
        // SAFETY: as above.
        let device = unsafe { device::state(context) };
        device.health().check_owner()?;
        let flags = check(addr as u64, length, iova, access as u32)?;
        let wanted = Wanted { pd: own.id, addr: addr as usize, length, iova, access: flags };
        let (key, registration) = wanted.register(device)?;
        let ibv_mr = ibv_mr { context, pd, addr, length, handle: key, lkey: key, rkey: key };
        let public = VerbsMr { ibv_mr, mr_type: MR_TYPE_MR, access };
        Ok(Box::into_raw(Box::new(Mr { public, registration })).cast())
    })
}

/// What an RNIC refuses before it looks at the memory.
fn check(addr: u64, length: usize, iova: u64, access: u32) -> Result<AccessFlags, Errno> {
    let access = AccessFlags::try_from(access).map_err(|_| Errno::INVAL)?;
    let offset = |address: u64| address % PAGE as u64;
    if length == 0 || !access.valid_for_mr() || offset(addr) != offset(iova) {
        return Err(Errno::INVAL);
    }
    iova.checked_add(length as u64).ok_or(Errno::INVAL)?;
    let unsupported = AccessFlags::ZERO_BASED
        | AccessFlags::ON_DEMAND
        | AccessFlags::FLUSH_GLOBAL
        | AccessFlags::FLUSH_PERSISTENT;
    if access.intersects(unsupported) { Err(Errno::OPNOTSUPP) } else { Ok(access) }
}

struct Wanted {
    pd: u32,
    addr: usize,
    length: usize,
    iova: u64,
    access: AccessFlags,
}

impl Wanted {
    fn register(&self, device: &Context) -> Result<(u32, Registration), Errno> {
        let writable = self
            .access
            .intersects(AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC);
        let moved = device.mover.register(self.addr, self.length, writable).map_err(|error| {
            log::say(Level::Info, format_args!("cannot register memory: {error}"));
            error::from_router(error.errno())
        })?;
        let shared = moved.shared();
        let request = Request::RegMr(RegMr {
            pd: self.pd,
            addr: self.addr as u64,
            len: self.length as u64,
            iova: self.iova,
            access: self.access.bits(),
            shared_start: shared.start as u64,
            shared_end: shared.end as u64,
        });
        match device.link.ask(&request, &[]) {
            Ok((Answer::Mr { key }, _)) => Ok((key, moved)),
            other => {
                device.mover.deregister(moved);
                Err(other.err().unwrap_or(Errno::PROTO))
            }
        }
    }
}

pub(crate) unsafe extern "C" fn deregister(mr: *mut VerbsMr) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live MR of ours, whose context is open.
        let (device, key) = unsafe { (device::state((*mr).ibv_mr.context), (*mr).ibv_mr.lkey) };
        device.link.release(&Request::DeregMr { key })?;
        // SAFETY: from `register`, and gone for C when this returns 0.
        let mr = unsafe { Box::from_raw(mr.cast::<Mr>()) };
        device.mover.deregister(mr.registration);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use verbs_abi::ffi;

    #[test]
    fn access_flags_are_checked_as_an_rnic_does() {
        let with = |access| check(0x1000, 64, 0x1000, access);
        assert!(with(0).is_ok());
        assert_eq!(with(ffi::IBV_ACCESS_REMOTE_WRITE), Err(Errno::INVAL));
        assert!(with(ffi::IBV_ACCESS_REMOTE_WRITE | ffi::IBV_ACCESS_LOCAL_WRITE).is_ok());
        assert_eq!(with(ffi::IBV_ACCESS_ON_DEMAND), Err(Errno::OPNOTSUPP));
        assert_eq!(with(1 << 15), Err(Errno::INVAL));
        assert!(with(ffi::IBV_ACCESS_RELAXED_ORDERING).is_ok());
    }

    #[test]
    fn an_empty_region_or_a_displaced_iova_is_refused() {
        assert_eq!(check(0x1000, 0, 0x1000, 1), Err(Errno::INVAL));
        assert_eq!(check(0x1008, 64, 0x7000, 1), Err(Errno::INVAL));
        assert!(check(0x1008, 64, 0x7008, 1).is_ok());
        assert_eq!(check(0x1000, 4096, u64::MAX - 4095, 1), Err(Errno::INVAL));
    }
}
