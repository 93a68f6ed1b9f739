//! Accesses to foreign memory: given out to the host, brought back, waited for before memory is given up.
//!
//! An access belongs to the client whose memory it is: that client's flushes, revocations and deregistrations wait
//! for it, nobody else's. The QP that asked for it waits, too, but may give up.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, atomic::AtomicBool},
};

use super::{Fabric, Qp};
use crate::{Access, Memory, foreign::Task, responder::Reply, stage::Stage};

/// Which half of a QP asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Requester,
    Responder,
    /// Payload for a peer on another host.
    Export,
    /// What such a peer has answered.
    Reply,
    /// What such a peer asks for.
    Target,
}

/// A QP by index, and by number: the index may be another's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) at: usize,
    pub(super) qpn: u32,
}

/// An access that the host has.
#[derive(Debug)]
struct Flight {
    /// Index of the client whose memory it is.
    client: usize,
    /// Who asked.
    user: Named,
    half: Half,
    /// The QP that it serves: of that client, but for XRC.
    server: Named,
}

/// All accesses.
#[derive(Debug, Default)]
pub(super) struct Accesses {
    next_ticket: u64,
    /// Made, and not yet given out.
    outbox: VecDeque<Access>,
    flights: HashMap<u64, Flight>,
}

/// Accesses to one client's memory, counted. They come back in the order in which they were given out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    begun: u64,
    ended: u64,
}

impl<M: Memory> Fabric<M> {
    /// The next access for the host to have performed. Ask after each [`Fabric::run`].
    pub fn next_access(&mut self) -> Option<Access> {
        self.accesses.outbox.pop_front()
    }

    pub(super) fn has_accesses(&self) -> bool {
        !self.accesses.outbox.is_empty()
    }

    /// Takes back an access that was performed, or cannot be.
    pub fn finish(&mut self, access: Access) {
        let Some(flight) = self.accesses.flights.remove(&access.ticket) else { return };
        if let Some(client) = self.clients[flight.client].as_mut() {
            client.accesses.ended += 1;
        }
        if let Some(server) = self.named_mut(flight.server) {
            server.busy -= 1;
            // Flushing may have waited for it.
            self.schedule.enqueue(flight.server.at);
        }
        let Some(user) = self.named_mut(flight.user) else { return };
        let awaited = match flight.half {
            Half::Requester => user.requester.arrive(access),
            Half::Responder => user.responder.arrive(access),
            Half::Export | Half::Reply | Half::Target => {
                user.far_stage(flight.half).is_some_and(|stage| stage.arrive(access))
            }
        };
        if awaited {
            self.stop_waiting(flight.user.at);
            self.schedule.enqueue(flight.user.at);
        }
    }

    /// A mark behind all accesses to a client's memory that were begun so far.
    #[must_use]
    pub fn access_mark(&self, client: u32) -> u64 {
        self.access_counts(client).begun
    }

    /// Whether all accesses before a mark have ended.
    #[must_use]
    pub fn has_passed(&self, client: u32, mark: u64) -> bool {
        self.access_counts(client).ended >= mark
    }

    /// Whether its owner's memory is being accessed for a QP of a client.
    #[must_use]
    pub fn is_busy(&self, client: u32, qpn: u32) -> bool {
        let Some((at, qp)) = self.owned(client, qpn).and_then(|at| Some((at, self.qps[at].as_ref()?))) else {
            return false;
        };
        let serves = |flight: &Flight| flight.server == Named { at, qpn } && flight.client == qp.owner;
        let is_on_nic = qp.far.as_ref().is_some_and(|far| far.shadow.is_some());
        is_on_nic || qp.busy > 0 && self.accesses.flights.values().any(serves)
    }

    fn access_counts(&self, client: u32) -> Counts {
        let client = self.client_index.get(&client).and_then(|at| self.clients[*at].as_ref());
        client.map(|client| client.accesses).unwrap_or_default()
    }

