//! Two hosts with a NIC each: fakes that move bytes between registered memory, as strictly as a NIC does.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard},
};

use super::{
    far::{Hosts, PEER},
    *,
};
use crate::{
    DataPath,
    nic::{
        Bounce, Completion, Endpoint, Event, Limits, Nic, NicKey, NicSend, NicSge, Order, Port, Refusal,
        ShadowId,
    },
    wire::packet,
};

/// Memory that a NIC knows.
#[derive(Debug)]
struct Region {
    owner: Option<(u32, u32)>,
    tenant: u32,
    start: u64,
    len: u64,
    access: u32,
}

#[derive(Debug)]
struct Posted {
    id: u32,
    opcode: Opcode,
    imm: u32,
    remote: (u64, u32),
    sges: Vec<NicSge>,
}

#[derive(Debug, Default)]
struct FakeQp {
    id: ShadowId,
    tenant: u32,
    access: u32,
    peer: Option<u32>,
    sends: Option<VecDeque<Posted>>,
    receives: VecDeque<(u32, Vec<NicSge>)>,
    failed: bool,
}

/// One NIC.
#[derive(Debug, Default)]
struct Card {
    orders: VecDeque<Order>,
    events: VecDeque<Event>,
    regions: HashMap<u32, Region>,
    qps: BTreeMap<u32, FakeQp>,
    bounce: Option<Bounce>,
    next: u32,
    /// It makes no QPs.
    refuses: bool,
    /// It connects none.
    deaf: bool,
    lost: bool,
    /// Bytes that it has sent.
    carried: u64,
    /// It performs nothing for now.
    halted: bool,
}

type World = Arc<Mutex<[Card; 2]>>;

#[derive(Debug)]
struct Fake {
    at: usize,
    world: World,
}

impl Fake {
    fn world(&self) -> MutexGuard<'_, [Card; 2]> {
        self.world.lock().unwrap()
    }
}

impl Nic for Fake {
    fn limits(&self) -> Limits {
        let port = Port { gid: [self.at as u8 + 1; 16], lid: 0, mtu: 3, dest_rd_atomic: 16 };
        Limits { port, wr: 1024, sge: 8, rd_atomic: 16 }
    }

    fn order(&mut self, order: Order) {
        self.world()[self.at].orders.push_back(order);
    }

    fn next_event(&mut self) -> Option<Event> {
        let mut world = self.world();
        (0..2).for_each(|at| perform_orders(&mut world, at));
        (0..2).for_each(|at| carry(&mut world, at));
        world[self.at].events.pop_front()
    }

    fn post_send(&mut self, shadow: ShadowId, send: &NicSend<'_>) -> Result<(), Refusal> {
        let mut world = self.world();
        if world[self.at].lost {
            let gone = ended(shadow, send.id, WcStatus::RetryExcErr);
            world[self.at].events.push_back(gone);
            return Ok(());
        }
        let qp = world[self.at].qps.values_mut().find(|qp| qp.id == shadow).expect("a QP that lives");
        let posted = Posted {
            id: send.id,
            opcode: send.opcode,
            imm: send.imm,
            remote: (send.remote_addr, send.rkey),
            sges: send.sges.to_vec(),
        };
        qp.sends.as_mut().expect("a QP in RTS").push_back(posted);
        Ok(())
    }

    fn post_receive(&mut self, shadow: ShadowId, id: u32, sges: &[NicSge]) -> Result<(), Refusal> {
        let mut world = self.world();
        if !world[self.at].lost {
            let qp = world[self.at].qps.values_mut().find(|qp| qp.id == shadow).expect("a QP that lives");
            qp.receives.push_back((id, sges.to_vec()));
        }
        Ok(())
    }
}

fn ended(shadow: ShadowId, id: u32, status: WcStatus) -> Event {
    let (byte_len, imm) = (0, None);
    Event::Completion(Completion { shadow, id, is_receive: false, status, byte_len, imm, is_write: false })
}

