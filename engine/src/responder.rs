//! The responder half of a QP: a request becomes bytes in memory, a receive completion, a reply.
//!
//! Who may call it: the holder of the seat of the QP that sends to it, nobody else at the same time.

mod at_once;
mod datagrams;
mod keyed;

use std::sync::{Arc, atomic::Ordering};

use verbs_abi::{
    shm::{
        cqe::Cqe,
        queue::{QueueArea, ResponderWords},
        wqe::{BadWqe, RecvWqe},
    },
    verbs::{AccessFlags, EventType, Opcode, QpState, QpType, WcFlags, WcOpcode, WcStatus},
};

use crate::{
    Completions, FLUSH, Memory,
    inbox::Inbox,
    memory::{Span, all_reached, check_list, list_len},
    requester::Obstacle,
    srq::{Claim, SharedReceives},
    stage::Stage,
    transfer::{Broken, Side, locate, transfer},
    window,
    wire::Piece,
};

/// What a requester asks of its peer.
#[derive(Debug)]
pub(crate) struct Request<'a, M> {
    pub(crate) opcode: Opcode,
    pub(crate) source_qpn: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    pub(crate) len: u64,
    pub(crate) imm: u32,
    pub(crate) solicited: bool,
    /// Bytes that earlier turns placed.
    pub(crate) placed: u64,
    /// Where in the message the payload begins.
    pub(crate) payload_at: u64,
    /// Bytes that this turn may place.
    pub(crate) budget: u64,
    pub(crate) payload: Side<'a, M>,
    pub(crate) flush: Flush,
}

/// What a FLUSH asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flush {
    /// The right that it needs at the QP and at the MR.
    pub(crate) need: AccessFlags,
    pub(crate) is_whole_mr: bool,
    pub(crate) len: u64,
}

impl Flush {
    /// From the operands of its work request.
    pub(crate) fn of(len: u64, types: u64) -> Self {
        Self { need: flush_rights(types as u32), is_whole_mr: types >> 32 != 0, len }
    }
}

/// The rights that a FLUSH of these types (`IBV_FLUSH_GLOBAL`, `IBV_FLUSH_PERSISTENT`) needs; none for an unknown type.
fn flush_rights(types: u32) -> AccessFlags {
    match types {
        1 => AccessFlags::FLUSH_GLOBAL,
        2 => AccessFlags::FLUSH_PERSISTENT,
        3 => AccessFlags::FLUSH_GLOBAL | AccessFlags::FLUSH_PERSISTENT,
        _ => AccessFlags::empty(),
    }
}

/// What the peer answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Done.
    Ack,
    /// The budget is used up; so many bytes are placed.
    Partly(u64),
    /// Done; the word that an atomic found.
    Found(u64),
    /// No receive posted; the RNR timer code.
    Rnr(u8),
    /// Nothing comes back: the QP is not there or not ready.
    Silence,
    /// A NAK: the status that the requester completes with, the event that the responder raises. The
    /// responder's QP is in error.
    Nak(WcStatus, Option<EventType>),
    /// The requester's own memory could not be read.
    SourceFault,
    /// Nothing happened: only the router reaches that memory.
    OutOfReach,
    /// A window of the requester's own cannot be bound or invalidated so.
    Refused,
    /// Nothing is answered yet: the access that the stage wants must come first.
    Foreign,
}

pub(crate) const INVALID_REQUEST: Reply = Reply::Nak(WcStatus::RemInvReqErr, Some(EventType::QpReqErr));
const ACCESS: Reply = Reply::Nak(WcStatus::RemAccessErr, Some(EventType::QpAccessErr));
pub(crate) const OPERATION: Reply = Reply::Nak(WcStatus::RemOpErr, Some(EventType::QpFatal));

/// What the responder's own side has to learn that no reply carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Whether the QP is in error.
    pub(crate) failed: bool,
    /// The event that it raises.
    pub(crate) event: Option<EventType>,
}

