//! The lock of the data path: one atomic operation to take it and a plain store to give it up, for its holders are
//! quick. Whoever must wait looks again, lets others run, and at last sleeps a little between two looks.
//!
//! It may be held between two calls of C (from `wr_start` to `wr_complete`, from `start_poll` to `end_poll`), which
//! the standard library's guards do not allow.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Looks at a held lock before the processor is given to others.
const SPINS: u32 = 100;
/// Looks after which the waiter sleeps between two of them: the holder waits for something itself.
const YIELDS: u32 = 200;
const NAP: Duration = Duration::from_micros(50);

/// A value that one thread at a time may touch.
#[derive(Debug)]
pub(crate) struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is touched by the holder of the lock only, one thread at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub(crate) fn new(value: T) -> Lock<T> {
        Lock { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Takes the lock until the guard is dropped.
    #[inline]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        self.acquire();
        Guard(self)
    }

    /// Takes the lock if nobody holds it.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        self.try_acquire().then(|| Guard(self))
    }

    /// Takes the lock until [`Self::release`].
    #[inline]
    pub(crate) fn acquire(&self) {
        if !self.try_acquire() {
            self.wait();
        }
    }

    #[inline]
    fn try_acquire(&self) -> bool {
        self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[cold]
    fn wait(&self) {
        let mut looks = 0_u32;
        while self.held.load(Ordering::Relaxed) || !self.try_acquire() {
            looks = looks.saturating_add(1);
            match looks {
                0..SPINS => std::hint::spin_loop(),
                SPINS..YIELDS => rustix::thread::sched_yield(),
                _ => std::thread::sleep(NAP),
            }
        }
    }

    /// Gives the lock up.
    ///
    /// # Safety
    /// The caller must hold the lock by [`Self::acquire`] and keep no reference to the value.
    #[inline]
    pub(crate) unsafe fn release(&self) {
        self.held.store(false, Ordering::Release);
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

/// The lock, held.
#[derive(Debug)]
pub(crate) struct Guard<'a, T>(&'a Lock<T>);

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

    #[test]
    fn contended_increments_are_all_counted() {
        let lock = Lock::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 80_000);
    }
}
