//! perftest's figures over time: each case of the matrix measured, set against what the machine itself can do, compared
//! with the committed ratios, and shown.
//!
//! Bandwidth is set against memcpy of the same size, latency against waking a third thread, both of the same run. So
//! a ratio says little about the machine and something about FreeFlow. Leaves to others: the cases
//! ([`crate::matrix`]), and what a developer sees while they run (the `xtask` program).

mod baseline;
mod plot;
mod report;

pub use baseline::{Baseline, Change};
pub use plot::plots;
pub use report::markdown;

use serde::Serialize;

use crate::{
    bed::{Bed, PairOutcome},
    matrix::Run,
    perftest::{self, Row},
    reference::Reference,
};

/// What one case came to.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// Tool, connection and case.
    pub name: String,
    /// One a size; none where perftest's table has no column that can be compared.
    pub figures: Vec<Figure>,
    /// Why it does not work, where it does not.
    pub failure: Option<String>,
}

/// One row of perftest's table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The size of the messages.
    pub bytes: u64,
    /// How much, in the unit.
    pub value: f64,
    /// Of what.
    pub unit: Unit,
    /// The same, as a multiple of what the machine does.
    pub ratio: f64,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum Unit {
    /// Bandwidth, the average; more is better.
    #[serde(rename = "GB/s")]
    GigabytesPerSecond,
    /// Latency one way, the typical; less is better.
    #[serde(rename = "us")]
    Microseconds,
}

impl Unit {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::GigabytesPerSecond => "GB/s",
            Self::Microseconds => "us",
        }
    }

    /// How many times as slow a ratio is as another one.
    pub fn slowdown(self, before: f64, now: f64) -> f64 {
        match self {
            Self::GigabytesPerSecond => before / now,
            Self::Microseconds => now / before,
        }
    }
}

impl Case {
    /// Runs a case once.
    pub fn measure(bed: &Bed, run: &Run, reference: &mut Reference) -> Self {
        let mut run = run.clone();
        // Cycles could not be compared with anything.
        run.tool.options.retain(|option| option != "-C");
        let outcome = bed.run_pair(&run.tool, run.limit);
        match outcome.and_then(|outcome| run.check(&outcome).map(|()| outcome)) {
            Ok(outcome) => Self { figures: figures(&outcome, reference), name: run.name, failure: None },
            Err(error) => Self { name: run.name, figures: Vec::new(), failure: Some(format!("{error:#}")) },
        }
    }

    /// The geometric mean of its ratios, and what they are ratios of.
    pub fn ratio(&self) -> Option<(f64, Unit)> {
        let unit = self.figures.first()?.unit;
        let logarithms: f64 = self.figures.iter().map(|figure| figure.ratio.ln()).sum();
        Some(((logarithms / self.figures.len() as f64).exp(), unit))
    }

    /// The better of two runs of the same case: what disturbs a machine only ever makes it slower.
    pub fn better(self, other: Self) -> Self {
        match (self.ratio(), other.ratio()) {
            (Some((ours, unit)), Some((theirs, _))) if unit.slowdown(ours, theirs) > 1.0 => self,
            (Some(_), None) => self,
            _ => other,
        }
    }
}

fn figures(outcome: &PairOutcome, reference: &mut Reference) -> Vec<Figure> {
    let rows = perftest::rows(&outcome.client.stdout);
    rows.iter().filter_map(|row| figure(row, reference)).filter(|figure| figure.ratio > 0.0).collect()
}

fn figure(row: &Row, reference: &mut Reference) -> Option<Figure> {
    let bytes = row.bytes;
    if let Some(mebibytes) = row.bandwidth() {
        let bandwidth = mebibytes * 1_048_576.0;
        let (value, ratio) = (bandwidth / 1e9, bandwidth / reference.memcpy(bytes));
        return Some(Figure { bytes, value, unit: Unit::GigabytesPerSecond, ratio });
    }
    let value = row.latency()?;
    Some(Figure { bytes, value, unit: Unit::Microseconds, ratio: value / reference.wake_us() })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn case(name: &str, unit: Unit, ratios: &[f64]) -> Case {
        let figures = ratios.iter().enumerate().map(|(index, &ratio)| Figure {
            bytes: 2 << index,
            value: 10.0 * ratio,
            unit,
            ratio,
        });
        Case { name: name.to_owned(), figures: figures.collect(), failure: None }
    }

    #[test]
    fn the_ratio_of_a_case_is_the_mean_of_its_rows() {
        let (ratio, unit) = case("a", Unit::Microseconds, &[1.0, 4.0]).ratio().unwrap();
        assert!((ratio - 2.0).abs() < 1e-9 && unit == Unit::Microseconds);
        assert!(case("a", Unit::Microseconds, &[]).ratio().is_none());
    }

    #[test]
    fn the_better_run_is_the_faster_one_whatever_the_unit() {
        for (unit, good, bad) in [(Unit::GigabytesPerSecond, 2.0, 1.0), (Unit::Microseconds, 1.0, 2.0)] {
            let (good, bad) = (case("a", unit, &[good]), case("a", unit, &[bad]));
            let failed = Case { figures: Vec::new(), failure: Some("no".to_owned()), ..bad.clone() };
            let best = good.ratio();
            assert_eq!(good.clone().better(bad.clone()).ratio(), best);
            assert_eq!(bad.better(good.clone()).ratio(), best);
            assert_eq!(good.clone().better(failed.clone()).ratio(), best);
            assert_eq!(failed.better(good).ratio(), best);
        }
    }
}
