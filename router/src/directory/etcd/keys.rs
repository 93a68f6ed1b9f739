//! The directory's keys and values in etcd. All that is read here was written by others.
//!
//! ```text
//!   /freeflow/routers/host-a                    {"address":"10.0.0.1:7471"}
//!   /freeflow/addresses/blue/10.244.1.7         {"router":"host-a"}
//! ```
//!
//! An address stands in its canonical form, so that it has one key; of a tenant's name, what is not a letter, a digit or one of
//! `-._` as `%` and two hexadecimal digits. What a value holds beyond this is passed over.

use std::{
    fmt::Write,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use super::super::view::{Change, Key};
use crate::{
    addresses,
    config::{Security, is_for_hosts, is_name, may_listen},
};

/// A value of any router is much shorter.
const LONGEST_VALUE: usize = 4096;

#[derive(Debug, Deserialize, Serialize)]
struct RouterValue {
    address: SocketAddr,
}

#[derive(Debug, Deserialize, Serialize)]
struct AddressValue {
    router: String,
}

/// How keys are made and read.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) prefix: String,
    pub(super) security: Security,
    /// This router's tenants, by number, as they stand in keys.
    tenants: Vec<String>,
}

impl Keys {
    /// Those of a router with these tenants, by number.
    pub(super) fn new(prefix: &str, security: Security, tenants: &[String]) -> Self {
        let tenants = tenants.iter().map(|name| escape(name)).collect();
        Self { prefix: prefix.to_owned(), security, tenants }
    }

    pub(super) fn router(&self, name: &str) -> String {
        format!("{}routers/{name}", self.prefix)
    }

    pub(super) fn address(&self, (tenant, gid): &Key) -> String {
        let tenant = self.tenants.get(*tenant as usize).map_or("", |name| name);
        format!("{}addresses/{tenant}/{}", self.prefix, addresses::text(gid))
    }

    /// What a key and its value say; without a value, that nobody says it any more. `None`: nothing that concerns this router.
    pub(super) fn read(&self, key: &[u8], value: Option<&[u8]>) -> Option<Change> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?;
        let value = value.filter(|value| value.len() <= LONGEST_VALUE);
        if let Some(name) = rest.strip_prefix("routers/") {
            let name = Some(name).filter(|name| is_name(name))?.to_owned();
            return Some(match value.and_then(|value| self.router_value(value)) {
                Some(address) => Change::Router(name, address),
                None => Change::NoRouter(name),
            });
        }
        let (tenant, address) = rest.strip_prefix("addresses/")?.split_once('/')?;
        let (_, tenant) = self.tenants.iter().zip(0..).find(|(name, _)| *name == tenant)?;
        let key = (tenant, gid(address)?);
        Some(match value.and_then(address_value) {
            Some(router) => Change::Address(key, router),
            None => Change::NoAddress(key),
        })
    }

    /// Where a router says that it listens, if it may listen there.
    pub(super) fn router_value(&self, value: &[u8]) -> Option<SocketAddr> {
        let value: RouterValue = serde_json::from_slice(value).ok()?;
        let address = value.address;
        // Loopback serves routers of one host, in a test say; a group or no address serves nobody.
        let is_somewhere = is_for_hosts(address.ip()) || address.ip().is_loopback();
        (is_somewhere && address.port() != 0 && may_listen(address, self.security)).then_some(address)
    }
}

/// The router that a value names.
pub(super) fn address_value(value: &[u8]) -> Option<String> {
    let value: AddressValue = serde_json::from_slice(value).ok()?;
    is_name(&value.router).then_some(value.router)
}

pub(super) fn of_router(address: SocketAddr) -> String {
    serde_json::to_string(&RouterValue { address }).unwrap_or_default()
}

pub(super) fn of_address(router: &str) -> String {
    serde_json::to_string(&AddressValue { router: router.to_owned() }).unwrap_or_default()
}

