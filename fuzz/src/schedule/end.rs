//! One end of a connection, with what its application knows: what it posted, what must come of it.

use std::{collections::VecDeque, sync::atomic::Ordering};

use verbs_abi::{
    shm::{
        Window,
        wqe::{SendWqe, Sge, flag},
    },
    verbs::{Opcode, WcStatus},
};

use super::seat::SendQueue;
use crate::{
    Input,
    memory::{BASE, REGION, Region, addr, canary, iova, key},
    world::{Client, DEPTH},
};

/// Bytes of a message at most, and of a receive.
const MESSAGE: u64 = 32;
const RECEIVE: u64 = 64;
/// Where in `Region::Mapped` the words lie that peers add to.
const COUNTERS: u64 = 512;
const FOUND: u64 = 528;
const READS: u64 = 544;
const READ: u64 = 240;
const WRITE: u64 = 512;

/// What was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Send,
    Write {
        at: u64,
        len: u64,
    },
    Read {
        at: u64,
        len: u64,
    },
    Add,
    /// Something that no key allows.
    Wrong,
}

#[derive(Clone, Copy, Debug)]
struct Posted {
    id: u64,
    kind: Kind,
    signaled: bool,
}

/// One end.
#[derive(Debug)]
pub(crate) struct End {
    /// Which QP of its client.
    pub(crate) qp: usize,
    /// Tells messages of this life of the QP from those of others.
    pub(crate) life: u32,
    pub(crate) queue: SendQueue,
    posted: VecDeque<Posted>,
    next_send: u64,
    /// Messages posted, and those completed well.
    messages: u32,
    delivered: u32,
    /// Additions completed well, and what the peer's word was before the first.
    added: u64,
    pub(crate) counter_at_first: u64,
    failed: bool,
    receives: VecDeque<u64>,
    next_receive: u64,
    receives_failed: bool,
    /// The life of the peer that sends, and the number of its next message.
    pub(crate) expected: Option<(u32, u32)>,
    /// The peer that it was connected with is gone, and its memory with it.
    pub(crate) peer_lost: bool,
}

impl End {
    pub(crate) fn new(qp: usize, life: u32) -> Self {
        Self {
            qp,
            life,
            queue: SendQueue::default(),
            posted: VecDeque::new(),
            next_send: 0,
            messages: 0,
            delivered: 0,
            added: 0,
            counter_at_first: 0,
            failed: false,
            receives: VecDeque::new(),
            next_receive: 0,
            receives_failed: false,
            expected: None,
            peer_lost: false,
        }
    }

    /// Whether whatever should have told of its end has done so.
    pub(crate) fn is_done(&self) -> bool {
        !self.posted.iter().any(|posted| posted.signaled)
    }

    /// Whether all receives have come to their end.
    pub(crate) fn has_no_receive(&self) -> bool {
        self.receives.is_empty()
    }

    fn silent(&self, kind: Kind) -> usize {
        self.posted.iter().filter(|posted| posted.kind == kind).count()
    }

    /// Messages that were delivered. Those that end in silence are among them, once [`Self::is_done`].
    pub(crate) fn delivered(&self) -> u32 {
        self.delivered + self.silent(Kind::Send) as u32
    }

    /// Posts something, if there is a place.
    pub(crate) fn post(&mut self, client: &Client, peer: &Client, input: &mut Input<'_>) {
        if self.posted.len() == DEPTH as usize {
            return;
        }
        if !self.queue.is_posting() {
            self.queue.begin(&client.qps[self.qp]);
        }
        let mut wqe = SendWqe::default();
        wqe.wr_id = self.next_send;
        let choice = input.u8();
        // The last place is for one that tells when the others are done.
        let signaled = choice & 0x80 == 0 || self.posted.len() + 1 == DEPTH as usize;
        wqe.flags = if signaled { flag::SIGNALED } else { 0 };
        let kind = match choice & 15 {
            0..=5 => self.message(client, &mut wqe, input),
            6..=8 => self.write(client, peer, &mut wqe, input),
            9..=11 => self.read(client, peer, &mut wqe, input),
            12..=14 => self.add(client, peer, &mut wqe),
            _ => wrong(client, &mut wqe, input),
        };
        self.posted.push_back(Posted { id: self.next_send, kind, signaled });
        self.next_send += 1;
        self.queue.post(&client.qps[self.qp], wqe);
    }

    /// Is killed while it posts a message.
    pub(crate) fn die(&mut self, client: &Client, told: bool, input: &mut Input<'_>) {
        let mut wqe = SendWqe::default();
        self.message(client, &mut wqe, input);
        self.queue.die(&client.qps[self.qp], wqe, told);
    }