fn perform_orders(world: &mut [Card; 2], at: usize) {
    let card = &mut world[at];
    while let Some(order) = card.orders.pop_front() {
        card.next += 1;
        let number = card.next;
        let gone = card.lost;
        let event = match order {
            Order::Open(id, _) if card.refuses || gone => Event::Opened(id, Err(())),
            Order::Open(id, init) => {
                let bounce = card.bounce.get_or_insert_with(|| {
                    let window = Window::heap(256 * 1024);
                    let base = window.as_ptr() as u64;
                    Bounce { window, base, lkey: 7, generation: 0 }
                });
                let (start, len) = (bounce.base, bounce.window.len() as u64);
                let region = Region { owner: None, tenant: init.tenant, start, len, access: 1 };
                card.regions.insert(7, region);
                let qp = FakeQp { id, tenant: init.tenant, access: init.access, ..FakeQp::default() };
                card.qps.insert(number, qp);
                let port = Port { mtu: 3, dest_rd_atomic: 16, ..Port::default() };
                let bounce = card.bounce.clone().unwrap();
                Event::Opened(id, Ok((Endpoint { qpn: number, psn: 5, port }, bounce)))
            }
            Order::Connect { shadow, remote, .. } => {
                let well = !card.deaf && !gone;
                if let Some(qp) = card.qps.values_mut().find(|qp| qp.id == shadow) {
                    qp.peer = well.then_some(remote.qpn);
                }
                Event::Connected(shadow, well)
            }
            Order::Start { shadow, rights, .. } => {
                if let Some(qp) = card.qps.values_mut().find(|qp| qp.id == shadow) {
                    qp.sends = Some(VecDeque::new());
                    qp.access = rights.access;
                }
                Event::Started(shadow, !gone)
            }
            Order::Change(shadow, rights) => {
                let qp = card.qps.values_mut().find(|qp| qp.id == shadow).expect("a QP that lives");
                qp.access = rights.access;
                continue;
            }
            Order::Close(shadow) => {
                card.qps.retain(|_, qp| qp.id != shadow);
                Event::Closed(shadow)
            }
            Order::Register { owner, tenant, window, addr, access } => {
                let len = window.len() as u64;
                let region = Region { owner: Some(owner), tenant, start: addr, len, access };
                card.regions.insert(number + 100, region);
                Event::Registered(owner, Some(NicKey { lkey: number + 100, rkey: number + 100 }))
            }
            Order::Deregister(owner) => {
                card.regions.retain(|_, region| region.owner != Some(owner));
                Event::Deregistered(owner)
            }
        };
        card.events.push_back(event);
    }
}

/// Whether the key allows this.
fn allows(card: &Card, tenant: u32, (addr, len, key): (u64, u64, u32), need: u32) -> bool {
    card.regions.get(&key).is_some_and(|region| {
        let inside = addr >= region.start && addr + len <= region.start + region.len;
        region.tenant == tenant && inside && region.access & need == need
    })
}

/// Executes what is posted, in order.
fn carry(world: &mut [Card; 2], at: usize) {
    let numbers: Vec<u32> = world[at].qps.keys().copied().collect();
    for number in numbers {
        while !world[at].halted && carry_one(world, at, number) {}
    }
}

