//! Promise: between hosts that have an RNIC each, containers' messages go by the RNICs; what the RNICs cannot carry, and all
//! that comes after their end, goes over TCP, and nothing is left behind on them.

mod common;

use std::{
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use common::guests::{GuestStage, pair_with_rxe};
use libtest_mimic::Trial;
use serde_json::Value;
use xtask::{
    process::Outcome,
    tree::Tree,
    vm::{self, Guest, GuestJob, Kernel},
};

/// Much more than a tool needs under emulation.
const LIMIT: Duration = Duration::from_secs(90);
const PORT: u16 = 18515;

fn main() -> ExitCode {
    common::run("vm", common::no_tree().or_else(vm::obstacle), trials)
}

/// Two hosts, each with an RNIC, a router and a container.
struct Hosts {
    guests: [Arc<Guest>; 2],
    tree: Tree,
    _routers: [GuestJob; 2],
}

impl Hosts {
    fn boot(kernel: &Kernel) -> Result<Self> {
        let (guests, tree) = (pair_with_rxe(kernel)?, common::tree()?);
        for guest in &guests {
            guest.add_container()?;
        }
        let [left, right] = &guests;
        let routers = [left.start_router(&tree, "")?, right.start_router(&tree, "")?];
        Ok(Self { guests, tree, _routers: routers })
    }

    /// Starts a server in the left container, and runs the client in the right one.
    fn contained(&self, tool: &str) -> Result<[Outcome; 2]> {
        let (server, client) = self.begin(tool)?;
        let (client, server) = (client.wait()?, server.wait()?);
        client.success()?;
        server.success()?;
        Ok([server, client])
    }

    /// The same without waiting for their ends.
    fn begin(&self, tool: &str) -> Result<(GuestJob, GuestJob)> {
        let [left, right] = &self.guests;
        let server = left.start(&left.in_container(&self.tree, tool), LIMIT)?;
        left.wait_for_listener(vm::ENTER, PORT)?;
        let client = right.in_container(&self.tree, &format!("{tool} {}", left.container_address()));
        Ok((server, right.start(&client, LIMIT)?))
    }

    /// Runs a tool on the bare RNICs of the two hosts.
    fn bare(&self, tool: &str) -> Result<Outcome> {
        let [left, right] = &self.guests;
        let server = left.start(tool, LIMIT)?;
        left.wait_for_listener("", PORT)?;
        let client = right.run(&format!("{tool} {}", left.address()), LIMIT)?;
        server.wait()?.success()?;
        Ok(client)
    }

    /// What a host's router says of itself.
    fn status(&self, host: usize) -> Result<Value> {
        let program = self.tree.program().display().to_string();
        let said = self.guests[host].run(&format!("{program} status --json"), LIMIT)?;
        serde_json::from_str(&said.stdout).context("the status is no JSON")
    }

    /// Packets that a host's RNIC has sent.
    fn packets(&self, host: usize) -> Result<u64> {
        let counter = "cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts";
        Ok(self.guests[host].run(counter, LIMIT)?.stdout.trim().parse()?)
    }

    /// Runs a tool, and says whether the RNICs have carried it.
    fn carried(&self, tool: &str, packets: u64) -> Result<[Outcome; 2]> {
        let before = [self.packets(0)?, self.packets(1)?];
        let ends = self.contained(tool)?;
        let sent = [self.packets(0)? - before[0], self.packets(1)? - before[1]];
        ensure!(sent.iter().all(|sent| *sent >= packets), "{tool}: the RNICs sent {sent:?} packets");
        Ok(ends)
    }

    /// Waits until a condition holds for a host's status.
    fn wait_for(&self, host: usize, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.status(host)?;
            if holds(&status) {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(30) {
                bail!("{what} does not come: {status:#}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Nothing of anybody's is left on the RNICs.
    fn is_clean(&self) -> Result<()> {
        for host in [0, 1] {
            let unused = |status: &Value| status["rnic"]["qps"] == 0 && status["rnic"]["mrs"] == 0;
            self.wait_for(host, "an RNIC without clients", unused)?;
            let shown = self.guests[host].run("rdma resource show qp | grep -c 'type RC' || true", LIMIT)?;
            ensure!(shown.stdout.trim() == "0", "QPs are left: {}", shown.report());
        }
        Ok(())
    }
}

/// The path of every connected QP that a status tells of.
fn paths(status: &Value) -> Vec<String> {
    let qps = status["qps"].as_array().cloned().unwrap_or_default();
    qps.iter().map(|qp| qp["path"].as_str().unwrap_or_default().to_owned()).collect()
}

fn trials() -> Vec<Trial> {
    let stage = GuestStage::new(Hosts::boot);
    vec![
        stage.trial("status and doctor say which RNIC is used and why", what_is_used),
        stage.trial("ibv_rc_pingpong goes by the RNICs, with events and checked content", pingpong),
        stage.trial("the status shows the path of a connection while it lasts", path),
        stage.trial("perftest's RC tools go by the RNICs", perftest),
        stage.trial("atomics are the routers' and give the right results", |hosts| {
            hosts.contained("ib_atomic_bw -d ff0 -F -A FETCH_AND_ADD -n 100").map(|_| ())
        }),
        stage.trial("datagrams and unreliable connections go over TCP", |hosts| {
            hosts.contained("ibv_ud_pingpong -d ff0 -g 0 -c -n 50")?;
            hosts.contained("ibv_uc_pingpong -d ff0 -g 0 -c -n 50").map(|_| ())
        }),
        stage.trial("bandwidth beside that of the bare RNIC", figures),
        stage.trial("nothing is left on the RNICs", Hosts::is_clean),
        stage.trial(
            "an RNIC that goes ends its connections, TCP takes over, and it is used when it comes back",
            gone,
        ),
        stage.trial("a cable that is pulled for a moment costs nothing", pulled),
        stage.trial(
            "a router that is killed leaves its peer's clients an error, and nothing on the RNICs",
            killed,
        ),
    ]
}

fn what_is_used(hosts: &Hosts) -> Result<()> {
    let program = hosts.tree.program().display().to_string();
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
        for end in hosts.carried(&tool, 100)? {
            ensure!(end.stdout.contains("100 iters in"), "{}", end.report());
            ensure!(!end.stdout.contains("invalid data"), "{}", end.report());
        }
    }
    Ok(())
}

fn path(hosts: &Hosts) -> Result<()> {
    let (server, client) = hosts.begin("ib_send_bw -d ff0 -F -s 4096 -D 20")?;
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
            hosts.carried(&format!("{tool} -d ff0 -F -s {size} -n 100"), 50)?;
        }
    }
    for tool in ["ib_write_lat", "ib_read_lat", "ib_send_lat"] {
        hosts.carried(&format!("{tool} -d ff0 -F -s 64 -n 100"), 100)?;
    }
    Ok(())
}

/// Traffic that lasts until something ends it; both ends must notice.
fn begin_traffic(hosts: &Hosts) -> Result<(GuestJob, GuestJob)> {
    let traffic = hosts.begin("ib_write_bw -d ff0 -F -s 65536 -D 60")?;
    hosts.wait_for(1, "a QP on the RNIC", |status| paths(status) == ["rnic"])?;
    thread::sleep(Duration::from_secs(2));
    Ok(traffic)
}

fn gone(hosts: &Hosts) -> Result<()> {
    let (mut server, client) = begin_traffic(hosts)?;
    let [left, _] = &hosts.guests;
    left.run("timeout 20 rdma link del rxe0", LIMIT).context("the RNIC is held")?;
    let client = client.wait()?;
    ensure!(!client.succeeded(), "the client does not notice: {}", client.report());
    server.kill();
    hosts.wait_for(0, "word that the RNIC is gone", |status| status["rnic"]["state"] == "gone")?;
    // Both routers agree on TCP.
    let before = hosts.packets(1)?;
    hosts.contained("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 50")?;
    ensure!(hosts.packets(1)? < before + 50, "the RNIC that is left has carried it");
    left.run("rdma link add rxe0 type rxe netdev eth0", LIMIT)?;
    hosts.wait_for(0, "the RNIC's return", |status| status["rnic"]["state"] == "up")?;
    hosts.carried("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 100", 100)?;
    hosts.is_clean()
}

fn pulled(hosts: &Hosts) -> Result<()> {
    let (server, client) = hosts.begin("ib_write_bw -d ff0 -F -s 65536 -D 8 -u 18")?;
    hosts.wait_for(1, "a QP on the RNIC", |status| paths(status) == ["rnic"])?;
    hosts.guests[1]
        .run("tc qdisc replace dev eth0 root netem loss 100%; sleep 1; tc qdisc del dev eth0 root", LIMIT)?;
    for end in [client.wait()?, server.wait()?] {
        end.success()?;
    }
    hosts.is_clean()
}

fn killed(hosts: &Hosts) -> Result<()> {
    let (mut server, client) = begin_traffic(hosts)?;
    let [left, _] = &hosts.guests;
    left.run("kill -9 $(pgrep -of 'freeflow router --config')", LIMIT)?;
    let client = client.wait()?;
    ensure!(!client.succeeded(), "the client does not notice: {}", client.report());
    server.kill();
    let _router = left.start_router(&hosts.tree, "")?;
    hosts.is_clean()?;
    hosts.carried("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 100", 100).map(|_| ())
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
        match hosts.bare(&tool("-d rxe0 -x 1")).and_then(|end| bandwidth(&end)) {
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
