//! Direct mode, as the router sees it: pairing at RTR, the seat token's way back and forth, revocation.
//!
//! Only the owner or the router executes a QP's send queue. `held` says that the router's halves are current:
//! it holds the seat and has resumed from the shared words.

use verbs_abi::{
    proto::DirectPeer,
    shm::barrier,
    verbs::{EventType, QpState},
};

use super::{Fabric, Qp};
use crate::Memory;

impl<M: Memory> Fabric<M> {
    /// Pairs a QP that enters RTR with its peer, if both clients are of one tenant and want direct mode.
    pub(super) fn connect_direct(&mut self, at: usize) -> Option<(DirectPeer, u32)> {
        let peer_at = self.direct_peer(at)?;
        let qp = self.qps[at].as_ref()?;
        let peer = self.qps[peer_at].as_ref()?;
        let other = self.clients[peer.owner].as_ref()?;
        let cq = other.cqs.get(&peer.create.recv_cq)?;
        let direct = DirectPeer {
            client: other.id,
            qpn: peer.qpn,
            offset: peer.offset,
            geometry: peer.geometry,
            pd: peer.create.pd,
            cq_offset: cq.offset,
            recv_slot: peer.rings[1],
        };
        let recv_cq = peer.create.recv_cq;
        let (owner, peer_owner) = (qp.owner, peer.owner);
        self.qps[at].as_mut()?.direct = Some(peer_at);
        self.qps[peer_at].as_mut()?.attached.push(at);
        self.clients[owner].as_mut()?.paired.insert(at);
        self.clients[peer_owner].as_mut()?.paired.insert(peer_at);
        Some((direct, recv_cq))
    }

    /// Ends direct connections from and to a QP; what owners did so far counts.
    pub(super) fn disconnect(&mut self, at: usize) {
        let held = self.hold_seat(at);
        let Some(qp) = self.qps[at].as_mut() else { return };
        if !held {
            qp.requester.area().header.seat().take_from_dead();
            qp.held = true;
            let _ = qp.requester.resume();
        }
        if let Some(peer) = qp.direct.take().and_then(|peer| self.qps[peer].as_mut()) {
            peer.attached.retain(|other| *other != at);
            if !held {
                peer.responder.roll_forward();
            }
        }
        let attached = self.qps[at].as_mut().map(|qp| std::mem::take(&mut qp.attached)).unwrap_or_default();
        for other in attached {
            // An owner that runs finds that nobody answers; it loses the seat as soon as it does not run.
            let held = self.hold_seat(other);
            if let Some(qp) = self.qps[other].as_mut() {
                qp.direct = None;
                qp.peer = None;
            }
            if held {
                self.schedule.enqueue(other);
            } else {
                self.look_again(other);
            }
        }
    }

    /// Takes the seat of a QP from its idle owner and goes on where it stopped. False: the owner runs.
    ///
    /// A failure that the owner left has its consequences at the next turn: they reach other QPs whose owners left
    /// failures, too, and a client can make long chains of such.
    pub(super) fn hold_seat(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        if qp.held {
            return true;
        }
        if !qp.requester.area().header.seat().take() {
            return false;
        }
        qp.held = true;
        let sane = qp.requester.resume();
        let verdict = qp.requester.take_verdict();
        let peer_at = qp.direct;
        if let Some(peer) = peer_at.and_then(|peer| self.qps[peer].as_mut()) {
            peer.responder.catch_up();
        }
        self.notice_overruns(at, peer_at);
        if !sane {
            self.raise(at, EventType::QpFatal);
            self.condemn(at);
        } else if let Some(verdict) = verdict {
            self.condemn(at);
            if let Some(peer_at) = peer_at.filter(|peer| verdict.peer_failed && self.are_connected(at, *peer))
            {
                if let Some(event) = verdict.peer_event {
                    self.raise(peer_at, event);
                }
                self.condemn(peer_at);
            }
        }
        true
    }

    /// Acts on the failures that the owners of a QP and of its peer left: who polled the completion of such a
    /// failure finds the state that goes with it.
    pub(super) fn settle(&mut self, at: usize) {
        let peer = self.qps[at].as_ref().and_then(|qp| self.qpn_index.get(&qp.attr.dest_qp_num)).copied();
        for at in peer.into_iter().chain([at]) {
            if self.qps[at].as_ref().is_some_and(Qp::has_failed_direct) {
                self.borrow_seat(at);
            }
        }
    }

