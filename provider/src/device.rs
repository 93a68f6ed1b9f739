//! The device as libibverbs' driver list has it: found, allocated, opened and closed.
//!
//! [`register`] runs when the provider is loaded and hands libibverbs the table of functions below, in the shape of
//! its release. Opening builds the `verbs_context` around a [`Context`], which does the talking with the router and
//! all verbs.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::DupFlags;
use verbs_abi::ffi::{ibv_context, ibv_device};
use verbs_abi::ffi_private::CONTEXT_TO_SZ;

use crate::abi::edge::{self, Errno};
use crate::abi::layout::{self, Level, MAX_OPS, Op, PUBLIC_OPS};
use crate::abi::library::{Verbs, public_context, verbs_context};
use crate::announce;
use crate::context::{self, Context, OpenError};
use crate::hooks::{self, CommandChannel, registry};
use crate::log;
use crate::ops;

/// Run by the dynamic linker when it has loaded the provider.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = register;

/// Registers the driver with the libibverbs that loaded us, if it is one whose layout is known.
extern "C" fn register() {
    edge::value((), || match Verbs::loaded() {
        Ok(Some(verbs)) => {
            let operations = ptr::from_ref(OPERATIONS.get_or_init(|| DeviceOps::new(verbs.level)));
            match verbs.register_user_driver {
                Some(register) => {
                    let line = "this libibverbs lets providers announce devices: no import is rewritten";
                    log::say(log::Level::Info, format_args!("{line}"));
                    // SAFETY: as below, and the other table has the shape that comes with this function.
                    unsafe { register(operations.cast(), (&raw const announce::USER_OPS).cast()) };
                }
                // SAFETY: `operations` has the shape of this libibverbs' level and lives as long as the process.
                None => unsafe { (verbs.register_driver)(operations.cast()) },
            }
        }
        Ok(None) => {}
        Err(error) => log::say(log::Level::Error, format_args!("{error}")),
    });
}

fn verbs() -> Option<&'static Verbs> {
    Verbs::loaded().ok().flatten()
}

/// `verbs_device_ops`: a constant head, then functions whose list depends on the level.
#[repr(C)]
#[derive(Debug)]
struct DeviceOps {
    name: *const c_char,
    min_abi: u32,
    max_abi: u32,
    match_table: *const c_void,
    static_providers: *const c_void,
    functions: [*const c_void; 6],
}

// SAFETY: the pointers are to constants and functions.
unsafe impl Send for DeviceOps {}
// SAFETY: as above.
unsafe impl Sync for DeviceOps {}

static OPERATIONS: OnceLock<DeviceOps> = OnceLock::new();

/// An empty match table. It must not be null: libibverbs walks the table of every driver as soon as a device with a
/// driver id is present. All zero is its end mark.
static NO_MATCHES: [u64; 8] = [0; 8];

impl DeviceOps {
    fn new(level: Level) -> DeviceOps {
        let mut functions = vec![match_device as *const () as *const c_void, alloc_context as *const () as _];
        if level.device_frees_context() {
            functions.push(ops::implementation(Op::FreeContext).unwrap_or(ptr::null()));
        }
        if level.device_imports_context() {
            functions.push(import_context as *const () as _);
        }
        functions.extend([alloc_device as *const () as *const c_void, uninit_device as *const () as _]);
        functions.resize(6, ptr::null());
        DeviceOps {
            name: c"freeflow".as_ptr(),
            min_abi: 0,
            max_abi: u32::MAX,
            match_table: NO_MATCHES.as_ptr().cast(),
            static_providers: ptr::null(),
            functions: [functions[0], functions[1], functions[2], functions[3], functions[4], functions[5]],
        }
    }
}

/// The device number of `/dev/null`, of which our uverbs node is a clone: no kernel device has it.
pub(crate) const NULL_DEVICE: (u32, u32) = (1, 3);

/// Whether a device of the sysfs tree is ours: named `ff` and a number, with a node that is a clone of `/dev/null`.
unsafe extern "C" fn match_device(sysfs: *const u8) -> bool {
    edge::value(false, || {
        // SAFETY: libibverbs passes a `verbs_sysfs_dev`, in which these two members have always had these offsets.
        let (name, node) = unsafe {
            let name = CStr::from_ptr(sysfs.add(layout::SYSFS_DEV_NAME).cast());
            (name, sysfs.add(layout::SYSFS_DEV_CDEV).cast::<libc::dev_t>().read())
        };
        is_ours(name.to_bytes()) && (libc::major(node), libc::minor(node)) == NULL_DEVICE
    })
}

