//! Promise: containers of two hosts without RDMA NICs meet over a link between their routers, on an overlay network,
//! and a link that breaks is not noticed by them unless it stays away for too long.

mod common;

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{
    Stage,
    hosts::{cut, successor},
    pingpong,
};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::{
    bed::{Bed, Tool},
    hosts::{Hosts, Side},
    matrix::Tier,
    process::{Job, command},
    router::Router,
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(40);

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    common::run("hosts_links", common::no_tree().or(obstacle), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Hosts::create(&[])?.bed(common::tree()?));
    let mut trials = vec![
        stage.trial("a link that breaks again and again loses nothing", cuts),
        stage.trial("the status tells what a link carries", status),
        // With hosts of their own, while nothing else runs.
        stage.trial("a router that dies is noticed and its successor is found", |bed| {
            a_router_dies(&bed.tree)
        }),
        stage.trial("each tenant meets its own on the other host", |bed| tenants(&bed.tree)),
        stage.trial("a link through TLS carries the same", |bed| tls(&bed.tree)),
    ];
    for (program, options) in [
        ("ibv_rc_pingpong", &["-c"][..]),
        ("ibv_rc_pingpong", &["-e", "-c"]),
        ("ibv_uc_pingpong", &["-c"]),
        ("ibv_ud_pingpong", &["-e", "-c"]),
        ("ibv_srq_pingpong", &["-c"]),
    ] {
        let name = format!("{program} {}", options.join(" "));
        trials.push(stage.trial(name, move |bed| pingpong::play(bed, program, options)));
    }
    trials.extend(stage.matrix(Tier::Links));
    trials
}

/// What a router says of its one link.
fn link(router: &Router) -> Result<Value> {
    let status = router.status()?;
    status["links"].get(0).cloned().with_context(|| format!("no link in {status}"))
}

fn status(bed: &Bed) -> Result<()> {
    let sent = |router| -> Result<u64> { link(router)?["tx_bytes"].as_u64().context("no count") };
    let right = bed.client_router.as_ref().context("two routers")?;
    let before = sent(right)?;
    bed.run_pair(&Tool::new("ib_write_bw", &["-s", "65536", "-n", "64"]), LIMIT)?.success()?;
    let state = link(right)?;
    ensure!(state["router"] == "left" && state["state"] == "up", "{state}");
    let ping = [bed.tree.program().display().to_string(), "ping".to_owned(), bed.server.address.clone()];
    let socket = ["--socket".to_owned(), right.socket().display().to_string()];
    let mut ping = command(ping.iter().chain(&socket));
    ping.env_remove("FREEFLOW_SOCKET");
    // This process lives on neither host: it is told the way, and that nobody answers from here.
    let told = Job::spawn(ping, common::SHORT)?.wait()?;
    ensure!(told.stdout.contains("served by router left"), "{}", told.report());
    ensure!(sent(right)? >= before + 64 * 65536, "{state}, {before} before");
    Ok(())
}

fn cuts(bed: &Bed) -> Result<()> {
    // With a check of the data at each round.
    let tool = Tool::new("ibv_rc_pingpong", &["-g", "0", "-c", "-e", "-s", "60000", "-n", "3000"]);
    let made = || -> Result<u64> { link(&bed.router)?["connections"].as_u64().context("no count") };
    let before = made()?;
    let mut pair = bed.start_pair(&tool, LIMIT)?;
    let start = Instant::now();
    while !pair.client.has_ended()? && start.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(50));
        cut()?;
    }
    let outcome = pair.wait()?;
    outcome.success()?;
    for end in [&outcome.server, &outcome.client] {
        ensure!(end.stdout.contains("3000 iters in"), "not all rounds were played\n{}", outcome.report());
        ensure!(!end.stdout.contains("invalid data"), "the data is not what was sent\n{}", outcome.report());
    }
    ensure!(made()? > before, "no link was broken while the game lasted");
    Ok(())
}

fn a_router_dies(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create(&[])?;
    let right = hosts.start_router(tree, Side::Right)?;
    let left = hosts.start_router(tree, Side::Left)?;
    let (server, client) = (hosts.container(Side::Left, 0), hosts.container(Side::Right, 0));
    let mut bed = Bed::with_places(tree.clone(), left, server, client, Box::new(()));
    bed.client_router = Some(right);
    // One that always has requests on their way: who only waits for the other never hears of it.
    let endless = Tool::new("ib_write_bw", &["-D", "30"]);
    let mut pair = bed.start_pair(&endless, LIMIT)?;
    let start = Instant::now();
    while link(&bed.router).is_ok_and(|link| link["tx_bytes"].as_u64() < Some(100_000)) {
        ensure!(start.elapsed() < LIMIT && !pair.client.has_ended()?, "nothing moves");
        thread::sleep(Duration::from_millis(20));
    }
    let pid = i32::try_from(bed.router.pid()).ok().and_then(Pid::from_raw).context("no router")?;
    // The bed has not waited for it, so the number is still its own.
    kill_process(pid, Signal::KILL)?;
    bed.router = successor(&hosts, tree)?;
    let outcome = pair.client.wait()?;
    ensure!(!outcome.succeeded() && outcome.report().contains("Failed status 12"), "{}", outcome.report());
    drop(pair.server);
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"])
}

fn tls(tree: &Tree) -> Result<()> {
    let bed = Hosts::create(&[])?.secured(tree)?.bed(tree.clone())?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"])?;
    bed.run_pair(&Tool::new("ib_write_bw", &["-s", "300000", "-n", "50"]), LIMIT)?.success()?;
    bed.run_pair(&Tool::new("ib_read_bw", &["-s", "100000", "-n", "50"]), LIMIT)?.success()?;
    cut()?;
    pingpong::play(&bed, "ibv_ud_pingpong", &["-e", "-c"])
}

fn tenants(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create(&["blue", "red"])?;
    let _routers = [hosts.start_router(tree, Side::Left)?, hosts.start_router(tree, Side::Right)?];
    let program = tree.program().display().to_string();
    let command_of = |side, tenant: usize, words: &[&str]| {
        let socket = hosts.tenant_socket(side, tenant).display().to_string();
        let all = [&[&program[..], "run", "--socket", &socket, "--"], words].concat();
        hosts.container(side, tenant).plain_command(&common::words(&all))
    };
    let mut jobs: Vec<Job> = Vec::new();
    let words = ["ibv_rc_pingpong", "-g", "0", "-e", "-c", "-n", "300", "-p", "18600"];
    for tenant in [0, 1] {
        jobs.push(Job::spawn(command_of(Side::Left, tenant, &words), LIMIT)?);
    }
    thread::sleep(Duration::from_secs(1));
    for tenant in [0, 1] {
        let address = hosts.container(Side::Left, tenant).address;
        let words = [&words[..], &[&address]].concat();
        jobs.push(Job::spawn(command_of(Side::Right, tenant, &words), LIMIT)?);
    }
    for job in jobs {
        let outcome = job.wait()?;
        ensure!(outcome.succeeded() && !outcome.stdout.contains("invalid data"), "{}", outcome.report());
    }
    Ok(())
}
