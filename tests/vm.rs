//! Promise: between hosts whose kernels have RDMA, in virtual machines with an RNIC in software, FreeFlow's containers
//! meet, and whoever uses the kernel's RNIC does so as before.

#[path = "vm/beside.rs"]
mod beside;
mod common;
#[path = "vm/matrix.rs"]
mod matrix;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use common::{
    guest_hosts::{Hosts, LIMIT},
    guests::GuestStage,
};
use libtest_mimic::Trial;
use xtask::vm;

fn main() -> ExitCode {
    common::run("vm", common::no_tree().or_else(vm::obstacle), trials)
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
