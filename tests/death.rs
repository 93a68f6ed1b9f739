//! Promise: programs that are killed at any moment harm nobody: their peers' work ends, nothing arrives twice or half,
//! and the router is where it was.
//!
//! `FREEFLOW_KILLS` says how many are killed, over both modes; `FREEFLOW_SEED` repeats the random moments of a run.

mod common;

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use common::{
    daemon::Daemon,
    probe::{self, MODES},
};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use tempfile::TempDir;
use xtask::process::Job;

/// Kills unless `FREEFLOW_KILLS` says another number: about a minute and a quarter on two cores.
const KILLS: u64 = 10_000;
/// Kills before the first look at what the router holds.
const WARM_UP: u64 = 50;

fn main() -> ExitCode {
    common::run("death", common::no_tree(), || {
        let trial = |mode: &'static str| {
            let name = format!("a survivor and the router outlive thousands of kills ({mode})");
            Trial::test(name, move || outlive(mode).map_err(|error| Failed::from(format!("{error:#}"))))
        };
        MODES.map(trial).into()
    })
}

fn outlive(mode: &str) -> Result<()> {
    let kills = number("FREEFLOW_KILLS")?.unwrap_or(KILLS) / MODES.len() as u64;
    let seed = match number("FREEFLOW_SEED")? {
        Some(seed) => seed,
        None => SystemTime::UNIX_EPOCH.elapsed()?.as_secs(),
    };
    let directory = TempDir::with_prefix("freeflow-")?;
    let daemon = Daemon::start(&common::tree()?, &directory.path().join("router.sock"))?;
    perform(&daemon, mode, WARM_UP, seed)?;
    daemon.wait_until_idle()?;
    let before = daemon.holdings()?;
    let found = perform(&daemon, mode, kills, seed + 1)?;
    daemon.check_holdings(&before).context("after all kills")?;
    println!("{mode}: seed {seed}: {found}; before: {before:?}, after: {:?}", daemon.holdings()?);

    let count = |name: &str| found[name].as_u64().unwrap_or(0);
    ensure!(count("rounds") == kills, "not all rounds were played: {found}");
    // Otherwise nothing was tried.
    ensure!(count("connected") * 2 > kills && count("received") > kills, "too little traffic: {found}");
    ensure!(count("retry_exc") == count("connected"), "each victim is one RETRY_EXC: {found}");
    Ok(())
}

fn number(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(variable) else { return Ok(None) };
    Ok(Some(text.parse().with_context(|| format!("{variable}={text} is no number"))?))
}

fn perform(daemon: &Daemon, mode: &str, kills: u64, seed: u64) -> Result<Value> {
    let words = ["kill-loop", "--rounds", &kills.to_string(), "--seed", &seed.to_string()];
    let command = probe::client(&daemon.tree, &daemon.socket, mode, &words);
    let outcome = Job::spawn(command, Duration::from_secs(120 + kills))?.wait()?;
    outcome.success().with_context(|| format!("the router's log:\n{}", daemon.log()))?;
    let line = outcome.stdout.lines().next().unwrap_or_default();
    serde_json::from_str(line).with_context(|| outcome.report())
}