/// Whether a device's name is one of ours.
pub(crate) fn is_ours(name: &[u8]) -> bool {
    name.strip_prefix(b"ff").is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit))
}

/// More than `verbs_device` has ever needed; libibverbs fills it in, we keep nothing in it.
const DEVICE_SIZE: usize = 4096;

unsafe extern "C" fn alloc_device(sysfs: *const u8) -> *mut c_void {
    edge::pointer(|| {
        let verbs = verbs().ok_or(Errno::NODEV)?;
        if verbs.register_user_driver.is_some() {
            registry::guard_forks();
        } else {
            // SAFETY: as in `match_device`.
            let path = unsafe { CStr::from_ptr(sysfs.add(layout::SYSFS_DEV_PATH).cast()) };
            registry::add_directory(path.to_bytes());
            hooks::arm(verbs);
        }
        // SAFETY: no preconditions.
        let device = unsafe { libc::calloc(1, DEVICE_SIZE) };
        if device.is_null() { Err(Errno::NOMEM) } else { Ok(device) }
    })
}

unsafe extern "C" fn uninit_device(device: *mut c_void) {
    // SAFETY: libibverbs passes what `alloc_device` returned, once.
    unsafe { libc::free(device) }
}

/// Why a device could not be opened, for the one line on stderr; errno is all that C can be told.
#[derive(Debug, thiserror::Error)]
enum AllocError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("cannot {what}: {errno}")]
    System { what: &'static str, errno: Errno },
    #[error(
        "this libibverbs does not have the layout that its version says ({0}); \
         it is not the rdma-core release that it claims to be"
    )]
    Layout(&'static str),
}

impl AllocError {
    fn errno(&self) -> Errno {
        match self {
            AllocError::Open(error) => error.errno(),
            AllocError::System { errno, .. } => *errno,
            AllocError::Layout(_) => Errno::OPNOTSUPP,
        }
    }
}

/// Opens the device. Owns `cmd_fd`, whatever it returns; there is none if libibverbs knows that no kernel is behind it.
unsafe extern "C" fn alloc_context(
    device: *mut ibv_device,
    cmd_fd: c_int,
    _private: *mut c_void,
) -> *mut c_void {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a descriptor that it opened and hands over.
        let cmd_fd = (cmd_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(cmd_fd) });
        let cmd_fd = cmd_fd.map_or_else(command_descriptor, forbid_commands)?;
        let verbs = verbs().ok_or(Errno::NODEV)?;
        // SAFETY: libibverbs passes one of its devices, whose name is a C string.
        let name = unsafe { CStr::from_ptr((*device).name.as_ptr()) }.to_string_lossy();
        // SAFETY: as above.
        unsafe { open(verbs, device, cmd_fd, &name) }.map_err(|error| {
            report(format_args!("cannot open {name}: {error}"));
            error.errno()
        })
    })
}

/// Makes a further context of an opened device. Owns `cmd_fd`, a copy of that device's, whatever it returns.
unsafe extern "C" fn import_context(device: *mut ibv_device, cmd_fd: c_int) -> *mut c_void {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a descriptor that it hands over.
        let cmd_fd = unsafe { OwnedFd::from_raw_fd(cmd_fd) };
        let verbs = verbs().ok_or(Errno::NODEV)?;
        let opened = registry::device_of_copy(cmd_fd.as_raw_fd()).and_then(CommandChannel::opened_device);
        let Some(context) = opened else {
            report(format_args!("only what this process has opened can be imported"));
            return Err(Errno::OPNOTSUPP);
        };
        context.health().check_owner()?;
        context.join();
        // Where libibverbs has no op for it, it asks for the async descriptor by the `ioctl` that is caught.
        let announced = verbs.register_user_driver.is_some();
        let events = announced.then(|| context.async_descriptor()).transpose();
        let context_of = |events| {
            // SAFETY: libibverbs passes one of its devices.
            unsafe { wrap(verbs, device, cmd_fd, Arc::clone(&context), events) }
        };
        let system = |errno| AllocError::System { what: "copy the async descriptor", errno };
        events.map_err(system).and_then(context_of).map_err(|error| {
            context.leave();
            report(format_args!("cannot import a context: {error}"));
            error.errno()
        })
    })
}

