//! The names that cross between a client, its router and a peer: QP numbers, packet sequence numbers, GIDs.
//!
//! Who gets which is decided elsewhere; here a name can only not be a wrong one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The largest number of 24 bits: QP numbers and PSNs have no more.
pub const MAX_24: u32 = 0x00ff_ffff;

/// A number that does not fit 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{value:#x} does not fit the 24 bits of a {kind}")]
pub struct TooLarge {
    /// What it should have been.
    pub kind: &'static str,
    /// What it was.
    pub value: u32,
}

/// A QP number: 24 bits, unique on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Qpn(u32);

impl Qpn {
    /// The QP number that a datagram to a multicast group is sent to.
    pub const MULTICAST: Self = Self(MAX_24);

    /// The number.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Qpn {
    type Error = TooLarge;

    #[inline]
    fn try_from(value: u32) -> Result<Self, TooLarge> {
        if value <= MAX_24 { Ok(Self(value)) } else { Err(TooLarge { kind: "QP number", value }) }
    }
}

impl From<Qpn> for u32 {
    #[inline]
    fn from(qpn: Qpn) -> u32 {
        qpn.0
    }
}

impl fmt::Display for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

/// A packet sequence number: 24 bits, counted in a circle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub struct Psn(u32);

impl Psn {
    /// The number.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// The PSN `count` packets later.
    #[must_use]
    pub const fn advance(self, count: u32) -> Self {
        Self(self.0.wrapping_add(count) & MAX_24)
    }

    /// How many packets this one is after `earlier`; negative if it is before it. Half the circle counts as before.
    #[must_use]
    pub const fn since(self, earlier: Self) -> i32 {
        // The shift moves the sign bit of the 24-bit difference to where a 32-bit number has it.
        ((self.0.wrapping_sub(earlier.0) << 8) as i32) >> 8
    }
}

impl From<u32> for Psn {
    /// Takes the low 24 bits, as Linux does with the PSN an application asks for.
    #[inline]
    fn from(value: u32) -> Self {
        Self(value & MAX_24)
    }
}

impl From<Psn> for u32 {
    #[inline]
    fn from(psn: Psn) -> u32 {
        psn.0
    }
}

/// The address of a port: an IPv6 address, or an IPv4 address mapped into one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The GID that stands for none.
    pub const UNSPECIFIED: Self = Self([0; 16]);

    /// The IP address that this GID is.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        Ipv6Addr::from(self.0).to_canonical()
    }

    /// Whether it names nothing.
    #[must_use]
    pub fn is_unspecified(self) -> bool {
        self == Self::UNSPECIFIED
    }

    /// Whether it names a multicast group.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] == 0xff || matches!(self.ip(), IpAddr::V4(ip) if ip.is_multicast())
    }
}

impl From<Ipv4Addr> for Gid {
    fn from(ip: Ipv4Addr) -> Self {
        Self(ip.to_ipv6_mapped().octets())
    }
}

impl From<Ipv6Addr> for Gid {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<IpAddr> for Gid {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl fmt::Display for Gid {
    /// The IP address: that is what a user knows it by.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.ip(), f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qp_number_has_24_bits() {
        assert_eq!(Qpn::try_from(0x00ff_ffff), Ok(Qpn::MULTICAST));
        let error = Qpn::try_from(0x0100_0000).unwrap_err();
        assert_eq!(error.to_string(), "0x1000000 does not fit the 24 bits of a QP number");
        let sent = postcard::to_allocvec(&0x0100_0000_u32).unwrap();
        assert!(postcard::from_bytes::<Qpn>(&sent).is_err());
    }

    #[test]
    fn psns_count_in_a_circle() {
        let last = Psn::from(MAX_24);
        assert_eq!(last.advance(1), Psn::from(0));
        assert_eq!(last.advance(3).since(last), 3);
        assert_eq!(last.since(last.advance(3)), -3);
        assert_eq!(Psn::from(0x0100_0005).value(), 5);
    }

    #[test]
    fn a_gid_is_an_ip_address() {
        let v4 = Gid::from(Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(v4.0[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        assert_eq!(v4.to_string(), "10.1.2.3");
        let v6: Ipv6Addr = "fd00::7".parse().unwrap();
        assert_eq!(Gid::from(IpAddr::V6(v6)).ip(), IpAddr::V6(v6));
    }

    #[test]
    fn multicast_gids_of_both_families_are_told() {
        assert!(Gid::from(Ipv4Addr::new(239, 0, 0, 1)).is_multicast());
        assert!(Gid::from("ff02::1".parse::<Ipv6Addr>().unwrap()).is_multicast());
        assert!(!Gid::from(Ipv4Addr::new(10, 0, 0, 1)).is_multicast());
        assert!(!Gid::UNSPECIFIED.is_multicast());
    }
}
