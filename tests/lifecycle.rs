//! Promise: a router that is absent, dies, ends or is replaced is told to programs at once, and programs that come and
//! go leave nothing in it.

mod common;

use std::{process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use common::{
    daemon::Daemon,
    probe::{self, MODES},
};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use tempfile::TempDir;
use xtask::{
    process::{Job, command},
    tree::Tree,
};

/// Probes that come and go.
const VISITS: usize = 200;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    common::run("lifecycle", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("an open without a router fails at once and says what to do", open_without_router),
        trial("a router that is asked to end exits with 0 and takes its socket away", asked_to_end),
        trial("a killed router wakes who waits for an event of rdma_cm", killed_under_cm),
        trial("two hundred programs, half of them killed, leave nothing behind", visits),
    ];
    for mode in MODES {
        trials.push(trial(
            format!("a killed router is an event, flushed work and no hang ({mode})"),
            move |scene| killed_under_traffic(scene, mode),
        ));
        trials.push(trial(
            format!("status shows clients and QPs while they are there ({mode})"),
            move |scene| shown_by_status(scene, mode),
        ));
    }
    trials
}

/// Where a test's routers serve.
struct Scene {
    tree: Tree,
    directory: TempDir,
}

impl Scene {
    fn daemon(&self) -> Result<Daemon> {
        Daemon::start(&self.tree, &self.directory.path().join("router.sock"))
    }
}

fn trial(name: impl Into<String>, test: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let scene = || Ok(Scene { tree: common::tree()?, directory: TempDir::with_prefix("freeflow-")? });
        scene().and_then(|scene| test(&scene)).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

fn open_without_router(scene: &Scene) -> Result<()> {
    let daemon = scene.daemon()?;
    // The environment of a router that lives, the socket of none.
    let absent = scene.directory.path().join("absent.sock");
    let mut open = command([scene.tree.program()]);
    open.args(["run", "--socket"]).arg(&daemon.socket);
    open.args(["--", "env"])
        .arg(format!("FREEFLOW_SOCKET={}", absent.display()))
        .args([probe::path(), "open"]);
    let outcome = Job::spawn(open, LIMIT)?.wait()?;
    ensure!(!outcome.succeeded(), "a device was opened without a router");
    ensure!(outcome.took < Duration::from_secs(2), "it took {:?}", outcome.took);
    let told = outcome.stderr.lines().find(|line| line.starts_with("freeflow: "));
    let told = told.with_context(|| format!("nothing is said: {}", outcome.report()))?;
    for part in [absent.to_string_lossy().as_ref(), "freeflow router", "freeflow run"] {
        ensure!(told.contains(part), "{part:?} is not in {told:?}");
    }
    Ok(())
}

fn killed_under_cm(scene: &Scene) -> Result<()> {
    let daemon = scene.daemon()?;
    let victim = probe::start(&scene.tree, &daemon.socket, MODES[0], &["cm-outage"])?;
    thread::sleep(Duration::from_millis(200));
    daemon.kill()?;
    probe::verdict("cm-outage", &victim.wait()?)
}

fn killed_under_traffic(scene: &Scene, mode: &str) -> Result<()> {
    let daemon = scene.daemon()?;
    let socket = daemon.socket.clone();
    let victim = probe::start(&scene.tree, &socket, mode, &["outage"])?;
    thread::sleep(Duration::from_millis(200));
    daemon.kill()?;
    probe::verdict("outage", &victim.wait()?)?;
    // The socket file of the dead one is in nobody's way.
    let daemon = scene.daemon()?;
    let outcome = Job::spawn(probe::client(&scene.tree, &socket, mode, &["open"]), LIMIT)?.wait()?;
    probe::verdict("open", &outcome)?;
    daemon.wait_until_idle()
}

fn asked_to_end(scene: &Scene) -> Result<()> {
    let daemon = scene.daemon()?;
    let socket = daemon.socket.clone();
    let client = probe::start(&scene.tree, &socket, "isolated", &["hold", "2"])?;
    let outcome = daemon.stop()?;
    ensure!(outcome.status.and_then(|status| status.code()) == Some(0), "{}", outcome.report());
    ensure!(outcome.took < Duration::from_secs(10), "it took {:?}", outcome.took);
    ensure!(!socket.exists(), "the socket file is still there");
    drop(client);
    Ok(())
}

fn shown_by_status(scene: &Scene, mode: &str) -> Result<()> {
    let daemon = scene.daemon()?;
    let client = probe::start(&scene.tree, &daemon.socket, mode, &["hold", "3"])?;
    let status = daemon.status()?;
    let empty = Vec::new();
    let list = |name: &str| status[name].as_array().unwrap_or(&empty);
    // Each pair is two opened devices with a QP each.
    ensure!(list("clients").len() == 6 && list("qps").len() == 6, "{status}");
    for shown in list("clients") {
        ensure!(shown["pid"] == client.pid() && shown["mode"] == mode, "{shown}");
        ensure!(shown["qps"] == 1 && shown["cqs"] == 2 && shown["mrs"] == 1, "{shown}");
        ensure!(shown["addresses"].as_array().is_some_and(|all| !all.is_empty()), "{shown}");
    }
    let directly = list("qps").iter().filter(|qp| qp["mode"] == "direct").count();
    for qp in list("qps") {
        ensure!(qp["transport"] == "RC" && qp["state"] == "RTS", "{qp}");
        let peer = list("qps").iter().any(|other| other["qpn"] == qp["peer_qpn"]);
        ensure!(peer && qp["peer_gid"] != Value::Null, "{qp}");
    }
    ensure!(directly == if mode == "direct" { 6 } else { 0 }, "{directly} QPs are direct: {status}");
    drop(client);
    daemon.wait_until_idle()
}

fn visits(scene: &Scene) -> Result<()> {
    let daemon = scene.daemon()?;
    let visit = |number: usize| {
        let mode = MODES[number / 2 % 2];
        if number.is_multiple_of(2) {
            let outcome =
                Job::spawn(probe::client(&scene.tree, &daemon.socket, mode, &["open"]), LIMIT)?.wait()?;
            return probe::verdict("open", &outcome);
        }
        // A dropped job is killed.
        probe::start(&scene.tree, &daemon.socket, mode, &["hold", "1"]).map(drop)
    };
    (0..8).try_for_each(visit)?;
    daemon.wait_until_idle()?;
    let before = daemon.holdings()?;
    (0..VISITS).try_for_each(visit)?;
    daemon.check_holdings(&before)
}