/// The responder half.
#[derive(Debug)]
pub struct Responder {
    qp_type: QpType,
    pd: u32,
    /// Its own number; in an owner's seat, where no window is looked into, 0.
    qpn: u32,
    state: QpState,
    /// The one QP whose requests are executed, 0 for none.
    peer: u32,
    access: AccessFlags,
    min_rnr_timer: u8,
    qkey: u32,
    /// Whether a direct peer's thread runs this half.
    visited: bool,
    /// Whether a request was executed since RTR.
    established: bool,
    notice: Option<Notice>,
    area: QueueArea,
    completions: Completions,
    wqe: Box<RecvWqe>,
    /// The queue that receives come from, if it is not the QP's own.
    shared: Option<Arc<SharedReceives>>,
    /// The receive of that queue which the message in progress fills: `wqe`.
    claimed: Option<Claim>,
    spans: Vec<Span>,
    /// Datagrams on their way into foreign memory (UD).
    inbox: Inbox,
    /// What a direct peer has seen in the shared header.
    seen: Option<ResponderWords>,
    /// Receives that a direct peer knows to be posted.
    posted: u64,
}

impl Responder {
    /// The responder half of the QP at `area`, in RESET.
    #[must_use]
    pub fn new(qp_type: QpType, pd: u32, area: QueueArea, completions: Completions) -> Self {
        Self {
            qp_type,
            pd,
            qpn: 0,
            state: QpState::Reset,
            peer: 0,
            access: AccessFlags::empty(),
            min_rnr_timer: 0,
            qkey: 0,
            visited: false,
            established: false,
            notice: None,
            area,
            completions,
            wqe: Box::default(),
            shared: None,
            claimed: None,
            spans: Vec::new(),
            inbox: Inbox::default(),
            seen: None,
            posted: 0,
        }
    }

    /// The same half with its QP's number (router).
    #[must_use]
    pub(crate) fn numbered(mut self, qpn: u32) -> Self {
        self.qpn = qpn;
        self
    }

    /// Takes receives from a shared queue from now on (router). An XRC receiver is told anew for each request, and
    /// is in the queue's protection domain then.
    pub(crate) fn share(&mut self, queue: Option<Arc<SharedReceives>>) {
        let other = |claim: &Claim| !queue.as_ref().is_some_and(|queue| Arc::ptr_eq(queue, &claim.queue));
        if self.claimed.as_ref().is_some_and(other) {
            self.give_back();
        }
        if self.qp_type == QpType::XrcRecv {
            self.pd = queue.as_ref().map_or(0, |queue| queue.pd);
        }
        self.shared = queue;
    }

    /// The queue that receives come from, if it is not the QP's own.
    #[inline]
    pub(crate) fn shared(&self) -> Option<&Arc<SharedReceives>> {
        self.shared.as_ref()
    }

    /// Lets others have the receive of a message that will not go on.
    pub(crate) fn give_back(&mut self) {
        if let Some(claim) = self.claimed.take() {
            claim.queue.give_back(claim.slot, &self.wqe);
        }
    }

    /// Takes state and rights from the shared header, as a direct peer must before each request.
    #[inline(always)]
    pub fn refresh(&mut self) {
        let seen = self.area.header.responder_words();
        if self.seen != Some(seen) {
            self.learn(seen);
        }
    }

    #[cold]
    fn learn(&mut self, seen: ResponderWords) {
        self.state = QpState::try_from(seen.state()).unwrap_or(QpState::Err);
        self.peer = seen.peer();
        self.access = AccessFlags::try_from(seen.rights() as u32).unwrap_or_default();
        self.min_rnr_timer = (seen.rights() >> 32) as u8;
        self.visited = true;
        self.established = seen.established() != 0;
        self.seen = Some(seen);
    }

    /// Goes on where the last holder of the seat stopped, as a direct peer must that did not hold it in between.
    pub fn resume(&mut self) {
        self.completions.seek(self.area.header.rq_done().load(Ordering::Acquire));
        self.posted = self.completions.count();
    }

    /// Sets who the peer is and what it may do, and tells direct peers (router).
    pub(crate) fn configure(&mut self, peer: u32, access: AccessFlags, min_rnr_timer: u8, qkey: u32) {
        (self.peer, self.access, self.min_rnr_timer, self.qkey) = (peer, access, min_rnr_timer, qkey);
        self.area.header.peer().store(peer, Ordering::Relaxed);
        let rights = u64::from(access.bits()) | u64::from(min_rnr_timer) << 32;
        self.area.header.rights().store(rights, Ordering::Relaxed);
    }

