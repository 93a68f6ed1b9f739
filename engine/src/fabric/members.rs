//! Groups with members on other hosts: routers tell each other which groups they have members in, and a datagram goes
//! once to each router that has some.
//!
//! What a router has told counts until the next link to it, over which it tells all anew. A router that serves no
//! address of the tenant is told nothing and sent nothing, whatever it says.

use std::collections::{BTreeSet, HashMap, VecDeque};

use verbs_abi::{
    ids::{self, Qpn},
    proto::Gid,
    verbs::Opcode,
};

use super::{
    Fabric,
    far::{Patience, Stream},
    schedule::WORK,
};
use crate::{
    Attempt, Memory,
    wire::{
        Path,
        packet::{Header, Kind},
    },
};

/// Groups of one router that are remembered, and own ones that are told.
const MAX_TOLD: usize = 16 * 1024;
/// Members that are handed a datagram of another host at a time.
const MEMBERS: usize = 64;
/// Bytes of datagrams for larger groups that may wait for their turns.
const WAITING: usize = 1 << 20;
/// Behind all QP numbers: how far a datagram has come is told by a number of a member, then by one of a router.
const ROUTERS: u32 = Qpn::MULTICAST.value() + 1;
/// How long a router that takes nothing is waited for with a datagram to a group, ns.
const PATIENCE: u64 = 100_000_000;

/// The group has members behind the sender, or has none any more.
const JOINED: u8 = 1;
const LEFT: u8 = 0;

/// What other hosts have told.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    groups: HashMap<(u32, Gid), BTreeSet<u32>>,
    told: HashMap<u32, usize>,
    /// Which routers serve addresses of a tenant, for tenants with groups.
    servers: HashMap<u32, BTreeSet<u32>>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
}

/// A datagram of another host that not all members have been handed.
#[derive(Debug)]
struct Waiting {
    header: Header,
    payload: Vec<u8>,
    from: u32,
}

impl Elsewhere {
    /// The first router from `from` on behind which a group has members.
    fn next(&self, tenant: u32, group: &Gid, from: u32) -> Option<u32> {
        let (routers, servers) = (self.groups.get(&(tenant, *group))?, self.servers.get(&tenant)?);
        routers.range(from..).find(|router| servers.contains(router)).copied()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.groups.len()
    }

    fn join(&mut self, peer: u32, key: (u32, Gid)) {
        let told = self.told.entry(peer).or_default();
        if *told < MAX_TOLD && self.groups.entry(key).or_default().insert(peer) {
            *told += 1;
        }
    }

    fn leave(&mut self, peer: u32, key: (u32, Gid)) {
        let Some(routers) = self.groups.get_mut(&key) else { return };
        if routers.remove(&peer)
            && let Some(told) = self.told.get_mut(&peer)
        {
            *told -= 1;
        }
        if routers.is_empty() {
            self.groups.remove(&key);
        }
    }

    fn forget(&mut self, peer: u32) {
        if self.told.remove(&peer).is_some() {
            self.groups.retain(|_, routers| {
                routers.remove(&peer);
                !routers.is_empty()
            });
        }
    }
}

impl<M: Memory> Fabric<M> {
    /// A group has its first member here, or has lost its last: other hosts are told.
    pub(super) fn announce_group(&mut self, tenant: u32, group: &Gid, joined: bool) {
        self.learn_servers(tenant);
        let servers: Vec<u32> = self.elsewhere.servers.get(&tenant).into_iter().flatten().copied().collect();
        for peer in servers {
            let told = self.tell_member(peer, tenant, group, if joined { JOINED } else { LEFT });
            // Who has no link is told when there is one. That there is nobody any more can wait for it.
            if joined || told {
                self.links.call(Stream::first(peer));
            }
        }
    }

    /// False: there is no link, or its other end has no such tenant.
    fn tell_member(&mut self, peer: u32, tenant: u32, group: &Gid, code: u8) -> bool {
        let has_tenant = self.links.has_tenant(peer, tenant);
        let outbox = self.links.outbox(Stream::first(peer));
        let path = Path { tenant, source_qpn: 0, target_qpn: 0, sgid: [0; 16], dgid: *group };
        let tells = outbox.is_up() && has_tenant;
        if tells {
            outbox.push(&Header::new(Kind::Member, code, &path, 0, 0));
        }
        tells
    }

