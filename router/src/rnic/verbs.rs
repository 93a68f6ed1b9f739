//! libibverbs, loaded when there is a device to look for: its objects as values that end with their last user.
//!
//! The public interface of libibverbs alone, by `dlopen`, so that the router runs where there is none. All of the
//! router's unsafe code about NICs is here. An object holds what it was made of, so nothing is used after its end.
//!
//! What the header makes of posting and polling are calls through the context's operations (`struct ibv_context_ops`
//! of `infiniband/verbs.h`).

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    io,
    mem::transmute,
    os::fd::{BorrowedFd, RawFd},
    ptr::{self, NonNull},
    sync::{Arc, OnceLock},
};

use verbs_abi::{
    ffi::{
        ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid, ibv_mr,
        ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_sge,
        ibv_wc,
    },
    shm::Window,
};

macro_rules! library {
    ($($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)+) => {
        /// Functions of libibverbs.
        struct Library { $($name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)+ }

        impl Library {
            fn of(handle: NonNull<c_void>) -> Result<Self, String> {
                Ok(Self { $($name: {
                    let name = concat!(stringify!($name), "\0");
                    // SAFETY: the handle is never closed and the name ends in a zero byte; the symbol is the function of
                    // that name, whose public declaration in `infiniband/verbs.h` is this one.
                    unsafe {
                        let symbol = libc::dlsym(handle.as_ptr(), name.as_ptr().cast());
                        if symbol.is_null() {
                            return Err(format!("libibverbs.so.1 has no {}", stringify!($name)));
                        }
                        transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(symbol)
                    }
                },)+ })
            }
        }
    };
}

library! {
    ibv_get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list: fn(*mut *mut ibv_device);
    ibv_open_device: fn(*mut ibv_device) -> *mut ibv_context;
    ibv_close_device: fn(*mut ibv_context) -> c_int;
    ibv_query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    ibv_query_port: fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    ibv_query_gid: fn(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
    ibv_alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd: fn(*mut ibv_pd) -> c_int;
    ibv_reg_mr_iova: fn(*mut ibv_pd, *mut c_void, usize, u64, c_int) -> *mut ibv_mr;
    ibv_dereg_mr: fn(*mut ibv_mr) -> c_int;
    ibv_create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
    ibv_create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    ibv_destroy_cq: fn(*mut ibv_cq) -> c_int;
    ibv_get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events: fn(*mut ibv_cq, u32);
    ibv_create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    ibv_destroy_qp: fn(*mut ibv_qp) -> c_int;
    ibv_get_async_event: fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ibv_ack_async_event: fn(*mut ibv_async_event);
}

/// The library, loaded once.
fn library() -> Result<&'static Library, String> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let load = || {
        // What makes programs see `ff0` must not make the router see it.
        for name in ["SYSFS_PATH", "RDMAV_DRIVERS", "IBV_DRIVERS"] {
            if std::env::var_os(name).is_some() {
                // SAFETY: the router looks for its NIC before it starts its threads.
                unsafe { std::env::remove_var(name) };
            }
        }
        // SAFETY: loading a library runs its constructors; libibverbs' own do nothing but set defaults.
        let handle = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let handle = NonNull::new(handle).ok_or("libibverbs.so.1 is not here; install libibverbs1")?;
        Library::of(handle)
    };
    LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// What `errno` says.
fn last_error() -> io::Error {
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(0) => io::Error::other("refused without a reason"),
        error => error,
    }
}

/// The outcome of a function that returns an errno.
fn outcome(errno: c_int) -> io::Result<()> {
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident($raw:ty) { $($field:ident: $type:ty),* } ends by $end:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) struct $name { raw: NonNull<$raw>, library: Api, $($field: $type,)* }

        // SAFETY: libibverbs' objects may be used from any thread, by several at once.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: the object lives, this is its only owner, and what was made of it is gone: it would hold this.
                unsafe { (self.library.0.$end)(self.raw.as_ptr()) };
            }
        }
    };
}