    fn message(&mut self, client: &Client, wqe: &mut SendWqe, input: &mut Input<'_>) -> Kind {
        wqe.opcode = Opcode::Send.value() as u8;
        let len = 8 + u64::from(input.u8()) % (MESSAGE - 7);
        let content = u64::from(self.life) | u64::from(self.messages) << 32;
        let mut bytes = [self.messages as u8; MESSAGE as usize];
        bytes[..8].copy_from_slice(&content.to_le_bytes());
        self.messages += 1;
        if input.u8() & 1 == 0 {
            wqe.inline_mut(len as usize).unwrap().copy_from_slice(&bytes[..len as usize]);
            return Kind::Send;
        }
        let slot = (self.qp as u64 * 8 + self.next_send % 8) * MESSAGE;
        for (i, word) in bytes.chunks(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            word_at(&client.bytes, Region::Mapped, slot + i as u64 * 8).store(word, Ordering::Relaxed);
        }
        assert!(wqe.push_sge(local(client.id, Region::Mapped, slot, len)));
        Kind::Send
    }

    fn write(&self, client: &Client, peer: &Client, wqe: &mut SendWqe, input: &mut Input<'_>) -> Kind {
        wqe.opcode = Opcode::Write.value() as u8;
        let at = u64::from(input.u16()) % WRITE;
        let len = 1 + u64::from(input.u16()) % (WRITE - at);
        let source = self.qp as u64 * WRITE + at;
        if !self.posted.iter().any(|posted| matches!(posted.kind, Kind::Write { .. })) {
            clear(peer, Region::Foreign, self.qp as u64 * WRITE, WRITE);
        }
        // In two pieces where it can be.
        let cut = (len / 3).max(1);
        assert!(wqe.push_sge(local(client.id, Region::ReadOnly, source, cut)));
        if len > cut {
            assert!(wqe.push_sge(local(client.id, Region::ReadOnly, source + cut, len - cut)));
        }
        wqe.remote_addr = iova(Region::Foreign) + self.qp as u64 * WRITE + at;
        wqe.rkey = key(peer.id, Region::Foreign);
        Kind::Write { at, len }
    }

    fn read(&self, client: &Client, peer: &Client, wqe: &mut SendWqe, input: &mut Input<'_>) -> Kind {
        wqe.opcode = Opcode::Read.value() as u8;
        let at = u64::from(input.u8()) % READ;
        let len = 1 + u64::from(input.u8()) % (READ - at);
        let target = READS + self.qp as u64 * READ + at;
        if !self.posted.iter().any(|posted| matches!(posted.kind, Kind::Read { .. })) {
            clear(client, Region::Mapped, READS + self.qp as u64 * READ, READ);
        }
        assert!(wqe.push_sge(local(client.id, Region::Mapped, target, len)));
        (wqe.remote_addr, wqe.rkey) = (iova(Region::Shifted).wrapping_add(at), key(peer.id, Region::Shifted));
        Kind::Read { at, len }
    }

    fn add(&self, client: &Client, peer: &Client, wqe: &mut SendWqe) -> Kind {
        wqe.opcode = Opcode::FetchAndAdd.value() as u8;
        wqe.compare_add = 1;
        assert!(wqe.push_sge(local(client.id, Region::Mapped, FOUND + self.qp as u64 * 8, 8)));
        wqe.remote_addr = iova(Region::Mapped) + COUNTERS + self.qp as u64 * 8;
        wqe.rkey = key(peer.id, Region::Mapped);
        Kind::Add
    }

    /// Posts a receive, if there is a place; rarely one that is too short. True: the router is to be rung.
    pub(crate) fn post_receive(&mut self, client: &Client, input: &mut Input<'_>) -> bool {
        if self.receives.len() == DEPTH as usize {
            return false;
        }
        let slot = (self.qp as u64 * 8 + self.next_receive % 8) * RECEIVE;
        let len = if input.u8() == 0xff { 4 } else { RECEIVE };
        let sges = [
            local(client.id, Region::Edges, slot, len / 4),
            local(client.id, Region::Edges, slot + len / 4, len - len / 4),
        ];
        self.receives.push_back(self.next_receive);
        self.next_receive += 1;
        client.qps[self.qp].post_recv(self.next_receive - 1, &sges)
    }

    /// Takes all completions and holds them against what was posted.
    pub(crate) fn poll(&mut self, client: &mut Client, peer: &Client) {
        while let Some(done) = client.qps[self.qp].sends.pop() {
            loop {
                let posted = self.posted.pop_front().unwrap_or_else(|| panic!("nobody posted {done:?}"));
                if posted.id == done.wr_id {
                    self.ended(&posted, done.status, client, peer);
                    break;
                }
                assert!(!posted.signaled, "{posted:?} was left out before {done:?}");
                self.ended(&posted, 0, client, peer);
            }
        }
        while let Some(done) = client.qps[self.qp].receives.pop() {
            assert_eq!(Some(done.wr_id), self.receives.pop_front(), "a receive out of turn: {done:?}");
            assert!(done.status != 0 || !self.receives_failed, "a receive after an error: {done:?}");
            self.receives_failed |= done.status != 0;
            if done.status == 0 {
                self.received(client, done.wr_id, done.byte_len);
            }
        }
    }

