//! `[links]` and `[directory]` of the configuration, and the directory's file.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{ConfigError, Prefix};

/// How this router talks to those of other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// The name by which the directory and other routers know this one.
    pub name: String,
    /// Where other routers connect to.
    pub listen: SocketAddr,
    /// How the ends make sure of each other.
    pub security: Security,
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

/// Where it is written which router serves an address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// The file, the same on all hosts.
    pub file: PathBuf,
}

/// What the directory's file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirectoryFile {
    /// Where each router listens, by its name.
    pub routers: BTreeMap<String, SocketAddr>,
    /// Which router serves the addresses of a prefix. The longest prefix counts.
    #[serde(rename = "route")]
    pub routes: Vec<Route>,
}

/// Addresses that one router serves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The addresses.
    pub prefix: Prefix,
    /// The router's name.
    pub router: String,
    /// Whose they are; where absent, those of the one tenant of a router without tenants.
    #[serde(default = "default_tenant")]
    pub tenant: String,
}

fn default_tenant() -> String {
    "default".to_owned()
}

impl Links {
    /// The first value that cannot be.
    pub(super) fn fault(&self) -> Option<String> {
        let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if self.name.is_empty() || self.name.len() > 253 || !self.name.chars().all(named) {
            return Some(format!("links.name = {:?} is no name; use letters, digits, - . _", self.name));
        }
        if self.security == Security::Plain && !is_private(self.listen.ip()) {
            return Some(format!(
                "links.listen = \"{}\" is no private address, and security = \"plain\" is for these alone",
                self.listen
            ));
        }
        None
    }
}

impl DirectoryFile {
    /// Reads and checks it. `security` decides which addresses routers may have.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path, security: Security) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let file: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        match file.fault(security) {
            Some(reason) => Err(ConfigError::Value { path: path.to_owned(), reason }),
            None => Ok(file),
        }
    }

    fn fault(&self, security: Security) -> Option<String> {
        let exposed =
            |(_, address): &(&String, &SocketAddr)| security == Security::Plain && !is_private(address.ip());
        if let Some((name, address)) = self.routers.iter().find(exposed) {
            return Some(format!(
                "router {name} at {address} has no private address, and links.security is \"plain\""
            ));
        }
        let lost = self.routes.iter().find(|route| !self.routers.contains_key(&route.router))?;
        Some(format!("the route {} leads to {:?}, which is not among [routers]", lost.prefix, lost.router))
    }
}

/// Whether an address is reachable from inside a site alone.
fn is_private(address: IpAddr) -> bool {
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

    fn file(text: &str) -> Result<(), String> {
        let file: DirectoryFile = toml::from_str(text).map_err(|error| error.to_string())?;
        file.fault(Security::Plain).map_or(Ok(()), Err)
    }

    #[test]
    fn a_directory_that_cannot_be_is_refused_with_a_reason() {
        let routers = "[routers]\na = '10.0.0.1:7471'\nb = '[fd00::2]:7471'\n";
        let good = format!("{routers}[[route]]\nprefix = '10.1.0.0/16'\nrouter = 'a'\n");
        assert_eq!(file(&good), Ok(()));
        for (text, word) in [
            (good.replace("router = 'a'", "router = 'c'"), "\"c\""),
            (good.replace("10.0.0.1", "8.8.8.8"), "8.8.8.8"),
            (good.replace("10.1.0.0/16", "10.1.0.1/16"), "10.1.0.0/16"),
            (good.replace("prefix", "prefixes"), "prefixes"),
        ] {
            let message = file(&text).unwrap_err();
            assert!(message.contains(word), "{text}: {message}");
        }
    }

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