#[derive(Clone, Copy)]
struct Api(&'static Library);

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("libibverbs")
    }
}

handle! {
    /// An opened device.
    Context(ibv_context) {} ends by ibv_close_device
}
handle! {
    /// A protection domain.
    Pd(ibv_pd) { _context: Arc<Context> } ends by ibv_dealloc_pd
}
handle! {
    /// Registered memory, which stays mapped as long.
    Mr(ibv_mr) { _pd: Arc<Pd>, _window: Window } ends by ibv_dereg_mr
}
handle! {
    /// A completion channel.
    Channel(ibv_comp_channel) { _context: Arc<Context> } ends by ibv_destroy_comp_channel
}
handle! {
    /// A completion queue.
    Cq(ibv_cq) { _channel: Arc<Channel> } ends by ibv_destroy_cq
}
handle! {
    /// A queue pair.
    Qp(ibv_qp) { _pd: Arc<Pd>, _cq: Arc<Cq> } ends by ibv_destroy_qp
}

/// Names of the devices that there are, and each of them opened by `open` if it is wanted.
pub(super) fn devices<R>(
    mut look: impl FnMut(&str, &dyn Fn() -> io::Result<Context>) -> Option<R>,
) -> Result<Option<R>, String> {
    let library = library()?;
    let mut count = 0;
    // SAFETY: the list is ended by a null pointer and lives until it is freed below.
    let list = unsafe { (library.ibv_get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(format!("libibverbs lists no devices: {}", last_error()));
    }
    let mut found = None;
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: `at` is below the count of the list; the entries live as long as it.
        let (device, name) = unsafe {
            let device = *list.add(at);
            (device, CStr::from_ptr((*device).name.as_ptr().cast::<c_char>()).to_string_lossy().into_owned())
        };
        let open = || {
            // SAFETY: the device is of the list, which is not freed yet.
            let raw = NonNull::new(unsafe { (library.ibv_open_device)(device) }).ok_or_else(last_error)?;
            Ok(Context { raw, library: Api(library) })
        };
        found = look(&name, &open);
        if found.is_some() {
            break;
        }
    }
    // SAFETY: the list is not used any more; opened devices stay.
    unsafe { (library.ibv_free_device_list)(list) };
    Ok(found)
}

impl Context {
    /// What the device can do.
    pub(super) fn attributes(&self) -> io::Result<ibv_device_attr> {
        let mut attr = ibv_device_attr::default();
        // SAFETY: the context lives, and `attr` is the structure that is filled.
        outcome(unsafe { (self.library.0.ibv_query_device)(self.raw.as_ptr(), &raw mut attr) })?;
        Ok(attr)
    }

    /// How a port is.
    pub(super) fn port(&self, port: u8) -> io::Result<ibv_port_attr> {
        let mut attr = ibv_port_attr::default();
        // SAFETY: as above; the function fills a beginning of this structure (`struct _compat_ibv_port_attr`).
        outcome(unsafe { (self.library.0.ibv_query_port)(self.raw.as_ptr(), port, &raw mut attr) })?;
        Ok(attr)
    }

    /// An address of a port.
    pub(super) fn gid(&self, port: u8, index: u8) -> io::Result<[u8; 16]> {
        let mut gid = ibv_gid { raw: [0; 16] };
        // SAFETY: as above; the bytes of the union are valid whichever field was written.
        unsafe {
            let failed = (self.library.0.ibv_query_gid)(self.raw.as_ptr(), port, index.into(), &raw mut gid);
            if failed != 0 { Err(last_error()) } else { Ok(gid.raw) }
        }
    }

    /// Whether it speaks InfiniBand's verbs, and not those of iWARP.
    pub(super) fn is_infiniband(&self) -> bool {
        // SAFETY: the context lives, and its device with it.
        unsafe { (*(*self.raw.as_ptr()).device).transport_type == verbs_abi::ffi::IBV_TRANSPORT_IB }
    }

