//! What two QPs do, said as simply as it can be said: two memories, two pairs of queues, one rule after the other.
//!
//! Nothing here knows of turns, slices, rings, seats or shared words. Addresses are offsets into a memory.

use std::collections::VecDeque;

use verbs_abi::{
    timer::{ack_timeout, rnr_timer},
    verbs::{EventType, Opcode, QpState, QpType, WcStatus},
};

pub(super) const LOCAL_WRITE: u32 = 1;
const REMOTE_WRITE: u32 = 2;
const REMOTE_READ: u32 = 4;
const REMOTE_ATOMIC: u32 = 8;
const GRH: usize = 40;
/// How long a requester that never gives up pauses at least, ns.
const LONG_PAUSE: u64 = 10_000_000;
const GRACE: u64 = 100_000_000;

/// What a key opens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) start: i64,
    pub(super) len: i64,
    pub(super) rights: u32,
    /// Whether it is of the QP's PD.
    pub(super) own_pd: bool,
    pub(super) valid: bool,
}

/// A piece of memory as an application names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) key: usize,
    pub(super) at: i64,
    pub(super) len: usize,
}

/// A send work request.
#[derive(Clone, Debug)]
pub(super) struct Send {
    pub(super) id: u64,
    pub(super) opcode: Opcode,
    pub(super) signaled: bool,
    pub(super) pieces: Vec<Piece>,
    /// Payload that was taken at the post.
    pub(super) inline: Option<Vec<u8>>,
    pub(super) remote: Piece,
    pub(super) imm: u32,
    pub(super) operands: [u64; 2],
    /// Whether a datagram carries the receiver's Q_Key.
    pub(super) good_qkey: bool,
}

/// A completion: what verbs promises of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) id: u64,
    pub(super) status: WcStatus,
    /// Bytes received, or read.
    pub(super) len: Option<u32>,
    pub(super) imm: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
enum Wait {
    Receive { until: u64 },
    Answer { until: u64 },
}

/// One application.
#[derive(Debug)]
pub(super) struct End {
    pub(super) memory: Vec<u8>,
    pub(super) keys: Vec<Key>,
    pub(super) state: QpState,
    pub(super) sends: VecDeque<Send>,
    pub(super) receives: VecDeque<(u64, Vec<Piece>)>,
    /// What happened since it was last taken.
    pub(super) sent: Vec<Done>,
    pub(super) received: Vec<Done>,
    pub(super) events: Vec<EventType>,
    wait: Option<Wait>,
    rnr_left: u8,
    tries_left: u8,
    established: bool,
    draining: bool,
}

/// Attributes of both QPs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) timeout: u8,
    pub(super) retry_cnt: u8,
    pub(super) rnr_retry: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) access: u32,
    pub(super) rd_atomic: u8,
}

/// Both applications.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) qp_type: QpType,
    pub(super) attributes: Attributes,
    pub(super) ends: [End; 2],
    pub(super) gids: [[u8; 16]; 2],
}

/// How a request ended.
enum Outcome {
    /// What a READ or an atomic brought.
    Done(Vec<u8>),
    Local(WcStatus),
    /// Refused; what the receive that it would have taken ends with, and the event.
    Refused(WcStatus, Option<WcStatus>, Option<EventType>),
    NoReceive,
    Silence,
}

impl End {
    pub(super) fn new(memory: Vec<u8>, keys: Vec<Key>) -> Self {
        Self {
            memory,
            keys,
            state: QpState::Reset,
            sends: VecDeque::new(),
            receives: VecDeque::new(),
            sent: Vec::new(),
            received: Vec::new(),
            events: Vec::new(),
            wait: None,
            rnr_left: 0,
            tries_left: 0,
            established: false,
            draining: false,
        }
    }

    fn opens(&self, piece: Piece, rights: u32) -> bool {
        let key = self.keys[piece.key];
        let inside = piece.at >= key.start && piece.at + piece.len as i64 <= key.start + key.len;
        key.valid && key.own_pd && inside && key.rights & rights == rights
    }

    fn open_list(&self, pieces: &[Piece], rights: u32) -> bool {
        pieces.iter().all(|piece| piece.len == 0 || self.opens(*piece, rights))
    }

    fn bytes(&self, piece: Piece) -> &[u8] {
        if piece.len == 0 { &[] } else { &self.memory[piece.at as usize..][..piece.len] }
    }

    pub(super) fn gather(&self, pieces: &[Piece]) -> Vec<u8> {
        pieces.iter().flat_map(|piece| self.bytes(*piece).to_vec()).collect()
    }

