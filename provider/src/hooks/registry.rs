//! The descriptors of our opened devices, by number: whose they are and what for.
//!
//! The hooks look every descriptor up that libibverbs reads, writes or closes, so a look-up is one uncontended
//! lock and a search. No lock is held while a callback runs. After a fork the child's entries are *inherited*:
//! their descriptors are the parent's too, and what the parent is told through them is not the child's to take.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, c_int};
use std::mem::ManuallyDrop;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::CommandChannel;
use crate::device::is_ours;
use crate::ucma::Manager;

/// What a descriptor of an opened device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// `ibv_context.cmd_fd`.
    Command,
    /// `ibv_context.async_fd`.
    Async,
    /// `ibv_comp_channel.fd`.
    Completion,
    /// `rdma_event_channel.fd`.
    EventChannel,
}

/// Whose a descriptor is.
pub(crate) enum Owner {
    /// A device that this process opened.
    Live(Arc<dyn CommandChannel>),
    /// A device that the parent opened before it forked this process.
    Inherited,
}

struct Entry {
    role: Role,
    generation: u64,
    /// Dropped only in the process that made it: the drop of an inherited one would speak for the parent.
    channel: ManuallyDrop<Arc<dyn CommandChannel>>,
}

impl Entry {
    fn owner(&self) -> Owner {
        if self.generation == GENERATION.load(Ordering::Relaxed) {
            Owner::Live(Arc::clone(&self.channel))
        } else {
            Owner::Inherited
        }
    }

    fn into_owner(self) -> Owner {
        if self.generation == GENERATION.load(Ordering::Relaxed) {
            Owner::Live(ManuallyDrop::into_inner(self.channel))
        } else {
            Owner::Inherited
        }
    }
}

struct Registry {
    descriptors: BTreeMap<RawFd, Entry>,
    /// The command descriptors of the live devices, oldest first.
    opened: Vec<RawFd>,
    /// The sysfs directories of our devices, each with a slash at its end.
    directories: Vec<CString>,
    manager: Option<Shared>,
}

/// The connection to the connection manager, for all who use it.
struct Shared {
    /// As in [`Entry`].
    manager: ManuallyDrop<Arc<Manager>>,
    generation: u64,
    users: usize,
}

impl Shared {
    /// What is left to drop of one that is not used any more.
    fn into_manager(self) -> Option<Arc<Manager>> {
        let ours = self.generation == GENERATION.load(Ordering::Relaxed);
        ours.then(|| ManuallyDrop::into_inner(self.manager))
    }
}

static REGISTRY: RwLock<Registry> = RwLock::new(Registry {
    descriptors: BTreeMap::new(),
    opened: Vec::new(),
    directories: Vec::new(),
    manager: None,
});

/// How many forks lie between this process and the one that loaded the provider.
static GENERATION: AtomicU64 = AtomicU64::new(0);

fn read() -> RwLockReadGuard<'static, Registry> {
    REGISTRY.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Registry> {
    REGISTRY.write().unwrap_or_else(PoisonError::into_inner)
}

/// Enters the two descriptors of a newly opened device.
pub(crate) fn opened(command: RawFd, events: RawFd, channel: &Arc<dyn CommandChannel>) {
    enter(command, Role::Command, channel);
    enter(events, Role::Async, channel);
    write().opened.push(command);
}

/// Enters a descriptor. An older entry of the same number is stale (closed behind libibverbs' back) and goes.
pub(crate) fn enter(fd: RawFd, role: Role, channel: &Arc<dyn CommandChannel>) {
    let generation = GENERATION.load(Ordering::Relaxed);
    let entry = Entry { role, generation, channel: ManuallyDrop::new(Arc::clone(channel)) };
    let stale = write().descriptors.insert(fd, entry);
    drop(stale.map(Entry::into_owner));
}

/// What this descriptor is, if it is one of ours.
pub(crate) fn look_up(fd: RawFd) -> Option<(Role, Owner)> {
    read().descriptors.get(&fd).map(|entry| (entry.role, entry.owner()))
}

/// Takes a descriptor out; it is about to be closed.
pub(crate) fn remove(fd: RawFd) -> Option<(Role, Owner)> {
    if !read().descriptors.contains_key(&fd) {
        return None;
    }
    let mut registry = write();
    let entry = registry.descriptors.remove(&fd)?;
    if entry.role == Role::Command {
        registry.opened.retain(|&command| command != fd);
    }
    drop(registry);
    Some((entry.role, entry.into_owner()))
}

