//! What the directory says, in memory: which router serves an address, and where routers listen.
//!
//! A router keeps its number as long as this one lives, so that nothing that is kept by number can come to mean another
//! router. Names that come and go are bounded by [`MAX_ROUTERS`]. Leaves to others: where it comes from (`file`, `etcd`), what
//! this router's own clients have (`announcements`).

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use verbs_abi::proto::Gid;

use crate::config::Prefix;

/// Other routers that one hears of in its life.
pub(crate) const MAX_ROUTERS: usize = 16_384;
/// Addresses of all of this router's tenants, on all hosts.
pub(crate) const MAX_ADDRESSES: usize = 1 << 18;

/// An address of a tenant, by this router's number.
pub(crate) type Key = (u32, Gid);

/// A router of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: Arc<str>,
    /// Where it listens; none while it is not in the directory.
    pub(crate) address: Option<SocketAddr>,
}

/// Something that became known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A router listens there.
    Router(String, SocketAddr),
    /// A router is no more.
    NoRouter(String),
    /// A router serves an address.
    Address(Key, String),
    /// Nobody serves an address.
    NoAddress(Key),
}

/// Why something that became known is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the directory is larger than this router's tables: {MAX_ROUTERS} routers, {MAX_ADDRESSES} addresses"
)]
pub(crate) struct Full;

/// Something with a time after which it is forgotten, unless it is heard of again.
#[derive(Clone, Copy, Debug)]
struct Entry<T> {
    what: T,
    doubtful_until: Option<Instant>,
}

impl<T> Entry<T> {
    fn sure(what: T) -> Self {
        Self { what, doubtful_until: None }
    }

    fn is_over(&self, now: Instant) -> bool {
        self.doubtful_until.is_some_and(|until| until <= now)
    }
}

/// The whole of it.
#[derive(Debug)]
pub(crate) struct View {
    own: String,
    /// By number.
    names: Vec<Arc<str>>,
    numbers: HashMap<Arc<str>, u32>,
    /// Where routers listen, by number.
    routers: HashMap<u32, Entry<SocketAddr>>,
    /// Longest prefixes first; no number: this router's own.
    prefixes: Vec<(u32, Prefix, Option<u32>)>,
    /// No number: this router's own.
    addresses: HashMap<Key, Entry<Option<u32>>>,
}

impl View {
    /// That of the router `own`, which knows nobody yet.
    pub(crate) fn new(own: &str) -> Self {
        Self {
            own: own.to_owned(),
            names: Vec::new(),
            numbers: HashMap::new(),
            routers: HashMap::new(),
            prefixes: Vec::new(),
            addresses: HashMap::new(),
        }
    }

    /// The number of a router, which has one from now on. `None`: it is this one.
    fn number_of(&mut self, name: &str) -> Result<Option<u32>, Full> {
        if name == self.own {
            return Ok(None);
        }
        if let Some(number) = self.numbers.get(name) {
            return Ok(Some(*number));
        }
        if self.names.len() >= MAX_ROUTERS {
            return Err(Full);
        }
        let (name, number) = (Arc::<str>::from(name), self.names.len() as u32);
        self.names.push(Arc::clone(&name));
        self.numbers.insert(name, number);
        Ok(Some(number))
    }

    /// The addresses of a prefix are a router's.
    pub(crate) fn add_prefix(&mut self, tenant: u32, prefix: Prefix, router: &str) -> Result<(), Full> {
        let number = self.number_of(router)?;
        self.prefixes.push((tenant, prefix, number));
        self.prefixes.sort_by_key(|(_, prefix, _)| std::cmp::Reverse(prefix.bits()));
        Ok(())
    }

    /// Takes something in. True: something is known that was not.
    pub(crate) fn apply(&mut self, change: &Change) -> Result<bool, Full> {
        match change {
            Change::Router(name, address) => {
                let Some(number) = self.number_of(name)? else { return Ok(false) };
                let old = self.routers.insert(number, Entry::sure(*address));
                Ok(old.is_none())
            }
            Change::NoRouter(name) => {
                if let Some(number) = self.numbers.get(&**name) {
                    self.routers.remove(number);
                }
                Ok(false)
            }
            Change::Address(key, router) => {
                if self.addresses.len() >= MAX_ADDRESSES && !self.addresses.contains_key(key) {
                    return Err(Full);
                }
                let number = self.number_of(router)?;
                let old = self.addresses.insert(*key, Entry::sure(number));
                Ok(old.is_none_or(|old| old.what != number))
            }
            Change::NoAddress(key) => {
                self.addresses.remove(key);
                Ok(false)
            }
        }
    }

