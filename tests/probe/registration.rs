//! What registering memory costs beside touching it for the first time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::{
    buffer::Buffer,
    verbs::{ALL_ACCESS, Context, Mr, Pd},
};

const PAGE: usize = 4096;
/// Bytes that are touched and registered for each size, within these numbers of rounds.
const TOTAL: usize = 512 << 20;
const ROUNDS: (usize, usize) = (8, 400);

/// Prints a line: the medians of the first touch and of the registration of `len` bytes, in nanoseconds.
pub(crate) fn measure(len: usize) -> Result<()> {
    let context = Context::open()?;
    let pd = Pd::new(&context)?;
    let rounds = (TOTAL / len.max(1)).clamp(ROUNDS.0, ROUNDS.1);
    let (mut touches, mut registrations) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let buffer = Buffer::new(len)?;
        // Pages of 4 KiB, whatever the machine prefers.
        buffer.advise(0, len, libc::MADV_NOHUGEPAGE)?;
        touches.push(time(|| (0..len).step_by(PAGE).for_each(|at| buffer.fill(at, 1, 1))).0);
        let (took, mr) = time(|| Mr::new(&pd, buffer.addr(), len, ALL_ACCESS));
        mr.context("the memory cannot be registered")?;
        registrations.push(took);
    }
    println!("{} {}", median(touches).as_nanos(), median(registrations).as_nanos());
    Ok(())
}

fn time<R>(work: impl FnOnce() -> R) -> (Duration, R) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
