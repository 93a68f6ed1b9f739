//! What the machine itself can do, to set figures against.

use std::{
    collections::BTreeMap,
    hint::black_box,
    time::{Duration, Instant},
};

use crate::wake;

/// How long one size is copied.
const COPYING: Duration = Duration::from_millis(300);

/// Bytes a second of copying one message's buffer to another.
pub fn memcpy(bytes: usize) -> f64 {
    memcpy_in_turn(bytes, 1)
}

/// The same for so many pairs of buffers, one after the other: how much the caches hold decides.
pub fn memcpy_in_turn(bytes: usize, pairs: usize) -> f64 {
    let mut buffers = vec![(vec![1_u8; bytes], vec![0_u8; bytes]); pairs];
    // Looking at the clock is dearer than copying a few bytes.
    let batch = (1 << 20) / bytes.max(1) as u64 + 8;
    let (mut copies, start) = (0_u64, Instant::now());
    while start.elapsed() < COPYING {
        for _ in 0..batch.div_ceil(pairs as u64) {
            for (source, target) in &mut buffers {
                black_box(target).copy_from_slice(black_box(source));
            }
            copies += pairs as u64;
        }
    }
    copies as f64 * bytes as f64 / start.elapsed().as_secs_f64()
}

/// The machine's figures, measured when first asked for.
#[derive(Debug)]
pub struct Reference {
    copying: BTreeMap<u64, f64>,
    wake_us: f64,
}

impl Reference {
    /// Measures what every run needs.
    pub fn measure() -> Self {
        Self { copying: BTreeMap::new(), wake_us: wake::one_way().as_secs_f64() * 1e6 }
    }

    /// What a machine is taken for that was not measured.
    #[cfg(test)]
    pub(crate) fn of_wake(wake_us: f64) -> Self {
        Self { copying: BTreeMap::new(), wake_us }
    }

    /// Bytes a second of a memcpy of this size.
    pub fn memcpy(&mut self, bytes: u64) -> f64 {
        *self.copying.entry(bytes).or_insert_with(|| memcpy(usize::try_from(bytes).unwrap_or(usize::MAX)))
    }

    /// Microseconds from one thread to another through a third that sleeps.
    pub fn wake_us(&self) -> f64 {
        self.wake_us
    }

    /// The sizes that were copied so far, with bytes a second.
    pub fn copied(&self) -> &BTreeMap<u64, f64> {
        &self.copying
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_measured_once() {
        let mut reference = Reference::of_wake(1.0);
        let first = reference.memcpy(65_536);
        assert!(first > 1e8);
        assert_eq!((reference.memcpy(65_536), reference.copied().len()), (first, 1));
    }
}
