//! librdmacm as a C program uses it: event channels, ids, events.
//!
//! Found when the program runs, as libibverbs is. Ids and channels end in the order in which librdmacm wants it.

use std::{
    ffi::{CStr, c_int, c_void},
    io,
    net::SocketAddrV4,
    ptr,
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use verbs_abi::ffi::ibv_qp_attr;

use crate::{cancel::Wait, tcp::sockaddr};

/// `RDMA_PS_TCP`.
pub(crate) const TCP: c_int = 0x0106;
const NAME: &CStr = c"librdmacm.so.1";

/// `enum rdma_cm_event_type`.
pub(crate) mod kind {
    pub(crate) const ADDR_RESOLVED: u32 = 0;
    pub(crate) const ROUTE_RESOLVED: u32 = 2;
    pub(crate) const CONNECT_REQUEST: u32 = 4;
    pub(crate) const CONNECT_RESPONSE: u32 = 5;
    pub(crate) const REJECTED: u32 = 8;
    pub(crate) const ESTABLISHED: u32 = 9;
    pub(crate) const DISCONNECTED: u32 = 10;
    pub(crate) const DEVICE_REMOVAL: u32 = 11;
}

/// `struct rdma_event_channel`.
#[repr(C)]
struct RawChannel {
    fd: c_int,
}

/// `struct rdma_conn_param`, and the head of an event's parameters.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ConnParam {
    private_data: *const u8,
    private_data_len: u8,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
    flow_control: u8,
    pub(crate) retry_count: u8,
    rnr_retry_count: u8,
    srq: u8,
    pub(crate) qp_num: u32,
}

impl ConnParam {
    /// Parameters with these private data, which must live as long.
    pub(crate) fn new(data: &'static [u8], qp_num: u32) -> ConnParam {
        ConnParam {
            private_data: data.as_ptr(),
            private_data_len: data.len() as u8,
            responder_resources: 3,
            initiator_depth: 2,
            flow_control: 0,
            retry_count: 7,
            rnr_retry_count: 7,
            srq: 0,
            qp_num,
        }
    }
}

/// `struct rdma_cm_event`, up to the parameters of a connection.
#[repr(C)]
struct RawEvent {
    id: *mut c_void,
    listen_id: *mut c_void,
    event: u32,
    status: c_int,
    conn: ConnParam,
}

macro_rules! library {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)+) => {
        struct Library {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)+
        }

        fn find(symbol: impl Fn(&'static CStr) -> Result<*mut c_void>) -> Result<Library> {
            Ok(Library {
                $($name: {
                    let name = CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes())?;
                    // SAFETY: the function of this name in librdmacm's stable interface has this type.
                    unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(
                            symbol(name)?,
                        )
                    }
                },)+
            })
        }
    };
}

library! {
    rdma_create_event_channel: fn() -> *mut RawChannel;
    rdma_destroy_event_channel: fn(*mut RawChannel) -> c_int;
    rdma_create_id: fn(*mut RawChannel, *mut *mut c_void, *mut c_void, c_int) -> c_int;
    rdma_destroy_id: fn(*mut c_void) -> c_int;
    rdma_bind_addr: fn(*mut c_void, *mut libc::sockaddr_in) -> c_int;
    rdma_resolve_addr: fn(*mut c_void, *mut c_void, *mut libc::sockaddr_in, c_int) -> c_int;
    rdma_resolve_route: fn(*mut c_void, c_int) -> c_int;
    rdma_connect: fn(*mut c_void, *mut ConnParam) -> c_int;
    rdma_establish: fn(*mut c_void) -> c_int;
    rdma_listen: fn(*mut c_void, c_int) -> c_int;
    rdma_accept: fn(*mut c_void, *mut ConnParam) -> c_int;
    rdma_reject: fn(*mut c_void, *const u8, u8) -> c_int;
    rdma_disconnect: fn(*mut c_void) -> c_int;
    rdma_get_cm_event: fn(*mut RawChannel, *mut *mut RawEvent) -> c_int;
    rdma_ack_cm_event: fn(*mut RawEvent) -> c_int;
    rdma_migrate_id: fn(*mut c_void, *mut RawChannel) -> c_int;
    rdma_set_option: fn(*mut c_void, c_int, c_int, *mut c_void, usize) -> c_int;
    rdma_init_qp_attr: fn(*mut c_void, *mut ibv_qp_attr, *mut c_int) -> c_int;
    rdma_get_src_port: fn(*mut c_void) -> u16;
}

fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    // SAFETY: librdmacm may be loaded at any time; its constructors ask for nothing.
    let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        bail!(crate::checks::Skip("librdmacm1 is not installed".to_owned()));
    }
    let library = find(|name| {
        // SAFETY: the handle is that of a loaded library, the name a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        if symbol.is_null() { Err(anyhow!("librdmacm lacks {name:?}")) } else { Ok(symbol) }
    })?;
    Ok(LIBRARY.get_or_init(|| library))
}

/// 0, or the errno as an error.
fn done(what: &str, result: c_int) -> Result<()> {
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).with_context(|| format!("{what} returned {result}"))
}

/// The errno of a failed call.
pub(crate) fn errno<T>(result: &Result<T>) -> Option<i32> {
    result.as_ref().err()?.downcast_ref::<io::Error>()?.raw_os_error()
}

/// An event channel.
pub(crate) struct Channel(*mut RawChannel);

// SAFETY: librdmacm's functions on a channel may be called from any thread.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub(crate) fn new() -> Result<Channel> {
        // SAFETY: no preconditions.
        let raw = unsafe { (library()?.rdma_create_event_channel)() };
        if raw.is_null() {
            return Err(io::Error::last_os_error()).context("rdma_create_event_channel");
        }
        Ok(Channel(raw))
    }

    pub(crate) fn fd(&self) -> c_int {
        // SAFETY: the channel lives.
        unsafe { (*self.0).fd }
    }

    pub(crate) fn set_nonblocking(&self) -> Result<()> {
        // SAFETY: a flag of the channel's descriptor.
        done("fcntl", unsafe { libc::fcntl(self.fd(), libc::F_SETFL, libc::O_NONBLOCK) })
    }

    /// Whether there is something to read within a time.
    pub(crate) fn is_readable(&self, within: Duration) -> bool {
        let mut polled = libc::pollfd { fd: self.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live entry.
        unsafe { libc::poll(&raw mut polled, 1, within.as_millis() as c_int) == 1 }
    }

    /// What a thread that waits for an event is in.
    pub(crate) fn wait(&self) -> Result<Wait> {
        let function = library()?.rdma_get_cm_event;
        // SAFETY: a pointer for a pointer; a third argument goes into a register that the function does not read.
        Ok(Wait { function: unsafe { std::mem::transmute_copy(&function) }, channel: self.0.cast() })
    }

    /// The next event, acknowledged; waits unless the channel does not block.
    pub(crate) fn event(&self) -> Result<Event> {
        let event = self.unacknowledged()?;
        event.acknowledge()?;
        Ok(event)
    }

    pub(crate) fn unacknowledged(&self) -> Result<Event> {
        let mut raw = ptr::null_mut();
        // SAFETY: a live channel, a live place for the event.
        done("rdma_get_cm_event", unsafe { (library()?.rdma_get_cm_event)(self.0, &raw mut raw) })?;
        // SAFETY: librdmacm has stored an event, which lives until it is acknowledged.
        let event = unsafe { &*raw };
        let data = if event.conn.private_data.is_null() || event.conn.private_data_len == 0 {
            Vec::new()
        } else {
            let len = usize::from(event.conn.private_data_len);
            // SAFETY: that many bytes of the event.
            unsafe { std::slice::from_raw_parts(event.conn.private_data, len) }.to_vec()
        };
        Ok(Event { raw, id: event.id, kind: event.event, status: event.status, conn: event.conn, data })
    }

    /// The next event, which must come soon and be of this kind.
    pub(crate) fn expect(&self, kind: u32) -> Result<Event> {
        ensure!(self.is_readable(Duration::from_secs(10)), "no event {kind} came");
        let event = self.event()?;
        ensure!(event.kind == kind, "event {} with status {} in place of {kind}", event.kind, event.status);
        Ok(event)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Ok(library) = library() {
            // SAFETY: made by librdmacm, ended once; its ids were ended before.
            unsafe { (library.rdma_destroy_event_channel)(self.0) };
        }
    }
}

/// An event.
pub(crate) struct Event {
    raw: *mut RawEvent,
    id: *mut c_void,
    pub(crate) kind: u32,
    pub(crate) status: c_int,
    pub(crate) conn: ConnParam,
    pub(crate) data: Vec<u8>,
}

impl Event {
    pub(crate) fn acknowledge(&self) -> Result<()> {
        // SAFETY: an event of librdmacm that is acknowledged once.
        done("rdma_ack_cm_event", unsafe { (library()?.rdma_ack_cm_event)(self.raw) })
    }

    /// The new id of a request.
    pub(crate) fn take_id(&self) -> Id {
        Id(self.id)
    }

    pub(crate) fn is_of(&self, id: &Id) -> bool {
        ptr::eq(self.id, id.0)
    }
}

