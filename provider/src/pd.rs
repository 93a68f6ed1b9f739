//! Protection domains; and parent domains, which are a PD under another name, with a thread domain.
//!
//! A parent domain exists in this process alone: whatever is made in it is made in its PD. Its allocators are never
//! asked, as no queue lies in the application's memory; a thread domain permits to elide locks, which are kept.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use verbs_abi::ffi::{
    IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS, IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT, ibv_context,
    ibv_parent_domain_init_attr, ibv_pd, ibv_td, ibv_td_init_attr,
};
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
    /// What is in it, so far as this process knows.
    users: AtomicU32,
    /// What a parent domain is made of.
    parts: Option<Parts>,
    /// Another context's PD. It is its own user until the import is undone, and goes with the last one.
    is_imported: bool,
}

#[derive(Debug)]
struct Parts {
    pd: *mut ibv_pd,
    td: *mut ibv_td,
}

/// A thread domain. C sees the first member.
#[repr(C)]
#[derive(Debug)]
struct Td {
    public: ibv_td,
    users: AtomicU32,
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

    /// One more object is in it: it stays until [`Self::let_go`].
    pub(crate) fn hold(&self) {
        self.users.fetch_add(1, Ordering::SeqCst);
    }

    /// An object that was in it is gone.
    pub(crate) fn let_go(&self) {
        if self.users.fetch_sub(1, Ordering::SeqCst) == 1 && self.is_imported {
            // SAFETY: from `import`; nothing is in it, and the import was undone, so nobody knows it.
            drop(unsafe { Box::from_raw(ptr::from_ref(self).cast_mut()) });
        }
    }

    /// Whether it is a parent domain.
    pub(crate) fn is_parent_domain(&self) -> bool {
        self.parts.is_some()
    }
}

pub(crate) unsafe extern "C" fn alloc(context: *mut ibv_context) -> *mut ibv_pd {
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        let id = device.link.handle(&Request::AllocPd, &[])?;
        device.importable.pds().insert(id);
        Ok(object(context, id, None))
    })
}

/// The PD of that id, for another context than the one that made it.
pub(crate) fn import(context: *mut ibv_context, id: u32) -> *mut ibv_pd {
    let public = ibv_pd { context, handle: id };
    let pd = Pd { public, id, users: AtomicU32::new(1), parts: None, is_imported: true };
    Box::into_raw(Box::new(pd)).cast()
}

fn object(context: *mut ibv_context, id: u32, parts: Option<Parts>) -> *mut ibv_pd {
    let public = ibv_pd { context, handle: id };
    let pd = Pd { public, id, users: AtomicU32::new(0), parts, is_imported: false };
    Box::into_raw(Box::new(pd)).cast()
}

pub(crate) unsafe extern "C" fn alloc_parent_domain(
    context: *mut ibv_context,
    attr: *mut ibv_parent_domain_init_attr,
) -> *mut ibv_pd {
    const KNOWN: u32 = IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT;
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        let attr = unsafe { &*attr };
        let one_allocator = attr.alloc.is_some() != attr.free.is_some();
        let asks_for_allocators = attr.comp_mask & IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS != 0;
        if attr.pd.is_null() || attr.comp_mask & !KNOWN != 0 || asks_for_allocators && one_allocator {
            return Err(Errno::INVAL);
        }
        // SAFETY: the application names a live PD.
        let pd = unsafe { Pd::of(attr.pd) };
        // SAFETY: as above; and a live thread domain or none.
        let foreign =
            unsafe { (*attr.pd).context != context || !attr.td.is_null() && (*attr.td).context != context };
        if foreign || pd.is_parent_domain() {
            return Err(Errno::INVAL);
        }
        pd.hold();
        // SAFETY: as above; the public part comes first.
        if let Some(td) = unsafe { attr.td.cast::<Td>().as_ref() } {
            td.users.fetch_add(1, Ordering::SeqCst);
        }
        Ok(object(context, pd.id, Some(Parts { pd: attr.pd, td: attr.td })))
    })
}

pub(crate) unsafe extern "C" fn dealloc(pd: *mut ibv_pd) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        if own.users.load(Ordering::SeqCst) > 0 {
            return Err(Errno::BUSY);
        }
        match &own.parts {
            None => {
                device.link.release(&Request::DeallocPd { pd: own.id })?;
                device.importable.pds().remove(&own.id);
            }
            // SAFETY: its PD and its thread domain live as long as it holds them.
            Some(parts) => unsafe {
                Pd::of(parts.pd).let_go();
                if let Some(td) = parts.td.cast::<Td>().as_ref() {
                    td.users.fetch_sub(1, Ordering::SeqCst);
                }
            },
        }
        // SAFETY: from `object`, and gone for C when this returns 0.
        drop(unsafe { Box::from_raw(ptr::from_ref(own).cast_mut()) });
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn alloc_td(
    context: *mut ibv_context,
    attr: *mut ibv_td_init_attr,
) -> *mut ibv_td {
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        if unsafe { (*attr).comp_mask } != 0 {
            return Err(Errno::INVAL);
        }
        let td = Td { public: ibv_td { context }, users: AtomicU32::new(0) };
        Ok(Box::into_raw(Box::new(td)).cast())
    })
}

pub(crate) unsafe extern "C" fn dealloc_td(td: *mut ibv_td) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live thread domain of ours.
        if unsafe { &*td.cast::<Td>() }.users.load(Ordering::SeqCst) > 0 {
            return Err(Errno::BUSY);
        }
        // SAFETY: from `alloc_td`, and gone for C when this returns 0.
        drop(unsafe { Box::from_raw(td.cast::<Td>()) });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent_domain(pd: *mut ibv_pd, td: *mut ibv_td) -> *mut ibv_pd {
        let mut attr = ibv_parent_domain_init_attr {
            pd,
            td,
            comp_mask: 0,
            alloc: None,
            free: None,
            pd_context: ptr::null_mut(),
        };
        // SAFETY: live objects without a context, whose address is only compared.
        unsafe { alloc_parent_domain(ptr::null_mut(), &raw mut attr) }
    }

    #[test]
    fn a_parent_domain_is_its_pd_and_keeps_it() {
        let pd = object(ptr::null_mut(), 7, None);
        // SAFETY: objects made here, freed once.
        unsafe {
            let mut attr = ibv_td_init_attr { comp_mask: 0 };
            let td = alloc_td(ptr::null_mut(), &raw mut attr);
            let parent = parent_domain(pd, td);
            assert_eq!(Pd::of(parent).id, 7);
            assert!(Pd::of(parent).is_parent_domain() && !Pd::of(pd).is_parent_domain());
            assert!(parent_domain(parent, td).is_null(), "no parent domain of a parent domain");
            assert_eq!(dealloc_td(td), libc::EBUSY);
            assert_eq!(Pd::of(pd).users.load(Ordering::SeqCst), 1);
            drop(Box::from_raw(parent.cast::<Pd>()));
            td.cast::<Td>().as_ref().unwrap().users.fetch_sub(1, Ordering::SeqCst);
            assert_eq!(dealloc_td(td), 0);
            drop(Box::from_raw(pd.cast::<Pd>()));
        }
    }

    #[test]
    fn what_a_later_release_adds_is_refused() {
        let mut attr = ibv_td_init_attr { comp_mask: 1 };
        // SAFETY: the context is not looked at.
        assert!(unsafe { alloc_td(ptr::null_mut(), &raw mut attr) }.is_null());
    }
}
