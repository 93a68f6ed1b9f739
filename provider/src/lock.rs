//! The lock of the data path, for holders that are quick. Whoever must wait looks again, lets others run, and at last
//! sleeps a little between two looks.
//!
//! The first thread that takes a lock is its *favourite*: it takes it by a plain store, as most locks are taken by one
//! thread only. The first other one ends that: it has the kernel put a fence into the favourite ([`barrier`]), so that
//! either the favourite's store is seen or the favourite sees that it is none any more. From then on the lock is taken
//! by one atomic operation. It is given up by a plain store in any case.
//!
//! It may be held between two calls of C (from `wr_start` to `wr_complete`, from `start_poll` to `end_poll`), which
//! the standard library's guards do not allow.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use verbs_abi::shm::barrier;

/// Looks at a held lock before the processor is given to others.
const SPINS: u32 = 100;
/// Looks after which the waiter sleeps between two of them: the holder waits for something itself.
const YIELDS: u32 = 200;
const NAP: Duration = Duration::from_micros(50);

/// In place of a favourite: nobody has taken the lock yet.
const NOBODY: usize = 0;
/// In place of a favourite: the lock is everybody's.
const EVERYBODY: usize = 1;

/// A value that one thread at a time may touch.
#[derive(Debug)]
pub(crate) struct Lock<T> {
    favourite: AtomicUsize,
    /// Whether the favourite holds it, or looks whether it may.
    busy: AtomicBool,
    /// Whether anybody holds it who is not the favourite, or waits for that one to give it up.
    held: AtomicBool,
    /// Whether the holder took it as the favourite.
    favoured: Cell<bool>,
    value: UnsafeCell<T>,
}

