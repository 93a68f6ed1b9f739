//! `[directory]` of the configuration: where it is written which router serves an address. And the directory's file.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use super::{ConfigError, Links, Prefix, Security, links::is_private};

/// Servers of one etcd.
const MAX_ENDPOINTS: usize = 16;
/// Where etcd listens unless told otherwise.
const ETCD_PORT: u16 = 2379;

/// Where it is written which router serves an address: in a file, or in etcd.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// The file, the same on all hosts.
    pub file: Option<PathBuf>,
    /// The servers of an etcd 3.4 or newer. The routers write into it themselves.
    #[serde(default)]
    pub etcd: Vec<Endpoint>,
    /// With etcd: what all keys begin with.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// With etcd: seconds after which what a dead router wrote is gone.
    #[serde(default = "default_lease")]
    pub lease: u64,
    /// With etcd: the user to log in as.
    pub user: Option<String>,
    /// With etcd: the file with the user's password.
    pub password_file: Option<PathBuf>,
    /// With https: the certificate of the authority that signed those of the servers.
    pub authority: Option<PathBuf>,
    /// With https: the certificate to show to the servers, where they ask for one.
    pub certificate: Option<PathBuf>,
    /// With https: the key that belongs to it.
    pub key: Option<PathBuf>,
    /// With etcd, and without tenants: the addresses that are published. With tenants, each has its own.
    #[serde(default)]
    pub announce: Vec<Prefix>,
}

fn default_prefix() -> String {
    "/freeflow/".to_owned()
}

fn default_lease() -> u64 {
    10
}

/// A server of etcd, as `http://host:port` or `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Whether it speaks TLS.
    pub is_secure: bool,
    /// A name, or an address without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (is_secure, rest) = match text.split_once("://")? {
                ("http", rest) => (false, rest),
                ("https", rest) => (true, rest),
                _ => return None,
            };
            let rest = rest.strip_suffix('/').unwrap_or(rest);
            let (host, port) = match rest.strip_prefix('[') {
                Some(rest) => {
                    let (host, port) = rest.split_once(']')?;
                    host.parse::<Ipv6Addr>().ok()?;
                    (host, port)
                }
                None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
            };
            let port = match port.strip_prefix(':') {
                Some(port) => port.parse().ok().filter(|port| *port != 0)?,
                None => port.is_empty().then_some(ETCD_PORT)?,
            };
            let in_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
            let fits = (1..=253).contains(&host.len()) && host.chars().all(in_name);
            fits.then(|| Self { is_secure, host: host.to_owned(), port })
        };
        parse().ok_or_else(|| {
            format!("{text:?} is no server of etcd; write one as \"http://10.0.0.5:2379\" or \"https://etcd-1:2379\"")
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_secure { "https" } else { "http" };
        write!(formatter, "{scheme}://{}", self.authority())
    }
}

impl Endpoint {
    /// Host and port, as they stand in a request.
    pub(crate) fn authority(&self) -> String {
        let brackets = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        format!("{}{}{}:{}", brackets.0, self.host, brackets.1, self.port)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Directory {
    /// How long what this router wrote stays without it.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease)
    }

    /// Whether it is in etcd.
    #[must_use]
    pub fn is_etcd(&self) -> bool {
        !self.etcd.is_empty()
    }

    /// The first value that cannot be.
    pub(super) fn fault(&self, links: &Links) -> Option<String> {
        match (&self.file, self.is_etcd()) {
            (Some(_), true) => {
                return Some("[directory] has both `file` and `etcd`; write one of them".into());
            }
            (None, false) => {
                return Some("[directory] has neither `file` nor `etcd`; write one of them".into());
            }
            (Some(_), false) => return self.fault_of_file(),
            (None, true) => {}
        }
        if self.etcd.len() > MAX_ENDPOINTS {
            return Some(format!(
                "directory.etcd has {} servers; at most {MAX_ENDPOINTS} are possible",
                self.etcd.len()
            ));
        }
        let plain = |c: char| c.is_ascii_graphic() && c != '%';
        let (first, last) = (self.prefix.starts_with('/'), self.prefix.ends_with('/'));
        if !first || !last || self.prefix.len() > 128 || !self.prefix.chars().all(plain) {
            return Some(format!(
                "directory.prefix = {:?}; write something like \"/freeflow/\"",
                self.prefix
            ));
        }
        if !(2..=3600).contains(&self.lease) {
            return Some(format!("directory.lease = {}; from 2 to 3600 seconds are possible", self.lease));
        }
        if let Some(prefix) = self.announce.iter().find(|prefix| !prefix.is_for_hosts()) {
            return Some(format!("directory.announce: nobody on another host can reach {prefix}"));
        }
        self.fault_of_access().or_else(|| links.fault_of_address())
    }

    /// What goes with etcd alone.
    fn fault_of_file(&self) -> Option<String> {
        let words = [
            ("user", self.user.is_some()),
            ("password_file", self.password_file.is_some()),
            ("authority", self.authority.is_some()),
            ("certificate", self.certificate.is_some()),
            ("key", self.key.is_some()),
            ("announce", !self.announce.is_empty()),
            ("prefix", self.prefix != default_prefix()),
            ("lease", self.lease != default_lease()),
        ];
        let (word, _) = words.iter().find(|(_, there)| *there)?;
        Some(format!("directory.{word} goes with `etcd`, and the directory is a file"))
    }

    fn fault_of_access(&self) -> Option<String> {
        if self.user.is_some() != self.password_file.is_some() {
            return Some("directory.user and directory.password_file go together; write both or none".into());
        }
        if self.user.as_ref().is_some_and(|user| user.is_empty() || user.len() > 256) {
            return Some("directory.user; write 1 to 256 characters".into());
        }
        if self.certificate.is_some() != self.key.is_some() {
            return Some("directory.certificate and directory.key go together; write both or none".into());
        }
        let secure = self.etcd.iter().filter(|endpoint| endpoint.is_secure).count();
        if secure != 0 && secure != self.etcd.len() {
            return Some("directory.etcd mixes http and https; write one of them".into());
        }
        if secure != 0 && self.authority.is_none() {
            return Some(
                "directory.authority is missing: https needs the certificate of who signed those of etcd"
                    .into(),
            );
        }
        if secure == 0 && (self.authority.is_some() || self.certificate.is_some()) {
            return Some(
                "directory.authority and directory.certificate are for https, and etcd's servers are http"
                    .into(),
            );
        }
        None
    }
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
        let exposed = |(_, address): &(&String, &SocketAddr)| !may_listen(**address, security);
        if let Some((name, address)) = self.routers.iter().find(exposed) {
            return Some(format!(
                "router {name} at {address} has no private address, and links.security is \"plain\""
            ));
        }
        let lost = self.routes.iter().find(|route| !self.routers.contains_key(&route.router))?;
        Some(format!("the route {} leads to {:?}, which is not among [routers]", lost.prefix, lost.router))
    }
}

