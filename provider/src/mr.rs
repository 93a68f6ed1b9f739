//! Memory regions: first the memory is moved to where the router reaches it, then the router makes the key.
//!
//! Memory that is registered on demand is not moved: the router finds the pages of the moment at each access.

use std::ffi::{c_int, c_void};

use verbs_abi::ffi::{
    IBV_REREG_MR_CHANGE_ACCESS, IBV_REREG_MR_CHANGE_PD, IBV_REREG_MR_CHANGE_TRANSLATION, ibv_mr, ibv_pd,
};
use verbs_abi::ffi_private::{MR_TYPE_IMPORTED_MR, MR_TYPE_MR, MR_TYPE_NULL_MR, VerbsMr};
use verbs_abi::proto::{Answer, RegMr, Request, WHOLE_PROCESS};
use verbs_abi::shm::PAGE;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
use crate::context::Context;
use crate::device;
use crate::dm::Dm;
use crate::dmabuf;
use crate::error;
use crate::log::{self, Level};
use crate::memory::Registration;
use crate::pd::Pd;

/// An MR. libibverbs sees the first member.
#[repr(C)]
#[derive(Debug)]
struct Mr {
    public: VerbsMr,
    iova: u64,
    backing: Backing,
}

/// What the memory of an MR needs to be given back.
#[derive(Debug)]
pub(crate) enum Backing {
    /// Nothing was moved, as its pages are found at each access; they stay meanwhile, unless it is all memory.
    OnDemand(Option<Registration>),
    /// Memory of the application, of which as much was moved as can be.
    Moved(Registration),
    /// Device memory, which stays as long as an MR is on it.
    Device(Registration, *mut Dm),
    /// Another MR's, which gives it back.
    Imported,
    /// A null MR has none.
    Null,
    /// A dma-buf, mapped here.
    DmaBuf(Registration, dmabuf::Mapping),
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
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        device.health().check_owner()?;
        let (flags, iova) = check(addr as u64, length, iova, access as u32)?;
        let wanted = Wanted { pd: own.id, addr: addr as usize, length, iova, access: flags };
        let (key, backing) = wanted.register(device)?;
        // SAFETY: as above.
        Ok(unsafe { object(pd, &wanted, access, key, backing) })
    })
}

/// The MR as C sees it, in its PD.
///
/// # Safety
/// `pd` must be a live PD of ours.
pub(crate) unsafe fn object(
    pd: *mut ibv_pd,
    what: &Wanted,
    access: c_int,
    key: u32,
    backing: Backing,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    let (context, own) = unsafe { ((*pd).context, Pd::of(pd)) };
    own.hold();
    let addr = what.addr as *mut c_void;
    let ibv_mr = ibv_mr { context, pd, addr, length: what.length, handle: key, lkey: key, rkey: key };
    let public = VerbsMr { ibv_mr, mr_type: MR_TYPE_MR, access };
    Box::into_raw(Box::new(Mr { public, iova: what.iova, backing })).cast()
}

/// The MR of that key, for another context than the one that registered it: keys, and no address.
///
/// # Safety
/// `pd` must be a live PD of ours.
pub(crate) unsafe fn import(pd: *mut ibv_pd, key: u32) -> *mut ibv_mr {
    let nowhere = Wanted { pd: 0, addr: 0, length: 0, iova: 0, access: AccessFlags::empty() };
    // SAFETY: the caller's promise.
    let mr = unsafe { object(pd, &nowhere, 0, key, Backing::Imported) };
    // SAFETY: just made.
    unsafe { (*mr.cast::<VerbsMr>()).mr_type = MR_TYPE_IMPORTED_MR };
    mr
}

/// Forgets an imported MR.
///
/// # Safety
/// `mr` must be what [`import`] returned, and is gone afterwards.
pub(crate) unsafe fn release_import(mr: *mut ibv_mr) {
    // SAFETY: the caller's promise.
    unsafe {
        let mr = Box::from_raw(mr.cast::<Mr>());
        Pd::of(mr.public.ibv_mr.pd).let_go();
    }
}

