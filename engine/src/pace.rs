//! The rate limit of a QP: when it may send again.

/// What a QP may send at once after it was idle, or to make up for a clock that called late, unless it was told.
const BURST: u64 = 64 * 1024;
/// How late a clock may call without making the rate lower.
const LATE: u64 = 2_000_000;
/// What a work request without payload counts for: the shortest frame.
const LEAST: u64 = 64;

/// The pace of one QP.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// In kbit/s, 0 for none.
    rate: u32,
    /// What it was told to send at once at the most, 0 if nothing.
    burst: u32,
    /// When it may send again, ns.
    next: u64,
}

impl Pace {
    /// From now on so many kbit/s, with bursts of so many bytes; 0 means no limit, and bursts as usual.
    pub(crate) fn set(&mut self, rate: u32, burst: u32) {
        if (self.rate, self.burst) != (rate, burst) {
            *self = Self { rate, burst, next: 0 };
        }
    }

    #[inline]
    pub(crate) fn is_limited(&self) -> bool {
        self.rate != 0
    }

    /// When it may send again, if that is later.
    #[inline]
    pub(crate) fn pause(&self, now: u64) -> Option<u64> {
        (self.rate != 0 && self.next > now).then_some(self.next)
    }

    /// What it may send in one go.
    pub(crate) fn most(&self, budget: u64) -> u64 {
        // Slices end between words.
        let burst = u64::from(self.burst).next_multiple_of(64);
        if self.rate != 0 && burst != 0 { budget.min(burst) } else { budget }
    }

    /// It sent so many bytes.
    #[inline]
    pub(crate) fn spend(&mut self, bytes: u64, now: u64) {
        if self.rate != 0 {
            let slack = match self.burst {
                0 => self.time(BURST).max(LATE),
                burst => self.time(burst.into()),
            };
            // Time that was not used is lost, but for a burst.
            self.next = self.next.max(now.saturating_sub(slack)).saturating_add(self.time(bytes.max(LEAST)));
        }
    }

    fn time(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(8_000_000) / u64::from(self.rate.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that go out in this time, with pieces of so many, when the clock calls late by as much.
    fn sent(pace: &mut Pace, (mut now, end): (u64, u64), piece: u64, late: u64) -> u64 {
        let mut sent = 0;
        while now < end {
            match pace.pause(now) {
                Some(until) => now = until + late,
                None => {
                    pace.spend(piece, now);
                    sent += piece;
                }
            }
        }
        sent
    }

    #[test]
    fn a_second_carries_what_the_rate_says_even_if_the_clock_calls_late() {
        const SECOND: u64 = 1_000_000_000;
        for (rate, piece, late) in [(8_000, 1000, 0), (80_000, 32_768, 100_000), (8_000_000, 32_768, 60_000)]
        {
            let mut pace = Pace::default();
            pace.set(rate, 0);
            let expected = u64::from(rate) * 125;
            let sent = sent(&mut pace, (SECOND, 2 * SECOND), piece, late);
            assert!(sent.abs_diff(expected) <= expected / 50 + BURST + 2 * piece, "{sent} of {expected}");
        }
    }

    #[test]
    fn idle_time_buys_one_burst() {
        let mut pace = Pace::default();
        pace.set(8_000, 5000);
        // A byte takes a microsecond.
        assert_eq!(sent(&mut pace, (1_000_000_000, 1_000_000_001), 1000, 0), 6000);
        assert_eq!(pace.most(1 << 20), 5056);
    }

    #[test]
    fn without_a_rate_nothing_pauses() {
        let mut pace = Pace::default();
        pace.spend(1 << 40, 5);
        assert_eq!(pace.pause(5), None);
        assert!(!pace.is_limited());
    }
}
