//! `cargo xtask test`: the tiers of tests, with a line a tier at the end.
//!
//! One runner (`cargo test`) everywhere, so that the counts mean the same on each machine. A test that cannot run
//! prints `SKIP <name>: <reason>` and passes; it is counted as skipped here, never as passed.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use xtask::{interrupt, tree::Tree};

use crate::{build, fuzz, packages, packages::Package, workspace};

/// Whole-system tests that need neither router nor tools, and so belong to the first tier.
const UNIT_TESTS: [&str; 1] = ["layering"];
const TIER_LIMIT: Duration = Duration::from_secs(40 * 60);
/// How long each fuzz target runs among the tests.
const FUZZ_SECONDS: u64 = 10;
const GRACE: Duration = Duration::from_secs(20);

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The tiers to run; all of them when none is named
    tiers: Vec<Tier>,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// An install tree to use instead of building one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Tier {
    /// Unit, property and program tests of the crates
    Unit,
    /// Stock tools between two processes of this host
    Process,
    /// Stock tools between two network namespaces
    Hosts,
    /// Stock tools between two unprivileged containers
    Containers,
    /// Virtual machines whose kernel has RDMA
    Vm,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let tiers = if options.tiers.is_empty() { Tier::value_variants() } else { &options.tiers };
    let mut tree = None;
    let mut results = Vec::new();
    for &tier in tiers {
        println!("\n== tier {} ==", tier.name());
        let count = run_tier(tier, options, &mut tree).or_else(|error| {
            interrupt::check()?;
            anyhow::Ok(Count::of_failure(format!("{error:#}")))
        })?;
        results.push((tier, count));
    }
    Ok(report(&results))
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Process => "process",
            Self::Hosts => "hosts",
            Self::Containers => "containers",
            Self::Vm => "vm",
        }
    }

    fn packages(self) -> Vec<Package> {
        match self {
            Self::Unit => Vec::new(),
            Self::Process => [&packages::TOOLS[..], &packages::ALLOCATORS, &packages::RDMA_CM].concat(),
            Self::Hosts => {
                let tools = [&packages::TOOLS[..], &packages::NAMESPACES, &packages::RDMA_CM];
                [&tools.concat()[..], &packages::ETCD, &packages::CLOCKS].concat()
            }
            Self::Containers => packages::CONTAINERS.to_vec(),
            Self::Vm => {
                [&packages::TOOLS[..], &packages::RDMA_CM, &packages::NAMESPACES, &packages::MACHINES]
                    .concat()
            }
        }
    }

    /// The tier of a file in `tests/`: the word before the first underscore names it, `process` where it does not.
    fn of_test(stem: &str) -> Self {
        if UNIT_TESTS.contains(&stem) {
            return Self::Unit;
        }
        let word = stem.split('_').next().unwrap_or(stem);
        Self::from_str(word, false).unwrap_or(Self::Process)
    }

    /// The whole-system test programs of this tier.
    fn tests(self) -> Result<BTreeSet<String>> {
        let mut tests = BTreeSet::new();
        for entry in std::fs::read_dir(workspace().join("tests"))? {
            let path = entry?.path();
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if path.extension().is_some_and(|end| end == "rs") && Self::of_test(&stem) == self {
                tests.insert(stem);
            }
        }
        Ok(tests)
    }
}

/// The tree is built for the first tier that needs it.
fn run_tier(tier: Tier, options: &Options, tree: &mut Option<Tree>) -> Result<Count> {
    if let Err(error) = packages::require(&tier.packages()) {
        println!("{error:#}");
        return Ok(Count::of_skip(format!("{error:#}")));
    }
    if tier == Tier::Process {
        // Without these a few tests are skipped, not the tier.
        for optional in [&packages::PROGRAMS[..], &packages::RSOCKET, &packages::RDMA_CORE] {
            packages::require(optional).unwrap_or_else(|error| println!("{error:#}"));
        }
    }
    let filter = options.filter.as_deref();
    let mut count = Count::default();
    if tier == Tier::Unit {
        let mut command = cargo_test(&["--workspace", "--exclude", "freeflow"], &[], filter);
        command.env_remove("FREEFLOW_TREE");
        count.add(run_and_count(command)?);
        if filter.is_none() {
            count.add(fuzz_a_little()?);
        }
    }
    let tests = tier.tests()?;
    if tests.is_empty() {
        return Ok(count);
    }
    let mut targets = vec!["--package".to_owned(), "freeflow".to_owned()];
    targets.extend(tests.into_iter().flat_map(|test| ["--test".to_owned(), test]));
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let mut command = cargo_test(&targets, &["--test-threads=1"], filter);
    if tier != Tier::Unit {
        if tree.is_none() {
            *tree = Some(build::tree(options.tree.as_deref())?);
        }
        command.env("FREEFLOW_TREE", tree.as_ref().map_or(Path::new(""), Tree::prefix));
    }
    count.add(run_and_count(command)?);
    Ok(count)
}

/// Each fuzz target for a few seconds: that they still run, and find nothing at once.
fn fuzz_a_little() -> Result<Count> {
    if let Some(reason) = fuzz::obstacle() {
        println!("SKIP fuzz: {reason}");
        return Ok(Count::of_skip(format!("fuzz: {reason}")));
    }
    let programs = fuzz::Programs::build()?;
    let mut count = Count::default();
    for target in fuzz::TARGETS {
        interrupt::check()?;
        match programs.run(target, FUZZ_SECONDS) {
            Ok(()) => count.passed += 1,
            Err(error) => count.add(Count::of_failure(format!("{error:#}"))),
        }
    }
    Ok(count)
}