    fn scatter(&mut self, pieces: &[Piece], mut data: &[u8]) {
        for piece in pieces {
            let (here, rest) = data.split_at(piece.len.min(data.len()));
            if !here.is_empty() {
                self.memory[piece.at as usize..][..here.len()].copy_from_slice(here);
            }
            data = rest;
        }
    }

    fn hears(&self) -> bool {
        self.state.may_respond()
    }

    fn flush_sends(&mut self) {
        let failed = |send: Send| Done { id: send.id, status: WcStatus::WrFlushErr, len: None, imm: None };
        self.sent.extend(self.sends.drain(..).map(failed));
        (self.wait, self.draining) = (None, false);
    }

    fn flush_receives(&mut self) {
        let failed = |(id, _)| Done { id, status: WcStatus::WrFlushErr, len: None, imm: None };
        self.received.extend(self.receives.drain(..).map(failed));
    }

    fn end_receive(&mut self, status: WcStatus, len: Option<u32>, imm: Option<u32>) {
        if let Some((id, _)) = self.receives.pop_front() {
            self.received.push(Done { id, status, len, imm });
        }
    }
}

/// The pieces of a list that the first `len` bytes touch.
fn touched(pieces: &[Piece], mut len: usize) -> Vec<Piece> {
    let mut touched = Vec::new();
    for piece in pieces {
        let here = piece.len.min(len);
        if here > 0 {
            touched.push(Piece { len: here, ..*piece });
        }
        len -= here;
    }
    touched
}

fn length(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.len).sum()
}

impl Model {
    fn is_reliable(&self) -> bool {
        self.qp_type == QpType::Rc
    }

    /// Changes a state, as `ibv_modify_qp` does.
    pub(super) fn enter(&mut self, at: usize, state: QpState, announce: bool) {
        let end = &mut self.ends[at];
        match (end.state, state) {
            (_, QpState::Reset) => {
                end.sends.clear();
                end.receives.clear();
                (end.wait, end.established, end.draining) = (None, false, false);
            }
            (QpState::Rts, QpState::Sqd) if end.sends.is_empty() && announce => {
                end.events.push(EventType::SqDrained);
            }
            (QpState::Rts, QpState::Sqd) => end.draining = announce,
            _ => end.draining = false,
        }
        end.state = state;
    }

    /// Lets everything happen that can happen at this time; what was due first happens first.
    pub(super) fn settle(&mut self, now: u64) {
        loop {
            let due = |at: usize| match self.ends[at].wait {
                Some(Wait::Receive { until } | Wait::Answer { until }) => until,
                None => 0,
            };
            let order = if due(0) <= due(1) { [0, 1] } else { [1, 0] };
            if !order.into_iter().any(|at| self.step(at, now)) {
                return;
            }
        }
    }

    fn step(&mut self, at: usize, now: u64) -> bool {
        let other = &self.ends[1 - at];
        let (hears, has_receive) = (other.hears(), !other.receives.is_empty());
        let end = &mut self.ends[at];
        match end.state {
            QpState::Err if !end.sends.is_empty() || !end.receives.is_empty() => {
                end.flush_sends();
                end.flush_receives();
                return true;
            }
            QpState::Sqe if !end.sends.is_empty() => {
                end.flush_sends();
                return true;
            }
            QpState::Rts => {}
            // What was begun is what waits.
            QpState::Sqd if end.wait.is_some() => {}
            _ => return false,
        }
        let due = match end.wait {
            None => true,
            Some(Wait::Receive { until }) => now >= until || hears && has_receive,
            Some(Wait::Answer { until }) => now >= until || hears,
        };
        match end.sends.front().cloned() {
            Some(send) if due => self.attempt(at, &send, now),
            _ => return false,
        }
        true
    }

    fn attempt(&mut self, at: usize, send: &Send, now: u64) {
        if self.ends[at].wait.is_none() {
            self.ends[at].rnr_left = self.attributes.rnr_retry.max(1);
            self.ends[at].tries_left = self.attributes.retry_cnt;
        }
        match self.execute(at, send) {
            Outcome::Done(found) => self.succeed(at, send, &found),
            Outcome::Local(status) => self.fail(at, status),
            Outcome::Silence | Outcome::NoReceive if !self.is_reliable() => self.succeed(at, send, &[]),
            Outcome::Silence => self.wait_answer(at, now),
            Outcome::NoReceive => self.wait_receive(at, now),
            Outcome::Refused(status, receive, event) => self.refused(at, send, status, receive, event),
        }
    }

