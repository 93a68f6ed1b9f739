//! A lane's work: doorbells become turns, a turn executes a slice of one QP's send queue.

use verbs_abi::{
    proto::Gid,
    verbs::{EventType, QpState, QpType},
};

use super::{
    Fabric, Qp,
    access::Half,
    schedule::{QUANTUM, WORK},
    shared::counterpart,
};
use crate::{Attempt, Fetch, Memory, Requester, Responder, SLICE, responder::Notice};

/// Words of a client's doorbells that are taken at a time, 64 QPs each: a client that rings everywhere all the
/// time gets its QPs into its own line bit by bit.
const WORDS: usize = 1;
/// What a lane does between two looks at the doorbells, beside a quantum, for each client that must be looked at.
const LOOK: u64 = 1024;
/// Timers that are acted upon in one call of `run`.
const TIMERS: usize = 16;
/// Slices end at multiples of this, so that none ends within a word that must become visible whole.
const ALIGN: u64 = 64;

/// How soon to look again at a seat whose owner runs, ns.
const LOOK_AGAIN: u64 = 1_000_000;

/// Why a turn ended.
enum Turn {
    /// Nothing left.
    Empty,
    /// More to do, others first.
    Again,
    /// Comes back by itself.
    Waiting,
    /// It met an error, and some of what was posted was flushed.
    Failed,
}

impl<M: Memory> Fabric<M> {
    /// Takes all doorbells. True: some were rung.
    pub fn collect(&mut self) -> bool {
        let mut rung = std::mem::take(&mut self.rung);
        let mut rung_srqs = std::mem::take(&mut self.rung_srqs);
        let mut any = false;
        for client in self.clients.iter_mut().flatten() {
            if client.doorbells.pending() {
                any = true;
                let (slots, srqs) = (&client.slots, &client.srq_slots);
                let found = |slot: u32| match slots.get(slot as usize).copied().flatten() {
                    Some(at) => rung.push(at),
                    None => rung_srqs.extend(srqs.get(&slot)),
                };
                client.doorbells.take(&mut client.next_word, WORDS, found);
            }
        }
        for at in rung.drain(..) {
            self.answer(at);
        }
        for number in rung_srqs.drain(..) {
            self.answer_srq(number);
        }
        (self.rung, self.rung_srqs) = (rung, rung_srqs);
        any
    }

    /// A QP's owner rang: something posted, on either queue.
    fn answer(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let receives = qp.responder.has_receive();
        let waits = qp.responder.rings_me() && qp.responder.state().may_respond();
        self.schedule.enqueue(at);
        if receives && waits {
            self.poke_waiters_for(at);
        }
    }

    /// Lets the QP that waits for this one try again: its peer, for nobody else is answered.
    pub(super) fn poke_waiters_for(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        if qp.state != QpState::Err {
            qp.responder.set_ring_me(false);
        }
        if self.welcome_far(at) {
            return;
        }
        let Some(qp) = self.qps[at].as_ref() else { return };
        let waits = |other: &usize| {
            self.qps[*other].as_ref().is_some_and(|other| {
                other.attr.dest_qp_num == qp.qpn && other.tenant == qp.tenant && other.waiting.is_some()
            })
        };
        let peer = self.qpn_index.get(&qp.attr.dest_qp_num).copied().filter(waits);
        if let Some(peer) = peer
            && self.stop_waiting(peer)
        {
            self.schedule.enqueue(peer);
        }
    }

    /// Ends a QP's wait, and its timer with it. False: it did not wait.
    pub(super) fn stop_waiting(&mut self, at: usize) -> bool {
        let Some(until) = self.qps[at].as_mut().and_then(|qp| qp.waiting.take()) else { return false };
        if let Some(when) = until {
            self.schedule.cancel(when, at);
        }
        true
    }

    /// Gives a QP a turn soon: its owner is in the middle of something, and need not ring when it is done.
    pub(super) fn look_again(&mut self, at: usize) {
        self.stop_waiting(at);
        if let Some(qp) = self.qps[at].as_mut() {
            let when = self.now + LOOK_AGAIN;
            qp.waiting = Some(Some(when));
            self.schedule.set_timer(when, at);
        }
    }

    /// The earliest time at which a waiting QP must be looked at, ns.
    #[must_use]
    pub fn next_timer(&self) -> Option<u64> {
        self.schedule.next_timer().into_iter().chain(self.next_ack()).min()
    }

