//! The responder's end of a connection to another host: packets are executed in order, each once, and answered.
//!
//! What cannot be executed at once (foreign memory, data of a READ without room in the outbox) waits, and what comes
//! behind it waits, too. Whether it was executed before is decided by its number alone.

use std::collections::VecDeque;

use verbs_abi::verbs::{EventType, Opcode, QpType, WcStatus};

use super::{
    Path, Piece, SEGMENT, TAIL,
    outbox::Outbox,
    packet::{ANNOUNCES, Header, Kind, SOLICITED},
};
use crate::{
    Memory, Responder,
    fabric::counterpart,
    place::Atomic,
    responder::{Flush, INVALID_REQUEST, OPERATION, Reply, Request},
    shadow::{Announced, Announcements},
    stage::Stage,
    transfer::{Broken, Side, append},
};

/// Results of atomics that are remembered: as many as may be outstanding.
const REMEMBERED: usize = crate::fabric::MAX_RD_ATOMIC as usize;
/// Bytes and packets of one QP that may wait. An honest peer's window is smaller.
const WAITING_BYTES: usize = 4 << 20;
const WAITING: usize = 256;

/// The responder's end.
#[derive(Debug, Default)]
pub(crate) struct Target {
    /// Which life of the peer this serves, once it has said something.
    stream: Option<u32>,
    /// Number of the next packet to be executed.
    expected: u64,
    /// Number of the next packet to be let in.
    accepting: u64,
    waiting: VecDeque<Arrival>,
    waiting_bytes: usize,
    pub(crate) stage: Stage,
    results: VecDeque<(u64, u64)>,
    /// The peer was told what is missing, and has not sent it yet.
    told_gap: bool,
    /// The peer was told to pause, or was not answered.
    refused: bool,
    /// The rest of a message that was lost is lost, too (UC).
    broken: bool,
    /// A NIC carries what takes receives.
    pub(crate) shares: bool,
    /// What receives that the NIC fills are to tell beside.
    pub(crate) announced: Announcements,
    owed: Owed,
}

/// A packet that waits.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    /// It was executed before: a READ whose answer was lost.
    again: bool,
}

/// What the peer is to be told.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    ack: bool,
    gap: bool,
    ready: bool,
    rnr: Option<u8>,
    nak: Option<(u64, WcStatus)>,
    /// Results of atomics, from this number on.
    found: Option<u64>,
}

/// What executing a packet came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Executed, answered or lost: it is done with.
    Over,
    /// Part of its answer is sent; go on.
    Partly(u64),
    /// An access to foreign memory must come first.
    Foreign,
    /// The outbox is full.
    NoRoom,
    /// No receive: the peer tries again.
    NoReceive,
    /// Refused; the QP fails and raises the event.
    Refused(Option<EventType>),
}

impl Target {
    /// A new life of a QP, which executes from `psn` on.
    pub(crate) fn start(&mut self, psn: u64) {
        *self = Self { expected: psn, accepting: psn, ..Self::default() };
    }

    /// The QP fails: nothing more is executed. What the peer is owed is still told.
    pub(crate) fn abandon(&mut self) {
        self.forget_waiting();
        self.stage.clear();
    }

    fn forget_waiting(&mut self) {
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.accepting = self.expected;
    }

    /// The link was lost: what waits will come again, but for what is in the middle of an access.
    pub(crate) fn interrupt(&mut self) {
        let keeps = self.stage.in_flight()
            && self.waiting.front().is_some_and(|first| !first.again && first.header.code != READ);
        let first = if keeps { self.waiting.pop_front() } else { None };
        if first.is_none() {
            self.stage.clear();
        }
        self.forget_waiting();
        (self.told_gap, self.refused) = (false, false);
        if let Some(first) = first {
            self.accepting += 1;
            self.keep(first);
        }
    }