/// An address in its canonical form that other hosts can reach.
fn gid(text: &str) -> Option<[u8; 16]> {
    let address: IpAddr = text.parse().ok()?;
    let gid = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    (is_for_hosts(address) && addresses::text(&gid) == text).then_some(gid)
}

fn escape(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        let tenants = ["blue", "r/d"].map(str::to_owned);
        Keys::new("/freeflow/", Security::Plain, &tenants)
    }

    fn gid_of(text: &str) -> [u8; 16] {
        gid(text).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let keys = keys();
        for key in [(0, gid_of("10.1.2.3")), (1, gid_of("fd00::7"))] {
            let text = keys.address(&key);
            let value = of_address("host-a");
            let read = keys.read(text.as_bytes(), Some(value.as_bytes()));
            assert_eq!(read, Some(Change::Address(key, "host-a".to_owned())), "{text}");
            assert_eq!(keys.read(text.as_bytes(), None), Some(Change::NoAddress(key)));
        }
        assert_eq!(keys.address(&(1, gid_of("fd00::7"))), "/freeflow/addresses/r%2Fd/fd00::7");
        let address = "10.0.0.1:7471".parse().unwrap();
        let (text, value) = (keys.router("host-a"), of_router(address));
        let read = keys.read(text.as_bytes(), Some(value.as_bytes()));
        assert_eq!(read, Some(Change::Router("host-a".to_owned(), address)));
    }

    #[test]
    fn fields_that_are_not_known_are_passed_over() {
        let value = br#"{"router":"a","since":[1,{"x":2}]}"#;
        assert_eq!(address_value(value), Some("a".to_owned()));
    }

    #[test]
    fn keys_that_are_none_of_ours_say_nothing() {
        for key in [
            "/other/routers/a",
            "/freeflow/routers/",
            "/freeflow/routers/a b",
            "/freeflow/routers/a/b",
            "/freeflow/addresses/green/10.1.2.3",
            "/freeflow/addresses/blue/",
            "/freeflow/addresses/blue/10.1.2",
            "/freeflow/addresses/blue/10.1.2.3/32",
            // Another form of an address would be another key of it.
            "/freeflow/addresses/blue/::ffff:10.1.2.3",
            "/freeflow/addresses/blue/fd00:0::7",
            "/freeflow/addresses/blue/FD00::7",
            // These belong to each host.
            "/freeflow/addresses/blue/127.0.0.1",
            "/freeflow/addresses/blue/169.254.1.1",
            "/freeflow/addresses/blue/fe80::1",
            "/freeflow/addresses/blue/ff02::1",
            "/freeflow/addresses/blue/0.0.0.0",
        ] {
            assert_eq!(keys().read(key.as_bytes(), Some(br#"{"router":"a"}"#)), None, "{key}");
        }
        assert_eq!(keys().read(b"/freeflow/routers/\xff", Some(b"{}")), None);
    }

    #[test]
    fn a_value_that_makes_no_sense_takes_away_what_stood_there() {
        let long = format!(r#"{{"router":"a","x":"{}"}}"#, "x".repeat(LONGEST_VALUE));
        for value in
            ["", "{}", "[]", "nul", r#"{"router":""}"#, r#"{"router":"a b"}"#, r#"{"router":7}"#, &long]
        {
            let read = keys().read(b"/freeflow/addresses/blue/10.1.2.3", Some(value.as_bytes()));
            assert_eq!(read, Some(Change::NoAddress((0, gid_of("10.1.2.3")))), "{value}");
        }
        for address in ["", "10.0.0.1", "8.8.8.8:7471", "0.0.0.0:7471", "10.0.0.1:0", "224.0.0.1:7471"] {
            let value = format!(r#"{{"address":"{address}"}}"#);
            let read = keys().read(b"/freeflow/routers/a", Some(value.as_bytes()));
            assert_eq!(read, Some(Change::NoRouter("a".to_owned())), "{address}");
        }
    }
}
