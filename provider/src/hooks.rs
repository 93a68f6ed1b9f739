//! The calls of libibverbs that go past its ops table, caught on their way to libc.
//!
//! | libibverbs calls | on | and gets |
//! |---|---|---|
//! | `write` | a command descriptor | a completion channel: an eventfd; EOPNOTSUPP for any other command |
//! | `ioctl` | a command descriptor | an async descriptor for an imported context; ENOTTY for any other command |
//! | `read` | a completion channel, the async descriptor | the next event's record, built in this process |
//! | `close` | any of the three | the owner is told first |
//! | `openat` | a file below our device's sysfs directory | a memfd with what [`CommandChannel::sysfs`] says |
//! | `nl_connect` | the RDMA netlink protocol | refused, so that device enumeration stays with sysfs |
//!
//! In every release from 25 to 65, a sysfs file of a device is opened by
//! `openat(AT_FDCWD, "<ibdev_path>/<file>", O_RDONLY | O_CLOEXEC)`, read once and closed; relative names occur for
//! the uverbs directories only, which are ours as files. The events themselves are the verbs side's, behind
//! [`CommandChannel`]; the eventfds are in semaphore mode, a count an event, so a reader blocks, polls and returns
//! EAGAIN exactly as it asked for by the descriptor's flags.
//!
//! The hooks are armed when libibverbs allocates the first of our devices: a process with none is left alone.

pub(crate) mod rdmacm;
pub(crate) mod registry;

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use verbs_abi::ffi_private::{
    AsyncEventDesc, CMD_CREATE_COMP_CHANNEL, CmdHdr, CompEventDesc, CreateCompChannel, CreateCompChannelResp,
    IoctlAttr, IoctlHdr, OBJECT_ASYNC_EVENT, VERBS_IOCTL,
};

use crate::abi::edge::{self, Errno};
use crate::abi::library::{LIBRDMACM, Library, Verbs};
use crate::context::Context;
use crate::got::{self, Hook, Original};
use crate::log::{self, Level};
use registry::{Owner, Role};

/// What an opened device does when libibverbs goes past its ops table, and the connection manager's connection when
/// librdmacm talks to the kernel: each has its own half. Called from any thread, with no lock held.
pub(crate) trait CommandChannel: Send + Sync {
    /// `ibv_create_comp_channel`: `fd` is the new channel's eventfd, the number that the application will see. An
    /// error refuses the channel.
    fn comp_channel_created(&self, fd: RawFd) -> Result<(), Errno> {
        let _ = fd;
        Err(Errno::BADF)
    }

    /// `ibv_destroy_comp_channel`: `fd` is about to be closed.
    fn comp_channel_closed(&self, fd: RawFd) {
        let _ = fd;
    }

    /// A thread is about to read, and perhaps to sleep on, a completion channel or the async descriptor.
    fn before_wait(&self, fd: RawFd, role: Role) {
        let _ = (fd, role);
    }

    /// The next completion event of a channel, after one count was taken from its eventfd. `None` if there is none
    /// (it was revoked): the reader takes the next count or waits for it.
    fn next_comp_event(&self, fd: RawFd) -> Result<Option<CompEventDesc>, Errno> {
        let _ = fd;
        Err(Errno::BADF)
    }

    /// The next async event, after one count was taken from the async descriptor; as for completion events.
    fn next_async_event(&self) -> Result<Option<AsyncEventDesc>, Errno> {
        Err(Errno::BADF)
    }

    /// A descriptor for a further context of the device, which was imported, to read the async events from.
    fn async_descriptor(&self) -> Result<OwnedFd, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    /// The device itself.
    fn opened_device(self: Arc<Self>) -> Option<Arc<Context>> {
        None
    }

    /// What a sysfs file of the device says, by its name below the device's directory (`ports/1/gids/0`); `None` to
    /// let the file itself answer. Asked of the device opened last, since libibverbs does not say for which.
    fn sysfs(&self, file: &str) -> Option<String> {
        let _ = file;
        None
    }

    /// librdmacm wrote a command to the event channel `fd`.
    ///
    /// # Safety
    /// The addresses in the command must be those of its reply and of its option.
    unsafe fn manage(&self, fd: RawFd, command: &[u8]) -> Result<(), Errno> {
        let _ = (fd, command);
        Err(Errno::BADF)
    }

    /// The same for the command that asks for an event, where one is there; else AGAIN.
    ///
    /// # Safety
    /// As for [`Self::manage`].
    unsafe fn event_at_once(&self, fd: RawFd, command: &[u8]) -> Result<(), Errno> {
        let _ = (fd, command);
        Err(Errno::AGAIN)
    }

    /// librdmacm is about to close an event channel.
    fn event_channel_closed(&self, fd: RawFd) {
        let _ = fd;
    }
}