/// Says it on stderr, unless it was the last thing said: some programs try again and again.
fn report(message: fmt::Arguments<'_>) {
    static LAST: Mutex<String> = Mutex::new(String::new());
    let message = message.to_string();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if *last != message {
        log::say(log::Level::Error, format_args!("{message}"));
        *last = message;
    }
}

/// What we keep behind the public context.
#[repr(C)]
struct Extension {
    /// From `Arc::into_raw`; the context's own reference.
    context: *const Context,
}

/// # Safety
/// `device` must be one of libibverbs' devices.
unsafe fn open(
    verbs: &Verbs,
    device: *mut ibv_device,
    cmd_fd: OwnedFd,
    name: &str,
) -> Result<*mut c_void, AllocError> {
    let system = |what| move |errno| AllocError::System { what, errno };
    let events = hooks::event_counter().map_err(system("make the async descriptor"))?;
    let context = context::open(name, events.as_fd())?;
    // SAFETY: the caller's promise.
    let raw = unsafe { wrap(verbs, device, cmd_fd, context, Some(events)) }?;
    let (level, comp_mask) = (verbs.level, verbs.qp_comp_mask);
    log::say(
        log::Level::Debug,
        format_args!("opened {name}, layout {level:?}, verbs_qp.comp_mask at {comp_mask}"),
    );
    Ok(raw)
}

/// The context that C is shown of an opened device. Without `events` libibverbs asks for an async descriptor itself.
///
/// # Safety
/// `device` must be one of libibverbs' devices.
unsafe fn wrap(
    verbs: &Verbs,
    device: *mut ibv_device,
    cmd_fd: OwnedFd,
    context: Arc<Context>,
    events: Option<OwnedFd>,
) -> Result<*mut c_void, AllocError> {
    let command = cmd_fd.as_raw_fd();
    let size = verbs.level.context_size() + size_of::<Extension>();
    // SAFETY: the function's contract since release 25; it takes the descriptor over.
    let raw = unsafe {
        (verbs.init_and_alloc_context)(device, cmd_fd.into_raw_fd(), size, ptr::null_mut(), DRIVER_UNKNOWN)
    };
    if raw.is_null() {
        return Err(AllocError::System { what: "allocate the context", errno: Errno::NOMEM });
    }
    // SAFETY: the allocation is `size` bytes long and ends in the public context and our extension.
    let public = unsafe { public_context(verbs.level, raw) };
    // SAFETY: as above.
    if !unsafe { is_well_placed(verbs.level, public, device) } {
        // Left as it is: a context whose parts lie elsewhere cannot be taken apart safely.
        return Err(AllocError::Layout("the context's size differs"));
    }
    // SAFETY: as above; the public context was found where it should be.
    unsafe {
        set_ops(verbs, raw);
        (*public).num_comp_vectors = context.num_comp_vectors();
    }
    // SAFETY: as above.
    if let Err(op) = unsafe { check_ops(verbs.level, public) } {
        // SAFETY: initialised above, and nobody else has it.
        unsafe { discard(verbs, raw) };
        return Err(AllocError::Layout(op.name()));
    }
    let channel: Arc<dyn CommandChannel> = Arc::clone(&context) as _;
    match events.map(IntoRawFd::into_raw_fd) {
        Some(events) => {
            // SAFETY: as above.
            unsafe { (*public).async_fd = events };
            registry::opened(command, events, &channel);
        }
        None => registry::enter(command, registry::Role::Command, &channel),
    }
    // SAFETY: the extension lies behind the public context, inside the allocation.
    unsafe { extension(public).write(Extension { context: Arc::into_raw(context) }) };
    Ok(raw)
}

/// `RDMA_DRIVER_UNKNOWN`.
const DRIVER_UNKNOWN: u32 = 0;

/// Makes every command fail that libibverbs writes to the descriptor past our hooks. On the `/dev/null` clone that
/// it opened it would seem to succeed, with whatever was on the stack as its reply.
fn forbid_commands(mut cmd_fd: OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::dup3(&command_descriptor()?, &mut cmd_fd, DupFlags::CLOEXEC)?;
    Ok(cmd_fd)
}

/// A descriptor that takes no command.
fn command_descriptor() -> Result<OwnedFd, Errno> {
    rustix::fs::open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Whether the public context is where the level says: three words that libibverbs has set must be there.
///
/// # Safety
/// `public` and the words before it must lie inside the allocation.
unsafe fn is_well_placed(level: Level, public: *mut ibv_context, device: *mut ibv_device) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let size = public.cast::<u8>().sub(CONTEXT_TO_SZ).cast::<usize>().read();
        size == level.context_size()
            && ptr::eq((*public).device, device)
            && (*public).abi_compat.addr() == usize::MAX
    }
}

