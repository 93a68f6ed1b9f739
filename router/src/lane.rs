//! The data path's threads, and the fabric they share with the control thread.
//!
//! ```text
//! at work:  lock, collect doorbells, run a few turns, unlock; again while there is work
//! yielding: say so on the lane page, one more look, give the processor away; again for a while
//! asleep:   say so, one more look, then sleep on the wake word until it changes or a timer is due
//! ```
//!
//! One thread serves the lane where it has a core to itself; it spins where others yield. Where cores are few there is a
//! *worker* on each, so that who rings on a core need only let the worker there run.
//!
//! Nothing a client does can stop a lane: it reads bits and words only, rings clients without waiting (`bell`), and
//! leaves memory that may fault to the clients' helpers (`helper`).
//! Leaves to others: what a turn does (engine), what clients ask for (sessions).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
        mpsc::Receiver,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use engine::{Access, Fabric, Stream, nic::Nic};
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    thread::{CpuSet, sched_getaffinity, sched_setaffinity, sched_yield},
    time::{ClockId, clock_gettime},
};
use verbs_abi::shm::lane::{self, Doing, FEW_CORES, LanePage, MAX_WORKERS, WakeWord};

use crate::{guard::Health, helper::WayBack, link::Caller, memory::ClientMemory, segment};

/// Turns with the fabric locked, after which others get it.
const TURNS: u32 = 16;
/// How long a lane looks for work before it sleeps, where it has a core to itself.
const SPIN: Duration = Duration::from_micros(50);
/// How long a worker yields before it sleeps, where cores are few.
const LINGER: Duration = Duration::from_micros(20);
/// Looks in a row that found work, after which a worker says that it works: others need not see to it then.
const BUSY: u32 = 2;
/// Cores from which on a lane may spin. With fewer it would take the core of those it waits for.
const CORES_TO_SPIN: usize = 4;
/// Priority of a lane that has no core of its own, where it is permitted: it runs at once when clients that spin ring
/// it. Not of a worker that yields: it would get the processor back from those it gives it to.
const NICE: libc::c_int = -10;
/// What the lane asks for at a time: who asks for little gets it sooner (Linux 6.12 and newer).
const SHORT_TURN: Duration = Duration::from_micros(100);

/// Turns that the thread of the links gives by itself after it has changed something.
const LINK_TURNS: u32 = 4;

/// The fabric of a router.
pub(crate) type RouterFabric = Fabric<ClientMemory>;

/// What the lane's turns work on.
#[derive(Debug)]
struct Seat {
    fabric: Fabric<ClientMemory>,
    /// Accesses that helpers have performed.
    arrivals: Receiver<Access>,
}

/// The words that the workers sleep on.
type Words = [WakeWord; MAX_WORKERS];

/// A thread that serves a lane.
#[derive(Debug)]
struct Worker {
    index: usize,
    /// Whether it stays on a core, and shares it.
    stays: bool,
    /// How long it looks for work before it sleeps.
    patience: Duration,
    /// What its words said before it looked for the last time.
    seen: Vec<u32>,
}

/// A lane and its fabric.
#[derive(Debug)]
pub(crate) struct Lane {
    seat: Mutex<Seat>,
    /// Others that wait for the fabric.
    waiters: AtomicUsize,
    /// Held by a worker that copies beside the fabric, by index.
    copying: [Mutex<()>; MAX_WORKERS],
    page: LanePage,
    page_file: OwnedFd,
    /// The cores on which a worker stays; none: one worker goes where it is free.
    cores: Vec<usize>,
    /// The router's own, where there are several tenants: none of them can hide them.
    own_words: Option<Words>,
    /// Those of each tenant, and the file by which its clients wake the workers.
    words: Vec<(Words, OwnedFd)>,
    /// Of all words.
    health: Arc<Health>,
    way_back: WayBack,
    stopping: AtomicBool,
    sleeps: AtomicU64,
    /// When a sleeping lane wakes by itself.
    sleeps_until: AtomicU64,
    /// When an acknowledgement must go to another host that waits for something to go with it.
    next_ack: AtomicU64,
    /// Who is told what is to be sent to other hosts.
    caller: OnceLock<Arc<Caller>>,
    has_nic: AtomicBool,
}