static WRITE: Original = Original::new();
static IOCTL: Original = Original::new();
static READ: Original = Original::new();
static CLOSE: Original = Original::new();
static OPENAT: Original = Original::new();
static NL_CONNECT: Original = Original::new();

fn libibverbs_hooks() -> [Hook; 6] {
    let hook = |name, replacement, original| Hook { name, replacement, original };
    [
        hook(c"write", hooked_write as *const () as *const c_void, &WRITE),
        hook(c"ioctl", hooked_ioctl as *const () as *const c_void, &IOCTL),
        hook(c"read", hooked_read as *const () as *const c_void, &READ),
        hook(c"close", hooked_close as *const () as *const c_void, &CLOSE),
        hook(c"openat", hooked_openat as *const () as *const c_void, &OPENAT),
        hook(c"nl_connect", hooked_nl_connect as *const () as *const c_void, &NL_CONNECT),
    ]
}

static ARMED: AtomicBool = AtomicBool::new(false);

/// Arms the hooks, once and for all.
pub(crate) fn arm(verbs: &Verbs) {
    registry::guard_forks();
    let absent = match got::patch(&verbs.library, &libibverbs_hooks()) {
        Ok(absent) => absent.iter().map(|hook| hook.name).collect::<Vec<_>>(),
        Err(error) => {
            let advice = "completion channels and GID queries of ff0 will fail";
            log::say(Level::Error, format_args!("{error}; {advice}"));
            return;
        }
    };
    if !ARMED.swap(true, Ordering::AcqRel) && !absent.is_empty() {
        log::say(
            Level::Warn,
            format_args!("libibverbs does not import {absent:?}; some verbs of ff0 will fail"),
        );
    }
    scan_late_libraries();
}

/// Hooks what was loaded since. Every `ibv_get_device_list` comes here first, and librdmacm calls that before
/// anything that matters, however late it was loaded.
fn scan_late_libraries() {
    let Some(librdmacm) = Library::find(LIBRDMACM) else { return };
    if let Err(error) = got::patch(&librdmacm, &rdmacm::hooks()) {
        log::say(Level::Error, format_args!("{error}; rdma_cm will not work with ff0"));
    }
}

/// The function that an import led to, or `fallback` where the hook was called without having been rewritten.
///
/// # Safety
/// `F` must be the C type of the function.
unsafe fn original<F: Copy>(original: &Original, fallback: F) -> F {
    match original.load() {
        // SAFETY: the caller's promise; a function pointer is as large as an address.
        Some(address) => unsafe { mem::transmute_copy(&address) },
        None => fallback,
    }
}

type Write = unsafe extern "C" fn(c_int, *const c_void, usize) -> isize;
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;
type CancellableRead = unsafe extern "C-unwind" fn(c_int, *mut c_void, usize) -> isize;
type Close = unsafe extern "C" fn(c_int) -> c_int;
type OpenAt = unsafe extern "C" fn(c_int, *const c_char, c_int, libc::mode_t) -> c_int;
type NlConnect = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;

/// `write(2)` as libibverbs calls it.
unsafe extern "C" fn hooked_write(fd: c_int, buffer: *const c_void, length: usize) -> isize {
    match registry::look_up(fd) {
        Some((Role::Command, owner)) => edge::syscall(|| {
            let Owner::Live(device) = owner else { return Err(Errno::IO) };
            // SAFETY: libibverbs passes `length` readable bytes, and a command's reply address is its own.
            unsafe { command(&device, buffer, length) }
        }),
        // SAFETY: the caller's own arguments for the caller's own function.
        _ => unsafe { original::<Write>(&WRITE, libc::write)(fd, buffer, length) },
    }
}

/// # Safety
/// `buffer` must hold a command of `length` bytes whose reply address libibverbs may write to.
unsafe fn command(
    device: &Arc<dyn CommandChannel>,
    buffer: *const c_void,
    length: usize,
) -> Result<isize, Errno> {
    if length < size_of::<CmdHdr>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise, and the length was checked.
    let header = unsafe { buffer.cast::<CmdHdr>().read_unaligned() };
    if header.command != CMD_CREATE_COMP_CHANNEL {
        log::say(Level::Debug, format_args!("refused command {} of libibverbs", header.command));
        return Err(Errno::OPNOTSUPP);
    }
    if length < size_of::<CreateCompChannel>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: as above.
    let request = unsafe { buffer.cast::<CreateCompChannel>().read_unaligned() };
    let fd = create_comp_channel(device)?;
    let response = request.response as *mut CreateCompChannelResp;
    // SAFETY: the caller's promise.
    unsafe { response.write_unaligned(CreateCompChannelResp { fd: fd as u32 }) };
    Ok(length as isize)
}

