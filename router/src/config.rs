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

/// How the daemon runs. `Config::default()` is what runs without a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Control socket; where absent, the command line chooses (`/run/freeflow/router.sock` for root).
    pub socket: Option<PathBuf>,
    /// Permission bits of the control socket, written as an octal string: `"0666"`.
    #[serde(deserialize_with = "octal")]
    pub socket_mode: u32,
    /// Data-path threads; where absent, as many as suit the CPUs of this host.
    pub lanes: Option<usize>,
    /// Seconds without any client after which the daemon ends; where absent, never.
    pub idle_exit: Option<u64>,
    /// What to log, as `FREEFLOW_LOG` says it: `error`, `warn`, `info`, `debug`, `trace`, or `target=level` lists.
    pub log: Option<String>,
    /// Whether clients of one tenant may execute their own work requests (direct mode).
    pub direct: bool,
    /// Quotas of one client.
    pub limits: Limits,
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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: None,
            socket_mode: 0o666,
            lanes: None,
            idle_exit: None,
            log: None,
            direct: true,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 4096, qps: 16_384, cqs: 16_384, mrs: 65_536, memory: 1 << 40 }
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
        let limits = [
            ("clients", u64::from(self.limits.clients)),
            ("qps", u64::from(self.limits.qps)),
            ("cqs", u64::from(self.limits.cqs)),
            ("mrs", u64::from(self.limits.mrs)),
            ("memory", self.limits.memory),
        ];
        let zero = limits.iter().find(|(_, value)| *value == 0);
        zero.map(|(name, _)| format!("limits.{name} = 0 would serve nobody; write at least 1"))
    }

    /// How long the daemon stays without clients.
    pub fn idle_exit(&self) -> Option<Duration> {
        self.idle_exit.map(Duration::from_secs)
    }
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
             direct = false\n[limits]\nclients = 1\nqps = 2\ncqs = 3\nmrs = 4\nmemory = '64GiB'",
        )
        .unwrap();
        assert_eq!(config.socket.as_deref(), Some(Path::new("/run/x.sock")));
        assert_eq!(config.socket_mode, 0o660);
        assert_eq!(config.idle_exit(), Some(Duration::from_secs(30)));
        assert!(!config.direct);
        assert_eq!(config.limits, Limits { clients: 1, qps: 2, cqs: 3, mrs: 4, memory: 64 << 30 });
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