fn carry_one(world: &mut [Card; 2], at: usize, number: u32) -> bool {
    let [here, there] = world.get_disjoint_mut([at, 1 - at]).unwrap();
    let Some(qp) = here.qps.get_mut(&number).filter(|qp| !qp.failed) else { return false };
    let Some(peer) = qp.peer.and_then(|peer| there.qps.get_mut(&peer)) else { return false };
    assert_eq!(peer.peer.unwrap_or(number), number, "pairs name each other");
    let Some(posted) = qp.sends.as_mut().and_then(VecDeque::pop_front) else { return false };
    let (shadow, tenant) = (qp.id, qp.tenant);
    let len: u64 = posted.sges.iter().map(|sge| u64::from(sge.len)).sum();
    let takes = matches!(posted.opcode, Opcode::Send | Opcode::SendWithImm | Opcode::WriteWithImm);
    if peer.failed || peer.peer.is_none() || takes && peer.receives.is_empty() {
        qp.sends.as_mut().unwrap().push_front(posted);
        return false;
    }
    let (target_id, target_tenant) = (peer.id, peer.tenant);
    let mine = |need| {
        let fits = |sge: &NicSge| allows(here, tenant, (sge.addr, sge.len.into(), sge.lkey), need);
        posted.sges.iter().all(fits)
    };
    let (remote_addr, rkey) = posted.remote;
    let remote_need = match posted.opcode {
        Opcode::Write | Opcode::WriteWithImm => 2,
        Opcode::Read => 4,
        _ => 0,
    };
    let granted = remote_need == 0
        || len == 0
        || allows(there, target_tenant, (remote_addr, len, rkey), remote_need)
            && there.qps[&here.qps[&number].peer.unwrap()].access & remote_need != 0;
    let status = if !mine(u32::from(posted.opcode == Opcode::Read)) {
        WcStatus::LocProtErr
    } else if !granted {
        there.events.push_back(Event::Async(target_id, EventType::QpAccessErr));
        WcStatus::RemAccessErr
    } else {
        WcStatus::Success
    };
    if status != WcStatus::Success {
        here.qps.get_mut(&number).unwrap().failed = true;
        here.events.push_back(ended(shadow, posted.id, status));
        return false;
    }
    here.carried += len;
    let list = |sges: &[NicSge]| sges.iter().map(|sge| (sge.addr, u64::from(sge.len))).collect::<Vec<_>>();
    let local = list(&posted.sges);
    let peer = there.qps.get_mut(&here.qps[&number].peer.unwrap()).unwrap();
    let receive = if takes { peer.receives.pop_front() } else { None };
    match posted.opcode {
        Opcode::Read => copy(&[(remote_addr, len)], &local),
        Opcode::Write | Opcode::WriteWithImm => copy(&local, &[(remote_addr, len)]),
        _ => copy(&local, &list(&receive.as_ref().unwrap().1)),
    }
    here.events.push_back(ended(shadow, posted.id, WcStatus::Success));
    if let Some((id, sges)) = receive {
        let is_write = posted.opcode == Opcode::WriteWithImm;
        let room: u64 = sges.iter().map(|sge| u64::from(sge.len)).sum();
        assert!(is_write || room >= len, "these tests have room");
        let imm = posted.opcode.has_imm().then_some(posted.imm);
        let completion = Completion {
            shadow: target_id,
            id,
            is_receive: true,
            status: WcStatus::Success,
            byte_len: len as u32,
            imm,
            is_write,
        };
        there.events.push_back(Event::Completion(completion));
    }
    true
}

fn copy(from: &[(u64, u64)], to: &[(u64, u64)]) {
    let bytes = from.iter().flat_map(|(addr, len)| *addr..*addr + *len);
    let places = to.iter().flat_map(|(addr, len)| *addr..*addr + *len);
    for (from, to) in bytes.zip(places) {
        // SAFETY: registrations are of live vectors and windows.
        unsafe { (to as *mut u8).write((from as *const u8).read()) };
    }
}

/// Two hosts with NICs, and whether each peer has one as far as the other was told.
fn hosts(tune: impl Fn(&mut [Card; 2])) -> (Hosts, World) {
    let (mut hosts, world) = (Hosts::new(), World::default());
    tune(&mut world.lock().unwrap());
    for (at, fabric) in hosts.fabrics.iter_mut().enumerate() {
        fabric.set_nic(Box::new(Fake { at, world: Arc::clone(&world) }));
        fabric.set_peer_nic(PEER, true);
    }
    (hosts, world)
}

fn rest(hosts: &mut Hosts) {
    (0..12).for_each(|_| hosts.settle());
}

fn apps(hosts: &mut Hosts) -> (App, App) {
    let a = App::new(&mut hosts.fabrics[0], 1, QpType::Rc, Mode::Isolated);
    let b = App::new(&mut hosts.fabrics[1], 11, QpType::Rc, Mode::Isolated);
    (a, b)
}

fn join(hosts: &mut Hosts, a: &App, b: &App) {
    for (host, app, peer) in [(0, a, b), (1, b, a)] {
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            fabric_modify(
                &mut hosts.fabrics[host],
                (app.client, app.qpn),
                state,
                (peer.client, peer.qpn),
                QpType::Rc,
            );
        }
    }
}

/// Two connected applications.
fn pair_of(tune: impl Fn(&mut [Card; 2])) -> (Hosts, World, App, App) {
    let (mut hosts, world) = hosts(tune);
    hosts.connect();
    let (a, b) = apps(&mut hosts);
    join(&mut hosts, &a, &b);
    rest(&mut hosts);
    (hosts, world, a, b)
}

fn paths(hosts: &Hosts) -> [Option<DataPath>; 2] {
    [0, 1].map(|at| hosts.fabrics[at].snapshot()[0].path)
}

