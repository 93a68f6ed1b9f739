//! The requester's end of a connection to another host: work requests become packets, several at a time.
//!
//! Who may call it: the holder of the QP's seat, the router. It says when to come back ([`Initiator::due`]); turns,
//! timers and what a failure means for the QP are the fabric's.

use std::collections::VecDeque;

use verbs_abi::{
    shm::wqe::{BadWqe, SendWqe, flag},
    verbs::{Opcode, QpType, WcStatus},
};

use super::{
    LATE, Late, Path, Piece, SEGMENT, TAIL, WINDOW,
    outbox::{Condition, Outbox},
    packet::{ANNOUNCES, Header, Kind, SOLICITED},
};
use crate::{
    Memory, Requester,
    requester::{Obstacle, is_fenced},
    shadow::goes_by_link,
    stage::Stage,
};

/// Bytes of answers that are kept while the requester's own memory is accessed. More are asked for again.
const KEPT: usize = 2 << 20;
/// Work request boxes that are kept for others.
const SPARE: usize = 16;

/// The requester's end.
#[derive(Debug, Default)]
pub(crate) struct Initiator {
    stream: u32,
    /// Work requests taken out of the queue and not completed, oldest first.
    flight: VecDeque<Sent>,
    /// Blocks that they occupy.
    ahead: u64,
    /// Number of the first packet of the next work request to be taken.
    next: u64,
    /// Number of the next packet to be sent.
    cursor: u64,
    /// Index of the work request that `cursor` belongs to, or `flight.len()`.
    at: usize,
    /// Everything below was sent at least once.
    sent: u64,
    /// Everything below was executed by the peer.
    acked: u64,
    /// Packets that were sent more than once.
    repeated: u64,
    /// One packet at a time, until it is known where the peer stands.
    probing: bool,
    /// Something is to be sent and there is no link: silence, too.
    held_up: bool,
    /// A NIC carries what takes receives: only the rest of such a request goes here.
    shares: bool,
    /// For payload that comes from foreign memory: that of the packet `staged`.
    send_stage: Stage,
    staged: u64,
    /// For answers that go to foreign memory.
    reply_stage: Stage,
    kept: VecDeque<(Header, Vec<u8>)>,
    kept_bytes: usize,
    #[expect(clippy::vec_box, reason = "they are swapped with the requester's, and long")]
    spare: Vec<Box<SendWqe>>,
}

/// A work request that was taken out of the queue.
#[derive(Debug)]
struct Sent {
    wqe: Box<SendWqe>,
    opcode: Opcode,
    first: u64,
    packets: u64,
    len: u64,
    /// Bytes of a READ that have come back.
    received: u64,
    /// Whether all that must come back has.
    stored: bool,
    failed: Option<WcStatus>,
    /// Whether a NIC carries the rest of it.
    is_split: bool,
}

impl Sent {
    fn end(&self) -> u64 {
        self.first + self.packets
    }

    /// Whether something must come back for it beside an acknowledgement.
    fn responds(&self) -> bool {
        self.opcode.writes_locally()
    }

    /// Whether it waits for this answer.
    fn awaits(&self, answer: &Header) -> bool {
        self.first == answer.psn && self.responds() && !self.stored && self.failed.is_none()
    }

    fn is_done(&self, acked: u64) -> bool {
        self.failed.is_none()
            && if self.responds() { self.stored } else { self.packets > 0 && self.end() <= acked }
    }
}

/// What an attempt to send a packet came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emit {
    /// So many bytes of payload went into the outbox.
    Sent(u64),
    /// There is nothing to be sent now.
    Idle,
    /// The outbox is full.
    NoRoom,
    /// An access to foreign memory must come first.
    Foreign,
    /// The queue holds what no provider writes.
    Bad(BadWqe),
}

/// What the peer's word completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reaped {
    /// All is well.
    Well,
    /// A work request completed with an error; the QP fails.
    Failed,
}

/// What was found out about payload that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// It is where it was told.
    Here,
    /// Nobody waits for this packet any more.
    Past,
    /// Its memory is not what it was: the QP has something to do about it.
    Gone,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is where it belongs, or belongs nowhere.
    Done,
    /// An access to foreign memory must come first.
    Foreign,
}

impl Initiator {
    /// A new life of a QP, whose packets are counted from `psn` on.
    pub(crate) fn start(&mut self, stream: u32, psn: u64) {
        let shares = self.shares;
        *self = Self { stream, next: psn, cursor: psn, sent: psn, acked: psn, shares, ..Self::default() };
    }

