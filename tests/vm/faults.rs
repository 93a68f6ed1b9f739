//! What goes wrong between two hosts, seen by who uses the RNIC and by a container: the same errors, and nothing is left.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use xtask::vm::GuestJob;

use super::{Hosts, LIMIT, PORT, common::guests::GuestStage};

pub(super) fn trials() -> Vec<Trial> {
    // With hosts of its own, of which one is left.
    let stage = GuestStage::new(Hosts::boot);
    vec![stage.trial("a host that loses its power is a peer that does not answer", power_cut)]
}

/// Who sends for longer than the test lasts, and who takes it.
fn endless(hosts: &Hosts) -> Result<Vec<GuestJob>> {
    let [left, right] = &hosts.guests;
    let (bare, contained) = ("ib_write_bw -d rxe0 -x 1 -F -D 60", "ib_write_bw -d ff0 -x 0 -F -D 60");
    let inside = |words: &str| hosts.guests[0].in_container(&hosts.tree, words);
    let mut jobs = vec![left.start(bare, LIMIT)?, left.start(&inside(contained), LIMIT)?];
    left.wait_for_listener("", PORT)?;
    left.wait_for_listener(xtask::vm::ENTER, PORT)?;
    jobs.push(right.start(&format!("{bare} {}", left.address()), LIMIT)?);
    jobs.push(right.start(&inside(&format!("{contained} {}", left.container_address())), LIMIT)?);
    Ok(jobs)
}

fn power_cut(hosts: &Hosts) -> Result<()> {
    let [left, right] = &hosts.guests;
    let mut jobs = endless(hosts)?;
    let start = Instant::now();
    // They say that they are connected before the first byte.
    while !jobs[2..].iter().all(|job| job.stdout().contains("remote address")) {
        ensure!(start.elapsed() < LIMIT, "{}{}", jobs[2].stdout(), jobs[3].stdout());
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_secs(3));
    left.kill();
    let ends = jobs.split_off(2).into_iter().map(GuestJob::wait).collect::<Result<Vec<_>>>()?;
    ensure!(ends.iter().all(|end| !end.succeeded()), "{}", ends[0].report());
    // Soft-RoCE, under emulation, ends now and then with another status.
    ensure!(ends[1].report().contains("Failed status 12"), "{}", ends[1].report());
    let kept = right.run("rdma resource show qp | grep -c RC; true", LIMIT)?.stdout;
    ensure!(kept.trim() == "0", "QPs of the RNIC are left:\n{kept}");
    let status = right.run(&format!("{} status --json", hosts.tree.program().display()), LIMIT)?.stdout;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    ensure!(status["clients"].as_array().is_some_and(Vec::is_empty), "clients are left: {status}");
    Ok(())
}
