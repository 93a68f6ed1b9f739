//! The router's seat: every client and QP of the host, whose turn it is, who waits for what.
//!
//! Inputs: the control verbs ([`Fabric::open`], [`Fabric::create_qp`], [`Fabric::modify_qp`], ...), doorbells
//! ([`Fabric::collect`]), the time, and accesses to foreign memory that have come back ([`Fabric::finish`]). Output:
//! memory, completions, rung bells, accesses to be performed ([`Fabric::next_access`]). Call [`Fabric::run`] while it
//! says there is more, then sleep until a doorbell, an access or [`Fabric::next_timer`].

mod access;
mod arrive;
mod calls;
mod control;
mod copies;
mod datagrams;
mod direct;
mod far;
mod groups;
mod members;
mod modify;
mod nics;
mod objects;
mod overrun;
mod policy;
mod run;
mod schedule;
mod shadows;
mod shared;
mod sharers;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, atomic::AtomicU64},
};

use verbs_abi::{
    proto::{CreateQp, DirectPeer, Gid, Mode, QpAttr},
    shm::{
        doorbell::Doorbells,
        events::{AsyncEvent, EventWriter},
        queue::{Geometry, QueueArea},
    },
    verbs::{EventType, QpState},
};

use crate::{Bell, CompletionQueue, Memory, Requester, Responder, pace::Pace};

use access::{Accesses, Counts};
pub use calls::Calls;
pub use control::{Control, Controls, MAX_WORDS};
use copies::Copies;
pub use copies::Copy;
use far::{Far, Links};
pub use far::{LinkFigures, Routing, Stream};
use groups::Groups;
use members::Elsewhere;
pub use modify::ATTR_LIMITS;
use nics::Nics;
use overrun::Overruns;
use schedule::Schedule;
pub(crate) use shared::counterpart;
use shared::{Domain, Srq};
pub use shared::{SrqInit, XrcInit};
use sharers::Sharer;

/// Entries of a client's GID table.
pub const GID_TABLE_LEN: u32 = 16;
/// Reads and atomics outstanding, either side.
pub const MAX_RD_ATOMIC: u8 = 16;
/// The highest rate that a QP can be limited to, kbit/s: the port's.
pub const MAX_RATE: u32 = 100_000_000;

/// What a client brings when it opens.
#[derive(Debug)]
pub struct ClientInit<M> {
    /// Trust domain; QPs of different tenants never meet.
    pub tenant: u32,
    /// Mode granted.
    pub mode: Mode,
    /// Its doorbells.
    pub doorbells: Doorbells,
    /// Its async event ring.
    pub events: EventWriter,
    /// Woken after an async event.
    pub event_bell: Arc<dyn Bell>,
    /// Its memory and keys.
    pub memory: M,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// What a new QP is made of.
#[derive(Debug)]
pub struct QpInit {
    /// What the client asked for.
    pub create: CreateQp,
    /// Sizes of its queues.
    pub geometry: Geometry,
    /// Its place in the arena.
    pub area: QueueArea,
    /// Offset of that place.
    pub offset: u64,
}

/// What [`Fabric::modify_qp`] did beside the transition.
#[derive(Clone, Copy, Debug, Default)]
pub struct Modified {
    /// The QP is now connected in direct mode: its peer, and the peer's receive CQ (whose channel's bell the
    /// client may ring from now on).
    pub direct: Option<(DirectPeer, u32)>,
}

/// What a QP's messages travel by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// Shared memory: the peer lives on this host.
    Shm,
    /// A real NIC.
    Rnic,
    /// A link between routers.
    Tcp,
}