impl Lane {
    /// A lane for so many tenants that does not run yet.
    pub(crate) fn new(tenants: usize) -> io::Result<Arc<Self>> {
        let (page, page_file) = segment::lane_page()?;
        let health = Arc::<Health>::default();
        let wake_page = || segment::wake_page(&health);
        let words = (0..tenants.max(1)).map(|_| wake_page()).collect::<io::Result<Vec<_>>>()?;
        let own_words = if tenants > 1 { Some(wake_page()?.0) } else { None };
        if let Some([own, ..]) = &own_words {
            let unlike = own.seen().wrapping_add(1);
            lane::sleep_on_any([(own, unlike)].into_iter(), None)
                .map_err(|_| io::Error::other("several tenants need Linux 5.16 or newer (futex_waitv)"))?;
        }
        let [own, ..] = own_words.as_ref().unwrap_or(&words[0].0);
        let (way_back, arrivals) = WayBack::new(page.clone(), own.clone());
        let (mut fabric, cores) = (Fabric::new(), few_cores());
        fabric.share_copies(cores.len() > 1);
        let lane = Self {
            seat: Mutex::new(Seat { fabric, arrivals }),
            waiters: AtomicUsize::new(0),
            copying: Default::default(),
            page,
            page_file,
            cores,
            own_words,
            words,
            health,
            way_back,
            stopping: AtomicBool::new(false),
            sleeps: AtomicU64::new(0),
            sleeps_until: AtomicU64::new(u64::MAX),
            next_ack: AtomicU64::new(u64::MAX),
            caller: OnceLock::new(),
            has_nic: AtomicBool::new(false),
        };
        Ok(Arc::new(lane))
    }

