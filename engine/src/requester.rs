//! The requester half of a QP: a WQE becomes a request, the reply becomes a completion.
//!
//! Who may call it: the holder of the QP's seat token. The caller finds the peer, keeps the time and acts on
//! what [`Attempt`] says; this half counts its retries (`retry`) and says when to come back.

mod access;
mod ahead;
mod aside;
mod at_once;
mod datagram;
mod execute;

pub(crate) use ahead::{Obstacle, is_fenced};

use std::sync::atomic::Ordering;

use verbs_abi::{
    shm::{
        cqe::Cqe,
        queue::QueueArea,
        wqe::{Address, BadWqe, SendWqe, flag},
    },
    verbs::{AccessFlags, EventType, Opcode, QpType, WcOpcode, WcStatus},
};

use crate::{
    Completions, FLUSH, MAX_DATAGRAM, MAX_MESSAGE, Memory, Responder,
    memory::{Span, check_list},
    responder::{Flush, Reply, Request},
    retry::{Retries, Retry},
    stage::Stage,
    transfer::Side,
    window,
};

/// The bit of a work request's Q_Key that stands for the QP's own.
const OWN_QKEY: u32 = 1 << 31;

/// What lies at the head of the send queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Nothing.
    Empty,
    /// A work request, copied out and ready for [`Requester::attempt`].
    Ready,
    /// Something that is none: the QP cannot go on.
    Bad(BadWqe),
}

/// How an attempt to execute the fetched work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It completed, well.
    Done,
    /// The budget ran out in the middle; attempt again.
    Unfinished,
    /// It cannot complete now. Attempt again at the time given, if any, or when the peer changes.
    Wait(Option<u64>),
    /// Foreign memory must be accessed first. Attempt again when that is done or at the time given.
    Foreign(Option<u64>),
    /// It completed with an error. The QP goes to ERR (RC) or SQE; a connected peer that sent a NAK goes to
    /// ERR too and raises the event.
    Failed {
        /// Whether the peer's QP is in error as well.
        peer_failed: bool,
        /// The event that the peer raises.
        peer_event: Option<EventType>,
    },
}

/// What an owner's failed attempt means for the peer; left in the header for the router to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the peer's QP is in error as well.
    pub peer_failed: bool,
    /// The event that the peer raises.
    pub peer_event: Option<EventType>,
}

/// Payload moved, for `freeflow status`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) rnr_naks: u64,
    pub(crate) timeouts: u64,
}

/// The requester half.
#[derive(Debug)]
pub struct Requester {
    qpn: u32,
    qp_type: QpType,
    pd: u32,
    /// READs and atomics that may be outstanding; without any there are none.
    max_rd_atomic: u8,
    /// In the owner's seat what must wait is the router's business, counters included.
    owner: bool,
    area: QueueArea,
    completions: Completions,
    /// Block of the SQ's head.
    head: u64,
    /// WQEs finished.
    done: u64,
    wqe: Box<SendWqe>,
    /// Whether `wqe` holds the WQE at the head.
    fetched: bool,
    spans: Vec<Span>,
    /// Bytes of it that are placed.
    placed: u64,
    retry: Retry,
    /// What accesses to foreign memory have brought for it.
    stage: Stage,
    messages: u64,
    bytes: u64,
}

impl Requester {
    /// The requester half of the QP at `area`, with nothing executed yet.
    #[must_use]
    pub fn new(qpn: u32, qp_type: QpType, pd: u32, area: QueueArea, completions: Completions) -> Self {
        Self {
            qpn,
            qp_type,
            pd,
            max_rd_atomic: 0,
            owner: false,
            area,
            completions,
            head: 0,
            done: 0,
            wqe: Box::default(),
            fetched: false,
            spans: Vec::new(),
            placed: 0,
            retry: Retry::default(),
            stage: Stage::default(),
            messages: 0,
            bytes: 0,
        }
    }

