//! The ports of every network namespace, and who holds them.
//!
//! The rules are those of Linux's `cma`: two holders of one port need different addresses, or both the option to
//! share it; a wildcard overlaps with every address, with both options for one family only of its own family.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
};

use crate::{CommId, Refusal, id::Id, place::Place};

/// The range of ports that are given out.
const EPHEMERAL: std::ops::Range<u16> = 32_768..61_000;

/// Whose ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    tenant: u32,
    namespace: u64,
    space: u16,
}

impl Scope {
    pub(crate) fn of(place: &Place, space: u16) -> Self {
        Self { tenant: place.tenant, namespace: place.namespace, space }
    }
}

/// Who holds which port.
#[derive(Debug, Default)]
pub(crate) struct Ports(HashMap<Scope, BTreeMap<u16, Vec<CommId>>>);

impl Ports {
    /// Whether an id that would have `address` may hold its port beside those who do.
    pub(crate) fn check(
        &self,
        scope: Scope,
        id: &Id,
        address: SocketAddr,
        share: bool,
        ids: &HashMap<CommId, Id>,
        except: CommId,
    ) -> Result<(), Refusal> {
        let holders = self.0.get(&scope).and_then(|ports| ports.get(&address.port()));
        for comm in holders.into_iter().flatten().filter(|comm| **comm != except) {
            let Some((other, held)) = ids.get(comm).and_then(|other| Some((other, other.source_ip()?)))
            else {
                continue;
            };
            let apart = id.af_only && other.af_only && held.is_ipv4() != address.is_ipv4();
            if (share && other.reuse_addr) || apart {
                continue;
            }
            if held.ip().is_unspecified() || address.ip().is_unspecified() {
                return Err(Refusal::AddressNotAvailable);
            }
            if held.ip() == address.ip() {
                return Err(Refusal::AddressInUse);
            }
        }
        Ok(())
    }

    /// Who holds a port, in all namespaces of a tenant.
    pub(crate) fn holders(&self, tenant: u32, space: u16, port: u16) -> impl Iterator<Item = CommId> {
        let scopes = self.0.iter().filter(move |(scope, _)| scope.tenant == tenant && scope.space == space);
        scopes.filter_map(move |(_, ports)| ports.get(&port)).flatten().copied()
    }

    /// Makes an id a holder of a port.
    pub(crate) fn hold(&mut self, scope: Scope, port: u16, comm: CommId) {
        self.0.entry(scope).or_default().entry(port).or_default().push(comm);
    }

    /// A port that nobody holds; the search begins at a random one.
    pub(crate) fn free(&self, scope: Scope, random: u64) -> Result<u16, Refusal> {
        let Some(ports) = self.0.get(&scope) else {
            return Ok(EPHEMERAL.start + (random % EPHEMERAL.len() as u64) as u16);
        };
        let first = (random % EPHEMERAL.len() as u64) as usize;
        let around = EPHEMERAL.cycle_from(first);
        around.into_iter().find(|port| !ports.contains_key(port)).ok_or(Refusal::AddressNotAvailable)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives a port up.
    pub(crate) fn release(&mut self, scope: Scope, port: u16, comm: CommId) {
        let Some(ports) = self.0.get_mut(&scope) else { return };
        if let Some(holders) = ports.get_mut(&port) {
            holders.retain(|holder| *holder != comm);
            if holders.is_empty() {
                ports.remove(&port);
            }
        }
        if ports.is_empty() {
            self.0.remove(&scope);
        }
    }
}

/// A range, once around from somewhere in it.
trait CycleFrom {
    fn cycle_from(&self, first: usize) -> impl Iterator<Item = u16>;
}

impl CycleFrom for std::ops::Range<u16> {
    fn cycle_from(&self, first: usize) -> impl Iterator<Item = u16> {
        self.clone().cycle().skip(first).take(self.len())
    }
}