/// Hands libibverbs our ops, each in its slot; it keeps its own "not supported" for those we lack.
///
/// # Safety
/// `raw` must be an initialised `verbs_context`.
unsafe fn set_ops(verbs: &Verbs, raw: *mut c_void) {
    let mut table = [ptr::null(); MAX_OPS];
    for (slot, op) in table.iter_mut().zip(verbs.level.ops()) {
        *slot = ops::implementation(op).unwrap_or(ptr::null());
    }
    // SAFETY: the caller's promise; the table is at least as long as any release's.
    unsafe { (verbs.set_ops)(raw, table.as_ptr()) }
}

/// Whether our ops have arrived where the public header shows them; if not, the first that has not.
///
/// # Safety
/// `public` must be an initialised context.
unsafe fn check_ops(level: Level, public: *mut ibv_context) -> Result<(), Op> {
    // SAFETY: the caller's promise; `ops` is a structure of exactly these function pointers.
    let shown = unsafe { (&raw const (*public).ops).cast::<[*const c_void; PUBLIC_OPS.len()]>().read() };
    for (shown, op) in shown.into_iter().zip(PUBLIC_OPS) {
        let Some(op) = op.filter(|&op| level.has(op)) else { continue };
        if ops::implementation(op).is_some_and(|ours| !ptr::eq(ours, shown)) {
            return Err(op);
        }
    }
    Ok(())
}

fn extension(public: *mut ibv_context) -> *mut Extension {
    public.wrapping_add(1).cast()
}

/// The state of an opened device.
///
/// # Safety
/// `public` must be an open context of ours, and the reference must not outlive it.
pub(crate) unsafe fn state<'a>(public: *mut ibv_context) -> &'a Context {
    // SAFETY: the caller's promise; `open` put the pointer there, and `close` has not taken it yet.
    unsafe { &*(*extension(public)).context }
}

/// Closes a device: the op `free_context` ends here. The [`Context`] is dropped when its last user lets it go.
///
/// # Safety
/// `public` must be an open context of ours; nothing may use it afterwards.
pub(crate) unsafe fn close(public: *mut ibv_context) {
    let Some(verbs) = verbs() else { return };
    // SAFETY: the caller's promise.
    let (command, events) = unsafe { ((*public).cmd_fd, (*public).async_fd) };
    // Out of the registry first, so that no hook meets a device that is half closed.
    let owners = [registry::remove(command), registry::remove(events)];
    let inherited = matches!(owners[0], Some((_, registry::Owner::Inherited)));
    // SAFETY: the caller's promise; from `Arc::into_raw` in `open`, taken once.
    let context = unsafe { Arc::from_raw((*extension(public)).context) };
    if inherited {
        // It is the parent's: dropping the child's copy would close the connection in its name.
        std::mem::forget(context);
    }
    // SAFETY: the caller's promise.
    unsafe { discard(verbs, verbs_context(verbs.level, public)) }
}

/// # Safety
/// `raw` must be an initialised `verbs_context` that nobody uses any more.
unsafe fn discard(verbs: &Verbs, raw: *mut c_void) {
    // SAFETY: the caller's promise; libibverbs allocated it by `calloc` and leaves the freeing to the driver.
    unsafe {
        (verbs.uninit_context)(raw);
        libc::free(raw);
    }
}

#[cfg(test)]
mod release_55;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_devices_are_named_ff_and_a_number() {
        assert!(is_ours(b"ff0") && is_ours(b"ff12"));
        assert!(!is_ours(b"ff") && !is_ours(b"ffx") && !is_ours(b"mlx5_0") && !is_ours(b"ff0a"));
    }

    #[test]
    fn device_ops_have_the_shape_of_their_level() {
        let filled = |level| {
            let ops = DeviceOps::new(level);
            ops.functions.iter().rposition(|function| !function.is_null()).unwrap() + 1
        };
        assert_eq!(filled(Level::V25), 5); // with free_context
        assert_eq!(filled(Level::V28), 4);
        assert_eq!(filled(Level::V31), 5); // with import_context
    }

    #[test]
    fn an_unhooked_command_fails_instead_of_seeming_to_succeed() {
        let node = rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
        let node = forbid_commands(node).unwrap();
        assert_eq!(rustix::io::write(&node, b"command"), Err(Errno::BADF));
    }
}
