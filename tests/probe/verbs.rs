//! Verbs objects that end when they are dropped, parents after children.
//!
//! Does: the calls, errno and pointers to Rust. Leaves to others: which calls make sense.

use std::{
    error::Error,
    ffi::{CStr, c_int},
    fmt, io,
    mem::offset_of,
    ptr::{self, NonNull},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{cq::Wc, library::library};

/// The errno that a verb ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno {
    pub(crate) verb: &'static str,
    pub(crate) code: i32,
}

impl fmt::Display for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.verb, io::Error::from_raw_os_error(self.code))
    }
}

impl Error for Errno {}

pub(crate) fn check(verb: &'static str, code: c_int) -> Result<(), Errno> {
    if code == 0 { Ok(()) } else { Err(Errno { verb, code: if code < 0 { last_errno() } else { code } }) }
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub(crate) fn pointer<T>(verb: &'static str, raw: *mut T) -> Result<NonNull<T>, Errno> {
    NonNull::new(raw).ok_or_else(|| Errno { verb, code: last_errno() })
}

/// Waits until a descriptor is readable.
pub(crate) fn readable(fd: c_int, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive during the call.
    unsafe { libc::poll(&mut poll, 1, timeout.as_millis() as c_int) > 0 }
}

/// The device under test.
const OURS: &CStr = c"ff0";

/// Visits a device while the list of devices is there.
fn with_device<R>(name: &CStr, visit: impl FnOnce(*mut ibv_device) -> R) -> Result<R> {
    let mut count = 0;
    // SAFETY: the count is ours; the list is freed below, after its last use.
    let list = unsafe { (library().ibv_get_device_list)(&mut count) };
    ensure!(!list.is_null(), "ibv_get_device_list: {}", io::Error::last_os_error());
    let found = (0..count as usize).find_map(|at| {
        // SAFETY: the list has `count` entries, each a live device with a name that is a C string.
        unsafe {
            let device = *list.add(at);
            (CStr::from_ptr((*device).name.as_ptr()) == name).then_some(device)
        }
    });
    let result = found.map(visit);
    // SAFETY: the list is not used after this.
    unsafe { (library().ibv_free_device_list)(list) };
    result.with_context(|| format!("there is no device {name:?}: run this by `freeflow run`"))
}

/// Lets libibverbs find its devices, as a program does that opens one only after a fork.
pub(crate) fn find_device() -> Result<()> {
    with_device(OURS, |_| ())
}

/// An opened device.
#[derive(Debug)]
pub(crate) struct Context {
    raw: NonNull<ibv_context>,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens ff0.
    pub(crate) fn open() -> Result<Arc<Self>> {
        Self::open_named(OURS)
    }

    /// Opens a device.
    pub(crate) fn open_named(name: &CStr) -> Result<Arc<Self>> {
        let raw = with_device(name, |device| {
            // SAFETY: the device is in a list that is not freed yet.
            pointer("ibv_open_device", unsafe { (library().ibv_open_device)(device) })
        })??;
        Ok(Arc::new(Self { raw }))
    }

    /// A further context of the same device, by a copy of its command descriptor.
    pub(crate) fn import(&self) -> Result<Arc<Self>, Errno> {
        // SAFETY: the context is alive; the copy is the new context's from then on.
        let raw = unsafe { (library().ibv_import_device)(libc::dup(self.raw.as_ref().cmd_fd)) };
        Ok(Arc::new(Self { raw: pointer("ibv_import_device", raw)? }))
    }

    pub(crate) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    pub(crate) fn async_fd(&self) -> c_int {
        // SAFETY: the context is alive.
        unsafe { self.raw.as_ref() }.async_fd
    }

    pub(crate) fn device_attr(&self) -> Result<ibv_device_attr, Errno> {
        let mut attr = ibv_device_attr::default();
        // SAFETY: the context is alive, the attributes are ours.
        check("ibv_query_device", unsafe { (library().ibv_query_device)(self.raw(), &mut attr) })?;
        Ok(attr)
    }

    /// The context with the verbs that are called through it alone.
    pub(crate) fn extended(&self) -> Result<*const verbs_context> {
        // SAFETY: libibverbs embeds each context in a verbs_context, and says so by abi_compat; the layout up to
        // query_port, and from its end backwards, is that of all releases since 25.
        unsafe {
            ensure!((*self.raw()).abi_compat as isize == -1, "a context without extended verbs");
            Ok(self.raw().byte_sub(offset_of!(verbs_context, context)).cast::<verbs_context>())
        }
    }

    /// The same, where it is known to be one.
    pub(crate) fn verbs(&self) -> *const verbs_context {
        self.extended().expect("libibverbs has had extended contexts for long")
    }

    pub(crate) fn device_attr_ex(&self) -> Result<ibv_device_attr_ex> {
        let mut attr = ibv_device_attr_ex::default();
        // SAFETY: the context is alive, and an extended one.
        let query = unsafe { (*self.extended()?).query_device_ex }.context("no query_device_ex")?;
        // SAFETY: as above; the attributes are ours and as long as said.
        let code = unsafe { query(self.raw(), ptr::null(), &mut attr, size_of::<ibv_device_attr_ex>()) };
        check("ibv_query_device_ex", code)?;
        Ok(attr)
    }

    /// The device's clock now, ticks.
    pub(crate) fn clock(&self) -> Result<u64> {
        let mut values = ibv_values_ex { comp_mask: IBV_VALUES_MASK_RAW_CLOCK, ..ibv_values_ex::default() };
        // SAFETY: the context is alive, and an extended one.
        let query = unsafe { (*self.extended()?).query_rt_values }.context("no query_rt_values")?;
        // SAFETY: as above; the values are ours.
        check("ibv_query_rt_values_ex", unsafe { query(self.raw(), &mut values) })?;
        Ok(values.raw_clock.tv_sec as u64 * 1_000_000_000 + values.raw_clock.tv_nsec as u64)
    }

    pub(crate) fn port_attr(&self) -> Result<ibv_port_attr> {
        let mut attr = ibv_port_attr::default();
        // SAFETY: the context is alive, and an extended one.
        let query = unsafe { (*self.extended()?).query_port }.context("no query_port")?;
        // SAFETY: the context is alive, the attributes are ours and as long as said.
        let code = unsafe { query(self.raw(), 1, &mut attr, size_of::<ibv_port_attr>()) };
        check("ibv_query_port", code)?;
        Ok(attr)
    }

    pub(crate) fn gid(&self, index: c_int) -> Result<[u8; 16], Errno> {
        let mut gid = ibv_gid::default();
        // SAFETY: the context is alive, the GID is ours.
        check("ibv_query_gid", unsafe { (library().ibv_query_gid)(self.raw(), 1, index, &mut gid) })?;
        // SAFETY: any bytes are a raw GID.
        Ok(unsafe { gid.raw })
    }

    pub(crate) fn gid_entry(&self, index: u32) -> Result<ibv_gid_entry, Errno> {
        let mut entry = ibv_gid_entry::default();
        let size = size_of::<ibv_gid_entry>();
        // SAFETY: the context is alive, the entry is ours and as long as said.
        let code = unsafe { (library()._ibv_query_gid_ex)(self.raw(), 1, index, &mut entry, 0, size) };
        check("ibv_query_gid_ex", code)?;
        Ok(entry)
    }

    pub(crate) fn gid_table(&self) -> Result<Vec<ibv_gid_entry>> {
        let mut entries = [ibv_gid_entry::default(); 64];
        let size = size_of::<ibv_gid_entry>();
        // SAFETY: the context is alive, the table is ours and as long as said.
        let count = unsafe {
            (library()._ibv_query_gid_table)(self.raw(), entries.as_mut_ptr(), entries.len(), 0, size)
        };
        ensure!(count >= 0, "ibv_query_gid_table: {}", io::Error::from_raw_os_error(-count as i32));
        Ok(entries[..count as usize].to_vec())
    }

    /// Takes the next async event and acknowledges it; none in time: `None`.
    pub(crate) fn async_event(&self, timeout: Duration) -> Result<Option<AsyncEvent>> {
        if !readable(self.async_fd(), timeout) {
            return Ok(None);
        }
        Ok(Some(self.try_async_event()?))
    }

    /// Blocks for an async event that is acknowledged when it is dropped.
    pub(crate) fn take_async_event(&self) -> Result<Unacknowledged, Errno> {
        let mut event = ibv_async_event::default();
        // SAFETY: the context is alive, the event is ours.
        check("ibv_get_async_event", unsafe { (library().ibv_get_async_event)(self.raw(), &mut event) })?;
        Ok(Unacknowledged(event))
    }

    /// Takes the next async event and acknowledges it, blocking as its descriptor does.
    pub(crate) fn try_async_event(&self) -> Result<AsyncEvent, Errno> {
        let mut event = ibv_async_event::default();
        // SAFETY: the context is alive, the event is ours.
        check("ibv_get_async_event", unsafe { (library().ibv_get_async_event)(self.raw(), &mut event) })?;
        // SAFETY: every member of the union is as wide as a pointer or narrower, and the event began as zeros.
        let element = unsafe { event.element.qp } as usize;
        // SAFETY: the event came from ibv_get_async_event and is acknowledged once.
        unsafe { (library().ibv_ack_async_event)(&mut event) };
        Ok(AsyncEvent { kind: event.event_type, element })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: all children are gone: each holds a reference.
        unsafe { (library().ibv_close_device)(self.raw()) };
    }
}

/// An async event that is not yet acknowledged.
pub(crate) struct Unacknowledged(ibv_async_event);

impl Unacknowledged {
    pub(crate) fn kind(&self) -> ibv_event_type {
        self.0.event_type
    }
}

impl Drop for Unacknowledged {
    fn drop(&mut self) {
        // SAFETY: the event came from ibv_get_async_event and is acknowledged once; its object waits for that.
        unsafe { (library().ibv_ack_async_event)(&mut self.0) };
    }
}

/// An async event: its kind and the address of the object it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AsyncEvent {
    pub(crate) kind: ibv_event_type,
    pub(crate) element: usize,
}

