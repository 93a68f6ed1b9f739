//! A run of a suite: the driver's lines become results.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use super::{Outcome, Suite, Tests, patched::BARE};
use crate::{bed::Bed, huge_pages::HugePages, process::Job};

/// What one test may take. Polling tests give up by themselves after 10 seconds.
const TEST_LIMIT: Duration = Duration::from_secs(60);
/// What a whole run may take.
const RUN_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Huge pages that the most demanding test needs.
const HUGE_PAGES: u64 = 8;
/// Modules about features of one vendor's devices.
const VENDORS: [&str; 3] = ["test_mlx5", "test_efa", "test_cuda"];

/// What became of each test.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Outcome and reason of each test.
    pub results: Vec<(String, Outcome, String)>,
    /// What failed tests printed.
    pub details: String,
}

impl Report {
    /// The outcomes alone.
    pub fn outcomes(&self) -> Vec<(String, Outcome)> {
        self.results.iter().map(|(test, outcome, _)| (test.clone(), *outcome)).collect()
    }

    /// What a test gave as its reason.
    pub fn reason(&self, test: &str) -> String {
        let found = self.results.iter().find(|(name, ..)| name == test);
        found.map_or_else(String::new, |(_, _, reason)| reason.clone())
    }

    /// The line that a suite comes to.
    pub fn line(&self, suite: Suite) -> String {
        let count = |wanted| self.results.iter().filter(|(_, outcome, _)| *outcome == wanted).count();
        let (passed, failed, skipped) = (count(Outcome::Ok), count(Outcome::Fail), count(Outcome::Skip));
        format!("pyverbs {}: {passed} passed, {failed} failed, {skipped} skipped", suite.name())
    }

    /// Takes one line of the driver into account.
    fn read(&mut self, line: &str) -> Result<()> {
        if let Some(printed) = line.strip_prefix('|') {
            self.details.push_str(printed);
            self.details.push('\n');
            return Ok(());
        }
        let Some(result) = line.strip_prefix("RESULT ") else { return Ok(()) };
        let mut words = result.splitn(4, ' ');
        let (Some(outcome), Some(_seconds), Some(test)) = (words.next(), words.next(), words.next()) else {
            bail!("the driver said `{line}`, which is no result");
        };
        let outcome = Outcome::named(outcome)?;
        let reason = words.next().unwrap_or_default();
        if outcome == Outcome::Fail {
            self.details.push_str(&format!("^ {test}: {reason}\n\n"));
        }
        self.results.push((test.to_owned(), outcome, reason.to_owned()));
        Ok(())
    }
}

/// Runs the tests whose names contain one of the words, all if there is none, against the bed's router.
pub fn run(bed: &Bed, workspace: &Path, tests: &Tests, only: &[String]) -> Result<Report> {
    let text = |path: &Path| path.display().to_string();
    let mut words: Vec<String> = Vec::new();
    words.extend(tests.bare.then_some(BARE).iter().flatten().map(|&word| word.to_owned()));
    words.extend([tests.python.clone(), text(&workspace.join("conformance/driver.py"))]);
    words.push(text(&tests.folder));
    let limit = TEST_LIMIT.as_secs().to_string();
    words.extend(["--dev", "ff0", "--limit", &limit].map(str::to_owned));
    words.extend(VENDORS.iter().flat_map(|vendor| ["--skip-module".to_owned(), (*vendor).to_owned()]));
    words.extend(only.iter().flat_map(|word| ["--only".to_owned(), word.clone()]));
    let mut command = bed.command(&bed.client, &words);
    command.env("PYTHONPATH", &tests.pyverbs).env("PYTHONDONTWRITEBYTECODE", "1");
    if let Some(libraries) = &tests.libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let _huge_pages = HugePages::set_aside(HUGE_PAGES);
    let outcome = Job::spawn(command, RUN_LIMIT)?.wait()?;
    let mut report = Report::default();
    for line in outcome.stdout.lines() {
        report.read(line).with_context(|| outcome.report())?;
    }
    ensure!(outcome.succeeded(), "the run did not come to its end\n{}", outcome.report());
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_lines_become_results() {
        let mut report = Report::default();
        let lines = [
            "RESULT ok 0.02 a.b ",
            "| printed",
            "RESULT fail 1.50 a.c ValueError: no",
            "RESULT skip 0.01 a.d why",
        ];
        lines.iter().for_each(|line| report.read(line).unwrap());
        assert_eq!(report.line(Suite::V44), "pyverbs v44: 1 passed, 1 failed, 1 skipped");
        assert_eq!(report.reason("a.d"), "why");
        assert_eq!(report.details, " printed\n^ a.c: ValueError: no\n\n");
        assert!(report.read("RESULT ok").is_err());
    }
}
