//! QPs whose peers live on other hosts: their turns, and what the host must know of its links.
//!
//! A peer router has a number, which the host gives it. The host asks for what is to be sent to it
//! ([`Fabric::take_packets`]), hands over what has come from it ([`Fabric::receive`]), and says when the link comes
//! and goes. Leaves to others: what a packet does (`wire`, `arrive`), which router serves an address ([`Routing`]).

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt::Debug,
    sync::Arc,
};

use verbs_abi::{
    proto::Gid,
    shm::wqe::flag,
    verbs::{EventType, Opcode, QpState, QpType},
};

use super::{Fabric, Qp, access::Half, calls::Calls, control::Controls, schedule::WORK};
use crate::{
    Attempt, Memory,
    shadow::{Shadow, Stage},
    wire::{
        Condition, Delay, Emit, Initiator, LATE, Late, Load, Located, Outbox, Outcome, Path, Pieces, Place,
        Reaped, Target,
        packet::{Header, Kind, SOLICITED},
    },
};

/// Bits of a sequence number that two QPs agree on.
const PSN: u32 = (1 << 24) - 1;

/// The ends of a packet that is between hosts themselves.
const NOBODY: Path = Path { tenant: 0, source_qpn: 0, target_qpn: 0, sgid: [0; 16], dgid: [0; 16] };

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

/// One of the streams of the link to a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stream {
    /// The router, by the number that the host gave it.
    pub peer: u32,
    /// Which of its streams.
    pub index: u32,
}

impl Stream {
    /// The one that carries what belongs to no connection.
    #[must_use]
    pub const fn first(peer: u32) -> Self {
        Self { peer, index: 0 }
    }
}

/// A connection to a QP of another host.
#[derive(Debug)]
pub(super) struct Far {
    /// The router there.
    pub(super) peer: u32,
    /// What chooses its stream.
    spread: u32,
    pub(super) path: Path,
    pub(super) initiator: Initiator,
    pub(super) target: Target,
    /// Among those that owe their peers something.
    owing: bool,
    delay: Delay,
    /// What a NIC does for it.
    pub(super) shadow: Option<Box<Shadow>>,
}

/// All links.
#[derive(Debug, Default)]
pub(super) struct Links {
    pub(super) routing: Option<Arc<dyn Routing>>,
    pub(super) controls: Option<Arc<dyn Controls>>,
    links: Vec<Link>,
    /// Streams of a link, as this router would have it.
    streams: u32,
    /// QPs that owe their peers something, by index and number.
    owing: Vec<(usize, u32)>,
    /// QPs whose acknowledgements wait for a request: until when, index and number. Also of those that wait no longer.
    delayed: VecDeque<(u64, usize, u32)>,
    /// Streams over which something is to be sent.
    calls: Calls,
    /// Streams for whose room QPs stand in line.
    lines: BTreeSet<Stream>,
    next_stream: u32,
}

/// The link to one router.
#[derive(Debug, Default)]
struct Link {
    /// Streams that both ends have agreed upon; 0 before they have.
    agreed: u32,
    /// Tenants that both ends have: the peer's number, and ours.
    tenants: HashMap<u32, u32>,
    outboxes: Vec<Outbox>,
    figures: LinkFigures,
}

/// What a link is like, for `freeflow status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkFigures {
    /// Packets that were sent more than once.
    pub repeated: u64,
    /// From here to the router and back, through all queues, when last looked: ns.
    pub round_trip: Option<u64>,
}

impl Links {
    fn link(&mut self, peer: u32) -> &mut Link {
        let at = peer as usize;
        if self.links.len() <= at {
            self.links.resize_with(at + 1, Link::default);
        }
        &mut self.links[at]
    }

    /// The stream of a link that a spread leads to. Packets between the same two QPs take the same one, either way.
    pub(super) fn stream(&mut self, peer: u32, spread: u32) -> Stream {
        let own = self.streams.max(1);
        let agreed = self.link(peer).agreed;
        let count = if agreed == 0 { own } else { agreed };
        Stream { peer, index: spread % count }
    }

