//! The addresses of one client: those of its network namespace that its tenant may have and nobody else has.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use verbs_abi::proto::Gid;

use crate::{
    addresses,
    claims::{Claimant, Claims},
    identity::{Namespace, Peer},
    tenant::Tenant,
};

/// Of the time between two reads of the same tables, one part in so many may go into a read: whoever owns a
/// namespace can make its tables long.
const SHARE: u32 = 32;
/// A table is not read again sooner than this.
const PAUSE: Duration = Duration::from_millis(5);

/// A client's GID table.
#[derive(Debug)]
pub(super) struct Gids {
    client: u32,
    tenant: Arc<Tenant>,
    claims: Arc<Claims>,
    /// Found, and inside the tenant's prefixes.
    allowed: Vec<Gid>,
    /// Claimed, and to be given back.
    held: Vec<Gid>,
    /// Allowed, and another's.
    refused: Vec<Gid>,
    table: Vec<Gid>,
    namespace: Namespace,
    read_at: Instant,
    pause: Duration,
}

impl Gids {
    /// The table of a new client.
    pub(super) fn new(client: u32, tenant: &Arc<Tenant>, claims: &Arc<Claims>, peer: &Peer) -> Self {
        let mut gids = Self {
            client,
            tenant: Arc::clone(tenant),
            claims: Arc::clone(claims),
            allowed: Vec::new(),
            held: Vec::new(),
            refused: Vec::new(),
            table: addresses::loopback(),
            namespace: Namespace::Unknown { client },
            read_at: Instant::now(),
            pause: Duration::ZERO,
        };
        gids.read(peer);
        gids
    }

    /// The table.
    pub(super) fn table(&self) -> &[Gid] {
        &self.table
    }

    /// The namespace whose addresses they are.
    pub(super) fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// How long ago the addresses were read.
    pub(super) fn age(&self) -> Duration {
        self.read_at.elapsed()
    }

    /// Reads the addresses again if they are older than `age`. True: the table is another.
    pub(super) fn refresh(&mut self, peer: &Peer, age: Duration) -> bool {
        self.read_at.elapsed() >= age.max(self.pause) && self.read(peer)
    }

    fn read(&mut self, peer: &Peer) -> bool {
        let start = Instant::now();
        let found = peer.gids(self.client);
        (self.read_at, self.pause) = (Instant::now(), PAUSE.max(start.elapsed() * SHARE));
        let Some((wanted, namespace)) = found else { return false };
        let has_moved = std::mem::replace(&mut self.namespace, namespace) != namespace;
        let table = if self.tenant.has_prefixes() { self.grant(wanted, peer.pid) } else { wanted };
        let is_changed = has_moved || table != self.table;
        self.table = table;
        is_changed
    }

    /// Asks again for what was found before: other hosts have given an address back, or got one. True: the table is
    /// another.
    pub(super) fn resettle(&mut self, peer: &Peer) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let table = self.grant(self.allowed.clone(), peer.pid);
        let is_changed = table != self.table;
        self.table = table;
        is_changed
    }

    /// Whether the directory has not said yet whether all of them are this host's.
    pub(super) fn are_unsettled(&self) -> bool {
        self.claims.are_unsettled(self.tenant.index, &self.held)
    }

    /// Those of the addresses that the client may have.
    fn grant(&mut self, wanted: Vec<Gid>, pid: u32) -> Vec<Gid> {
        let by = Claimant { tenant: self.tenant.index, namespace: self.namespace };
        let (allowed, foreign): (Vec<Gid>, Vec<Gid>) =
            wanted.into_iter().partition(|gid| self.tenant.allows(gid));
        let settled = self.claims.settle(self.client, by, &self.tenant, &allowed, &self.held);
        for gid in foreign.iter().filter(|gid| !addresses::is_local(gid)) {
            let why = format!("{} is in none of the tenant's prefixes", addresses::text(gid));
            self.tenant.complain("an address was not granted", pid, &why);
        }
        // Said once, until it changes.
        for (gid, why) in settled.refused.iter().filter(|(gid, _)| !self.refused.contains(gid)) {
            let why = format!("{}: {why}", addresses::text(gid));
            self.tenant.complain("an address was not granted", pid, &why);
        }
        self.refused = settled.refused.into_iter().map(|(gid, _)| gid).collect();
        (self.held, self.allowed) = (settled.held, allowed);
        // Index 0 is always valid, if only for the namespace itself.
        if settled.granted.is_empty() { addresses::loopback() } else { settled.granted }
    }
}

impl Drop for Gids {
    fn drop(&mut self) {
        self.claims.release(self.client, self.tenant.index, &self.held);
    }
}
