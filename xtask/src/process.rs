//! Processes that we start: each in a process group of its own, its output kept, its life bounded.
//!
//! A job that outlives its limit, or whose handle is dropped, is killed with its whole group. Output goes into
//! unnamed files instead of pipes, so a chatty job never blocks and a dead one leaves nothing behind.

use std::{
    fmt::Write as _,
    fs::File,
    os::unix::{fs::FileExt, process::CommandExt},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::interrupt;

/// A process that we started.
#[derive(Debug)]
pub struct Job {
    name: String,
    child: Child,
    stdout: File,
    stderr: File,
    started: Instant,
    limit: Duration,
    status: Option<ExitStatus>,
}

impl Job {
    /// Starts a command that may run for `limit` from now.
    pub fn spawn(mut command: Command, limit: Duration) -> Result<Self> {
        let name = words(&command);
        let stdout = tempfile::tempfile()?;
        let stderr = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?).process_group(0);
        let child = command.spawn().with_context(|| format!("could not start `{name}`"))?;
        Ok(Self { name, child, stdout, stderr, started: Instant::now(), limit, status: None })
    }

    /// The process; it stays the same through `nsenter` and `freeflow run`, which replace themselves.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// What it has complained about so far.
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status.is_some())
    }

    /// Waits for its end, or for its limit, whichever is first.
    pub fn wait(mut self) -> Result<Outcome> {
        while !self.has_ended()? {
            interrupt::check()?;
            if self.started.elapsed() > self.limit {
                self.kill();
                return Ok(self.outcome(None));
            }
            thread::sleep(Duration::from_millis(5));
        }
        let status = self.status;
        Ok(self.outcome(status))
    }

    /// Asks it to end, and insists after `grace`.
    pub fn stop(mut self, grace: Duration) -> Result<Outcome> {
        if !self.has_ended()? {
            // An error here means that it has just ended by itself.
            let _ = kill_process_group(self.group(), Signal::TERM);
        }
        self.end_by(grace)
    }

    /// Waits whatever the user asks, but not for long; kills what is left.
    fn end_by(mut self, grace: Duration) -> Result<Outcome> {
        let start = Instant::now();
        while !self.has_ended()? && start.elapsed() < grace {
            thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        let status = self.status;
        Ok(self.outcome(status))
    }

    fn group(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Ends it at once. Only a child that was not yet waited for is signalled: its number cannot belong to anyone else.
    pub(crate) fn kill(&mut self) {
        if self.status.is_none() {
            let _ = kill_process_group(self.group(), Signal::KILL);
            self.status = self.child.wait().ok();
        }
    }

    fn outcome(&self, status: Option<ExitStatus>) -> Outcome {
        Outcome {
            name: self.name.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
            limit: self.limit,
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a process ended and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command, as one would type it.
    pub name: String,
    /// How it ended; nothing where we had to end it.
    pub status: Option<ExitStatus>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
    limit: Duration,
}

impl Outcome {
    /// How something ended that was not started by a [`Job`], with its two streams.
    pub(crate) fn new(
        name: String,
        status: Option<ExitStatus>,
        [stdout, stderr]: [String; 2],
        took: Duration,
        limit: Duration,
    ) -> Self {
        Self { name, status, stdout, stderr, took, limit }
    }

    /// Whether it exited with 0.
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Fails, with all it printed, unless it exited with 0.
    pub fn success(&self) -> Result<()> {
        if !self.succeeded() {
            bail!("{}", self.report());
        }
        Ok(())
    }

    /// The command, its end and its output, for a person who has to find out what went wrong.
    pub fn report(&self) -> String {
        let end = match self.status {
            Some(status) => status.to_string(),
            None => format!("killed after its limit of {:?}", self.limit),
        };
        let mut text = format!("`{}`: {end} after {:.1} s\n", self.name, self.took.as_secs_f64());
        for (stream, content) in [("out", &self.stdout), ("err", &self.stderr)] {
            for line in content.lines() {
                // Writing to a string cannot fail.
                let _ = writeln!(text, "  {stream}| {line}");
            }
        }
        text
    }
}

/// Runs a command to its end; fails unless it exits with 0.
pub fn run(command: Command, limit: Duration) -> Result<Outcome> {
    let outcome = Job::spawn(command, limit)?.wait()?;
    outcome.success()?;
    Ok(outcome)
}

/// Runs a command that cleans up: also after an interrupt, and whatever comes of it, since there may be nothing left.
pub fn clean_up(command: Command, limit: Duration) {
    if let Ok(job) = Job::spawn(command, limit) {
        let _ = job.end_by(limit);
    }
}

/// A command from its words.
pub fn command<S: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = S>) -> Command {
    let mut words = words.into_iter();
    let mut command = Command::new(words.next().expect("a command has a first word"));
    command.args(words);
    command
}

/// Whether a program can be found on the PATH (or where only root looks).
pub fn has_program(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| std::path::Path::new(dir).join(name).is_file())
}

fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Read by position: the descriptor's offset is shared with the process that is still writing.
fn contents(file: &File) -> String {
    let length = file.metadata().map_or(0, |data| data.len());
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(output lost: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_exit_code_are_kept() {
        let job =
            Job::spawn(command(["sh", "-c", "echo out; echo err >&2; exit 3"]), Duration::from_secs(10));
        let outcome = job.unwrap().wait().unwrap();
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!(outcome.status.unwrap().code(), Some(3));
        assert!(outcome.report().contains("exit status: 3"));
    }

    #[test]
    fn a_job_that_hangs_is_killed_with_its_children() {
        let script = "sleep 600 & echo $!; wait";
        let outcome =
            Job::spawn(command(["sh", "-c", script]), Duration::from_millis(300)).unwrap().wait().unwrap();
        assert_eq!(outcome.status, None);
        let child = outcome.stdout.trim().to_owned();
        let ended = (0..100).any(|_| {
            thread::sleep(Duration::from_millis(20));
            std::fs::read_to_string(format!("/proc/{child}/stat")).map_or(true, |stat| stat.contains(") Z "))
        });
        assert!(ended, "process {child} is still there");
    }

    #[test]
    fn stop_asks_before_it_insists() {
        let script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done";
        let job = Job::spawn(command(["sh", "-c", script]), Duration::from_secs(20)).unwrap();
        while job.stdout().is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(job.stop(Duration::from_secs(10)).unwrap().status.unwrap().code(), Some(7));
    }
}