    /// The same half in the owner's seat: an attempt that must wait counts nothing, for the router repeats it.
    #[must_use]
    pub fn in_owners_seat(mut self) -> Self {
        self.owner = true;
        self
    }

    /// Sets the attributes that concern requests (router).
    pub(crate) fn configure(&mut self, retries: Retries, max_rd_atomic: u8) {
        self.retry.set(retries);
        self.max_rd_atomic = max_rd_atomic;
        self.area.header.initiator_depth().store(max_rd_atomic.into(), Ordering::Relaxed);
    }

    /// Takes a work request that never lay in the queue, which must be empty (owner). The box given back is for the
    /// next one to be built in.
    #[inline]
    pub fn offer(&mut self, wqe: &mut Box<SendWqe>) {
        debug_assert!(!self.fetched);
        std::mem::swap(&mut self.wqe, wqe);
        self.wqe.blocks = 0;
        (self.fetched, self.placed) = (true, 0);
    }

    /// Gives a work request that was offered and not completed back (owner), for the queue.
    pub fn withdraw(&mut self, wqe: &mut Box<SendWqe>) {
        std::mem::swap(&mut self.wqe, wqe);
        self.fetched = false;
        self.stage.clear();
    }

    /// Whether everything up to block `tail` is executed.
    #[inline]
    #[must_use]
    pub fn is_at(&self, tail: u64) -> bool {
        self.head == tail && !self.fetched
    }

    /// Publishes how far it got, for the next holder of the seat.
    #[inline]
    pub fn save(&self) {
        let header = &self.area.header;
        header.sq_completions().store(self.completions.count(), Ordering::Relaxed);
        header.sq_done().store(self.done, Ordering::Relaxed);
        header.sq_head().store(self.head, Ordering::Release);
    }

    /// Goes on where the last holder of the seat stopped. False: the header holds counts that cannot be.
    pub fn resume(&mut self) -> bool {
        let header = &self.area.header;
        let head = header.sq_head().load(Ordering::Acquire);
        let ahead = header.sq_tail().load(Ordering::Acquire).wrapping_sub(head);
        self.head = head;
        self.done = header.sq_done().load(Ordering::Relaxed);
        self.completions.seek(header.sq_completions().load(Ordering::Relaxed));
        self.fetched = false;
        self.placed = 0;
        self.stage.clear();
        ahead <= u64::from(self.area.geometry().sq_blocks)
    }

    /// Starts anew after RESET (router).
    pub(crate) fn reset(&mut self) {
        let header = &self.area.header;
        header.sq_tail().store(0, Ordering::Relaxed);
        for word in [header.sq_head(), header.sq_done(), header.sq_completions(), header.journal_wqe()] {
            word.store(0, Ordering::Relaxed);
        }
        header.verdict().store(0, Ordering::Relaxed);
        self.area.sq_cqes.clear();
        let _ = self.resume();
    }

    /// Whether the CQ of its completions has overrun.
    pub(crate) fn has_overrun(&self) -> bool {
        self.completions.is_overrun()
    }

    /// Its completions that are not polled never will be (router).
    pub(crate) fn forget_unpolled(&self) {
        let [polled, _] = self.area.header.polled();
        self.completions.forget(polled.load(Ordering::Relaxed));
    }

    /// Copies the WQE at the head out, unless that is done already.
    #[inline]
    pub fn fetch(&mut self) -> Fetch {
        if self.fetched {
            return Fetch::Ready;
        }
        match self.area.read_send(self.head, &mut self.wqe) {
            Ok(false) => Fetch::Empty,
            Err(bad) => Fetch::Bad(bad),
            Ok(true) => {
                (self.fetched, self.placed) = (true, self.placed_before());
                self.retry.begin();
                Fetch::Ready
            }
        }
    }