fn fill(app: &mut App) {
    for (i, byte) in app.bytes().iter_mut().enumerate() {
        *byte = (i * 7 + i / 256) as u8;
    }
}

fn carried(world: &World) -> u64 {
    world.lock().unwrap().iter().map(|card| card.carried).sum()
}

/// Offsets that begin and end in the pages that the NIC reaches, and some that do not.
const LENGTHS: [(u64, u64, u32); 8] = [
    (8192, 8192, 64),
    (8192, 12288, 100_000),
    (0, 8192, 10_000),
    (1, 4090, 20),
    (8192, 0, 20_000),
    (3, 5, 8),
    (0, 0, 1 << 20),
    (8192, 8192, 0),
];

#[test]
fn writes_of_every_alignment_arrive_and_what_the_nic_reaches_goes_by_it() {
    let (mut hosts, world, mut a, mut b) = pair_of(|_| ());
    assert_eq!(paths(&hosts), [Some(DataPath::Rnic); 2]);
    fill(&mut a);
    for (from, to, len) in LENGTHS {
        b.bytes().fill(0);
        let before = carried(&world);
        let mut wqe = send(Opcode::Write, a.sge(from, len));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + to, b.key);
        a.post(&wqe);
        rest(&mut hosts);
        let done = a.sends.pop().expect("a completion");
        assert_eq!((done.wr_id, done.status, done.byte_len), (42, 0, len), "{from} {to} {len}");
        let (start, len) = (to as usize, len as usize);
        let sent = a.bytes()[from as usize..][..len].to_vec();
        assert_eq!(b.bytes()[start..start + len], sent);
        let bytes = b.bytes();
        assert!(bytes[..start].iter().chain(&bytes[start + len..]).all(|byte| *byte == 0));
        let by_nic = carried(&world) - before;
        let (first, last) = (b.addr().next_multiple_of(4096), (b.addr() + (1 << 20)) & !4095);
        let inside = b.addr() + to >= first && b.addr() + to + len as u64 <= last;
        assert_eq!(by_nic, if inside { len as u64 } else { 0 }, "{from} {to} {len}");
    }
}

#[test]
fn reads_bring_the_bytes_of_the_other_host() {
    let (mut hosts, world, mut a, mut b) = pair_of(|_| ());
    fill(&mut b);
    for (to, from, len) in LENGTHS {
        a.bytes().fill(0);
        let mut wqe = send(Opcode::Read, a.sge(to, len));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + from, b.key);
        a.post(&wqe);
        rest(&mut hosts);
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        let expected = b.bytes()[from as usize..][..len as usize].to_vec();
        assert_eq!(a.bytes()[to as usize..][..len as usize], expected, "{to} {from} {len}");
    }
    assert!(carried(&world) >= 100_000);
}

#[test]
fn messages_arrive_with_all_that_a_receive_tells() {
    let (mut hosts, world, mut a, mut b) = pair_of(|_| ());
    fill(&mut a);
    for (from, to, len) in LENGTHS {
        b.bytes().fill(0);
        let room = (b.bytes().len() as u64 - to) as u32;
        b.post_recv(5, &[b.sge(to, room)]);
        let mut wqe = send(Opcode::SendWithImm, a.sge(from, len));
        wqe.imm = 0x1234;
        a.post(&wqe);
        rest(&mut hosts);
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        let done = b.receives.pop().expect("a receive");
        assert_eq!((done.wr_id, done.status, done.byte_len), (5, 0, len), "{from} {to}");
        assert_eq!((done.imm, done.src_qp, done.flags), (0x1234, a.qpn, 2));
        let sent = a.bytes()[from as usize..][..len as usize].to_vec();
        assert_eq!(b.bytes()[to as usize..][..len as usize], sent);
    }
    let all: u64 = LENGTHS.iter().map(|(.., len)| u64::from(*len)).sum();
    assert_eq!(carried(&world), all, "a message goes by NIC whatever its alignment");
}

