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
    time::{Nsecs, Timespec},
};

use super::Window;

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