    /// The name of its character device.
    pub(super) fn node(&self) -> String {
        // SAFETY: as above; the name ends in a zero byte.
        unsafe {
            let device = (*self.raw.as_ptr()).device;
            CStr::from_ptr((*device).dev_name.as_ptr().cast::<c_char>()).to_string_lossy().into_owned()
        }
    }

    /// A descriptor that is readable when [`Self::event`] has something.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the context's, and open as long as it.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).async_fd as RawFd) }
    }

    /// What has happened to the device, a port or a QP: its kind and, of a QP, which (to be compared alone).
    pub(super) fn event(&self) -> Option<(u32, *const c_void)> {
        let mut event = ibv_async_event::default();
        // SAFETY: the context lives; an event that was got is given back at once.
        unsafe {
            if (self.library.0.ibv_get_async_event)(self.raw.as_ptr(), &raw mut event) != 0 {
                return None;
            }
            let told = (event.event_type, event.element.qp.cast_const().cast());
            (self.library.0.ibv_ack_async_event)(&raw mut event);
            Some(told)
        }
    }
}

impl Pd {
    pub(super) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context lives.
        let raw = unsafe { (context.library.0.ibv_alloc_pd)(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(last_error)?;
        Ok(Arc::new(Self { raw, library: context.library, _context: Arc::clone(context) }))
    }
}

impl Mr {
    /// Registers a window, whose first byte the NIC knows as `iova`.
    pub(super) fn new(pd: &Arc<Pd>, window: Window, iova: u64, access: u32) -> io::Result<Self> {
        let (start, len) = (window.as_ptr().cast(), window.len());
        // SAFETY: the window is mapped for its length, and stays so as long as the registration, which holds it.
        let raw =
            unsafe { (pd.library.0.ibv_reg_mr_iova)(pd.raw.as_ptr(), start, len, iova, access as c_int) };
        let raw = NonNull::new(raw).ok_or_else(last_error)?;
        Ok(Self { raw, library: pd.library, _pd: Arc::clone(pd), _window: window })
    }

    /// The local and the remote key.
    pub(super) fn keys(&self) -> (u32, u32) {
        // SAFETY: the registration lives, and its keys never change.
        unsafe { ((*self.raw.as_ptr()).lkey, (*self.raw.as_ptr()).rkey) }
    }
}

impl Channel {
    pub(super) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context lives.
        let raw = unsafe { (context.library.0.ibv_create_comp_channel)(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(last_error)?;
        Ok(Arc::new(Self { raw, library: context.library, _context: Arc::clone(context) }))
    }

    /// A descriptor that is readable when [`Self::take`] has something.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, and open as long as it.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }

    /// Takes an event. False: there was none.
    pub(super) fn take(&self) -> bool {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel lives; the CQ of an event that was got lives until the event is given back.
        unsafe {
            if (self.library.0.ibv_get_cq_event)(self.raw.as_ptr(), &raw mut cq, &raw mut context) != 0 {
                return false;
            }
            (self.library.0.ibv_ack_cq_events)(cq, 1);
        }
        true
    }
}

impl Cq {
    pub(super) fn new(context: &Arc<Context>, channel: &Arc<Channel>, entries: u32) -> io::Result<Arc<Self>> {
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: context and channel live, and the CQ holds the channel, which holds the context.
        let raw = unsafe {
            let (context, channel_raw) = (context.raw.as_ptr(), channel.raw.as_ptr());
            (channel.library.0.ibv_create_cq)(context, entries, ptr::null_mut(), channel_raw, 0)
        };
        let raw = NonNull::new(raw).ok_or_else(last_error)?;
        Ok(Arc::new(Self { raw, library: channel.library, _channel: Arc::clone(channel) }))
    }

