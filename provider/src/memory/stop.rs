//! Stops all other threads of this process, so that pages can change their place without losing a write.
//!
//! A helper does it: a task that shares this process' memory and descriptors but is no thread of it, and so may trace
//! its threads. A traced thread that is interrupted stops on its way to the program, with nothing half written by it
//! or by the kernel on its behalf, and later goes on as if nothing had been: no handler runs, `read`, `nanosleep`, `poll`
//! and most other calls are resumed by the kernel (`epoll_wait` may say EINTR, a long `write` may end early, as when
//! a debugger attaches). A signal would cut them short, and the program may block it.
//!
//! Where threads cannot be traced (a debugger is there first, or the system forbids it), or one does not stop in time,
//! nobody is stopped. While others are stopped nothing here allocates or takes a lock: one of them may hold it.

use std::ffi::{c_int, c_long, c_void};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;

/// How long threads may take to stop. One that waits for a slow disk, or does not get a core, may take longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Looks at a thread that is about to stop before each further look is preceded by a nap.
const SPINS: usize = 64;

/// Most threads that can be stopped.
const MAX_THREADS: usize = 16 << 10;

/// Room for the helper's few frames.
const STACK: usize = 64 << 10;

/// Other threads of this process, stopped until this is dropped.
#[derive(Debug)]
pub(super) struct Stopped {
    room: ptr::NonNull<Room>,
    helper: c_int,
    /// What lists the threads. The helper uses its number.
    _tasks: OwnedFd,
}

/// Where the helper stands. Each step is taken by one side.
mod step {
    /// The helper waits for permission.
    pub(super) const MADE: u32 = 0;
    /// It stops threads.
    pub(super) const STOPPING: u32 = 1;
    /// All threads are stopped.
    pub(super) const STOPPED: u32 = 2;
    /// They could not be stopped.
    pub(super) const FAILED: u32 = 3;
    /// They are to go on, and the helper to end.
    pub(super) const OVER: u32 = 4;
}

/// What both sides know: a mapping of its own, with the helper's stack behind it.
struct Room {
    step: AtomicU32,
    /// The helper's number while it lives; the kernel clears it at its end.
    alive: AtomicU32,
    /// Why it failed.
    error: AtomicI32,
    parent: c_int,
    caller: c_int,
    tasks: RawFd,
    count: usize,
    threads: [Thread; MAX_THREADS],
}

#[derive(Clone, Copy)]
struct Thread {
    number: c_int,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// In front of this signal, or of none.
    Stopped(c_int),
    Gone,
}

const ROOM_LEN: usize = size_of::<Room>().next_multiple_of(4096) + STACK;

impl Stopped {
    /// Stops all threads of this process but the calling one, whose signals must be blocked.
    pub(super) fn others() -> Result<Stopped, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = rustix::fs::open(c"/proc/self/task", flags, Mode::empty())?;
        let room = Room::new(tasks.as_raw_fd())?;
        let helper = Room::start_helper(room)?;
        let stopped = Stopped { room, helper, _tasks: tasks };
        let room = stopped.room();
        let asked = yama_wants_consent() && consent(helper);
        room.advance(step::STOPPING);
        let end = room.wait_while_alive(step::STOPPING);
        if asked {
            consent(0);
        }
        match end {
            step::STOPPED => Ok(stopped),
            step::FAILED => Err(Errno::from_raw_os_error(room.error.load(Ordering::Relaxed))),
            _ => Err(Errno::SRCH),
        }
    }

    fn room(&self) -> &Room {
        // SAFETY: the mapping lives as long as the value; what both sides change while both run is atomic.
        unsafe { self.room.as_ref() }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let room = self.room();
        room.advance(step::OVER);
        // Its stack can go when the kernel says that it is gone.
        loop {
            let alive = room.alive.load(Ordering::Acquire);
            if alive == 0 {
                break;
            }
            // The kernel's own wake-up at a task's end is not a private one.
            let _ = futex::wait(&room.alive, futex::Flags::empty(), alive, None);
        }
        // SAFETY: the helper is a child of this thread and sends no signal at its end, so nobody else waits for it.
        unsafe { libc::syscall(libc::SYS_wait4, self.helper, ptr::null_mut::<c_int>(), libc::__WALL, 0) };
        // SAFETY: made by `Room::new`; the helper is gone and the value ends here.
        let _ = unsafe { rustix::mm::munmap(self.room.as_ptr().cast(), ROOM_LEN) };
    }
}

