//! What whole-system tests share: the install tree, a bed that is made when the first test needs it, and test
//! programs that make their list of tests themselves.
//!
//! Leaves to others: starting and stopping things (`xtask`'s library), and what is promised (the test files).

#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod container;
pub(crate) mod daemon;
pub(crate) mod device;
pub(crate) mod guest_hosts;
pub(crate) mod guests;
pub(crate) mod hosts;
pub(crate) mod pingpong;
pub(crate) mod probe;
pub(crate) mod programs;
pub(crate) mod rootfs;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Error, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use xtask::{
    bed::Bed,
    conformance::{Suite, Tests},
    interrupt,
    matrix::{Matrix, Run, Tier},
    tree::Tree,
};

/// How long a tool that talks to nobody may take.
pub(crate) const SHORT: Duration = Duration::from_secs(20);
/// How much of the router's log a failure shows.
const LOG_LINES: usize = 40;

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The install tree under test.
pub(crate) fn tree() -> Result<Tree> {
    Tree::find(&workspace())
}

/// Why no test of the whole system can run here, where none can. A tree that was named must be whole: then what is
/// missing is a failure.
pub(crate) fn no_tree() -> Option<String> {
    let named = std::env::var_os("FREEFLOW_TREE").is_some();
    tree().err().filter(|_| !named).map(|error| error.to_string())
}

/// Says that a test did not run; `cargo xtask test` counts these lines.
pub(crate) fn skip(name: &str, reason: &str) {
    println!("SKIP {name}: {}", reason.replace('\n', " "));
}

/// rdma-core's own tests of a release. What cannot be had is told, and there are none; what does not build is a failure.
pub(crate) fn own_tests(bed: &Bed, suite: Suite) -> Result<Option<Tests>> {
    let cache = bed.tree.prefix().parent().context("the tree lies nowhere")?;
    if let Err(error) = suite.fetch(cache) {
        skip(&format!("rdma-core's own tests {}", suite.name()), &format!("{error:#}"));
        return Ok(None);
    }
    suite.prepare(cache).map(Some)
}

/// The main function of a test program. Where `obstacle` says why nothing can run, that is all it says.
pub(crate) fn run(
    name: &'static str,
    obstacle: Option<String>,
    trials: impl FnOnce() -> Vec<Trial>,
) -> ExitCode {
    let arguments = Arguments::from_args();
    interrupt::watch().expect("signals can be watched");
    let trials = match obstacle {
        Some(reason) => vec![Trial::test(name, move || {
            skip(name, &reason);
            Ok(())
        })],
        None => trials(),
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A bed for all tests of a program. It is made at the first use, and one test at a time has it: two at once would
/// compete for the processor and disturb each other's time limits.
#[derive(Clone)]
pub(crate) struct Stage {
    make: Arc<dyn Fn() -> Result<Bed> + Send + Sync>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
enum State {
    #[default]
    Unused,
    Ready(Box<Bed>),
    Broken(String),
}

impl Stage {
    /// A stage whose bed is made by this.
    pub(crate) fn new(make: impl Fn() -> Result<Bed> + Send + Sync + 'static) -> Self {
        Self { make: Arc::new(make), state: Arc::default() }
    }

    /// A test on this stage. What the router logged is shown where it fails.
    pub(crate) fn trial(
        &self,
        name: impl Into<String>,
        test: impl FnOnce(&Bed) -> Result<()> + Send + 'static,
    ) -> Trial {
        let stage = self.clone();
        Trial::test(name, move || stage.perform(test).map_err(|error| Failed::from(format!("{error:#}"))))
    }

    /// A test for each run of the matrix that belongs to a tier.
    pub(crate) fn matrix(&self, tier: Tier) -> Vec<Trial> {
        self.trials(Matrix::load(&workspace()).expect("the matrix can be read").runs(tier))
    }

    /// A test for each of those whose connections can be direct.
    pub(crate) fn direct_matrix(&self, tier: Tier) -> Vec<Trial> {
        self.trials(Matrix::load(&workspace()).expect("the matrix can be read").direct_runs(tier))
    }

    fn trials(&self, runs: Vec<Run>) -> Vec<Trial> {
        let trials = runs.into_iter().map(|run| {
            self.trial(run.name.clone(), move |bed| run.check(&bed.run_pair(&run.tool, run.limit)?))
        });
        trials.collect()
    }

    fn perform(&self, test: impl FnOnce(&Bed) -> Result<()>) -> Result<()> {
        interrupt::check()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Unused) {
            *state = match (self.make)() {
                Ok(bed) => State::Ready(Box::new(bed)),
                Err(error) => State::Broken(format!("{error:#}")),
            };
        }
        match &mut *state {
            State::Ready(bed) => perform_on(bed, test),
            State::Broken(error) => Err(anyhow!("nothing to test on: {error}")),
            State::Unused => unreachable!("the stage was set above"),
        }
    }
}

fn perform_on(bed: &mut Bed, test: impl FnOnce(&Bed) -> Result<()>) -> Result<()> {
    let with_log = |error: Error, bed: &Bed| {
        let log = bed.router.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
        anyhow!("{error:#}\nthe router's log ends with:\n  {tail}")
    };
    test(bed).map_err(|error| with_log(error, bed))?;
    bed.router.check_alive()
}

/// Waits until something is so.
pub(crate) fn wait_until(mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_so()? {
        interrupt::check()?;
        if start.elapsed() > SHORT {
            return Err(anyhow!("it is still not so after {SHORT:?}"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A test's own words from a slice.
pub(crate) fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