/// A QP, for `freeflow status`.
#[derive(Clone, Debug)]
pub struct QpSnapshot {
    /// Its number.
    pub qpn: u32,
    /// Its client.
    pub client: u32,
    /// `enum ibv_qp_type`.
    pub qp_type: u32,
    /// State.
    pub state: QpState,
    /// Peer's QP number, when connected.
    pub peer_qpn: u32,
    /// Peer's GID, when connected.
    pub peer_gid: Gid,
    /// Who executes its send queue.
    pub mode: Mode,
    /// What its messages travel by, when that is decided.
    pub path: Option<DataPath>,
    /// Messages sent by the router's seat.
    pub messages: u64,
    /// Bytes sent by the router's seat.
    pub bytes: u64,
    /// RNR NAKs received.
    pub rnr_naks: u64,
    /// Requests repeated after a timeout.
    pub timeouts: u64,
}

/// One client.
#[derive(Debug)]
struct Client<M> {
    id: u32,
    tenant: u32,
    mode: Mode,
    doorbells: Doorbells,
    events: EventWriter,
    event_bell: Arc<dyn Bell>,
    memory: M,
    gids: Vec<Gid>,
    /// QP by doorbell slot.
    slots: Vec<Option<usize>>,
    /// SRQ by doorbell slot.
    srq_slots: HashMap<u32, u32>,
    free_slots: Vec<u32>,
    /// QPs that are or were connected directly, either way: all others execute in the router alone.
    paired: BTreeSet<usize>,
    /// Where to go on looking at its doorbells.
    next_word: usize,
    cqs: HashMap<u32, Cq>,
    next_cq: u32,
    /// Accesses to its foreign memory.
    accesses: Counts,
    /// Bytes of datagrams that wait for it.
    inboxes: Arc<AtomicU64>,
}

/// One CQ.
#[derive(Debug)]
struct Cq {
    queue: Arc<CompletionQueue>,
    offset: u64,
    rings: u32,
    free_rings: Vec<u32>,
    next_ring: u32,
    /// It has overrun, and its QPs were told.
    failed: bool,
}

/// One QP: its two halves and what the tables need to know of it.
#[derive(Debug)]
struct Qp {
    qpn: u32,
    /// Index of its client.
    owner: usize,
    /// Who has it open beside its owner.
    sharers: Vec<Sharer>,
    /// Its client's trust domain.
    tenant: u32,
    slot: u32,
    create: CreateQp,
    geometry: Geometry,
    offset: u64,
    rings: [u32; 2],
    attr: QpAttr,
    state: QpState,
    requester: Requester,
    responder: Responder,
    /// Waits until then (or for ever) unless poked.
    waiting: Option<Option<u64>>,
    /// In SQD until what was begun has ended: whether its owner wants to hear of that.
    draining: Option<bool>,
    /// Index of the peer, once found; checked against the number at each use.
    peer: Option<usize>,
    /// The peer in direct mode.
    direct: Option<usize>,
    /// The peer, where it lives on another host.
    far: Option<Box<Far>>,
    /// QPs whose owners may execute on this one's receive side.
    attached: Vec<usize>,
    /// The multicast groups that it is attached to.
    groups: BTreeSet<Gid>,
    /// Whether the router's halves are those that count (the seat is the router's and was resumed).
    held: bool,
    /// Accesses to its owner's memory and copies that are under way for it.
    busy: u32,
    /// The copy that its request waits for.
    copying: Option<u64>,
    /// How fast it may send.
    pace: Pace,
}

/// Every client and QP of the host.
#[derive(Debug)]
pub struct Fabric<M> {
    clients: Vec<Option<Client<M>>>,
    client_index: HashMap<u32, usize>,
    qps: Vec<Option<Qp>>,
    free_qps: Vec<usize>,
    qpn_index: HashMap<u32, usize>,
    next_qpn: u32,
    srqs: HashMap<u32, Srq>,
    next_srqn: u32,
    /// XRC domains.
    domains: HashMap<u32, Domain>,
    next_domain: u32,
    groups: Groups,
    elsewhere: Elsewhere,
    schedule: Schedule,
    rung: Vec<usize>,
    rung_srqs: Vec<u32>,
    accesses: Accesses,
    copies: Copies,
    links: Links,
    nics: Nics,
    overruns: Arc<Overruns>,
    /// The time at the last turn.
    now: u64,
}

