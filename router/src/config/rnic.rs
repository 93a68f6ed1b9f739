//! `[rnic]` of the configuration: which real NIC carries what goes to other hosts.

use serde::{Deserialize, Deserializer};

/// The NIC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rnic {
    /// `"auto"`, a name, or `"off"`.
    pub device: Choice,
    /// Its port; where absent, the first that is active.
    pub port: Option<u8>,
    /// The index of the GID to use; where absent, one of RoCE v2, or the first of InfiniBand.
    pub gid_index: Option<u8>,
}

/// Which device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first with an active port, if there is any.
    #[default]
    Auto,
    /// None.
    Off,
    /// This one.
    Named(String),
}

impl<'de> Deserialize<'de> for Choice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match String::deserialize(deserializer)?.as_str() {
            "auto" => Self::Auto,
            "off" => Self::Off,
            name => Self::Named(name.to_owned()),
        })
    }
}

impl Rnic {
    /// The first value that cannot be.
    pub(super) fn fault(&self) -> Option<String> {
        if let Choice::Named(name) = &self.device
            && (name.is_empty() || name.len() > 63 || name.contains('/') || name == "ff0")
        {
            return Some(format!(
                "rnic.device = {name:?} is no real device; write \"auto\", \"off\" or a name of `rdma link`"
            ));
        }
        (self.port == Some(0)).then(|| "rnic.port = 0; ports are counted from 1".to_owned())
    }
}
