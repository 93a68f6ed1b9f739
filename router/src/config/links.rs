//! `[links]` of the configuration.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;

/// TCP connections that a link may have.
const MAX_STREAMS: u32 = 16;

/// Those that it has where nothing is said.
fn streams() -> u32 {
    4
}

/// How this router talks to those of other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// The name by which the directory and other routers know this one.
    pub name: String,
    /// Where other routers connect to.
    pub listen: SocketAddr,
    /// Where they reach it, if that is not where it listens: it listens on all addresses, or behind a translation.
    pub address: Option<SocketAddr>,
    /// How the ends make sure of each other.
    pub security: Security,
    /// TCP connections to each router, 1 to 16; the end that wants fewer gets its way. A QP keeps to one of them.
    #[serde(default = "streams")]
    pub streams: u32,
    /// With TLS: the certificate of the authority that signs those of routers.
    pub authority: Option<PathBuf>,
    /// With TLS: this router's certificate, for its name.
    pub certificate: Option<PathBuf>,
    /// With TLS: the key that belongs to it.
    pub key: Option<PathBuf>,
}

/// How two routers make sure of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// By certificates, both ways; nobody else can read or change what travels.
    Tls,
    /// They do not: whoever can send from a router's address can be it. On private addresses alone.
    Plain,
}

impl Links {
    /// The first value that cannot be.
    pub(super) fn fault(&self) -> Option<String> {
        if !is_name(&self.name) {
            return Some(format!("links.name = {:?} is no name; use letters, digits, - . _", self.name));
        }
        if !(1..=MAX_STREAMS).contains(&self.streams) {
            return Some(format!("links.streams = {}; 1 to {MAX_STREAMS} are possible", self.streams));
        }
        let told = [("listen", Some(self.listen)), ("address", self.address)];
        for (word, address) in told.into_iter().filter_map(|(word, address)| Some((word, address?))) {
            if self.security == Security::Plain && !is_private(address.ip()) {
                return Some(format!(
                    "links.{word} = \"{address}\" is no private address, and security = \"plain\" is for these alone"
                ));
            }
        }
        None
    }

    /// Where other routers reach this one.
    #[must_use]
    pub fn reached_at(&self) -> SocketAddr {
        self.address.unwrap_or(self.listen)
    }

    /// Why this router cannot tell others where it is, if it cannot.
    pub(super) fn fault_of_address(&self) -> Option<String> {
        let address = self.reached_at();
        let is_somewhere = !address.ip().to_canonical().is_unspecified() && address.port() != 0;
        (!is_somewhere).then(|| {
            format!(
                "other routers cannot connect to {address}; write where they reach this one as links.address"
            )
        })
    }
}

/// Whether a router may be called so.
pub(crate) fn is_name(name: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (1..=253).contains(&name.len()) && name.chars().all(named)
}

/// Whether an address is reachable from inside a site alone.
pub(super) fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_private() || address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(mapped) => is_private(IpAddr::V4(mapped)),
            None => address.is_loopback() || address.is_unique_local() || address.is_unicast_link_local(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_addresses_are_private() {
        for (address, private) in [
            ("10.1.2.3", true),
            ("192.168.0.1", true),
            ("127.0.0.1", true),
            ("fd00::1", true),
            ("fe80::1", true),
            ("::ffff:10.0.0.1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("8.8.8.8", false),
            ("2001:db8::1", false),
            ("::ffff:8.8.8.8", false),
        ] {
            assert_eq!(is_private(address.parse().unwrap()), private, "{address}");
        }
    }
}