    /// Changes state, and tells direct peers (router).
    pub(crate) fn set_state(&mut self, state: QpState) {
        if self.state == QpState::Init {
            self.set_established(false);
        }
        self.state = state;
        self.area.header.state().store(state.value(), Ordering::Release);
    }

    /// Starts anew after RESET (router).
    pub(crate) fn reset(&mut self) {
        self.give_back();
        self.inbox.clear();
        self.area.rq_cqes.clear();
        self.completions.seek(0);
        self.area.header.rq_tail().store(0, Ordering::Relaxed);
        self.area.header.rq_done().store(0, Ordering::Relaxed);
        self.area.header.rq_ring_me().store(0, Ordering::Relaxed);
    }

    /// Whether the CQ of its completions has overrun.
    pub(crate) fn has_overrun(&self) -> bool {
        self.completions.is_overrun()
    }

    /// Its completions that are not polled never will be (router).
    pub(crate) fn forget_unpolled(&self) {
        let [_, polled] = self.area.header.polled();
        self.completions.forget(polled.load(Ordering::Relaxed));
    }

    /// Takes over from a direct peer that may have been killed in the middle of something (router).
    pub(crate) fn roll_forward(&mut self) {
        if let Some((done, ahead)) = self.left_off() {
            self.completions.roll_forward(done, ahead);
            self.publish();
        }
    }

    /// Takes over from a direct peer that was not executing: what it did is complete, and announced (router).
    pub(crate) fn catch_up(&mut self) {
        if let Some((done, _)) = self.left_off() {
            self.completions.seek(done);
        }
    }

    /// Receives that a direct peer has consumed, and those that are posted beyond. `None`: a count that cannot be
    /// is the client's own doing, and the router's last view stays.
    fn left_off(&self) -> Option<(u64, u64)> {
        let done = self.area.header.rq_done().load(Ordering::Acquire);
        let ahead = self.area.header.rq_tail().load(Ordering::Relaxed).wrapping_sub(done);
        (ahead <= u64::from(self.area.geometry().rq_entries)).then_some((done, ahead))
    }

    /// Whether a receive is posted that nobody has consumed.
    pub(crate) fn has_receive(&self) -> bool {
        if let Some(queue) = &self.shared {
            return self.claimed.is_some() || queue.has_receive();
        }
        self.area.header.rq_tail().load(Ordering::SeqCst) != self.completions.count()
    }

    /// Whether a message of that QP finds a receive.
    pub(crate) fn may_receive(&self, qpn: u32) -> bool {
        self.state.may_respond() && self.accepts(qpn) && self.has_receive()
    }

    /// Asks whoever posts a receive to ring the router, or stops asking.
    pub(crate) fn set_ring_me(&self, on: bool) {
        match &self.shared {
            // Who else waits for its receives still does.
            Some(queue) if on && self.state != QpState::Err => return queue.set_ring_me(true),
            Some(_) => return,
            None => {}
        }
        self.area.header.rq_ring_me().store(u32::from(on), Ordering::SeqCst);
    }

    /// Whether whoever posts a receive is asked to ring.
    pub(crate) fn rings_me(&self) -> bool {
        if let Some(queue) = &self.shared {
            return queue.rings_me();
        }
        self.area.header.rq_ring_me().load(Ordering::SeqCst) != 0
    }

    /// Completes posted receives with `WR_FLUSH_ERR`, up to [`FLUSH`] of them. True: there may be more.
    pub(crate) fn flush(&mut self) -> bool {
        self.inbox.clear();
        if self.shared.is_some() {
            // The receives of a shared queue are there for others.
            if self.claimed.is_some() {
                self.flush_one();
            }
            return false;
        }
        for _ in 0..FLUSH {
            if !matches!(self.area.read_recv(self.completions.count(), &mut self.wqe), Ok(true)) {
                return false;
            }
            self.flush_one();
        }
        true
    }

