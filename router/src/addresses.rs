//! The addresses of a client's network namespace, which are its GIDs.
//!
//! Read from `/proc/PID/net`: whoever may see the process may read them, no entering of namespaces is needed.

use std::{
    fs::File,
    io::Read,
    net::{Ipv4Addr, Ipv6Addr},
};

use verbs_abi::proto::Gid;

/// GIDs that a port has at most.
pub(crate) const MAX_GIDS: usize = 16;

/// Flag of an IPv6 address that another host has already.
const DUPLICATE: u32 = 0x08;

/// How much of a table is read: whoever owns a namespace can make its tables as long as memory lasts.
const MAX_TABLE: u64 = 2 << 20;

/// The GIDs of the process `pid`. Never empty: index 0 is always valid, if only by loopback.
pub(crate) fn of(pid: u32) -> Vec<Gid> {
    let read = |name: &str| {
        let mut text = String::new();
        if let Ok(table) = File::open(format!("/proc/{pid}/net/{name}")) {
            let _ = table.take(MAX_TABLE).read_to_string(&mut text);
        }
        text
    };
    let (v4, v6) = if pid == 0 { <_>::default() } else { (read("fib_trie"), read("if_inet6")) };
    gids(&ipv4(&v4), &ipv6(&v6))
}

/// IPv4 first, then global IPv6, then link-local; loopback only where there is nothing else.
fn gids(v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> Vec<Gid> {
    let hosts = v4.iter().filter(|address| !address.is_loopback()).map(|address| address.to_ipv6_mapped());
    let scoped = |link: bool| {
        let usable = v6.iter().filter(|address| !address.is_loopback());
        usable.filter(move |address| address.is_unicast_link_local() == link).copied()
    };
    let mut found: Vec<Ipv6Addr> = hosts.chain(scoped(false)).chain(scoped(true)).collect();
    if found.is_empty() {
        found.push(Ipv4Addr::LOCALHOST.to_ipv6_mapped());
        found.extend(v6.iter().filter(|address| address.is_loopback()));
    }
    found.truncate(MAX_GIDS);
    found.iter().map(Ipv6Addr::octets).collect()
}

/// The addresses in a `fib_trie`: each leaf that is a local host route. Every one is listed twice.
fn ipv4(trie: &str) -> Vec<Ipv4Addr> {
    let mut found = Vec::new();
    let mut leaf = None;
    for line in trie.lines().map(str::trim_start) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.trim_end().parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf.filter(|address| !found.contains(address)));
        }
    }
    found
}

/// The addresses in an `if_inet6`: `address index prefix scope flags name`.
fn ipv6(table: &str) -> Vec<Ipv6Addr> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        (flags & DUPLICATE == 0).then(|| Ipv6Addr::from(address))
    };
    let mut found: Vec<_> = table.lines().filter_map(line).collect();
    // Bridges and tunnels may share a link-local address.
    found.sort();
    found.dedup();
    found
}

/// Whether an address means something on one link or one host only.
pub(crate) fn is_local(gid: &Gid) -> bool {
    let address = Ipv6Addr::from(*gid);
    match address.to_ipv4_mapped() {
        Some(address) => address.is_loopback() || address.is_link_local(),
        None => address.is_loopback() || address.is_unicast_link_local(),
    }
}

/// What stands in where a client has no address.
pub(crate) fn loopback() -> Vec<Gid> {
    gids(&[], &[])
}

/// A GID as people write it.
pub(crate) fn text(gid: &Gid) -> String {
    Ipv6Addr::from(*gid).to_canonical().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRIE: &str = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.88.0.0/16 2 0 2
        +-- 10.88.0.0/28 2 0 2
           |-- 10.88.0.0
              /16 link UNICAST
           |-- 10.88.0.7
              /32 host LOCAL
        |-- 10.88.255.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
Local:
  +-- 0.0.0.0/0 3 0 5
        |-- 10.88.0.7
           /32 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
";
    const INET6: &str = "\
fe80000000000000a8bbccfffe000001 02 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
20010db8000000000000000000000007 02 40 00 80     eth0
20010db8000000000000000000000008 02 40 00 88     eth0
";

    fn texts(gids: &[Gid]) -> Vec<String> {
        gids.iter().map(text).collect()
    }

    #[test]
    fn addresses_come_in_their_order_once_each_without_duplicates_of_other_hosts() {
        let found = gids(&ipv4(TRIE), &ipv6(INET6));
        assert_eq!(texts(&found), ["10.88.0.7", "2001:db8::7", "fe80::a8bb:ccff:fe00:1"]);
        assert_eq!(found[0][..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    }

    #[test]
    fn loopback_stands_in_where_there_is_nothing_else() {
        let lo4 = ["127.0.0.1".parse().unwrap()];
        let lo6 = ["::1".parse().unwrap()];
        assert_eq!(texts(&gids(&lo4, &lo6)), ["127.0.0.1", "::1"]);
        assert_eq!(texts(&gids(&[], &[])), ["127.0.0.1"]);
    }

    #[test]
    fn the_table_never_grows_beyond_its_length() {
        let many: Vec<_> = (0..100).map(|i| Ipv4Addr::new(10, 0, 0, i)).collect();
        assert_eq!(gids(&many, &[]).len(), MAX_GIDS);
    }

    #[test]
    fn nonsense_is_no_address() {
        assert!(ipv4("|-- 300.1.1.1\n /32 host LOCAL\n/32 host LOCAL").is_empty());
        assert!(ipv6("xyz\n\n0 1\n").is_empty());
    }

    #[test]
    fn this_process_has_a_gid() {
        assert!(!of(std::process::id()).is_empty());
        assert!(!of(0).is_empty());
    }
}
