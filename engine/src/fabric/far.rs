//! QPs whose peers live on other hosts: their turns, and what the host must know of its links.
//!
//! A peer router has a number, which the host gives it. The host asks for what is to be sent to it
//! ([`Fabric::take_packets`]), hands over what has come from it ([`Fabric::receive`]), and says when the link comes
//! and goes. Leaves to others: what a packet does (`wire`, `arrive`), which router serves an address ([`Routing`]).

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Debug,
    sync::Arc,
};

use verbs_abi::{
    proto::Gid,
    shm::wqe::flag,
    verbs::{EventType, Opcode, QpState, QpType},
};

use super::{Fabric, Qp, access::Half, control::Controls, schedule::WORK};
use crate::{
    Attempt, Memory,
    shadow::{Shadow, Stage},
    wire::{
        Condition, Emit, Initiator, Outbox, Outcome, Path, Place, Reaped, Target,
        packet::{Header, Kind, SOLICITED},
    },
};

/// Bits of a sequence number that two QPs agree on.
const PSN: u32 = (1 << 24) - 1;

/// Which router serves an address.
pub trait Routing: Send + Sync + Debug {
    /// The number of the router behind which an address of a tenant lives; `None` for this one, and for addresses that
    /// nobody knows. Must not wait.
    fn route(&self, tenant: u32, gid: &Gid) -> Option<u32>;

    /// The numbers of all other routers that serve addresses of a tenant. Must not wait.
    fn routers(&self, tenant: u32) -> Vec<u32>;
}

/// How long a datagram waits for room on its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// As long as it takes.
    Endless,
    /// While the link has been stuck for less than so long, ns.
    For(u64),
}

/// A connection to a QP of another host.
#[derive(Debug)]
pub(super) struct Far {
    /// The router there.
    pub(super) peer: u32,
    pub(super) path: Path,
    pub(super) initiator: Initiator,
    pub(super) target: Target,
    /// Among those that owe their peers something.
    owing: bool,
    /// What a NIC does for it.
    pub(super) shadow: Option<Box<Shadow>>,
}

/// All links.
#[derive(Debug, Default)]
pub(super) struct Links {
    pub(super) routing: Option<Arc<dyn Routing>>,
    pub(super) controls: Option<Arc<dyn Controls>>,
    pub(super) outboxes: Vec<Outbox>,
    /// QPs that owe their peers something, by index and number.
    owing: Vec<(usize, u32)>,
    /// Routers that something is to be sent to.
    calls: BTreeSet<u32>,
    next_stream: u32,
}

impl Links {
    pub(super) fn outbox(&mut self, peer: u32) -> &mut Outbox {
        let at = peer as usize;
        if self.outboxes.len() <= at {
            self.outboxes.resize_with(at + 1, Outbox::default);
        }
        &mut self.outboxes[at]
    }

    /// Something is to be sent to a router.
    pub(super) fn call(&mut self, peer: u32) {
        self.calls.insert(peer);
    }
}

impl<M: Memory> Fabric<M> {
    /// Sets who knows which router serves an address.
    pub fn set_routing(&mut self, routing: Arc<dyn Routing>) {
        self.links.routing = Some(routing);
        self.reroute();
    }

    /// Addresses are known that were not: QPs that could not be connected to their peers may be now.
    pub fn reroute(&mut self) {
        (0..self.qps.len()).for_each(|at| self.admit_late_source(at));
        self.seek_members();
    }

    /// A link to a router is there. `tenants`: its number of each tenant that both have, and ours.
    pub fn link_up(&mut self, peer: u32, tenants: HashMap<u32, u32>) {
        self.links.outbox(peer).open(tenants);
        if let Some(controls) = &self.links.controls {
            controls.link_up(peer);
        }
        self.tell_groups(peer);
        self.interrupt(peer);
    }

    /// A link is not there. `awaited`: it will be soon, and what is to be sent waits; else what is unreliable is lost.
    pub fn link_down(&mut self, peer: u32, awaited: bool) {
        self.links.outbox(peer).close(if awaited { Condition::Awaited } else { Condition::Down });
        self.interrupt(peer);
    }

    /// What was on its way over a link is lost: all of its QPs send again what was not acknowledged.
    fn interrupt(&mut self, peer: u32) {
        for at in 0..self.qps.len() {
            let Some(qp) = self.qps[at].as_mut() else { continue };
            if let Some(far) = qp.far.as_mut().filter(|far| far.peer == peer) {
                far.target.interrupt();
                far.initiator.rewind();
                self.schedule.enqueue(at);
                self.resume_shadow(at);
            }
        }
        self.let_go_on(peer);
    }

    pub(super) fn has_calls(&self) -> bool {
        !self.links.calls.is_empty() || !self.links.owing.is_empty()
    }

