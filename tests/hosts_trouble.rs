//! Promise: what goes wrong between two hosts is either not noticed by their applications or told by the error that an
//! RNIC gives; nothing hangs, nothing is changed on its way, and nothing is executed twice.
//!
//! Two probes send each other numbered messages, WRITEs, READs and additions, and check each one, while something happens
//! to the cable, the routers or the probes.

mod common;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{Stage, probe, skip};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use xtask::{
    bed::Bed,
    hosts::{Hosts, Side},
    process::{Job, Outcome, command, run},
    router::Router,
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(90);
/// As `ibv_wc_status_str` has it.
const RETRY_EXC: &str = "transport retry counter exceeded";
const FLUSHED: &str = "Work Request Flushed Error";
/// Timeout and retries of those who wait for long (17 s at least), and of those who do not (0.1 s at least).
const PATIENT: [&str; 2] = ["17", "7"];
const IMPATIENT: [&str; 2] = ["12", "1"];

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    let obstacle = obstacle
        .or_else(|| (!Path::new("/dev/net/tun").exists()).then(|| "there are no TUN devices".to_owned()));
    common::run("hosts_trouble", common::no_tree().or(obstacle), trials)
}

fn trials() -> Vec<Trial> {
    // One after the other: they would take each other's time.
    let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
    vec![
        stage.trial("packets that are lost change nothing but the time", |bed| bad_cable(bed, "500 0 20")),
        stage.trial("packets out of order and twice change nothing", |bed| {
            bad_cable(bed, "2000 3000 0 100 50")
        }),
        stage.trial("a cable that is cut for less than the retries last is not noticed", short_partition),
        stage.trial(
            "one that is cut for longer is told as RETRY_EXC, and a healed one is used again",
            long_partition,
        ),
        stage.trial("a killed router is told as RETRY_EXC, and its successor is used", killed_router),
        stage.trial("a router that stands still for a while is waited for", stopped_router),
        stage.trial("a process that stands still does not hold up its neighbours", stopped_process),
        stage.trial("a receiver without receives does not hold up its neighbours", slow_receiver),
        stage.trial("a full disk for logs stops nothing", full_disk),
    ]
}

/// Two hosts with a cable that can be made bad, a router each, and a folder where probes meet.
struct Scene {
    routers: Option<[Router; 2]>,
    hosts: Hosts,
    tree: Tree,
    folder: TempDir,
}

impl Scene {
    fn new(bed: &Bed) -> Result<Self> {
        let tree = bed.tree.clone();
        let hosts = Hosts::create(&[])?.over_wire(Path::new(probe::path()))?;
        let routers = [hosts.start_router(&tree, Side::Left)?, hosts.start_router(&tree, Side::Right)?];
        Ok(Self { routers: Some(routers), hosts, tree, folder: TempDir::with_prefix("freeflow-")? })
    }

    fn router(&self, side: Side) -> Result<&Router> {
        let routers = self.routers.as_ref().context("no routers")?;
        Ok(&routers[usize::from(side == Side::Right)])
    }

    /// Starts the two probes of a run; they have met when this returns.
    fn start(&self, name: &str, seconds: &str, qps: &str, [timeout, retries]: [&str; 2]) -> Result<[Job; 2]> {
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder)?;
        let folder = folder.display().to_string();
        let start = |side: Side, own: &str, other: &str| {
            let place = self.hosts.container(side, 0);
            let program = self.tree.program().display().to_string();
            let socket = self.router(side)?.socket().display().to_string();
            let words = ["across", &folder, own, other, seconds, qps, timeout, retries];
            let words =
                [&[&program[..], "run", "--socket", &socket, "--", probe::path()], &words[..]].concat();
            Job::spawn(place.plain_command(&common::words(&words)), LIMIT)
        };
        let mut jobs = [start(Side::Left, "left", "right")?, start(Side::Right, "right", "left")?];
        let began = Instant::now();
        while !jobs.iter().all(|job| job.stdout().contains("READY\n")) {
            for job in &mut jobs {
                ensure!(!job.has_ended()?, "a probe ended: {}{}", job.stdout(), job.stderr());
            }
            ensure!(began.elapsed() < Duration::from_secs(20), "the probes do not meet");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(jobs)
    }