    fn flush_one(&mut self) {
        let flushed = Cqe {
            wr_id: self.wqe.wr_id,
            status: WcStatus::WrFlushErr.value() as u8,
            opcode: WcOpcode::Recv.value() as u8,
            ..Cqe::default()
        };
        self.complete(&flushed, true);
    }

    /// Whether requests of that QP are executed.
    pub(crate) fn accepts(&self, qpn: u32) -> bool {
        self.peer == qpn
    }

    /// What the owner must learn beside completions, once (router).
    #[inline]
    pub(crate) fn take_notice(&mut self) -> Option<Notice> {
        self.notice.take()
    }

    /// Lets a request in that comes from the connected peer while the QP may respond.
    #[inline]
    fn admit(&mut self, source_qpn: u32) -> Result<(), Reply> {
        if !self.state.may_respond() || self.peer != source_qpn {
            return Err(Reply::Silence);
        }
        if self.qp_type == QpType::XrcRecv && self.shared.is_none() {
            return Err(INVALID_REQUEST);
        }
        if self.state == QpState::Rtr && !self.established { self.establish() } else { Ok(()) }
    }

    /// The first request in RTR tells the owner that the peer is there. Only the router can.
    #[cold]
    fn establish(&mut self) -> Result<(), Reply> {
        if self.visited {
            return Err(Reply::OutOfReach);
        }
        self.set_established(true);
        self.notice = Some(Notice { failed: false, event: Some(EventType::CommEst) });
        Ok(())
    }

    fn set_established(&mut self, established: bool) {
        self.established = established;
        self.area.header.established().store(u32::from(established), Ordering::Relaxed);
    }