impl Room {
    fn new(tasks: RawFd) -> Result<ptr::NonNull<Room>, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let room = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), ROOM_LEN, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        let room = room.cast::<Room>();
        // SAFETY: the mapping is new, page-aligned, larger than a room, and all zeros, which are a valid one.
        unsafe {
            (*room).parent = libc::getpid();
            (*room).caller = rustix::thread::gettid().as_raw_nonzero().get();
            (*room).tasks = tasks;
        }
        Ok(ptr::NonNull::new(room).expect("mmap does not map address 0 unless asked"))
    }

    /// Starts the helper, which waits for [`step::STOPPING`]. Takes the room back on an error.
    fn start_helper(room: ptr::NonNull<Room>) -> Result<c_int, Errno> {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_UNTRACED
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID;
        // SAFETY: the helper runs on the end of the room, which stays until it is gone; the two words that the kernel
        // writes lie in it. Without a signal for its end it is invisible to the program's own waits.
        let helper = unsafe {
            let alive = (&raw mut (*room.as_ptr()).alive).cast::<c_int>();
            let stack = room.as_ptr().byte_add(ROOM_LEN).cast::<c_void>();
            libc::clone(helper, stack, flags, room.as_ptr().cast(), alive, ptr::null_mut::<c_void>(), alive)
        };
        if helper > 0 {
            return Ok(helper);
        }
        let error = last_error();
        // SAFETY: made by `new`, and nobody else knows it.
        let _ = unsafe { rustix::mm::munmap(room.as_ptr().cast(), ROOM_LEN) };
        Err(error)
    }

    fn advance(&self, to: u32) {
        self.step.store(to, Ordering::Release);
        let _ = futex::wake(&self.step, futex::Flags::PRIVATE, 1);
    }

    /// The caller's wait, which ends with the helper should somebody kill that.
    fn wait_while_alive(&self, current: u32) -> u32 {
        const LOOK: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        loop {
            let now = self.step.load(Ordering::Acquire);
            if now != current || self.alive.load(Ordering::Acquire) == 0 {
                return now;
            }
            let _ = futex::wait(&self.step, futex::Flags::PRIVATE, current, Some(&LOOK));
        }
    }

    fn wait_while(&self, current: u32) {
        while self.step.load(Ordering::Acquire) == current {
            let _ = futex::wait(&self.step, futex::Flags::PRIVATE, current, None);
        }
    }
}

/// The helper. Shares the caller's thread-local storage, so it may set `errno` only while the caller waits.
extern "C" fn helper(room: *mut c_void) -> c_int {
    let room = room.cast::<Room>();
    // SAFETY: the room outlives the helper; the list of threads is the helper's alone, and apart from the words that
    // the caller looks at.
    let (shared, threads, count) = unsafe { (&*room, &raw mut (*room).threads, &raw mut (*room).count) };
    // Should the caller be killed, its process is, and this task must not stay.
    // SAFETY: a plain request about this task.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    // SAFETY: no arguments.
    if unsafe { libc::syscall(libc::SYS_getppid) } != c_long::from(shared.parent) {
        return 1;
    }
    shared.wait_while(step::MADE);
    // SAFETY: see above; the array has room for what is counted.
    let mut list = unsafe { List { threads: &mut *threads, count: &mut *count } };
    let end = match list.stop_all(shared.tasks, shared.caller) {
        Ok(()) => step::STOPPED,
        Err(error) => {
            shared.error.store(error.raw_os_error(), Ordering::Relaxed);
            step::FAILED
        }
    };
    shared.advance(end);
    shared.wait_while(end);
    list.resume_all();
    0
}

/// The threads that the helper traces.
struct List<'a> {
    threads: &'a mut [Thread; MAX_THREADS],
    count: &'a mut usize,
}

impl List<'_> {
    /// Stops all threads but `caller`. A running thread may start others, so it is done when a look at all of them
    /// finds none that is not stopped.
    fn stop_all(&mut self, tasks: RawFd, caller: c_int) -> Result<(), Errno> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = *self.count;
            self.seize_new(tasks, caller)?;
            if *self.count == before {
                return Ok(());
            }
            for thread in &mut self.threads[before..*self.count] {
                thread.wait_until_stopped(deadline)?;
            }
        }
    }

    fn seize_new(&mut self, tasks: RawFd, caller: c_int) -> Result<(), Errno> {
        // SAFETY: the caller keeps it open until the helper is gone.
        let tasks = unsafe { BorrowedFd::borrow_raw(tasks) };
        rustix::fs::seek(tasks, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 2048];
        let mut entries = RawDir::new(tasks, &mut buffer);
        while let Some(entry) = entries.next() {
            let Some(number) = number(entry?.file_name().to_bytes()) else { continue };
            if number != caller && !self.threads[..*self.count].iter().any(|known| known.number == number) {
                self.seize(tasks, number)?;
            }
        }
        Ok(())
    }

    fn seize(&mut self, tasks: BorrowedFd<'_>, number: c_int) -> Result<(), Errno> {
        let slot = self.threads.get_mut(*self.count).ok_or(Errno::NOMEM)?;
        match ptrace(PTRACE_SEIZE, number, 0) {
            Ok(()) => {}
            // It has ended, or lies dead until its siblings have: neither can write.
            Err(Errno::SRCH) => return Ok(()),
            Err(Errno::PERM) if is_dead(tasks, number) => return Ok(()),
            Err(error) => return Err(error),
        }
        *slot = Thread { number, state: State::Running };
        *self.count += 1;
        match ptrace(PTRACE_INTERRUPT, number, 0) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn resume_all(&self) {
        for thread in &self.threads[..*self.count] {
            // One that never stopped cannot be let go in so many words; the end of this task does it.
            if let State::Stopped(signal) = thread.state {
                let _ = ptrace(PTRACE_DETACH, thread.number, signal);
            }
        }
    }
}

