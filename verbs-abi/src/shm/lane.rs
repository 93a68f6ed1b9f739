//! What a lane of the router and its clients tell each other: what its workers are doing, and that one should wake.
//!
//! ```text
//! lane page  (router writes)          a line a worker: what it does, and the processor it stays on
//! wake page (a tenant's clients write)  a line a worker: the word that it sleeps on
//! ```
//!
//! A worker is a thread that serves the lane. Where there are processors enough there is one, which goes where it is
//! free. Where there are few ([`FEW_CORES`]) each has a worker of its own: who rings gives it the processor by a yield,
//! which costs a fraction of waking somebody.
//!
//! A worker looks at the word, says that it sleeps, looks at all doorbells once more, and sleeps while the word is what
//! it was; so a doorbell rung meanwhile is never missed. A member of the tenant that writes nonsense to the words can
//! delay the others' work until a worker looks again by itself ([`LONGEST_SLEEP`]), and nothing more; other tenants have
//! words of their own.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::{
    thread::futex,
    time::{ClockId, Nsecs, Timespec, clock_gettime},
};

use super::Window;

/// Words that a lane can sleep on at once.
pub const MAX_WORDS: usize = 128;
/// A worker looks around at least this often.
pub const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// With as few processors as this, a waiting thread is in the way of what it waits for.
pub const FEW_CORES: usize = 2;
/// Workers that a lane may have.
pub const MAX_WORKERS: usize = FEW_CORES;
/// Bytes of a worker's line on either page.
const LINE: usize = 64;

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It works, and looks at all doorbells before it does anything else.
    Work,
    /// It sleeps until its word changes.
    Sleep,
    /// It has nothing to do and gives its processor to whoever wants it; it looks at all doorbells when it has it back.
    Yield,
}

/// The page of one lane.
#[derive(Clone, Debug)]
pub struct LanePage(Window);

impl LanePage {
    /// Wraps the page.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self(window)
    }

    /// Whether all workers sleep, so that a doorbell must be followed by [`WakeWord::wake`] (owner, after
    /// `Doorbells::ring`).
    #[inline]
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        (0..MAX_WORKERS).all(|worker| self.doing(worker) == Doing::Sleep)
    }

    /// What a worker does; one that is not there sleeps.
    #[inline]
    #[must_use]
    pub fn doing(&self, worker: usize) -> Doing {
        match self.0.u32(worker * LINE).load(Ordering::SeqCst) {
            1 => Doing::Work,
            2 => Doing::Yield,
            _ => Doing::Sleep,
        }
    }

    /// Says what a worker does (router). After [`Doing::Sleep`] and [`Doing::Yield`] it looks at all doorbells once
    /// more: with the fences in `Doorbells::ring` either it sees the bit or the owner sees what it does.
    #[inline]
    pub fn set_doing(&self, worker: usize, doing: Doing) {
        let value = match doing {
            Doing::Sleep => 0,
            Doing::Work => 1,
            Doing::Yield => 2,
        };
        self.0.u32(worker * LINE).store(value, Ordering::SeqCst);
    }

    /// The worker that stays on this processor.
    #[inline]
    #[must_use]
    pub fn worker_on(&self, cpu: usize) -> Option<usize> {
        (0..MAX_WORKERS).find(|worker| self.place(*worker).load(Ordering::Relaxed) as usize == cpu + 1)
    }

    /// Whether there is such a worker that stays on a processor.
    #[inline]
    #[must_use]
    pub fn has(&self, worker: usize) -> bool {
        self.place(worker).load(Ordering::Relaxed) != 0
    }

    /// Says that a worker stays on this processor (router).
    pub fn set_worker_on(&self, worker: usize, cpu: usize) {
        self.place(worker).store(u32::try_from(cpu + 1).unwrap_or(0), Ordering::Relaxed);
    }

    fn place(&self, worker: usize) -> &AtomicU32 {
        self.0.u32(worker * LINE + 4)
    }
}

/// The word that a worker sleeps on.
#[derive(Clone, Debug)]
pub struct WakeWord(Window);

impl WakeWord {
    /// The words on a wake page, by worker. None: the page is too short.
    #[must_use]
    pub fn all(page: &Window) -> Option<[Self; MAX_WORKERS]> {
        let words: Option<Vec<Self>> =
            (0..MAX_WORKERS).map(|worker| page.sub((worker * LINE) as u64, LINE).map(Self)).collect();
        words?.try_into().ok()
    }

    /// What the word says now (router, before the worker says that it sleeps).
    #[must_use]
    pub fn seen(&self) -> u32 {
        self.0.u32(0).load(Ordering::SeqCst)
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        self.0.u32(0).fetch_add(1, Ordering::SeqCst);
        // Everybody on the word: one that has no business there must not take the worker's wake-up.
        let _ = futex::wake(self.0.u32(0), futex::Flags::empty(), i32::MAX as u32);
    }

    /// Sleeps while the word says `seen`, at most for `timeout` or [`LONGEST_SLEEP`] (router). May end early.
    pub fn sleep(&self, seen: u32, timeout: Option<Duration>) {
        let timeout = timeout.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP);
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: Nsecs::from(timeout.subsec_nanos()) };
        let _ = futex::wait(self.0.u32(0), futex::Flags::empty(), seen, Some(&timeout));
    }
}