    /// The same, but for acknowledgements that wait: [`Self::next_ack`] tells when to look for those.
    #[must_use]
    pub fn next_turn(&self) -> Option<u64> {
        self.schedule.next_timer()
    }

    /// Whether [`Self::run`], [`Self::next_access`] or [`Self::next_call`] has something to do at once, doorbells
    /// left out.
    #[must_use]
    pub fn has_turns(&self) -> bool {
        self.schedule.len() > 0
            || self.has_accesses()
            || self.has_calls()
            || self.overruns.is_any()
            || self.has_waiting_datagrams()
    }

    /// Serves QPs for a while, until somebody else may have rung. True: there is more to do now.
    pub fn run(&mut self, now: u64) -> bool {
        self.now = now;
        let tells_more = self.hear_nic();
        self.expire_timers(now);
        self.heed_overruns();
        let look = QUANTUM.max(LOOK * self.client_index.len() as u64);
        let (mut used, mut next_look) = (0, look);
        while let Some(call) = self.schedule.next() {
            let mut budget = call.budget;
            let more = self.serve(call.at, now, &mut budget);
            // A turn that found nothing has cost something, too.
            let due = self.copies.due();
            let cost = (call.budget - budget).max(WORK).max(due.unwrap_or_default());
            self.schedule.charge(call.client, cost);
            if more {
                self.schedule.enqueue_again(call.at);
            }
            used += cost;
            if due.is_some() {
                break;
            }
            if used >= next_look {
                if used >= SLICE || self.is_rung() {
                    break;
                }
                next_look += look;
            }
        }
        self.spread_waiting();
        self.heed_overruns();
        self.move_lines_up();
        self.tell();
        let spreads = self.has_waiting_datagrams();
        tells_more || spreads || self.schedule.len() > 0 || self.next_timer().is_some_and(|when| when <= now)
    }

    /// Gives turns to QPs whose time has come, some at a time: many that are due together must not hold others up.
    fn expire_timers(&mut self, now: u64) {
        for _ in 0..TIMERS {
            let Some((when, at)) = self.schedule.expire(now) else { return };
            if let Some(qp) = self.qps.get_mut(at).and_then(Option::as_mut)
                && qp.waiting == Some(Some(when))
            {
                qp.waiting = None;
                self.schedule.enqueue(at);
            }
        }
    }

    /// Whether any client may have rung.
    fn is_rung(&self) -> bool {
        self.clients.iter().flatten().any(|client| client.doorbells.pending())
    }

    /// One QP's turn; what a failure brings with it costs all that was left of the budget. True: there is more.
    fn serve(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        // Whoever holds its seats: what is free of them is flushed, and the others are looked at again.
        if self.qps[at].as_ref().is_some_and(|qp| qp.state == QpState::Err) {
            *budget = 0;
            self.fail_all(at);
            return false;
        }
        if self.qps[at].as_ref().is_some_and(|qp| qp.responder.has_parcels()) {
            self.deliver(at);
        }
        if self.qps[at].as_ref().is_some_and(|qp| qp.far.is_some()) {
            return self.serve_far(at, now, budget);
        }
        if !self.may_serve(at) {
            if self.is_wanted(at) {
                self.look_again(at);
            }
            return false;
        }
        let Some(qp) = self.qps[at].as_ref() else { return false };
        match qp.state {
            QpState::Err => self.fail_all(at),
            QpState::Sqe => self.fail_sends(at),
            QpState::Rts | QpState::Sqd if qp.waiting.is_none() => match self.execute(at, now, budget) {
                Turn::Empty => {
                    self.rest(at);
                    return false;
                }
                Turn::Again => return true,
                Turn::Waiting => return false,
                Turn::Failed => {}
            },
            _ => return false,
        }
        *budget = 0;
        false
    }

    /// There is nothing to execute: the seat goes back, or the send queue is drained.
    fn rest(&mut self, at: usize) {
        match self.qps[at].as_ref().map(|qp| qp.state) {
            Some(QpState::Sqd) => self.end_drain(at),
            _ => self.give_seat(at),
        }
    }