impl<M: Memory> Default for Fabric<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Memory> Fabric<M> {
    /// A host without clients.
    #[must_use]
    pub fn new() -> Self {
        Self {
            clients: Vec::new(),
            client_index: HashMap::new(),
            qps: Vec::new(),
            free_qps: Vec::new(),
            qpn_index: HashMap::new(),
            next_qpn: 0x100,
            srqs: HashMap::new(),
            next_srqn: 1,
            domains: HashMap::new(),
            next_domain: 1,
            groups: Groups::default(),
            elsewhere: Elsewhere::default(),
            schedule: Schedule::default(),
            rung: Vec::new(),
            rung_srqs: Vec::new(),
            accesses: Accesses::default(),
            copies: Copies::default(),
            links: Links::default(),
            nics: Nics::default(),
            overruns: Arc::default(),
            now: 0,
        }
    }

    /// Adds a client under an id that is not in use.
    pub fn open(&mut self, client: u32, init: ClientInit<M>) {
        let ClientInit { tenant, mode, doorbells, events, event_bell, memory, gids } = init;
        let client_state = Client {
            id: client,
            tenant,
            mode,
            doorbells,
            events,
            event_bell,
            memory,
            gids,
            slots: Vec::new(),
            srq_slots: HashMap::new(),
            free_slots: Vec::new(),
            next_word: 0,
            paired: BTreeSet::new(),
            cqs: HashMap::new(),
            next_cq: 1,
            accesses: Counts::default(),
            inboxes: Arc::default(),
        };
        let at = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        if at == self.clients.len() {
            self.clients.push(None);
        }
        self.clients[at] = Some(client_state);
        self.client_index.insert(client, at);
    }

    /// Ends a client that is gone: its objects end, its peers' requests run into their timeouts.
    pub fn close(&mut self, client: u32) {
        while self.close_some(client, usize::MAX) {}
    }