pub(crate) fn create_comp_channel(device: &Arc<dyn CommandChannel>) -> Result<RawFd, Errno> {
    let channel = event_counter()?;
    device.comp_channel_created(channel.as_raw_fd())?;
    registry::enter(channel.as_raw_fd(), Role::Completion, device);
    Ok(channel.into_raw_fd())
}

/// `ioctl(2)` as libibverbs calls it. It is variadic in C, with one argument at the most; both calling conventions
/// pass it alike.
unsafe extern "C" fn hooked_ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    match registry::look_up(fd) {
        Some((Role::Command, owner)) if request == VERBS_IOCTL => {
            let done = edge::syscall(|| {
                let Owner::Live(device) = owner else { return Err(Errno::IO) };
                // SAFETY: libibverbs passes a command with its attributes.
                unsafe { new_async_descriptor(&device, argument.cast()) }
            });
            done as c_int
        }
        // SAFETY: the caller's own arguments for the caller's own function.
        _ => unsafe { original::<Ioctl>(&IOCTL, ioctl)(fd, request, argument) },
    }
}

unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: the caller's own arguments.
    unsafe { libc::ioctl(fd, request, argument) }
}

/// The one command that libibverbs gives by `ioctl` whatever the provider offers: an async descriptor for a context
/// that was imported.
///
/// # Safety
/// `header` must be followed by as many attributes as it says, which are the caller's to write.
unsafe fn new_async_descriptor(
    device: &Arc<dyn CommandChannel>,
    header: *mut IoctlHdr,
) -> Result<isize, Errno> {
    // SAFETY: the caller's promise.
    let IoctlHdr { object_id, method_id, num_attrs, .. } = unsafe { header.read_unaligned() };
    if (object_id, method_id, num_attrs) != (OBJECT_ASYNC_EVENT, 0, 1) {
        // As the descriptor itself would say: then libibverbs goes other ways.
        return Err(Errno::NOTTY);
    }
    let descriptor = device.async_descriptor()?;
    registry::enter(descriptor.as_raw_fd(), Role::Async, device);
    // SAFETY: as above: there is one attribute.
    unsafe {
        let attribute = header.add(1).cast::<IoctlAttr>();
        (&raw mut (*attribute).data).write_unaligned(descriptor.into_raw_fd() as u64);
    }
    Ok(0)
}

/// A descriptor that carries events as counts: each read takes one.
pub(crate) fn event_counter() -> Result<OwnedFd, Errno> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE)
}

/// `read(2)` as libibverbs calls it.
///
/// It is where a thread that waits for an event is cancelled. So the wait lies outside of all that catches, in a frame
/// with nothing to drop.
#[allow(ffi_unwind_calls, reason = "a cancelled thread unwinds from there, through this frame")]
pub(crate) unsafe extern "C-unwind" fn hooked_read(fd: c_int, buffer: *mut c_void, length: usize) -> isize {
    let role = edge::value(None, || match registry::look_up(fd) {
        Some((role @ (Role::Completion | Role::Async), _)) => Some(role),
        _ => None,
    });
    // SAFETY: the original has this type.
    let read = unsafe { original::<CancellableRead>(&READ, cancellable::read) };
    let Some(role) = role else {
        // SAFETY: the caller's own arguments for the caller's own function.
        return unsafe { read(fd, buffer, length) };
    };
    loop {
        if edge::syscall(|| prepare_wait(fd, role, length)) < 0_isize {
            return -1;
        }
        let mut count = 0_u64;
        // SAFETY: eight writable bytes.
        if unsafe { read(fd, (&raw mut count).cast(), size_of::<u64>()) } != size_of::<u64>() as isize {
            return -1;
        }
        // SAFETY: libibverbs passes `length` writable bytes.
        let stored = edge::syscall(|| unsafe { take_event(fd, role, buffer) });
        // A count may lead to no event: it was taken back, or another thread was faster.
        if stored != 0 {
            return stored;
        }
    }
}

/// The device behind a descriptor, if this is its process.
fn live(fd: RawFd) -> Result<Arc<dyn CommandChannel>, Errno> {
    match registry::look_up(fd) {
        Some((_, Owner::Live(device))) => Ok(device),
        _ => Err(Errno::IO),
    }
}

fn prepare_wait(fd: RawFd, role: Role, length: usize) -> Result<isize, Errno> {
    let device = live(fd)?;
    let least =
        if role == Role::Completion { size_of::<CompEventDesc>() } else { size_of::<AsyncEventDesc>() };
    if length < least {
        return Err(Errno::INVAL);
    }
    device.before_wait(fd, role);
    Ok(0)
}

