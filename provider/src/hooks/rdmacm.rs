//! The calls of librdmacm to the kernel, caught on their way to libc.
//!
//! | librdmacm calls | on | and gets |
//! |---|---|---|
//! | `open` | `/dev/infiniband/rdma_cm` | a new event channel |
//! | `fstat` | an event channel | a character device, which it insists on |
//! | `write` | an event channel | the command executed, the reply stored |
//! | `close` | an event channel | the router is told first |
//!
//! What the commands mean is [`crate::ucma`]'s business, which also passes on what is the kernel's where the process has
//! devices of the kernel as well. The device node need not exist.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::registry::{self, Owner, Role};
use super::{CommandChannel, NL_CONNECT, Write, cancellable, hooked_nl_connect, original};
use crate::abi::edge::{self, Errno};
use crate::got::{Hook, Original};
use crate::ucma::{self, NODE};

static OPEN: Original = Original::new();
static FSTAT: Original = Original::new();
static FXSTAT: Original = Original::new();
static WRITE: Original = Original::new();
static CLOSE: Original = Original::new();

/// The imports of librdmacm to rewrite. Up to glibc 2.32 `fstat` is `__fxstat`.
pub(super) fn hooks() -> [Hook; 6] {
    let hook = |name, replacement, original| Hook { name, replacement, original };
    [
        hook(c"nl_connect", hooked_nl_connect as *const () as *const c_void, &NL_CONNECT),
        hook(c"open", hooked_open as *const () as *const c_void, &OPEN),
        hook(c"fstat", hooked_fstat as *const () as *const c_void, &FSTAT),
        hook(c"__fxstat", hooked_fxstat as *const () as *const c_void, &FXSTAT),
        hook(c"write", hooked_write as *const () as *const c_void, &WRITE),
        hook(c"close", hooked_close as *const () as *const c_void, &CLOSE),
    ]
}

type Open = unsafe extern "C" fn(*const c_char, c_int, libc::mode_t) -> c_int;
type Fstat = unsafe extern "C" fn(c_int, *mut libc::stat) -> c_int;
type Fxstat = unsafe extern "C" fn(c_int, c_int, *mut libc::stat) -> c_int;
type Close = unsafe extern "C" fn(c_int) -> c_int;

/// `open(2)` as librdmacm calls it; variadic in C, see `hooked_openat`.
pub(super) unsafe extern "C" fn hooked_open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: librdmacm passes a C string.
    if unsafe { CStr::from_ptr(path) } == NODE {
        return edge::syscall(open_channel);
    }
    // SAFETY: the caller's own arguments for the caller's own function.
    unsafe { original::<Open>(&OPEN, open)(path, flags, mode) }
}

unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: the caller's own arguments.
    unsafe { libc::open(path, flags, mode) }
}

pub(crate) fn open_channel() -> Result<RawFd, Errno> {
    let manager = ucma::adopt()?;
    let channel = manager.open_channel().inspect_err(|_| registry::leave_manager(&manager))?;
    let owner: Arc<dyn CommandChannel> = manager;
    registry::enter(channel.as_raw_fd(), Role::EventChannel, &owner);
    Ok(channel.into_raw_fd())
}

/// `fstat(2)` as librdmacm calls it.
pub(super) unsafe extern "C" fn hooked_fstat(fd: c_int, into: *mut libc::stat) -> c_int {
    if is_channel(fd) {
        // SAFETY: librdmacm passes a structure to fill in.
        unsafe { into.write(device_status()) };
        return 0;
    }
    // SAFETY: the caller's own arguments for the caller's own function.
    unsafe { original::<Fstat>(&FSTAT, libc::fstat)(fd, into) }
}

/// `fstat(2)` as librdmacm calls it where it was built for glibc 2.32 or older.
unsafe extern "C" fn hooked_fxstat(version: c_int, fd: c_int, into: *mut libc::stat) -> c_int {
    if is_channel(fd) {
        // SAFETY: librdmacm passes a structure to fill in; on 64-bit machines there is one version of it.
        unsafe { into.write(device_status()) };
        return 0;
    }
    // SAFETY: the caller's own arguments for the caller's own function.
    unsafe { original::<Fxstat>(&FXSTAT, fxstat)(version, fd, into) }
}

unsafe extern "C" fn fxstat(_version: c_int, fd: c_int, into: *mut libc::stat) -> c_int {
    // SAFETY: the caller's own arguments.
    unsafe { libc::fstat(fd, into) }
}