/// An MR without memory: what is written to it is dropped, what is read are zeros. Only its lkey is of use.
pub(crate) unsafe extern "C" fn alloc_null(pd: *mut ibv_pd) -> *mut ibv_mr {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        device.health().check_owner()?;
        let (Answer::Mr { key }, _) = device.link.ask(&Request::AllocNullMr { pd: own.id }, &[])? else {
            return Err(Errno::PROTO);
        };
        let access = AccessFlags::LOCAL_WRITE;
        let wanted = Wanted { pd: own.id, addr: 0, length: usize::MAX, iova: 0, access };
        // SAFETY: as above.
        let mr = unsafe { object(pd, &wanted, access.bits() as c_int, key, Backing::Null) };
        // SAFETY: just made.
        unsafe { (*mr.cast::<VerbsMr>()).mr_type = MR_TYPE_NULL_MR };
        Ok(mr)
    })
}

/// What an RNIC refuses before it looks at the memory; and the first address as keys' users name it.
pub(crate) fn check(addr: u64, length: usize, iova: u64, access: u32) -> Result<(AccessFlags, u64), Errno> {
    let access = AccessFlags::try_from(access).map_err(|_| Errno::INVAL)?;
    let is_zero_based = access.contains(AccessFlags::ZERO_BASED);
    let (iova, congruent) = if is_zero_based { (0, addr) } else { (iova, iova) };
    let offset = |address: u64| address % PAGE as u64;
    if length == 0 || !access.valid_for_mr() || offset(addr) != offset(congruent) {
        return Err(Errno::INVAL);
    }
    if !is_implicit(addr, length, access) {
        iova.checked_add(length as u64).ok_or(Errno::INVAL)?;
    }
    let is_supported = !access.contains(AccessFlags::FLUSH_PERSISTENT);
    if is_supported { Ok((access, iova)) } else { Err(Errno::OPNOTSUPP) }
}

/// Whether this is all memory that the process has and will have.
fn is_implicit(addr: u64, length: usize, access: AccessFlags) -> bool {
    access.contains(AccessFlags::ON_DEMAND) && addr == 0 && length as u64 == WHOLE_PROCESS
}

/// A region that somebody wants registered.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) pd: u32,
    pub(crate) addr: usize,
    pub(crate) length: usize,
    pub(crate) iova: u64,
    pub(crate) access: AccessFlags,
}

impl Wanted {
    fn register(&self, device: &Context) -> Result<(u32, Backing), Errno> {
        let moved = self.move_memory(device)?;
        let request = Request::RegMr(self.request(moved.as_ref()));
        match device.link.ask(&request, &[]) {
            Ok((Answer::Mr { key }, _)) => {
                Ok((key, moved.map_or_else(|| self.on_demand(device), Backing::Moved)))
            }
            other => {
                give_back(device, moved);
                Err(other.err().unwrap_or(Errno::PROTO))
            }
        }
    }

    /// Moves what can be moved, unless its pages are to be found at each access.
    fn move_memory(&self, device: &Context) -> Result<Option<Registration>, Errno> {
        if self.access.contains(AccessFlags::ON_DEMAND) {
            return Ok(None);
        }
        let writable = self
            .access
            .intersects(AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC);
        let moved = device.mover.register(self.addr, self.length, writable).map_err(|error| {
            log::say(Level::Info, format_args!("cannot register memory: {error}"));
            error::from_router(error.errno())
        })?;
        Ok(Some(moved))
    }

    /// Sees to it that the pages are not moved for somebody else while the router reaches them. Its first access
    /// comes after this: no peer knows the key yet.
    fn on_demand(&self, device: &Context) -> Backing {
        let whole = is_implicit(self.addr as u64, self.length, self.access);
        Backing::OnDemand((!whole).then(|| device.mover.keep(self.addr, self.length)))
    }

    /// The region as the router is asked for it.
    pub(crate) fn request(&self, moved: Option<&Registration>) -> RegMr {
        let shared = moved.map(Registration::shared).unwrap_or_default();
        RegMr {
            pd: self.pd,
            addr: self.addr as u64,
            len: self.length as u64,
            iova: self.iova,
            access: self.access.bits(),
            shared_start: shared.start as u64,
            shared_end: shared.end as u64,
        }
    }
}

fn give_back(device: &Context, moved: Option<Registration>) {
    if let Some(moved) = moved {
        device.mover.deregister(moved);
    }
}

