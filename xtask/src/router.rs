//! A router for a while, on a socket of its own in a directory of its own.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    interrupt,
    process::{Job, command, run},
    tree::Tree,
};

const START_LIMIT: Duration = Duration::from_secs(10);
const STOP_GRACE: Duration = Duration::from_secs(5);
const LIFE_LIMIT: Duration = Duration::from_secs(3600);
/// A router whose starter was killed ends by itself this many seconds after its last client.
const IDLE_EXIT: &str = "300";

/// A running router; it ends when this is dropped.
#[derive(Debug)]
pub struct Router {
    // Declared before the directory: the process ends before its socket goes.
    job: Option<Job>,
    socket: PathBuf,
    program: PathBuf,
    _dir: TempDir,
}

impl Router {
    /// Starts the router of an install tree and waits until it answers.
    pub fn start(tree: &Tree) -> Result<Self> {
        Self::start_in(tree, &[], &[])
    }

    /// Starts one behind the words of `enter`, with further words on its command line.
    pub fn start_in(tree: &Tree, enter: &[String], words: &[String]) -> Result<Self> {
        let dir = TempDir::with_prefix("freeflow-")?;
        // The outer directory is private; the inner one is what containers get mounted, other users included.
        let run = dir.path().join("run");
        std::fs::create_dir(&run)?;
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755))?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
        let socket = run.join("router.sock");

        let program = tree.program().display().to_string();
        let mut command = command(enter.iter().chain([&program]));
        command.args(["router", "--idle-exit", IDLE_EXIT, "--socket"]).arg(&socket).args(words);
        let job = Job::spawn(command, LIFE_LIMIT)?;
        let mut router = Self { job: Some(job), socket, program: tree.program(), _dir: dir };
        router.wait_until_it_answers()?;
        Ok(router)
    }

    /// The socket that clients connect to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What `freeflow status --json` says.
    pub fn status(&self) -> Result<Value> {
        let mut ask = command([&self.program]);
        ask.args(["status", "--json", "--socket"]).arg(&self.socket);
        Ok(serde_json::from_str(&run(ask, START_LIMIT)?.stdout)?)
    }

    /// Whether somebody listens by rdma_cm on a port.
    pub fn lists(&self, port: u16) -> Result<bool> {
        let status = self.status()?;
        let listeners = status["listeners"].as_array().context("the status names no listeners")?;
        let suffix = format!(":{port}");
        let listens = |address: &Value| address.as_str().is_some_and(|text| text.ends_with(&suffix));
        Ok(listeners.iter().any(|listener| listens(&listener["address"])))
    }

    /// The router's process.
    pub fn pid(&self) -> u32 {
        self.job.as_ref().map_or(0, Job::pid)
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.job.as_ref().map(Job::stderr).unwrap_or_default()
    }

    /// Fails, with its log, where the router has died.
    pub fn check_alive(&mut self) -> Result<()> {
        if self.job.as_mut().map_or(Ok(true), Job::has_ended)? {
            bail!("the router has died; its log:\n{}", self.log());
        }
        Ok(())
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            interrupt::check()?;
            // One that listens may still find that something else of its configuration cannot be had.
            if answers(&self.socket)? && self.status().is_ok() {
                return Ok(());
            }
            self.check_alive()?;
            if start.elapsed() > START_LIMIT {
                bail!("the router did not answer within {START_LIMIT:?}; its log:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            let _ = job.stop(STOP_GRACE);
        }
    }
}

/// Whether anyone listens. The connection is closed again at once.
fn answers(path: &Path) -> Result<bool> {
    let address = SocketAddrUnix::new(path).context("the path of the router's socket is too long")?;
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    Ok(connect(&socket, &address).is_ok())
}
