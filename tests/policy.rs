//! Promise: a change of policy moves connections between direct and isolated mode while they run, and loses nothing.

mod common;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{daemon::Daemon, probe};
use libtest_mimic::{Failed, Trial};
use tempfile::TempDir;
use xtask::interrupt;

/// How long a change may take.
const SOON: Duration = Duration::from_secs(10);
/// Changes while the traffic runs.
const CHANGES: usize = 12;

fn main() -> ExitCode {
    common::run("policy", common::no_tree(), || {
        let trial = |name: &str, test: fn() -> Result<()>| {
            Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
        };
        vec![
            trial("a pair changes its mode under traffic and loses nothing", change_under_traffic),
            trial("a configuration that is wrong changes nothing", keep_what_was),
        ]
    })
}

/// A router whose configuration says whether there is direct mode.
struct Scene {
    daemon: Daemon,
    directory: TempDir,
}

impl Scene {
    fn new() -> Result<Self> {
        let directory = TempDir::with_prefix("freeflow-")?;
        let file = directory.path().join("router.toml");
        fs::write(&file, "direct = true\n")?;
        let words = ["--config", file.to_str().context("a path that is no text")?];
        let socket = directory.path().join("router.sock");
        let daemon = Daemon::start_with(&common::tree()?, &socket, &words)?;
        Ok(Self { daemon, directory })
    }

    /// Has the router read this as its configuration.
    fn configure(&self, text: &str) -> Result<()> {
        fs::write(Path::join(self.directory.path(), "router.toml"), text)?;
        self.daemon.reload()
    }

    /// The modes of all QPs.
    fn modes(&self) -> Result<Vec<String>> {
        let status = self.daemon.status()?;
        let qps = status["qps"].as_array().context("no QPs")?;
        Ok(qps.iter().map(|qp| qp["mode"].as_str().unwrap_or_default().to_owned()).collect())
    }

    fn wait_for(&self, mode: &str) -> Result<()> {
        let began = Instant::now();
        loop {
            interrupt::check()?;
            let modes = self.modes()?;
            if modes.len() == 2 && modes.iter().all(|found| found == mode) {
                return Ok(());
            }
            ensure!(began.elapsed() < SOON, "{modes:?}, not {mode}; the log:\n{}", self.daemon.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn change_under_traffic() -> Result<()> {
    let scene = Scene::new()?;
    let daemon = &scene.daemon;
    let mut stream = probe::start(&daemon.tree, &daemon.socket, "default", &["stream", "8"])?;
    scene.wait_for("direct")?;
    let mut changes = 0;
    while changes < CHANGES && !stream.has_ended()? {
        for (direct, mode) in [(false, "isolated"), (true, "direct")] {
            scene.configure(&format!("direct = {direct}\n"))?;
            scene.wait_for(mode).or_else(|error| if stream.has_ended()? { Ok(()) } else { Err(error) })?;
        }
        changes += 1;
    }
    let outcome = stream.wait()?;
    outcome.success().with_context(|| format!("the router's log:\n{}", daemon.log()))?;
    ensure!(changes >= 2, "the traffic ended after {changes} changes");
    println!("{changes} changes; {}", outcome.stdout.trim().replace('\n', " "));
    daemon.wait_until_idle()
}

fn keep_what_was() -> Result<()> {
    let scene = Scene::new()?;
    let daemon = &scene.daemon;
    let stream = probe::start(&daemon.tree, &daemon.socket, "default", &["stream", "1"])?;
    scene.wait_for("direct")?;
    scene.configure("direct = false\nlimit = 1\n")?;
    stream.wait()?.success()?;
    let began = Instant::now();
    while !daemon.log().contains("nothing was changed") {
        ensure!(began.elapsed() < SOON, "the log does not say so:\n{}", daemon.log());
        thread::sleep(Duration::from_millis(10));
    }
    let stream = probe::start(&daemon.tree, &daemon.socket, "default", &["stream", "1"])?;
    scene.wait_for("direct")?;
    stream.wait()?.success()
}