    /// Whether a packet of the connected peer is to be executed now or when its turn comes. One that was executed
    /// before is answered again.
    pub(crate) fn admit(&mut self, header: &Header, reliable: bool) -> bool {
        if *self.stream.get_or_insert(header.stream) != header.stream {
            return false;
        }
        if !reliable {
            return self.admit_unreliable(header);
        }
        if header.psn == self.accepting {
            (self.told_gap, self.refused) = (false, false);
            return true;
        }
        if header.psn > self.accepting {
            self.owed.gap |= !self.told_gap && !self.refused;
            self.told_gap = true;
            return false;
        }
        if header.psn < self.expected {
            return self.admit_again(header);
        }
        false
    }

    /// Whether a packet is the next one, and would be executed at once.
    pub(crate) fn expects(&self, header: &Header) -> bool {
        self.stream.is_none_or(|stream| stream == header.stream)
            && header.psn == self.accepting
            && header.psn == self.expected
            && self.waiting.is_empty()
            && !self.stage.in_flight()
    }

    /// Says where its payload belongs but for the tail. False: it must come whole.
    pub(crate) fn locate<M: Memory>(
        &self,
        responder: &mut Responder,
        memory: &M,
        header: &Header,
        tell: &mut dyn FnMut(Piece),
    ) -> bool {
        let Ok(opcode) = Opcode::try_from(u32::from(header.code)) else { return false };
        let before = u64::from(header.len) - TAIL as u64;
        responder.locate(memory, &request(header, opcode, &[]), before, tell)
    }

    /// The next packet came, but its payload is lost.
    pub(crate) fn miss(&mut self, header: &Header) {
        if self.expects(header) {
            self.stream = Some(header.stream);
            (self.owed.gap, self.told_gap) = (true, true);
        }
    }

    /// What is not the next packet belongs to a message of which something is missing.
    fn admit_unreliable(&mut self, header: &Header) -> bool {
        if header.offset == 0 {
            self.broken = false;
        } else if header.psn != self.accepting {
            self.broken = true;
        }
        if self.broken {
            return false;
        }
        if header.psn != self.accepting {
            self.abandon();
            (self.expected, self.accepting) = (header.psn, header.psn);
        }
        true
    }

    /// A packet that was executed before.
    fn admit_again(&mut self, header: &Header) -> bool {
        match Opcode::try_from(u32::from(header.code)) {
            Ok(Opcode::Read) => self.waiting.len() < WAITING,
            Ok(opcode) if opcode.is_atomic() => {
                self.owe_found(header.psn);
                false
            }
            _ => {
                self.owed.ack = true;
                false
            }
        }
    }

    /// Whether something waits.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets a packet that was admitted wait. One for which there is no room is lost, with all behind it.
    pub(crate) fn wait(&mut self, header: &Header, payload: &[u8]) {
        let again = header.psn < self.expected;
        if self.waiting_bytes + payload.len() <= WAITING_BYTES && self.waiting.len() < WAITING {
            self.accepting += u64::from(!again);
            self.keep(Arrival { header: *header, payload: payload.to_vec(), again });
        }
    }

    fn keep(&mut self, arrival: Arrival) {
        self.waiting_bytes += arrival.payload.len();
        self.waiting.push_back(arrival);
    }

    /// The first packet that waits, to be executed.
    pub(crate) fn take_first(&mut self) -> Option<Arrival> {
        if self.stage.in_flight() {
            return None;
        }
        let first = self.waiting.pop_front()?;
        self.waiting_bytes -= first.payload.len();
        Some(first)
    }

    /// It is not over: it waits on.
    pub(crate) fn put_back(&mut self, arrival: Arrival) {
        self.waiting_bytes += arrival.payload.len();
        self.waiting.push_front(arrival);
    }

