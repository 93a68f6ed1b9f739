//! A script that runs in a guest.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::ExitStatus,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::Guest;
use crate::{interrupt, process::Outcome};

/// A script that was started. Where this is dropped, the script is killed, with all that it started.
#[derive(Debug)]
pub struct GuestJob {
    guest: Arc<Guest>,
    number: u32,
    name: String,
    started: Instant,
    limit: Duration,
    ended: bool,
}

impl GuestJob {
    pub(super) fn new(guest: &Arc<Guest>, number: u32, script: &str, limit: Duration) -> Self {
        let name = format!("{}: {}", guest.name, script.trim());
        Self { guest: Arc::clone(guest), number, name, started: Instant::now(), limit, ended: false }
    }

    /// One of its files in the exchange directory.
    pub(super) fn file(&self, end: &str) -> PathBuf {
        self.guest.dir.join(format!("{}.{end}", self.number))
    }

    fn text(&self, end: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.file(end)).unwrap_or_default()).into_owned()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        self.text("out")
    }

    /// What it has complained about so far.
    pub fn stderr(&self) -> String {
        self.text("err")
    }

    /// How it ended, if it has. `sh` tells an end by a signal as 128 and the signal.
    fn status(&mut self) -> Option<ExitStatus> {
        let code: i32 = self.text("status").trim().parse().ok()?;
        self.ended = true;
        Some(ExitStatus::from_raw(code << 8))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.guest.check_alive()?;
        Ok(self.status().is_some())
    }

    /// Waits for its end, or for its limit, whichever is first. Fails where the guest is gone.
    pub fn wait(mut self) -> Result<Outcome> {
        loop {
            interrupt::check()?;
            if let Some(status) = self.status() {
                return Ok(self.outcome(Some(status)));
            }
            self.guest.check_alive()?;
            if self.started.elapsed() > self.limit {
                self.kill();
                return Ok(self.outcome(None));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it, with all that it started.
    pub fn kill(&mut self) {
        if !self.ended {
            self.ended = true;
            // A guest that does not listen any more runs nothing either.
            let _ = self.guest.tell(&format!("kill {}", self.number));
        }
    }

    fn outcome(&self, status: Option<ExitStatus>) -> Outcome {
        Outcome::new(
            self.name.clone(),
            status,
            [self.stdout(), self.stderr()],
            self.started.elapsed(),
            self.limit,
        )
    }
}

impl Drop for GuestJob {
    fn drop(&mut self) {
        if !self.ended && self.status().is_none() {
            self.kill();
        }
    }
}
