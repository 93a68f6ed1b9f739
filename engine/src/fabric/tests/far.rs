//! Two hosts: a fabric each, joined by a link in memory that breaks when it is told to.

use std::collections::{HashMap, VecDeque};

use super::*;
use crate::wire::{
    Path,
    packet::{self, Header, Kind},
};

mod acks;
mod control;
mod groups;
mod placed;
mod property;
mod refusals;
mod shares;
mod streams;

/// Each knows the other as its peer 0.
pub(super) const PEER: u32 = 0;
/// The only stream of a link that has one.
const STREAM: Stream = Stream { peer: PEER, index: 0 };
/// Inside the mapped part of every app's buffer.
const MAPPED: u64 = 64 * 1024;

/// The addresses of clients on the other host.
#[derive(Debug)]
struct Elsewhere(Vec<Gid>);

impl Routing for Elsewhere {
    fn route(&self, tenant: u32, gid: &Gid) -> Option<u32> {
        (tenant == 0 && self.0.contains(gid)).then_some(PEER)
    }

    fn routers(&self, tenant: u32) -> Vec<u32> {
        if tenant == 0 { vec![PEER] } else { Vec::new() }
    }
}

/// Two hosts.
pub(super) struct Hosts {
    pub(super) fabrics: [Fabric<TestMemory>; 2],
    /// What is on its way to each.
    pipes: [VecDeque<u8>; 2],
    pub(super) up: bool,
    now: u64,
    /// Bytes that are delivered before the link breaks by itself.
    pub(super) fuse: Option<usize>,
    sent: u64,
    /// How often something was sent at once, as a socket is written to.
    writes: u64,
    /// By stream.
    sent_over: Vec<u64>,
    /// Streams whose sockets take nothing.
    blocked: Vec<usize>,
    /// Whether payload is read to where it belongs, and how many packets were.
    places: bool,
    placed: u64,
    /// Payload of requests that has come, by the number of the QP it was for.
    carried: HashMap<u32, u64>,
}

impl Hosts {
    pub(super) fn new() -> Self {
        let mut fabrics = [Fabric::new(), Fabric::new()];
        fabrics[0].set_routing(Arc::new(Elsewhere((11..20).map(gid).collect())));
        fabrics[1].set_routing(Arc::new(Elsewhere((1..10).map(gid).collect())));
        Self {
            fabrics,
            pipes: Default::default(),
            up: false,
            now: 0,
            fuse: None,
            sent: 0,
            writes: 0,
            sent_over: vec![0],
            blocked: Vec::new(),
            places: true,
            placed: 0,
            carried: HashMap::new(),
        }
    }

    pub(super) fn connect(&mut self) {
        self.up = true;
        for fabric in &mut self.fabrics {
            fabric.link_up(STREAM, 1, HashMap::from([(0, 0)]));
        }
    }

    pub(super) fn cut(&mut self) {
        self.up = false;
        self.pipes.iter_mut().for_each(VecDeque::clear);
        self.fabrics.iter_mut().for_each(|fabric| fabric.link_down(STREAM, false));
    }

    /// Lets both run until nothing moves.
    pub(super) fn settle(&mut self) {
        for _ in 0..20_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the hosts never come to rest");
    }

    fn step(&mut self) -> bool {
        let mut moved = false;
        for at in 0..2 {
            turn(&mut self.fabrics[at], self.now);
            while self.fabrics[at].next_call().is_some() {}
            for index in (0..self.sent_over.len()).filter(|index| self.up && !self.blocked.contains(index)) {
                let mut bytes = Vec::new();
                if self.fabrics[at].take_packets(Stream { peer: PEER, index: index as u32 }, &mut bytes) {
                    self.sent += bytes.len() as u64;
                    self.writes += 1;
                    self.sent_over[index] += bytes.len() as u64;
                    self.pipes[1 - at].extend(bytes);
                    moved = true;
                }
            }
        }
        for at in 0..2 {
            moved |= self.deliver(at);
        }
        moved
    }

