//! The data path's thread, and the fabric it shares with the control thread.
//!
//! ```text
//! awake:  lock, collect doorbells, run a few turns, unlock; again while there is work
//! asleep: flag on the lane page, one more look, then epoll: doorbell eventfds, control eventfd, timer
//! ```
//!
//! Nothing a client does can stop a lane: doorbells are never read (edge-triggered: a client could take the
//! count away between the look and the read), clients are rung without waiting (`bell`).
//! Leaves to others: what a turn does (engine), what clients ask for (sessions).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use engine::Fabric;
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
        timerfd_create, timerfd_settime,
    },
};
use verbs_abi::shm::lane::LanePage;

use crate::{memory::ClientMemory, segment};

/// Turns with the fabric locked, after which others get it.
const TURNS: u32 = 16;
/// How long a lane looks for work before it sleeps, where it has a core to itself.
const SPIN: Duration = Duration::from_micros(50);
/// Cores from which on a lane may spin. With fewer it would take the core of those it waits for.
const CORES_TO_SPIN: usize = 4;
/// Priority of the lane, where it is permitted: it runs at once when clients that spin ring it.
const NICE: libc::c_int = -10;

/// A lane and its fabric.
#[derive(Debug)]
pub(crate) struct Lane {
    fabric: Mutex<Fabric<ClientMemory>>,
    /// Others that wait for the fabric.
    waiters: AtomicUsize,
    page: LanePage,
    page_file: OwnedFd,
    epoll: OwnedFd,
    control: OwnedFd,
    timer: OwnedFd,
    stopping: AtomicBool,
    sleeps: AtomicU64,
}

impl Lane {
    /// A lane that does not run yet.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let (page, page_file) = segment::lane_page()?;
        let lane = Self {
            fabric: Mutex::new(Fabric::new()),
            waiters: AtomicUsize::new(0),
            page,
            page_file,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            control: doorbell()?,
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?,
            stopping: AtomicBool::new(false),
            sleeps: AtomicU64::new(0),
        };
        lane.watch(&lane.control)?;
        lane.watch(&lane.timer)?;
        Ok(Arc::new(lane))
    }

    /// Starts the thread. `ended` is dropped when it ends, for whatever reason.
    pub(crate) fn start(self: &Arc<Self>, ended: impl Send + 'static) -> io::Result<JoinHandle<()>> {
        let lane = Arc::clone(self);
        thread::Builder::new().name("lane-0".to_owned()).spawn(move || {
            let _ended = ended;
            lane.serve();
        })
    }

    /// Ends the thread soon.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.nudge();
    }

    /// Does something to the fabric between two turns, and lets the lane see what follows from it.
    pub(crate) fn with<R>(&self, change: impl FnOnce(&mut Fabric<ClientMemory>) -> R) -> R {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let mut fabric = self.fabric.lock();
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        let result = change(&mut fabric);
        drop(fabric);
        // The lane sets the flag before its last look under the lock: it has seen the change, or we see the flag.
        if self.page.is_asleep() {
            self.nudge();
        }
        result
    }

    /// Wakes the lane when this eventfd is written to. It is not read; closing every copy of it ends this.
    pub(crate) fn watch(&self, doorbell: impl AsFd) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, doorbell, epoll::EventData::new_u64(0), flags)?)
    }

    /// Ends [`Self::watch`].
    pub(crate) fn unwatch(&self, doorbell: impl AsFd) {
        // It was added, and a failure could only mean that it is gone.
        let _ = epoll::delete(&self.epoll, doorbell);
    }

    /// The lane page for clients.
    pub(crate) fn page_file(&self) -> BorrowedFd<'_> {
        self.page_file.as_fd()
    }

    /// Times the lane went to sleep.
    pub(crate) fn sleeps(&self) -> u64 {
        self.sleeps.load(Ordering::Relaxed)
    }

    fn nudge(&self) {
        // Never full: nobody else has this eventfd, and it is written to a few times a second.
        let _ = rustix::io::write(&self.control, &1u64.to_ne_bytes());
    }

    fn serve(&self) {
        raise_priority();
        let spin = thread::available_parallelism().map_or(1, usize::from) >= CORES_TO_SPIN;
        let mut armed = None;
        let mut idle_since = None;
        while !self.stopping.load(Ordering::SeqCst) {
            if self.turns().0 {
                idle_since = None;
                continue;
            }
            if spin && idle_since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.page.set_asleep(true);
            let (more, timer) = self.turns();
            if !more && !self.stopping.load(Ordering::SeqCst) {
                self.sleep(timer, &mut armed);
            }
            self.page.set_asleep(false);
            idle_since = None;
        }
    }

    /// Some turns with the fabric locked: whether there is more to do now, else when there will be.
    fn turns(&self) -> (bool, Option<u64>) {
        let mut fabric = self.fabric.lock();
        let mut more = true;
        for _ in 0..TURNS {
            fabric.collect();
            more = fabric.run(now());
            if !more || self.waiters.load(Ordering::Relaxed) > 0 {
                break;
            }
        }
        let timer = if more { None } else { fabric.next_timer() };
        if self.waiters.load(Ordering::Relaxed) > 0 {
            MutexGuard::unlock_fair(fabric);
        }
        (more, timer)
    }

    /// Waits for a doorbell, a change or `timer`. `armed` is what the kernel's timer is set to.
    fn sleep(&self, timer: Option<u64>, armed: &mut Option<u64>) {
        if timer.is_some_and(|timer| timer <= now()) {
            return;
        }
        if timer != *armed {
            *armed = self.arm(timer).is_ok().then_some(timer).flatten();
        }
        self.sleeps.fetch_add(1, Ordering::Relaxed);
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        // Without a timer that could be set, look again soon rather than never.
        let bound = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let bound = (timer.is_some() && armed.is_none()).then_some(&bound);
        match epoll::wait(&self.epoll, &mut events, bound) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "the lane cannot wait"),
        }
    }

    /// Sets the timer to a moment, or to never.
    fn arm(&self, timer: Option<u64>) -> io::Result<()> {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let moment = timer.map_or(never, |ns| Timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        });
        let setting = Itimerspec { it_interval: never, it_value: moment };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &setting)?;
        Ok(())
    }
}