// SAFETY: the value, and which way it was taken, are touched by the holder of the lock only, one thread at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub(crate) fn new(value: T) -> Lock<T> {
        Lock {
            favourite: AtomicUsize::new(NOBODY),
            busy: AtomicBool::new(false),
            held: AtomicBool::new(false),
            favoured: Cell::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Takes the lock until the guard is dropped.
    #[inline]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        self.acquire();
        Guard(self, PhantomData)
    }

    /// Takes the lock if nobody holds it.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        let taken = self.try_as_favourite() || {
            self.try_held() && {
                self.end_favour();
                let free = !self.busy.load(Ordering::Acquire);
                if free {
                    self.favoured.set(false);
                } else {
                    self.held.store(false, Ordering::Release);
                }
                free
            }
        };
        taken.then(|| Guard(self, PhantomData))
    }

    /// Takes the lock until [`Self::release`].
    #[inline]
    pub(crate) fn acquire(&self) {
        if !self.try_as_favourite() {
            self.acquire_as_anybody();
        }
    }

    /// Takes the lock if this thread is its favourite, and does not hold it already.
    #[inline]
    fn try_as_favourite(&self) -> bool {
        let me = thread_pointer();
        if self.favourite.load(Ordering::Relaxed) != me || self.busy.load(Ordering::Relaxed) {
            return false;
        }
        self.busy.store(true, Ordering::Relaxed);
        // Whoever ends the favour makes a heavy fence; without those there are no favourites.
        barrier::light(true);
        if self.favourite.load(Ordering::Relaxed) != me {
            self.busy.store(false, Ordering::Release);
            return false;
        }
        self.favoured.set(true);
        true
    }

    #[cold]
    fn acquire_as_anybody(&self) {
        if self.become_favourite() && self.try_as_favourite() {
            return;
        }
        if !self.try_held() {
            wait_until(|| !self.held.load(Ordering::Relaxed) && self.try_held());
        }
        self.end_favour();
        if self.busy.load(Ordering::Acquire) {
            wait_until(|| !self.busy.load(Ordering::Acquire));
        }
        self.favoured.set(false);
    }

    /// Makes this thread the favourite, if there was none.
    fn become_favourite(&self) -> bool {
        let (me, relaxed) = (thread_pointer(), Ordering::Relaxed);
        me > EVERYBODY
            && barrier::is_registered()
            && self.favourite.compare_exchange(NOBODY, me, Ordering::Acquire, relaxed).is_ok()
    }

    /// Makes the lock everybody's, by one who has `held`.
    fn end_favour(&self) {
        let before = self.favourite.load(Ordering::Relaxed);
        if before != EVERYBODY
            && self.favourite.swap(EVERYBODY, Ordering::SeqCst) != NOBODY
            && !barrier::heavy()
        {
            // A kernel that did it before and does not now: a store is out of its processor long before that.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[inline]
    fn try_held(&self) -> bool {
        self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Gives the lock up.
    ///
    /// # Safety
    /// The caller must hold the lock by [`Self::acquire`] and keep no reference to the value.
    #[inline]
    pub(crate) unsafe fn release(&self) {
        let word = if self.favoured.get() { &self.busy } else { &self.held };
        word.store(false, Ordering::Release);
    }

    /// The value.
    ///
    /// # Safety
    /// The caller must hold the lock, and have no other reference to the value.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "holding the lock is what makes it exclusive")]
    pub(crate) unsafe fn held(&self) -> &mut T {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.value.get() }
    }
}

fn wait_until(is_so: impl Fn() -> bool) {
    let mut looks = 0_u32;
    while !is_so() {
        looks = looks.saturating_add(1);
        match looks {
            0..SPINS => std::hint::spin_loop(),
            SPINS..YIELDS => rustix::thread::sched_yield(),
            _ => std::thread::sleep(NAP),
        }
    }
}

/// What no two living threads have in common, or [`NOBODY`] where that is not to be had for an instruction.
#[inline]
fn thread_pointer() -> usize {
    let pointer: usize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the ABI has the thread's own address at the beginning of its control block.
    unsafe {
        std::arch::asm!("mov {}, fs:[0]", out(reg) pointer, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: reads a register.
    unsafe {
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) pointer, options(nostack, preserves_flags, nomem));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        pointer = NOBODY;
    }
    pointer
}

/// The lock, held.
#[derive(Debug)]
pub(crate) struct Guard<'a, T>(&'a Lock<T>, PhantomData<*const ()>);

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock, and lends the value no longer than itself.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and the guard is borrowed exclusively.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the guard holds the lock and gives it up once; references through it are gone.
        unsafe { self.0.release() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_to(lock: &Lock<u64>, threads: u64) {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| (0..20_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), threads * 20_000);
    }

    #[test]
    fn contended_increments_are_all_counted() {
        count_to(&Lock::new(0), 4);
    }

    #[test]
    fn so_they_are_when_a_favourite_loses_the_lock_to_others() {
        if !barrier::register() {
            return println!("SKIP favourites: this kernel has no expedited membarrier");
        }
        for _ in 0..50 {
            let lock = Lock::new(0);
            let ended = AtomicBool::new(false);
            let own = std::thread::scope(|scope| {
                let favourite = scope.spawn(|| {
                    let mut own = 0_u64;
                    while !ended.load(Ordering::Relaxed) {
                        *lock.lock() += 1;
                        own += 1;
                    }
                    own
                });
                while lock.favourite.load(Ordering::Relaxed) == NOBODY {
                    std::thread::yield_now();
                }
                (0..200).for_each(|_| *lock.lock() += 1);
                ended.store(true, Ordering::Relaxed);
                favourite.join().unwrap()
            });
            assert_eq!(*lock.lock(), own + 200);
        }
    }

    #[test]
    fn a_favourites_lock_is_not_to_be_had_by_trying() {
        let lock = Lock::new(0);
        let guard = lock.lock();
        assert!(lock.try_lock().is_none(), "not even by itself");
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(lock.try_lock().is_none()));
        });
        drop(guard);
        assert!(lock.try_lock().is_some());
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(lock.try_lock().is_some()));
        });
    }
}
