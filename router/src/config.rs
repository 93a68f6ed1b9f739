//! Configuration of the daemon.
//!
//! Does: read and check the TOML file of `freeflow router --config`. Leaves to others: what the command line
//! overrides (the `router` subcommand) and acting on it (the daemon).
//!
//! A word that is not known is an error, never ignored: a quota with a typing mistake must not mean "no quota".

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};
use verbs_abi::shm::arena;

mod directory;
mod links;
mod prefix;
mod rnic;
mod tenant;

pub use directory::{Directory, DirectoryFile, Endpoint, Route};
pub(crate) use directory::{is_for_hosts, may_listen};
pub(crate) use links::is_name;
pub use links::{Links, Security};
pub use prefix::{Prefix, PrefixError};
pub use rnic::{Choice, Rnic};
pub use tenant::{Mode, Overrides, Owner, Tenant};

/// Tenants of one router: a lane sleeps on a word of each, and the kernel lets it sleep on 128.
pub const MAX_TENANTS: usize = 127;

/// How the daemon runs. `Config::default()` is what runs without a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Control socket; where absent, the command line chooses (`/run/freeflow/router.sock` for root).
    pub socket: Option<PathBuf>,
    /// Permission bits of the control socket, written as an octal string: `"0666"`. Where absent, everybody may
    /// connect, or only the router's own user where there are tenants.
    #[serde(deserialize_with = "some_octal")]
    pub socket_mode: Option<u32>,
    /// Data-path threads; where absent, as many as suit the CPUs of this host.
    pub lanes: Option<usize>,
    /// Seconds without any client after which the daemon ends; where absent, never.
    pub idle_exit: Option<u64>,
    /// What to log, as `FREEFLOW_LOG` says it: `error`, `warn`, `info`, `debug`, `trace`, or `target=level` lists.
    pub log: Option<String>,
    /// Whether clients of one tenant may execute their own work requests (direct mode).
    pub direct: bool,
    /// How to talk to the routers of other hosts; where absent, this host is alone.
    pub links: Option<Links>,
    /// Which router serves an address.
    pub directory: Option<Directory>,
    /// The real NIC that carries what goes to other hosts.
    pub rnic: Rnic,
    /// Quotas of one client.
    pub limits: Limits,
    /// Trust domains with sockets of their own. Where there are none, everybody on the control socket is of one
    /// tenant, `default`; where there are some, the control socket is for the operator's questions alone.
    #[serde(rename = "tenant")]
    pub tenants: Vec<Tenant>,
}

/// Quotas: what one router serves, and what one client may take.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Opened devices served at once.
    pub clients: u32,
    /// Queue pairs of one client.
    pub qps: u32,
    /// Completion queues of one client.
    pub cqs: u32,
    /// Memory regions of one client.
    pub mrs: u32,
    /// Registered memory of one client in bytes, each region at its full length. Written as a number or as `"64GiB"`.
    #[serde(deserialize_with = "bytes")]
    pub memory: u64,
    /// Protection domains of one client.
    pub pds: u32,
    /// Completion channels of one client; each is a descriptor of the router.
    pub channels: u32,
    /// Shared memory of one client's QPs and CQs in bytes.
    #[serde(deserialize_with = "bytes")]
    pub queues: u64,
    /// Attachments of one client's QPs to multicast groups.
    pub multicast: u32,
    /// Ids of rdma_cm of one process; a tenant has sixteen times as many. librdmacm itself ends at 65,536.
    pub cm_ids: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: None,
            socket_mode: None,
            lanes: None,
            idle_exit: None,
            log: None,
            direct: true,
            links: None,
            directory: None,
            rnic: Rnic::default(),
            limits: Limits::default(),
            tenants: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 4096,
            qps: 16_384,
            cqs: 16_384,
            mrs: 65_536,
            memory: 1 << 40,
            pds: 4096,
            channels: 1024,
            queues: arena::ARENA_LEN as u64,
            multicast: 4096,
            cm_ids: 16_384,
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not TOML, or says something that is not known.
    #[error("the configuration {path} is wrong")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("the configuration {path} is wrong: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which value, and what would be right.
        reason: String,
    },
}

