//! What `ibv_devinfo -v` says about the device.

use std::{collections::HashMap, net::Ipv6Addr};

use anyhow::{Context, Result, ensure};
use xtask::bed::{Bed, Place};

use super::SHORT;

/// The attributes of the device and of its port, by name.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    attributes: HashMap<String, String>,
    /// The GID table, as addresses.
    pub(crate) gids: Vec<Ipv6Addr>,
    text: String,
}

impl Device {
    /// Asks in a place.
    pub(crate) fn query(bed: &Bed, place: &Place) -> Result<Self> {
        let outcome = bed.run(place, &["ibv_devinfo", "-v", "-d", "ff0"], SHORT)?;
        outcome.success()?;
        Ok(Self::parse(&outcome.stdout))
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.trim().split_once(':'));
        let pairs: Vec<(String, String)> =
            pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        // `GID[  0]:  ::ffff:10.0.0.1, RoCE v2`
        let gids = pairs.iter().filter(|(name, _)| name.starts_with("GID["));
        let gids = gids.filter_map(|(_, value)| value.split(',').next()?.trim().parse().ok()).collect();
        Self { gids, attributes: pairs.into_iter().collect(), text: text.to_owned() }
    }

    /// An attribute that is a word, such as `PORT_ACTIVE (4)`.
    pub(crate) fn word(&self, name: &str) -> Result<&str> {
        let value = self.attributes.get(name).map(String::as_str);
        value.with_context(|| format!("no {name} among the attributes:\n{}", self.text))
    }

    /// An attribute that is a number, decimal or hexadecimal.
    pub(crate) fn number(&self, name: &str) -> Result<u64> {
        let word = self.word(name)?.split_whitespace().next().unwrap_or_default();
        let parsed = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => word.parse(),
        };
        parsed.with_context(|| format!("{name} is {word:?}, no number"))
    }

    /// Fails unless all that a program could rely on makes sense.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, expected) in [
            ("transport", "InfiniBand (0)"),
            ("state", "PORT_ACTIVE (4)"),
            ("link_layer", "Ethernet"),
            ("phys_port_cnt", "1"),
            ("phys_state", "LINK_UP (5)"),
        ] {
            ensure!(self.word(name)? == expected, "{name} is {:?}, not {expected:?}", self.word(name)?);
        }
        for name in [
            "max_qp",
            "max_qp_wr",
            "max_sge",
            "max_cq",
            "max_cqe",
            "max_mr",
            "max_pd",
            "max_qp_rd_atom",
            "max_ah",
            "max_res_rd_atom",
            "max_qp_init_rd_atom",
            "max_pkeys",
            "vendor_id",
            "gid_tbl_len",
            "max_mr_size",
            "page_size_cap",
        ] {
            ensure!(self.number(name)? > 0, "{name} is 0");
        }
        ensure!(!self.word("fw_ver")?.is_empty(), "the firmware has no version");
        for name in ["node_guid", "sys_image_guid"] {
            let guid = self.word(name)?;
            ensure!(guid.bytes().any(|byte| !matches!(byte, b'0' | b':')), "{name} is {guid:?}");
        }
        ensure!(self.number("max_sge")? >= 30, "only {} SGEs", self.number("max_sge")?);
        ensure!(self.number("max_msg_sz")? >= 1 << 30, "messages only to {}", self.number("max_msg_sz")?);
        ensure!(
            self.number("max_mtu")? >= self.number("active_mtu")?,
            "the active MTU is above the greatest"
        );
        ensure!(!self.word("atomic_cap")?.contains("NONE"), "no atomics");
        ensure!(!self.gids.is_empty(), "no GID:\n{}", self.text);
        Ok(())
    }
}