#[test]
fn an_immediate_tells_the_bytes_that_were_written_whichever_way_they_went() {
    let (mut hosts, _, mut a, mut b) = pair_of(|_| ());
    fill(&mut a);
    for (from, to, len) in LENGTHS {
        b.bytes().fill(0);
        b.post_recv(6, &[]);
        let mut wqe = send(Opcode::WriteWithImm, a.sge(from, len));
        (wqe.remote_addr, wqe.rkey, wqe.imm) = (b.addr() + to, b.key, 77);
        a.post(&wqe);
        rest(&mut hosts);
        let sent = a.sends.pop().expect("a completion");
        assert_eq!((sent.status, sent.byte_len), (0, len));
        let done = b.receives.pop().expect("a receive");
        assert_eq!((done.wr_id, done.byte_len, done.imm), (6, len, 77), "{from} {to}");
        assert_eq!(u32::from(done.opcode), WcOpcode::RecvRdmaWithImm.value());
        let bytes = a.bytes()[from as usize..][..len as usize].to_vec();
        assert_eq!(b.bytes()[to as usize..][..len as usize], bytes);
    }
}

#[test]
fn inline_payload_and_lists_of_many_pieces_arrive() {
    let (mut hosts, _, mut a, mut b) = pair_of(|_| ());
    fill(&mut a);
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.opcode, wqe.flags) = (1, Opcode::Send.value() as u8, flag::SIGNALED);
    wqe.inline_mut(5).unwrap().copy_from_slice(b"hello");
    b.post_recv(1, &[b.sge(1, 2), b.sge(9000, 2), b.sge(3, 9)]);
    a.post(&wqe);
    let mut wqe = send(Opcode::Send, a.sge(1, 5000));
    assert!(wqe.push_sge(a.sge(100_000, 7000)) && wqe.push_sge(a.sge((1 << 20) - 10, 10)));
    b.post_recv(2, &[b.sge(100, 6000), b.sge(20_000, 6010)]);
    a.post(&wqe);
    rest(&mut hosts);
    assert_eq!([status(a.sends.pop()), status(a.sends.pop())], [WcStatus::Success; 2]);
    assert_eq!([1, 2].map(|_| b.receives.pop().unwrap().byte_len), [5, 12_010]);
    let bytes = b.bytes();
    assert_eq!([&bytes[1..3], &bytes[9000..9002], &bytes[3..4]].concat(), b"hello");
    let received = [&bytes[100..6100], &bytes[20_000..26_010]].concat();
    let sent = a.bytes();
    let sent = [&sent[1..5001], &sent[100_000..107_000], &sent[(1 << 20) - 10..]].concat();
    assert_eq!(received, sent);
}

#[test]
fn requests_are_executed_in_order_whichever_way_they_take() {
    let (mut hosts, _, mut a, mut b) = pair_of(|_| ());
    let word = 8192_u64;
    for i in 0..8_u64 {
        a.bytes()[16_384 + i as usize * 8..][..8].copy_from_slice(&(100 * (i + 1)).to_ne_bytes());
        // By NIC, then by link, on the same word.
        let mut write = send(Opcode::Write, a.sge(16_384 + i * 8, 8));
        (write.remote_addr, write.rkey, write.wr_id) = (b.addr() + word, b.key, i * 2);
        a.post(&write);
        let mut add = send(Opcode::FetchAndAdd, a.sge(32_768 + i * 8, 8));
        (add.remote_addr, add.rkey, add.wr_id, add.compare_add) = (b.addr() + word, b.key, i * 2 + 1, 1);
        a.post(&add);
        if i % 4 == 3 {
            rest(&mut hosts);
        }
    }
    let done: Vec<(u64, u8)> =
        std::iter::from_fn(|| a.sends.pop()).map(|cqe| (cqe.wr_id, cqe.status)).collect();
    assert_eq!(done, (0..16).map(|i| (i, 0)).collect::<Vec<_>>());
    for i in 0..8_u64 {
        let found = a.bytes()[32_768 + i as usize * 8..][..8].to_vec();
        assert_eq!(found, (100 * (i + 1)).to_ne_bytes(), "what the write before it left");
    }
    assert_eq!(b.bytes()[word as usize..][..8], 801_u64.to_ne_bytes());
}

#[test]
fn a_host_whose_nic_makes_no_qp_or_connects_none_is_served_by_the_link() {
    let spoil: [fn(&mut [Card; 2]); 4] = [
        |cards| cards[0].refuses = true,
        |cards| cards[1].refuses = true,
        |cards| cards[0].deaf = true,
        |cards| cards[1].deaf = true,
    ];
    for spoil in spoil {
        let (mut hosts, world, mut a, mut b) = pair_of(spoil);
        assert_eq!(paths(&hosts), [Some(DataPath::Tcp); 2]);
        fill(&mut a);
        b.post_recv(5, &[b.sge(0, 1000)]);
        a.post(&send(Opcode::Send, a.sge(0, 1000)));
        rest(&mut hosts);
        assert_eq!((status(a.sends.pop()), status(b.receives.pop())), (WcStatus::Success, WcStatus::Success));
        assert!(world.lock().unwrap().iter().all(|card| card.qps.is_empty()), "nothing is left");
    }
}

