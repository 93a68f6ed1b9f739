//! What the machine itself takes to hand a cache line from one core to another: the floor below which no direct
//! latency can be.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Round trips that are timed together: reading the clock takes a good part of one.
const BATCH: u32 = 256;
const BATCHES: u32 = 400;

/// A word that is alone in its cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicU32);

impl Line {
    fn wait_for(&self, value: u32) {
        while self.0.load(Ordering::Acquire) != value {
            spin_loop();
        }
    }
}

/// Half of the typical round trip between two threads that are pinned to a core each.
pub(crate) fn one_way() -> Result<Duration> {
    let allowed = sched_getaffinity(None)?;
    let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    let first = cores.next().context("no core to run on")?;
    let second = cores.next().context("one core alone: nothing can be handed over")?;
    let (there, back) = (Line::default(), Line::default());
    let mut trips: Vec<Duration> = thread::scope(|scope| {
        scope.spawn(|| {
            let pinned = pin(second);
            for round in 1..=BATCH * BATCHES {
                there.wait_for(round);
                back.0.store(round, Ordering::Release);
            }
            pinned
        });
        let timer = scope.spawn(|| {
            let pinned = pin(first);
            let trips = (0..BATCHES).map(|batch| trip(&there, &back, batch)).collect();
            pinned.map(|()| trips)
        });
        timer.join().unwrap_or_else(|_| Ok(Vec::new()))
    })?;
    trips.sort_unstable();
    let typical = trips.get(trips.len() / 2).context("nothing was timed")?;
    Ok(*typical / BATCH / 2)
}

/// The time of one batch.
fn trip(there: &Line, back: &Line, batch: u32) -> Duration {
    let start = Instant::now();
    for round in batch * BATCH + 1..=(batch + 1) * BATCH {
        there.0.store(round, Ordering::Release);
        back.wait_for(round);
    }
    start.elapsed()
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_handed_over_takes_time() {
        if thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) {
            assert!(one_way().unwrap() > Duration::ZERO);
        }
    }
}
