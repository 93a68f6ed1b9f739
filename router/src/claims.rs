//! Which addresses are in use, and by whom: the first to claim a live address keeps it.
//!
//! Whoever owns a network namespace can give it any address. So where tenants have prefixes, an address belongs to
//! the namespace whose client showed it first, until the last client there that shows it is gone; many clients of
//! one namespace share it. Of addresses that are announced the directory is told, and what another host has is not
//! served here. Leaves to others: which addresses a namespace has (`addresses`), which of them a tenant may have at
//! all (its prefixes), other hosts (`directory`).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::Mutex;
use verbs_abi::proto::Gid;

use crate::{directory::Directory, identity::Namespace, tenant::Tenant};

/// Whose an address is: a network namespace, as one tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claimant {
    pub(crate) tenant: u32,
    pub(crate) namespace: Namespace,
}

/// The addresses in use.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    all: Mutex<Table>,
    /// Who is told of those that are announced.
    directory: Option<Arc<Directory>>,
}

/// By tenant: networks of different tenants may well have the same addresses.
type Table = HashMap<(u32, Gid), Claim>;

#[derive(Debug)]
struct Claim {
    by: Namespace,
    clients: HashSet<u32>,
    is_announced: bool,
}

/// What a client has got of what it wanted.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// Claimed, and to be given back.
    pub(crate) held: Vec<Gid>,
    /// Addresses that it may use: also those that are nobody's, but not those that another host has.
    pub(crate) granted: Vec<Gid>,
    /// The others, with why.
    pub(crate) refused: Vec<(Gid, String)>,
}

impl Claims {
    /// Where announced addresses are told to other hosts.
    pub(crate) fn new(directory: Option<Arc<Directory>>) -> Self {
        Self { all: Mutex::default(), directory }
    }

    /// Gives `client` those of the `wanted` addresses that are nobody else's, and takes back what it held before
    /// and does not want any more. Addresses that mean something on one link or one host only are nobody's.
    pub(crate) fn settle(
        &self,
        client: u32,
        by: Claimant,
        tenant: &Tenant,
        wanted: &[Gid],
        held: &[Gid],
    ) -> Settled {
        let mut all = self.all.lock();
        let mut settled = Settled::default();
        for gid in wanted {
            if !tenant.guards(gid) {
                settled.granted.push(*gid);
                continue;
            }
            let (namespace, announced) = (by.namespace, tenant.announces(gid));
            let new = || Claim { by: namespace, clients: HashSet::new(), is_announced: announced };
            let claim = all.entry((by.tenant, *gid)).or_insert_with(new);
            if claim.by != namespace {
                settled.refused.push((*gid, "it is in use by another network namespace".to_owned()));
                continue;
            }
            claim.clients.insert(client);
            settled.held.push(*gid);
            let directory = self.directory.as_ref().filter(|_| claim.is_announced);
            let other = directory.and_then(|directory| {
                directory.claim(by.tenant, gid);
                directory.refused_by(by.tenant, gid)
            });
            match other {
                None => settled.granted.push(*gid),
                Some(other) => {
                    settled.refused.push((*gid, format!("the directory says that router {other} has it")));
                }
            }
        }
        let lost: Vec<Gid> = held.iter().filter(|gid| !settled.held.contains(gid)).copied().collect();
        self.give_back(&mut all, client, by.tenant, &lost);
        settled
    }

    /// Takes back what a client held that is gone.
    pub(crate) fn release(&self, client: u32, tenant: u32, held: &[Gid]) {
        self.give_back(&mut self.all.lock(), client, tenant, held);
    }

    /// Whether the directory has not said yet whether all of these are this host's.
    pub(crate) fn are_unsettled(&self, tenant: u32, held: &[Gid]) -> bool {
        let unsettled =
            |directory: &Arc<Directory>| held.iter().any(|gid| directory.is_unsettled(tenant, gid));
        self.directory.as_ref().is_some_and(unsettled)
    }

    fn give_back(&self, all: &mut Table, client: u32, tenant: u32, held: &[Gid]) {
        for gid in held {
            let Some(claim) = all.get_mut(&(tenant, *gid)) else { continue };
            claim.clients.remove(&client);
            if !claim.clients.is_empty() {
                continue;
            }
            if let Some(directory) = self.directory.as_ref().filter(|_| claim.is_announced) {
                directory.release(tenant, gid);
            }
            all.remove(&(tenant, *gid));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    /// A tenant with a prefix that holds everything.
    fn tenant() -> Arc<Tenant> {
        let text = "[[tenant]]\nname = 'a'\nsocket = '/a'\nprefixes = ['::/0']\n";
        Tenant::all(&toml::from_str(text).unwrap(), 1064).remove(0)
    }

    fn settle(claims: &Claims, client: u32, by: Claimant, wanted: &[Gid], held: &[Gid]) -> Vec<Gid> {
        claims.settle(client, by, &tenant(), wanted, held).granted
    }

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
        assert_eq!(settle(&claims, 1, by(0, 7), &wanted, &[]), wanted);
        assert_eq!(settle(&claims, 2, by(0, 7), &wanted, &[]), wanted, "one namespace shares");
        assert_eq!(settle(&claims, 3, by(0, 8), &[gid(1), gid(3)], &[]), [gid(3)], "another does not");
        claims.release(1, 0, &wanted);
        assert!(settle(&claims, 4, by(0, 9), &wanted, &[]).is_empty());
        claims.release(2, 0, &wanted);
        assert_eq!(settle(&claims, 4, by(0, 9), &wanted, &[]), wanted);
        claims.release(4, 0, &wanted);
        claims.release(3, 0, &[gid(3)]);
        assert!(claims.all.lock().is_empty(), "nothing is left");
    }

    #[test]
    fn networks_of_two_tenants_may_have_the_same_addresses() {
        let claims = Claims::default();
        let wanted = [gid(1)];
        assert_eq!(settle(&claims, 1, by(0, 7), &wanted, &[]), wanted);
        assert_eq!(settle(&claims, 2, by(1, 8), &wanted, &[]), wanted);
        claims.release(2, 1, &wanted);
        assert!(settle(&claims, 3, by(0, 9), &wanted, &[]).is_empty(), "the first still has its own");
    }

    #[test]
    fn an_address_that_left_is_free_and_one_that_stayed_is_not() {
        let claims = Claims::default();
        let held = settle(&claims, 1, by(0, 7), &[gid(1), gid(2)], &[]);
        let held = settle(&claims, 1, by(0, 7), &[gid(2)], &held);
        assert_eq!(held, [gid(2)]);
        assert_eq!(settle(&claims, 2, by(0, 8), &[gid(1), gid(2)], &[]), [gid(1)]);
    }

    #[test]
    fn who_cannot_be_seen_shares_with_nobody() {
        let claims = Claims::default();
        let unknown = |client| Claimant { tenant: 0, namespace: Namespace::Unknown { client } };
        assert_eq!(settle(&claims, 1, unknown(1), &[gid(1)], &[]), [gid(1)]);
        assert!(settle(&claims, 2, unknown(2), &[gid(1)], &[]).is_empty());
    }

    #[test]
    fn addresses_of_one_link_or_one_host_are_nobodys() {
        let claims = Claims::default();
        let local = ["fe80::1", "::1", "::ffff:127.0.0.1", "::ffff:169.254.1.1"];
        let local = local.map(|text| text.parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(settle(&claims, 1, by(0, 7), &local, &[]), local);
        assert_eq!(settle(&claims, 2, by(1, 8), &local, &[]), local);
        assert!(claims.all.lock().is_empty());
    }
}