    /// The same bit by bit: ends `qps` of its QPs at the most, and the client when none is left. True: there is more
    /// to end.
    pub fn close_some(&mut self, client: u32, qps: usize) -> bool {
        let Some(&at) = self.client_index.get(&client) else { return false };
        self.lose_accesses(at);
        let slots = self.clients[at].iter().flat_map(|client| client.slots.iter().rev().flatten().copied());
        let ending: Vec<usize> = slots.take(qps).collect();
        for qp in &ending {
            if !self.let_go(*qp, at) {
                self.remove_qp(*qp);
            }
        }
        if let Some(client) = self.clients[at].as_mut() {
            // What was looked through once need not be again.
            client.slots.truncate(client.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
        }
        if ending.len() == qps {
            return true;
        }
        let srqs: Vec<u32> =
            self.clients[at].iter().flat_map(|client| client.srq_slots.values().copied()).collect();
        srqs.into_iter().for_each(|srq| self.remove_srq(srq));
        self.end_registrations(client);
        self.client_index.remove(&client);
        self.clients[at] = None;
        self.schedule.dismiss(at);
        false
    }

    /// The client whose QP has this number.
    #[must_use]
    pub fn owner_of(&self, qpn: u32) -> Option<u32> {
        let qp = self.qps[*self.qpn_index.get(&qpn)?].as_ref()?;
        self.clients[qp.owner].as_ref().map(|client| client.id)
    }

    /// What a client has used of the lane so far, in bytes moved, with a work request counted as 4 KiB beside its own.
    #[must_use]
    pub fn lane_use(&self, client: u32) -> u64 {
        self.client_index.get(&client).map_or(0, |at| self.schedule.used(*at))
    }

    /// Gives a client `weight` times the usual share of a lane when others want it, too.
    pub fn set_weight(&mut self, client: u32, weight: u32) {
        if let Some(at) = self.client_index.get(&client) {
            self.schedule.set_weight(*at, weight);
        }
    }

    /// Replaces a client's addresses.
    pub fn set_gids(&mut self, client: u32, gids: Vec<Gid>) {
        if let Some(client) = self.client_mut(client) {
            client.gids = gids;
            (0..self.qps.len()).for_each(|at| self.admit_late_source(at));
        }
    }

    /// A client's memory and keys.
    pub fn memory_mut(&mut self, client: u32) -> Option<&mut M> {
        self.client_mut(client).map(|client| &mut client.memory)
    }

    /// Every QP, for `freeflow status`.
    #[must_use]
    pub fn snapshot(&self) -> Vec<QpSnapshot> {
        self.qps.iter().flatten().map(|qp| self.snapshot_of(qp)).collect()
    }

    /// The same bit by bit: the QPs at the places of `part`. None beyond the last one.
    #[must_use]
    pub fn snapshot_part(&self, part: std::ops::Range<usize>) -> Option<Vec<QpSnapshot>> {
        let qps = self.qps.get(part.start.min(part.end)..part.end.min(self.qps.len()))?;
        (part.start < self.qps.len()).then(|| qps.iter().flatten().map(|qp| self.snapshot_of(qp)).collect())
    }

    fn snapshot_of(&self, qp: &Qp) -> QpSnapshot {
        let traffic = qp.requester.traffic();
        QpSnapshot {
            qpn: qp.qpn,
            client: self.clients[qp.owner].as_ref().map_or(0, |client| client.id),
            qp_type: qp.create.qp_type,
            state: qp.state,
            peer_qpn: qp.attr.dest_qp_num,
            peer_gid: qp.attr.ah_attr.dgid,
            mode: if qp.direct.is_some() { Mode::Direct } else { Mode::Isolated },
            path: self.path_of(qp),
            messages: traffic.messages,
            bytes: traffic.bytes,
            rnr_naks: traffic.rnr_naks,
            timeouts: traffic.timeouts,
        }
    }

    fn path_of(&self, qp: &Qp) -> Option<DataPath> {
        match &qp.far {
            Some(far) => match &far.shadow {
                None => Some(DataPath::Tcp),
                Some(shadow) => (!shadow.is_undecided()).then_some(DataPath::Rnic),
            },
            None => {
                let (qpn, gid) = (qp.attr.dest_qp_num, qp.attr.ah_attr.dgid);
                let connected = qp.state.may_respond() && self.resolve(qp, qpn, &gid).is_some();
                connected.then_some(DataPath::Shm)
            }
        }
    }

    fn has_shadow(&self, at: usize) -> bool {
        self.qps[at].as_ref().is_some_and(|qp| qp.far.as_ref().is_some_and(|far| far.shadow.is_some()))
    }

    fn client_mut(&mut self, client: u32) -> Option<&mut Client<M>> {
        let at = *self.client_index.get(&client)?;
        self.clients[at].as_mut()
    }

    /// Index of a QP, if the client holds it.
    fn owned(&self, client: u32, qpn: u32) -> Option<usize> {
        let owner = self.client_index.get(&client)?;
        let at = *self.qpn_index.get(&qpn)?;
        let holds = |qp: &&Qp| qp.owner == *owner || qp.sharers.iter().any(|sharer| sharer.owner == *owner);
        self.qps[at].as_ref().filter(holds).map(|_| at)
    }

    /// Tells all who hold a QP about an event.
    fn raise(&mut self, at: usize, event: EventType) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let holders = qp.sharers.iter().map(|sharer| sharer.owner).chain([qp.owner]);
        for holder in holders {
            if let Some(client) = self.clients[holder].as_mut() {
                client.events.push(AsyncEvent { kind: event.value(), element: qp.qpn });
                client.event_bell.ring();
            }
        }
    }
}

#[cfg(test)]
mod tests;