    /// Hands over whole packets, as long as the link holds.
    fn deliver(&mut self, at: usize) -> bool {
        let mut moved = false;
        let bytes: Vec<u8> = self.pipes[at].drain(..).collect();
        let mut rest = &bytes[..];
        while let Some(length) = packet::length(rest).filter(|length| *length <= rest.len()) {
            if let Some(fuse) = &mut self.fuse {
                match fuse.checked_sub(length) {
                    Some(left) => *fuse = left,
                    None => {
                        self.fuse = None;
                        self.cut();
                        return true;
                    }
                }
            }
            self.hand_over(at, &rest[..length]);
            rest = &rest[length..];
            moved = true;
        }
        assert!(rest.is_empty());
        moved
    }

    /// Hands a packet over as a socket does that reads payload to where it belongs, or whole.
    fn hand_over(&mut self, at: usize, packet: &[u8]) {
        let fabric = &mut self.fabrics[at];
        let (header, payload) = packet.split_first_chunk::<{ packet::HEADER }>().unwrap();
        let told = Header::decode(header).unwrap();
        if told.kind == Kind::Request {
            *self.carried.entry(told.path.target_qpn).or_default() += payload.len() as u64;
        }
        let mut pieces = Vec::new();
        if !self.places || !fabric.aim(PEER, header, &mut |piece| pieces.push(piece)) {
            return fabric.receive(PEER, packet, self.now).unwrap();
        }
        let (body, tail) = payload.split_last_chunk::<{ crate::wire::TAIL }>().unwrap();
        let places: Vec<_> = pieces.iter().map(crate::wire::Piece::place).collect();
        assert_eq!(places.iter().map(|(_, len)| len).sum::<usize>(), body.len());
        let mut done = 0;
        for piece in &pieces {
            // SAFETY: told just now by a fabric that has not changed.
            unsafe { std::ptr::copy(body[done..].as_ptr(), piece.start.as_ptr(), piece.len) };
            done += piece.len;
        }
        self.placed += 1;
        fabric.receive_placed(PEER, header, &places, tail, self.now).unwrap();
    }

    /// Lets time pass until something is due.
    pub(super) fn wait(&mut self) -> bool {
        let next = self.fabrics.iter().filter_map(Fabric::next_timer).min();
        let Some(next) = next else { return false };
        self.now = self.now.max(next);
        self.settle();
        true
    }
}

/// A client on each host, with a QP that is connected to the other's, and a link.
fn pair_across(qp_type: QpType, tune: impl Fn(&mut QpAttr)) -> (Hosts, App, App) {
    let mut hosts = Hosts::new();
    hosts.connect();
    let a = App::new(&mut hosts.fabrics[0], 1, qp_type, Mode::Isolated);
    let b = App::new(&mut hosts.fabrics[1], 11, qp_type, Mode::Isolated);
    for (host, app, peer) in [(0, &a, &b), (1, &b, &a)] {
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let (qp, peer) = ((app.client, app.qpn), (peer.client, peer.qpn));
            fabric_modify_tuned(&mut hosts.fabrics[host], qp, state, peer, qp_type, &tune);
        }
    }
    (hosts, a, b)
}

fn fill(app: &mut App) {
    for (i, byte) in app.bytes().iter_mut().enumerate() {
        *byte = (i * 7 + i / 256) as u8;
    }
}

#[test]
fn a_write_of_every_kind_of_length_and_alignment_arrives_on_the_other_host() {
    for qp_type in [QpType::Rc, QpType::Uc] {
        let (mut hosts, mut a, mut b) = pair_across(qp_type, |_| ());
        assert_eq!(a.qpn, b.qpn, "numbers are a host's own");
        fill(&mut a);
        let all = [(0, 0, 1), (3, 5, 8), (1, 4090, 20), (4095, 1, 8193), (0, 0, 1 << 20), (9, 9, 700_001)];
        for (from, to, len) in all {
            b.bytes().fill(0);
            let mut wqe = send(Opcode::Write, a.sge(from, len));
            (wqe.remote_addr, wqe.rkey) = (b.addr() + to, b.key);
            a.post(&wqe);
            hosts.settle();
            let done = a.sends.pop().expect("a completion");
            assert_eq!((done.wr_id, done.status, done.byte_len), (42, 0, len));
            let (from, to, len) = (from as usize, to as usize, len as usize);
            let sent = a.bytes()[from..from + len].to_vec();
            assert_eq!(b.bytes()[to..to + len], sent);
            let bytes = b.bytes();
            assert!(bytes[..to].iter().chain(&bytes[to + len..]).all(|byte| *byte == 0));
        }
        assert_eq!(hosts.fabrics[0].snapshot()[0].timeouts, 0);
    }
}