#[test]
fn a_peer_without_a_nic_is_served_by_the_link() {
    let (mut hosts, _) = hosts(|_| ());
    hosts.fabrics[0].set_peer_nic(PEER, false);
    hosts.connect();
    let (a, mut b) = apps(&mut hosts);
    join(&mut hosts, &a, &b);
    b.post_recv(5, &[b.sge(0, 1000)]);
    a.post(&send(Opcode::Send, a.sge(0, 1000)));
    rest(&mut hosts);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!(paths(&hosts)[0], Some(DataPath::Tcp));
}

#[test]
fn words_that_a_lost_link_swallowed_are_said_again() {
    // Cut after each packet of the handshake in turn.
    for fuse in 1..10 {
        let (mut hosts, _) = hosts(|_| ());
        hosts.connect();
        hosts.fuse = Some(fuse * packet::HEADER - 1);
        let (mut a, mut b) = apps(&mut hosts);
        join(&mut hosts, &a, &b);
        b.post_recv(5, &[b.sge(8192, 1000)]);
        let mut write = send(Opcode::Write, a.sge(8192, 100));
        (write.remote_addr, write.rkey) = (b.addr() + 8192, b.key);
        a.post(&write);
        a.post(&send(Opcode::Send, a.sge(8192, 1000)));
        rest(&mut hosts);
        if !hosts.up {
            hosts.connect();
        }
        rest(&mut hosts);
        assert_eq!([status(a.sends.pop()), status(a.sends.pop())], [WcStatus::Success; 2], "{fuse}");
        assert_eq!(status(b.receives.pop()), WcStatus::Success);
        assert_eq!(paths(&hosts), [Some(DataPath::Rnic); 2]);
    }
}

#[test]
fn a_peer_that_never_connects_is_silence() {
    let (mut hosts, _) = hosts(|_| ());
    hosts.connect();
    let (mut a, b) = apps(&mut hosts);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        let peer = (b.client, b.qpn);
        fabric_modify(&mut hosts.fabrics[0], (a.client, a.qpn), state, peer, QpType::Rc);
    }
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    rest(&mut hosts);
    assert!(a.sends.pop().is_none());
    (0..10).for_each(|_| assert!(hosts.wait() || a.state(&mut hosts.fabrics[0]) == QpState::Err));
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    rest(&mut hosts);
    assert_eq!(a.state(&mut hosts.fabrics[0]), QpState::Err);
}

#[test]
fn a_peer_that_falls_silent_at_any_moment_leaves_nobody_waiting() {
    // The link breaks for ever after each packet in turn: of the handshake, of a question, of what goes over the link alone.
    let mut silent = 0;
    for fuse in 1..16 {
        for mute in [false, true] {
            let (mut hosts, world) = hosts(|_| ());
            hosts.connect();
            hosts.fuse = Some(fuse * packet::HEADER - 1);
            let (mut a, b) = apps(&mut hosts);
            join(&mut hosts, &a, &b);
            let mut write = send(Opcode::Write, a.sge(8192, 100));
            (write.remote_addr, write.rkey) = (b.addr() + 8192, b.key);
            a.post(&write);
            let mut add = send(Opcode::FetchAndAdd, a.sge(32_768, 8));
            (add.remote_addr, add.rkey) = (b.addr() + 16_384, b.key);
            a.post(&add);
            // What the NIC has got by then is answered, or not any more.
            world.lock().unwrap()[1].lost = mute;
            rest(&mut hosts);
            if hosts.up {
                hosts.cut();
            }
            // A first request that was well is not an end: the next one cannot be.
            a.post(&add);
            let mut last = None;
            for _ in 0..100 {
                last = std::iter::from_fn(|| a.sends.pop()).last().or(last);
                if a.state(&mut hosts.fabrics[0]) == QpState::Err {
                    break;
                }
                assert!(hosts.wait(), "cut after {fuse} packets: nothing will ever happen");
            }
            rest(&mut hosts);
            last = std::iter::from_fn(|| a.sends.pop()).last().or(last);
            assert_eq!(a.state(&mut hosts.fabrics[0]), QpState::Err, "cut after {fuse} packets");
            let status = last.expect("a completion").status;
            assert!([12, 5].contains(&status), "cut after {fuse} packets: {status}");
            silent += 1;
        }
    }
    assert_eq!(silent, 30);
}

