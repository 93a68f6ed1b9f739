//! fork: the child gets private copies of moved pages at their addresses, and its movers are dead.
//!
//! Moved pages are not inherited (`MADV_DONTFORK`), because they are shared: a child that wrote to them would write
//! into its parent's memory. So before a fork the moved pages are listed, the child maps private memory there and
//! reads the content from the region files, and the parent waits until that is done, so that the child sees the
//! memory as it was. A raw `clone` runs no handlers: its child has no such pages. `vfork` and `posix_spawn` share
//! the parent's address space and need nothing.
//!
//! Between the fork and the end of the copy the child calls nothing but the kernel, and reads no memory but its
//! stack, this library's static data and the list, which is a mapping of its own: anything else might lie in a
//! missing page.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, mem, ptr, slice};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::pipe::PipeFlags;

use super::maps::{self, EVERYTHING};
use super::region::{copy_data, pointer, protect};
use super::world::{self, World};

/// Most bytes of moved memory that a child gets a copy of. What is beyond stays unmapped in it.
const COPY_LIMIT: usize = 1 << 30;

/// How long a parent waits for its child's copy. A child that is stopped meanwhile sees later content.
const PATIENCE: Duration = Duration::from_secs(5);

unsafe extern "C" {
    /// What `pthread_atfork` of glibc is made of. That one is linked statically in older releases, this one is in
    /// every `libc.so.6`.
    fn __register_atfork(
        prepare: Option<unsafe extern "C" fn()>,
        parent: Option<unsafe extern "C" fn()>,
        child: Option<unsafe extern "C" fn()>,
        dso_handle: *mut c_void,
    ) -> c_int;
}

/// Counts the forks between the first process and this one.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// How many forks lie behind this process. What was made under another number belongs to a parent.
pub(super) fn generation() -> u64 {
    GENERATION.load(Ordering::Relaxed)
}

/// Registers the handlers, once in the life of the process.
///
/// They are never taken back, so this library must not be unloaded.
pub(super) fn install() -> io::Result<()> {
    static RESULT: OnceLock<c_int> = OnceLock::new();
    // SAFETY: the handlers are functions of this library, which stays loaded; a null handle says that they belong
    // to no library whose unloading would remove them.
    let result = *RESULT.get_or_init(|| unsafe {
        __register_atfork(Some(before), Some(after_in_parent), Some(after_in_child), ptr::null_mut())
    });
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Has `callback` called in each child of `fork`, after its copies of moved memory are made. By then every
/// [`super::Mover`] of the parent is dead; the callback does the same to what rests on them. It must not touch the
/// parent's connections.
pub fn on_fork_child(callback: fn()) -> io::Result<()> {
    install()?;
    world::lock().fork_callbacks.push(callback);
    Ok(())
}

/// What is kept from the handler before the fork to the one after it.
struct Held {
    world: MutexGuard<'static, World>,
    list: List,
    pipe: Option<(OwnedFd, OwnedFd)>,
}

struct HeldCell(UnsafeCell<Option<Held>>);

// SAFETY: touched only while the world's lock is held, which the cell's own content does; and only by the forking
// thread and its image in the child.
unsafe impl Sync for HeldCell {}

static HELD: HeldCell = HeldCell(UnsafeCell::new(None));

unsafe extern "C" fn before() {
    let world = world::lock();
    // `ibv_fork_init` keeps the pages of all registered memory from children. Pages that were not moved may well go
    // there: a router reaches the parent's through the parent's page tables, and the child's are its own.
    world.books.staying.ranges().for_each(|range| advise(&range, Advice::LinuxDoFork));
    let list = List::draw(&world);
    // Whatever the program or libibverbs advised since these were moved.
    list.entries()
        .iter()
        .for_each(|entry| advise(&(entry.start..entry.start + entry.len), Advice::LinuxDontFork));
    // Without a pipe (no descriptor left) the parent does not wait, and the copy may be of a later moment.
    let pipe = if list.is_empty() { None } else { rustix::pipe::pipe_with(PipeFlags::CLOEXEC).ok() };
    // SAFETY: the lock was taken above, so no other thread is between its handlers.
    unsafe { *HELD.0.get() = Some(Held { world, list, pipe }) };
}

unsafe extern "C" fn after_in_parent() {
    // SAFETY: this thread filled the cell in `before` and still holds the lock.
    let Some(held) = (unsafe { (*HELD.0.get()).take() }) else { return };
    if let Some((reader, writer)) = held.pipe {
        // With the child's end the only one left, its death ends the wait too.
        drop(writer);
        wait_for_end(&reader);
    }
    held.list.discard();
    drop(held.world);
}

unsafe extern "C" fn after_in_child() {
    // SAFETY: this thread is the image of the one that filled the cell, and the only one here.
    let Some(mut held) = (unsafe { (*HELD.0.get()).take() }) else { return };
    held.world.books.peace.resting = 0;
    GENERATION.fetch_add(1, Ordering::Relaxed);
    held.list.copy_all();
    drop(held.pipe);
    held.list.discard();
    drop(held.world);
    let mut index = 0;
    // The lock is not held in a callback, so that it may use movers.
    while let Some(callback) = next_callback(index) {
        callback();
        index += 1;
    }
}

fn next_callback(index: usize) -> Option<fn()> {
    world::lock().fork_callbacks.get(index).copied()
}

/// Waits until the last writer of the pipe is gone, but not for ever.
fn wait_for_end(reader: &OwnedFd) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) if !left.is_zero() => {}
            _ => return,
        }
    }
}