    fn wait_receive(&mut self, at: usize, now: u64) {
        let mut pause = rnr_timer(self.attributes.min_rnr_timer).as_nanos() as u64;
        if self.attributes.rnr_retry == 7 {
            pause = pause.max(LONG_PAUSE);
        } else if self.ends[at].rnr_left == 0 {
            return self.fail(at, WcStatus::RnrRetryExcErr);
        } else {
            self.ends[at].rnr_left -= 1;
            if self.attributes.rnr_retry == 0 {
                pause = GRACE;
            }
        }
        self.ends[at].wait = Some(Wait::Receive { until: now + pause });
    }

    fn wait_answer(&mut self, at: usize, now: u64) {
        let timeout =
            ack_timeout(self.attributes.timeout).map_or(u64::MAX / 2, |time| time.as_nanos() as u64);
        let end = &mut self.ends[at];
        if let Some(Wait::Answer { .. }) = end.wait {
            if end.tries_left == 0 {
                return self.fail(at, WcStatus::RetryExcErr);
            }
            end.tries_left -= 1;
        }
        end.wait = Some(Wait::Answer { until: now + timeout });
    }

    fn succeed(&mut self, at: usize, send: &Send, found: &[u8]) {
        let end = &mut self.ends[at];
        end.scatter(&send.pieces, found);
        end.sends.pop_front();
        end.wait = None;
        if send.signaled {
            let len = send.opcode.writes_locally().then_some(found.len() as u32);
            end.sent.push(Done { id: send.id, status: WcStatus::Success, len, imm: None });
        }
        if end.state == QpState::Sqd && std::mem::take(&mut end.draining) {
            end.events.push(EventType::SqDrained);
        }
    }

    fn fail(&mut self, at: usize, status: WcStatus) {
        let reliable = self.is_reliable();
        let end = &mut self.ends[at];
        if let Some(send) = end.sends.pop_front() {
            end.sent.push(Done { id: send.id, status, len: None, imm: None });
        }
        end.flush_sends();
        end.state = QpState::Sqe;
        if reliable {
            end.flush_receives();
            end.state = QpState::Err;
        }
    }

    fn refused(
        &mut self,
        at: usize,
        send: &Send,
        status: WcStatus,
        receive: Option<WcStatus>,
        event: Option<EventType>,
    ) {
        let reliable = self.is_reliable();
        let peer = &mut self.ends[1 - at];
        // Without an answer only a receive that is bad itself is anybody's error.
        let peer_fails = reliable || receive == Some(WcStatus::LocProtErr);
        if peer_fails {
            match (receive, event) {
                (Some(status), _) => peer.end_receive(status, None, None),
                (None, event) => peer.events.extend(event),
            }
            peer.flush_sends();
            peer.flush_receives();
            peer.state = QpState::Err;
        }
        if reliable { self.fail(at, status) } else { self.succeed(at, send, &[]) }
    }

    fn execute(&mut self, at: usize, send: &Send) -> Outcome {
        if let Some(status) = self.local_fault(at, send) {
            return Outcome::Local(status);
        }
        let data = match &send.inline {
            Some(bytes) => bytes.clone(),
            None if send.opcode.writes_locally() => Vec::new(),
            None => self.ends[at].gather(&send.pieces),
        };
        let gids = [self.gids[at], self.gids[1 - at]];
        let peer = &mut self.ends[1 - at];
        if !peer.hears() {
            return Outcome::Silence;
        }
        if self.qp_type == QpType::Ud {
            return if send.good_qkey { datagram(peer, send, &data, gids) } else { Outcome::Silence };
        }
        if peer.state == QpState::Rtr && !peer.established {
            peer.established = true;
            peer.events.push(EventType::CommEst);
        }
        let access = self.attributes.access;
        let invalid = Outcome::Refused(WcStatus::RemInvReqErr, None, Some(EventType::QpReqErr));
        match send.opcode {
            Opcode::Send | Opcode::SendWithImm => receive(peer, send, &data),
            Opcode::Write | Opcode::WriteWithImm if access & REMOTE_WRITE == 0 => invalid,
            Opcode::Write | Opcode::WriteWithImm => write(peer, send, &data),
            Opcode::Read if access & REMOTE_READ == 0 => invalid,
            Opcode::Read => read(peer, send),
            _ if access & REMOTE_ATOMIC == 0 || send.remote.at % 8 != 0 => invalid,
            _ => atomic(peer, send),
        }
    }

