//! Two network namespaces joined by a veth pair, each with its own addresses: two hosts on one machine.
//!
//! They are removed when the value is dropped; what a killed run left behind goes when the next one starts.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::process::{clean_up, command, run};

const PREFIX: &str = "freeflow-";
/// The side that a name ends with, IPv4 address, IPv6 address.
type End = (&'static str, &'static str, &'static str);
/// The ends of the overlay networks.
const OVERLAYS: [[End; 2]; 2] = [
    [("l", "10.201.77.1", "fd00:78::1"), ("r", "10.201.77.2", "fd00:78::2")],
    [("l", "10.202.77.1", "fd00:79::1"), ("r", "10.202.77.2", "fd00:79::2")],
];

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
        vec!["nsenter".to_owned(), format!("--net={}", self.path())]
    }

    /// The file that stands for it.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

impl Namespace {
    /// Gives its end of the cable its addresses.
    fn configure(&self) -> Result<()> {
        let name = &self.name;
        ip(&["-n", name, "address", "add", &format!("{}/24", self.address), "dev", "eth0"])?;
        // nodad: the address is of use at once, not after a second of duplicate detection.
        ip(&["-n", name, "address", "add", &format!("{}/64", self.address6), "dev", "eth0", "nodad"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "link", "set", "eth0", "up"])
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
        let left = ("l", "10.200.77.1", "fd00:77::1");
        let pair = Self::named("", left, ("r", "10.200.77.2", "fd00:77::2"));
        pair.connect().context("could not make two network namespaces")?;
        Ok(pair)
    }

    /// Makes two whose cable is a VXLAN between two others, as container networks do: the first or the second, with
    /// the addresses of one of them.
    pub fn on_overlay(under: &Self, id: usize, addresses: usize) -> Result<Self> {
        let [left, right] = OVERLAYS[addresses];
        let pair = Self::named(&format!("{id}-"), left, right);
        pair.overlay(under, id).context("could not make an overlay network")?;
        Ok(pair)
    }

    fn named(tag: &str, left: End, right: End) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let (id, count) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let namespace = |(side, address, address6): End| Namespace {
            name: format!("{PREFIX}{id}-{count}-{tag}{side}"),
            address,
            address6,
        };
        Self { left: namespace(left), right: namespace(right) }
    }

    fn overlay(&self, under: &Self, id: usize) -> Result<()> {
        let (id, device) = ((10 + id).to_string(), format!("vx{id}"));
        let ends = [(&self.left, &under.left, &under.right), (&self.right, &under.right, &under.left)];
        for (side, host, other) in ends {
            ip(&["netns", "add", &side.name])?;
            let vxlan = ["-n", &host.name, "link", "add", &device, "type", "vxlan", "id", &id];
            let tunnel = ["local", host.address, "remote", other.address, "dstport", "4789", "dev", "eth0"];
            ip(&[&vxlan[..], &tunnel[..]].concat())?;
            ip(&["-n", &host.name, "link", "set", &device, "netns", &side.name])?;
            ip(&["-n", &side.name, "link", "set", &device, "name", "eth0"])?;
            side.configure()?;
        }
        Ok(())
    }

    fn connect(&self) -> Result<()> {
        let (left, right) = (&self.left.name, &self.right.name);
        ip(&["netns", "add", left])?;
        ip(&["netns", "add", right])?;
        ip(&["-n", left, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", right])?;
        self.left.configure()?;
        self.right.configure()
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
