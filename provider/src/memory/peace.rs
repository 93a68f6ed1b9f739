//! Peace: while it lasts, nothing but the calling function runs in this process.
//!
//! Pages change their place in two steps, copy and switch; what another thread, or the kernel on its behalf, or a
//! signal handler of this thread, writes between the two would be lost. So signals are blocked, and other threads
//! stopped. A program without other threads pays two cheap system calls.
//!
//! Nobody may allocate or take a lock in it: a stopped thread may hold what that needs.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::stop::Stopped;
use super::world;
use crate::log::{self, Level};

/// How long after a failure no thread is asked to stop: failing takes time.
const PAUSE: Duration = Duration::from_secs(1);

/// How peace is made in this process.
#[derive(Debug)]
pub(super) struct PeaceMaker {
    /// Threads that touch nothing but their own stack, and wait for the world's lock before they touch more.
    pub(super) resting: usize,
    pub(super) not_before: Option<Instant>,
    /// Why it failed, until that is said; it is said once.
    failure: Option<Errno>,
    said: bool,
}

/// Says that the calling thread touches nothing but its own stack until this is dropped, which waits for moves that
/// are under way. Such a thread need not be stopped, and a program with no other is as good as single-threaded.
#[derive(Debug)]
pub(crate) struct Rest(());

/// Begins a rest.
pub(crate) fn rest() -> Rest {
    world::lock().books.peace.resting += 1;
    Rest(())
}

impl Drop for Rest {
    fn drop(&mut self) {
        let mut world = world::lock();
        // In a child of fork the count began anew.
        world.books.peace.resting = world.books.peace.resting.saturating_sub(1);
    }
}

/// Peace until this is dropped.
#[derive(Debug)]
pub(super) struct Peace {
    // Fields are dropped in this order: handlers run when threads do.
    _stopped: Option<Stopped>,
    _signals: BlockedSignals,
}

impl PeaceMaker {
    pub(super) const fn new() -> PeaceMaker {
        PeaceMaker { resting: 0, not_before: None, failure: None, said: false }
    }

    /// Makes peace, unless other threads cannot be stopped now.
    pub(super) fn make(&mut self) -> Result<Peace, Errno> {
        let signals = BlockedSignals::all();
        if is_alone_with(self.resting) {
            return Ok(Peace { _stopped: None, _signals: signals });
        }
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return Err(Errno::AGAIN);
        }
        match Stopped::others() {
            Ok(stopped) => Ok(Peace { _stopped: Some(stopped), _signals: signals }),
            Err(error) => {
                self.not_before = Some(Instant::now() + PAUSE);
                self.failure = Some(error);
                Err(error)
            }
        }
    }

    /// Says, once a process, that there was no peace.
    pub(super) fn complain(&mut self) {
        if let Some(error) = self.failure.take()
            && !std::mem::replace(&mut self.said, true)
        {
            log::say(
                Level::Warn,
                format_args!(
                    "the program's threads cannot be stopped for a moment ({error}), so registered memory stays where \
                     it is and is served more slowly; allow this process to trace itself (ptrace)"
                ),
            );
        }
    }
}

/// Whether the calling thread is the only one but for `resting` others. Its links count the directories of threads.
fn is_alone_with(resting: usize) -> bool {
    rustix::fs::stat(c"/proc/self/task").is_ok_and(|stat| stat.st_nlink as usize == 3 + resting)
}

/// The calling thread's signals, blocked until this is dropped, those of the C library included.
#[derive(Debug)]
struct BlockedSignals {
    before: u64,
}

/// Bytes of a signal set as the kernel has it.
const SET_LEN: usize = 8;

impl BlockedSignals {
    fn all() -> BlockedSignals {
        let (all, mut before) = (u64::MAX, 0u64);
        // SAFETY: two live sets of the stated length. The raw call, because the C library spares its own signals.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const all,
                &raw mut before,
                SET_LEN,
            )
        };
        BlockedSignals { before }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let before = &raw const self.before;
        // SAFETY: the set that was in force before.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                before,
                std::ptr::null_mut::<u64>(),
                SET_LEN,
            )
        };
    }
}
