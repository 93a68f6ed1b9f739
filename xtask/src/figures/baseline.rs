//! The committed ratios, `perftest-ci/baseline.json`: a case's name and what it came to.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::Case;

/// The ratios that cases once had.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Baseline {
    /// Nothing where a case works but has no figure.
    ratios: BTreeMap<String, Option<f64>>,
}

/// What is worse, or better, than it was.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// It worked.
    StoppedWorking,
    /// So many times slower.
    Slower(f64),
    /// So many times faster.
    Faster(f64),
    /// It is not in the baseline.
    New,
}

impl Baseline {
    /// Where a workspace keeps it.
    pub fn path(workspace: &Path) -> PathBuf {
        workspace.join("perftest-ci/baseline.json")
    }

    /// Reads that of a workspace.
    pub fn load(workspace: &Path) -> Result<Self> {
        let path = Self::path(workspace);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let ratios = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        Ok(Self { ratios })
    }

    /// The ratio that a case had.
    pub fn ratio(&self, name: &str) -> Option<f64> {
        self.ratios.get(name).copied().flatten()
    }

    /// How a case differs from what it was, by more than `tolerance` times.
    pub fn change(&self, case: &Case, tolerance: f64) -> Option<Change> {
        let Some(before) = self.ratios.get(&case.name) else { return Some(Change::New) };
        if case.failure.is_some() {
            return Some(Change::StoppedWorking);
        }
        let (now, unit) = case.ratio()?;
        match unit.slowdown((*before)?, now) {
            factor if factor > tolerance => Some(Change::Slower(factor)),
            factor if factor < 1.0 / tolerance => Some(Change::Faster(1.0 / factor)),
            _ => None,
        }
    }

    /// Takes what works over; what was not run stays.
    pub fn update(&mut self, cases: &[Case]) {
        for case in cases.iter().filter(|case| case.failure.is_none()) {
            let ratio = case.ratio().map(|(ratio, _)| rounded(ratio));
            self.ratios.insert(case.name.clone(), ratio);
        }
    }

    /// As it is committed: a case a line.
    pub fn text(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(&self.ratios)? + "\n")
    }
}

impl Change {
    /// Whether something got worse.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::StoppedWorking | Self::Slower(_))
    }

    /// In words.
    pub fn text(&self) -> String {
        match self {
            Self::StoppedWorking => "stopped working".to_owned(),
            Self::Slower(factor) => format!("{factor:.1} x slower"),
            Self::Faster(factor) => format!("{factor:.1} x faster"),
            Self::New => "new".to_owned(),
        }
    }
}

/// Three digits: more would only be noise in the history.
fn rounded(ratio: f64) -> f64 {
    format!("{ratio:.2e}").parse().unwrap_or(ratio)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Unit, tests::case},
        *,
    };

    #[test]
    fn what_is_slower_or_gone_is_told_by_its_unit() {
        let mut baseline = Baseline::default();
        baseline
            .update(&[case("bw", Unit::GigabytesPerSecond, &[0.5]), case("lat", Unit::Microseconds, &[2.0])]);
        let change = |name: &str, unit, ratio| {
            baseline.change(&case(name, unit, &[ratio]), 2.0).map(|change| change.text())
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(change("bw", Unit::GigabytesPerSecond, 0.3), None);
        assert_eq!(change("bw", Unit::GigabytesPerSecond, 0.1), text("5.0 x slower"));
        assert_eq!(change("bw", Unit::GigabytesPerSecond, 2.0), text("4.0 x faster"));
        assert_eq!(change("lat", Unit::Microseconds, 8.0), text("4.0 x slower"));
        assert_eq!(change("lat", Unit::Microseconds, 0.5), text("4.0 x faster"));
        assert_eq!(change("other", Unit::Microseconds, 1.0), Some(Change::New.text()));
        let gone = Case { failure: Some("no".to_owned()), ..case("lat", Unit::Microseconds, &[]) };
        assert_eq!(baseline.change(&gone, 2.0), Some(Change::StoppedWorking));
        assert!(Change::StoppedWorking.is_loss() && !Change::New.is_loss());
    }

    #[test]
    fn failures_do_not_become_the_baseline() {
        let mut baseline = Baseline::default();
        baseline.update(&[case("bw", Unit::GigabytesPerSecond, &[0.123_456])]);
        let gone = Case { failure: Some("no".to_owned()), ..case("bw", Unit::GigabytesPerSecond, &[]) };
        baseline.update(&[gone]);
        assert_eq!(baseline.ratio("bw"), Some(0.123));
    }
}
