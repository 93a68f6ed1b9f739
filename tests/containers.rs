//! Promise: between two containers without any privilege, on Debian's root file system, the device works, and its
//! GIDs are the containers' own addresses.

mod common;

use std::{net::Ipv4Addr, process::ExitCode};

use anyhow::{Result, ensure};
use common::{Stage, container::ContainerPair, device::Device, pingpong, rootfs};
use libtest_mimic::Trial;
use xtask::{bed::Bed, matrix::Tier, process, router::Router};

fn main() -> ExitCode {
    common::run("containers", common::no_tree().or_else(obstacle), trials)
}

/// Why there can be no containers here, where there can be none.
fn obstacle() -> Option<String> {
    if !common::is_root() {
        return Some("only root may make containers on a bridge network".to_owned());
    }
    let missing: Vec<&str> =
        ["podman", "runc", "debootstrap"].into_iter().filter(|&name| !process::has_program(name)).collect();
    if !missing.is_empty() {
        return Some(format!("not installed: {}", missing.join(", ")));
    }
    rootfs::debian().err().map(|error| format!("no root file system: {error:#}"))
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(make_bed);
    let mut trials = vec![
        stage.trial("containers have no privilege", have_no_privilege),
        stage.trial("GIDs are the addresses of the container", gids_are_addresses),
    ];
    trials.extend(pingpong::trials(&stage));
    trials.extend(stage.matrix(Tier::Containers));
    trials
}

fn make_bed() -> Result<Bed> {
    let tree = common::tree()?;
    let router = Router::start(&tree)?;
    let pair = ContainerPair::start(&tree, router.socket(), &rootfs::debian()?)?;
    let (server, client) = (pair.server.place(), pair.client.place());
    Ok(Bed::with_places(tree, router, server, client, Box::new(pair)))
}

fn have_no_privilege(bed: &Bed) -> Result<()> {
    for place in [&bed.server, &bed.client] {
        let words = common::words(&["cat", "/proc/self/status"]);
        let status = process::run(place.plain_command(&words), common::SHORT)?.stdout;
        for line in
            ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Uid:\t65534\t65534"]
        {
            ensure!(status.contains(line), "not {line:?}:\n{status}");
        }
    }
    Ok(())
}

fn gids_are_addresses(bed: &Bed) -> Result<()> {
    for place in [&bed.server, &bed.client] {
        let device = Device::query(bed, place)?;
        device.check()?;
        let address = place.address.parse::<Ipv4Addr>()?.to_ipv6_mapped();
        ensure!(device.gids.contains(&address), "{address} is not among {:?}", device.gids);
    }
    Ok(())
}
