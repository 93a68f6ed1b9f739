//! Promise: programs that meet by name work unmodified between containers of two hosts, whatever happens to the link
//! between their routers.

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
    programs::{self, LIMIT},
};
use rustix::process::{Pid, Signal, kill_process};
use xtask::{
    bed::{Bed, PairOutcome, free_port},
    hosts::{Hosts, Side},
    process::Job,
    tree::Tree,
};

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    let obstacle = common::no_tree().or(obstacle).or(programs::no_tools());
    common::run("hosts_cm", obstacle, || {
        let stage = Stage::new(|| Hosts::create(&[])?.bed(common::tree()?));
        let mut trials = programs::trials(&stage, "two hosts");
        trials.extend(programs::endings(&stage, "two hosts"));
        trials.extend([
            stage.trial("rping by IPv6 (two hosts)", rping_by_ipv6),
            stage.trial("an address of the other host cannot be bound", programs::foreign_address),
            stage.trial("no connection is lost with a link that breaks again and again", cuts),
            // With hosts of their own.
            stage
                .trial("a host that does not answer is unreachable in the end", |bed| nobody_home(&bed.tree)),
            stage.trial("a router's successor is connected to like the router", |bed| {
                a_router_dies(&bed.tree)
            }),
            stage.trial("two tenants with the same overlay addresses do not meet by name", |bed| {
                tenants(&bed.tree)
            }),
        ]);
        trials
    })
}

fn rping_by_ipv6(bed: &Bed) -> Result<()> {
    programs::tool(bed, "rping -s -a ::0 -p PORT -C 5 -V", "rping -c -a fd00:78::1 -p PORT -C 5 -V")
}

fn cuts(bed: &Bed) -> Result<()> {
    for (server, client) in [
        ("ucmatose -p PORT -c 200 -C 3", "ucmatose -p PORT -c 200 -C 3 -s ADDR"),
        ("rping -s -p PORT -C 400 -V", "rping -c -a ADDR -p PORT -C 400 -V"),
    ] {
        let port = free_port()?;
        let server = programs::serve(bed, server, port)?;
        let words = programs::words(client, bed, port);
        let mut client = Job::spawn(bed.command(&bed.client, &words), LIMIT)?;
        let start = Instant::now();
        while !client.has_ended()? && start.elapsed() < LIMIT {
            thread::sleep(Duration::from_millis(60));
            cut()?;
        }
        let client = client.wait()?;
        let server =
            if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
        PairOutcome { server, client }.success()?;
    }
    Ok(())
}

fn nobody_home(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create(&[])?;
    let right = hosts.start_router(tree, Side::Right)?;
    let (server, client) = (hosts.container(Side::Left, 0), hosts.container(Side::Right, 0));
    let bed = Bed::with_places(tree.clone(), right, server, client, Box::new(hosts));
    let outcome = programs::run_client(&bed, "rping -c -a ADDR -p PORT -C 1", free_port()?)?;
    let told = outcome.stdout.clone() + &outcome.stderr;
    ensure!(told.contains("RDMA_CM_EVENT_UNREACHABLE, error -110"), "{}", outcome.report());
    Ok(())
}

/// Both have the same addresses on both hosts, and servers on the same port.
fn tenants(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create_alike(&["blue", "red"])?;
    let routers = [hosts.start_router(tree, Side::Left)?, hosts.start_router(tree, Side::Right)?];
    let (program, port) = (tree.program().display().to_string(), free_port()?.to_string());
    let address = hosts.container(Side::Left, 0).address;
    ensure!(hosts.container(Side::Left, 1).address == address, "their addresses differ");
    let start = |side, tenant: usize, words: &[&str]| {
        let socket = hosts.tenant_socket(side, tenant).display().to_string();
        let rping = ["run", "--socket", &socket, "--", "rping", "-v", "-V", "-p", &port];
        let all = [&[&program[..]], &rping[..], words].concat();
        Job::spawn(hosts.container(side, tenant).plain_command(&common::words(&all)), LIMIT)
    };
    // So many pings each, which a server counts, too.
    let pings = ["7", "11"];
    let serve = |tenant: usize| start(Side::Left, tenant, &["-s", "-C", pings[tenant]]);
    let ask = |tenant: usize| start(Side::Right, tenant, &["-c", "-a", &address, "-C", pings[tenant]]);
    let listening = |count: usize| -> Result<()> {
        let began = Instant::now();
        loop {
            let listeners = routers[0].status()?["listeners"].to_string();
            if listeners.matches(&format!(":{port}\"")).count() == count {
                return Ok(());
            }
            ensure!(began.elapsed() < LIMIT, "{listeners}");
            thread::sleep(Duration::from_millis(20));
        }
    };
    let red = serve(1)?;
    listening(1)?;
    let alone = ask(0)?.wait()?;
    let told = alone.stdout.clone() + &alone.stderr;
    ensure!(
        told.contains("RDMA_CM_EVENT_REJECTED, error 8"),
        "the other tenant's listener: {}",
        alone.report()
    );
    let blue = serve(0)?;
    listening(2)?;
    let clients = [ask(0)?, ask(1)?];
    for (job, count) in [blue, red].into_iter().chain(clients).zip(pings.iter().cycle()) {
        let outcome = job.wait()?;
        let seen = outcome.stdout.matches("rdma-ping-").count();
        ensure!(outcome.succeeded() && seen.to_string() == *count, "{seen} pings: {}", outcome.report());
    }
    Ok(())
}

fn a_router_dies(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create(&[])?;
    let right = hosts.start_router(tree, Side::Right)?;
    let left = hosts.start_router(tree, Side::Left)?;
    let (server, client) = (hosts.container(Side::Left, 0), hosts.container(Side::Right, 0));
    let mut bed = Bed::with_places(tree.clone(), left, server, client, Box::new(()));
    bed.client_router = Some(right);
    let (server, client) = programs::endless(&bed, free_port()?)?;
    let pid = i32::try_from(bed.router.pid()).ok().and_then(Pid::from_raw).context("no router")?;
    // The bed has not waited for it, so the number is still its own.
    kill_process(pid, Signal::KILL)?;
    bed.router = successor(&hosts, tree)?;
    // Both only wait for each other, and a wire says nothing by itself.
    drop((server, client));
    for _ in 0..3 {
        programs::tool(&bed, "rping -s -p PORT -C 5 -V", "rping -c -a ADDR -p PORT -C 5 -V")?;
    }
    Ok(())
}