/// A protection domain.
#[derive(Debug)]
pub(crate) struct Pd {
    raw: NonNull<ibv_pd>,
    context: Arc<Context>,
    is_imported: bool,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        // SAFETY: the context is alive.
        let raw = pointer("ibv_alloc_pd", unsafe { (library().ibv_alloc_pd)(context.raw()) })?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context), is_imported: false }))
    }

    /// A PD of another context of the same device.
    pub(crate) fn import(context: &Arc<Context>, handle: u32) -> Result<Arc<Self>, Errno> {
        // SAFETY: the context is alive.
        let raw = pointer("ibv_import_pd", unsafe { (library().ibv_import_pd)(context.raw(), handle) })?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context), is_imported: true }))
    }

    /// By which another context finds it.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the PD is alive.
        unsafe { self.raw.as_ref() }.handle
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    /// Tries to end a PD that is in use.
    pub(crate) fn try_dealloc(&self) -> Result<(), Errno> {
        // SAFETY: the PD is alive; where the call succeeds the test has failed and uses it no more.
        check("ibv_dealloc_pd", unsafe { (library().ibv_dealloc_pd)(self.raw.as_ptr()) })
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: all children are gone: each holds a reference.
        unsafe {
            if self.is_imported {
                (library().ibv_unimport_pd)(self.raw.as_ptr());
            } else {
                (library().ibv_dealloc_pd)(self.raw.as_ptr());
            }
        }
    }
}