    pub(super) fn outbox(&mut self, stream: Stream) -> &mut Outbox {
        let at = stream.index as usize;
        let outboxes = &mut self.link(stream.peer).outboxes;
        if outboxes.len() <= at {
            outboxes.resize_with(at + 1, Outbox::default);
        }
        &mut outboxes[at]
    }

    /// Whether a router has a tenant of ours.
    pub(super) fn has_tenant(&mut self, peer: u32, ours: u32) -> bool {
        self.link(peer).tenants.values().any(|tenant| *tenant == ours)
    }

    /// Our number of a tenant of a router's.
    pub(super) fn tenant(&mut self, peer: u32, theirs: u32) -> Option<u32> {
        self.link(peer).tenants.get(&theirs).copied()
    }

    /// A QP waits for room in a stream.
    fn stand_in_line(&mut self, stream: Stream, qpn: u32) {
        self.outbox(stream).wait(qpn);
        self.lines.insert(stream);
        self.call(stream);
    }

    /// Something is to be sent over a stream.
    pub(super) fn call(&mut self, stream: Stream) {
        self.calls.insert(stream);
    }
}

/// What spreads connections over the streams of a link: the same at both ends.
pub(super) fn spread(path: &Path) -> u32 {
    let sum =
        |gid: &Gid| gid.iter().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
    let both = path.source_qpn.wrapping_add(path.target_qpn);
    let ends = both.wrapping_add(sum(&path.sgid)).wrapping_add(sum(&path.dgid));
    // Fibonacci hashing: numbers in a row, or every second one, come out evenly.
    ends.wrapping_mul(0x9e37_79b9) >> 16
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

    /// Sets how many streams a link has, unless its other end wants fewer.
    pub fn set_streams(&mut self, streams: u32) {
        self.links.streams = streams.max(1);
    }

    /// A stream of the link to a router is there. `streams`: how many both ends agree to have. `tenants`: the router's
    /// number of each tenant that both have, and ours.
    pub fn link_up(&mut self, stream: Stream, streams: u32, tenants: HashMap<u32, u32>) {
        self.links.link(stream.peer).tenants = tenants;
        self.agree(stream.peer, streams);
        self.links.outbox(stream).open();
        if stream == Stream::first(stream.peer)
            && let Some(controls) = &self.links.controls
        {
            controls.link_up(stream.peer);
        }
        if stream == Stream::first(stream.peer) {
            self.tell_groups(stream.peer);
        }
        self.interrupt(stream.peer, Some(stream.index));
    }

    /// Asks the router at the other end of a stream for a sign of life.
    pub fn ping(&mut self, stream: Stream, now: u64) {
        let ping =
            Header { operands: [now, 0], imm: stream.index, ..Header::new(Kind::Ping, 0, &NOBODY, 0, 0) };
        let outbox = self.links.outbox(stream);
        if outbox.has_reply_room() {
            outbox.push(&ping);
            self.links.call(stream);
        }
    }

    /// A router asks for a sign of life, or gives one.
    pub(super) fn take_ping(&mut self, peer: u32, header: &Header) {
        if header.kind == Kind::Pong {
            let round_trip = self.now.checked_sub(header.operands[0]);
            return self.links.link(peer).figures.round_trip = round_trip;
        }
        let stream = self.links.stream(peer, header.imm);
        let outbox = self.links.outbox(stream);
        if outbox.has_reply_room() {
            outbox.push(&Header { kind: Kind::Pong, ..*header });
            self.links.call(stream);
        }
    }

    /// What the link to a router is like.
    pub fn link_figures(&mut self, peer: u32) -> LinkFigures {
        self.links.link(peer).figures
    }

    /// So many streams the link to a router has. Where they were others before, all take new ones.
    pub fn agree(&mut self, peer: u32, streams: u32) {
        let own = self.links.streams.max(1);
        let link = self.links.link(peer);
        let before = if link.agreed == 0 { own } else { link.agreed };
        link.agreed = streams.max(1);
        if before != link.agreed {
            self.interrupt(peer, None);
            (0..before).for_each(|index| self.let_all_go_on(Stream { peer, index }));
        }
    }

    /// A stream is not there. `awaited`: it will be soon, and what is to be sent waits; else what is unreliable is lost.
    pub fn link_down(&mut self, stream: Stream, awaited: bool) {
        self.links.outbox(stream).close(if awaited { Condition::Awaited } else { Condition::Down });
        self.interrupt(stream.peer, Some(stream.index));
    }

    /// What was on its way over a stream, or all of a link, is lost: all of its QPs send again what was not
    /// acknowledged.
    fn interrupt(&mut self, peer: u32, index: Option<u32>) {
        for at in 0..self.qps.len() {
            let Some(qp) = self.qps[at].as_mut() else { continue };
            let Some(far) = qp.far.as_mut().filter(|far| far.peer == peer) else { continue };
            let own = self.links.stream(peer, far.spread).index;
            if index.is_none_or(|index| index == own) {
                far.target.interrupt();
                far.initiator.rewind();
                self.schedule.enqueue(at);
                self.resume_shadow(at);
            }
        }
        if let Some(index) = index {
            self.let_all_go_on(Stream { peer, index });
        }
    }

    pub(super) fn has_calls(&self) -> bool {
        !self.links.calls.is_empty() || !self.links.owing.is_empty()
    }

    /// A stream over which something is to be sent, once.
    pub fn next_call(&mut self) -> Option<Stream> {
        self.links.calls.take_next()
    }

    /// Takes what is to be sent over a stream: whole packets, one after the other. False: nothing. As many of those that
    /// waited have their turns then as there is room for.
    pub fn take_packets(&mut self, stream: Stream, into: &mut Vec<u8>) -> bool {
        into.clear();
        let (mut load, mut pieces) = (Load::default(), Pieces::default());
        if !self.load_packets(stream, &mut load) {
            return false;
        }
        while !load.is_empty() {
            self.list(&mut load, &mut pieces);
            let count = pieces.copy(into);
            if load.late().any(|late| !self.is_intact(late)) {
                // The sender of what was copied is about to be dropped: whatever else was there is sent again.
                self.interrupt(stream.peer, Some(stream.index));
                into.clear();
                return false;
            }
            self.advance(&mut load, &pieces, count);
        }
        !into.is_empty()
    }

    /// The same, where payload stays in place: the load is then listed and written, bit by bit.
    pub fn load_packets(&mut self, stream: Stream, load: &mut Load) -> bool {
        if load.is_empty() {
            self.tell();
            self.links.outbox(stream).take(load);
            self.let_go_on(stream);
        }
        !load.is_empty()
    }

    /// So many bytes of what was listed were written. False: memory that a packet in the middle of being written comes
    /// from could not be read, and the stream must not go on.
    pub fn advance(&mut self, load: &mut Load, pieces: &Pieces, count: usize) -> bool {
        load.advance(pieces, count).is_none_or(|late| self.is_intact(&late))
    }

    /// Whether the client whose payload that is has all of its memory.
    fn is_intact(&self, late: &Late) -> bool {
        let qp = self.qps.get(late.qp).and_then(Option::as_ref);
        let client = qp.and_then(|qp| self.clients[qp.owner].as_ref());
        client.is_none_or(|client| client.memory.is_intact())
    }

    /// Lists the pieces of memory that are to be written to a socket next. They hold until something changes this
    /// fabric; before that, [`Self::advance`] must be told how much was written.
    pub fn list(&mut self, load: &mut Load, pieces: &mut Pieces) {
        load.list(pieces, |late, tell| {
            let qp = self.qps.get_mut(late.qp).and_then(Option::as_mut).filter(|qp| qp.qpn == late.qpn);
            let Some(qp) = qp else { return false };
            let Some(client) = self.clients[qp.owner].as_ref() else { return false };
            let Some(far) = qp.far.as_mut() else { return false };
            let located = far.initiator.locate(&mut qp.requester, &client.memory, late, tell);
            if located == Located::Gone {
                self.schedule.enqueue(late.qp);
            }
            located == Located::Here
        });
    }

    /// Gives turns to those that wait for a stream, as many as it has room for.
    fn let_go_on(&mut self, stream: Stream) {
        while let Some(qpn) = self.links.outbox(stream).call_next() {
            self.enqueue_called(qpn);
            let (index, schedule) = (&self.qpn_index, &self.schedule);
            if !index.get(&qpn).is_some_and(|at| schedule.has_turn(*at)) {
                self.links.outbox(stream).settle(|other| other != qpn);
            }
        }
    }

    /// Gives turns to all that wait for a stream.
    fn let_all_go_on(&mut self, stream: Stream) {
        let waiting = self.links.outbox(stream).dissolve_line();
        waiting.into_iter().for_each(|qpn| self.enqueue_called(qpn));
    }

    fn enqueue_called(&mut self, qpn: u32) {
        if let Some(at) = self.qpn_index.get(&qpn).copied() {
            self.stop_waiting(at);
            self.schedule.enqueue(at);
        }
    }

    /// Calls others in place of those that were called and wanted nothing.
    pub(super) fn move_lines_up(&mut self) {
        if self.links.lines.is_empty() {
            return;
        }
        for stream in std::mem::take(&mut self.links.lines) {
            let (index, schedule) = (&self.qpn_index, &self.schedule);
            let has_turn = |qpn: u32| index.get(&qpn).is_some_and(|at| schedule.has_turn(*at));
            if self.links.outbox(stream).settle(has_turn) {
                self.let_go_on(stream);
            }
            if self.links.outbox(stream).has_line() {
                self.links.lines.insert(stream);
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
            // What was copied for it belongs to what is executed anew.
            qp.copying = None;
            let _ = qp.requester.resume();
            qp.far = Some(Box::new(Far {
                peer,
                spread: spread(&path),
                path,
                initiator,
                target,
                owing: false,
                delay: Delay::default(),
                shadow: None,
            }));
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
        let stream = far.stream(&mut self.links);
        if far.target.owes() && far.target.tell(&far.path, self.links.outbox(stream), true) {
            self.links.call(stream);
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

    /// The stream that a QP's packets take.
    pub(super) fn stream_of(&mut self, at: usize) -> Option<Stream> {
        let far = self.qps[at].as_ref()?.far.as_ref()?;
        Some(far.stream(&mut self.links))
    }

    /// Lets a QP wait for its link.
    pub(super) fn await_room(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let qpn = qp.qpn;
        let Some(stream) = qp.far.as_ref().map(|far| far.stream(&mut self.links)) else { return };
        self.links.stand_in_line(stream, qpn);
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
        if let Some(far) = self.qps[at].as_ref().and_then(|qp| qp.far.as_ref()) {
            let stream = far.stream(&mut self.links);
            if self.links.outbox(stream).has_bytes() {
                self.links.call(stream);
            }
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
        let Some(qp) = self.qps[at].as_ref() else { return Emit::Idle };
        let Some(far) = qp.far.as_ref() else { return Emit::Idle };
        let goes_here = far.shadow.is_none() || far.initiator.is_next(&qp.requester);
        let takes_new = qp.state == QpState::Rts && goes_here;
        self.emit_now(at, (takes_new, now))
    }

    fn emit_now(&mut self, at: usize, when: (bool, u64)) -> Emit {
        let Some(qp) = self.qps[at].as_mut() else { return Emit::Idle };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Emit::Idle };
        let Some(far) = qp.far.as_mut() else { return Emit::Idle };
        let stream = far.stream(&mut self.links);
        let outbox = self.links.outbox(stream);
        if far.delay.due().is_some() && qp.requester.has_work() && outbox.has_reply_room() {
            far.target.tell(&far.path, outbox, false);
            far.delay.end(false);
        }
        let emit = far.initiator.emit(&mut qp.requester, &client.memory, &far.path, outbox, when, at);
        if matches!(emit, Emit::Sent(_)) {
            far.delay.answer(when.1);
        }
        let repeated = far.initiator.take_repeated();
        self.links.link(stream.peer).figures.repeated += repeated;
        emit
    }

    /// Begins the next work request of a QP whose others a NIC carries.
    pub(super) fn emit_one(&mut self, at: usize, now: u64) -> Emit {
        self.emit_now(at, (true, now))
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

    /// Lets the acknowledgement of a message that was executed wait for a request that goes the same way, where one can be
    /// expected: this end has nothing under way, and answers soon. False: it does not wait.
    pub(super) fn put_off_ack(&mut self, at: usize, header: &Header) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(far) = qp.far.as_mut().filter(|far| far.shadow.is_none() && !far.owing) else {
            return false;
        };
        let is_short = header.len == header.total && u64::from(header.len) < LATE;
        let may_wait = is_short && far.target.owes_ack_alone() && !far.initiator.has_begun();
        let due = far.delay.put_off(may_wait, self.now);
        self.links.delayed.extend(due.map(|due| (due, at, qp.qpn)));
        due.is_some()
    }

    /// When an acknowledgement that waits for a request must go by itself, ns.
    #[must_use]
    pub fn next_ack(&self) -> Option<u64> {
        self.links.delayed.front().map(|(due, ..)| *due)
    }

    /// Owes what has waited for long enough, and forgets what waits no longer.
    fn end_delays(&mut self) {
        while let Some(&(due, at, qpn)) = self.links.delayed.front() {
            let qp = self.qps.get_mut(at).and_then(Option::as_mut).filter(|qp| qp.qpn == qpn);
            let far = qp.and_then(|qp| qp.far.as_mut()).filter(|far| far.delay.due() == Some(due));
            if far.is_some() && due > self.now {
                return;
            }
            self.links.delayed.pop_front();
            if let Some(far) = far {
                far.delay.end(true);
                self.owe(at);
            }
        }
    }

    /// Notes that a QP may owe its peer something.
    pub(super) fn owe(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let waits = |far: &Far| far.delay.due().is_some() && far.target.owes_ack_alone();
        if let Some(far) = qp.far.as_mut().filter(|far| !far.owing && far.target.owes() && !waits(far)) {
            far.owing = true;
            self.links.owing.push((at, qp.qpn));
        }
    }

    /// Tells peers what they are owed, as far as there is room for it.
    pub(super) fn tell(&mut self) {
        self.end_delays();
        if self.links.owing.is_empty() {
            return;
        }
        let mut owing = std::mem::take(&mut self.links.owing);
        owing.retain(|(at, qpn)| {
            let qp = self.qps.get_mut(*at).and_then(Option::as_mut).filter(|qp| qp.qpn == *qpn);
            let Some(far) = qp.and_then(|qp| qp.far.as_mut()) else { return false };
            let stream = far.stream(&mut self.links);
            far.owing = !far.target.tell(&far.path, self.links.outbox(stream), false);
            far.delay.end(false);
            self.links.call(stream);
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
        let stream = self.links.stream(peer, qp.qpn.wrapping_mul(0x9e37_79b9) >> 16);
        let outbox = self.links.outbox(stream);
        if !outbox.has_room(qp.qpn) && outbox.condition != Condition::Down {
            let until = match patience {
                Patience::Endless => None,
                // Lost, as at a port that takes no more.
                Patience::For(ns) if outbox.is_stuck(self.now, ns) => return Ok(()),
                Patience::For(ns) => Some(self.now + ns),
            };
            self.links.stand_in_line(stream, qp.qpn);
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
        self.links.call(stream);
        shipped
    }
}

impl Far {
    /// The stream that its packets take.
    pub(super) fn stream(&self, links: &mut Links) -> Stream {
        links.stream(self.peer, self.spread)
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
