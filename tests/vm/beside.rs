//! A kernel with RDMA devices: who sees `ff0`, who sees them, and what a program does that has both.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use xtask::vm::Guest;

use super::common::{
    guest_hosts::{Hosts, LIMIT},
    guests::GuestStage,
    probe,
};

pub(super) fn trials(stage: &GuestStage<Hosts>) -> Vec<Trial> {
    vec![
        stage.trial("a program under `freeflow run` sees ff0 and nothing else", sees_ff0_alone),
        stage.trial("a program without our environment sees the kernel's RNIC alone", sees_the_kernels_alone),
        stage.trial("a program sees both when it is asked for", sees_both),
        stage.trial("memory that the kernel's RNIC has pinned is never moved", pinned),
        stage.trial("one wildcard listener serves clients of both devices", wildcard),
        stage.trial("rstream over both devices", rstream),
        stage.trial("ucmatose over both devices", ucmatose),
        stage.trial("udaddy over both devices", udaddy),
    ]
}

/// The devices that a command shows by `ibv_devices`.
fn devices(guest: &Arc<Guest>, enter: &str) -> Result<Vec<String>> {
    let shown = guest.run(&format!("{enter} ibv_devices"), LIMIT)?.stdout;
    // Two lines of a heading.
    let names = shown.lines().skip(2).filter_map(|line| line.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

fn sees_ff0_alone(hosts: &Hosts) -> Result<()> {
    let [left, _] = &hosts.guests;
    for words in [hosts.run(""), left.in_container(&hosts.tree, "")] {
        let found = devices(left, &words)?;
        ensure!(found == ["ff0"], "{words}: {found:?}");
        let shown = left.run(&format!("{words} ibv_devinfo"), LIMIT)?.stdout;
        ensure!(shown.contains("ff0") && !shown.contains("rxe0"), "{shown}");
    }
    Ok(())
}

fn sees_the_kernels_alone(hosts: &Hosts) -> Result<()> {
    let [left, _] = &hosts.guests;
    // The provider may even be installed for everybody.
    let drivers = format!("RDMAV_DRIVERS={}/lib/freeflow/libfreeflow", hosts.tree.prefix().display());
    for words in ["", &drivers] {
        let found = devices(left, words)?;
        ensure!(found == ["rxe0"], "{words}: {found:?}");
        let pair = format!(
            "{words} rping -s -p 9001 -C 5 & sleep 1; {words} rping -c -a 10.9.0.1 -p 9001 -C 5 -V && wait $!"
        );
        left.run(&pair, LIMIT)?;
    }
    Ok(())
}

fn sees_both(hosts: &Hosts) -> Result<()> {
    let [left, _] = &hosts.guests;
    let mut found = devices(left, &hosts.run("--kernel-devices"))?;
    found.sort();
    ensure!(found == ["ff0", "rxe0"], "{found:?}");
    // The way of those who set the environment by themselves, and have made the node.
    left.run("mkdir -p /dev/infiniband; mknod -m 666 /dev/infiniband/uverbs_ff0 c 1 3", LIMIT)?;
    let program = hosts.program();
    let mut found = devices(left, &format!("eval \"$({program} env --kernel-devices)\";"))?;
    found.sort();
    ensure!(found == ["ff0", "rxe0"], "{found:?}");
    let options = left.run(&format!("{program} env --shell docker --kernel-devices"), LIMIT)?.stdout;
    ensure!(options.contains("--device=/dev/infiniband/uverbs0"), "{options}");
    Ok(())
}

fn pinned(hosts: &Hosts) -> Result<()> {
    let [left, _] = &hosts.guests;
    for mode in ["isolated", "direct"] {
        let words = format!(
            "{} {} beside rxe0 1",
            hosts.run(&format!("--kernel-devices --mode {mode}")),
            probe::path()
        );
        left.run(&words, LIMIT)?;
    }
    Ok(())
}

/// Packets that the RNIC of a guest has sent, once those of earlier connections have ended.
fn sent(guest: &Arc<Guest>) -> Result<u64> {
    let script = "count() { cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts; }
        for i in $(seq 20); do before=$(count); sleep 0.4; [ $before = $(count) ] && break; done; count";
    guest.run(script, LIMIT)?.stdout.trim().parse().context("no count")
}

/// Fails unless a client's work went, or did not go, over the RNIC of the server's host.
fn over(hosts: &Hosts, rnic: bool, client: impl FnOnce() -> Result<()>) -> Result<()> {
    let [left, _] = &hosts.guests;
    let before = sent(left)?;
    client()?;
    let packets = sent(left)? - before;
    ensure!((packets > 0) == rnic, "{packets} packets over the kernel's RNIC");
    Ok(())
}

/// The clients of a server that has both devices: as told by the words of a guest, and whether it is reached by the
/// kernel's RNIC.
fn clients(hosts: &Hosts, tool: &str) -> [(usize, String, bool); 4] {
    let [left, _] = &hosts.guests;
    let both = hosts.run("--kernel-devices");
    let address = left.address();
    [
        // A stranger on the other host.
        (1, format!("{tool} {address}"), true),
        // A container of the same host, which has ff0 alone.
        (0, left.in_container(&hosts.tree, &format!("{tool} 10.244.1.1")), false),
        // Those who have both, too: the way there decides.
        (1, format!("{both} {tool} {address}"), true),
        (0, format!("{both} {tool} 10.244.1.1"), false),
    ]
}

fn wildcard(hosts: &Hosts) -> Result<()> {
    let [left, _] = &hosts.guests;
    let server = left.start(&format!("{} rping -s -P -p 9002", hosts.run("--kernel-devices")), LIMIT)?;
    hosts.wait_for_cm_listener(9002)?;
    for (guest, client, rnic) in clients(hosts, "rping -c -C 10 -v -V -p 9002 -a") {
        over(hosts, rnic, || {
            let client = hosts.guests[guest].run(&client, LIMIT)?;
            ensure!(client.stdout.matches("rdma-ping-").count() == 10, "{}", client.report());
            Ok(())
        })?;
    }
    drop(server);
    Ok(())
}

/// Plays each client against a server that serves one.
fn one_by_one(hosts: &Hosts, server: &str, client: &str, port: u16) -> Result<()> {
    let [left, _] = &hosts.guests;
    for (guest, client, rnic) in clients(hosts, client) {
        let server = left.start(&format!("{} {server}", hosts.run("--kernel-devices")), LIMIT)?;
        hosts.wait_for_cm_listener(port)?;
        over(hosts, rnic, || {
            hosts.guests[guest].run(&client, LIMIT)?;
            server.wait()?.success()
        })?;
    }
    Ok(())
}

fn rstream(hosts: &Hosts) -> Result<()> {
    let common = "rstream -p 9003 -S 4000 -C 20 -T v";
    one_by_one(hosts, common, &format!("{common} -s"), 9003)
}

fn ucmatose(hosts: &Hosts) -> Result<()> {
    one_by_one(hosts, "ucmatose -p 9004 -c 5 -m", "ucmatose -p 9004 -c 5 -m -s", 9004)
}

fn udaddy(hosts: &Hosts) -> Result<()> {
    one_by_one(hosts, "udaddy -c 3", "udaddy -c 3 -s", 7174)
}
