//! An address prefix: which addresses a tenant's clients may have.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, de};

/// Bits of an IPv4-mapped address before the IPv4 address.
const MAPPED: u8 = 96;

/// A prefix as GIDs have it: IPv4 as IPv4-mapped IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    first: u128,
    /// From 0 to 128.
    bits: u8,
}

/// Why a text is no prefix.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PrefixError {
    /// It does not look like one.
    #[error("{0:?} is no prefix; write one as \"10.1.0.0/16\" or \"fd00:1::/32\"")]
    Form(String),
    /// There is something behind the prefix.
    #[error("{text:?} has bits beyond its length; write {right}")]
    Beyond {
        /// What was written.
        text: String,
        /// What was probably meant.
        right: Prefix,
    },
}

impl Prefix {
    /// Whether an address, as a GID, lies inside.
    #[must_use]
    pub fn contains(&self, gid: &[u8; 16]) -> bool {
        u128::from_be_bytes(*gid) & mask(self.bits) == self.first
    }

    /// How many bits all addresses inside have in common, IPv4 as IPv4-mapped.
    #[must_use]
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether all addresses of the other lie inside.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.bits <= other.bits && other.first & mask(self.bits) == self.first
    }

    /// Whether it holds addresses that other hosts can reach, as far as its first and its last one tell.
    pub(super) fn is_for_hosts(&self) -> bool {
        let ends = [self.first, self.first | !mask(self.bits)];
        // What is as wide as a family holds such addresses, whatever its ends are.
        let is_wide = self.bits < 8 || self.first == 0xffff << 32 && self.bits == MAPPED;
        ends.iter().any(|end| super::is_for_hosts(Ipv6Addr::from(*end).into())) || is_wide
    }
}

fn mask(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let parse = || {
            let (address, bits) = text.split_once('/')?;
            let bits: u8 = bits.parse().ok()?;
            let (address, bits) = match address.parse().ok()? {
                IpAddr::V4(address) if bits <= 32 => (address.to_ipv6_mapped(), bits + MAPPED),
                IpAddr::V6(address) if bits <= 128 => (address, bits),
                _ => return None,
            };
            Some((u128::from(address), bits))
        };
        let (address, bits) = parse().ok_or_else(|| PrefixError::Form(text.to_owned()))?;
        let prefix = Self { first: address & mask(bits), bits };
        match prefix.first == address {
            true => Ok(prefix),
            false => Err(PrefixError::Beyond { text: text.to_owned(), right: prefix }),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.first);
        match address.to_ipv4_mapped().filter(|_| self.bits >= MAPPED) {
            Some(address) => write!(formatter, "{address}/{}", self.bits - MAPPED),
            None => write!(formatter, "{address}/{}", self.bits),
        }
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    fn gid(text: &str) -> [u8; 16] {
        match text.parse().unwrap() {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        }
    }

    #[test]
    fn an_address_is_inside_or_not_to_the_bit() {
        for (text, inside, outside) in [
            ("10.1.0.0/16", "10.1.255.255", "10.2.0.0"),
            ("10.1.0.0/17", "10.1.127.255", "10.1.128.0"),
            ("10.1.2.3/32", "10.1.2.3", "10.1.2.2"),
            ("0.0.0.0/0", "255.1.2.3", "fd00::1"),
            ("::/0", "10.0.0.1", ""),
            ("fd00::/8", "fdff::1", "fe00::"),
            ("fd00::1/128", "fd00::1", "fd00::2"),
        ] {
            assert!(prefix(text).contains(&gid(inside)), "{inside} in {text}");
            assert!(outside.is_empty() || !prefix(text).contains(&gid(outside)), "{outside} in {text}");
            assert_eq!(prefix(text).to_string(), text);
        }
    }

    #[test]
    fn a_prefix_covers_what_lies_inside_it_alone() {
        for (a, b, covers) in [
            ("10.0.0.0/8", "10.1.0.0/16", true),
            ("10.1.0.0/16", "10.1.0.0/16", true),
            ("10.1.0.0/16", "10.0.0.0/8", false),
            ("10.1.0.0/16", "10.2.0.0/24", false),
            ("::/0", "10.1.0.0/16", true),
        ] {
            assert_eq!(prefix(a).covers(&prefix(b)), covers, "{a} {b}");
        }
    }

    #[test]
    fn what_is_no_prefix_is_refused_and_a_near_miss_is_corrected() {
        for text in ["", "10.0.0.0", "10.0.0.0/33", "fd00::/129", "10.0.0/8", "blue/8", "10.0.0.0/-1"] {
            assert_eq!(text.parse::<Prefix>(), Err(PrefixError::Form(text.to_owned())));
        }
        let error = "10.1.2.3/16".parse::<Prefix>().unwrap_err().to_string();
        assert!(error.contains("write 10.1.0.0/16"), "{error}");
    }
}