    /// Takes a whole listing in. What it does not hold is forgotten, at once or at a later time. True: something is known
    /// that was not.
    pub(crate) fn replace(
        &mut self,
        listing: &[Change],
        forget: Option<Instant>,
    ) -> (bool, Result<(), Full>) {
        let (mut news, mut outcome) = (false, Ok(()));
        let (mut routers, mut addresses) = (HashSet::new(), HashSet::new());
        for change in listing {
            match self.apply(change) {
                Ok(is_new) => news |= is_new,
                Err(full) => outcome = Err(full),
            }
            match change {
                Change::Router(name, _) => routers.extend(self.numbers.get(&**name).copied()),
                Change::Address(key, _) => drop(addresses.insert(*key)),
                Change::NoRouter(_) | Change::NoAddress(_) => {}
            }
        }
        let doubt = |known: bool, until: &mut Option<Instant>| {
            // What was in doubt before stays so until then: listings that follow each other must not keep it for ever.
            *until = if known { None } else { until.or(forget) };
            known || forget.is_some()
        };
        self.routers.retain(|number, entry| doubt(routers.contains(number), &mut entry.doubtful_until));
        self.addresses.retain(|key, entry| doubt(addresses.contains(key), &mut entry.doubtful_until));
        (news, outcome)
    }

    /// Forgets what was in doubt for long enough.
    pub(crate) fn forget(&mut self, now: Instant) {
        self.routers.retain(|_, entry| !entry.is_over(now));
        self.addresses.retain(|_, entry| !entry.is_over(now));
    }

    /// The router behind which an address lives; `None` for this one, and for addresses that nobody knows.
    pub(crate) fn route(&self, tenant: u32, gid: &Gid) -> Option<u32> {
        if let Some(entry) = self.addresses.get(&(tenant, *gid)) {
            return entry.what.filter(|number| self.routers.contains_key(number));
        }
        let found = self.prefixes.iter().find(|(of, prefix, _)| *of == tenant && prefix.contains(gid));
        found.and_then(|(_, _, number)| *number)
    }

    /// The numbers of all other routers that serve addresses of a tenant.
    pub(crate) fn routers(&self, tenant: u32) -> HashSet<u32> {
        let by_prefix =
            self.prefixes.iter().filter(|(of, ..)| *of == tenant).filter_map(|(.., number)| *number);
        let of_tenant = self.addresses.iter().filter(|((of, _), _)| *of == tenant);
        let by_address = of_tenant.filter_map(|(_, entry)| entry.what);
        by_prefix.chain(by_address).filter(|number| self.routers.contains_key(number)).collect()
    }

    /// Whether an address is this router's, as others know it.
    pub(crate) fn is_own(&self, tenant: u32, gid: &Gid) -> bool {
        if let Some(entry) = self.addresses.get(&(tenant, *gid)) {
            return entry.what.is_none();
        }
        let found = self.prefixes.iter().find(|(of, prefix, _)| *of == tenant && prefix.contains(gid));
        found.is_some_and(|(_, _, number)| number.is_none())
    }

    /// The other router that is known, beyond doubt, to have an address.
    pub(crate) fn holder(&self, key: &Key) -> Option<&str> {
        let entry = self.addresses.get(key).filter(|entry| entry.doubtful_until.is_none())?;
        self.names.get(entry.what? as usize).map(|name| &**name)
    }

    /// A router by its number.
    pub(crate) fn peer(&self, number: u32) -> Option<Peer> {
        let name = self.names.get(number as usize)?;
        let address = self.routers.get(&number).map(|entry| entry.what);
        Some(Peer { name: Arc::clone(name), address })
    }

    /// The number of a router that is in the directory.
    pub(crate) fn number(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied().filter(|number| self.routers.contains_key(number))
    }

    /// All routers that were ever heard of, by number.
    pub(crate) fn peers(&self) -> impl Iterator<Item = Peer> + '_ {
        (0..self.names.len() as u32).filter_map(|number| self.peer(number))
    }

    /// How many other routers there are, and how many addresses.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.routers.len(), self.addresses.len())
    }

    /// Every address and the name of its router.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = (Key, &str)> + '_ {
        let name = |number: u32| self.names.get(number as usize).map_or("", |name| name);
        self.addresses.iter().map(move |(key, entry)| (*key, entry.what.map_or(&*self.own, name)))
    }
}