/// Stores the next event's record, and says how long it is; 0 where there is none.
///
/// # Safety
/// `buffer` must be writable for a record.
unsafe fn take_event(fd: RawFd, role: Role, buffer: *mut c_void) -> Result<isize, Errno> {
    let device = live(fd)?;
    if role == Role::Completion {
        let record = device.next_comp_event(fd)?;
        // SAFETY: the caller's promise.
        return Ok(record.map_or(0, |record| unsafe { store(record, buffer) }));
    }
    let record = device.next_async_event()?;
    // SAFETY: the caller's promise.
    Ok(record.map_or(0, |record| unsafe { store(record, buffer) }))
}

/// # Safety
/// `buffer` must be writable for a `T`.
unsafe fn store<T>(record: T, buffer: *mut c_void) -> isize {
    // SAFETY: the caller's promise.
    unsafe { buffer.cast::<T>().write_unaligned(record) };
    size_of::<T>() as isize
}

/// Functions of libc at which a thread may be cancelled, and unwinds.
mod cancellable {
    use std::ffi::{c_int, c_void};

    unsafe extern "C-unwind" {
        pub(super) fn read(fd: c_int, buffer: *mut c_void, length: usize) -> isize;
        fn poll(fds: *mut libc::pollfd, count: libc::nfds_t, timeout: c_int) -> c_int;
    }

    /// Waits until something can be read from a descriptor.
    ///
    /// # Safety
    /// The frames from here to the next one of C must have nothing to drop.
    #[allow(ffi_unwind_calls, reason = "a cancelled thread unwinds from there, through this frame")]
    pub(super) unsafe extern "C-unwind" fn wait(fd: c_int) {
        let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, as is said.
        unsafe { poll(&raw mut polled, 1, -1) };
    }
}

/// `close(2)` as libibverbs calls it.
pub(crate) unsafe extern "C" fn hooked_close(fd: c_int) -> c_int {
    // Taken out before it is closed: the number may be another's in the next moment.
    if let Some((Role::Completion, Owner::Live(device))) = registry::remove(fd) {
        edge::keeping_errno(|| edge::value((), || device.comp_channel_closed(fd)));
    }
    // SAFETY: the caller's own argument for the caller's own function.
    unsafe { original::<Close>(&CLOSE, libc::close)(fd) }
}

/// `openat(2)` as libibverbs calls it. It is variadic in C; a fourth argument that was not passed is read as
/// garbage here and not used by the original either, and the calling conventions of x86-64 and aarch64 Linux pass
/// both forms alike.
unsafe extern "C" fn hooked_openat(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    let answer = edge::value(None, || {
        // SAFETY: libibverbs passes a C string.
        sysfs_file(unsafe { CStr::from_ptr(path) })
    });
    let fd = match answer {
        Some(file) => file.into_raw_fd(),
        // SAFETY: the caller's own arguments for the caller's own function.
        None => unsafe { original::<OpenAt>(&OPENAT, openat)(directory, path, flags, mode) },
    };
    if fd >= 0 {
        // An entry of this number is stale, or it could not be new.
        edge::keeping_errno(|| drop(registry::remove(fd)));
    }
    fd
}

unsafe extern "C" fn openat(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: the caller's own arguments.
    unsafe { libc::openat(directory, path, flags, mode) }
}

/// The file that stands for a sysfs file of our device, if the device has something to say.
fn sysfs_file(path: &CStr) -> Option<OwnedFd> {
    let file = registry::below_device(path.to_bytes())?;
    let text = match registry::newest() {
        Some(device) => device.sysfs(file),
        None => crate::context::sysfs_before_open(file),
    }?;
    let memory = rustix::fs::memfd_create(c"freeflow-sysfs", MemfdFlags::CLOEXEC).ok()?;
    // By position: the reader starts at 0.
    let written = rustix::io::pwrite(memory.as_fd(), text.as_bytes(), 0).ok()?;
    (written == text.len()).then_some(memory)
}

/// The netlink protocol of RDMA.
const NETLINK_RDMA: c_int = 20;

/// `nl_connect` of libnl as libibverbs and librdmacm call it.
unsafe extern "C" fn hooked_nl_connect(socket: *mut c_void, protocol: c_int) -> c_int {
    edge::value((), || edge::keeping_errno(scan_late_libraries));
    if protocol == NETLINK_RDMA {
        return REFUSED;
    }
    // SAFETY: the caller's own arguments for the caller's own function.
    unsafe { original::<NlConnect>(&NL_CONNECT, refuse)(socket, protocol) }
}

/// libnl's unspecific failure, `-NLE_FAILURE`.
const REFUSED: c_int = -1;

unsafe extern "C" fn refuse(_socket: *mut c_void, _protocol: c_int) -> c_int {
    REFUSED
}

#[cfg(test)]
mod tests;