    /// Executes a packet whose turn it is, and keeps in mind what the peer is to be told.
    pub(crate) fn execute<M: Memory>(
        &mut self,
        responder: &mut Responder,
        memory: &M,
        (header, payload): (&mut Header, &[u8]),
        path: &Path,
        outbox: &mut Outbox,
    ) -> Outcome {
        let again = header.psn < self.expected;
        let opcode = Opcode::try_from(u32::from(header.code)).ok();
        let reply = match opcode {
            Some(Opcode::Read) => self.read(responder, memory, header, path, outbox),
            Some(opcode) if opcode.is_atomic() => Ok(self.atomic(responder, memory, header, opcode)),
            Some(opcode) if self.shares && takes_receive(opcode) => {
                Ok(self.announcement(responder, memory, header, opcode))
            }
            Some(opcode) if !opcode.is_local() && opcode.allowed_on(counterpart(responder.qp_type())) => {
                let request = request(header, opcode, payload);
                Ok(responder.handle(memory, &request, &mut self.stage))
            }
            _ if responder.qp_type() == QpType::Uc => Ok(Reply::Silence),
            _ => Ok(INVALID_REQUEST),
        };
        if !again && reply == Ok(Reply::Ack) && header.flags & ANNOUNCES != 0 && self.shares {
            self.announced.push_back(match opcode {
                Some(Opcode::SendWithInv) => Announced::Invalidates(header.imm),
                _ => Announced::Written(header.total),
            });
        }
        match reply {
            Ok(reply) => self.conclude(reply, again, header.psn),
            Err(outcome) => outcome,
        }
    }

    /// What takes receives comes by NIC; here only the key that such a SEND invalidates is told.
    fn announcement<M: Memory>(
        &self,
        responder: &Responder,
        memory: &M,
        header: &Header,
        opcode: Opcode,
    ) -> Reply {
        let is_one = opcode == Opcode::SendWithInv && header.flags & ANNOUNCES != 0 && header.total == 0;
        if is_one && self.announced.len() < WAITING && responder.may_invalidate(memory, header.imm) {
            Reply::Ack
        } else {
            INVALID_REQUEST
        }
    }

    fn conclude(&mut self, reply: Reply, again: bool, psn: u64) -> Outcome {
        match reply {
            Reply::Foreign => return Outcome::Foreign,
            Reply::Ack | Reply::Partly(_) => self.advance(again, psn),
            Reply::Found(word) => {
                self.advance(again, psn);
                self.results.push_back((psn, word));
                if self.results.len() > REMEMBERED {
                    self.results.pop_front();
                }
                self.owe_found(psn);
            }
            Reply::Rnr(code) => {
                self.refuse();
                self.owed.rnr = Some(code);
                return Outcome::NoReceive;
            }
            Reply::Nak(status, event) => {
                self.refuse();
                self.owed.nak = Some((psn, status));
                return Outcome::Refused(event);
            }
            Reply::Silence | Reply::SourceFault | Reply::OutOfReach | Reply::Refused => self.refuse(),
        }
        self.stage.clear();
        Outcome::Over
    }

    fn owe_found(&mut self, psn: u64) {
        self.owed.found = Some(self.owed.found.map_or(psn, |from| from.min(psn)));
    }

    fn advance(&mut self, again: bool, psn: u64) {
        if !again {
            self.expected = psn + 1;
            self.accepting = self.accepting.max(self.expected);
        }
        self.owed.ack = true;
    }

    /// The packet was not executed: the peer sends it again, with all behind it.
    fn refuse(&mut self) {
        self.forget_waiting();
        self.stage.clear();
        self.refused = true;
    }

    /// A packet of an unreliable QP is over, whatever came of it. `lost`: so is the rest of its message.
    pub(crate) fn pass(&mut self, psn: u64) {
        self.broken = self.refused;
        self.refused = false;
        self.expected = psn + 1;
        self.accepting = self.accepting.max(self.expected);
        self.owed = Owed::default();
    }

    fn atomic<M: Memory>(
        &mut self,
        responder: &mut Responder,
        memory: &M,
        header: &Header,
        opcode: Opcode,
    ) -> Reply {
        let operation = match opcode {
            Opcode::CmpAndSwp => {
                Atomic::CompareSwap { compare: header.operands[0], swap: header.operands[1] }
            }
            _ => Atomic::FetchAdd(header.operands[0]),
        };
        match self.stage.found() {
            Some(word) => Reply::Found(word),
            None => responder.atomic(memory, &request(header, opcode, &[]), operation, &mut self.stage),
        }
    }