    /// Executes a request of the connected peer.
    pub(crate) fn handle<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        stage: &mut Stage,
    ) -> Reply {
        if let Err(reply) = self.admit(request.source_qpn) {
            return reply;
        }
        match request.opcode {
            Opcode::Write => self.write(memory, request, stage),
            Opcode::WriteWithImm => self.write_with_imm(memory, request, stage),
            Opcode::Send | Opcode::SendWithImm => self.send(memory, request, stage),
            Opcode::SendWithInv if memory.has_windows() => self.send(memory, request, stage),
            Opcode::SendWithInv => Reply::OutOfReach,
            Opcode::AtomicWrite => self.atomic_write(memory, request, stage),
            Opcode::Flush => self.make_visible(memory, request),
            _ => INVALID_REQUEST,
        }
    }

    fn write_with_imm<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        stage: &mut Stage,
    ) -> Reply {
        if !self.access.contains(AccessFlags::REMOTE_WRITE) {
            return INVALID_REQUEST;
        }
        if let Err(reply) = self.claim() {
            return reply;
        }
        let reply = self.write(memory, request, stage);
        match reply {
            Reply::Ack => {
                let cqe = self.receipt(request, WcOpcode::RecvRdmaWithImm, request.len);
                self.complete(&cqe, request.solicited);
                reply
            }
            ACCESS => self.refuse_receive(WcStatus::LocAccessErr, ACCESS),
            _ => reply,
        }
    }

    fn send<M: Memory>(&mut self, memory: &M, request: &Request<'_, M>, stage: &mut Stage) -> Reply {
        if let Err(reply) = self.take_receive(memory, request.len) {
            return reply;
        }
        if !all_reached(memory, &self.spans) {
            return Reply::OutOfReach;
        }
        let reply = place_slice(request, (memory, &self.spans), stage);
        match reply {
            Reply::Ack if !self.invalidates(memory, request) => {
                self.refuse_receive(WcStatus::LocProtErr, ACCESS)
            }
            Reply::Ack => {
                let cqe = self.receipt(request, WcOpcode::Recv, request.len);
                self.complete(&cqe, request.solicited);
                reply
            }
            OPERATION => self.refuse_receive(WcStatus::LocProtErr, OPERATION),
            _ => reply,
        }
    }

    /// Says where so many bytes of a request's payload belong that are about to come. Changes nothing but that a
    /// message claims its receive. False: not to mapped memory, or there is something the matter with it.
    pub(crate) fn locate<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        len: u64,
        tell: &mut dyn FnMut(Piece),
    ) -> bool {
        let is_new = self.state == QpState::Rtr && !self.established;
        if !self.state.may_respond() || is_new || self.peer != request.source_qpn {
            return false;
        }
        let written;
        let spans = match request.opcode {
            Opcode::Write | Opcode::WriteWithImm => match self.written(memory, request) {
                Some(span) => {
                    written = [span];
                    &written[..]
                }
                None => return false,
            },
            Opcode::Send | Opcode::SendWithImm | Opcode::SendWithInv => {
                let pd = self.shared.as_ref().map_or(self.pd, |queue| queue.pd);
                if self.claim().is_err() || request.len > list_len(self.wqe.sges()) {
                    return false;
                }
                let (sges, spans) = (self.wqe.sges(), &mut self.spans);
                if !check_list(memory, pd, sges, request.len, AccessFlags::LOCAL_WRITE, spans) {
                    return false;
                }
                &self.spans[..]
            }
            _ => return false,
        };
        locate(Side::Spans(memory, spans), request.placed, len, tell)
    }

    /// Does what a SEND asks for beside its payload. False: it may not.
    fn invalidates<M: Memory>(&self, memory: &M, request: &Request<'_, M>) -> bool {
        request.opcode != Opcode::SendWithInv
            || window::invalidate(memory, self.pd, request.imm, Some(self.qpn)).is_ok()
    }

    /// Takes the next receive for a message of `len` bytes, and checks its scatter list into `spans`.
    fn take_receive<M: Memory>(&mut self, memory: &M, len: u64) -> Result<(), Reply> {
        self.claim()?;
        if len > list_len(self.wqe.sges()) {
            return Err(self.refuse_receive(WcStatus::LocLenErr, INVALID_REQUEST));
        }
        let need = AccessFlags::LOCAL_WRITE;
        let pd = self.shared.as_ref().map_or(self.pd, |queue| queue.pd);
        if !check_list(memory, pd, self.wqe.sges(), len, need, &mut self.spans) {
            return Err(self.refuse_receive(WcStatus::LocProtErr, OPERATION));
        }
        Ok(())
    }

    /// Copies the next receive WQE out.
    fn claim(&mut self) -> Result<(), Reply> {
        let found = match &self.shared {
            None => self.area.read_recv(self.completions.count(), &mut self.wqe),
            Some(_) if self.claimed.is_some() => Ok(true),
            Some(queue) => queue.claim(&mut self.wqe).map(|claim| {
                self.claimed = claim;
                self.claimed.is_some()
            }),
        };
        match found {
            Ok(true) => Ok(()),
            Ok(false) if self.qp_type.is_reliable() => Err(Reply::Rnr(self.min_rnr_timer)),
            Ok(false) => Err(Reply::Silence),
            Err(_) if self.qp_type.is_reliable() => Err(OPERATION),
            Err(_) => {
                self.notice = Some(Notice { failed: true, event: Some(EventType::QpFatal) });
                Err(Reply::Silence)
            }
        }
    }

    /// Ends the claimed receive with an error. On an unreliable service a message that is at fault itself is lost
    /// and the receive stays; the receive's own fault ends the QP on every service.
    fn refuse_receive(&mut self, status: WcStatus, reply: Reply) -> Reply {
        if !self.qp_type.is_reliable() {
            if status != WcStatus::LocProtErr {
                return Reply::Silence;
            }
            // That the peer is there may be news still.
            let event = self.notice.take().and_then(|notice| notice.event);
            self.notice = Some(Notice { failed: true, event });
        }
        let cqe = Cqe {
            wr_id: self.wqe.wr_id,
            status: status.value() as u8,
            opcode: WcOpcode::Recv.value() as u8,
            ..Cqe::default()
        };
        self.complete(&cqe, true);
        // The receive completion tells the application; no event on top of it.
        match reply {
            Reply::Nak(status, _) => Reply::Nak(status, None),
            other => other,
        }
    }

    /// The completion of the claimed receive.
    fn receipt<M>(&self, request: &Request<'_, M>, opcode: WcOpcode, byte_len: u64) -> Cqe {
        let has_imm = request.opcode.has_imm();
        let flags = match request.opcode {
            Opcode::SendWithInv => WcFlags::WITH_INV,
            _ if has_imm => WcFlags::WITH_IMM,
            _ => WcFlags::empty(),
        };
        Cqe {
            wr_id: self.wqe.wr_id,
            byte_len: byte_len as u32,
            imm: if flags.is_empty() { 0 } else { request.imm },
            src_qp: request.source_qpn,
            opcode: opcode.value() as u8,
            flags: flags.bits() as u8,
            ..Cqe::default()
        }
    }

    fn complete(&mut self, cqe: &Cqe, solicited: bool) {
        let wqe = match self.claimed.take() {
            None => self.completions.count() as u32,
            Some(claim) => {
                // Only an XRC queue completes by itself; it tells for which of its QPs.
                if claim.queue.complete(&Cqe { wqe: claim.slot, src_qp: self.qpn, ..*cqe }, solicited) {
                    return;
                }
                claim.slot
            }
        };
        self.completions.push(&Cqe { wqe, ..*cqe }, solicited);
        self.publish();
    }

    /// Copies the receive out that lies so many behind the next one to be consumed. False: there is none.
    pub(crate) fn look_ahead(&self, by: u64, wqe: &mut RecvWqe) -> Result<bool, BadWqe> {
        self.area.read_recv(self.completions.count().wrapping_add(by), wqe)
    }

    /// Puts bytes that came otherwise into the list of a receive, `at` bytes into it.
    pub(crate) fn scatter<M: Memory>(
        &mut self,
        memory: &M,
        wqe: &RecvWqe,
        at: u64,
        bytes: &[u8],
        stage: &mut Stage,
    ) -> Result<(), Obstacle> {
        let len = at + bytes.len() as u64;
        if !check_list(memory, self.pd, wqe.sges(), len, AccessFlags::LOCAL_WRITE, &mut self.spans) {
            return Err(Obstacle::Fault(WcStatus::LocProtErr));
        }
        let spans: &[Span] = &self.spans;
        transfer(Side::Bytes(bytes), (memory, spans), (0, at), bytes.len() as u64, stage)?;
        Ok(())
    }

    /// Ends the next receive, which something else has filled.
    pub(crate) fn announce(&mut self, cqe: &Cqe) {
        // Whether the sender asked for the owner's attention is not known: a wake-up too many, but never one too few.
        self.complete(cqe, true);
    }

    /// Invalidates a window for the peer. False: it may not.
    pub(crate) fn invalidate<M: Memory>(&self, memory: &M, key: u32) -> bool {
        window::invalidate(memory, self.pd, key, Some(self.qpn)).is_ok()
    }

    /// Whether the peer may invalidate a window.
    pub(crate) fn may_invalidate<M: Memory>(&self, memory: &M, key: u32) -> bool {
        window::may_invalidate(memory, self.pd, key, self.qpn)
    }

    /// Its protection domain.
    pub(crate) fn pd(&self) -> u32 {
        self.pd
    }

    /// The one QP whose requests are executed.
    pub(crate) fn peer(&self) -> u32 {
        self.peer
    }

    fn publish(&self) {
        self.area.header.rq_done().store(self.completions.count(), Ordering::Release);
    }

    pub(crate) fn qp_type(&self) -> QpType {
        self.qp_type
    }

    /// The state the QP is in.
    pub(crate) fn state(&self) -> QpState {
        self.state
    }
}

/// Places the next slice of a request's payload.
fn place_slice<M: Memory>(request: &Request<'_, M>, target: (&M, &[Span]), stage: &mut Stage) -> Reply {
    let left = request.len - request.placed;
    let now = left.min(request.budget);
    match transfer(request.payload, target, (request.placed - request.payload_at, request.placed), now, stage)
    {
        Ok(moved) if moved == left => Reply::Ack,
        Ok(moved) => Reply::Partly(request.placed + moved),
        Err(Broken::Source) => Reply::SourceFault,
        Err(Broken::Target) => OPERATION,
        Err(Broken::Foreign) => Reply::Foreign,
    }
}
