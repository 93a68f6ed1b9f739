//! Promise: one provider file serves the rdma-core of every Debian release from 11 to testing (33 to 65 and newer) with
//! the verbs tools of that release, those that meet by name and TCP programs over its rsocket among them, and the oldest
//! talks to the newest through one router.

mod common;

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use common::{SHORT, Stage, container, device::Device, pingpong, programs, rootfs};
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, PairOutcome, Tool, free_port},
    perftest,
    process::{Job, Outcome},
};

const LIMIT: Duration = Duration::from_secs(60);
/// Releases with their names; tests/containers.rs is about the one that is missing here, 12.
const RELEASES: [(&str, &str); 3] =
    [("bullseye", "Debian 11"), ("trixie", "Debian 13"), ("testing", "Debian testing")];
const OLDEST: &str = "bullseye";
const NEWEST: &str = "testing";
const PINGPONGS: [&str; 4] = ["ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong", "ibv_srq_pingpong"];
/// The perftest of the release: each verb, polling or with events.
const PERFTEST: [(&str, &[&str]); 7] = [
    ("ib_write_bw", &["-s", "65536", "-n", "500"]),
    ("ib_read_lat", &["-n", "500"]),
    ("ib_send_bw", &["-e", "-n", "500"]),
    ("ib_atomic_lat", &["-n", "500"]),
    ("ib_write_bw", &["-R", "-n", "500"]),
    ("ib_send_lat", &["-R", "-n", "500"]),
    ("ib_send_bw", &["-R", "-c", "UD", "-n", "500"]),
];

fn main() -> ExitCode {
    common::run("containers_releases", common::no_tree().or_else(container::obstacle), || {
        let mut trials: Vec<Trial> =
            RELEASES.iter().flat_map(|(suite, name)| of_release(suite, name)).collect();
        trials.extend(oldest_with_newest());
        trials
    })
}

fn of_release(suite: &'static str, name: &str) -> Vec<Trial> {
    if let Err(error) = rootfs::debian(suite) {
        return vec![skipped(name.to_owned(), format!("{error:#}"))];
    }
    let stage = stage(suite, suite);
    let mut trials = vec![trial(&stage, format!("{name}: ibv_devinfo shows sane attributes"), |bed| {
        [&bed.server, &bed.client].into_iter().try_for_each(|place| Device::query(bed, place)?.check())
    })];
    for program in PINGPONGS {
        trials.push(trial(&stage, format!("{name}: {program} -e"), move |bed| play(bed, program)));
    }
    for (program, options) in PERFTEST {
        let name = format!("{name}: {program} {}", options.join(" "));
        trials.push(trial(&stage, name, move |bed| measure(bed, &Tool::new(program, options))));
    }
    for (program, test) in programs::of_release(suite == NEWEST) {
        trials.push(trial(&stage, format!("{name}: {program}"), test));
    }
    trials.push(trial(&stage, format!("{name}: iperf over rsocket"), iperf));
    if suite == NEWEST {
        trials.push(trial(&stage, format!("{name}: iperf3 over rsocket"), iperf3));
        trials.push(trial(&stage, format!("{name}: redis over rsocket"), redis));
    }
    trials
}

/// A TCP program over rsocket in a container: the preload library before the one that is there.
fn preloaded(bed: &Bed, words: &str) -> Vec<String> {
    let preload = format!("LD_PRELOAD={}:{}", programs::RSPRELOAD, bed.tree.preload().display());
    ["env", &preload].into_iter().chain(words.split(' ')).map(str::to_owned).collect()
}

