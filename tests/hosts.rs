//! Promise: between two network namespaces the device works, and its GIDs are the namespaces' own addresses.

mod common;

use std::{
    net::{IpAddr, Ipv6Addr},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use common::{Stage, device::Device, pingpong};
use libtest_mimic::Trial;
use xtask::{bed::Bed, matrix::Tier, process};

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    common::run("hosts", common::no_tree().or(obstacle), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Bed::across_namespaces(common::tree()?));
    let mut trials = vec![
        stage.trial("GIDs are the addresses of the namespace", gids_are_addresses),
        stage.trial("the GID table follows the addresses", gids_follow_addresses),
    ];
    trials.extend(pingpong::trials(&stage));
    trials.extend(stage.matrix(Tier::Hosts));
    trials
}

fn gids_are_addresses(bed: &Bed) -> Result<()> {
    for (place, address6) in [(&bed.server, "fd00:77::1"), (&bed.client, "fd00:77::2")] {
        let device = Device::query(bed, place)?;
        device.check()?;
        for address in [as_gid(&place.address)?, as_gid(address6)?] {
            ensure!(device.gids.contains(&address), "{address} is not among {:?}", device.gids);
        }
        let other = if place.address == bed.server.address { &bed.client } else { &bed.server };
        ensure!(
            !device.gids.contains(&as_gid(&other.address)?),
            "the peer's address is among {:?}",
            device.gids
        );
    }
    Ok(())
}

fn gids_follow_addresses(bed: &Bed) -> Result<()> {
    let address = "10.200.77.9";
    for (verb, expected) in [("add", true), ("delete", false)] {
        let words = common::words(&["ip", "address", verb, &format!("{address}/24"), "dev", "eth0"]);
        process::run(bed.client.plain_command(&words), common::SHORT)?;
        let start = Instant::now();
        while Device::query(bed, &bed.client)?.gids.contains(&as_gid(address)?) != expected {
            ensure!(
                start.elapsed() < Duration::from_secs(5),
                "the table does not follow `ip address {verb}`"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

/// IPv4 addresses appear as IPv4-mapped ones.
fn as_gid(address: &str) -> Result<Ipv6Addr> {
    Ok(match address.parse()? {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    })
}