#[test]
fn keys_that_the_peer_has_not_granted_are_refused_as_on_one_host() {
    for key in [1, 1011 + 1] {
        let (mut hosts, world, mut a, mut b) = pair_of(|_| ());
        b.post_recv(9, &[b.sge(0, 10)]);
        rest(&mut hosts);
        let mut wqe = send(Opcode::Write, a.sge(8192, 64));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192, key);
        a.post(&wqe);
        a.post(&with_id(send(Opcode::Send, a.sge(0, 8)), 43));
        rest(&mut hosts);
        assert_eq!(status(a.sends.pop()), WcStatus::RemAccessErr);
        let flushed = a.sends.pop().expect("the next one");
        assert_eq!((flushed.wr_id, u32::from(flushed.status)), (43, WcStatus::WrFlushErr.value()));
        assert_eq!(status(b.receives.pop()), WcStatus::WrFlushErr);
        assert_eq!(events(&mut b), [EventType::QpAccessErr]);
        assert_eq!(carried(&world), 0);
        assert!(world.lock().unwrap().iter().all(|card| card.qps.is_empty()));
    }
}

#[test]
fn rights_that_a_qp_gets_or_loses_while_it_is_connected_hold_on_its_nic() {
    let (mut hosts, world, mut a, b) = pair_of(|_| ());
    let access = (Mask::STATE | Mask::ACCESS_FLAGS).bits();
    let mut write = send(Opcode::Write, a.sge(8192, 64));
    (write.remote_addr, write.rkey) = (b.addr() + 8192, b.key);
    // None but reading, then all again, then none but reading.
    for (flags, status_of_write) in
        [(4, None), (7, Some(WcStatus::Success)), (4, Some(WcStatus::RemAccessErr))]
    {
        let attr = QpAttr { qp_state: QpState::Rts.value(), qp_access_flags: flags, ..QpAttr::default() };
        hosts.fabrics[1].modify_qp(b.client, b.qpn, access, &attr).unwrap();
        rest(&mut hosts);
        if let Some(expected) = status_of_write {
            a.post(&write);
            rest(&mut hosts);
            assert_eq!(status(a.sends.pop()), expected);
        }
    }
    assert_eq!(carried(&world), 64);
}

#[test]
fn a_deregistered_key_is_dead_for_the_peers_nic() {
    let (mut hosts, world, mut a, b) = pair_of(|_| ());
    let write = |a: &App| {
        let mut wqe = send(Opcode::Write, a.sge(8192, 64));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192, b.key);
        a.post(&wqe);
    };
    write(&a);
    rest(&mut hosts);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    let fabric = &mut hosts.fabrics[1];
    fabric.memory_mut(b.client).unwrap().table.clear();
    fabric.end_registration(b.client, b.key);
    assert!(fabric.is_deregistering(b.client, b.key));
    rest(&mut hosts);
    assert!(!hosts.fabrics[1].is_deregistering(b.client, b.key));
    let owned = world.lock().unwrap()[1].regions.values().filter(|region| region.owner.is_some()).count();
    assert_eq!(owned, 0);
    write(&a);
    rest(&mut hosts);
    assert_eq!(status(a.sends.pop()), WcStatus::RemAccessErr);
}

#[test]
fn nothing_is_flushed_while_the_nic_may_still_touch_it() {
    let (mut hosts, world, mut a, mut b) = pair_of(|_| ());
    b.post_recv(5, &[b.sge(8192, 64)]);
    let mut wqe = send(Opcode::Write, a.sge(8192, 64));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192, b.key);
    a.post(&wqe);
    rest(&mut hosts);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    world.lock().unwrap()[0].halted = true;
    a.post(&wqe);
    turn(&mut hosts.fabrics[0], 0);
    let fabric = &mut hosts.fabrics[0];
    assert!(fabric.seize(a.client, a.qpn));
    fabric_modify(fabric, (a.client, a.qpn), QpState::Err, (b.client, b.qpn), QpType::Rc);
    assert!(fabric.is_busy(a.client, a.qpn), "the order is given, not done");
    assert!(a.sends.pop().is_none());
    rest(&mut hosts);
    assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
    assert!(!hosts.fabrics[0].is_busy(a.client, a.qpn));
    assert!(b.receives.pop().is_none(), "its peer is not told");
}