/// A server that ends with its client, and the client.
fn over_rsocket(bed: &Bed, server: &str, client: &str, port: u16) -> Result<PairOutcome> {
    // That the router lists it shows that it is no TCP any more.
    let server = bed.start_cm_server(&preloaded(bed, server), port, LIMIT)?;
    let client = Job::spawn(bed.command(&bed.client, &preloaded(bed, client)), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    let outcome = PairOutcome { server, client };
    outcome.success()?;
    Ok(outcome)
}

fn iperf(bed: &Bed) -> Result<()> {
    sends("iperf -s -P 1", "iperf", "16.0 MBytes", bed)
}

/// Its threads end by being cancelled while they wait for a completion.
fn iperf3(bed: &Bed) -> Result<()> {
    sends("iperf3 -s -1", "iperf3", "receiver", bed)
}

/// A program of the iperf family, and what it says when it has sent all.
fn sends(server: &str, client: &str, says: &str, bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let client = format!("{client} -c {} -p {port} -n 16M", bed.server.address);
    let outcome = over_rsocket(bed, &format!("{server} -p {port}"), &client, port)?;
    ensure!(outcome.client.stdout.contains(says), "{}", outcome.report());
    Ok(())
}

/// Waits by epoll, for which librspreload of the newest release cares. Several clients at once are several processes: the
/// connections of one, as redis-benchmark has them, get into each other's way in librdmacm (docs/rsocket.md).
fn redis(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let words =
        format!("redis-server --port {port} --protected-mode no --appendonly no --save  --dir /dev/shm");
    let server = bed.start_cm_server(&preloaded(bed, &words), port, LIMIT)?;
    let begin = |words: &str| {
        let words = preloaded(bed, &words.replace("AT", &format!("-h {} -p {port}", bed.server.address)));
        Job::spawn(bed.command(&bed.client, &words), LIMIT)
    };
    let value = "x".repeat(5000);
    let mut outcomes = vec![begin(&format!("redis-cli AT set name {value}"))?.wait()?];
    let clients = (0..4).map(|_| begin("redis-cli AT -r 250 incr count")).collect::<Result<Vec<_>>>()?;
    for client in clients {
        outcomes.push(client.wait()?);
    }
    outcomes.push(begin("redis-cli AT get count")?.wait()?);
    outcomes.push(begin("redis-cli AT get name")?.wait()?);
    let server = server.stop(Duration::from_secs(2))?;
    let report = || server.report() + &outcomes.iter().map(Outcome::report).collect::<String>();
    ensure!(outcomes.iter().all(Outcome::succeeded), "{}", report());
    let told: Vec<&str> = outcomes.iter().rev().take(2).map(|outcome| outcome.stdout.trim()).collect();
    ensure!(told == [value.as_str(), "1000"], "another value\n{}", report());
    Ok(())
}

fn oldest_with_newest() -> Vec<Trial> {
    if rootfs::debian(OLDEST).and(rootfs::debian(NEWEST)).is_err() {
        return vec![skipped(
            "the oldest with the newest".to_owned(),
            "a root file system is missing".to_owned(),
        )];
    }
    let stage = stage(OLDEST, NEWEST);
    let trials = PINGPONGS.map(|program| {
        let name = format!("{program} -e from the newest release to the oldest");
        trial(&stage, name, move |bed| play(bed, program))
    });
    trials.into()
}

fn stage(server: &'static str, client: &'static str) -> Stage {
    Stage::new(move || container::bed(common::tree()?, [&rootfs::debian(server)?, &rootfs::debian(client)?]))
}

fn skipped(name: String, reason: String) -> Trial {
    Trial::test(name.clone(), move || {
        common::skip(&name, &reason);
        Ok(())
    })
}

fn play(bed: &Bed, program: &str) -> Result<()> {
    pingpong::play(bed, program, &["-e", "-c"])
}

fn measure(bed: &Bed, tool: &Tool) -> Result<()> {
    let outcome = bed.run_pair(tool, LIMIT)?;
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    ensure!(row.iterations == 500 && row.has_figures(), "{row:?}\n{}", outcome.report());
    Ok(())
}

/// A test on a release. The newest moves: when its rdma-core is younger than all that the provider knows, it is
/// refused, and that is told loudly instead.
fn trial(stage: &Stage, name: String, test: impl FnOnce(&Bed) -> Result<()> + Send + 'static) -> Trial {
    stage.trial(name.clone(), move |bed| {
        let outcome = bed.run(&bed.client, &["ibv_devices"], SHORT)?;
        let refusal =
            outcome.stderr.lines().find(|line| line.contains("a layout this provider does not know"));
        let Some(line) = refusal else { return test(bed) };
        common::skip(&name, line);
        Ok(())
    })
}
