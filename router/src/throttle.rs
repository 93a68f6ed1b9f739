//! Log lines that a client can cause come at a bounded rate.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines let through in one [`PERIOD`].
const BURST: u32 = 10;
/// How long a burst lasts.
const PERIOD: Duration = Duration::from_secs(10);

/// The rate of one kind of line. Made to be a static beside the line.
#[derive(Debug)]
pub(crate) struct Throttle(Mutex<State>);

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl Throttle {
    /// A throttle that has let nothing through yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { since: None, lines: 0, suppressed: 0 }))
    }

    /// Whether a line may be written now; if so, how many were kept back since the last one.
    pub(crate) fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        if state.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines == BURST {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_burst_and_a_count() {
        let throttle = Throttle::new();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| throttle.admit_at(start).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        assert_eq!(throttle.admit_at(start + PERIOD), Some(990));
        assert_eq!(throttle.admit_at(start + PERIOD), Some(0));
    }
}
