//! A router that a test kills, ends or replaces, and what it holds while it runs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::{
    interrupt,
    process::{Job, Outcome, command, run},
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(20);
const LIFE: Duration = Duration::from_secs(3600);
/// How long a router may take to clean up after clients.
const SETTLE: Duration = Duration::from_secs(5);

/// A running router on a socket that the test names.
#[derive(Debug)]
pub(crate) struct Daemon {
    job: Job,
    pub(crate) tree: Tree,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Starts a router and waits until it answers.
    pub(crate) fn start(tree: &Tree, socket: &Path) -> Result<Self> {
        Self::start_with(tree, socket, &[])
    }

    /// The same with further words on its command line.
    pub(crate) fn start_with(tree: &Tree, socket: &Path, words: &[&str]) -> Result<Self> {
        let mut start = command([tree.program()]);
        start.args(["router", "--socket"]).arg(socket).args(words);
        Self::start_by(tree, socket, start)
    }

    /// The same by a command of the test's own.
    pub(crate) fn start_by(tree: &Tree, socket: &Path, start: Command) -> Result<Self> {
        let job = Job::spawn(start, LIFE)?;
        let mut daemon = Self { job, tree: tree.clone(), socket: socket.to_owned() };
        let began = Instant::now();
        while daemon.status().is_err() {
            interrupt::check()?;
            if daemon.job.has_ended()? || began.elapsed() > LIMIT {
                bail!("the router does not serve; its log:\n{}", daemon.job.stderr());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// What `freeflow status --json` says.
    pub(crate) fn status(&self) -> Result<Value> {
        self.status_at(&self.socket)
    }

    /// The same at another of its sockets.
    pub(crate) fn status_at(&self, socket: &Path) -> Result<Value> {
        let mut ask = command([self.tree.program()]);
        ask.args(["status", "--json", "--socket"]).arg(socket);
        Ok(serde_json::from_str(&run(ask, LIMIT)?.stdout)?)
    }

    /// Waits until no client is left.
    pub(crate) fn wait_until_idle(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let status = self.status()?;
            if status["clients"].as_array().is_some_and(Vec::is_empty) {
                ensure!(status["qps"].as_array().is_some_and(Vec::is_empty), "QPs of nobody: {status}");
                return Ok(());
            }
            ensure!(began.elapsed() < SETTLE, "clients that are gone are still there: {status}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it.
    pub(crate) fn kill(self) -> Result<()> {
        let pid = i32::try_from(self.job.pid()).ok().and_then(Pid::from_raw).context("no process")?;
        // The job was not waited for, so the number is still its own.
        kill_process(pid, Signal::KILL)?;
        self.job.wait()?;
        Ok(())
    }

    /// Has it read its configuration again.
    pub(crate) fn reload(&self) -> Result<()> {
        let pid = i32::try_from(self.job.pid()).ok().and_then(Pid::from_raw).context("no process")?;
        // The job was not waited for, so the number is still its own.
        Ok(kill_process(pid, Signal::HUP)?)
    }

    /// Asks it to end.
    pub(crate) fn stop(self) -> Result<Outcome> {
        self.job.stop(LIMIT)
    }

    /// What the router has written so far.
    pub(crate) fn log(&self) -> String {
        self.job.stderr()
    }

    /// What it holds now.
    pub(crate) fn holdings(&self) -> Result<Holdings> {
        Holdings::of(self.job.pid()).context("the router is gone")
    }

    /// Fails unless the router comes back to what it held, with some slack for its allocator.
    pub(crate) fn check_holdings(&self, before: &Holdings) -> Result<()> {
        self.wait_until_idle()?;
        let began = Instant::now();
        loop {
            let now = self.holdings()?;
            if now.is_back_at(before) {
                return Ok(());
            }
            ensure!(began.elapsed() < SETTLE, "the router held {before:?} and now holds {now:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What a process holds.
#[derive(Clone, Debug)]
pub(crate) struct Holdings {
    descriptors: usize,
    mappings: usize,
    threads: usize,
    resident_kib: u64,
}

/// An allocator's arenas for new threads' sizes of blocks come late, and stay.
const SPARE_MAPPINGS: usize = 4;
const SPARE_KIB: u64 = 8 << 10;

impl Holdings {
    fn of(pid: u32) -> io::Result<Self> {
        let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
        let resident = file("status")?
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        Ok(Self {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            mappings: file("maps")?.lines().count(),
            threads: fs::read_dir(format!("/proc/{pid}/task"))?.count(),
            resident_kib: resident.unwrap_or(0),
        })
    }

    fn is_back_at(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors
            && self.mappings <= before.mappings + SPARE_MAPPINGS
            && self.threads <= before.threads
            && self.resident_kib <= before.resident_kib + SPARE_KIB
    }
}
