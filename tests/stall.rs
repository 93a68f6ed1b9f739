//! Promise: a client whose registered memory never answers (a page fault that nothing resolves) holds up its own work
//! requests and those of whoever talks to it, nobody else's; and when it is killed, the router is where it was.
//!
//! The hostile client is the probe's (`tests/probe/stall.rs`). It needs FUSE, and the right to mount it.

mod common;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use common::{
    daemon::Daemon,
    probe::{self, MODES},
};
use libtest_mimic::{Failed, Trial};
use tempfile::TempDir;
use xtask::process::Job;

const LIMIT: Duration = Duration::from_secs(100);

fn main() -> ExitCode {
    common::run("stall", common::no_tree(), || {
        let trial = |mode: &'static str| {
            let name = format!("a page fault that never resolves holds up its client alone ({mode})");
            let label = name.clone();
            Trial::test(name, move || {
                endure(mode, &label).map_err(|error| Failed::from(format!("{error:#}")))
            })
        };
        MODES.map(trial).into()
    })
}

fn endure(mode: &str, name: &str) -> Result<()> {
    let directory = TempDir::with_prefix("freeflow-")?;
    let daemon = Daemon::start(&common::tree()?, &directory.path().join("router.sock"))?;
    let play = || Job::spawn(probe::client(&daemon.tree, &daemon.socket, mode, &["stall"]), LIMIT)?.wait();
    // The first time some things come to stay.
    probe::verdict(name, &play()?).with_context(|| format!("the router's log:\n{}", daemon.log()))?;
    daemon.wait_until_idle()?;
    let before = daemon.holdings()?;
    let outcome = play()?;
    probe::verdict(name, &outcome).with_context(|| format!("the router's log:\n{}", daemon.log()))?;
    println!("{mode}: {}", outcome.stdout.trim_end().replace('\n', " "));
    daemon.check_holdings(&before)
}
