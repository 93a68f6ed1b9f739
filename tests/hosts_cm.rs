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
    bed::{Bed, PairOutcome, Tool, free_port},
    hosts::{Hosts, Side},
    process::Job,
    tree::Tree,
};

/// perftest, connected by name.
const BY_NAME: &[(&str, &[&str])] = &[
    ("ib_write_bw", &["-R", "-s", "65536", "-n", "200"]),
    ("ib_read_bw", &["-R", "-n", "200"]),
    ("ib_send_bw", &["-R", "-q", "4", "-n", "100"]),
    ("ib_send_bw", &["-R", "-c", "UD", "-n", "200"]),
    ("ib_atomic_bw", &["-R", "-n", "200"]),
    ("ib_write_lat", &["-R", "-n", "100"]),
    ("ib_read_lat", &["-R", "-n", "100"]),
    ("ib_send_lat", &["-R", "-n", "100"]),
    ("ib_send_lat", &["-R", "-c", "UD", "-n", "100"]),
    ("ib_atomic_lat", &["-R", "-n", "100"]),
];

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    let obstacle = common::no_tree().or(obstacle).or(programs::no_tools());
    common::run("hosts_cm", obstacle, || {
        let stage = Stage::new(|| Hosts::create(&[])?.bed(common::tree()?));
        let mut trials = programs::trials(&stage, "two hosts");
        trials.extend(programs::endings(&stage, "two hosts"));
        for (program, options) in BY_NAME {
            let name = format!("{program} {} (two hosts)", options.join(" "));
            trials.push(
                stage.trial(name, move |bed| bed.run_pair(&Tool::new(program, options), LIMIT)?.success()),
            );
        }
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