/// Whether a router may listen there.
pub(crate) fn may_listen(address: SocketAddr, security: Security) -> bool {
    security == Security::Tls || is_private(address.ip())
}

/// Whether an address means the same on all hosts and belongs to one of them: not loopback, link-local, a group or none.
pub(crate) fn is_for_hosts(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => {
            let [first, ..] = address.octets();
            first != 0 && first < 224 && !address.is_loopback() && !address.is_link_local()
        }
        IpAddr::V6(address) => {
            // IPv4-compatible addresses, which nobody uses any more, hold the unspecified and the loopback one.
            let reserved = u128::from(address) >> 32 == 0;
            !reserved && !address.is_multicast() && !address.is_unicast_link_local()
        }
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

    fn etcd(text: &str) -> Result<(), String> {
        etcd_behind("10.0.0.1:7471", text)
    }

    fn etcd_behind(listen: &str, text: &str) -> Result<(), String> {
        let links = format!("name = 'a'\nlisten = '{listen}'\nsecurity = 'plain'\n");
        let links: Links = toml::from_str(&links).unwrap();
        let directory: Directory = toml::from_str(text).map_err(|error| error.to_string())?;
        directory.fault(&links).map_or(Ok(()), Err)
    }

    #[test]
    fn an_etcd_that_cannot_be_is_refused_with_a_reason() {
        let good = "etcd = ['http://10.0.0.5:2379']\n";
        assert_eq!(etcd(good), Ok(()));
        let secure = "etcd = ['https://etcd-1']\nauthority = '/a'\n";
        assert_eq!(etcd(secure), Ok(()));
        let all = "prefix = '/x/'\nlease = 5\nuser = 'u'\npassword_file = '/p'\nannounce = ['10.1.0.0/16']\n";
        assert_eq!(etcd(&format!("{secure}{all}certificate = '/c'\nkey = '/k'\n")), Ok(()));
        for (text, word) in [
            ("", "neither"),
            ("file = '/f'\nlease = 5", "directory.lease"),
            ("file = '/f'\netcd = ['http://a']", "both"),
            ("etcd = ['10.0.0.5:2379']", "http://10.0.0.5:2379"),
            ("etcd = ['ftp://a']", "ftp"),
            ("etcd = ['http://a:0']", "a:0"),
            ("etcd = ['http://a:1/v3']", "v3"),
            ("etcd = ['http://a b']", "a b"),
            ("etcd = ['http://a', 'https://b']\nauthority = '/a'", "mixes"),
            ("etcd = ['https://a']", "authority"),
            ("etcd = ['http://a']\nauthority = '/a'", "https"),
            ("etcd = ['http://a']\nuser = 'u'", "password_file"),
            ("etcd = ['http://a']\npassword = 'p'", "password"),
            ("etcd = ['http://a']\nprefix = 'freeflow'", "/freeflow/"),
            ("etcd = ['http://a']\nlease = 1", "lease = 1"),
            ("etcd = ['http://a']\nannounce = ['127.0.0.0/8']", "127.0.0.0/8"),
            ("etcd = ['http://a']\nannounce = ['fe80::/10']", "fe80::/10"),
        ] {
            let message = etcd(text).unwrap_err();
            assert!(message.contains(word), "{text}: {message}");
        }
        let nowhere = etcd_behind("0.0.0.0:7471", good);
        assert!(nowhere.as_ref().unwrap_err().contains("links.address"), "{nowhere:?}");
    }

    #[test]
    fn a_server_of_etcd_is_written_as_it_was_read() {
        for (text, shown) in [
            ("http://10.0.0.5:2379", "http://10.0.0.5:2379"),
            ("https://etcd-1/", "https://etcd-1:2379"),
            ("http://[fd00::5]:1", "http://[fd00::5]:1"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn only_addresses_that_other_hosts_can_reach_are_for_them() {
        for (address, expected) in [
            ("10.1.2.3", true),
            ("fd00::1", true),
            ("::ffff:10.1.2.3", true),
            ("127.0.0.1", false),
            ("::ffff:127.0.0.1", false),
            ("169.254.1.1", false),
            ("0.0.0.0", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("::", false),
            ("::1", false),
            ("fe80::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_for_hosts(address.parse().unwrap()), expected, "{address}");
        }
    }
}
