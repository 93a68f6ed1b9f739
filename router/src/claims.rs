//! Which addresses are in use, and by whom: the first to claim a live address keeps it.
//!
//! Whoever owns a network namespace can give it any address. So where tenants have prefixes, an address belongs to
//! the namespace whose client showed it first, until the last client there that shows it is gone; many clients of
//! one namespace share it. Leaves to others: which addresses a namespace has (`addresses`), which of them a tenant
//! may have at all (its prefixes).

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use verbs_abi::proto::Gid;

use crate::{addresses, identity::Namespace};

/// Whose an address is: a network namespace, as one tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claimant {
    pub(crate) tenant: u32,
    pub(crate) namespace: Namespace,
}

/// The addresses in use.
#[derive(Debug, Default)]
pub(crate) struct Claims(Mutex<HashMap<Gid, Claim>>);

#[derive(Debug)]
struct Claim {
    by: Claimant,
    clients: HashSet<u32>,
}

impl Claims {
    /// Gives `client` those of the `wanted` addresses that are nobody else's, and takes back what it held before
    /// and does not want any more. Addresses that mean something on one link or one host only are nobody's.
    pub(crate) fn settle(&self, client: u32, by: Claimant, wanted: &[Gid], held: &[Gid]) -> Vec<Gid> {
        let mut claims = self.0.lock();
        let mut grant = |gid: &&Gid| {
            if addresses::is_local(gid) {
                return true;
            }
            let claim = claims.entry(**gid).or_insert_with(|| Claim { by, clients: HashSet::new() });
            let granted = claim.by == by;
            if granted {
                claim.clients.insert(client);
            }
            granted
        };
        let granted: Vec<Gid> = wanted.iter().filter(&mut grant).copied().collect();
        let lost: Vec<Gid> = held.iter().filter(|gid| !granted.contains(gid)).copied().collect();
        release(&mut claims, client, &lost);
        granted
    }

    /// Takes back what a client held that is gone.
    pub(crate) fn release(&self, client: u32, held: &[Gid]) {
        release(&mut self.0.lock(), client, held);
    }
}

fn release(claims: &mut HashMap<Gid, Claim>, client: u32, held: &[Gid]) {
    for gid in held {
        let Some(claim) = claims.get_mut(gid) else { continue };
        claim.clients.remove(&client);
        if claim.clients.is_empty() {
            claims.remove(gid);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn gid(last: u16) -> Gid {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).octets()
    }

    fn by(tenant: u32, namespace: u64) -> Claimant {
        Claimant { tenant, namespace: Namespace::Known { device: 4, inode: namespace } }
    }

    #[test]
    fn the_first_keeps_an_address_until_its_last_client_goes() {
        let claims = Claims::default();
        let wanted = [gid(1), gid(2)];
        assert_eq!(claims.settle(1, by(0, 7), &wanted, &[]), wanted);
        assert_eq!(claims.settle(2, by(0, 7), &wanted, &[]), wanted, "one namespace shares");
        assert_eq!(claims.settle(3, by(0, 8), &[gid(1), gid(3)], &[]), [gid(3)], "another does not");
        assert!(claims.settle(4, by(1, 7), &wanted, &[]).is_empty(), "nor does another tenant");
        claims.release(1, &wanted);
        assert!(claims.settle(4, by(1, 7), &wanted, &[]).is_empty());
        claims.release(2, &wanted);
        assert_eq!(claims.settle(4, by(1, 7), &wanted, &[]), wanted);
        claims.release(4, &wanted);
        claims.release(3, &[gid(3)]);
        assert!(claims.0.lock().is_empty(), "nothing is left");
    }

    #[test]
    fn an_address_that_left_is_free_and_one_that_stayed_is_not() {
        let claims = Claims::default();
        let held = claims.settle(1, by(0, 7), &[gid(1), gid(2)], &[]);
        let held = claims.settle(1, by(0, 7), &[gid(2)], &held);
        assert_eq!(held, [gid(2)]);
        assert_eq!(claims.settle(2, by(0, 8), &[gid(1), gid(2)], &[]), [gid(1)]);
    }

    #[test]
    fn who_cannot_be_seen_shares_with_nobody() {
        let claims = Claims::default();
        let unknown = |client| Claimant { tenant: 0, namespace: Namespace::Unknown { client } };
        assert_eq!(claims.settle(1, unknown(1), &[gid(1)], &[]), [gid(1)]);
        assert!(claims.settle(2, unknown(2), &[gid(1)], &[]).is_empty());
    }

    #[test]
    fn addresses_of_one_link_or_one_host_are_nobodys() {
        let claims = Claims::default();
        let local = ["fe80::1", "::1", "::ffff:127.0.0.1", "::ffff:169.254.1.1"];
        let local = local.map(|text| text.parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(claims.settle(1, by(0, 7), &local, &[]), local);
        assert_eq!(claims.settle(2, by(1, 8), &local, &[]), local);
        assert!(claims.0.lock().is_empty());
    }
}
