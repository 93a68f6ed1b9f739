//! Promise: between two containers without any privilege, on Debian's root file system, the device works, and its
//! GIDs are the containers' own addresses.

mod common;

use std::{net::Ipv4Addr, process::ExitCode};

use anyhow::{Result, ensure};
use common::{Stage, container, device::Device, pingpong, rootfs};
use libtest_mimic::Trial;
use xtask::{bed::Bed, matrix::Tier, process};

fn main() -> ExitCode {
    common::run("containers", common::no_tree().or_else(obstacle), trials)
}

/// Why there can be no containers here, where there can be none.
fn obstacle() -> Option<String> {
    container::obstacle().or_else(|| rootfs::debian(rootfs::OURS).err().map(|error| format!("{error:#}")))
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
    let rootfs = rootfs::debian(rootfs::OURS)?;
    container::bed(tree, [&rootfs, &rootfs])
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