    /// A router that something is to be sent to, once.
    pub fn next_call(&mut self) -> Option<u32> {
        self.links.calls.pop_first()
    }

    /// Takes what is to be sent to a router: whole packets, one after the other. False: nothing. Those that waited for
    /// room have their turns then.
    pub fn take_packets(&mut self, peer: u32, into: &mut Vec<u8>) -> bool {
        self.tell();
        let some = self.links.outbox(peer).take(into);
        self.let_go_on(peer);
        some
    }

    /// Gives turns to those that waited for a link.
    fn let_go_on(&mut self, peer: u32) {
        for (at, qpn) in self.links.outbox(peer).take_waiting() {
            if self.qps.get(at).is_some_and(|qp| qp.as_ref().is_some_and(|qp| qp.qpn == qpn)) {
                self.stop_waiting(at);
                self.schedule.enqueue(at);
            }
        }
    }

    /// The router behind which an address of another host lives.
    pub(super) fn route(&self, tenant: u32, gid: &Gid) -> Option<u32> {
        self.links.routing.as_ref()?.route(tenant, gid)
    }

    /// Finds out whether a QP's peer lives on another host, when it is connected.
    pub(super) fn connect_far(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let (qpn, dgid) = (qp.attr.dest_qp_num, qp.attr.ah_attr.dgid);
        let connects = qp.requester.qp_type().is_reliable() || qp.requester.qp_type() == QpType::Uc;
        if !connects || qp.far.is_some() || self.resolve(qp, qpn, &dgid).is_some() {
            return;
        }
        let Some(peer) = self.route(qp.tenant, &dgid) else { return };
        let gids = self.clients[qp.owner].as_ref().map_or(&[][..], |client| &client.gids);
        let sgid = gids.get(usize::from(qp.attr.ah_attr.sgid_index)).copied().unwrap_or_default();
        let path = Path { tenant: qp.tenant, source_qpn: qp.qpn, target_qpn: qpn, sgid, dgid };
        let (mut initiator, mut target) = (Initiator::default(), Target::default());
        target.start(u64::from(qp.attr.rq_psn & PSN));
        self.links.next_stream = self.links.next_stream.wrapping_add(1).max(1);
        initiator.start(self.links.next_stream, u64::from(qp.attr.sq_psn & PSN));
        self.stop_waiting(at);
        if let Some(qp) = self.qps[at].as_mut() {
            let _ = qp.requester.resume();
            qp.far = Some(Box::new(Far { peer, path, initiator, target, owing: false, shadow: None }));
        }
        self.attach_shadow(at);
        self.schedule.enqueue(at);
    }

    /// The send queue of a far QP becomes ready: its packets are counted from here.
    pub(super) fn start_far(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        if let Some(far) = qp.far.as_mut() {
            self.links.next_stream = self.links.next_stream.wrapping_add(1).max(1);
            far.initiator.start(self.links.next_stream, u64::from(qp.attr.sq_psn & PSN));
        }
        self.start_shadow(at);
    }

    /// The connection ends; what the peer is owed is told before.
    pub(super) fn disconnect_far(&mut self, at: usize) {
        let Some(mut far) = self.qps[at].as_mut().and_then(|qp| qp.far.take()) else { return };
        let outbox = self.links.outbox(far.peer);
        if far.target.owes() && far.target.tell(&far.path, outbox, true) {
            self.links.call(far.peer);
        }
        if let Some(shadow) = far.shadow.take() {
            self.bury_shadow(at, *shadow);
        }
    }

    /// One turn of a QP with a peer on another host. True: there is more.
    pub(super) fn serve_far(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        let mut more = self.continue_target(at, budget);
        match self.qps[at].as_ref().map(|qp| qp.state) {
            _ if self.has_shadow(at) => more |= self.serve_shadow(at, now, budget),
            Some(QpState::Rts | QpState::Sqd) => more |= self.initiate_at_pace(at, now, budget),
            Some(QpState::Sqe) => self.fail_sends(at),
            _ => {}
        }
        self.owe(at);
        let due = self.qps[at].as_mut().and_then(|qp| {
            let qp_due = qp.far.as_ref().map(|far| far.initiator.due(&mut qp.requester));
            let pause = qp.pace.pause(now).filter(|_| qp.requester.has_work());
            qp_due.flatten().into_iter().chain(pause).min()
        });
        self.set_due(at, due);
        more
    }