impl Config {
    /// Reads and checks `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// The same for text; `path` appears in messages only.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        match config.fault() {
            Some(reason) => Err(ConfigError::Value { path: path.to_owned(), reason }),
            None => Ok(config),
        }
    }

    /// The first value that is out of its range.
    fn fault(&self) -> Option<String> {
        if let Some(socket) = self.socket.as_deref().filter(|socket| !socket.is_absolute()) {
            return Some(format!("socket = {socket:?} is relative; write an absolute path"));
        }
        if self.lanes.is_some_and(|lanes| lanes == 0 || lanes > 64) {
            return Some(format!("lanes = {}; from 1 to 64 are possible", self.lanes.unwrap_or(0)));
        }
        if let Some(fault) = self.links.as_ref().and_then(Links::fault) {
            return Some(fault);
        }
        if self.links.is_some() != self.directory.is_some() {
            return Some("[links] and [directory] go together; write both or none".to_owned());
        }
        let both = self.links.as_ref().zip(self.directory.as_ref());
        if let Some(fault) = both.and_then(|(links, directory)| directory.fault(links)) {
            return Some(fault);
        }
        let publishes = self.directory.as_ref().is_some_and(|directory| !directory.announce.is_empty());
        if publishes && !self.tenants.is_empty() {
            return Some(
                "directory.announce is for a router without tenants; write it into each [[tenant]]".into(),
            );
        }
        self.rnic.fault().or_else(|| self.limits.fault("limits")).or_else(|| self.tenants_fault())
    }

    fn tenants_fault(&self) -> Option<String> {
        if self.tenants.len() > MAX_TENANTS {
            return Some(format!("{} tenants; at most {MAX_TENANTS} are possible", self.tenants.len()));
        }
        for (i, tenant) in self.tenants.iter().enumerate() {
            let of = |what: &str| format!("tenant {}: {what}", tenant.name);
            let quotas = |overrides: &Overrides, what| overrides.over(&self.limits).fault(&of(what));
            let own = tenant.fault().or_else(|| quotas(&tenant.limits, "limits"));
            let own = own.or_else(|| quotas(&tenant.total, "total"));
            let same_socket = self.socket.as_ref() == Some(&tenant.socket);
            let has_etcd = self.directory.as_ref().is_some_and(Directory::is_etcd);
            let lost = !tenant.announce.is_empty() && !has_etcd;
            let own = own.or_else(|| lost.then(|| of("announce goes with [directory] etcd = [...]")));
            let own = own.or_else(|| same_socket.then(|| of("socket is the router's own; give it another")));
            let fault = own.or_else(|| self.tenants[..i].iter().find_map(|other| other.conflict(tenant)));
            if fault.is_some() {
                return fault;
            }
        }
        None
    }

    /// Permission bits of the control socket.
    #[must_use]
    pub fn socket_mode(&self) -> u32 {
        self.socket_mode.unwrap_or(if self.tenants.is_empty() { 0o666 } else { 0o600 })
    }

    /// How long the daemon stays without clients.
    pub fn idle_exit(&self) -> Option<Duration> {
        self.idle_exit.map(Duration::from_secs)
    }
}

impl Limits {
    /// The first quota that is out of its range; `of` says whose it is.
    fn fault(&self, of: &str) -> Option<String> {
        let quotas = [
            ("clients", u64::from(self.clients)),
            ("qps", u64::from(self.qps)),
            ("cqs", u64::from(self.cqs)),
            ("mrs", u64::from(self.mrs)),
            ("memory", self.memory),
            ("pds", u64::from(self.pds)),
            ("channels", u64::from(self.channels)),
            ("queues", self.queues),
            ("multicast", u64::from(self.multicast)),
            ("cm_ids", u64::from(self.cm_ids)),
        ];
        let zero = quotas.iter().find(|(_, value)| *value == 0);
        zero.map(|(name, _)| format!("{of}.{name} = 0 would serve nobody; write at least 1"))
    }
}

