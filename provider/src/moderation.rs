//! CQ moderation: an event waits until so many completions have come since it was asked for, or so long.
//!
//! Whoever publishes a completion counts down and has no clock; the time is kept here, by the thread that watches the
//! router.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Completions and microseconds that can be asked for.
pub(crate) const MAX: u16 = u16::MAX;

/// The moderation of one CQ.
#[derive(Debug, Default)]
pub(crate) struct Moderation {
    /// Completions in the low half, microseconds in the high; 0 for none.
    setting: AtomicU32,
    clock: Mutex<Clock>,
}

#[derive(Debug, Default)]
struct Clock {
    /// When the event that is asked for waits no longer, and for how many completions it waits.
    deadline: Option<(Instant, u16)>,
    /// Whether the thread looks at it.
    is_watched: bool,
}

impl Moderation {
    /// An event comes after `count` completions or `period` microseconds. If either is none, it comes at once.
    pub(crate) fn set(&self, count: u16, period: u16) {
        let setting = if count > 1 && period > 0 { u32::from(period) << 16 | u32::from(count) } else { 0 };
        self.setting.store(setting, Ordering::Relaxed);
    }

    /// For how many completions an event waits that is asked for now, and how long; 0 for none.
    #[inline]
    pub(crate) fn held(&self) -> (u16, Duration) {
        let setting = self.setting.load(Ordering::Relaxed);
        (setting as u16, Duration::from_micros(u64::from(setting >> 16)))
    }

    /// An event was asked for that waits until then. True: the thread must be told.
    pub(crate) fn start(&self, until: Instant, held: u16) -> bool {
        let mut clock = self.clock();
        clock.deadline = Some((until, held));
        !std::mem::replace(&mut clock.is_watched, true)
    }

    /// Looks at the clock: whether an event for so many completions has waited long enough, and when to look again.
    pub(crate) fn expire(&self, now: Instant) -> (Option<u16>, Option<Instant>) {
        let mut clock = self.clock();
        match clock.deadline {
            Some((until, _)) if until > now => (None, Some(until)),
            due => {
                *clock = Clock::default();
                (due.map(|(_, held)| held), None)
            }
        }
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_count_or_a_period_nothing_waits() {
        let moderation = Moderation::default();
        for (count, period) in [(0, 9), (9, 0), (1, 9)] {
            moderation.set(count, period);
            assert_eq!(moderation.held().0, 0);
        }
        moderation.set(9, 70);
        assert_eq!(moderation.held(), (9, Duration::from_micros(70)));
    }

    #[test]
    fn a_later_request_moves_the_time() {
        let (moderation, now) = (Moderation::default(), Instant::now());
        let later = now + Duration::from_millis(1);
        assert!(moderation.start(now, 3));
        assert!(!moderation.start(later, 4), "it is watched already");
        assert_eq!(moderation.expire(now), (None, Some(later)));
        assert_eq!(moderation.expire(later), (Some(4), None));
        assert_eq!(moderation.expire(later), (None, None));
        assert!(moderation.start(later, 4));
    }
}