    /// A link is new: what its other end told before may be over, and what it was told may be lost.
    pub(super) fn tell_groups(&mut self, peer: u32) {
        self.elsewhere.forget(peer);
        let groups: Vec<(u32, Gid)> = self.groups.all().take(MAX_TOLD).collect();
        for (tenant, group) in groups {
            if self.tell_member(peer, tenant, &group, JOINED) {
                self.links.call(Stream::first(peer));
            }
        }
    }

    /// Other routers may serve addresses of a tenant than before: those that are new must hear of its groups.
    pub(super) fn seek_members(&mut self) {
        let own: BTreeSet<u32> = self.groups.all().map(|(tenant, _)| tenant).collect();
        let all: BTreeSet<u32> = self.elsewhere.servers.keys().chain(&own).copied().collect();
        all.into_iter().for_each(|tenant| self.learn_servers(tenant));
        let servers = own.iter().filter_map(|tenant| self.elsewhere.servers.get(tenant)).flatten();
        let servers: BTreeSet<u32> = servers.copied().collect();
        for peer in servers {
            if !self.links.outbox(Stream::first(peer)).is_up() {
                self.links.call(Stream::first(peer));
            }
        }
    }

    fn learn_servers(&mut self, tenant: u32) {
        let servers = self.links.routing.as_ref().map(|routing| routing.routers(tenant));
        self.elsewhere.servers.insert(tenant, servers.unwrap_or_default().into_iter().collect());
    }

    /// A router says that it has members in a group, or none any more.
    pub(super) fn take_member(&mut self, peer: u32, header: &Header) {
        let key = (header.path.tenant, header.path.dgid);
        if !ids::Gid(key.1).is_multicast() {
            return;
        }
        match header.code {
            JOINED => {
                if !self.elsewhere.servers.contains_key(&key.0) {
                    self.learn_servers(key.0);
                }
                self.elsewhere.join(peer, key);
            }
            LEFT => self.elsewhere.leave(peer, key),
            _ => {}
        }
    }

    /// Sends the fetched datagram to each router behind which its group has members, from where an earlier turn stopped.
    pub(super) fn send_to_routers(
        &mut self,
        at: usize,
        opcode: Opcode,
        budget: &mut u64,
    ) -> Result<(), Attempt> {
        loop {
            let Some(qp) = self.qps[at].as_mut() else { return Err(Attempt::Wait(None)) };
            let (from, group) =
                (qp.requester.next_receiver().saturating_sub(ROUTERS), qp.requester.address().dgid);
            let Some(peer) = self.elsewhere.next(qp.tenant, &group, from) else { return Ok(()) };
            if *budget < WORK {
                return Err(Attempt::Unfinished);
            }
            *budget -= WORK;
            self.ship_to(at, opcode, peer, Patience::For(PATIENCE))?;
            if let Some(qp) = self.qps[at].as_mut() {
                qp.requester.set_next_receiver(ROUTERS.saturating_add(peer).saturating_add(1));
            }
        }
    }

    /// Hands a datagram of another host to the members of its group here.
    pub(super) fn take_group_datagram(&mut self, header: &Header, payload: &[u8]) {
        // Those that came before it have their turns first.
        let from = if self.elsewhere.waiting.is_empty() { self.spread(header, payload, 0) } else { Some(0) };
        let elsewhere = &mut self.elsewhere;
        if let Some(from) = from
            && elsewhere.waiting_bytes + payload.len() <= WAITING
        {
            elsewhere.waiting_bytes += payload.len() + size_of::<Waiting>();
            elsewhere.waiting.push_back(Waiting { header: *header, payload: payload.to_vec(), from });
        }
    }

    /// Goes on with datagrams to larger groups.
    pub(super) fn spread_waiting(&mut self) {
        let Some(Waiting { header, payload, from }) = self.elsewhere.waiting.pop_front() else { return };
        match self.spread(&header, &payload, from) {
            None => self.elsewhere.waiting_bytes -= payload.len() + size_of::<Waiting>(),
            Some(from) => self.elsewhere.waiting.push_front(Waiting { header, payload, from }),
        }
    }

    pub(super) fn has_waiting_datagrams(&self) -> bool {
        !self.elsewhere.waiting.is_empty()
    }

    /// Hands a datagram to some members; the number from which to go on if there are more.
    fn spread(&mut self, header: &Header, payload: &[u8], mut from: u32) -> Option<u32> {
        for _ in 0..MEMBERS {
            let (qpn, at) = self.groups.next(header.path.tenant, &header.path.dgid, from)?;
            self.hand_datagram(at, header, payload);
            from = qpn + 1;
        }
        Some(from)
    }
}