    /// What the left router says of its link.
    fn link(&self) -> Result<Value> {
        self.router(Side::Left)?.status()?["links"].get(0).cloned().context("the status tells of no link")
    }

    fn count(&self, what: &str) -> Result<u64> {
        let link = self.link()?;
        link[what].as_u64().with_context(|| format!("no {what} in {link}"))
    }
}

/// What two probes say at the end.
fn ends(jobs: [Job; 2]) -> Result<Vec<String>> {
    let outcomes = jobs.map(Job::wait);
    let mut lines = Vec::new();
    for outcome in outcomes {
        let outcome: Outcome = outcome?;
        ensure!(outcome.succeeded(), "{}", outcome.report());
        let flows = outcome.stdout.lines().filter(|line| line.contains(" rounds, "));
        lines.extend(flows.map(str::to_owned));
    }
    Ok(lines)
}

/// Fails unless all flows lasted, and moved.
fn all_well(lines: &[String]) -> Result<()> {
    ensure!(!lines.is_empty(), "the probes said nothing");
    for line in lines {
        ensure!(line.ends_with("ended OK") && !line.starts_with("0 rounds"), "{lines:#?}");
    }
    Ok(())
}

/// Rounds of all flows together.
fn rounds(lines: &[String]) -> u64 {
    lines.iter().filter_map(|line| line.split(' ').next()?.parse::<u64>().ok()).sum()
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process")?;
    // Its job has not been waited for, so the number is still its own.
    Ok(kill_process(pid, signal)?)
}

fn bad_cable(bed: &Bed, conditions: &str) -> Result<()> {
    let scene = Scene::new(bed)?;
    scene.hosts.set_wire(conditions)?;
    let lines = ends(scene.start("run", "3", "4", PATIENT)?)?;
    all_well(&lines)?;
    // What the cable did was TCP's business alone.
    ensure!(scene.count("connections")? <= 8, "streams were lost: {}", scene.link()?);
    let round_trip = scene.link()?["round_trip_us"].as_f64().context("no round-trip time")?;
    ensure!(round_trip > 900.0, "{round_trip} us over a cable that is slower");
    Ok(())
}

