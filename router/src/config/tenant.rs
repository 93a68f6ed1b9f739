//! A tenant in the configuration: a trust domain with a socket of its own.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Limits, bytes, octal, prefix::Prefix};

/// One `[[tenant]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// What it is called in the status and in log lines.
    pub name: String,
    /// Its control socket. Who can connect to it is a member.
    pub socket: PathBuf,
    /// Permission bits of the socket, as an octal string.
    #[serde(default = "open_to_all", deserialize_with = "octal")]
    pub socket_mode: u32,
    /// User and group of the socket, as numbers; where absent, the router's own.
    pub socket_owner: Option<Owner>,
    /// The addresses that its clients may have. With more than one tenant there must be some. Two tenants may have the
    /// same: their networks are separate, and they never meet.
    #[serde(default)]
    pub prefixes: Vec<Prefix>,
    /// Those of them that the directory in etcd is told of, for containers on other hosts; without any, none.
    #[serde(default)]
    pub announce: Vec<Prefix>,
    /// The loosest mode that its clients may have; each may ask for a stricter one.
    #[serde(default)]
    pub mode: Mode,
    /// How much of a lane each of its clients gets when others want it, too: so many times the usual share.
    #[serde(default = "one")]
    pub weight: u32,
    /// Quotas of one client, and the number of clients; what is absent is as in the router's own `[limits]`.
    #[serde(default)]
    pub limits: Overrides,
    /// Quotas of all its clients together; what is absent is not limited.
    #[serde(default)]
    pub total: Overrides,
}

impl Tenant {
    /// Whether its members may execute their own work requests.
    #[must_use]
    pub fn is_direct(&self, config: &super::Config) -> bool {
        config.direct && self.mode == Mode::Direct
    }
}

/// Who executes work requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The router alone.
    Isolated,
    /// Applications themselves, where both ends want it.
    #[default]
    Direct,
}

/// User and group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Quotas of which any may be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overrides {
    /// Opened devices.
    pub clients: Option<u32>,
    /// Queue pairs.
    pub qps: Option<u32>,
    /// Completion queues.
    pub cqs: Option<u32>,
    /// Memory regions.
    pub mrs: Option<u32>,
    /// Protection domains.
    pub pds: Option<u32>,
    /// Completion channels.
    pub channels: Option<u32>,
    /// Attachments to multicast groups.
    pub multicast: Option<u32>,
    /// Registered bytes.
    #[serde(deserialize_with = "some_bytes")]
    pub memory: Option<u64>,
    /// Bytes of queues.
    #[serde(deserialize_with = "some_bytes")]
    pub queues: Option<u64>,
}

impl Overrides {
    /// `limits`, with what is said here in its place.
    #[must_use]
    pub fn over(&self, limits: &Limits) -> Limits {
        Limits {
            clients: self.clients.unwrap_or(limits.clients),
            qps: self.qps.unwrap_or(limits.qps),
            cqs: self.cqs.unwrap_or(limits.cqs),
            mrs: self.mrs.unwrap_or(limits.mrs),
            pds: self.pds.unwrap_or(limits.pds),
            channels: self.channels.unwrap_or(limits.channels),
            memory: self.memory.unwrap_or(limits.memory),
            queues: self.queues.unwrap_or(limits.queues),
            multicast: self.multicast.unwrap_or(limits.multicast),
            cm_ids: limits.cm_ids,
        }
    }
}

impl Tenant {
    /// The first thing that is wrong with it alone.
    pub(super) fn fault(&self) -> Option<String> {
        let name = &self.name;
        if name.is_empty() || name.len() > 64 || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Some(format!("tenant.name = {name:?}; write 1 to 64 characters without spaces"));
        }
        if !self.socket.is_absolute() {
            return Some(format!(
                "tenant {name}: socket = {:?} is relative; write an absolute path",
                self.socket
            ));
        }
        if let Some(prefix) = self.announce.iter().find(|prefix| !prefix.is_for_hosts()) {
            return Some(format!("tenant {name}: announce: nobody on another host can reach {prefix}"));
        }
        let inside = |prefix: &Prefix| self.prefixes.iter().any(|own| own.covers(prefix));
        if let Some(prefix) = self.announce.iter().find(|prefix| !self.prefixes.is_empty() && !inside(prefix))
        {
            return Some(format!("tenant {name}: announce: {prefix} is in none of the tenant's prefixes"));
        }
        if !(1..=1000).contains(&self.weight) {
            return Some(format!("tenant {name}: weight = {}; from 1 to 1000 are possible", self.weight));
        }
        None
    }

    /// The first thing that it and another tenant cannot both have.
    pub(super) fn conflict(&self, other: &Self) -> Option<String> {
        let (a, b) = (&self.name, &other.name);
        if a == b {
            return Some(format!("two tenants are called {a}"));
        }
        if self.socket == other.socket {
            return Some(format!(
                "the tenants {a} and {b} have one socket, {:?}; give each its own",
                self.socket
            ));
        }
        let alone = [self, other].into_iter().find(|tenant| tenant.prefixes.is_empty())?;
        Some(format!(
            "the tenant {} has no prefixes; where there are several tenants, each must say which addresses are its own",
            alone.name
        ))
    }
}

fn open_to_all() -> u32 {
    0o666
}

fn one() -> u32 {
    1
}

fn some_bytes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    bytes(deserializer).map(Some)
}
