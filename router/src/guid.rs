//! The node GUID of this router's device: the same each time on one host, another on each host.

use std::fs;

use rustix::{
    process::geteuid,
    rand::{GetRandomFlags, getrandom},
};

/// The GUID in network order.
pub(crate) fn of_this_host() -> [u8; 8] {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let id = id.trim();
    let hash = if id.is_empty() {
        random()
    } else {
        hash(format!("freeflow {id} {}", geteuid().as_raw()).as_bytes())
    };
    local(hash.to_be_bytes())
}

/// Marks a number as made locally and of one device, as EUI-64 has it.
fn local(mut guid: [u8; 8]) -> [u8; 8] {
    guid[0] = guid[0] & !1 | 2;
    guid
}

/// FNV-1a: no secret, just the same number each time.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without random numbers all such hosts share a GUID, which nothing here relies on.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_local_and_stays() {
        assert_eq!(of_this_host()[0] & 3, 2);
        assert_ne!(hash(b"one host"), hash(b"other host"));
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
    }
}
