//! An etcd server for a while, in a network namespace and a directory of its own.

use std::{
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{
    interrupt,
    process::{Job, command, has_program, run},
};

const LIFE_LIMIT: Duration = Duration::from_secs(1800);
const LIMIT: Duration = Duration::from_secs(20);

/// Certificates of a server, and what its clients show.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// Who signed them.
    pub authority: PathBuf,
    /// The server's.
    pub certificate: PathBuf,
    /// The key of that.
    pub key: PathBuf,
}

/// A server, which can be killed and started again.
#[derive(Debug)]
pub struct Etcd {
    job: Option<Job>,
    enter: Vec<String>,
    address: String,
    secured: Option<Certificates>,
    dir: TempDir,
}

impl Etcd {
    /// One that does not run yet, behind the words of `enter`, at an address there.
    pub fn new(enter: Vec<String>, address: &str, secured: Option<Certificates>) -> Result<Self> {
        if !has_program("etcd") || !has_program("etcdctl") {
            bail!("etcd-server and etcd-client are not installed");
        }
        let dir = TempDir::with_prefix("freeflow-")?;
        Ok(Self { job: None, enter, address: address.to_owned(), secured, dir })
    }

    /// Where it is reached.
    pub fn url(&self) -> String {
        let scheme = if self.secured.is_some() { "https" } else { "http" };
        format!("{scheme}://{}:2379", self.address)
    }

    /// Starts it with what it had, and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        let url = self.url();
        let mut command = command(self.enter.iter().map(String::as_str).chain(["etcd", "--data-dir"]));
        command.arg(self.dir.path().join("data"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        let peers = "http://127.0.0.1:2380";
        command.args(["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]);
        command.args(["--initial-cluster", "default=http://127.0.0.1:2380", "--logger", "zap"]);
        if let Some(Certificates { authority, certificate, key }) = &self.secured {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(authority);
            command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
        }
        self.job = Some(Job::spawn(command, LIFE_LIMIT)?);
        let start = Instant::now();
        while self.ctl(&["endpoint", "health"]).is_err() {
            interrupt::check()?;
            let has_ended = self.job.as_mut().map_or(Ok(true), Job::has_ended)?;
            if has_ended || start.elapsed() > LIMIT {
                let log = self.job.as_ref().map(Job::stderr).unwrap_or_default();
                bail!("etcd did not answer within {LIMIT:?}; its log:\n{log}");
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Kills it without a word.
    pub fn kill(&mut self) {
        self.job = None;
    }

    /// Its process; 0 where it does not run.
    pub fn pid(&self) -> u32 {
        self.job.as_ref().map_or(0, Job::pid)
    }

    /// Has it forget everything, while it does not run.
    pub fn wipe(&self) -> Result<()> {
        std::fs::remove_dir_all(self.dir.path().join("data")).context("no data to wipe")
    }

    /// What `etcdctl` says.
    pub fn ctl(&self, words: &[&str]) -> Result<String> {
        Ok(run(self.ctl_command(words), LIMIT)?.stdout)
    }

    fn ctl_command(&self, words: &[&str]) -> Command {
        let mut command = command(self.enter.iter().map(String::as_str).chain(["etcdctl", "--endpoints"]));
        command.arg(self.url()).args(["--command-timeout", "2s"]).env("ETCDCTL_API", "3");
        if let Some(Certificates { authority, certificate, key }) = &self.secured {
            command.arg("--cacert").arg(authority).arg("--cert").arg(certificate).arg("--key").arg(key);
        }
        command.args(words);
        command
    }

    /// The keys that begin so.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        let text = self.ctl(&["get", "--prefix", "--keys-only", prefix])?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }
}