/// A stretch of moved pages that the child will miss.
#[derive(Clone, Copy)]
struct Entry {
    start: usize,
    len: usize,
    offset: usize,
    prot: ProtFlags,
    region: RawFd,
}

/// The stretches of moved pages, in a mapping that no registration can have moved.
struct List {
    entries: *mut Entry,
    count: usize,
}

impl List {
    /// Lists what all movers of this process have moved. Empty when that cannot be known: the child then misses
    /// the pages, which is better than sharing them.
    fn draw(world: &World) -> List {
        let nothing = List { entries: ptr::null_mut(), count: 0 };
        let here = generation();
        let busy =
            world.holdings.values().filter(|holding| holding.generation == here && !holding.is_empty());
        let regions: Vec<_> = busy.map(|holding| &holding.region).collect();
        if regions.is_empty() {
            return nothing;
        }
        let mut entries: Vec<Entry> = Vec::new();
        let listed = maps::select(&EVERYTHING, |mapping| {
            let known = regions.iter().find(|region| region.is_shown_by(mapping));
            if let Some(region) = known.filter(|_| !world.books.views.cover(mapping.range.start)) {
                entries.push(Entry {
                    start: mapping.range.start,
                    len: mapping.range.len(),
                    offset: mapping.offset as usize,
                    prot: mapping.prot,
                    region: region.as_fd().as_raw_fd(),
                });
            }
            false
        });
        if listed.is_err() { nothing } else { List::store(&entries).unwrap_or(nothing) }
    }

    fn store(entries: &[Entry]) -> Option<List> {
        if entries.is_empty() {
            return None;
        }
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let room = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                mem::size_of_val(entries),
                writable,
                MapFlags::PRIVATE,
            )
        };
        let room = room.ok()?.cast::<Entry>();
        // SAFETY: the mapping is new, page-aligned and as large as the entries, which are plain data.
        unsafe { ptr::copy_nonoverlapping(entries.as_ptr(), room, entries.len()) };
        Some(List { entries: room, count: entries.len() })
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn entries(&self) -> &[Entry] {
        if self.is_empty() {
            return &[];
        }
        // SAFETY: `store` filled that many entries, which stay until the list is discarded; a child inherits them.
        unsafe { slice::from_raw_parts(self.entries, self.count) }
    }

    /// In the child: makes private copies, as far as the limit allows.
    fn copy_all(&self) {
        let mut budget = COPY_LIMIT;
        for entry in self.entries() {
            // One that fails stays unmapped; the others need not.
            budget -= entry.copy(budget).unwrap_or(0);
        }
    }

    fn discard(self) {
        if !self.is_empty() {
            // SAFETY: the mapping was made by `store` and nobody keeps a reference into it.
            let _ = unsafe { rustix::mm::munmap(self.entries.cast(), self.count * mem::size_of::<Entry>()) };
        }
    }
}

impl Entry {
    /// Maps private memory and reads up to `budget` bytes into it; what the budget does not cover is unmapped
    /// again. Returns how much was read.
    fn copy(&self, budget: usize) -> Result<usize, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: the parent's pages here were not inherited, so the place is free; should another handler have
        // mapped something meanwhile, the kernel refuses, or an old one answers with another address.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                pointer(self.start),
                self.len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        let range = mapped as usize..mapped as usize + self.len;
        if range.start != self.start {
            unmap(range)?;
            return Err(Errno::EXIST);
        }
        // SAFETY: the descriptor was open in the parent, under the lock that keeps its mover alive, and the child
        // inherited it.
        let region = unsafe { BorrowedFd::borrow_raw(self.region) };
        let copied = copy_data(region, self.offset, &range, budget);
        let done = match copied {
            Ok((_, None)) => range.end,
            Ok((_, Some(end))) => end,
            Err(_) => range.start,
        };
        if done > range.start {
            protect(&(range.start..done), self.prot)?;
        }
        if done < range.end {
            unmap(done..range.end)?;
        }
        copied.map(|(bytes, _)| bytes)
    }
}

/// Says what fork does with a range. Parts that are not mapped, or of a kind that takes no advice, do not matter.
fn advise(range: &Range<usize>, advice: Advice) {
    // SAFETY: the two advices that are used change only what a child gets.
    let _ = unsafe { rustix::mm::madvise(pointer(range.start), range.len(), advice) };
}

/// Unmaps what this module mapped.
fn unmap(range: Range<usize>) -> Result<(), Errno> {
    // SAFETY: callers name mappings that they made just now.
    unsafe { rustix::mm::munmap(pointer(range.start), range.len()) }
}