    /// Whether the router executes this QP now; takes a parked or abandoned seat.
    fn may_serve(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_ref() else { return false };
        if qp.held {
            return true;
        }
        let header = &qp.requester.area().header;
        let parked = header.seat().is_router();
        let behind = header.sq_tail().load(std::sync::atomic::Ordering::SeqCst)
            != header.sq_head().load(std::sync::atomic::Ordering::SeqCst);
        (parked || behind || self.is_wanted(at)) && self.hold_seat(at)
    }

    /// Whether its owner has a seat that it may not have any more: its direct connection has ended or must end, or its
    /// send queue is to stand still.
    fn is_wanted(&self, at: usize) -> bool {
        self.qps[at]
            .as_ref()
            .is_some_and(|qp| !qp.held && (qp.state == QpState::Sqd || !self.may_stay_direct(at)))
    }

    /// Executes work requests until the turn is over.
    fn execute(&mut self, at: usize, now: u64, budget: &mut u64) -> Turn {
        while *budget >= WORK {
            let Some(qp) = self.qps[at].as_mut() else { return Turn::Empty };
            match qp.state {
                QpState::Rts => {}
                QpState::Sqd if qp.requester.has_begun() => {}
                QpState::Sqd => return Turn::Empty,
                // A datagram to itself that it could not receive.
                _ => return Turn::Failed,
            }
            let pause = qp.pace.pause(now);
            match qp.requester.fetch() {
                Fetch::Empty => return Turn::Empty,
                Fetch::Ready if pause.is_some() => {
                    self.set_waiting(at, pause);
                    return Turn::Waiting;
                }
                Fetch::Bad(_) => {
                    self.raise(at, EventType::QpFatal);
                    self.fail_all(at);
                    return Turn::Failed;
                }
                Fetch::Ready if qp.copying.is_some() => return Turn::Waiting,
                Fetch::Ready => {}
            }
            let (qp_type, limited, before) = (qp.requester.qp_type(), qp.pace.is_limited(), *budget);
            if limited {
                *budget = qp.pace.most(before);
            }
            if !limited && let Some(len) = self.set_aside(at, now) {
                // It may be more than one turn's.
                *budget = budget.saturating_sub(len);
                return Turn::Waiting;
            }
            let may = *budget;
            let attempt = match qp_type {
                QpType::Ud => self.send_datagram(at, budget),
                _ => self.attempt(at, now, budget),
            };
            if limited {
                *budget = before - self.spend(at, may - *budget, now, &attempt);
            }
            *budget = budget.saturating_sub(WORK) / ALIGN * ALIGN;
            match attempt {
                Attempt::Done => {}
                Attempt::Unfinished => return Turn::Again,
                Attempt::Wait(until) => {
                    if self.wait(at, until) {
                        return Turn::Waiting;
                    }
                }
                Attempt::Foreign(until) => {
                    self.launch(at, Half::Requester);
                    self.set_waiting(at, until);
                    return Turn::Waiting;
                }
                Attempt::Failed { peer_failed, peer_event } => {
                    self.set_failed(at, peer_failed.then_some(peer_event));
                    return Turn::Failed;
                }
            }
        }
        Turn::Again
    }

    /// Counts what an attempt has moved for the pace of a QP; a READ sends nothing but its request.
    fn spend(&mut self, at: usize, moved: u64, now: u64, attempt: &Attempt) -> u64 {
        if matches!(attempt, Attempt::Done | Attempt::Unfinished)
            && let Some(qp) = self.qps[at].as_mut()
        {
            let sent = match qp.requester.qp_type() {
                QpType::Ud => qp.requester.length(),
                _ if qp.requester.reads() => 0,
                _ => moved,
            };
            qp.pace.spend(sent, now);
        }
        moved
    }

    fn attempt(&mut self, at: usize, now: u64, budget: &mut u64) -> Attempt {
        let peer_at = self.resolve_peer(at);
        let srq_owner = peer_at.and_then(|peer_at| self.select_srq(at, peer_at));
        let Some((requester, owner, peer)) = halves(&mut self.qps, at, peer_at) else {
            return Attempt::Wait(None);
        };
        let Some(local) = self.clients[owner].as_ref() else { return Attempt::Wait(None) };
        let peer = peer.and_then(|(responder, owner)| {
            self.clients[srq_owner.unwrap_or(owner)].as_ref().map(|client| (responder, &client.memory))
        });
        let attempt = requester.attempt(&local.memory, peer, now, budget);
        self.heed(peer_at);
        attempt
    }