    /// Starts the threads. An `ended` is dropped when one of them ends, for whatever reason.
    pub(crate) fn start<E: Send + 'static>(
        self: &Arc<Self>,
        mut ended: impl FnMut() -> io::Result<E>,
    ) -> io::Result<Vec<JoinHandle<()>>> {
        let start = |worker: usize| {
            let (lane, ended) = (Arc::clone(self), ended()?);
            thread::Builder::new().name(format!("lane-{worker}")).spawn(move || {
                let _ended = ended;
                lane.serve(worker);
            })
        };
        (0..self.cores.len().max(1)).map(start).collect()
    }

    /// Ends the threads soon.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.own_words().iter().for_each(WakeWord::wake);
    }

    fn own_words(&self) -> &Words {
        self.own_words.as_ref().unwrap_or(&self.words[0].0)
    }

    fn wake(&self) {
        self.own_words()[0].wake();
    }

    /// The words that a worker sleeps on.
    fn words_of(&self, worker: usize) -> impl Iterator<Item = &WakeWord> {
        self.own_words
            .iter()
            .chain(self.words.iter().map(|(words, _)| words))
            .map(move |words| &words[worker])
    }

    /// What these words say now.
    fn look_at_words(&self, worker: usize, seen: &mut Vec<u32>) {
        seen.clear();
        seen.extend(self.words_of(worker).map(WakeWord::seen));
    }

    /// The fabric, for whoever changes more than a turn does: nobody copies beside it.
    fn lock(&self) -> MutexGuard<'_, Seat> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let seat = self.seat.lock();
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        // None begins while the fabric is locked, and each is short.
        self.copying.iter().for_each(|copying| drop(copying.lock()));
        seat
    }

    /// Does something to the fabric between two turns, and wakes the lane if something follows from it for the lane:
    /// most verbs give it nothing to do.
    pub(crate) fn with<R>(&self, change: impl FnOnce(&mut Fabric<ClientMemory>) -> R) -> R {
        let mut seat = self.lock();
        let timer = seat.fabric.next_timer();
        let result = change(&mut seat.fabric);
        // A later timer costs the lane a look in vain, an earlier one is not the lane's yet.
        let sooner = seat.fabric.next_timer().is_some_and(|new| timer.is_none_or(|old| new < old));
        let wanted = sooner || seat.fabric.has_turns();
        drop(seat);
        // The lane sets the flag before its last look under the lock: it has seen the change, or we see the flag.
        if wanted && self.page.is_asleep() {
            self.wake();
        }
        result
    }

    /// Sets who is told what is to be sent to other hosts.
    pub(crate) fn set_caller(&self, caller: Arc<Caller>) {
        let _ = self.caller.set(caller);
    }

    /// Gives the fabric a NIC.
    pub(crate) fn set_nic(&self, nic: Box<dyn Nic>) {
        self.lock().fabric.set_nic(nic);
        self.has_nic.store(true, Ordering::SeqCst);
    }

    /// Says that the NIC has told something.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.page.is_asleep() {
            self.wake();
        }
    }

    /// Does something to the fabric by the thread of the links, gives the turns that follow from it, and says who is to
    /// be sent something. The lane is woken only if that leaves something for it.
    pub(crate) fn serve_link<R>(
        &self,
        calls: &mut Vec<Stream>,
        change: impl FnOnce(&mut RouterFabric) -> R,
    ) -> R {
        let mut seat = self.lock();
        let fabric = &mut seat.fabric;
        let result = change(fabric);
        let more = (0..LINK_TURNS).all(|_| {
            let more = fabric.run(now());
            copy_now(fabric) | give_out(fabric) || more
        });
        calls.extend(std::iter::from_fn(|| fabric.next_call()));
        // For acknowledgements this thread looks at the clock itself.
        let timer = fabric.next_turn().unwrap_or(u64::MAX);
        self.next_ack.store(fabric.next_ack().unwrap_or(u64::MAX), Ordering::Relaxed);
        drop(seat);
        fence(Ordering::SeqCst);
        if self.page.is_asleep() && (more || timer < self.sleeps_until.load(Ordering::SeqCst)) {
            self.wake();
        }
        result
    }

    /// When the thread of the links has to look at the fabric by itself, ns.
    pub(crate) fn next_ack(&self) -> Option<u64> {
        Some(self.next_ack.load(Ordering::Relaxed)).filter(|due| *due != u64::MAX)
    }

    /// Does something to the fabric by the lane itself, which looks at it afterwards.
    pub(crate) fn with_own<R>(&self, change: impl FnOnce(&mut RouterFabric) -> R) -> R {
        change(&mut self.lock().fabric)
    }

    /// The lane page for clients.
    pub(crate) fn page_file(&self) -> BorrowedFd<'_> {
        self.page_file.as_fd()
    }

    /// The wake page for the clients of a tenant.
    pub(crate) fn wake_file(&self, tenant: u32) -> BorrowedFd<'_> {
        self.words[tenant as usize].1.as_fd()
    }

    /// For helpers: the way back to this lane.
    pub(crate) fn way_back(&self) -> &WayBack {
        &self.way_back
    }

    /// Times the lane went to sleep.
    pub(crate) fn sleeps(&self) -> u64 {
        self.sleeps.load(Ordering::Relaxed)
    }

    fn serve(&self, index: usize) {
        let mut worker = self.settle(index);
        let (mut busy_looks, mut idle_since, mut told) = (0_u32, None, false);
        self.page.set_doing(index, Doing::Work);
        while !self.stopping.load(Ordering::SeqCst) {
            let look = self.look(Some(index));
            if look.worked {
                (busy_looks, idle_since) = (busy_looks.saturating_add(1), None);
                if busy_looks == BUSY {
                    self.page.set_doing(index, Doing::Work);
                }
                continue;
            }
            busy_looks = 0;
            let patience = worker.patience;
            if !patience.is_zero() && idle_since.get_or_insert_with(Instant::now).elapsed() < patience {
                if worker.stays {
                    self.give_way(index)
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            self.doze(&mut worker);
            if self.health.is_spoilt() && !std::mem::replace(&mut told, true) {
                tracing::error!(
                    "a page by which clients wake the data path is gone; it looks around once a second; restart this router"
                );
            }
            idle_since = None;
        }
    }

    /// Makes the calling thread a worker: on its core, or where there is none for it where it is free.
    fn settle(&self, index: usize) -> Worker {
        let core = self.cores.get(index).copied().filter(|core| stay_on(*core));
        match core {
            Some(core) => self.page.set_worker_on(index, core),
            None => raise_priority(),
        }
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let patience = match core {
            Some(_) => LINGER,
            None if cores >= CORES_TO_SPIN => SPIN,
            None => Duration::ZERO,
        };
        Worker { index, stays: core.is_some(), patience, seen: Vec::new() }
    }

    /// Lets whoever waits for this core run. Who rings sees on the lane page that it must let this worker run in turn.
    fn give_way(&self, index: usize) {
        if self.page.doing(index) == Doing::Yield {
            // It has said so before its last look.
            sched_yield();
        } else {
            self.page.set_doing(index, Doing::Yield);
            fence(Ordering::SeqCst);
        }
    }

    /// Says that the worker sleeps, looks once more, and sleeps if there is still nothing.
    fn doze(&self, worker: &mut Worker) {
        self.look_at_words(worker.index, &mut worker.seen);
        // Until it is known when it wakes, any timer is earlier.
        self.sleeps_until.store(u64::MAX, Ordering::SeqCst);
        self.page.set_doing(worker.index, Doing::Sleep);
        fence(Ordering::SeqCst);
        if self.has_nic.load(Ordering::SeqCst) {
            // Before the last look: what completes after it wakes this lane.
            self.seat.lock().fabric.arm_nic();
        }
        let look = self.look(Some(worker.index));
        if !look.worked && !self.stopping.load(Ordering::SeqCst) {
            self.sleeps_until.store(look.timer.unwrap_or(u64::MAX), Ordering::SeqCst);
            self.sleep(worker.index, &worker.seen, look.timer);
        }
        // One that yields is not at work until it has found some.
        self.page.set_doing(worker.index, if worker.stays { Doing::Yield } else { Doing::Work });
    }

    /// One look by a thread that is not the lane's.
    pub(crate) fn turn(&self) {
        self.look(None);
    }

    /// Takes doorbells and performed accesses and gives some turns, with the fabric locked but for what a worker can copy
    /// beside it.
    fn look(&self, worker: Option<usize>) -> Look {
        let mut seat = self.seat.lock();
        let mut look = Look::default();
        for _ in 0..TURNS {
            let Seat { fabric, arrivals } = &mut *seat;
            let rung = fabric.collect();
            while let Ok(access) = arrivals.try_recv() {
                fabric.finish(access);
            }
            let mut more = fabric.run(now());
            more |= match worker {
                Some(worker) => self.copy_beside(worker, &mut seat),
                None => copy_now(fabric),
            };
            more |= give_out(&mut seat.fabric);
            look.worked |= rung || more;
            if !more || self.waiters.load(Ordering::Relaxed) > 0 {
                break;
            }
        }
        let fabric = &mut seat.fabric;
        look.timer = fabric.next_turn();
        let first_call = fabric.next_call();
        let calls: Vec<Stream> =
            first_call.into_iter().chain(std::iter::from_fn(|| fabric.next_call())).collect();
        if self.waiters.load(Ordering::Relaxed) > 0 {
            MutexGuard::unlock_fair(seat);
        } else {
            drop(seat);
        }
        if let Some(caller) = self.caller.get().filter(|_| !calls.is_empty()) {
            // Whoever waited for room has a turn.
            look.worked = true;
            caller.send(self, calls);
        }
        look
    }

    /// Copies what the last turn has set aside, and lets others have the fabric meanwhile. False: there was nothing.
    fn copy_beside(&self, worker: usize, seat: &mut MutexGuard<'_, Seat>) -> bool {
        let Some(copy) = seat.fabric.next_copy() else { return false };
        // Who waits for it has the fabric, and that is this worker.
        let copying = self.copying[worker].lock();
        MutexGuard::unlocked(seat, || {
            // SAFETY: others but workers lock the fabric by `lock`, which waits for this; a worker's turn takes no
            // memory from a client.
            unsafe { copy.perform() };
            drop(copying);
        });
        seat.fabric.end_copy(copy);
        true
    }

    /// Waits until a wake word of a worker is no longer what was seen, or `timer` is due.
    fn sleep(&self, worker: usize, seen: &[u32], timer: Option<u64>) {
        let timeout = timer.map(|timer| Duration::from_nanos(timer.saturating_sub(now())));
        if timeout == Some(Duration::ZERO) {
            return;
        }
        self.sleeps.fetch_add(1, Ordering::Relaxed);
        if self.own_words.is_none() {
            return self.words[0].0[worker].sleep(seen[0], timeout);
        }
        // That the kernel can do it was seen at the start.
        let _ = lane::sleep_on_any(self.words_of(worker).zip(seen.iter().copied()), timeout);
    }
}

/// The cores on which a worker stays: those that this program may use, where they are few.
fn few_cores() -> Vec<usize> {
    let Ok(allowed) = sched_getaffinity(None) else { return Vec::new() };
    let cores = || (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    if cores().nth(FEW_CORES).is_some() { Vec::new() } else { cores().collect() }
}

/// Has the calling thread stay on a core. False: the kernel does not let it.
fn stay_on(core: usize) -> bool {
    let mut only = CpuSet::new();
    only.set(core);
    let stays = sched_setaffinity(None, &only).is_ok();
    tracing::debug!(core, stays, "scheduling of a worker");
    stays
}

/// Copies what the last turn has set aside, with the fabric locked. False: there was nothing.
fn copy_now(fabric: &mut RouterFabric) -> bool {
    let Some(copy) = fabric.next_copy() else { return false };
    // SAFETY: nothing has happened to the fabric since.
    unsafe { copy.perform() };
    fabric.end_copy(copy);
    true
}

/// Gives accesses to foreign memory to the helpers. True: one has come back already.
fn give_out(fabric: &mut Fabric<ClientMemory>) -> bool {
    let mut refused = false;
    while let Some(access) = fabric.next_access() {
        let submitted = match fabric.memory_mut(access.client()) {
            Some(memory) => memory.submit(access),
            None => Err(access),
        };
        if let Err(access) = submitted {
            fabric.finish(access);
            refused = true;
        }
    }
    refused
}

/// The fabric's clock: CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// What a look at the fabric found.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    /// Somebody rang, or a turn left more to do.
    worked: bool,
    /// When to look again in any case.
    timer: Option<u64>,
}

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Makes the calling thread run soon after it is woken, as far as that is permitted.
pub(crate) fn raise_priority() {
    // SAFETY: the call changes the scheduling of the calling thread and touches no memory.
    let raised = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == 0;
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice: if raised { NICE } else { 0 },
        priority: 0,
        runtime: SHORT_TURN.as_nanos() as u64,
        deadline: 0,
        period: 0,
    };
    // SAFETY: as above; the structure is read only, and says how long it is.
    let short = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } == 0;
    // SAFETY: as above; the default slack of 50 us would blur short RNR timers.
    let precise = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) } == 0;
    tracing::debug!(raised, short, precise, "scheduling of the lane");
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::{PAGE, Window};

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
        for tenants in [1, 3, 127] {
            sleeps_and_ends(tenants);
        }
    }

    fn sleeps_and_ends(tenants: u32) {
        let lane = Lane::new(tenants as usize).unwrap();
        let (sender, ended) = std::sync::mpsc::channel();
        let threads = lane.start(|| Ok(Ended(sender.clone()))).unwrap();
        assert_eq!(threads.len(), lane.cores.len().max(1));
        asleep(&lane);
        for tenant in [0, tenants - 1] {
            let file = lane.wake_file(tenant).try_clone_to_owned().unwrap();
            let words = WakeWord::all(&Window::map(&file, 0, PAGE, true).unwrap()).unwrap();
            for word in words.iter().take(threads.len()).cycle().take(20) {
                let before = lane.sleeps();
                word.wake();
                slept(&lane, before + 1);
                asleep(&lane);
            }
        }
        let before = lane.sleeps();
        lane.with(|_| ());
        thread::sleep(Duration::from_millis(20));
        assert_eq!(lane.sleeps(), before, "it was woken for nothing");
        assert!(ended.try_recv().is_err());
        lane.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        ended.recv().unwrap();
    }

    /// Waits until all workers sleep.
    fn asleep(lane: &Lane) {
        for _ in 0..500 {
            if lane.page.is_asleep() && lane.sleeps() > 0 {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("a worker does not sleep");
    }

    #[test]
    fn the_timer_wakes() {
        for tenants in [1, 2] {
            let lane = Lane::new(tenants).unwrap();
            let (start, mut seen) = (now(), Vec::new());
            while now() < start + 20_000_000 {
                lane.look_at_words(0, &mut seen);
                lane.sleep(0, &seen, Some(start + 20_000_000));
            }
            let slept = lane.sleeps();
            lane.sleep(0, &seen, Some(start));
            assert_eq!(lane.sleeps(), slept, "a moment that has passed needs no sleep");
        }
    }
}