    /// Takes completions; says how many.
    pub(super) fn poll(&self, into: &mut [ibv_wc]) -> io::Result<usize> {
        let most = c_int::try_from(into.len()).unwrap_or(c_int::MAX);
        // SAFETY: the CQ lives, and there is room for `most` completions.
        let count = unsafe {
            let poll = (*(*self.raw.as_ptr()).context).ops.poll_cq.ok_or(io::ErrorKind::Unsupported)?;
            poll(self.raw.as_ptr(), most, into.as_mut_ptr())
        };
        usize::try_from(count).map_err(|_| io::Error::other("the completion queue is broken"))
    }

    /// Asks for an event when the next completion comes.
    pub(super) fn arm(&self) -> io::Result<()> {
        // SAFETY: the CQ lives.
        outcome(unsafe {
            let arm = (*(*self.raw.as_ptr()).context).ops.req_notify_cq.ok_or(io::ErrorKind::Unsupported)?;
            arm(self.raw.as_ptr(), 0)
        })
    }
}

impl Qp {
    /// A QP whose completions go to `cq`; `init` says the rest.
    pub(super) fn new(pd: &Arc<Pd>, cq: &Arc<Cq>, mut init: ibv_qp_init_attr) -> io::Result<Arc<Self>> {
        (init.send_cq, init.recv_cq) = (cq.raw.as_ptr(), cq.raw.as_ptr());
        // SAFETY: PD and CQ live, and the QP holds them; `init` is a structure of this process.
        let raw = unsafe { (pd.library.0.ibv_create_qp)(pd.raw.as_ptr(), &raw mut init) };
        let raw = NonNull::new(raw).ok_or_else(last_error)?;
        Ok(Arc::new(Self { raw, library: pd.library, _pd: Arc::clone(pd), _cq: Arc::clone(cq) }))
    }

    /// Its number.
    pub(super) fn number(&self) -> u32 {
        // SAFETY: the QP lives, and its number never changes.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// Whether [`Context::event`] told of it.
    pub(super) fn is(&self, told: *const c_void) -> bool {
        ptr::addr_eq(self.raw.as_ptr(), told)
    }

    /// Changes its state.
    pub(super) fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> io::Result<()> {
        // SAFETY: the QP lives, and `attr` is a structure of this process.
        outcome(unsafe { (self.library.0.ibv_modify_qp)(self.raw.as_ptr(), attr, mask as c_int) })
    }

    /// Posts to its send queue; `sges` are the list of `wr`.
    pub(super) fn post_send(&self, mut wr: ibv_send_wr, sges: &mut [ibv_sge]) -> io::Result<()> {
        (wr.sg_list, wr.num_sge, wr.next) = (sges.as_mut_ptr(), sges.len() as c_int, ptr::null_mut());
        let mut bad = ptr::null_mut();
        // SAFETY: the QP lives; the work request and its list are copied before the call returns.
        outcome(unsafe {
            let post = (*(*self.raw.as_ptr()).context).ops.post_send.ok_or(io::ErrorKind::Unsupported)?;
            post(self.raw.as_ptr(), &raw mut wr, &raw mut bad)
        })
    }

    /// Posts to its receive queue.
    pub(super) fn post_receive(&self, wr_id: u64, sges: &mut [ibv_sge]) -> io::Result<()> {
        let mut wr = ibv_recv_wr { wr_id, ..ibv_recv_wr::default() };
        (wr.sg_list, wr.num_sge) = (sges.as_mut_ptr(), sges.len() as c_int);
        let mut bad = ptr::null_mut();
        // SAFETY: as above.
        outcome(unsafe {
            let post = (*(*self.raw.as_ptr()).context).ops.post_recv.ok_or(io::ErrorKind::Unsupported)?;
            post(self.raw.as_ptr(), &raw mut wr, &raw mut bad)
        })
    }
}

/// The immediate data of a completion that has some, as the wire carries it.
pub(super) fn immediate(wc: &ibv_wc) -> Option<u32> {
    // SAFETY: both fields of the union are words of 32 bits, valid with any content.
    let word = unsafe { wc.__bindgen_anon_1.imm_data };
    (wc.wc_flags & verbs_abi::ffi::IBV_WC_WITH_IMM != 0).then_some(word)
}
