//! Where a client lives: its tenant, its network namespace, the addresses of that.

use std::net::IpAddr;

use verbs_abi::{ids, proto::Gid};

/// Where a client lives. The router knows it from the kernel, never from the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The tenant.
    pub tenant: u32,
    /// The network namespace: clients with the same number share ports and loopback addresses.
    pub namespace: u64,
    /// The device's GID table, which is the namespace's addresses. Never empty.
    pub gids: Vec<Gid>,
}

impl Place {
    /// Whether an address belongs to the namespace. Every one has its own loopback addresses.
    pub(crate) fn owns(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.index(ip).is_some()
    }

    fn index(&self, ip: IpAddr) -> Option<usize> {
        let gid = ids::Gid::from(ip).0;
        self.gids.iter().position(|own| *own == gid)
    }

    /// The index of the GID that an own address has. A loopback address that the device does not have stands for
    /// the first one that it has.
    pub(crate) fn gid_index(&self, ip: IpAddr) -> u8 {
        self.index(ip).and_then(|index| u8::try_from(index).ok()).unwrap_or(0)
    }

    /// The GID of an address, own or another's.
    pub(crate) fn gid(&self, ip: IpAddr) -> Gid {
        let stands_in = ip.is_loopback() && self.index(ip).is_none();
        if stands_in { self.gids.first().copied().unwrap_or_default() } else { ids::Gid::from(ip).0 }
    }

    /// The own address from which to reach another: that address itself if it is own, else the one of its family
    /// with the longest common prefix, among those that are better if there are such.
    pub(crate) fn source_for(
        &self,
        destination: IpAddr,
        is_better: impl Fn(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        if self.owns(destination) {
            return Some(destination);
        }
        let wanted = bits(destination);
        let own = self.gids.iter().map(|gid| ids::Gid(*gid).ip());
        let candidates = own.filter(|ip| ip.is_ipv4() == destination.is_ipv4() && !ip.is_loopback());
        // The first of equals: the table's order is an order of preference.
        candidates.rev().max_by_key(|ip| (is_better(*ip), (bits(*ip) ^ wanted).leading_zeros()))
    }
}

fn bits(ip: IpAddr) -> u128 {
    u128::from_be_bytes(ids::Gid::from(ip).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(addresses: &[&str]) -> Place {
        let gids = addresses.iter().map(|ip| ids::Gid::from(ip.parse::<IpAddr>().unwrap()).0).collect();
        Place { tenant: 0, namespace: 1, gids }
    }

    #[test]
    fn the_source_is_of_the_same_family_and_the_nearest() {
        let place = place(&["10.0.0.5", "192.168.7.5", "fd00::5", "fe80::1"]);
        let source = |to: &str| place.source_for(to.parse().unwrap(), |_| false).map(|ip| ip.to_string());
        assert_eq!(source("192.168.7.9").as_deref(), Some("192.168.7.5"));
        assert_eq!(source("10.200.0.1").as_deref(), Some("10.0.0.5"));
        assert_eq!(source("fe80::2").as_deref(), Some("fe80::1"));
        assert_eq!(source("fd00::9").as_deref(), Some("fd00::5"));
        assert_eq!(source("127.0.0.1").as_deref(), Some("127.0.0.1"));
        assert_eq!(self::place(&["fd00::5"]).source_for("10.0.0.1".parse().unwrap(), |_| false), None);
    }

    #[test]
    fn an_address_by_which_others_reach_it_goes_before_a_nearer_one() {
        let place = place(&["10.0.0.5", "192.168.7.5", "fd00::5"]);
        let better = |ip: IpAddr| ip == IpAddr::from([192, 168, 7, 5]);
        let source = |to: &str| place.source_for(to.parse().unwrap(), better).map(|ip| ip.to_string());
        assert_eq!(source("10.200.0.1").as_deref(), Some("192.168.7.5"));
        assert_eq!(source("fd00::9").as_deref(), Some("fd00::5"));
    }

    #[test]
    fn loopback_stands_for_the_first_address_unless_the_device_has_it() {
        let loopback = "127.0.0.1".parse().unwrap();
        let with = place(&["10.0.0.5"]);
        assert_eq!((with.gid_index(loopback), with.gid(loopback)), (0, with.gids[0]));
        let alone = place(&["127.0.0.1", "::1"]);
        assert_eq!(alone.gid("::1".parse().unwrap()), alone.gids[1]);
        assert_eq!(alone.gid_index("::1".parse().unwrap()), 1);
    }
}