    /// Whether a QP's peer wants it, too: an owner's word may fail no other.
    fn are_connected(&self, at: usize, peer_at: usize) -> bool {
        let (qp, peer) = (self.qps[at].as_ref(), self.qps[peer_at].as_ref());
        qp.zip(peer).is_some_and(|(qp, peer)| peer.responder.accepts(qp.qpn) && peer.state.may_respond())
    }

    /// Gives the seat to the owner of a direct QP that is in RTS with nothing left to do, if it still may have it.
    pub(super) fn give_seat(&mut self, at: usize) {
        if !self.may_stay_direct(at) {
            return self.part(at);
        }
        let Some(qp) = self.qps[at].as_mut() else { return };
        let ready = qp.direct.is_some() && qp.held && qp.state == QpState::Rts && qp.waiting.is_none();
        if !ready || qp.requester.has_work() {
            return;
        }
        qp.held = false;
        qp.requester.area().header.seat().give();
        // The owner that saw the old value has rung; what it posted is taken up here or at that doorbell.
        if qp.requester.has_work() && self.hold_seat(at) {
            self.schedule.enqueue(at);
        }
    }

    /// Asks for the seats of QPs and of those that execute on them, before each is taken: one fence for all.
    pub(super) fn ask_for_seats(&self, qps: &[usize]) {
        let found = |at: usize| self.qps[at].as_ref();
        let attached = qps.iter().filter_map(|at| found(*at)).flat_map(|qp| qp.attached.iter().copied());
        let all = qps.iter().copied().chain(attached).filter_map(found).filter(|qp| !qp.held);
        if all.filter(|qp| qp.requester.area().header.seat().ask()).count() > 0 {
            barrier::heavy();
        }
    }

    /// Whether the receive side of a QP is the router's: no owner of a peer executes on it now.
    pub(super) fn seize_receives(&mut self, at: usize) -> bool {
        let attached = self.qps[at].as_ref().map(|qp| qp.attached.clone()).unwrap_or_default();
        // All of them, also behind one that runs.
        attached.into_iter().filter(|other| !self.borrow_seat(*other)).count() == 0
    }

    /// Takes a seat until the QP's next turn, which gives it back. False: the owner runs.
    fn borrow_seat(&mut self, at: usize) -> bool {
        let before = self.qps[at].as_ref().is_some_and(|qp| qp.held);
        let held = self.hold_seat(at);
        if held && !before {
            self.schedule.enqueue(at);
        }
        held
    }

    /// Takes the receive side of a client's QP back from a direct peer. False: the peer runs at this moment;
    /// ask again soon. Bounded by the caller: a stopped peer must stop nobody.
    pub fn seize(&mut self, client: u32, qpn: u32) -> bool {
        match self.owned(client, qpn) {
            Some(at) => {
                let _ = self.halt_shadow(at);
                self.seize_receives(at)
            }
            None => true,
        }
    }

    /// The clients whose threads execute on a client's QPs or memory at this moment, itself among them.
    #[must_use]
    pub fn executing_on(&self, client: u32) -> Vec<u32> {
        let Some(at) = self.client_index.get(&client) else { return Vec::new() };
        let own = self.clients[*at].iter().flat_map(|client| client.slots.iter().flatten().copied());
        let all =
            own.flat_map(|at| self.qps[at].iter().flat_map(|qp| qp.attached.iter().copied()).chain([at]));
        let mut running: Vec<u32> = all
            .filter_map(|at| self.qps[at].as_ref())
            .filter(|qp| !qp.held && qp.requester.area().header.seat().is_running())
            .filter_map(|qp| self.clients[qp.owner].as_ref().map(|owner| owner.id))
            .collect();
        running.sort_unstable();
        running.dedup();
        running
    }

    /// Whether nobody executes on a client's memory outside the router: no direct peer, and no thread of its own.
    /// True once is enough after a key was invalidated.
    pub fn is_quiet(&mut self, client: u32) -> bool {
        let Some(&owner) = self.client_index.get(&client) else { return true };
        let paired: Vec<usize> =
            self.clients[owner].iter().flat_map(|client| client.paired.clone()).collect();
        self.ask_for_seats(&paired);
        let mut quiet = true;
        for at in paired {
            quiet &= self.seize_receives(at) & self.borrow_seat(at);
            let is_single = self.qps[at]
                .as_ref()
                .is_none_or(|qp| qp.held && qp.direct.is_none() && qp.attached.is_empty());
            if is_single && let Some(client) = self.clients[owner].as_mut() {
                client.paired.remove(&at);
            }
        }
        quiet
    }
}

impl Qp {
    /// Whether its owner met a failure that is not acted upon yet.
    pub(super) fn has_failed_direct(&self) -> bool {
        !self.held && self.requester.has_verdict()
    }
}