    /// From now on a NIC carries what takes receives.
    pub(crate) fn share_way(&mut self) {
        self.shares = true;
    }

    /// Forgets what is on its way: the queue fails, or is emptied.
    pub(crate) fn abandon(&mut self) {
        let (next, stream, shares) = (self.next, self.stream, self.shares);
        *self = Self { stream, next, cursor: next, sent: next, acked: next, shares, ..Self::default() };
    }

    /// Which life of the QP this is.
    pub(crate) fn stream(&self) -> u32 {
        self.stream
    }

    /// Whether work requests were begun.
    pub(crate) fn has_begun(&self) -> bool {
        !self.flight.is_empty()
    }

    /// Whether the peer owes an answer.
    fn is_outstanding(&self) -> bool {
        // Who only waits for its turn to send on is owed nothing.
        let owed = |front: &Sent| self.sent > if front.responds() { front.first } else { self.acked };
        let asked = |front: &Sent| front.failed.is_none() && (owed(front) || self.held_up);
        self.flight.front().is_some_and(asked) && !self.reply_stage.in_flight()
    }

    /// When to come back by itself, if nothing happens before.
    pub(crate) fn due(&self, requester: &mut Requester) -> Option<u64> {
        let retry = requester.retry();
        retry.resumes_at().or(if self.is_outstanding() { retry.deadline() } else { None })
    }

    /// Sends again from where the peer is known to stand: a packet first, and more when that was answered.
    pub(crate) fn rewind(&mut self) {
        self.probing = true;
        self.send_stage.clear();
        self.at = 0;
        self.cursor = match self.flight.front() {
            Some(front) if front.responds() => front.first,
            Some(front) => self.acked.clamp(front.first, front.end()),
            None => self.next,
        };
    }

    /// Looks at the clock: silence for too long means another try, or the end of the oldest work request.
    pub(crate) fn watch(&mut self, requester: &mut Requester, now: u64) {
        let outstanding = self.is_outstanding();
        let retry = requester.retry();
        if !outstanding {
            return retry.progress();
        }
        if retry.pause(now).is_some() {
            return;
        }
        let expired = retry.deadline().is_some_and(|deadline| now >= deadline);
        match retry.silence(now) {
            Err(status) => {
                if let Some(front) = self.flight.front_mut() {
                    front.failed = Some(status);
                }
            }
            Ok(_) if expired => self.rewind(),
            Ok(_) => {}
        }
    }