    fn ended(&mut self, posted: &Posted, status: u8, client: &Client, peer: &Client) {
        if status != 0 {
            let flushed = u32::from(status) == WcStatus::WrFlushErr.value();
            assert!(!self.failed || flushed, "a second error, {status}: {posted:?}");
            self.failed = true;
            return;
        }
        assert!(!self.failed && posted.kind != Kind::Wrong, "done well: {posted:?}");
        let others = self.posted.iter().map(|other| other.kind);
        let (writes, reads) = others.clone().fold((false, false), |(writes, reads), kind| {
            (writes | matches!(kind, Kind::Write { .. }), reads | matches!(kind, Kind::Read { .. }))
        });
        let adds = others.into_iter().any(|kind| kind == Kind::Add);
        match posted.kind {
            Kind::Send => self.delivered += 1,
            Kind::Add => {
                self.added += 1;
                if !adds {
                    let found = word_at(&client.bytes, Region::Mapped, FOUND + self.qp as u64 * 8);
                    let expected = self.counter_at_first.wrapping_add(self.added - 1);
                    assert_eq!(found.load(Ordering::Relaxed), expected, "what an addition found");
                }
            }
            Kind::Write { at, len } if !writes && !self.peer_lost => {
                let from = (client, Region::ReadOnly, self.qp as u64 * WRITE + at);
                assert_same(from, (peer, Region::Foreign, self.qp as u64 * WRITE + at), len);
            }
            Kind::Read { at, len } if !reads && !self.peer_lost => {
                let to = READS + self.qp as u64 * READ + at;
                assert_same((peer, Region::Shifted, at), (client, Region::Mapped, to), len);
            }
            _ => {}
        }
    }

    fn received(&mut self, client: &Client, receive: u64, len: u32) {
        let slot = (self.qp as u64 * 8 + receive % 8) * RECEIVE;
        let content = word_at(&client.bytes, Region::Edges, slot).load(Ordering::Relaxed);
        let (life, message) = (content as u32, (content >> 32) as u32);
        for at in 8..u64::from(len) {
            assert_eq!(byte_at(client, Region::Edges, slot + at), message as u8, "byte {at} of a message");
        }
        if let Some((known, next)) = self.expected {
            let right = if known == life { next } else { 0 };
            assert_eq!(message, right, "messages of {life} got lost or came twice");
        }
        self.expected = Some((life, message + 1));
    }

    /// Whether the peer's word is what so many additions make of it, once [`Self::is_done`].
    pub(crate) fn check_counter(&self, peer: &Client) {
        let added = self.added + self.silent(Kind::Add) as u64;
        let expected = self.counter_at_first.wrapping_add(added);
        assert!(self.peer_lost || counter(peer, self.qp) == expected, "additions got lost or came twice");
    }
}

/// The word of a client that QP `qp` of its peer adds to.
pub(crate) fn counter(client: &Client, qp: usize) -> u64 {
    word_at(&client.bytes, Region::Mapped, COUNTERS + qp as u64 * 8).load(Ordering::Relaxed)
}

/// Forgets what was placed there.
fn clear(client: &Client, region: Region, offset: u64, len: u64) {
    for at in (0..len).step_by(8) {
        word_at(&client.bytes, region, offset + at).store(0, Ordering::Relaxed);
    }
}

fn wrong(client: &Client, wqe: &mut SendWqe, input: &mut Input<'_>) -> Kind {
    wqe.opcode = Opcode::Write.value() as u8;
    assert!(wqe.push_sge(local(client.id, Region::Mapped, 0, 8)));
    match input.u8() % 3 {
        0 => (wqe.remote_addr, wqe.rkey) = (iova(Region::Mapped), 77),
        1 => (wqe.remote_addr, wqe.rkey) = (BASE, key(client.id, Region::OtherPd)),
        _ => assert!(wqe.push_sge(Sge { addr: BASE, length: 1, lkey: key(client.id, Region::Mapped) })),
    }
    Kind::Wrong
}

fn local(client: u32, region: Region, offset: u64, len: u64) -> Sge {
    assert!(offset + len <= REGION);
    Sge { addr: addr(region) + offset, length: len as u32, lkey: key(client, region) }
}

fn word_at(bytes: &Window, region: Region, offset: u64) -> &std::sync::atomic::AtomicU64 {
    bytes.u64((addr(region) - BASE + offset) as usize)
}

fn byte_at(client: &Client, region: Region, offset: u64) -> u8 {
    let at = addr(region) - BASE + offset;
    client.bytes.u64((at & !7) as usize).load(Ordering::Relaxed).to_le_bytes()[(at % 8) as usize]
}

fn assert_same(from: (&Client, Region, u64), to: (&Client, Region, u64), len: u64) {
    for i in 0..len {
        let at = addr(from.1) - BASE + from.2 + i;
        let sent = canary(from.0.id, at & !7).to_le_bytes()[(at % 8) as usize];
        assert_eq!(byte_at(to.0, to.1, to.2 + i), sent, "byte {i} of {len}");
    }
}