/// Changes an MR under its key. libibverbs has checked which parts may be named, and keeps its own fields.
pub(crate) unsafe extern "C" fn reregister(
    mr: *mut VerbsMr,
    flags: c_int,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> c_int {
    // SAFETY: libibverbs passes a live MR of ours, and a live PD where the flags name it.
    let result = edge::status(|| unsafe { change(mr, flags as u32, pd, addr as usize, length, access) });
    if result != 0 {
        // The function's own value is one of its enumeration; what went wrong is in errno.
        edge::set_errno(Errno::from_raw_os_error(result));
    }
    result
}

/// # Safety
/// `mr` must be a live MR of ours whose context is open, and `pd` a live PD if the flags name it.
unsafe fn change(
    mr: *mut VerbsMr,
    flags: u32,
    pd: *mut ibv_pd,
    addr: usize,
    length: usize,
    access: c_int,
) -> Result<(), Errno> {
    let names = |flag| flags & flag != 0;
    // SAFETY: the caller's promise.
    let (own, device) = unsafe { (&mut *mr.cast::<Mr>(), device::state((*mr).ibv_mr.context)) };
    device.health().check_owner()?;
    let before = own.public.ibv_mr;
    if matches!(own.backing, Backing::Null) {
        return Err(Errno::INVAL);
    }
    if !matches!(own.backing, Backing::Moved(_)) {
        return Err(Errno::OPNOTSUPP);
    }
    // SAFETY: the caller's promise.
    if names(IBV_REREG_MR_CHANGE_PD) && (pd.is_null() || unsafe { (*pd).context } != before.context) {
        return Err(Errno::INVAL);
    }
    let pd = if names(IBV_REREG_MR_CHANGE_PD) { pd } else { before.pd };
    let access = if names(IBV_REREG_MR_CHANGE_ACCESS) { access } else { own.public.access };
    let (addr, length, iova) = match names(IBV_REREG_MR_CHANGE_TRANSLATION) {
        true => (addr, length, addr as u64),
        false => (before.addr as usize, before.length, own.iova),
    };
    let (flags, iova) = check(addr as u64, length, iova, access as u32)?;
    if flags.contains(AccessFlags::ON_DEMAND) {
        return Err(Errno::OPNOTSUPP);
    }
    // SAFETY: the caller's promise, or the PD that the MR holds.
    let (old_pd, new_pd) = unsafe { (Pd::of(before.pd), Pd::of(pd)) };
    let wanted = Wanted { pd: new_pd.id, addr, length, iova, access: flags };
    let moved = wanted.move_memory(device)?;
    let request = Request::ReregMr { key: before.lkey, reg: wanted.request(moved.as_ref()) };
    if let Err(errno) = device.link.tell(&request) {
        give_back(device, moved);
        return Err(errno);
    }
    new_pd.hold();
    old_pd.let_go();
    (own.public.access, own.iova) = (access, iova);
    let former = std::mem::replace(&mut own.backing, moved.map_or(Backing::OnDemand(None), Backing::Moved));
    if let Backing::Moved(former) = former {
        device.mover.deregister(former);
    }
    Ok(())
}

pub(crate) unsafe extern "C" fn deregister(mr: *mut VerbsMr) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live MR of ours, whose context is open.
        let (device, public) = unsafe { (device::state((*mr).ibv_mr.context), (*mr).ibv_mr) };
        // SAFETY: as above.
        if unsafe { (*mr).mr_type } == MR_TYPE_IMPORTED_MR {
            return Err(Errno::INVAL);
        }
        device.link.release(&Request::DeregMr { key: public.lkey })?;
        // SAFETY: from `object`, and gone for C when this returns 0.
        let mr = unsafe { Box::from_raw(mr.cast::<Mr>()) };
        // SAFETY: the MR's PD lives as long as it holds it.
        unsafe { Pd::of(public.pd) }.let_go();
        match mr.backing {
            Backing::OnDemand(kept) => give_back(device, kept),
            Backing::Moved(moved) => device.mover.deregister(moved),
            Backing::Device(moved, dm) => {
                device.mover.deregister(moved);
                // SAFETY: it lives as long as an MR is on it.
                unsafe { (*dm).let_go() };
            }
            Backing::Imported | Backing::Null => {}
            Backing::DmaBuf(moved, mapping) => {
                device.mover.deregister(moved);
                drop(mapping);
            }
        }
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
        assert_eq!(with(ffi::IBV_ACCESS_ZERO_BASED), Ok((AccessFlags::ZERO_BASED, 0)));
        assert_eq!(with(1 << 9), Err(Errno::OPNOTSUPP), "no persistence");
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

    #[test]
    fn the_whole_process_is_registered_on_demand_only() {
        assert!(check(0, usize::MAX, 0, ffi::IBV_ACCESS_ON_DEMAND).is_ok());
        assert_eq!(check(0x1000, usize::MAX, 0x1000, ffi::IBV_ACCESS_ON_DEMAND), Err(Errno::INVAL));
    }
}