    /// Bytes of the fetched WQE that the last holder of the seat has placed.
    #[inline]
    fn placed_before(&self) -> u64 {
        let header = &self.area.header;
        if header.journal_wqe().load(Ordering::Relaxed) != self.done.wrapping_add(1) {
            return 0;
        }
        header.journal_placed().load(Ordering::Relaxed).min(self.wqe.length())
    }

    /// The SRQ that the fetched work request names (XRC).
    pub(crate) fn srqn(&self) -> u32 {
        self.wqe.srqn
    }

    /// Whether what was fetched last is a READ.
    pub(crate) fn reads(&self) -> bool {
        u32::from(self.wqe.opcode) == Opcode::Read.value()
    }

    /// Bytes of what was fetched last.
    pub(crate) fn length(&self) -> u64 {
        self.wqe.length()
    }

    /// Where the fetched datagram goes.
    pub(crate) fn address(&self) -> &Address {
        &self.wqe.address
    }

    /// Executes the fetched WQE against the connected peer, or finds no peer. `now` in ns; uses up `budget` bytes.
    pub fn attempt<M: Memory>(
        &mut self,
        local: &M,
        peer: Option<(&mut Responder, &M)>,
        now: u64,
        budget: &mut u64,
    ) -> Attempt {
        if self.stage.in_flight() {
            return self.await_access(now);
        }
        if let Some(until) = self.retry.pause(now)
            && !peer.as_ref().is_some_and(|(responder, _)| responder.may_receive(self.qpn))
        {
            // It was woken too early: until then nothing is sent, and nothing counts.
            return Attempt::Wait(Some(until));
        }
        if let Some((responder, remote)) = &peer
            && self.write_at_once(local, responder, *remote, *budget)
        {
            *budget -= self.wqe.length();
            self.succeed(Opcode::Write, self.wqe.length());
            return Attempt::Done;
        }
        if self.owner && self.qp_type == QpType::Uc {
            // Nobody answers a UC request, so a peer that fails because of it is not told of by its completion: what may
            // end so is the router's.
            return Attempt::Wait(None);
        }
        let opcode = match self.check(local) {
            Ok(opcode) => opcode,
            Err(status) => return self.fail(status, false, None),
        };
        let before = self.placed;
        let reply = match peer {
            _ if opcode.is_local() => self.change_window(opcode, local),
            None => Reply::Silence,
            Some((responder, remote)) => {
                let mut stage = std::mem::take(&mut self.stage);
                let reply = self.execute(opcode, local, (responder, remote), *budget, &mut stage);
                self.stage = stage;
                reply
            }
        };
        let attempt = self.settle(opcode, reply, now, budget, before);
        if matches!(attempt, Attempt::Unfinished | Attempt::Wait(_) | Attempt::Foreign(_)) {
            self.journal();
        }
        attempt
    }

    /// Whether the WQE at the head was begun: in SQD it is still brought to its end.
    #[inline]
    pub(crate) fn has_begun(&self) -> bool {
        self.area.header.journal_wqe().load(Ordering::Relaxed) == self.done.wrapping_add(1)
    }

    /// Completes what is posted with `WR_FLUSH_ERR`, up to [`FLUSH`] of it. True: there may be more.
    pub(crate) fn flush(&mut self) -> bool {
        for _ in 0..FLUSH {
            if self.fetch() != Fetch::Ready {
                return false;
            }
            let opcode =
                Opcode::try_from(u32::from(self.wqe.opcode)).map_or(WcOpcode::Send, Opcode::wc_opcode);
            self.complete(WcStatus::WrFlushErr, opcode, 0, true);
        }
        true
    }

