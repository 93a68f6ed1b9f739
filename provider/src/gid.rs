//! What the port's sysfs files say: GIDs, their types and interfaces, P_Keys, the node's GUID.
//!
//! One install tree serves all containers, so these files are answered in the process, from what the router knows
//! of this network namespace. The table is asked for anew when it is older than [`FRESH`]; a program reads it entry
//! by entry.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use verbs_abi::ids;
use verbs_abi::proto::{Answer, Gid, Request};

use crate::router_link::RouterLink;

/// Entries of the port's GID table; those after the last address are zero.
pub(crate) const TABLE_LEN: usize = 16;
/// How old a table may be.
const FRESH: Duration = Duration::from_millis(100);

/// The GID table as it was last told.
#[derive(Debug, Default)]
pub(crate) struct GidTable(Mutex<Option<(Instant, Vec<Gid>)>>);

impl GidTable {
    /// What the file `file` of the device says; `None` for files that are not answered here.
    pub(crate) fn sysfs(&self, link: &RouterLink, guid: [u8; 8], file: &str) -> Option<String> {
        if is_guid(file) {
            return Some(guid_text(&guid));
        }
        let file = file.strip_prefix("ports/1/")?;
        if let Some(index) = file.strip_prefix("gids/") {
            let gid = self.entry(link, index.parse().ok()?)?;
            return Some(format!("{}\n", colons(&gid)));
        }
        if let Some(index) = file.strip_prefix("gid_attrs/types/") {
            // Said of empty entries, too: a kernel fails there, which some programs take for RoCE v1.
            self.entry(link, index.parse().ok()?)?;
            return Some("RoCE v2\n".to_owned());
        }
        if let Some(index) = file.strip_prefix("gid_attrs/ndevs/") {
            let interface = interface_of(&ids::Gid(self.entry(link, index.parse().ok()?)?))?;
            return Some(format!("{interface}\n"));
        }
        (file == "pkeys/0").then(|| "0xffff\n".to_owned())
    }

    /// An entry of the table and the number of its interface, 0 for an empty entry; `None` beyond the table.
    pub(crate) fn query(&self, link: &RouterLink, index: usize) -> Option<(Gid, u32)> {
        let gid = self.entry(link, index)?;
        Some((gid, interface_of(&ids::Gid(gid)).map_or(0, |name| interface_number(&name))))
    }

    fn entry(&self, link: &RouterLink, index: usize) -> Option<Gid> {
        if index >= TABLE_LEN {
            return None;
        }
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.as_ref().is_none_or(|(told, _)| told.elapsed() >= FRESH)
            && let Ok((Answer::Gids(gids), _)) = link.ask(&Request::Gids, &[])
        {
            *cache = Some((Instant::now(), gids));
        }
        // When the router is dead, the last it said stands.
        let (_, gids) = cache.as_ref()?;
        Some(gids.get(index).copied().unwrap_or_default())
    }
}

/// Whether this file holds the node's GUID.
pub(crate) fn is_guid(file: &str) -> bool {
    file == "node_guid" || file == "sys_image_guid"
}

/// A GUID as sysfs writes it.
pub(crate) fn guid_text(guid: &[u8; 8]) -> String {
    format!("{}\n", colons(guid))
}

/// Hexadecimal digits in groups of four, as sysfs writes GIDs and GUIDs.
fn colons(bytes: &[u8]) -> String {
    let groups =
        bytes.chunks(2).map(|pair| pair.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    groups.collect::<Vec<_>>().join(":")
}

/// The interface that has a GID's address; none for that of an empty entry.
fn interface_of(gid: &ids::Gid) -> Option<String> {
    if gid.is_unspecified() {
        return None;
    }
    Some(interfaces().remove(&gid.ip()).unwrap_or_else(|| "lo".to_owned()))
}

/// The number of an interface; 0 if it is gone.
fn interface_number(name: &str) -> u32 {
    let Ok(name) = CString::new(name) else { return 0 };
    // SAFETY: a C string.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

/// The interface of each address of this network namespace.
fn interfaces() -> HashMap<IpAddr, String> {
    let mut found = HashMap::new();
    let mut list = std::ptr::null_mut();
    // SAFETY: getifaddrs stores a list, which is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return found;
    }
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an element of the list, which is not freed yet.
        let entry = unsafe { &*next };
        // SAFETY: as above; its address is null or complete for its family, its name a C string.
        if let Some(address) = unsafe { address(entry.ifa_addr) } {
            // SAFETY: as above.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found.insert(address, name.to_string_lossy().into_owned());
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list from getifaddrs, once.
    unsafe { libc::freeifaddrs(list) };
    found
}

/// # Safety
/// `address` must be null or a complete socket address.
unsafe fn address(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the caller's promise and the family.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr))))
        }
        libc::AF_INET6 => {
            // SAFETY: the caller's promise and the family.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gids_are_written_as_sysfs_writes_them() {
        let gid = ids::Gid::from(Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(colons(&gid.0), "0000:0000:0000:0000:0000:ffff:0a01:0203");
    }

    #[test]
    fn the_loopback_interface_is_found_by_its_address() {
        let name = interfaces().remove(&IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert_eq!(name.as_deref(), Some("lo"));
    }
}
