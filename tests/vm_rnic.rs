//! Promise: between hosts that have an RNIC each, containers' messages go by the RNICs; what the RNICs cannot carry, and all
//! that comes after their end, goes over TCP, and nothing is left behind on them.

mod common;

use std::{process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use common::{
    guest_hosts::{Hosts, LIMIT, paths},
    guests::GuestStage,
};
use libtest_mimic::Trial;
use xtask::{
    process::Outcome,
    vm::{self, GuestJob},
};

fn main() -> ExitCode {
    common::run("vm", common::no_tree().or_else(vm::obstacle), trials)
}

/// Runs a tool, and says whether the RNICs have carried it.
fn carried(hosts: &Hosts, tool: &str, packets: u64) -> Result<[Outcome; 2]> {
    hosts.by_rnic([packets; 2], || hosts.contained(tool)).with_context(|| tool.to_owned())
}

/// Nothing of anybody's is left on the RNICs.
fn are_clean(hosts: &Hosts) -> Result<()> {
    [0, 1].into_iter().try_for_each(|host| hosts.is_clean(host))
}

fn trials() -> Vec<Trial> {
    let stage = GuestStage::new(Hosts::boot);
    vec![
        stage.trial("status and doctor say which RNIC is used and why", what_is_used),
        stage.trial("ibv_rc_pingpong goes by the RNICs, with events and checked content", pingpong),
        stage.trial("the status shows the path of a connection while it lasts", path),
        stage.trial("perftest's RC tools go by the RNICs", perftest),
        stage.trial("four QPs both ways go by the RNICs, beside the same on the bare ones", both_ways),
        stage.trial("connections by rdma_cm go by the RNICs", rdma_cm),
        stage.trial("atomics are the routers' and give the right results", |hosts| {
            hosts.contained("ib_atomic_bw -d ff0 -F -A FETCH_AND_ADD -n 100").map(|_| ())
        }),
        stage.trial("datagrams and unreliable connections go over TCP", |hosts| {
            hosts.contained("ibv_ud_pingpong -d ff0 -g 0 -c -n 50")?;
            hosts.contained("ibv_uc_pingpong -d ff0 -g 0 -c -n 50").map(|_| ())
        }),
        stage.trial("bandwidth beside that of the bare RNIC", figures),
        stage.trial("nothing is left on the RNICs", are_clean),
        stage.trial(
            "an RNIC that goes ends its connections, TCP takes over, and it is used when it comes back",
            gone,
        ),
        stage.trial("a cable that is pulled for a moment costs nothing", pulled),
        stage.trial(
            "a router that is killed leaves its peer's clients an error, and nothing on the RNICs",
            killed,
        ),
        // The last one: a host is gone after it.
        stage.trial("a host that loses its power is a peer that does not answer", power_cut),
    ]
}

fn what_is_used(hosts: &Hosts) -> Result<()> {
    let program = hosts.program();
    for (host, guest) in hosts.guests.iter().enumerate() {
        let said = guest.run(&format!("{program} status"), LIMIT)?;
        let line =
            format!("rnic: rxe0 port 1, GID 1 ::ffff:{}, up (first with an active port", guest.address());
        ensure!(said.stdout.contains(&line), "{}", said.report());
        let doctor = guest.start(&format!("{program} doctor"), LIMIT)?.wait()?;
        let line = doctor.stdout.lines().find(|line| line.contains("real NIC")).unwrap_or_default();
        ensure!(line.starts_with("PASS") && line.contains("rxe0 port 1, GID 1"), "{}", doctor.report());
        let rnic = &hosts.status(host)?["rnic"];
        ensure!(rnic["device"] == "rxe0" && rnic["state"] == "up", "{rnic}");
    }
    Ok(())
}

fn pingpong(hosts: &Hosts) -> Result<()> {
    for size in [64, 4096, 100_000] {
        let tool = format!("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 100 -s {size}");
        for end in carried(hosts, &tool, 100)? {
            ensure!(end.stdout.contains("100 iters in"), "{}", end.report());
            ensure!(!end.stdout.contains("invalid data"), "{}", end.report());
        }
    }
    Ok(())
}

fn path(hosts: &Hosts) -> Result<()> {
    let [server, client] = hosts.begin("ib_send_bw -d ff0 -F -s 4096 -D 20")?;
    for host in [0, 1] {
        hosts.wait_for(host, "a QP on the RNIC", |status| {
            let is_linked = status["links"][0]["rnic"] == true;
            paths(status) == ["rnic"] && status["rnic"]["qps"] == 1 && is_linked
        })?;
    }
    for end in [client.wait()?, server.wait()?] {
        end.success()?;
    }
    Ok(())
}

fn perftest(hosts: &Hosts) -> Result<()> {
    for tool in ["ib_write_bw", "ib_read_bw", "ib_send_bw"] {
        for size in [8, 4096, 65_536] {
            carried(hosts, &format!("{tool} -d ff0 -F -s {size} -n 100"), 50)?;
        }
    }
    for tool in ["ib_write_lat", "ib_read_lat", "ib_send_lat"] {
        carried(hosts, &format!("{tool} -d ff0 -F -s 64 -n 100"), 100)?;
    }
    Ok(())
}

/// perftest's own timeout of 67 ms is too short for Soft-RoCE under emulation, which then repeats itself until it gives up,
/// also bare; this one is four seconds.
fn both_ways(hosts: &Hosts) -> Result<()> {
    let tool = |rest: &str| format!("timeout 20 ib_write_bw {rest} -F -s 65536 -n 50 -q 4 -b");
    carried(hosts, "ib_write_bw -d ff0 -u 20 -F -s 65536 -n 50 -q 4 -b", 800)?;
    show("bare", hosts.begin_bare(&tool("-d rxe0 -x 1"))?)?;
    show("by shadow QPs", hosts.begin(&tool("-d ff0"))?)
}

/// Shows how a run with perftest's own timeout ends, of which nothing is asked.
fn show(which: &str, [server, client]: [GuestJob; 2]) -> Result<()> {
    for (end, job) in [("client", client), ("server", server)] {
        let outcome = job.wait()?;
        let said = [outcome.stdout.as_str(), &outcome.stderr].concat();
        let failed = said.lines().find(|line| line.contains("Failed status")).map(str::trim);
        let well = if outcome.succeeded() { "well" } else { "no end" };
        eprintln!("four QPs both ways with a timeout of 67 ms, {which}, {end}: {}", failed.unwrap_or(well));
    }
    Ok(())
}

fn rdma_cm(hosts: &Hosts) -> Result<()> {
    let rping = "-C 20 -v -V -p 9005";
    let rping = [format!("rping -s {rping}"), format!("rping -c {rping} -a {{}}")];
    let [_, client] = hosts.by_rnic([20; 2], || hosts.named(&rping[0], &rping[1], 9005))?;
    ensure!(client.stdout.matches("rdma-ping-").count() == 20, "{}", client.report());
    for tool in ["ib_write_bw", "ib_read_bw", "ib_send_lat"] {
        let tool = format!("{tool} -R -F -s 4096 -n 100 -p 9006");
        hosts.by_rnic([50; 2], || hosts.named(&tool, &format!("{tool} {{}}"), 9006)).context(tool)?;
    }
    let tool = "rstream -p 9007 -S 4000 -C 20 -T v";
    hosts.by_rnic([20; 2], || hosts.named(tool, &format!("{tool} -s {{}}"), 9007))?;
    are_clean(hosts)
}

/// Traffic that lasts until something ends it; both ends must notice.
fn begin_traffic(hosts: &Hosts) -> Result<[GuestJob; 2]> {
    let traffic = hosts.begin("ib_write_bw -d ff0 -F -s 65536 -n 1000000 -u 16")?;
    hosts.wait_for(1, "a QP on the RNIC", |status| paths(status) == ["rnic"])?;
    thread::sleep(Duration::from_secs(2));
    Ok(traffic)
}

/// A client that sends for ever ends by itself: its peer does not answer any more.
fn notices(client: GuestJob) -> Result<()> {
    let client = client.wait()?;
    ensure!(client.report().contains("Failed status"), "the client does not notice: {}", client.report());
    Ok(())
}

fn gone(hosts: &Hosts) -> Result<()> {
    let [mut server, client] = begin_traffic(hosts)?;
    let [left, _] = &hosts.guests;
    left.run("timeout 20 rdma link del rxe0", LIMIT).context("the RNIC is held")?;
    notices(client)?;
    server.kill();
    hosts.wait_for(0, "word that the RNIC is gone", |status| status["rnic"]["state"] == "gone")?;
    // Both routers agree on TCP.
    let before = hosts.packets(1)?;
    hosts.contained("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 50")?;
    ensure!(hosts.packets(1)? < before + 50, "the RNIC that is left has carried it");
    left.run("rdma link add rxe0 type rxe netdev eth0", LIMIT)?;
    hosts.wait_for(0, "the RNIC's return", |status| status["rnic"]["state"] == "up")?;
    carried(hosts, "ibv_rc_pingpong -d ff0 -g 0 -c -e -n 100", 100)?;
    are_clean(hosts)
}

fn pulled(hosts: &Hosts) -> Result<()> {
    let [server, client] = hosts.begin("ib_write_bw -d ff0 -F -s 65536 -D 8 -u 18")?;
    hosts.wait_for(1, "a QP on the RNIC", |status| paths(status) == ["rnic"])?;
    hosts.guests[1]
        .run("tc qdisc replace dev eth0 root netem loss 100%; sleep 1; tc qdisc del dev eth0 root", LIMIT)?;
    for end in [client.wait()?, server.wait()?] {
        end.success()?;
    }
    are_clean(hosts)
}

fn killed(hosts: &Hosts) -> Result<()> {
    let [mut server, client] = begin_traffic(hosts)?;
    let [left, _] = &hosts.guests;
    left.run("kill -9 $(pgrep -of 'freeflow router --config')", LIMIT)?;
    notices(client)?;
    server.kill();
    hosts.restart_router(0)?;
    are_clean(hosts)?;
    carried(hosts, "ibv_rc_pingpong -d ff0 -g 0 -c -e -n 100", 100).map(|_| ())
}

fn power_cut(hosts: &Hosts) -> Result<()> {
    let [_server, client] = begin_traffic(hosts)?;
    hosts.guests[0].kill();
    notices(client)?;
    hosts.is_clean(1)?;
    let status = hosts.status(1)?;
    ensure!(status["clients"].as_array().is_some_and(Vec::is_empty), "clients are left: {status:#}");
    Ok(())
}

/// MiB/s of a run of perftest.
fn bandwidth(outcome: &Outcome) -> Result<f64> {
    let mut rows =
        outcome.stdout.lines().filter(|line| line.trim_start().starts_with(|c: char| c.is_ascii_digit()));
    let row = rows.next_back().with_context(|| outcome.report())?;
    let average = row.split_whitespace().nth(3).with_context(|| outcome.report())?;
    Ok(average.parse()?)
}

fn figures(hosts: &Hosts) -> Result<()> {
    for size in [16_384, 65_536] {
        let tool = |device: &str| format!("ib_write_bw {device} -F -s {size} -n 300");
        let [_, client] = hosts.contained(&tool("-d ff0"))?;
        let ours = bandwidth(&client)?;
        // What Soft-RoCE makes of it under emulation is no promise of ours.
        match hosts.bare(&tool("-d rxe0 -x 1")).and_then(|[_, end]| bandwidth(&end)) {
            Ok(bare) => eprintln!(
                "ib_write_bw {size}: bare {bare:.0}, by shadow QPs {ours:.0} MiB/s, ratio {:.2}",
                ours / bare
            ),
            Err(error) => {
                eprintln!("ib_write_bw {size}: by shadow QPs {ours:.0} MiB/s, bare failed: {error:#}")
            }
        }
    }
    Ok(())
}