    /// Whether the SQ holds something (or the fetched WQE is unfinished).
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.fetched || self.area.header.sq_tail().load(Ordering::SeqCst) != self.head
    }

    /// Checks the fetched WQE itself, at each attempt: between two, its keys may have died.
    #[inline]
    fn check<M: Memory>(&mut self, local: &M) -> Result<Opcode, WcStatus> {
        let opcode = Opcode::try_from(u32::from(self.wqe.opcode)).map_err(|_| WcStatus::LocQpOpErr)?;
        let datagram = self.qp_type == QpType::Ud;
        if !opcode.allowed_on(self.qp_type) || datagram != (self.wqe.flags & flag::ADDRESS != 0) {
            return Err(WcStatus::LocQpOpErr);
        }
        let length = self.wqe.length();
        if length > if datagram { MAX_DATAGRAM } else { MAX_MESSAGE } {
            return Err(WcStatus::LocLenErr);
        }
        if opcode.is_atomic() && length != 8 {
            return Err(WcStatus::LocLenErr);
        }
        let mut need = AccessFlags::empty();
        if opcode.writes_locally() {
            if self.wqe.inline().is_some() || self.initiator_depth() == 0 {
                return Err(WcStatus::LocQpOpErr);
            }
            need = AccessFlags::LOCAL_WRITE;
        }
        if !check_list(local, self.pd, self.wqe.sges(), length, need, &mut self.spans) {
            return Err(WcStatus::LocProtErr);
        }
        Ok(opcode)
    }

    /// READs and atomics that may be outstanding. The owner knows what the router left in the header.
    #[inline]
    fn initiator_depth(&self) -> u32 {
        if self.owner {
            self.area.header.initiator_depth().load(Ordering::Relaxed)
        } else {
            self.max_rd_atomic.into()
        }
    }

    fn request<'a, M>(&'a self, opcode: Opcode, local: &'a M, budget: u64) -> Request<'a, M> {
        Request {
            opcode,
            source_qpn: self.qpn,
            remote_addr: self.wqe.remote_addr,
            rkey: self.wqe.rkey,
            len: self.wqe.length(),
            imm: self.wqe.imm,
            solicited: self.wqe.flags & flag::SOLICITED != 0,
            placed: self.placed,
            payload_at: 0,
            budget,
            payload: match self.wqe.inline() {
                Some(bytes) => Side::Bytes(bytes),
                None => Side::Spans(local, &self.spans),
            },
            flush: Flush::of(self.wqe.compare_add, self.wqe.swap),
        }
    }

    /// Binds or invalidates a window of the own client.
    fn change_window<M: Memory>(&self, opcode: Opcode, local: &M) -> Reply {
        if !local.has_windows() {
            return Reply::OutOfReach;
        }
        let changed = match opcode {
            Opcode::BindMw => window::bind(local, self.pd, self.qpn, &self.wqe),
            _ => window::invalidate(local, self.pd, self.wqe.imm, None),
        };
        changed.map_or(Reply::Refused, |()| Reply::Ack)
    }

    /// Turns a reply into what happens next.
    fn settle(&mut self, opcode: Opcode, reply: Reply, now: u64, budget: &mut u64, before: u64) -> Attempt {
        let reply = match reply {
            // Nobody answers a UC request: what got lost is lost.
            Reply::Silence | Reply::Rnr(_) | Reply::Nak(..) if self.qp_type == QpType::Uc => Reply::Ack,
            reply => reply,
        };
        match reply {
            Reply::Ack | Reply::Found(_) => {
                let length = self.wqe.length();
                *budget = budget.saturating_sub(length.saturating_sub(before));
                self.succeed(opcode, length);
                Attempt::Done
            }
            Reply::Partly(placed) => {
                *budget = budget.saturating_sub(placed - before);
                self.placed = placed;
                self.retry.progress();
                Attempt::Unfinished
            }
            Reply::OutOfReach => Attempt::Wait(None),
            Reply::Refused => self.fail(WcStatus::MwBindErr, false, None),
            Reply::Foreign if self.owner => Attempt::Wait(None),
            Reply::Foreign => self.begin_access(now),
            Reply::Rnr(_) | Reply::Silence if self.owner => Attempt::Wait(None),
            Reply::Rnr(_) | Reply::Silence => self.try_again(reply, now),
            // The router may reach it: it finds pages on demand.
            Reply::SourceFault if self.owner => Attempt::Wait(None),
            Reply::SourceFault => self.fail(WcStatus::LocProtErr, false, None),
            Reply::Nak(status, event) => self.fail(status, true, event),
        }
    }

    /// The peer has no receive, or does not answer: another try later, unless enough is enough.
    fn try_again(&mut self, reply: Reply, now: u64) -> Attempt {
        self.placed = 0;
        let when = match reply {
            Reply::Rnr(code) => self.retry.no_receive(code, now).map(Some),
            _ => self.retry.silence(now),
        };
        match when {
            Ok(until) => Attempt::Wait(until),
            Err(status) => self.fail(status, false, None),
        }
    }

    #[inline]
    fn succeed(&mut self, opcode: Opcode, length: u64) {
        self.messages += 1;
        self.bytes += length;
        let byte_len = length as u32;
        let signaled = self.wqe.flags & flag::SIGNALED != 0;
        self.complete(WcStatus::Success, opcode.wc_opcode(), byte_len, signaled);
    }

    fn fail(&mut self, status: WcStatus, peer_failed: bool, peer_event: Option<EventType>) -> Attempt {
        let opcode = Opcode::try_from(u32::from(self.wqe.opcode)).map_or(WcOpcode::Send, Opcode::wc_opcode);
        if self.owner {
            // Before the completion: who polls it and asks for the state gets the one that goes with it.
            self.leave_verdict(Verdict { peer_failed, peer_event });
        }
        self.complete(status, opcode, 0, true);
        Attempt::Failed { peer_failed, peer_event }
    }

    /// Ends the fetched WQE. The completion is published before the head moves.
    #[inline]
    fn complete(&mut self, status: WcStatus, opcode: WcOpcode, byte_len: u32, signaled: bool) {
        if signaled {
            let cqe = Cqe {
                wr_id: self.wqe.wr_id,
                byte_len,
                wqe: self.done as u32,
                status: status.value() as u8,
                opcode: opcode.value() as u8,
                ..Cqe::default()
            };
            self.completions.push(&cqe, false);
        }
        self.head = self.head.wrapping_add(u64::from(self.wqe.blocks));
        self.done = self.done.wrapping_add(1);
        self.fetched = false;
        self.stage.clear();
        // An owner that is killed leaves nothing that anybody goes on with; a living one saves when it leaves.
        if !self.owner {
            self.save();
        }
    }

    /// What the router has to do about an owner's failure.
    fn leave_verdict(&self, verdict: Verdict) {
        let event = verdict.peer_event.map_or(0, EventType::value);
        let word = 1 | u32::from(verdict.peer_failed) << 1 | event << 8;
        self.area.header.verdict().store(word, Ordering::Relaxed);
    }

    /// Router: whether the owner left a failure to act upon.
    pub(crate) fn has_verdict(&self) -> bool {
        self.area.header.verdict().load(Ordering::Acquire) != 0
    }

    /// Router: what the owner left, once.
    pub(crate) fn take_verdict(&self) -> Option<Verdict> {
        let word = self.area.header.verdict().swap(0, Ordering::Relaxed);
        (word & 1 != 0).then(|| Verdict {
            peer_failed: word & 2 != 0,
            peer_event: EventType::try_from(word >> 8)
                .ok()
                .filter(|event| matches!(event, EventType::QpReqErr | EventType::QpAccessErr)),
        })
    }

    /// The QP's area.
    #[must_use]
    pub fn area(&self) -> &QueueArea {
        &self.area
    }

    pub(crate) fn qp_type(&self) -> QpType {
        self.qp_type
    }

    pub(crate) fn traffic(&self) -> Traffic {
        let Retry { rnr_naks, timeouts, .. } = self.retry;
        Traffic { messages: self.messages, bytes: self.bytes, rnr_naks, timeouts }
    }
}