impl Thread {
    fn wait_until_stopped(&mut self, deadline: Instant) -> Result<(), Errno> {
        let mut looks = 0;
        while self.state == State::Running {
            self.state = self.look()?;
            looks += 1;
            if self.state != State::Running {
            } else if looks < SPINS {
                rustix::thread::sched_yield();
            } else if Instant::now() > deadline {
                return Err(Errno::TIMEDOUT);
            } else {
                let nap = rustix::thread::Timespec { tv_sec: 0, tv_nsec: 100_000 };
                let _ = rustix::thread::nanosleep(&nap);
            }
        }
        Ok(())
    }

    fn look(&self) -> Result<State, Errno> {
        /// What a stop that no signal caused has in the upper half of its status.
        const EVENT_STOP: c_int = 128;
        let mut status: c_int = 0;
        let how = libc::__WALL | libc::WNOHANG;
        // SAFETY: the status is a live word; nobody else waits for threads that this task traces.
        let got = unsafe { libc::syscall(libc::SYS_wait4, self.number, &raw mut status, how, 0) };
        match got {
            0 => Ok(State::Running),
            found if found == c_long::from(self.number) => Ok(match libc::WIFSTOPPED(status) {
                true if status >> 16 == EVENT_STOP => State::Stopped(0),
                true => State::Stopped(libc::WSTOPSIG(status)),
                false => State::Gone,
            }),
            _ => match last_error() {
                Errno::CHILD => Ok(State::Gone),
                Errno::INTR => Ok(State::Running),
                error => Err(error),
            },
        }
    }
}

/// Requests of `linux/ptrace.h`.
const PTRACE_DETACH: c_long = 17;
const PTRACE_SEIZE: c_long = 0x4206;
const PTRACE_INTERRUPT: c_long = 0x4207;

fn ptrace(request: c_long, thread: c_int, data: c_int) -> Result<(), Errno> {
    // SAFETY: these requests read and write no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_ptrace, request, thread, 0_usize, c_long::from(data)) };
    if done < 0 { Err(last_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The number that a name of `/proc/PID/task` is.
fn number(name: &[u8]) -> Option<c_int> {
    let digit = |value: c_int, byte: &u8| {
        byte.is_ascii_digit().then(|| value.checked_mul(10)?.checked_add(c_int::from(byte - b'0'))).flatten()
    };
    if name.is_empty() { None } else { name.iter().try_fold(0, digit) }
}

/// Whether a thread is dead but not yet gone, by the third word of its `stat`.
fn is_dead(tasks: BorrowedFd<'_>, number: c_int) -> bool {
    let mut name = [0u8; 24];
    let mut at = 0;
    let mut digits = [0u8; 10];
    let mut rest = number.unsigned_abs();
    while at == 0 || rest > 0 {
        digits[at] = b'0' + (rest % 10) as u8;
        (rest, at) = (rest / 10, at + 1);
    }
    for (to, digit) in name.iter_mut().zip(digits[..at].iter().rev()) {
        *to = *digit;
    }
    name[at..at + 5].copy_from_slice(b"/stat");
    let Ok(path) = std::ffi::CStr::from_bytes_until_nul(&name) else { return false };
    let Ok(stat) = rustix::fs::openat(tasks, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return true;
    };
    let mut text = [0u8; 256];
    let Ok(len) = rustix::io::read(&stat, &mut text) else { return true };
    // The name in parentheses may hold anything.
    let state = text[..len].iter().rposition(|&byte| byte == b')').and_then(|end| text[..len].get(end + 2));
    matches!(state, Some(b'Z' | b'X'))
}

/// Whether only those whom a process names may trace it, children excepted: Yama's mode 1.
fn yama_wants_consent() -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut mode = [0u8];
    rustix::fs::open(c"/proc/sys/kernel/yama/ptrace_scope", flags, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut mode))
        .is_ok_and(|_| mode[0] == b'1')
}

/// Lets `tracer` trace this process, or with 0 nobody. Takes the place of what the program may have said itself.
fn consent(tracer: c_int) -> bool {
    // SAFETY: a plain request about this process.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PTRACER, c_long::from(tracer), 0, 0, 0) == 0 }
}

#[cfg(test)]
#[path = "tests/stop.rs"]
mod tests;
