//! Two network namespaces joined by a veth pair, each with its own addresses: two hosts on one machine.
//!
//! They are removed when the value is dropped; what a killed run left behind goes when the next one starts.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::process::{clean_up, command, run};

const PREFIX: &str = "freeflow-";
const LIMIT: Duration = Duration::from_secs(20);

/// One of the two namespaces.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    /// Its IPv4 address.
    pub address: &'static str,
    /// Its IPv6 address.
    pub address6: &'static str,
}

impl Namespace {
    /// What goes before a command to run it in here. `nsenter` leaves the mounts alone, `ip netns exec` does not.
    pub fn enter(&self) -> Vec<String> {
        vec!["nsenter".to_owned(), format!("--net=/run/netns/{}", self.name)]
    }
}

/// Two namespaces and the cable between them.
#[derive(Debug)]
pub struct NamespacePair {
    /// The first one, where servers run.
    pub left: Namespace,
    /// The second one, where clients run.
    pub right: Namespace,
}

impl NamespacePair {
    /// Makes them. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN over the present network namespace.
    pub fn create() -> Result<Self> {
        remove_leftovers();
        let id = std::process::id();
        let namespace = |side: &str, address, address6| Namespace {
            name: format!("{PREFIX}{id}-{side}"),
            address,
            address6,
        };
        let pair = Self {
            left: namespace("l", "10.200.77.1", "fd00:77::1"),
            right: namespace("r", "10.200.77.2", "fd00:77::2"),
        };
        pair.connect().context("could not make two network namespaces")?;
        Ok(pair)
    }

    fn connect(&self) -> Result<()> {
        let (left, right) = (&self.left.name, &self.right.name);
        ip(&["netns", "add", left])?;
        ip(&["netns", "add", right])?;
        ip(&["-n", left, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", right])?;
        for side in [&self.left, &self.right] {
            ip(&["-n", &side.name, "address", "add", &format!("{}/24", side.address), "dev", "eth0"])?;
            // nodad: the address is of use at once, not after a second of duplicate detection.
            let address6 = format!("{}/64", side.address6);
            ip(&["-n", &side.name, "address", "add", &address6, "dev", "eth0", "nodad"])?;
            ip(&["-n", &side.name, "link", "set", "lo", "up"])?;
            ip(&["-n", &side.name, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }
}

impl Drop for NamespacePair {
    fn drop(&mut self) {
        for side in [&self.left, &self.right] {
            // Half-made pairs come here too: what is not there cannot be removed.
            delete(&side.name);
        }
    }
}

/// Namespaces whose maker (its process number is in the name) is no more.
fn remove_leftovers() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if maker.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            delete(&name);
        }
    }
}

fn delete(name: &str) {
    clean_up(command(["ip", "netns", "delete", name]), LIMIT);
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(command(["ip"].iter().chain(arguments)), LIMIT).map(|_| ())
}
