//! Which device, port and GID the router uses, and why; or why none.

use std::{fs, io, path::Path, sync::Arc};

use engine::nic::{Limits, Port};
use verbs_abi::ffi::{IBV_LINK_LAYER_ETHERNET, IBV_PORT_ACTIVE};

use super::verbs::{Context, devices};
use crate::config::{Choice, Rnic as Config};

/// Entries of a GID table that are looked at.
const GIDS: u8 = 255;
/// SGEs that a shadow QP has at the most: longer work requests cost memory for every one.
const SGES: u32 = 16;
/// Our own device: whoever offers it, it is no NIC.
const VIRTUAL: &str = "ff0";

/// A device that is used.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(super) context: Arc<Context>,
    pub(super) limits: Limits,
    pub(super) cqe: u32,
    pub(crate) found: Found,
}

/// What is used, for people and for other routers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The device.
    pub(crate) name: String,
    /// The number of its port.
    pub(crate) port: u8,
    /// The index of its GID.
    pub(crate) gid_index: u8,
    /// The GID.
    pub(crate) gid: [u8; 16],
    /// Whether it is RoCE.
    pub(crate) is_ethernet: bool,
    /// Why this one.
    pub(crate) why: String,
}

impl Device {
    /// Looks for the device that the configuration wants.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn find(config: &Config) -> Result<Self, String> {
        let wanted = match &config.device {
            Choice::Off => return Err("[rnic] device = \"off\"".to_owned()),
            Choice::Auto => None,
            Choice::Named(name) => Some(name.as_str()),
        };
        let mut reasons = Vec::new();
        let found = devices(|name, open| {
            if name == VIRTUAL || wanted.is_some_and(|wanted| wanted != name) {
                return None;
            }
            match open()
                .map_err(|error| format!("cannot be opened: {error}"))
                .and_then(|context| Self::examine(name, context, config, wanted.is_some()))
            {
                Ok(device) => Some(device),
                Err(why) => {
                    reasons.push(format!("{name} {why}"));
                    None
                }
            }
        })?;
        found.ok_or_else(|| match (wanted, reasons.is_empty()) {
            (_, false) => reasons.join("; "),
            (Some(wanted), true) => format!("there is no device {wanted}"),
            (None, true) => "the kernel has no RDMA device".to_owned(),
        })
    }

    fn examine(name: &str, context: Context, config: &Config, is_named: bool) -> Result<Self, String> {
        let failed =
            |what: &'static str| move |error: io::Error| format!("does not tell its {what}: {error}");
        if !context.is_infiniband() {
            return Err("is iWARP, whose connections routers cannot make".to_owned());
        }
        let attr = context.attributes().map_err(failed("attributes"))?;
        let ports = match config.port {
            Some(port) => port..=port,
            None => 1..=attr.phys_port_cnt.max(1),
        };
        let mut why_not = String::from("has no ports");
        for port in ports {
            let state = context.port(port).map_err(failed("port"))?;
            if state.state != IBV_PORT_ACTIVE {
                why_not = format!("port {port} is not active");
                continue;
            }
            let is_ethernet = u32::from(state.link_layer) == IBV_LINK_LAYER_ETHERNET;
            let Some((gid_index, gid, kind)) =
                choose_gid(name, &context, port, is_ethernet, config.gid_index)
            else {
                why_not = match config.gid_index {
                    Some(index) => format!("port {port} has no GID {index}"),
                    None => format!("port {port} has no GID for RoCE v2; give its interface an address"),
                };
                continue;
            };
            let byte = |count: i32| u8::try_from(count.clamp(1, 255)).unwrap_or(u8::MAX);
            let limits = Limits {
                port: Port {
                    gid,
                    lid: state.lid,
                    mtu: state.active_mtu as u8,
                    dest_rd_atomic: byte(attr.max_qp_rd_atom),
                },
                wr: attr.max_qp_wr.max(1) as u32,
                sge: (attr.max_sge.max(1) as u32).min(SGES),
                rd_atomic: byte(attr.max_qp_init_rd_atom),
            };
            let chosen = if is_named { "named in the configuration" } else { "first with an active port" };
            let why = format!("{chosen}; GID {kind}");
            let found = Found { name: name.to_owned(), port, gid_index, gid, is_ethernet, why };
            let cqe = attr.max_cqe.max(1) as u32;
            return Ok(Self { context: Arc::new(context), limits, cqe, found });
        }
        Err(why_not)
    }

    /// Whether the device is still there.
    pub(super) fn is_there(&self) -> bool {
        Path::new("/sys/class/infiniband_verbs").join(self.context.node()).exists()
    }

    /// Whether its port works.
    pub(super) fn works(&self) -> bool {
        self.context.port(self.found.port).is_ok_and(|port| port.state == IBV_PORT_ACTIVE)
    }
}

/// The GID to use: its index, itself, and what sort it is.
fn choose_gid(
    name: &str,
    context: &Context,
    port: u8,
    is_ethernet: bool,
    wanted: Option<u8>,
) -> Option<(u8, [u8; 16], &'static str)> {
    let gid = |index| context.gid(port, index).ok().filter(|gid| *gid != [0; 16]);
    if let Some(index) = wanted {
        return Some((index, gid(index)?, "named in the configuration"));
    }
    if !is_ethernet {
        return Some((0, gid(0)?, "0 of InfiniBand"));
    }
    let table = format!("/sys/class/infiniband/{name}/ports/{port}/gid_attrs/types");
    let is_v2 = |index: &u8| {
        fs::read_to_string(format!("{table}/{index}")).is_ok_and(|kind| kind.trim() == "RoCE v2")
    };
    let of_v2 = (0..GIDS).filter(is_v2).filter_map(|index| Some((index, gid(index)?)));
    of_v2.map(|(index, gid)| (index, gid, sort(&gid))).min_by_key(|(_, gid, _)| rank(gid))
}

/// Routable addresses first, and IPv4 before IPv6: that is what switches are set up for.
fn rank(gid: &[u8; 16]) -> u8 {
    match gid {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..] => 0,
        [0xfe, second, ..] if second & 0xc0 == 0x80 => 2,
        _ => 1,
    }
}

fn sort(gid: &[u8; 16]) -> &'static str {
    ["of RoCE v2, IPv4", "of RoCE v2, IPv6", "of RoCE v2, link-local"][usize::from(rank(gid))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_routable_address_comes_before_one_of_the_cable() {
        let gid = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let mut gids = ["fe80::1", "fd09::1", "::ffff:10.9.0.1"].map(gid);
        gids.sort_by_key(rank);
        assert_eq!(gids, ["::ffff:10.9.0.1", "fd09::1", "fe80::1"].map(gid));
        assert_eq!(sort(&gids[2]), "of RoCE v2, link-local");
    }
}