    /// Sends the next piece of what a READ asks for. Its rights are checked for each.
    fn read<M: Memory>(
        &mut self,
        responder: &mut Responder,
        memory: &M,
        header: &mut Header,
        path: &Path,
        outbox: &mut Outbox,
    ) -> Result<Reply, Outcome> {
        let span = match responder.read(memory, &request(header, Opcode::Read, &[])) {
            Ok(span) => span,
            Err(reply) => return Ok(reply),
        };
        if !outbox.has_room(path.source_qpn) {
            return Err(Outcome::NoRoom);
        }
        let (at, left) = (u64::from(header.offset), u64::from(header.total - header.offset));
        let len = left.min(SEGMENT);
        let mut data = Header::new(Kind::Data, 0, path, header.stream, header.psn);
        (data.len, data.total, data.offset) = (len as u32, header.total, header.offset);
        let stage = &mut self.stage;
        let packed = outbox.push_with(&data, |into| match len {
            0 => Ok(()),
            _ => append(Side::Spans(memory, span.as_slice()), at, len, stage, into),
        });
        match packed {
            Err(Broken::Foreign) => Ok(Reply::Foreign),
            Err(_) => Ok(OPERATION),
            Ok(()) if len == left => Ok(Reply::Ack),
            Ok(()) => {
                header.offset += len as u32;
                Err(Outcome::Partly(len))
            }
        }
    }

    /// A receive has been posted, or the QP can be sent to at last: whoever was refused may try again.
    pub(crate) fn welcome(&mut self) {
        self.refused = false;
        self.owed.ready = true;
    }

    /// Whether the peer is to be told something.
    pub(crate) fn owes(&self) -> bool {
        let Owed { ack, gap, ready, rnr, nak, found } = self.owed;
        ack || gap || ready || found.is_some() || rnr.is_some() || nak.is_some()
    }

    /// Whether the peer is owed an acknowledgement and nothing else.
    pub(crate) fn owes_ack_alone(&self) -> bool {
        let Owed { ack, gap, ready, rnr, nak, found } = self.owed;
        ack && !(gap || ready || found.is_some() || rnr.is_some() || nak.is_some())
    }

    /// Tells the peer what it is owed. False: there is no room for it.
    pub(crate) fn tell(&mut self, path: &Path, outbox: &mut Outbox, forced: bool) -> bool {
        if !outbox.has_reply_room() && !forced {
            return false;
        }
        let owed = std::mem::take(&mut self.owed);
        let stream = self.stream.unwrap_or(0);
        let say = |kind, code| Header::new(kind, code, path, stream, self.expected);
        if let Some(from) = owed.found {
            for (psn, word) in self.results.iter().filter(|(psn, _)| *psn >= from) {
                let found = Header::new(Kind::Found, 0, path, stream, *psn);
                outbox.push(&Header { operands: [*word, 0], ..found });
            }
        }
        match (owed.nak, owed.rnr) {
            (Some((psn, status)), _) => {
                outbox.push(&Header { psn, ..say(Kind::Nak, status.value() as u8) });
            }
            (None, Some(code)) => outbox.push(&say(Kind::Rnr, code)),
            (None, None) if owed.gap => outbox.push(&say(Kind::Gap, 0)),
            (None, None) if owed.ack || owed.found.is_some() => outbox.push(&say(Kind::Ack, 0)),
            (None, None) => {}
        }
        if owed.ready {
            outbox.push(&say(Kind::Ready, 0));
        }
        true
    }
}

const READ: u8 = Opcode::Read.value() as u8;

fn takes_receive(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Send | Opcode::SendWithImm | Opcode::SendWithInv | Opcode::WriteWithImm)
}

/// The request that a packet carries.
fn request<'a, M>(header: &Header, opcode: Opcode, payload: &'a [u8]) -> Request<'a, M> {
    Request {
        opcode,
        source_qpn: header.path.source_qpn,
        remote_addr: header.remote_addr,
        rkey: header.rkey,
        len: header.total.into(),
        imm: header.imm,
        solicited: header.flags & SOLICITED != 0,
        placed: header.offset.into(),
        payload_at: header.offset.into(),
        budget: payload.len() as u64,
        payload: Side::Bytes(payload),
        flush: Flush::of(header.operands[0], header.operands[1]),
    }
}
