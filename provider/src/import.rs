//! Importing: a further context of an opened device, and in it the PDs, MRs and device memory of the others.
//!
//! All contexts of one device are one client of the router. They are one process's: a client's memory and queues are
//! mapped where they are made, and no other process can have them. The async events are the client's, too: each is
//! read through one of the contexts.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use verbs_abi::ffi::{ibv_context, ibv_dm, ibv_mr, ibv_pd};
use verbs_abi::shm::mr_table::{MrTable, WINDOW};

use crate::abi::edge::{self, Errno};
use crate::dm::Pages;
use crate::pd::Pd;
use crate::{device, dm, mr, pd};

/// What can be imported by its handle. MRs are in the arena's table.
#[derive(Debug, Default)]
pub(crate) struct Importable {
    pds: Mutex<HashSet<u32>>,
    dms: Mutex<DeviceMemory>,
}

#[derive(Debug, Default)]
struct DeviceMemory {
    last: u32,
    pages: HashMap<u32, Weak<Pages>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Importable {
    /// The PDs, by the router's names for them.
    pub(crate) fn pds(&self) -> MutexGuard<'_, HashSet<u32>> {
        lock(&self.pds)
    }

    /// The handle of new device memory.
    pub(crate) fn enter_dm(&self, pages: &Arc<Pages>) -> u32 {
        let mut dms = lock(&self.dms);
        dms.last += 1;
        let handle = dms.last;
        dms.pages.insert(handle, Arc::downgrade(pages));
        handle
    }

    /// Device memory that was freed cannot be imported any more.
    pub(crate) fn forget_dm(&self, handle: u32) {
        lock(&self.dms).pages.remove(&handle);
    }

    fn dm(&self, handle: u32) -> Option<Arc<Pages>> {
        lock(&self.dms).pages.get(&handle)?.upgrade()
    }
}

pub(crate) unsafe extern "C" fn pd(context: *mut ibv_context, handle: u32) -> *mut ibv_pd {
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        device.health().check_owner()?;
        if device.importable.pds().contains(&handle) {
            Ok(pd::import(context, handle))
        } else {
            Err(Errno::NOENT)
        }
    })
}

pub(crate) unsafe extern "C" fn release_pd(pd: *mut ibv_pd) {
    // SAFETY: libibverbs passes what `pd` returned, once.
    edge::value((), || unsafe { Pd::of(pd).let_go() });
}

pub(crate) unsafe extern "C" fn mr(pd: *mut ibv_pd, handle: u32) -> *mut ibv_mr {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        device.health().check_owner()?;
        let table = MrTable::new(&device.arena).ok_or(Errno::NOMEM)?;
        let entry = table.lookup(handle).ok_or(Errno::NOENT)?;
        if entry.pd != own.id || entry.access & WINDOW != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above.
        Ok(unsafe { mr::import(pd, handle) })
    })
}

pub(crate) unsafe extern "C" fn release_mr(mr: *mut ibv_mr) {
    // SAFETY: libibverbs passes what `mr` returned, once.
    edge::value((), || unsafe { mr::release_import(mr) });
}

pub(crate) unsafe extern "C" fn dm(context: *mut ibv_context, handle: u32) -> *mut ibv_dm {
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        device.health().check_owner()?;
        let pages = device.importable.dm(handle).ok_or(Errno::NOENT)?;
        Ok(dm::import(context, handle, pages))
    })
}

pub(crate) unsafe extern "C" fn release_dm(dm: *mut ibv_dm) {
    // SAFETY: libibverbs passes what `dm` returned, once.
    edge::value((), || unsafe { dm::release_import(dm) });
}