/// A new doorbell eventfd.
pub(crate) fn doorbell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

/// The fabric's clock: CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

fn raise_priority() {
    // SAFETY: the call changes the scheduling of the calling thread and touches no memory.
    let raised = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == 0;
    tracing::debug!(raised, "priority of the lane");
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ended(std::sync::mpsc::Sender<()>);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    fn slept(lane: &Lane, times: u64) {
        for _ in 0..500 {
            if lane.sleeps() >= times {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("{} of {times} sleeps", lane.sleeps());
    }

    #[test]
    fn a_lane_with_nothing_to_do_sleeps_until_something_happens_and_ends_when_told() {
        let lane = Lane::new().unwrap();
        let (sender, ended) = std::sync::mpsc::channel();
        let thread = lane.start(Ended(sender)).unwrap();
        slept(&lane, 1);
        assert!(lane.page.is_asleep());
        for bell in 0..20 {
            let before = lane.sleeps();
            let doorbell = doorbell().unwrap();
            lane.watch(&doorbell).unwrap();
            // Each write wakes it, though nobody takes the count away.
            for more in 1..3 {
                rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
                slept(&lane, before + more);
            }
            if bell % 2 == 0 {
                lane.unwatch(&doorbell);
            }
        }
        let before = lane.sleeps();
        lane.with(|_| ());
        slept(&lane, before + 1);
        assert!(ended.try_recv().is_err());
        lane.stop();
        thread.join().unwrap();
        ended.recv().unwrap();
    }

    #[test]
    fn the_timer_wakes_and_is_set_once() {
        let lane = Lane::new().unwrap();
        let mut armed = None;
        let start = now();
        lane.sleep(Some(start + 20_000_000), &mut armed);
        assert!(now() >= start + 20_000_000);
        assert_eq!(armed, Some(start + 20_000_000));
        lane.sleep(Some(start), &mut armed);
        assert_eq!(armed, Some(start + 20_000_000), "a moment that has passed needs no timer");
    }
}