    /// Sends what its rate allows.
    fn initiate_at_pace(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        let Some(pace) = self.qps[at].as_ref().map(|qp| qp.pace) else { return false };
        if !pace.is_limited() {
            return self.initiate(at, now, budget);
        }
        if pace.pause(now).is_some() {
            return false;
        }
        let may = pace.most(*budget).max(WORK);
        let mut left = may;
        let more = self.initiate(at, now, &mut left);
        if let Some(qp) = self.qps[at].as_mut().filter(|_| left < may) {
            qp.pace.spend(may - left, now);
        }
        *budget = budget.saturating_sub(may - left);
        more && self.qps[at].as_ref().is_some_and(|qp| qp.pace.pause(now).is_none())
    }

    /// Keeps an armed timer that is early enough.
    pub(super) fn set_due(&mut self, at: usize, due: Option<u64>) {
        let armed = self.qps[at].as_ref().and_then(|qp| qp.waiting).flatten();
        if let Some(due) = due
            && armed.is_none_or(|armed| armed > due)
        {
            self.stop_waiting(at);
            self.set_waiting(at, Some(due));
        }
    }

    /// Executes packets that wait.
    fn continue_target(&mut self, at: usize, budget: &mut u64) -> bool {
        while *budget >= WORK {
            let first = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut()?.target.take_first());
            let Some(mut first) = first else { return false };
            let outcome = self.perform(at, &mut first.header, &first.payload);
            let moved = if let Outcome::Partly(moved) = outcome { moved } else { 0 };
            *budget = budget.saturating_sub(WORK + moved);
            if matches!(outcome, Outcome::Partly(_) | Outcome::NoRoom | Outcome::Foreign)
                && let Some(far) = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut())
            {
                far.target.put_back(first);
            }
            if !self.follow(at, outcome) {
                return false;
            }
        }
        true
    }

    /// Does what lets a packet that waits go on. True: it can at once.
    pub(super) fn follow(&mut self, at: usize, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Over | Outcome::Partly(_) => true,
            Outcome::Foreign => {
                self.launch(at, Half::Target);
                false
            }
            Outcome::NoRoom => {
                self.await_room(at);
                false
            }
            Outcome::NoReceive | Outcome::Refused(_) => false,
        }
    }

    /// Lets a QP wait for its link.
    pub(super) fn await_room(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(peer) = qp.far.as_ref().map(|far| far.peer) else { return };
        let qpn = qp.qpn;
        self.links.outbox(peer).wait(at, qpn);
        self.links.call(peer);
    }

    /// Sends what can be sent, and completes what was answered. True: there is more.
    pub(super) fn initiate(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        if !self.catch_up_far(at, now) {
            return false;
        }
        let mut more = true;
        while more && *budget >= WORK {
            match self.emit(at, now) {
                Emit::Sent(len) => *budget = budget.saturating_sub(WORK + len),
                Emit::Idle => more = false,
                Emit::NoRoom => {
                    self.await_room(at);
                    more = false;
                }
                Emit::Foreign => {
                    self.launch(at, Half::Export);
                    more = false;
                }
                Emit::Bad(_) => {
                    self.raise(at, EventType::QpFatal);
                    self.fail_all(at);
                    return false;
                }
            }
        }
        if let Some(far) = self.qps[at].as_ref().and_then(|qp| qp.far.as_ref())
            && self.links.outboxes.get(far.peer as usize).is_some_and(Outbox::has_bytes)
        {
            self.links.calls.insert(far.peer);
        }
        if !self.reap(at) {
            return false;
        }
        let drained = |qp: &Qp| qp.state == QpState::Sqd && !qp.has_begun();
        if self.qps[at].as_ref().is_some_and(drained) {
            self.end_drain(at);
        }
        more
    }

    /// Looks at the clock, and goes on with answers that waited for the requester's memory. False: the QP has failed.
    fn catch_up_far(&mut self, at: usize, now: u64) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(client) = self.clients[qp.owner].as_ref() else { return false };
        let Some(far) = qp.far.as_mut() else { return false };
        far.initiator.watch(&mut qp.requester, now);
        let placed = far.initiator.resume(&mut qp.requester, &client.memory);
        if placed == Place::Foreign {
            self.launch(at, Half::Reply);
        }
        self.reap(at)
    }

    fn emit(&mut self, at: usize, now: u64) -> Emit {
        let Some(qp) = self.qps[at].as_mut() else { return Emit::Idle };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Emit::Idle };
        let Some(far) = qp.far.as_mut() else { return Emit::Idle };
        let outbox = self.links.outbox(far.peer);
        let goes_here = far.shadow.is_none() || far.initiator.is_next(&qp.requester);
        let takes_new = qp.state == QpState::Rts && goes_here;
        far.initiator.emit(&mut qp.requester, &client.memory, &far.path, outbox, (takes_new, now))
    }

    /// Begins the next work request of a QP whose others a NIC carries.
    pub(super) fn emit_one(&mut self, at: usize, now: u64) -> Emit {
        let Some(qp) = self.qps[at].as_mut() else { return Emit::Idle };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Emit::Idle };
        let Some(far) = qp.far.as_mut() else { return Emit::Idle };
        let outbox = self.links.outbox(far.peer);
        far.initiator.emit(&mut qp.requester, &client.memory, &far.path, outbox, (true, now))
    }

    /// Completes what was answered. False: the QP has failed.
    pub(super) fn reap(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(client) = self.clients[qp.owner].as_ref() else { return false };
        let Some(far) = qp.far.as_mut() else { return false };
        match far.initiator.reap(&mut qp.requester, &client.memory) {
            Reaped::Well => true,
            Reaped::Failed => {
                self.set_failed(at, None);
                false
            }
        }
    }

    /// Notes that a QP may owe its peer something.
    pub(super) fn owe(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        if let Some(far) = qp.far.as_mut().filter(|far| !far.owing && far.target.owes()) {
            far.owing = true;
            self.links.owing.push((at, qp.qpn));
        }
    }

    /// Tells peers what they are owed, as far as there is room for it.
    pub(super) fn tell(&mut self) {
        if self.links.owing.is_empty() {
            return;
        }
        let mut owing = std::mem::take(&mut self.links.owing);
        owing.retain(|(at, qpn)| {
            let qp = self.qps.get_mut(*at).and_then(Option::as_mut).filter(|qp| qp.qpn == *qpn);
            let Some(far) = qp.and_then(|qp| qp.far.as_mut()) else { return false };
            far.owing = !far.target.tell(&far.path, self.links.outbox(far.peer), false);
            self.links.calls.insert(far.peer);
            far.owing
        });
        self.links.owing = owing;
    }

    /// A receive was posted, or the QP has become ready: a peer on another host that was refused may try again.
    /// False: the peer is not on another host.
    pub(super) fn welcome_far(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(far) = qp.far.as_mut() else { return false };
        if far.shadow.as_ref().is_some_and(|shadow| shadow.stage == Stage::Connected) {
            // Its NIC says so.
            return true;
        }
        far.target.welcome();
        self.owe(at);
        true
    }

    /// Sends the fetched datagram to another host, if its receiver lives there.
    pub(super) fn ship(&mut self, at: usize, opcode: Opcode) -> Result<(), Attempt> {
        let Some(qp) = self.qps[at].as_ref() else { return Ok(()) };
        let Some(peer) = self.route(qp.tenant, &qp.requester.address().dgid) else { return Ok(()) };
        self.ship_to(at, opcode, peer, Patience::Endless)
    }

    /// Sends it to that host.
    pub(super) fn ship_to(
        &mut self,
        at: usize,
        opcode: Opcode,
        peer: u32,
        patience: Patience,
    ) -> Result<(), Attempt> {
        let Some(qp) = self.qps[at].as_mut() else { return Ok(()) };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Ok(()) };
        let outbox = self.links.outbox(peer);
        if !outbox.has_room() && outbox.condition != Condition::Down {
            let until = match patience {
                Patience::Endless => None,
                // Lost, as at a port that takes no more.
                Patience::For(ns) if outbox.is_stuck(self.now, ns) => return Ok(()),
                Patience::For(ns) => Some(self.now + ns),
            };
            outbox.wait(at, qp.qpn);
            self.links.call(peer);
            return Err(Attempt::Wait(until));
        }
        let sgid_index = usize::from(qp.requester.address().sgid_index);
        let sgid = client.gids.get(sgid_index).copied().unwrap_or_default();
        let (tenant, source_qpn) = (qp.tenant, qp.qpn);
        let shipped = qp.requester.export_datagram(&client.memory, |wqe, fill| {
            let to = &wqe.address;
            let path = Path { tenant, source_qpn, target_qpn: to.qpn, sgid, dgid: to.dgid };
            let mut header = Header::new(Kind::Datagram, opcode.value() as u8, &path, 0, 0);
            (header.imm, header.rkey) = (wqe.imm, to.qkey);
            (header.len, header.total) = (wqe.length() as u32, wqe.length() as u32);
            if wqe.flags & flag::SOLICITED != 0 {
                header.flags |= SOLICITED;
            }
            let route = u64::from(to.hop_limit) | u64::from(to.traffic_class) << 8;
            header.operands = [u64::from(to.flow_label), route];
            outbox.push_with(&header, fill)
        });
        self.links.call(peer);
        shipped
    }
}

impl Qp {
    /// Whether a work request was begun: in SQD it is still brought to its end.
    pub(super) fn has_begun(&self) -> bool {
        match &self.far {
            Some(far) => {
                far.initiator.has_begun()
                    || far.shadow.as_ref().is_some_and(|shadow| shadow.sender.has_begun())
            }
            None => self.requester.has_begun(),
        }
    }
}