/// A registered memory region. Its memory must outlive it, which is the caller's business.
#[derive(Debug)]
pub(crate) struct Mr {
    raw: NonNull<ibv_mr>,
    _pd: Arc<Pd>,
    is_imported: bool,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

/// All rights.
pub(crate) const ALL_ACCESS: u32 =
    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;

impl Mr {
    pub(crate) fn new(pd: &Arc<Pd>, addr: usize, len: usize, access: u32) -> Result<Self, Errno> {
        let start = ptr::without_provenance_mut(addr);
        // SAFETY: the PD is alive; the range is checked by the callee.
        let raw = unsafe { (library().ibv_reg_mr)(pd.raw.as_ptr(), start, len, access as c_int) };
        Ok(Self { raw: pointer("ibv_reg_mr", raw)?, _pd: Arc::clone(pd), is_imported: false })
    }

    /// An MR whose first address its keys' users name so.
    pub(crate) fn with_iova(
        pd: &Arc<Pd>,
        addr: usize,
        len: usize,
        iova: u64,
        access: u32,
    ) -> Result<Self, Errno> {
        let start = ptr::without_provenance_mut(addr);
        // SAFETY: the PD is alive; the range is checked by the callee.
        let raw = unsafe { (library().ibv_reg_mr_iova)(pd.raw.as_ptr(), start, len, iova, access as c_int) };
        Ok(Self { raw: pointer("ibv_reg_mr_iova", raw)?, _pd: Arc::clone(pd), is_imported: false })
    }