    /// Sends the next packet, if there is one. `takes_new`: also of work requests that were not begun.
    pub(crate) fn emit<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        path: &Path,
        outbox: &mut Outbox,
        (takes_new, now): (bool, u64),
        qp: usize,
    ) -> Emit {
        if requester.retry().pause(now).is_some() || self.send_stage.in_flight() {
            return Emit::Idle;
        }
        self.skip_done();
        let window = if self.probing { 1 } else { WINDOW };
        if self.cursor.saturating_sub(self.acked) >= window {
            return Emit::Idle;
        }
        if self.at == self.flight.len() {
            match self.take(requester, local, takes_new) {
                Ok(true) => {}
                Ok(false) => return Emit::Idle,
                Err(bad) => return Emit::Bad(bad),
            }
        }
        let sent = &mut self.flight[self.at];
        // What was acknowledged in the meantime is gone.
        self.cursor = self.cursor.max(sent.first);
        if sent.failed.is_some() || sent.packets == 0 {
            return Emit::Idle;
        }
        let reliable = requester.qp_type().is_reliable();
        let is_lost = !reliable && outbox.condition == Condition::Down;
        if !outbox.has_room(path.source_qpn) && !is_lost {
            self.held_up = outbox.condition != Condition::Up;
            self.start_clock(requester, now);
            return Emit::NoRoom;
        }
        let mut header = describe(sent, self.cursor, path, self.stream);
        if requester.qp_type() == QpType::XrcSend {
            header.set_srqn(sent.opcode, sent.wqe.srqn);
        }
        let (at, len) = (u64::from(header.offset), u64::from(header.len));
        if std::mem::replace(&mut self.staged, self.cursor) != self.cursor {
            // The packet that it was for has been acknowledged meanwhile, and payload of the same length is not the same.
            self.send_stage.clear();
        }
        let stage = &mut self.send_stage;
        let stays = reliable && len >= LATE;
        if stays && requester.locate(local, &mut sent.wqe, (at, len), &mut |_| ()) == Ok(true) {
            outbox.push_late(&header, qp);
            self.emitted(requester, true, now);
            return Emit::Sent(len);
        }
        let packed = outbox.push_with(&header, |into| match len {
            0 => requester.inspect(local, &mut sent.wqe).map(drop).map_err(Obstacle::Fault),
            _ => requester.export(local, &mut sent.wqe, (at, len), stage, into),
        });
        match packed {
            Err(Obstacle::Foreign) => return Emit::Foreign,
            Err(Obstacle::Fault(status)) => {
                sent.failed = Some(status);
                return Emit::Idle;
            }
            Ok(()) => self.emitted(requester, reliable, now),
        }
        Emit::Sent(len)
    }

    /// The packet at the cursor is in the outbox.
    fn emitted(&mut self, requester: &mut Requester, reliable: bool, now: u64) {
        self.repeated += u64::from(self.cursor < self.sent);
        self.cursor += 1;
        self.held_up = false;
        self.sent = self.sent.max(self.cursor);
        if !reliable {
            self.acked = self.cursor;
        }
        self.start_clock(requester, now);
    }

    /// Says where the payload of a packet is that is being sent now. False: it is not to be sent any more, or not
    /// like this; in that case it is sent again, or its work request fails.
    pub(crate) fn locate<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        late: &Late,
        tell: &mut dyn FnMut(Piece),
    ) -> Located {
        // What was executed, or fails, may be in the application's hands again.
        if late.life != self.stream || late.psn < self.acked {
            return Located::Past;
        }
        let at = self.flight.partition_point(|sent| sent.end() <= late.psn);
        let Some(sent) =
            self.flight.get_mut(at).filter(|sent| sent.first <= late.psn && sent.failed.is_none())
        else {
            return Located::Past;
        };
        let offset = (late.psn - sent.first) * SEGMENT;
        match requester.locate(local, &mut sent.wqe, (offset, late.len as u64), tell) {
            Ok(true) => Located::Here,
            Ok(false) => {
                self.rewind();
                Located::Gone
            }
            Err(status) => {
                sent.failed = Some(status);
                Located::Gone
            }
        }
    }

    /// Packets that were sent more than once, since this was asked last.
    pub(crate) fn take_repeated(&mut self) -> u64 {
        std::mem::take(&mut self.repeated)
    }

    /// The first packet that waits for an answer starts the clock.
    fn start_clock(&self, requester: &mut Requester, now: u64) {
        let retry = requester.retry();
        if self.is_outstanding() && retry.deadline().is_none() {
            let _ = retry.silence(now);
        }
    }

    /// Goes over what needs not be sent (again).
    fn skip_done(&mut self) {
        while let Some(sent) = self.flight.get(self.at) {
            if self.cursor >= sent.end() && sent.packets > 0 || sent.is_done(self.acked) {
                self.cursor = self.cursor.max(sent.end());
                self.at += 1;
            } else {
                if !sent.responds() {
                    self.cursor = self.cursor.max(self.acked.min(sent.end()));
                }
                return;
            }
        }
    }

    /// Takes the next work request out of the queue. False: there is none, or it must wait.
    fn take<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        takes_new: bool,
    ) -> Result<bool, BadWqe> {
        let stops = |last: &Sent| last.failed.is_some() || last.packets == 0 || last.is_split;
        let stopped = self.flight.back().is_some_and(stops);
        if !takes_new || stopped || self.flight.len() as u64 >= WINDOW {
            return Ok(false);
        }
        if self.flight.is_empty() {
            requester.retry().begin();
        }
        let mut wqe = self.spare.pop().unwrap_or_default();
        let found = requester.look_ahead(self.ahead, &mut wqe)?;
        let waits_for = if is_fenced(&wqe) { 1 } else { requester.depth() };
        let responding = self.flight.iter().filter(|sent| sent.responds() && !sent.stored).count();
        let checked = if found { requester.inspect(local, &mut wqe) } else { Ok(Opcode::Send) };
        let must_wait = match checked {
            Ok(opcode) if opcode.writes_locally() => responding >= waits_for.min(requester.depth()),
            _ => is_fenced(&wqe) && responding > 0,
        };
        if !found || must_wait {
            self.spare.push(wqe);
            return Ok(false);
        }
        let invalidates = self.shares && checked == Ok(Opcode::SendWithInv);
        let is_split = invalidates || self.shares && checked == Ok(Opcode::WriteWithImm);
        let len = if invalidates { 0 } else { wqe.length() };
        let packets = match checked {
            Err(_) => 0,
            Ok(opcode) if opcode.is_local() => 0,
            Ok(opcode) if opcode.writes_locally() => 1,
            Ok(_) => len.div_ceil(SEGMENT).max(1),
        };
        self.ahead += u64::from(wqe.blocks);
        self.flight.push_back(Sent {
            opcode: checked.unwrap_or(Opcode::Send),
            first: self.next,
            packets,
            len,
            received: 0,
            stored: false,
            failed: checked.err(),
            is_split,
            wqe,
        });
        self.next += packets;
        Ok(true)
    }

    /// The peer has executed everything below `next`. False: it cannot have.
    pub(crate) fn acknowledge(&mut self, requester: &mut Requester, next: u64) -> bool {
        if next > self.sent {
            return false;
        }
        if next > self.acked {
            self.acked = next;
            self.probing = false;
            requester.retry().begin();
        }
        true
    }

    /// The packet `next` found no receive.
    pub(crate) fn no_receive(&mut self, requester: &mut Requester, next: u64, code: u8, now: u64) {
        let known = self.acknowledge(requester, next) && next < self.sent;
        if !known || requester.retry().pause(now).is_some() {
            return;
        }
        match requester.retry().no_receive(code, now) {
            Ok(_) => self.rewind(),
            Err(status) => self.fail(next, status),
        }
    }

    /// The packet `next` is missing.
    pub(crate) fn missing(&mut self, requester: &mut Requester, next: u64, now: u64) {
        if self.acknowledge(requester, next) && next < self.sent && requester.retry().pause(now).is_none() {
            self.rewind();
        }
    }

    /// The peer, which could not serve this before, can now.
    pub(crate) fn ready(&mut self, requester: &mut Requester) {
        if self.is_outstanding() {
            requester.retry().resume();
            self.rewind();
        }
    }

    /// The packet `next` was refused.
    pub(crate) fn refused(&mut self, requester: &mut Requester, next: u64, status: WcStatus) {
        if self.acknowledge(requester, next) && next < self.sent {
            self.fail(next, status);
        }
    }

    fn fail(&mut self, psn: u64, status: WcStatus) {
        let found = self.flight.iter_mut().find(|sent| sent.first <= psn && psn < sent.end());
        if let Some(sent) = found {
            sent.failed = Some(status);
        }
    }

    /// Completes what can be completed, in order.
    pub(crate) fn reap<M: Memory>(&mut self, requester: &mut Requester, local: &M) -> Reaped {
        while let Some(front) = self.flight.front_mut() {
            if front.packets == 0 && front.failed.is_none() {
                front.failed = requester.change_own(local, &mut front.wqe).err();
            } else if front.failed.is_none() && (front.is_split || !front.is_done(self.acked)) {
                break;
            }
            let Some(mut front) = self.flight.pop_front() else { break };
            self.at = self.at.saturating_sub(1);
            // An answer says as much as an acknowledgement.
            self.acked = self.acked.max(front.end().min(self.sent));
            self.ahead -= u64::from(front.wqe.blocks);
            let status = front.failed.unwrap_or(WcStatus::Success);
            requester.finish(&mut front.wqe, status);
            if status != WcStatus::Success {
                return Reaped::Failed;
            }
            if self.spare.len() < SPARE {
                self.spare.push(front.wqe);
            }
        }
        Reaped::Well
    }

    /// A work request of which this part is done, and a NIC is to carry the rest.
    pub(crate) fn take_split(&mut self) -> Option<Box<SendWqe>> {
        let acked = self.acked;
        self.flight.front().filter(|front| front.is_split && front.is_done(acked))?;
        let front = self.flight.pop_front()?;
        self.at = self.at.saturating_sub(1);
        self.ahead -= u64::from(front.wqe.blocks);
        Some(front.wqe)
    }

    /// Whether the next work request in the queue goes this way and no other.
    pub(crate) fn is_next(&self, requester: &Requester) -> bool {
        let mut wqe = SendWqe::default();
        let opcode = match requester.look_ahead(self.ahead, &mut wqe) {
            Ok(true) => Opcode::try_from(u32::from(wqe.opcode)),
            Ok(false) | Err(_) => return false,
        };
        opcode.is_ok_and(|opcode| goes_by_link(opcode) && opcode != Opcode::SendWithInv)
    }

    /// An answer that carries something.
    pub(crate) fn answer<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        header: &Header,
        payload: &[u8],
    ) -> Place {
        if !self.kept.is_empty() {
            self.keep(header, payload);
            return Place::Done;
        }
        let placed = self.place(requester, local, header, payload);
        if placed == Place::Foreign {
            self.keep(header, payload);
        }
        placed
    }

    fn keep(&mut self, header: &Header, payload: &[u8]) {
        if self.kept_bytes + payload.len() <= KEPT {
            self.kept_bytes += payload.len();
            self.kept.push_back((*header, payload.to_vec()));
        }
    }

    /// Goes on with answers that were kept.
    pub(crate) fn resume<M: Memory>(&mut self, requester: &mut Requester, local: &M) -> Place {
        while !self.reply_stage.in_flight()
            && let Some((header, payload)) = self.kept.pop_front()
        {
            self.kept_bytes -= payload.len();
            if self.place(requester, local, &header, &payload) == Place::Foreign {
                self.kept_bytes += payload.len();
                self.kept.push_front((header, payload));
                return Place::Foreign;
            }
        }
        Place::Done
    }

    fn place<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        header: &Header,
        payload: &[u8],
    ) -> Place {
        let Some(sent) = self.flight.iter_mut().find(|sent| sent.awaits(header)) else { return Place::Done };
        let word = header.operands[0].to_ne_bytes();
        let is_read = sent.opcode == Opcode::Read;
        let (at, bytes) = match header.kind {
            Kind::Data if is_read => (u64::from(header.offset), payload),
            Kind::Found if !is_read => (0, &word[..]),
            _ => return Place::Done,
        };
        // What was asked for again may come twice.
        let fits = at == sent.received && at + bytes.len() as u64 <= sent.len && header.psn < self.sent;
        if !fits {
            return Place::Done;
        }
        match requester.import(local, &mut sent.wqe, at, bytes, &mut self.reply_stage) {
            Err(Obstacle::Foreign) => return Place::Foreign,
            Err(Obstacle::Fault(status)) => sent.failed = Some(status),
            Ok(()) => {
                sent.received += bytes.len() as u64;
                sent.stored = sent.received == sent.len;
            }
        }
        self.reply_stage.clear();
        self.probing = false;
        requester.retry().begin();
        Place::Done
    }

    /// Says where the data of a READ belongs that is the next to come, but for the tail. False: it must come whole.
    pub(crate) fn locate_answer<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        header: &Header,
        tell: &mut dyn FnMut(Piece),
    ) -> bool {
        let ready = self.kept.is_empty() && !self.reply_stage.in_flight() && header.psn < self.sent;
        let stream = self.stream;
        let Some(sent) = self.awaited(header).filter(|_| ready && header.stream == stream) else {
            return false;
        };
        let (at, before) = (u64::from(header.offset), u64::from(header.len) - TAIL as u64);
        let fits = at == sent.received && at + u64::from(header.len) <= sent.len;
        fits && sent.opcode == Opcode::Read
            && requester.locate(local, &mut sent.wqe, (at, before), tell) == Ok(true)
    }

    /// So many bytes of the data in front of this are in place.
    pub(crate) fn skip(&mut self, header: &Header, bytes: u32) {
        if let Some(sent) = self.awaited(header) {
            sent.received += u64::from(bytes);
        }
    }

    /// The work request that an answer belongs to, if it waits for one.
    fn awaited(&mut self, header: &Header) -> Option<&mut Sent> {
        self.flight.iter_mut().find(|sent| sent.awaits(header))
    }

    /// The stage of payload to be sent.
    pub(crate) fn send_stage(&mut self) -> &mut Stage {
        &mut self.send_stage
    }

    /// The stage of answers.
    pub(crate) fn reply_stage(&mut self) -> &mut Stage {
        &mut self.reply_stage
    }
}

/// The packet with that number.
fn describe(sent: &Sent, psn: u64, path: &Path, stream: u32) -> Header {
    let wqe = &sent.wqe;
    let mut header = Header::new(Kind::Request, sent.opcode.value() as u8, path, stream, psn);
    if wqe.flags & flag::SOLICITED != 0 {
        header.flags |= SOLICITED;
    }
    (header.remote_addr, header.rkey, header.imm) = (wqe.remote_addr, wqe.rkey, wqe.imm);
    if sent.is_split && sent.opcode == Opcode::WriteWithImm {
        header.code = Opcode::Write.value() as u8;
    }
    if sent.is_split && psn + 1 == sent.end() {
        header.flags |= ANNOUNCES;
    }
    header.operands = [wqe.compare_add, wqe.swap];
    header.total = sent.len as u32;
    if sent.responds() {
        header.offset = sent.received as u32;
    } else {
        let offset = (psn - sent.first) * SEGMENT;
        header.offset = offset as u32;
        header.len = (sent.len - offset).min(SEGMENT) as u32;
    }
    header
}