/// The same if it is used for this.
pub(crate) fn remove_if(fd: RawFd, role: Role) -> Option<(Role, Owner)> {
    let known = read().descriptors.get(&fd).is_some_and(|entry| entry.role == role);
    if known { remove(fd) } else { None }
}

/// One more user of the process's connection to the connection manager: of the one there is, else of `new`.
pub(crate) fn join_manager(new: Option<Arc<Manager>>) -> Option<Arc<Manager>> {
    let mut registry = write();
    let generation = GENERATION.load(Ordering::Relaxed);
    if let Some(shared) = registry.manager.as_mut()
        && shared.generation == generation
        && shared.manager.is_usable()
    {
        shared.users += 1;
        return Some(Arc::clone(&shared.manager));
    }
    let manager = new?;
    let shared = Shared { manager: ManuallyDrop::new(Arc::clone(&manager)), generation, users: 1 };
    let old = registry.manager.replace(shared);
    drop(registry);
    drop(old.and_then(Shared::into_manager));
    Some(manager)
}

/// One user less.
pub(crate) fn leave_manager(manager: &Manager) {
    let mut registry = write();
    let Some(shared) = registry.manager.as_mut().filter(|shared| ptr::eq(&**shared.manager, manager)) else {
        return;
    };
    shared.users -= 1;
    let last = if shared.users == 0 { registry.manager.take() } else { None };
    drop(registry);
    drop(last.and_then(Shared::into_manager));
}

/// The device whose command descriptor this is a copy of, in this process.
pub(crate) fn device_of_copy(fd: RawFd) -> Option<Arc<dyn CommandChannel>> {
    let registry = read();
    let mut commands = registry.descriptors.iter().filter(|(_, entry)| entry.role == Role::Command);
    let (_, entry) = commands.find(|(known, _)| is_same_file(**known, fd))?;
    match entry.owner() {
        Owner::Live(channel) => Some(channel),
        Owner::Inherited => None,
    }
}

/// Whether both descriptors are of one open file. False where the kernel does not say.
fn is_same_file(a: RawFd, b: RawFd) -> bool {
    const KCMP_FILE: c_int = 0;
    let pid = std::process::id();
    // SAFETY: the call compares numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, a, b) == 0 }
}

/// The device opened last of those that are still open.
pub(crate) fn newest() -> Option<Arc<dyn CommandChannel>> {
    let registry = read();
    registry.opened.iter().rev().find_map(|command| match registry.descriptors.get(command)?.owner() {
        Owner::Live(channel) => Some(channel),
        Owner::Inherited => None,
    })
}

/// Makes the sysfs directory of a device known.
pub(crate) fn add_directory(path: &[u8]) {
    let Ok(directory) = CString::new([path, b"/"].concat()) else { return };
    let mut registry = write();
    if !registry.directories.contains(&directory) {
        registry.directories.push(directory);
    }
}

/// Whether there are devices beside ours where libibverbs looks for them.
pub(crate) fn has_other_devices() -> bool {
    let registry = read();
    let mut directories = registry.directories.iter().map(|d| Path::new(OsStr::from_bytes(d.as_bytes())));
    directories.any(|ours| {
        let class = ours.parent().and_then(|class| std::fs::read_dir(class).ok());
        class.into_iter().flatten().flatten().any(|entry| !is_ours(entry.file_name().as_bytes()))
    })
}

/// The part of a path below the sysfs directory of one of our devices.
pub(crate) fn below_device(path: &[u8]) -> Option<&str> {
    let registry = read();
    let mut below = registry.directories.iter().filter_map(|d| path.strip_prefix(d.as_bytes()));
    std::str::from_utf8(below.next()?).ok()
}

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

/// Makes the registry survive forks, from now on.
pub(crate) fn guard_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers have the right type, and this library is never unloaded.
        unsafe { pthread_atfork(Some(before_fork), Some(after_fork), Some(in_child)) };
    });
}

/// The write lock during a fork: so that the child does not inherit it from a thread that it lacks.
struct Held(UnsafeCell<Option<RwLockWriteGuard<'static, Registry>>>);

// SAFETY: the cell is touched between `before_fork` and the handler after the fork only, by the thread that forks
// and so holds the registry's write lock, and by its copy in the child.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

extern "C" fn before_fork() {
    let guard = write();
    // SAFETY: the write lock is held, see `Held`.
    unsafe { *HELD.0.get() = Some(guard) }
}

extern "C" fn after_fork() {
    // SAFETY: the thread that ran `before_fork` still holds the write lock, see `Held`.
    let guard = unsafe { (*HELD.0.get()).take() };
    drop(guard);
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    after_fork();
}
