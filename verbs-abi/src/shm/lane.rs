//! What a lane of the router and its clients tell each other: whether it sleeps, and that it should wake.
//!
//! Two pages. The *lane page* is the router's: clients map it read-only. The *wake page* belongs to a tenant: its
//! clients add to the word that the lane sleeps on. A lane looks at the word, says that it sleeps, looks at all
//! doorbells once more, and sleeps while the word is what it was; so a doorbell rung meanwhile is never missed.
//! A member of the tenant that writes nonsense to the word can delay the others' work until the lane looks again
//! by itself ([`LONGEST_SLEEP`]), and nothing more; other tenants have words of their own.

use std::{sync::atomic::Ordering, time::Duration};

use rustix::{
    thread::futex,
    time::{ClockId, Nsecs, Timespec, clock_gettime},
};

use super::Window;

/// Words that a lane can sleep on at once.
pub const MAX_WORDS: usize = 128;
/// A lane looks around at least this often.
pub const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// The page of one lane.
#[derive(Clone, Debug)]
pub struct LanePage(Window);

impl LanePage {
    /// Wraps the page.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self(window)
    }

    /// Whether the lane sleeps, so that a doorbell must be followed by [`WakeWord::wake`] (owner, after
    /// `Doorbells::ring`).
    #[inline]
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.0.u32(0).load(Ordering::SeqCst) != 0
    }

    /// Says that the lane is about to sleep, or awake again (router). After `true` the lane looks at all doorbells
    /// once more: with the fences in `Doorbells::ring` either it sees the bit or the owner sees the flag.
    pub fn set_asleep(&self, asleep: bool) {
        self.0.u32(0).store(u32::from(asleep), Ordering::SeqCst);
    }
}

/// The word that a lane sleeps on.
#[derive(Clone, Debug)]
pub struct WakeWord(Window);

impl WakeWord {
    /// Wraps the page.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self(window)
    }

    /// What the word says now (router, before it says that it sleeps).
    #[must_use]
    pub fn seen(&self) -> u32 {
        self.0.u32(0).load(Ordering::SeqCst)
    }

    /// Wakes the lane.
    pub fn wake(&self) {
        self.0.u32(0).fetch_add(1, Ordering::SeqCst);
        // Everybody on the word: one that has no business there must not take the lane's wake-up.
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
        let word = WakeWord::new(Window::heap(64));
        let seen = word.seen();
        word.wake();
        let start = Instant::now();
        word.sleep(seen, None);
        assert!(start.elapsed() < LONGEST_SLEEP);
    }

    #[test]
    fn a_sleeper_on_many_words_is_woken_by_each_and_by_time() {
        let words: Vec<_> = (0..MAX_WORDS).map(|_| WakeWord::new(Window::heap(64))).collect();
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
                scope.spawn(|| {
                    thread::sleep(short);
                    words[word].wake();
                });
                assert!(sleep(&seen, None).unwrap() < LONGEST_SLEEP, "word {word}");
            });
        }
    }

    #[test]
    fn a_sleeper_is_woken_from_another_mapping_of_the_page() {
        let file = rustix::fs::memfd_create(c"wake", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let word = || WakeWord::new(Window::map(&file, 0, 4096, true).unwrap());
        let (sleeper, waker) = (word(), word());
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
}