#[test]
fn a_read_brings_the_bytes_of_the_other_host() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    fill(&mut b);
    for (to, from, len) in
        [(0, 0, 0), (0, 0, 8), (5, 3, 100), (4095, 1, 8193), (0, 0, 1 << 20), (7, 9, 700_001)]
    {
        let mut wqe = send(Opcode::Read, a.sge(to, len));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + from, b.key);
        a.post(&wqe);
        hosts.settle();
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        let expected = b.bytes()[from as usize..][..len as usize].to_vec();
        assert_eq!(a.bytes()[to as usize..][..len as usize], expected);
    }
}

#[test]
fn messages_arrive_with_all_that_a_receive_tells() {
    for qp_type in [QpType::Rc, QpType::Uc] {
        let (mut hosts, mut a, mut b) = pair_across(qp_type, |_| ());
        fill(&mut a);
        for (wr_id, len) in [(1, 0), (2, 5), (3, 100_000), (4, 1 << 20)] {
            b.bytes().fill(0);
            b.post_recv(wr_id, &[b.sge(0, 1 << 20)]);
            let mut wqe = send(Opcode::SendWithImm, a.sge(0, len));
            wqe.imm = 0x1234;
            a.post(&wqe);
            hosts.settle();
            assert_eq!(status(a.sends.pop()), WcStatus::Success);
            let done = b.receives.pop().expect("a receive");
            assert_eq!((done.wr_id, done.status, done.byte_len), (wr_id, 0, len));
            assert_eq!((done.imm, done.src_qp), (0x1234, a.qpn));
            assert_eq!(u32::from(done.flags), WcFlags::WITH_IMM.bits());
            let sent = a.bytes()[..len as usize].to_vec();
            assert_eq!(b.bytes()[..len as usize], sent);
        }
        b.post_recv(5, &[]);
        let mut wqe = send(Opcode::WriteWithImm, a.sge(0, 70_000));
        (wqe.remote_addr, wqe.rkey, wqe.imm) = (b.addr() + 16, b.key, 9);
        a.post(&wqe);
        hosts.settle();
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        let done = b.receives.pop().expect("a receive");
        assert_eq!((done.wr_id, done.byte_len, done.imm), (5, 70_000, 9));
        assert_eq!(events(&mut b), []);
    }
}

#[test]
fn atomics_are_executed_where_the_word_is() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    for offset in [0, MAPPED] {
        b.buffer[offset as usize / 8] = 100;
        let word = |opcode, compare_add, swap| {
            let mut wqe = send(opcode, a.sge(8, 8));
            (wqe.remote_addr, wqe.rkey) = (b.addr() + offset, b.key);
            (wqe.compare_add, wqe.swap) = (compare_add, swap);
            wqe
        };
        let all = [
            (word(Opcode::FetchAndAdd, 5, 0), 100, 105),
            (word(Opcode::CmpAndSwp, 1, 7), 105, 105),
            (word(Opcode::CmpAndSwp, 105, 7), 105, 7),
        ];
        for (wqe, found, left) in all {
            a.post(&wqe);
            hosts.settle();
            assert_eq!(status(a.sends.pop()), WcStatus::Success);
            assert_eq!((a.buffer[1], b.buffer[offset as usize / 8]), (found, left));
        }
    }
}

#[test]
fn datagrams_find_their_receiver_on_the_other_host() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let mut a = App::new(&mut hosts.fabrics[0], 1, QpType::Ud, Mode::Isolated);
    let mut b = App::new(&mut hosts.fabrics[1], 11, QpType::Ud, Mode::Isolated);
    a.to_rts(&mut hosts.fabrics[0], &b, QpType::Ud);
    b.to_rts(&mut hosts.fabrics[1], &a, QpType::Ud);
    fill(&mut a);
    for offset in [0, MAPPED] {
        b.post_recv(3, &[b.sge(offset, 5000)]);
        let mut wqe = send(Opcode::Send, a.sge(offset, 4096));
        wqe.flags |= flag::ADDRESS;
        wqe.address = Address { dgid: gid(b.client), qpn: b.qpn, qkey: 0x11, ..Address::default() };
        a.post(&wqe);
        hosts.settle();
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        let done = b.receives.pop().expect("a datagram");
        assert_eq!((done.byte_len, done.src_qp), (4096 + 40, a.qpn));
        let (from, to) = (offset as usize, offset as usize + 40);
        let sent = a.bytes()[from..from + 4096].to_vec();
        assert_eq!(b.bytes()[to..to + 4096], sent);
    }
}