    /// What is wrong before a peer is asked.
    fn local_fault(&self, at: usize, send: &Send) -> Option<WcStatus> {
        let datagram = self.qp_type == QpType::Ud;
        let brings = send.opcode.writes_locally();
        let known = match self.qp_type {
            QpType::Rc => true,
            QpType::Uc => !brings,
            _ => matches!(send.opcode, Opcode::Send | Opcode::SendWithImm),
        };
        let len = send.inline.as_ref().map_or(length(&send.pieces), Vec::len);
        let atomic = matches!(send.opcode, Opcode::CmpAndSwp | Opcode::FetchAndAdd);
        if !known {
            Some(WcStatus::LocQpOpErr)
        } else if datagram && len > 4096 || atomic && len != 8 {
            Some(WcStatus::LocLenErr)
        } else if brings && self.attributes.rd_atomic == 0 {
            Some(WcStatus::LocQpOpErr)
        } else {
            let rights = if brings { LOCAL_WRITE } else { 0 };
            let open = send.inline.is_some() || self.ends[at].open_list(&send.pieces, rights);
            (!open).then_some(WcStatus::LocProtErr)
        }
    }
}

const ACCESS: Option<EventType> = Some(EventType::QpAccessErr);

fn with_imm(send: &Send) -> Option<u32> {
    send.opcode.has_imm().then_some(send.imm)
}

fn receive(peer: &mut End, send: &Send, data: &[u8]) -> Outcome {
    let Some((_, pieces)) = peer.receives.front().cloned() else { return Outcome::NoReceive };
    if data.len() > length(&pieces) {
        return Outcome::Refused(WcStatus::RemInvReqErr, Some(WcStatus::LocLenErr), None);
    }
    if !peer.open_list(&touched(&pieces, data.len()), LOCAL_WRITE) {
        return Outcome::Refused(WcStatus::RemOpErr, Some(WcStatus::LocProtErr), None);
    }
    peer.scatter(&pieces, data);
    peer.end_receive(WcStatus::Success, Some(data.len() as u32), with_imm(send));
    Outcome::Done(Vec::new())
}

fn datagram(peer: &mut End, send: &Send, data: &[u8], [from, to]: [[u8; 16]; 2]) -> Outcome {
    let Some((_, pieces)) = peer.receives.front().cloned() else { return Outcome::Silence };
    if data.len() + GRH > length(&pieces) {
        return Outcome::Silence;
    }
    // An IPv6 header: version, payload (UDP header, BTH, DETH, data, ICRC), UDP, hop limit, addresses.
    let mut whole = vec![0x60, 0, 0, 0];
    whole.extend((data.len() as u16 + 8 + 12 + 8 + 4).to_be_bytes());
    whole.extend([17, 0]);
    whole.extend(from);
    whole.extend(to);
    whole.extend(data);
    receive(peer, send, &whole)
}

fn write(peer: &mut End, send: &Send, data: &[u8]) -> Outcome {
    let immediate = send.opcode == Opcode::WriteWithImm;
    if immediate && peer.receives.is_empty() {
        return Outcome::NoReceive;
    }
    let target = Piece { len: data.len(), ..send.remote };
    if target.len > 0 && !peer.opens(target, REMOTE_WRITE) {
        let receive = immediate.then_some(WcStatus::LocAccessErr);
        return Outcome::Refused(WcStatus::RemAccessErr, receive, ACCESS);
    }
    peer.scatter(&[target], data);
    if immediate {
        peer.end_receive(WcStatus::Success, Some(data.len() as u32), with_imm(send));
    }
    Outcome::Done(Vec::new())
}

fn read(peer: &End, send: &Send) -> Outcome {
    let source = Piece { len: length(&send.pieces), ..send.remote };
    if source.len > 0 && !peer.opens(source, REMOTE_READ) {
        return Outcome::Refused(WcStatus::RemAccessErr, None, ACCESS);
    }
    Outcome::Done(peer.bytes(source).to_vec())
}

fn atomic(peer: &mut End, send: &Send) -> Outcome {
    let word = Piece { len: 8, ..send.remote };
    if !peer.opens(word, REMOTE_ATOMIC) {
        return Outcome::Refused(WcStatus::RemAccessErr, None, ACCESS);
    }
    let found = peer.bytes(word).to_vec();
    let old = u64::from_ne_bytes(found.clone().try_into().expect("eight bytes"));
    let [first, second] = send.operands;
    let new = match send.opcode {
        Opcode::FetchAndAdd => old.wrapping_add(first),
        _ if old == first => second,
        _ => old,
    };
    peer.scatter(&[word], &new.to_ne_bytes());
    Outcome::Done(found)
}