fn cargo_test(targets: &[&str], harness: &[&str], filter: Option<&str>) -> Command {
    let mut command = build::cargo();
    // Shown output carries the SKIP lines of tests that pass.
    command
        .args(["test", "--no-fail-fast"])
        .args(targets)
        .args(["--", "--show-output"])
        .args(harness)
        .args(filter);
    command
}

/// What a tier's tests came to.
#[derive(Clone, Debug, Default, PartialEq)]
struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// SKIP lines of a test program whose result is still to come.
    skipped_in_words: u64,
    /// Which failed, and why what was skipped was.
    notes: Vec<String>,
}

impl Count {
    fn of_skip(reason: String) -> Self {
        Self { skipped: 1, notes: vec![reason], ..Self::default() }
    }

    fn of_failure(reason: String) -> Self {
        Self { failed: 1, notes: vec![reason], ..Self::default() }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.notes.extend(other.notes);
    }

    /// Takes one line of a test program's output into account.
    fn read(&mut self, line: &str) {
        if let Some(skip) = line.rsplit("... ").next().and_then(|end| end.trim().strip_prefix("SKIP ")) {
            self.skipped_in_words += 1;
            self.notes.push(skip.to_owned());
        } else if let Some(result) = line.strip_prefix("test result: ") {
            let number = |what: &str| result.split([';', '.']).find_map(|part| number_before(part, what));
            self.passed += number("passed").unwrap_or(0);
            self.failed += number("failed").unwrap_or(0);
            self.skipped += number("ignored").unwrap_or(0);
            // Who says SKIP passes as far as its test program knows.
            self.passed = self.passed.saturating_sub(self.skipped_in_words);
            self.skipped += std::mem::take(&mut self.skipped_in_words);
        } else if let Some(name) = line.strip_prefix("test ").and_then(|line| line.strip_suffix("FAILED")) {
            self.notes.push(format!("{} failed", name.trim_end().trim_end_matches("...").trim_end()));
        }
    }

    fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The number in ` 12 passed`.
fn number_before(part: &str, what: &str) -> Option<u64> {
    let words: Vec<&str> = part.split_whitespace().collect();
    let [.., number, word] = words.as_slice() else { return None };
    if *word == what { number.parse().ok() } else { None }
}

/// Runs test programs, shows what they print, counts.
fn run_and_count(mut command: Command) -> Result<Count> {
    let mut child =
        command.stdout(Stdio::piped()).process_group(0).spawn().context("could not start cargo test")?;
    let lines = lines_of(child.stdout.take().context("no output of cargo test")?);
    let watched = watch(&lines, |line| println!("{line}"));
    if watched.is_err() {
        end_group(&mut child);
    }
    let mut count = watched?;
    if !child.wait()?.success() && count.failed == 0 {
        count.add(Count::of_failure("a test program did not compile, or died".to_owned()));
    }
    Ok(count)
}

fn watch(lines: &Receiver<String>, show: impl Fn(&str)) -> Result<Count> {
    let mut count = Count::default();
    let deadline = Instant::now() + TIER_LIMIT;
    loop {
        interrupt::check()?;
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                show(&line);
                count.read(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                bail!("not done within {} minutes, so ended", TIER_LIMIT.as_secs() / 60)
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    Ok(count)
}

/// Lines as they come, over a channel, so that waiting for one can end.
fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Asks first: test programs clean up after a SIGTERM, and go on doing so when cargo is already gone.
fn end_group(child: &mut Child) {
    let group = Pid::from_child(child);
    let _ = kill_process_group(group, Signal::TERM);
    let asked = Instant::now();
    // An ended child stays in its group until it is waited for.
    while matches!(child.try_wait(), Ok(None)) || test_kill_process_group(group).is_ok() {
        if asked.elapsed() > GRACE {
            let _ = kill_process_group(group, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn report(results: &[(Tier, Count)]) -> ExitCode {
    let mut total = Count::default();
    println!();
    for (tier, count) in results {
        println!("{}: {}", tier.name(), count.line());
        for note in &count.notes {
            println!("    {}", note.replace('\n', "\n    "));
        }
        total.add(count.clone());
    }
    println!("total: {}", total.line());
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(text: &str) -> Count {
        let (sender, receiver) = mpsc::channel();
        for line in text.lines() {
            sender.send(line.to_owned()).unwrap();
        }
        drop(sender);
        // Not shown: the run that counts this test would count what it shows.
        watch(&receiver, |_| {}).unwrap()
    }

    #[test]
    fn results_of_several_programs_are_added() {
        let count = counted(
            "test result: ok. 10 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.1s\n\
             test a::b ... FAILED\n\
             test result: FAILED. 4 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n",
        );
        assert_eq!((count.passed, count.failed, count.skipped), (14, 1, 1));
        assert_eq!(count.notes, ["a::b failed"]);
    }

    #[test]
    fn a_test_that_says_skip_is_skipped_and_not_passed() {
        let count = counted(
            "test vm ... SKIP vm: no test of this tier yet\nok\n\
             SKIP other: no reason\n\
             test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!((count.passed, count.failed, count.skipped), (1, 0, 2));
        assert_eq!(count.notes, ["vm: no test of this tier yet", "other: no reason"]);
    }

    #[test]
    fn the_name_of_a_test_tells_its_tier() {
        assert_eq!(Tier::of_test("layering"), Tier::Unit);
        assert_eq!(Tier::of_test("process_tools"), Tier::Process);
        assert_eq!(Tier::of_test("hosts"), Tier::Hosts);
        assert_eq!(Tier::of_test("vm_rxe"), Tier::Vm);
        assert_eq!(Tier::of_test("client_death"), Tier::Process);
    }
}