#[test]
fn what_was_posted_before_there_is_a_link_waits_for_it() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Uc, |_| ());
    hosts.up = false;
    hosts.fabrics[0].link_down(STREAM, true);
    b.post_recv(1, &[]);
    a.post(&send(Opcode::Send, a.sge(0, 0)));
    turn(&mut hosts.fabrics[0], 0);
    assert_eq!(hosts.fabrics[0].next_call(), Some(STREAM), "the host is asked for a link");
    assert_eq!(a.sends.pop(), None);
    hosts.connect();
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert!(b.receives.pop().is_some());
}

#[test]
fn many_small_requests_are_on_their_way_at_once() {
    let (mut hosts, mut a, b) = pair_across(QpType::Rc, |_| ());
    hosts.settle();
    hosts.sent = 0;
    for wr_id in 0..8 {
        let mut wqe = with_id(send(Opcode::Write, a.sge(MAPPED, 8)), wr_id);
        (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
        a.post(&wqe);
    }
    turn(&mut hosts.fabrics[0], 0);
    let mut bytes = Vec::new();
    hosts.fabrics[0].take_packets(STREAM, &mut bytes);
    assert_eq!(bytes.len(), 8 * (packet::HEADER + 8), "none waits for the one before it");
    hosts.pipes[1].extend(bytes);
    hosts.settle();
    assert!((0..8).all(|wr_id| a.sends.pop().is_some_and(|done| done.wr_id == wr_id && done.status == 0)));
    assert_eq!(hosts.sent, packet::HEADER as u64, "one word acknowledges them all");
}

/// Hands over packets that were taken.
fn hand(fabric: &mut Fabric<TestMemory>, bytes: &[u8]) {
    let mut rest = bytes;
    while let Some(length) = packet::length(rest).filter(|length| *length <= rest.len()) {
        fabric.receive(PEER, &rest[..length], 0).unwrap();
        rest = &rest[length..];
    }
}

#[test]
fn what_was_fetched_for_one_packet_is_not_sent_in_another() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    a.bytes()[..16].fill(1);
    a.bytes()[16..32].fill(2);
    for wr_id in [1, 2] {
        b.post_recv(wr_id, &[b.sge(MAPPED + 64 * wr_id, 16)]);
    }
    // The first is executed, but the link is lost before that is heard, and it is fetched again from foreign memory.
    a.post(&with_id(send(Opcode::Send, a.sge(0, 16)), 1));
    turn(&mut hosts.fabrics[0], 0);
    let mut packets = Vec::new();
    assert!(hosts.fabrics[0].take_packets(STREAM, &mut packets));
    hand(&mut hosts.fabrics[1], &packets);
    turn(&mut hosts.fabrics[1], 0);
    let mut answers = Vec::new();
    assert!(hosts.fabrics[1].take_packets(STREAM, &mut answers));
    hosts.fabrics[0].link_up(STREAM, 1, HashMap::from([(0, 0)]));
    let accesses = turn_without_accesses(&mut hosts.fabrics[0], 0);
    assert_eq!(accesses.len(), 1, "its payload is fetched again");
    // Now it is heard all the same.
    hand(&mut hosts.fabrics[0], &answers);
    assert_eq!(a.sends.pop().map(|done| (done.wr_id, done.status)), Some((1, 0)));
    a.post(&with_id(send(Opcode::Send, a.sge(16, 16)), 2));
    accesses.into_iter().for_each(|access| perform(&mut hosts.fabrics[0], access));
    hosts.settle();
    assert_eq!(a.sends.pop().map(|done| (done.wr_id, done.status)), Some((2, 0)));
    for (at, byte) in [(1, 1), (2, 2)] {
        let at = (MAPPED + 64 * at) as usize;
        assert_eq!(b.bytes()[at..at + 16], [byte; 16], "what was sent last is what was posted last");
    }
}