fn is_channel(fd: RawFd) -> bool {
    edge::value(false, || matches!(registry::look_up(fd), Some((Role::EventChannel, _))))
}

/// What librdmacm wants to see: a character device, with the number of the real one where there is one.
fn device_status() -> libc::stat {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    status.st_mode = libc::S_IFCHR | 0o666;
    status.st_rdev = edge::value(0, || rustix::fs::stat(NODE).map_or(0, |node| node.st_rdev));
    status
}

/// `RDMA_USER_CM_CMD_GET_EVENT` of rdma_user_cm.h.
const GET_EVENT: u32 = 12;

/// Whether a command asks for an event.
fn asks_for_event(buffer: *const c_void, length: usize) -> bool {
    // SAFETY: librdmacm passes `length` readable bytes.
    length >= size_of::<u32>() && unsafe { buffer.cast::<u32>().read_unaligned() } == GET_EVENT
}

/// The event that is there: what the call returns. `None` where it is to be waited for.
///
/// A program that was told of the event by poll may have another thread that destroys its id just now. So its count is
/// taken before anything else is done.
///
/// # Safety
/// As for [`hooked_write`].
unsafe fn event_at_once(fd: c_int, buffer: *const c_void, length: usize) -> Option<isize> {
    let Some((Role::EventChannel, Owner::Live(manager))) = registry::look_up(fd) else { return None };
    let mut is_there = true;
    let done = edge::syscall(|| {
        // SAFETY: librdmacm passes `length` readable bytes.
        let command = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
        // SAFETY: a command of librdmacm, whose addresses are the application's.
        let stored = unsafe { manager.event_at_once(fd, command) };
        is_there = stored != Err(Errno::AGAIN);
        stored.map(|()| length as isize)
    });
    is_there.then_some(done)
}

/// Whether a call waits for an event: its descriptor blocks.
fn waits(fd: c_int) -> bool {
    edge::value(false, || {
        let is_live = matches!(registry::look_up(fd), Some((Role::EventChannel, Owner::Live(_))));
        // SAFETY: the caller is using the descriptor, which therefore is open.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
        is_live && rustix::fs::fcntl_getfl(descriptor).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK))
    })
}

/// `write(2)` as librdmacm calls it. A thread that waits for an event can be cancelled, as in [`super::hooked_read`].
pub(crate) unsafe extern "C-unwind" fn hooked_write(
    fd: c_int,
    buffer: *const c_void,
    length: usize,
) -> isize {
    if asks_for_event(buffer, length) {
        // SAFETY: the caller's own arguments.
        if let Some(done) = unsafe { event_at_once(fd, buffer, length) } {
            return done;
        }
        if waits(fd) {
            // SAFETY: this frame has nothing to drop, and its caller is C.
            unsafe { cancellable::wait(fd) };
        }
    }
    // SAFETY: the caller's own arguments.
    unsafe { write(fd, buffer, length) }
}

/// # Safety
/// As for [`hooked_write`].
unsafe fn write(fd: c_int, buffer: *const c_void, length: usize) -> isize {
    match registry::look_up(fd) {
        Some((Role::EventChannel, owner)) => edge::syscall(|| {
            // A child has the parent's channel: what happens on it is the parent's.
            let Owner::Live(manager) = owner else { return Err(Errno::NODEV) };
            // SAFETY: librdmacm passes `length` readable bytes.
            let command = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
            // SAFETY: a command of librdmacm, whose addresses are the application's.
            unsafe { manager.manage(fd, command) }?;
            Ok(length as isize)
        }),
        // SAFETY: the caller's own arguments for the caller's own function.
        _ => unsafe { original::<Write>(&WRITE, libc::write)(fd, buffer, length) },
    }
}

/// `close(2)` as librdmacm calls it.
pub(crate) unsafe extern "C" fn hooked_close(fd: c_int) -> c_int {
    // Taken out before it is closed: the number may be another's in the next moment.
    if let Some((Role::EventChannel, Owner::Live(manager))) = registry::remove_if(fd, Role::EventChannel) {
        edge::keeping_errno(|| edge::value((), || manager.event_channel_closed(fd)));
    }
    // SAFETY: the caller's own argument for the caller's own function.
    unsafe { original::<Close>(&CLOSE, libc::close)(fd) }
}