fn short_partition(bed: &Bed) -> Result<()> {
    let scene = Scene::new(bed)?;
    let jobs = scene.start("run", "4", "4", PATIENT)?;
    thread::sleep(Duration::from_millis(500));
    scene.hosts.set_wire("0 0 1000")?;
    thread::sleep(Duration::from_millis(1500));
    scene.hosts.set_wire("")?;
    let lines = ends(jobs)?;
    all_well(&lines)?;
    let waited = |line: &String| {
        let longest =
            line.split("longest ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
        longest.is_some_and(|longest| longest >= 1000)
    };
    ensure!(lines.iter().any(waited), "nobody met the cut: {lines:#?}");
    Ok(())
}

fn long_partition(bed: &Bed) -> Result<()> {
    let scene = Scene::new(bed)?;
    let jobs = scene.start("cut", "10", "4", IMPATIENT)?;
    thread::sleep(Duration::from_millis(500));
    scene.hosts.set_wire("0 0 1000")?;
    let lines = ends(jobs)?;
    ensure!(lines.iter().all(|line| !line.ends_with("ended OK")), "{lines:#?}");
    ensure!(lines.iter().any(|line| line.contains(RETRY_EXC)), "{lines:#?}");
    // A host that has vanished is found out, without any traffic.
    let start = Instant::now();
    while scene.link()?["state"] != "down" {
        ensure!(start.elapsed() < Duration::from_secs(25), "the link to nowhere stays: {}", scene.link()?);
        thread::sleep(Duration::from_millis(100));
    }
    scene.hosts.set_wire("")?;
    all_well(&ends(scene.start("healed", "1", "4", PATIENT)?)?)?;
    ensure!(scene.link()?["state"] == "up", "{}", scene.link()?);
    Ok(())
}

fn killed_router(bed: &Bed) -> Result<()> {
    let mut scene = Scene::new(bed)?;
    let jobs = scene.start("killed", "20", "4", IMPATIENT)?;
    thread::sleep(Duration::from_millis(500));
    signal(scene.router(Side::Right)?.pid(), Signal::KILL)?;
    let [left, right] = jobs.map(Job::wait);
    let (left, right) = (left?, right?);
    ensure!(left.succeeded() && left.stdout.contains(RETRY_EXC), "{}", left.report());
    // Its own clients lose their device, all requests come back flushed.
    ensure!(right.stdout.contains(FLUSHED), "{}", right.report());
    let [left, right] = scene.routers.take().context("no routers")?;
    drop(right);
    let right = scene.hosts.start_router(&scene.tree, Side::Right)?;
    scene.routers = Some([left, right]);
    all_well(&ends(scene.start("successor", "1", "4", PATIENT)?)?)
}

fn stopped_router(bed: &Bed) -> Result<()> {
    let scene = Scene::new(bed)?;
    let jobs = scene.start("run", "3", "4", PATIENT)?;
    let pid = scene.router(Side::Right)?.pid();
    thread::sleep(Duration::from_millis(500));
    signal(pid, Signal::STOP)?;
    thread::sleep(Duration::from_secs(1));
    signal(pid, Signal::CONT)?;
    all_well(&ends(jobs)?)
}

fn stopped_process(bed: &Bed) -> Result<()> {
    let scene = Scene::new(bed)?;
    let still = scene.start("still", "4", "8", PATIENT)?;
    let busy = scene.start("busy", "3", "4", PATIENT)?;
    signal(still[1].pid(), Signal::STOP)?;
    let lines = ends(busy)?;
    signal(still[1].pid(), Signal::CONT)?;
    all_well(&lines)?;
    let longest =
        lines.iter().filter_map(|line| line.split("longest ").nth(1)?.split(' ').next()?.parse::<u64>().ok());
    ensure!(longest.max().is_some_and(|longest| longest < 1500), "{lines:#?}");
    all_well(&ends(still)?)
}

/// A process that is stopped posts no receives: whoever sends to it is refused again and again.
fn slow_receiver(bed: &Bed) -> Result<()> {
    let scene = Scene::new(bed)?;
    let before = scene.start("before", "1", "1", PATIENT)?;
    let alone = rounds(&ends(before)?);
    let slow = scene.start("slow", "3", "16", PATIENT)?;
    signal(slow[0].pid(), Signal::STOP)?;
    let beside = ends(scene.start("beside", "1", "1", PATIENT)?)?;
    signal(slow[0].pid(), Signal::CONT)?;
    all_well(&beside)?;
    ensure!(rounds(&beside) * 10 > alone, "{} rounds, {alone} alone", rounds(&beside));
    all_well(&ends(slow)?)
}

fn full_disk(bed: &Bed) -> Result<()> {
    let mut scene = Scene::new(bed)?;
    let folder = TempDir::with_prefix("freeflow-")?;
    let disk = folder.path().display().to_string();
    if run(command(["mount", "-t", "tmpfs", "-o", "size=16k", "none", &disk]), common::SHORT).is_err() {
        skip("a full disk for logs stops nothing", "nothing can be mounted here");
        return Ok(());
    }
    let outcome = with_full_disk(&mut scene, &disk);
    drop(scene);
    run(command(["umount", "-l", &disk]), common::SHORT)?;
    outcome
}

fn with_full_disk(scene: &mut Scene, disk: &str) -> Result<()> {
    let _ = fs::write(format!("{disk}/rest"), vec![0; 64 * 1024]);
    ensure!(fs::write(format!("{disk}/more"), vec![1; 4096]).is_err(), "the disk is not full");
    let [left, right] = scene.routers.take().context("no routers")?;
    drop(right);
    let log = format!("FREEFLOW_LOG=debug exec \"$@\" 2>>{disk}/log");
    let by = common::words(&["sh", "-c", &log, "sh"]);
    let right = scene.hosts.start_router_by(&scene.tree, Side::Right, &by)?;
    scene.routers = Some([left, right]);
    all_well(&ends(scene.start("run", "1", "4", PATIENT)?)?)
}