    /// Acts on what the responder of a request noticed beside it.
    #[inline]
    pub(super) fn heed(&mut self, peer_at: Option<usize>) {
        let Some(at) = peer_at else { return };
        let Some(qp) = self.qps[at].as_mut() else { return };
        let notice = qp.responder.take_notice();
        if qp.responder.shared().is_some() {
            self.heed_limit(at);
        }
        match notice {
            None => {}
            Some(Notice { failed: true, event }) => self.fail_responder(at, event),
            Some(Notice { failed: false, event }) => {
                event.into_iter().for_each(|event| self.raise(at, event))
            }
        }
    }

    /// Lets a QP wait. False: what it waits for has just come.
    fn wait(&mut self, at: usize, until: Option<u64>) -> bool {
        let peer_at = self.resolve_peer(at);
        let Some(qpn) = self.qps[at].as_ref().map(|qp| qp.qpn) else { return true };
        if let Some(peer) = peer_at.and_then(|peer| self.qps[peer].as_mut())
            && peer.responder.accepts(qpn)
        {
            peer.responder.set_ring_me(true);
            if peer.responder.may_receive(qpn) {
                return false;
            }
        }
        self.set_waiting(at, until);
        true
    }

    /// A QP has no turn until then, or until something ends its wait.
    pub(super) fn set_waiting(&mut self, at: usize, until: Option<u64>) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        qp.waiting = Some(until);
        if let Some(when) = until {
            self.schedule.set_timer(when, at);
        }
    }

    /// The send queue met an error; a peer that sent a NAK is in error, too, and may raise an event.
    pub(super) fn set_failed(&mut self, at: usize, peer: Option<Option<EventType>>) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let (peer_at, reliable) = (qp.direct.or(qp.peer), qp.requester.qp_type().is_reliable());
        if reliable {
            self.fail_all(at);
        } else {
            self.fail_sends(at);
        }
        if let (Some(event), Some(peer_at)) = (peer, peer_at) {
            self.fail_responder(peer_at, event);
        }
    }

    pub(super) fn fail_responder(&mut self, at: usize, event: Option<EventType>) {
        if let Some(event) = event {
            self.raise(at, event);
        }
        self.fail_all(at);
    }

    /// The connected peer: the QP with that number, of the same tenant, at that address.
    pub(super) fn resolve_peer(&mut self, at: usize) -> Option<usize> {
        let qp = self.qps[at].as_ref()?;
        let (qpn, dgid) = (qp.attr.dest_qp_num, qp.attr.ah_attr.dgid);
        if let Some(known) = qp.peer
            && self.qps[known].as_ref().is_some_and(|peer| peer.qpn == qpn && peer.tenant == qp.tenant)
        {
            return Some(known);
        }
        let found = self.resolve(qp, qpn, &dgid);
        if let Some(qp) = self.qps[at].as_mut() {
            qp.peer = found;
        }
        found
    }

    /// The QP with that number at that address, if this one may meet it.
    pub(super) fn resolve(&self, qp: &Qp, qpn: u32, dgid: &Gid) -> Option<usize> {
        let found = *self.qpn_index.get(&qpn)?;
        let peer = self.qps[found].as_ref()?;
        let same_type = peer.requester.qp_type() == counterpart(qp.requester.qp_type());
        let there = self.clients[peer.owner].as_ref()?.gids.contains(dgid);
        let near = peer.far.is_none();
        (same_type && peer.tenant == qp.tenant && there && near).then_some(found)
    }
}

/// The requester of one QP with the responder of another (or its own), and their owners.
pub(super) type Halves<'a> = (&'a mut Requester, usize, Option<(&'a mut Responder, usize)>);

pub(super) fn halves(qps: &mut [Option<Qp>], at: usize, peer_at: Option<usize>) -> Option<Halves<'_>> {
    match peer_at {
        Some(peer_at) if peer_at != at => {
            let [qp, peer] = qps.get_disjoint_mut([at, peer_at]).ok()?;
            let (qp, peer) = (qp.as_mut()?, peer.as_mut()?);
            Some((&mut qp.requester, qp.owner, Some((&mut peer.responder, peer.owner))))
        }
        other => {
            let qp = qps[at].as_mut()?;
            let own = other.map(|_| (&mut qp.responder, qp.owner));
            Some((&mut qp.requester, qp.owner, own))
        }
    }
}
