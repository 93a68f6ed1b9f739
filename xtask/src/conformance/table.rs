//! The table of what each test of a suite comes to: committed, so that a lost test is seen.
//!
//! ```text
//! # a remark
//! test_cq.CQTest.test_resize_cq                          ok
//! test_odp.OdpTestCase.test_odp_rc_huge_traffic          ok    where there are huge pages
//! test_flow.FlowTest.test_eth_spec_flow_traffic          skip  no raw packet QPs
//! ```
//!
//! A reason after `ok` names what a machine must have: without it the test may skip.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context, Result, bail};

/// What a test came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It passed.
    Ok,
    /// It said that it cannot run.
    Skip,
    /// It failed, died, or was not done in time.
    Fail,
}

impl Outcome {
    /// The outcome of this name.
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "ok" => Self::Ok,
            "skip" => Self::Skip,
            "fail" => Self::Fail,
            other => bail!("`{other}` is no outcome of a test; use ok, skip or fail"),
        })
    }

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skip => "skip",
            Self::Fail => "fail",
        }
    }
}

/// What a test should come to, and why if that is not plain success.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Promise {
    /// The outcome.
    pub outcome: Outcome,
    /// Why it skips, or what it needs; may be empty after `ok`.
    pub reason: String,
}

/// The promises of a suite.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Table {
    remarks: Vec<String>,
    promises: BTreeMap<String, Promise>,
}

impl Table {
    /// Reads a table. A test that is not promised to pass must say why.
    pub fn parse(text: &str) -> Result<Self> {
        let mut table = Self::default();
        for (number, line) in text.lines().enumerate() {
            if line.starts_with('#') {
                table.remarks.push(line.to_owned());
            } else if !line.trim().is_empty() {
                let (test, promise) = row(line).with_context(|| format!("line {}: {line}", number + 1))?;
                if table.promises.insert(test.to_owned(), promise).is_some() {
                    bail!("line {}: {test} stands there twice", number + 1);
                }
            }
        }
        Ok(table)
    }

    /// What is wrong with the results of a run: tests that came to less than was promised, and tests that the table
    /// does not know. A run of all tests must also have run each that the table names.
    pub fn losses(&self, results: &[(String, Outcome)], is_whole: bool) -> Vec<String> {
        let mut losses = Vec::new();
        for (test, outcome) in results {
            match self.promises.get(test) {
                None => losses.push(format!("{test}: {}, and not in the table", outcome.name())),
                Some(promise) if !promise.holds(*outcome) && *outcome != Outcome::Ok => {
                    losses.push(format!("{test}: {}, promised {}", outcome.name(), promise.outcome.name()));
                }
                Some(_) => {}
            }
        }
        if is_whole {
            let ran = |test: &String| results.iter().any(|(name, _)| name == test);
            losses.extend(
                self.promises.keys().filter(|test| !ran(test)).map(|test| format!("{test}: not run")),
            );
        }
        losses
    }

    /// Tests that came to more than was promised: the table can promise them from now on.
    pub fn gains(&self, results: &[(String, Outcome)]) -> Vec<String> {
        let gained = results.iter().filter(|(test, outcome)| {
            let promised = self.promises.get(test).map(|promise| promise.outcome);
            *outcome == Outcome::Ok && promised.is_some_and(|promised| promised != Outcome::Ok)
        });
        gained.map(|(test, _)| test.clone()).collect()
    }

    /// Takes the results over. Reasons stay where the outcome does; a new skip gets the test's own reason.
    pub fn update(&mut self, results: &[(String, Outcome)], reason: impl Fn(&str) -> String) {
        for (test, outcome) in results {
            let before = self.promises.get(test);
            if before.is_some_and(|promise| promise.holds(*outcome)) {
                continue;
            }
            let reason = if *outcome == Outcome::Ok { String::new() } else { reason(test) };
            self.promises.insert(test.clone(), Promise { outcome: *outcome, reason });
        }
    }

    /// The table as it is committed.
    pub fn text(&self) -> String {
        let width = self.promises.keys().map(String::len).max().unwrap_or(0);
        let mut text = String::new();
        for remark in &self.remarks {
            let _ = writeln!(text, "{remark}");
        }
        for (test, promise) in &self.promises {
            let line = format!("{test:<width$}  {:<4}  {}", promise.outcome.name(), promise.reason);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

impl Promise {
    fn holds(&self, outcome: Outcome) -> bool {
        let may_skip = self.outcome == Outcome::Ok && !self.reason.is_empty();
        outcome == self.outcome || may_skip && outcome == Outcome::Skip
    }
}

fn row(line: &str) -> Result<(&str, Promise)> {
    let (test, rest) = line.trim().split_once(char::is_whitespace).context("no outcome after the test")?;
    let rest = rest.trim_start();
    let (outcome, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let promise = Promise { outcome: Outcome::named(outcome)?, reason: reason.trim().to_owned() };
    if promise.outcome != Outcome::Ok && promise.reason.is_empty() {
        bail!("no reason why it does not pass");
    }
    Ok((test, promise))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# a remark\na.b   ok\na.c   skip  no such thing\na.d   ok    where there are huge pages\n";

    fn results(results: &[(&str, Outcome)]) -> Vec<(String, Outcome)> {
        results.iter().map(|&(test, outcome)| (test.to_owned(), outcome)).collect()
    }

    #[test]
    fn a_table_is_written_as_it_was_read() {
        let text = Table::parse(TEXT).unwrap().text();
        assert_eq!(Table::parse(&text).unwrap().text(), text);
        assert!(text.starts_with("# a remark\na.b  ok\na.c  skip  no such thing\n"));
    }

    #[test]
    fn a_skip_without_a_reason_is_refused() {
        let error = format!("{:#}", Table::parse("a.b ok\na.c skip\n").unwrap_err());
        assert!(error.contains("line 2") && error.contains("no reason"), "{error}");
        assert!(Table::parse("a.b maybe\n").is_err());
        assert!(Table::parse("a.b ok\na.b ok\n").is_err());
    }

    #[test]
    fn a_lost_an_unknown_and_a_missing_test_are_losses() {
        let table = Table::parse(TEXT).unwrap();
        let whole = results(&[("a.b", Outcome::Ok), ("a.c", Outcome::Skip), ("a.d", Outcome::Skip)]);
        assert_eq!(table.losses(&whole, true), Vec::<String>::new());
        let lost = results(&[("a.b", Outcome::Skip), ("a.c", Outcome::Fail), ("a.e", Outcome::Ok)]);
        assert_eq!(table.losses(&lost, false).len(), 3);
        assert_eq!(table.losses(&lost, true).len(), 4);
    }

    #[test]
    fn a_test_that_passes_now_is_a_gain_and_no_loss() {
        let mut table = Table::parse(TEXT).unwrap();
        let better = results(&[("a.c", Outcome::Ok)]);
        assert_eq!(table.gains(&better), ["a.c"]);
        table.update(&better, |_| unreachable!("it passed"));
        assert!(table.losses(&better, false).is_empty() && table.gains(&better).is_empty());
    }
}