/// Sleeps while each word says what was seen of it, at most for `timeout` or [`LONGEST_SLEEP`] (router). At most
/// [`MAX_WORDS`] of them. May end early.
///
/// # Errors
/// `ENOSYS` before Linux 5.16.
pub fn sleep_on_any<'a>(
    words: impl Iterator<Item = (&'a WakeWord, u32)>,
    timeout: Option<Duration>,
) -> Result<(), rustix::io::Errno> {
    let mut waits = [futex::Wait::new(); MAX_WORDS];
    let mut count = 0;
    for (wait, (word, seen)) in waits.iter_mut().zip(words) {
        wait.val = u64::from(seen);
        wait.uaddr = futex::WaitPtr::new(word.0.u32(0).as_ptr().cast());
        wait.flags = futex::WaitFlags::SIZE_U32;
        count += 1;
    }
    let until = after(timeout.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP));
    match futex::waitv(&waits[..count], futex::WaitvFlags::empty(), Some(&until), ClockId::Monotonic) {
        Err(rustix::io::Errno::NOSYS) => Err(rustix::io::Errno::NOSYS),
        _ => Ok(()),
    }
}

/// The moment so long after now.
fn after(timeout: Duration) -> Timespec {
    let now = clock_gettime(ClockId::Monotonic);
    let nanoseconds = now.tv_nsec + Nsecs::from(timeout.subsec_nanos());
    Timespec {
        tv_sec: now.tv_sec + timeout.as_secs() as i64 + nanoseconds / 1_000_000_000,
        tv_nsec: nanoseconds % 1_000_000_000,
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::*;

    #[test]
    fn a_wake_up_before_the_sleep_is_not_lost() {
        let word = WakeWord(Window::heap(64));
        let seen = word.seen();
        word.wake();
        let start = Instant::now();
        word.sleep(seen, None);
        assert!(start.elapsed() < LONGEST_SLEEP);
    }

    #[test]
    fn a_sleeper_on_many_words_is_woken_by_each_and_by_time() {
        let words: Vec<_> = (0..MAX_WORDS).map(|_| WakeWord(Window::heap(64))).collect();
        let sleep = |seen: &[u32], timeout| {
            let start = Instant::now();
            sleep_on_any(words.iter().zip(seen.iter().copied()), timeout).map(|()| start.elapsed())
        };
        let seen: Vec<_> = words.iter().map(WakeWord::seen).collect();
        let short = Duration::from_millis(20);
        match sleep(&seen, Some(short)) {
            Err(_) => return println!("SKIP sleep on many words: this kernel has no futex_waitv"),
            Ok(slept) => assert!(slept >= short),
        }
        for word in [0, 1, MAX_WORDS - 1] {
            let seen: Vec<_> = words.iter().map(WakeWord::seen).collect();
            words[word].wake();
            assert!(sleep(&seen, None).unwrap() < LONGEST_SLEEP, "woken before the sleep");
            let seen: Vec<_> = words.iter().map(WakeWord::seen).collect();
            thread::scope(|scope| {
                let waker = scope.spawn(|| {
                    thread::sleep(short);
                    words[word].wake();
                });
                assert!(sleep(&seen, None).unwrap() < LONGEST_SLEEP, "word {word}");
                waker.join().unwrap();
            });
        }
    }

    #[test]
    fn a_sleeper_is_woken_from_another_mapping_of_the_page() {
        let file = rustix::fs::memfd_create(c"wake", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let words = || WakeWord::all(&Window::map(&file, 0, 4096, true).unwrap()).unwrap();
        let ([_, sleeper], [_, waker]) = (words(), words());
        thread::scope(|scope| {
            let seen = sleeper.seen();
            let start = Instant::now();
            let slept = scope.spawn(move || {
                while sleeper.seen() == seen {
                    sleeper.sleep(seen, None);
                }
                start.elapsed()
            });
            thread::sleep(Duration::from_millis(20));
            waker.wake();
            assert!(slept.join().unwrap() < LONGEST_SLEEP);
        });
    }

    #[test]
    fn a_lane_is_asleep_when_all_of_its_workers_are_and_those_that_are_not_there_sleep() {
        let page = LanePage::new(Window::heap(4096));
        assert!(page.is_asleep());
        for worker in 0..MAX_WORKERS {
            for doing in [Doing::Work, Doing::Yield] {
                page.set_doing(worker, doing);
                assert_eq!(page.doing(worker), doing);
                assert!(!page.is_asleep());
            }
            page.set_doing(worker, Doing::Sleep);
            assert!(page.is_asleep());
        }
    }

    #[test]
    fn a_worker_is_found_by_its_processor() {
        let page = LanePage::new(Window::heap(4096));
        assert_eq!((page.worker_on(0), page.worker_on(7)), (None, None));
        page.set_worker_on(0, 7);
        page.set_worker_on(1, 0);
        assert_eq!((page.worker_on(0), page.worker_on(7), page.worker_on(1)), (Some(1), Some(0), None));
    }
}