/// An id.
pub(crate) struct Id(*mut c_void);

// SAFETY: librdmacm's functions on an id may be called from any thread.
unsafe impl Send for Id {}

impl Id {
    pub(crate) fn new(channel: &Channel) -> Result<Id> {
        let mut raw = ptr::null_mut();
        // SAFETY: a live channel, a live place for the id.
        let result = unsafe { (library()?.rdma_create_id)(channel.0, &raw mut raw, ptr::null_mut(), TCP) };
        done("rdma_create_id", result)?;
        Ok(Id(raw))
    }

    pub(crate) fn bind(&self, address: SocketAddrV4) -> Result<()> {
        let mut address = sockaddr(address);
        // SAFETY: a live id, a live address.
        done("rdma_bind_addr", unsafe { (library()?.rdma_bind_addr)(self.0, &raw mut address) })
    }

    pub(crate) fn resolve(&self, address: SocketAddrV4) -> Result<()> {
        let mut address = sockaddr(address);
        // SAFETY: a live id, a live address, no source address.
        let result =
            unsafe { (library()?.rdma_resolve_addr)(self.0, ptr::null_mut(), &raw mut address, 2000) };
        done("rdma_resolve_addr", result)
    }

    pub(crate) fn route(&self) -> Result<()> {
        // SAFETY: a live id.
        done("rdma_resolve_route", unsafe { (library()?.rdma_resolve_route)(self.0, 2000) })
    }

    pub(crate) fn listen(&self, backlog: c_int) -> Result<()> {
        // SAFETY: a live id.
        done("rdma_listen", unsafe { (library()?.rdma_listen)(self.0, backlog) })
    }

    pub(crate) fn connect(&self, mut param: ConnParam) -> Result<()> {
        // SAFETY: a live id, live parameters.
        done("rdma_connect", unsafe { (library()?.rdma_connect)(self.0, &raw mut param) })
    }

    pub(crate) fn accept(&self, mut param: ConnParam) -> Result<()> {
        // SAFETY: a live id, live parameters.
        done("rdma_accept", unsafe { (library()?.rdma_accept)(self.0, &raw mut param) })
    }

    pub(crate) fn establish(&self) -> Result<()> {
        // SAFETY: a live id.
        done("rdma_establish", unsafe { (library()?.rdma_establish)(self.0) })
    }

    pub(crate) fn reject(&self, data: &[u8]) -> Result<()> {
        // SAFETY: a live id, and as many bytes as are said.
        done("rdma_reject", unsafe { (library()?.rdma_reject)(self.0, data.as_ptr(), data.len() as u8) })
    }

    pub(crate) fn disconnect(&self) -> Result<()> {
        // SAFETY: a live id.
        done("rdma_disconnect", unsafe { (library()?.rdma_disconnect)(self.0) })
    }

    pub(crate) fn migrate(&self, channel: &Channel) -> Result<()> {
        // SAFETY: a live id, a live channel.
        done("rdma_migrate_id", unsafe { (library()?.rdma_migrate_id)(self.0, channel.0) })
    }

    /// The attributes with which a QP would go to a state.
    pub(crate) fn qp_attr(&self, qp_state: u32) -> Result<ibv_qp_attr> {
        let (mut attr, mut mask) = (ibv_qp_attr { qp_state, ..ibv_qp_attr::default() }, 0);
        // SAFETY: a live id, room for the answers.
        let code = unsafe { (library()?.rdma_init_qp_attr)(self.0, &raw mut attr, &raw mut mask) };
        done("rdma_init_qp_attr", code)?;
        Ok(attr)
    }

    /// Sets an option of level `RDMA_OPTION_ID`.
    pub(crate) fn set_option<T>(&self, name: c_int, mut value: T) -> Result<()> {
        let len = size_of::<T>();
        // SAFETY: a live id, a live value of that length.
        let result = unsafe { (library()?.rdma_set_option)(self.0, 0, name, (&raw mut value).cast(), len) };
        done("rdma_set_option", result)
    }

    pub(crate) fn port(&self) -> Result<u16> {
        // SAFETY: a live id.
        Ok(u16::from_be(unsafe { (library()?.rdma_get_src_port)(self.0) }))
    }

    pub(crate) fn destroy(self) -> Result<()> {
        let id = std::mem::ManuallyDrop::new(self);
        // SAFETY: a live id, ended once.
        done("rdma_destroy_id", unsafe { (library()?.rdma_destroy_id)(id.0) })
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        if let Ok(library) = library() {
            // SAFETY: a live id, ended once.
            unsafe { (library.rdma_destroy_id)(self.0) };
        }
    }
}
