//! Promise: between hosts whose kernels have RDMA, in virtual machines with an RNIC in software, FreeFlow's containers
//! meet, and whoever uses the kernel's RNIC does so as before.

#[path = "vm/beside.rs"]
mod beside;
mod common;
#[path = "vm/matrix.rs"]
mod matrix;

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use common::guests::{GuestStage, pair_with_rxe};
use libtest_mimic::Trial;
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

    /// Runs a tool on the bare RNICs of the two hosts.
    fn bare(&self, tool: &str) -> Result<[Outcome; 2]> {
        let [left, right] = &self.guests;
        let server = left.start(tool, LIMIT)?;
        left.wait_for_listener("", PORT)?;
        let client = right.run(&format!("{tool} {}", left.address()), LIMIT)?;
        both(server, client)
    }

    /// Runs a tool between the containers of the two hosts.
    fn contained(&self, tool: &str) -> Result<[Outcome; 2]> {
        let [left, right] = &self.guests;
        let server = left.start(&left.in_container(&self.tree, tool), LIMIT)?;
        left.wait_for_listener(vm::ENTER, PORT)?;
        let client = right.in_container(&self.tree, &format!("{tool} {}", left.container_address()));
        let client = right.run(&client, LIMIT)?;
        both(server, client)
    }
}

impl Hosts {
    /// The words that run something on a host itself, with options of `freeflow run`.
    fn run(&self, options: &str) -> String {
        format!("{} run {options} --", self.tree.program().display())
    }

    /// Waits until the router of the left host lists a listener of rdma_cm.
    fn wait_for_cm_listener(&self, port: u16) -> Result<()> {
        let program = self.tree.program().display().to_string();
        let script = format!(
            "for i in $(seq 100); do {program} status --json | grep -q ':{port}\"' && exit 0; sleep 0.2; done; exit 1"
        );
        self.guests[0]
            .run(&script, LIMIT)
            .map(|_| ())
            .with_context(|| format!("nobody listens on port {port}"))
    }
}

fn both(server: GuestJob, client: Outcome) -> Result<[Outcome; 2]> {
    let server = server.wait()?;
    server.success()?;
    Ok([server, client])
}

fn trials() -> Vec<Trial> {
    let stage = GuestStage::new(Hosts::boot);
    let mut trials = vec![
        stage.trial("bare ib_write_bw between two hosts", |hosts| {
            hosts.bare("ib_write_bw -d rxe0 -x 1 -F -s 65536 -n 100").map(|_| ())
        }),
        stage.trial("bare rping between two hosts", rping),
        stage.trial("ibv_rc_pingpong between containers of two hosts", pingpong),
        stage.trial("ib_write_bw between containers of two hosts", |hosts| {
            hosts.contained("ib_write_bw -d ff0 -F -s 65536 -n 100").map(|_| ())
        }),
    ];
    trials.extend(beside::trials(&stage));
    trials.extend(matrix::trials(&stage));
    trials
}

fn pingpong(hosts: &Hosts) -> Result<()> {
    for end in hosts.contained("ibv_rc_pingpong -d ff0 -g 0 -c -e -n 200")? {
        ensure!(end.stdout.contains("200 iters in"), "{}", end.report());
        ensure!(!end.stdout.contains("invalid data"), "{}", end.report());
    }
    Ok(())
}

fn rping(hosts: &Hosts) -> Result<()> {
    let [left, right] = &hosts.guests;
    let server = left.start("rping -s -p 9000 -C 10 -V", LIMIT)?;
    // No port of TCP shows that it listens.
    let client = format!("sleep 1; rping -c -a {} -p 9000 -C 10 -v -V", left.address());
    let client = right.run(&client, LIMIT)?;
    ensure!(client.stdout.matches("rdma-ping-").count() == 10, "{}", client.report());
    server.wait()?.success()
}