    /// Makes the access that one half of a QP has just asked for.
    pub(super) fn launch(&mut self, at: usize, half: Half) {
        let Some((user, server, owner)) = self.parties(at, half) else { return };
        let Some(client) = self.clients[owner].as_ref().map(|client| client.id) else { return };
        let (ticket, cancelled) = (self.accesses.next_ticket, Arc::new(AtomicBool::new(false)));
        let Some(task) = self.take_wanted(at, half, ticket, &cancelled) else { return };
        self.accesses.next_ticket += 1;
        self.accesses.flights.insert(ticket, Flight { client: owner, user, half, server });
        self.accesses.outbox.push_back(Access { ticket, client, task, cancelled, done: false });
        if let Some(client) = self.clients[owner].as_mut() {
            client.accesses.begun += 1;
        }
        if let Some(server) = self.named_mut(server) {
            server.busy += 1;
        }
    }

    /// Who asks for an access, the QP that it serves, and the client whose memory it is: the QP's own or its peer's,
    /// or that of the queue which an XRC request names.
    fn parties(&mut self, at: usize, half: Half) -> Option<(Named, Named, usize)> {
        let qp = self.qps[at].as_ref()?;
        let (user, peer_at) = (Named { at, qpn: qp.qpn }, qp.peer);
        if half != Half::Requester || qp.requester.accesses_own_memory() {
            let srq_owner = if half == Half::Target { self.selected_owner(at) } else { None };
            let is_xrc = qp.create.xrcd.is_some();
            return Some((user, user, srq_owner.filter(|_| is_xrc).unwrap_or(qp.owner)));
        }
        let peer_at = peer_at?;
        let srq_owner = self.select_srq(at, peer_at);
        let peer = self.qps[peer_at].as_ref()?;
        Some((user, Named { at: peer_at, qpn: peer.qpn }, srq_owner.unwrap_or(peer.owner)))
    }

    fn take_wanted(
        &mut self,
        at: usize,
        half: Half,
        ticket: u64,
        cancelled: &Arc<AtomicBool>,
    ) -> Option<Task> {
        let qp = self.qps[at].as_mut()?;
        match half {
            Half::Requester => qp.requester.launch(ticket, cancelled),
            Half::Responder => qp.responder.launch(ticket, cancelled),
            Half::Export | Half::Reply | Half::Target => qp.far_stage(half)?.launch(ticket, cancelled),
        }
    }

    /// A client's memory is gone: whoever waits for it goes on without.
    pub(super) fn lose_accesses(&mut self, client: usize) {
        let lost: Vec<_> = self.accesses.flights.extract_if(|_, flight| flight.client == client).collect();
        self.accesses.outbox.retain(|access| self.accesses.flights.contains_key(&access.ticket));
        for (_, flight) in lost {
            if let Some(user) = self.named_mut(flight.user).filter(|_| flight.half == Half::Requester) {
                user.requester.lose_access();
                self.stop_waiting(flight.user.at);
                self.schedule.enqueue(flight.user.at);
            }
        }
    }

    pub(super) fn named_mut(&mut self, name: Named) -> Option<&mut Qp> {
        self.qps.get_mut(name.at)?.as_mut().filter(|qp| qp.qpn == name.qpn)
    }

    /// Delivers datagrams that wait for foreign memory.
    pub(super) fn deliver(&mut self, at: usize) {
        loop {
            let Some(qp) = self.qps[at].as_mut() else { return };
            let Some(client) = self.clients[qp.owner].as_ref() else { return };
            match qp.responder.deliver(&client.memory) {
                None => return,
                Some(Reply::Foreign) => return self.launch(at, Half::Responder),
                Some(_) => self.heed(Some(at)),
            }
        }
    }
}

impl Qp {
    /// The stage of an access that belongs to a connection to another host.
    fn far_stage(&mut self, half: Half) -> Option<&mut Stage> {
        let far = self.far.as_mut()?;
        match half {
            Half::Export => Some(far.initiator.send_stage()),
            Half::Reply => Some(far.initiator.reply_stage()),
            Half::Target => Some(&mut far.target.stage),
            Half::Requester | Half::Responder => None,
        }
    }
}