#[test]
fn a_nic_that_is_lost_ends_its_connections_and_new_ones_go_by_the_link() {
    let (mut hosts, world, mut a, b) = pair_of(|_| ());
    world.lock().unwrap()[0].halted = true;
    let mut wqe = send(Opcode::Write, a.sge(8192, 64));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192, b.key);
    a.post(&wqe);
    rest(&mut hosts);
    assert!(a.sends.pop().is_none());
    {
        let card = &mut world.lock().unwrap()[0];
        card.lost = true;
        card.events.push_back(Event::Lost);
    }
    rest(&mut hosts);
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!(a.state(&mut hosts.fabrics[0]), QpState::Err);
    for (host, app) in [(0, &a), (1, &b)] {
        let fabric = &mut hosts.fabrics[host];
        let _ = fabric.seize(app.client, app.qpn);
        turn(fabric, 0);
        fabric_modify(fabric, (app.client, app.qpn), QpState::Reset, (0, 0), QpType::Rc);
    }
    let (mut a, mut b) = (a, b);
    (a.sends, a.receives) = readers(&a);
    (b.sends, b.receives) = readers(&b);
    join(&mut hosts, &a, &b);
    b.post_recv(5, &[b.sge(8192, 64)]);
    a.post(&send(Opcode::Send, a.sge(8192, 64)));
    rest(&mut hosts);
    assert_eq!(paths(&hosts), [Some(DataPath::Tcp); 2]);
    assert_eq!((status(a.sends.pop()), status(b.receives.pop())), (WcStatus::Success, WcStatus::Success));
}

fn readers(app: &App) -> (CompletionReader, CompletionReader) {
    (CompletionReader::new(app.area.sq_cqes.clone(), 0), CompletionReader::new(app.area.rq_cqes.clone(), 0))
}

#[test]
fn a_client_that_is_gone_leaves_nothing_on_the_nic() {
    let (mut hosts, world, a, b) = pair_of(|_| ());
    b.post_recv(5, &[b.sge(1, 64)]);
    let mut wqe = send(Opcode::Write, a.sge(1, 5000));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192, b.key);
    a.post(&wqe);
    hosts.settle();
    hosts.fabrics[0].close(a.client);
    hosts.fabrics[1].close(b.client);
    rest(&mut hosts);
    for card in world.lock().unwrap().iter() {
        assert!(card.qps.is_empty() && card.regions.values().all(|region| region.owner.is_none()));
    }
}

#[test]
fn what_a_hostile_router_says_of_shadows_changes_nothing() {
    let (mut hosts, _, mut a, mut b) = pair_of(|_| ());
    // Every word, from every shadow to every shadow, with nonsense in all fields.
    let path = crate::wire::Path {
        tenant: 0,
        source_qpn: b.qpn,
        target_qpn: a.qpn,
        sgid: gid(b.client),
        dgid: gid(a.client),
    };
    for code in 0..9 {
        for (from, to) in [(0, 0), (1, 9), (9, 1), (7, 7)] {
            let mut header = packet::Header::new(packet::Kind::Shadow, code, &path, from, to);
            (header.rkey, header.imm, header.remote_addr) = (u32::MAX, u32::MAX, u64::MAX);
            (header.flags, header.operands) = (u16::MAX, [u64::MAX; 2]);
            hosts.fabrics[0].receive(PEER, &header.encode(), 0).unwrap();
            rest(&mut hosts);
        }
    }
    // A message that takes a receive has no business on the link.
    a.post_recv(8, &[a.sge(0, 64)]);
    b.post_recv(5, &[b.sge(8192, 64)]);
    a.post(&send(Opcode::Send, a.sge(8192, 64)));
    rest(&mut hosts);
    assert_eq!((status(a.sends.pop()), status(b.receives.pop())), (WcStatus::Success, WcStatus::Success));
    assert_eq!(paths(&hosts), [Some(DataPath::Rnic); 2]);
}
