//! Noticing the router's death: one thread a process, asleep in `poll` on the control sockets of its devices.
//!
//! It blocks all signals, lives while a device is open, and does nothing but tell a [`Mortal`] that its router is
//! gone, and a [`Timed`] that its time has come. A child of fork has no such thread and starts one of its own when it opens a device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::log::{self, Level};
use crate::memory;

/// Room for the thread's few frames and its thread-local storage.
const STACK: usize = 256 * 1024;

/// Descriptors that are watched without the heap.
const FEW: usize = 32;

/// The watch of this process; null before the first device, and again in a child of fork.
static WATCH: AtomicPtr<Watch> = AtomicPtr::new(ptr::null_mut());

#[derive(Debug)]
struct Watch {
    wake: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_ticket: u64,
    is_running: bool,
    watched: Vec<Watched>,
    timed: Vec<(Instant, Weak<dyn Timed>)>,
}

#[derive(Debug)]
struct Watched {
    ticket: u64,
    socket: RawFd,
    mortal: Weak<dyn Mortal>,
}

/// What ends with its router.
pub(crate) trait Mortal: std::fmt::Debug + Send + Sync {
    /// The router is gone.
    fn router_died(&self);
}

/// What waits for the clock.
pub(crate) trait Timed: std::fmt::Debug + Send + Sync {
    /// Its time may have come; says when to ask again.
    fn expire(&self, now: Instant) -> Option<Instant>;
}

/// Names a watched device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket(u64);

/// Starts to watch a device. Its socket must stay open until [`remove`].
pub(crate) fn add(mortal: &Arc<dyn Mortal>, socket: RawFd) -> io::Result<Ticket> {
    let watch = current()?;
    let mut state = watch.state();
    let ticket = state.next_ticket;
    state.next_ticket += 1;
    state.watched.push(Watched { ticket, socket, mortal: Arc::downgrade(mortal) });
    if state.is_running {
        watch.wake();
    } else {
        start(watch)?;
        state.is_running = true;
    }
    Ok(Ticket(ticket))
}

/// Stops watching a device. When it returns, the thread does not look at the socket any more.
pub(crate) fn remove(Ticket(ticket): Ticket) {
    // SAFETY: a watch, once made, is never freed.
    if let Some(watch) = unsafe { WATCH.load(Ordering::Acquire).as_ref() } {
        watch.state().watched.retain(|watched| watched.ticket != ticket);
        watch.wake();
    }
}

/// Calls [`Timed::expire`] then, and whenever that says. False: there is no thread that could.
pub(crate) fn at(when: Instant, timed: &Arc<dyn Timed>) -> bool {
    // SAFETY: a watch, once made, is never freed.
    let Some(watch) = (unsafe { WATCH.load(Ordering::Acquire).as_ref() }) else { return false };
    let mut state = watch.state();
    if !state.is_running {
        return false;
    }
    let is_next = state.timed.iter().all(|(other, _)| *other > when);
    state.timed.push((when, Arc::downgrade(timed)));
    if is_next {
        watch.wake();
    }
    true
}

fn current() -> io::Result<&'static Watch> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = memory::on_fork_child(forget));
    result?;
    // SAFETY: a watch, once made, is never freed.
    if let Some(watch) = unsafe { WATCH.load(Ordering::Acquire).as_ref() } {
        return Ok(watch);
    }
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let wake = crate::router_link::above_stdio(wake)?;
    let made = Box::into_raw(Box::new(Watch { wake, state: Mutex::default() }));
    match WATCH.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: made above and never freed.
        Ok(_) => Ok(unsafe { &*made }),
        Err(other) => {
            // SAFETY: made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(made) });
            // SAFETY: another thread's watch, never freed.
            Ok(unsafe { &*other })
        }
    }
}

/// In a child of fork: the parent's watch has no thread here, and its lock may be held by one that does not exist.
fn forget() {
    WATCH.store(ptr::null_mut(), Ordering::Release);
}

fn start(watch: &'static Watch) -> io::Result<()> {
    let builder = std::thread::Builder::new().name("freeflow-watch".to_owned()).stack_size(STACK);
    // Signals are the application's: no handler of its may run on this stack.
    let before = block_signals();
    let started = builder.spawn(move || watch.run());
    restore_signals(&before);
    started.map(drop)
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are initialised by the calls that are given them.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: the set that was in force before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, ptr::null_mut()) };
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        loop {
            let (sockets, next): (Vec<RawFd>, _) = {
                let mut state = self.state();
                if state.watched.is_empty() {
                    state.is_running = false;
                    state.timed.clear();
                    return;
                }
                let next = state.timed.iter().map(|(when, _)| *when).min();
                (state.watched.iter().map(|watched| watched.socket).collect(), next)
            };
            self.sleep(&sockets, next.map(|when| when.saturating_duration_since(Instant::now())));
            self.expire();
            for mortal in self.take_dead() {
                mortal.router_died();
            }
        }
    }

    /// Calls everybody whose time has come.
    fn expire(&self) {
        let now = Instant::now();
        let due: Vec<_> = self.state().timed.extract_if(.., |(when, _)| *when <= now).collect();
        for timed in due.into_iter().filter_map(|(_, timed)| timed.upgrade()) {
            if let Some(again) = timed.expire(now) {
                self.state().timed.push((again, Arc::downgrade(&timed)));
            }
        }
    }

    /// Sleeps until something happens to one of the sockets, for so long at the most, or until [`Self::wake`].
    ///
    /// A socket may be closed meanwhile, and its number be another's: then this returns too early, and `take_dead`
    /// looks again under the lock.
    fn sleep(&self, sockets: &[RawFd], most: Option<Duration>) {
        let entry = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        let own = entry(self.wake.as_raw_fd(), libc::POLLIN);
        let mut few = [own; FEW];
        let result = if sockets.len() < FEW {
            few[1..].iter_mut().zip(sockets).for_each(|(place, &fd)| *place = entry(fd, 0));
            // The kernel answers on this stack, so pages may be moved meanwhile as if this thread were not there.
            let _rest = memory::rest();
            wait(&mut few[..1 + sockets.len()], most)
        } else {
            let mut many = vec![own];
            many.extend(sockets.iter().map(|&fd| entry(fd, 0)));
            wait(&mut many, most)
        };
        if let Err(error) = result
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::say(Level::Warn, format_args!("cannot watch the router: {error}"));
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        let _ = rustix::io::read(self.wake.as_fd(), &mut [0; 8]);
    }

    /// Takes out the devices whose connection has ended.
    fn take_dead(&self) -> Vec<Arc<dyn Mortal>> {
        let mut dead = Vec::new();
        self.state().watched.retain(|watched| {
            let ended = has_ended(watched.socket);
            if ended {
                dead.extend(watched.mortal.upgrade());
            }
            !ended
        });
        dead
    }
}

/// Waits for one of the events, however long or for so long.
fn wait(fds: &mut [libc::pollfd], most: Option<Duration>) -> io::Result<()> {
    let most = most.map(|most| libc::timespec {
        tv_sec: most.as_secs() as libc::time_t,
        tv_nsec: most.subsec_nanos().into(),
    });
    let most = most.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: that many live entries; a descriptor that is none is answered in its entry. A live time or none.
    let count = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, most, ptr::null()) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the other end is gone. Called under the lock, so the socket is still the device's.
fn has_ended(socket: RawFd) -> bool {
    // SAFETY: `remove` comes before the socket is closed, and waits for the lock that the caller holds.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
}