    /// An MR without memory.
    pub(crate) fn null(pd: &Arc<Pd>) -> Result<Self, Errno> {
        // SAFETY: the context is alive.
        let alloc = unsafe { (*pd.context.verbs()).alloc_null_mr }.expect("a provider allocates null MRs");
        // SAFETY: the PD is alive.
        let raw = pointer("ibv_alloc_null_mr", unsafe { alloc(pd.raw.as_ptr()) })?;
        Ok(Self { raw, _pd: Arc::clone(pd), is_imported: false })
    }

    /// An MR over a part of a dma-buf.
    pub(crate) fn of_dma_buf(
        pd: &Arc<Pd>,
        offset: u64,
        len: usize,
        iova: u64,
        fd: c_int,
        access: u32,
    ) -> Result<Self, Errno> {
        // SAFETY: the PD is alive; the rest is checked by the callee.
        let raw =
            unsafe { (library().ibv_reg_dmabuf_mr)(pd.raw.as_ptr(), offset, len, iova, fd, access as c_int) };
        Ok(Self { raw: pointer("ibv_reg_dmabuf_mr", raw)?, _pd: Arc::clone(pd), is_imported: false })
    }

    /// An MR of another context of the same device.
    pub(crate) fn import(pd: &Arc<Pd>, handle: u32) -> Result<Self, Errno> {
        // SAFETY: the PD is alive.
        let raw = pointer("ibv_import_mr", unsafe { (library().ibv_import_mr)(pd.raw.as_ptr(), handle) })?;
        Ok(Self { raw, _pd: Arc::clone(pd), is_imported: true })
    }

    /// By which another context finds it.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the MR is alive.
        unsafe { self.raw.as_ref() }.handle
    }

    pub(crate) fn raw(&self) -> *mut ibv_mr {
        self.raw.as_ptr()
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: the MR is alive.
        unsafe { self.raw.as_ref() }.lkey
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: the MR is alive.
        unsafe { self.raw.as_ref() }.rkey
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        if self.is_imported {
            // SAFETY: the import is undone once, here.
            return unsafe { (library().ibv_unimport_mr)(self.raw.as_ptr()) };
        }
        // SAFETY: the MR is deregistered once, here.
        let code = unsafe { (library().ibv_dereg_mr)(self.raw.as_ptr()) };
        if code != 0 {
            eprintln!("ibv_dereg_mr: {}", io::Error::from_raw_os_error(code));
        }
    }
}

/// An address handle.
#[derive(Debug)]
pub(crate) struct Ah {
    raw: NonNull<ibv_ah>,
    _pd: Arc<Pd>,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Ah {}
// SAFETY: as above.
unsafe impl Sync for Ah {}

impl Ah {
    pub(crate) fn new(pd: &Arc<Pd>, attr: &ibv_ah_attr) -> Result<Self, Errno> {
        let mut attr = *attr;
        // SAFETY: the PD is alive, the attributes are ours.
        let raw = pointer("ibv_create_ah", unsafe { (library().ibv_create_ah)(pd.raw.as_ptr(), &mut attr) })?;
        Ok(Self { raw, _pd: Arc::clone(pd) })
    }

    /// The attributes by which a datagram can be answered; `grh` are the first 40 bytes of its receive buffer.
    pub(crate) fn attr_of_sender(context: &Context, wc: &Wc, grh: &[u8]) -> Result<ibv_ah_attr> {
        ensure!(grh.len() >= size_of::<ibv_grh>(), "a GRH has 40 bytes");
        let mut attr = ibv_ah_attr::default();
        let mut raw = ibv_wc { src_qp: wc.src_qp, wc_flags: wc.flags, ..ibv_wc::default() };
        // SAFETY: at least 40 bytes, by the check above; the structure is plain bytes.
        let mut grh = unsafe { ptr::read_unaligned(grh.as_ptr().cast::<ibv_grh>()) };
        // SAFETY: the context is alive, everything else is ours.
        let code =
            unsafe { (library().ibv_init_ah_from_wc)(context.raw(), 1, &mut raw, &mut grh, &mut attr) };
        check("ibv_init_ah_from_wc", code)?;
        Ok(attr)
    }

    pub(crate) fn raw(&self) -> *mut ibv_ah {
        self.raw.as_ptr()
    }
}

impl Drop for Ah {
    fn drop(&mut self) {
        // SAFETY: the AH is destroyed once, here.
        unsafe { (library().ibv_destroy_ah)(self.raw.as_ptr()) };
    }
}