fn some_octal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    octal(deserializer).map(Some)
}

/// Permission bits, `"0660"`.
fn octal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    match u32::from_str_radix(&text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(de::Error::custom(format!("{text:?} is not a file mode; write it as \"0660\""))),
    }
}

/// A number of bytes: `65536`, `"512MiB"`, `"64GiB"`.
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bytes {
        Number(u64),
        Text(String),
    }
    let text = match Bytes::deserialize(deserializer) {
        Ok(Bytes::Number(number)) => return Ok(number),
        Ok(Bytes::Text(text)) => text,
        Err(_) => return Err(de::Error::custom("not a size; write bytes (65536) or \"64GiB\"")),
    };
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let parsed = units.iter().find_map(|(unit, shift)| {
        let count: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        count.checked_mul(1 << shift)
    });
    parsed.ok_or_else(|| {
        de::Error::custom(format!("{text:?} is not a size; write it as \"512MiB\" or \"64GiB\""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("router.toml"))
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn every_word_is_understood() {
        let config = parse(
            "socket = '/run/x.sock'\nsocket_mode = '0660'\nlanes = 2\nidle_exit = 30\nlog = 'debug'\n\
             direct = false\n[limits]\nclients = 1\nqps = 2\ncqs = 3\nmrs = 4\nmemory = '64GiB'\n\
             pds = 5\nchannels = 6\nqueues = '7KiB'\ncm_ids = 8\nmulticast = 9",
        )
        .unwrap();
        assert_eq!(config.socket.as_deref(), Some(Path::new("/run/x.sock")));
        assert_eq!(config.socket_mode(), 0o660);
        assert_eq!(config.idle_exit(), Some(Duration::from_secs(30)));
        assert!(!config.direct);
        let memory = 64 << 30;
        let limits = Limits {
            clients: 1,
            qps: 2,
            cqs: 3,
            mrs: 4,
            memory,
            pds: 5,
            channels: 6,
            queues: 7 << 10,
            cm_ids: 8,
            multicast: 9,
        };
        assert_eq!(config.limits, limits);
    }

    #[test]
    fn a_nic_is_taken_by_itself_by_name_or_not_at_all() {
        let rnic = |text: &str| parse(text).unwrap().rnic;
        assert_eq!(rnic("").device, Choice::Auto);
        assert_eq!(rnic("[rnic]\ndevice = 'auto'").device, Choice::Auto);
        assert_eq!(rnic("[rnic]\ndevice = 'off'").device, Choice::Off);
        let named = Rnic { device: Choice::Named("mlx5_0".to_owned()), port: Some(2), gid_index: Some(3) };
        assert_eq!(rnic("[rnic]\ndevice = 'mlx5_0'\nport = 2\ngid_index = 3"), named);
    }

    const BLUE: &str = "[[tenant]]\nname = 'blue'\nsocket = '/run/ff/blue/router.sock'\n";
    const RED: &str = "[[tenant]]\nname = 'red'\nsocket = '/run/ff/red/router.sock'\n";

    #[test]
    fn a_tenant_has_defaults_and_quotas_that_it_does_not_name_are_the_routers() {
        let config = parse(&format!("[limits]\nqps = 7\ncqs = 8\n{BLUE}[tenant.limits]\ncqs = 9\n")).unwrap();
        let [blue] = &config.tenants[..] else { panic!("{config:?}") };
        assert_eq!(
            (blue.name.as_str(), blue.mode, blue.weight, blue.socket_mode),
            ("blue", Mode::Direct, 1, 0o666)
        );
        let limits = blue.limits.over(&config.limits);
        assert_eq!((limits.qps, limits.cqs, limits.mrs), (7, 9, Limits::default().mrs));
        assert_eq!((config.socket_mode(), Config::default().socket_mode()), (0o600, 0o666));
    }

    #[test]
    fn every_word_of_a_tenant_is_understood() {
        let config = parse(&format!(
            "{BLUE}socket_mode = '0660'\nsocket_owner = {{ uid = 1, gid = 2 }}\nprefixes = ['10.1.0.0/16']\n\
             mode = 'isolated'\nweight = 4\n[tenant.total]\nmemory = '1GiB'\nclients = 3\n\
             {RED}prefixes = ['10.2.0.0/16', 'fd00::/8']"
        ))
        .unwrap();
        let [blue, red] = &config.tenants[..] else { panic!("{config:?}") };
        assert_eq!((blue.socket_mode, blue.mode, blue.weight), (0o660, Mode::Isolated, 4));
        assert_eq!(blue.socket_owner, Some(Owner { uid: 1, gid: 2 }));
        assert_eq!((blue.total.memory, blue.total.clients, blue.total.qps), (Some(1 << 30), Some(3), None));
        assert_eq!(
            red.prefixes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.2.0.0/16", "fd00::/8"]
        );
    }

    #[test]
    fn tenants_that_cannot_be_are_refused_with_their_names() {
        for (text, words) in [
            (format!("{BLUE}prefix = []"), &["unknown field", "prefix"][..]),
            (format!("{BLUE}prefixes = ['10.1.2.3/16']"), &["10.1.2.3/16", "10.1.0.0/16"]),
            (format!("{BLUE}prefixes = ['10.1.0.0']"), &["10.1.0.0", "no prefix"]),
            (format!("{BLUE}mode = 'both'"), &["both", "isolated"]),
            (format!("{BLUE}weight = 0"), &["blue", "weight = 0"]),
            (format!("{BLUE}{RED}prefixes = ['10.0.0.0/8']"), &["blue", "no prefixes"]),
            (format!("{BLUE}prefixes = ['::/0']\n{BLUE}prefixes = ['::/0']"), &["two tenants", "blue"]),
            (format!("{BLUE}[tenant.limits]\nqps = 0"), &["blue", "limits.qps = 0"]),
            (format!("{BLUE}[tenant.limits]\nqpz = 1"), &["qpz"]),
            (format!("socket = '/run/ff/blue/router.sock'\n{BLUE}"), &["blue", "the router's own"]),
            ("[[tenant]]\nname = 'blue'".to_owned(), &["socket"]),
            ("[[tenant]]\nname = 'b lue'\nsocket = '/x'".to_owned(), &["b lue", "spaces"]),
            ("[[tenant]]\nname = 'blue'\nsocket = 'x'".to_owned(), &["blue", "absolute"]),
        ] {
            let message = parse(&text).unwrap_err();
            assert!(words.iter().all(|word| message.contains(word)), "{text}: {message}");
        }
    }

    #[test]
    fn a_word_that_is_not_known_is_refused_with_its_line() {
        let message = parse("lanes = 1\n[limits]\nqpz = 5\n").unwrap_err();
        assert!(message.contains("qpz") && message.contains("line 3"), "{message}");
        assert!(message.contains("router.toml"), "{message}");
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (text, word) in [
            ("lanes = 0", "lanes = 0"),
            ("socket = 'router.sock'", "absolute"),
            ("socket_mode = '0999'", "file mode"),
            ("limits.memory = '5 apples'", "5 apples"),
            ("limits.memory = '99999999999TiB'", "not a size"),
            ("limits.memory = true", "not a size"),
            ("limits.qps = 0", "limits.qps"),
            ("rnic.device = 'ff0'", "no real device"),
            ("rnic.device = ''", "no real device"),
            ("rnic.port = 0", "rnic.port = 0"),
            ("rnic.gid = 1", "gid"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(word), "{text}: {message}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = Config::load(Path::new("/nonexistent/router.toml")).unwrap_err().to_string();
        assert!(message.contains("/nonexistent/router.toml"), "{message}");
    }
}
