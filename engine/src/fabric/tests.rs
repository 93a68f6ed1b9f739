//! Two applications on one fabric, with fake memory, a fake clock and no threads.

use std::{
    cell::RefCell,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use verbs_abi::{
    proto::{AhAttr, QpCap},
    shm::{
        Window,
        cq::{Arm, CqArea},
        cqe::{CompletionReader, Cqe},
        events::EventReader,
        mr_table::MrEntry,
        wqe::{Address, RecvWqe, SendWqe, Sge, flag},
    },
    verbs::{AccessFlags, Opcode, QpAttrMask as Mask, QpType, WcFlags, WcOpcode, WcStatus},
};

use super::*;
use crate::{Access, Attempt, Fault, Fetch, Foreign, MemoryWindow, completion::Completions};

mod copies;
mod drain;
mod fairness;
mod far;
mod foreign;
mod groups;
mod hostile;
mod isolation;
mod nic;
mod property;
mod retries;
mod revocation;
mod shared;
mod statuses;
mod strangers;
mod windows;

const MS: u64 = 1_000_000;

#[derive(Debug, Default)]
struct Count(AtomicU32);

impl Bell for Count {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Memory whose addresses are those of this process.
#[derive(Clone, Debug, Default)]
struct TestMemory {
    table: Vec<MrEntry>,
    unreachable: bool,
    /// What is mapped holds nothing any more.
    lost: bool,
    /// As a direct peer sees it: shared sub-ranges and nothing else.
    moved_only: bool,
    windows: RefCell<Vec<MemoryWindow>>,
}

impl Memory for TestMemory {
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        self.table.iter().find(|mr| mr.key == key).copied()
    }

    fn lookup_remote(&self, key: u32, qpn: u32) -> Option<MrEntry> {
        let windows = self.windows.borrow();
        let mut bound = windows.iter().filter_map(|window| window.bound);
        let bound = bound.find(|bound| bound.entry.key == key && [0, qpn].contains(&bound.qpn));
        self.lookup(key).or(bound.map(|bound| bound.entry))
    }

    fn has_windows(&self) -> bool {
        true
    }

    fn window(&self, key: u32) -> Option<MemoryWindow> {
        self.windows.borrow().iter().find(|window| window.key >> 8 == key >> 8).copied()
    }

    fn set_window(&self, window: MemoryWindow) {
        let mut windows = self.windows.borrow_mut();
        let place = windows.iter_mut().find(|place| place.key >> 8 == window.key >> 8);
        *place.expect("a window that was told") = window;
    }

    fn mapped(&self, _: &MrEntry, addr: u64, _: usize) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }

    fn shared(&self, mr: &MrEntry) -> Option<Window> {
        // Its addresses are those of this process; what counts is its length.
        Some(Window::heap((mr.shared_end - mr.shared_start) as usize))
    }

    fn is_intact(&self) -> bool {
        !self.lost
    }

    fn reaches(&self, mr: &MrEntry, addr: u64, len: u64) -> bool {
        !self.moved_only || addr >= mr.shared_start && addr + len <= mr.shared_end
    }
}

impl Foreign for TestMemory {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        if self.unreachable {
            return Err(Fault);
        }
        // SAFETY: tests register live vectors only.
        unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        if self.unreachable {
            return Err(Fault);
        }
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), addr as *mut u8, from.len()) };
        Ok(())
    }
}

/// One application: a client, a CQ for each direction, a QP, a buffer.
struct App {
    client: u32,
    qpn: u32,
    area: QueueArea,
    cq: CqArea,
    bell: Arc<Count>,
    sends: CompletionReader,
    receives: CompletionReader,
    events: EventReader,
    doorbells: Doorbells,
    slot: u32,
    buffer: Vec<u64>,
    key: u32,
    arena: Window,
}

const PD: u32 = 7;
const RIGHTS: u32 = 0xf;

fn gid(client: u32) -> Gid {
    std::array::from_fn(|i| if i == 15 { client as u8 } else { 0xfd })
}

impl App {
    fn new(fabric: &mut Fabric<TestMemory>, client: u32, qp_type: QpType, mode: Mode) -> Self {
        Self::in_tenant(0, fabric, client, qp_type, mode)
    }

    fn in_tenant(
        tenant: u32,
        fabric: &mut Fabric<TestMemory>,
        client: u32,
        qp_type: QpType,
        mode: Mode,
    ) -> Self {
        let arena = Window::heap(1 << 20);
        let buffer = vec![0u64; 128 * 1024];
        let (start, len) = (buffer.as_ptr() as u64, buffer.len() as u64 * 8);
        let key = 1000 + client;
        let mr = MrEntry {
            key,
            pd: PD,
            access: RIGHTS,
            iova: start,
            addr: start,
            len,
            // Edges are reached the slow way.
            shared_start: (start + 4095) & !4095,
            shared_end: (start + len) & !4095,
        };
        let doorbells = Doorbells::new(&arena).unwrap();
        fabric.open(
            client,
            ClientInit {
                tenant,
                mode,
                doorbells: doorbells.clone(),
                events: EventWriter::new(&arena).unwrap(),
                event_bell: Arc::new(Count::default()),
                memory: TestMemory { table: vec![mr], ..TestMemory::default() },
                gids: vec![gid(client)],
            },
        );
        let cq = CqArea::new(&arena, 64 * 1024).unwrap();
        let bell = Arc::new(Count::default());
        let cq_id = fabric.create_cq(client, cq.clone(), 64 * 1024, Some(bell.clone())).unwrap();
        let geometry = Geometry::new(16, 16, 4, 4, 64).unwrap();
        let area = QueueArea::new(&arena, 128 * 1024, geometry).unwrap();
        let cap =
            QpCap { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 4, max_recv_sge: 4, max_inline_data: 64 };
        let create = CreateQp {
            pd: PD,
            send_cq: cq_id,
            recv_cq: cq_id,
            qp_type: qp_type.value(),
            cap,
            sq_sig_all: false,
            ..CreateQp::default()
        };
        let init = QpInit { create, geometry, area: area.clone(), offset: 128 * 1024 };
        let qp = fabric.create_qp(client, init).unwrap();
        Self {
            client,
            qpn: qp.qpn,
            sends: CompletionReader::new(area.sq_cqes.clone(), 0),
            receives: CompletionReader::new(area.rq_cqes.clone(), 0),
            events: EventReader::new(&arena).unwrap(),
            area,
            cq,
            bell,
            doorbells,
            slot: qp.slot,
            buffer,
            key,
            arena,
        }
    }

    fn addr(&self) -> u64 {
        self.buffer.as_ptr() as u64
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.buffer.len() * 8;
        // SAFETY: the vector's own bytes.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.as_mut_ptr().cast(), len) }
    }

    fn sge(&self, offset: u64, length: u32) -> Sge {
        Sge { addr: self.addr() + offset, length, lkey: self.key }
    }

    /// Puts a work request into the queue, and tells nobody.
    fn put(&self, wqe: &SendWqe) {
        let tail = self.area.header.sq_tail().load(Ordering::Relaxed);
        let blocks = wqe.encode(|i, block| self.area.write_sq_block(tail + i, block));
        self.area.header.sq_tail().store(tail + blocks, Ordering::Release);
    }

    fn post(&self, wqe: &SendWqe) {
        self.put(wqe);
        self.doorbells.ring(self.slot);
    }

    fn post_recv(&self, wr_id: u64, sges: &[Sge]) {
        let tail = self.area.header.rq_tail().load(Ordering::Relaxed);
        RecvWqe::encode(wr_id, sges, |part, block| self.area.write_rq_block(tail, part, block));
        self.area.header.rq_tail().store(tail + 1, Ordering::SeqCst);
        if self.area.header.rq_ring_me().load(Ordering::SeqCst) != 0 {
            self.doorbells.ring(self.slot);
        }
    }

    fn modify(
        &self,
        fabric: &mut Fabric<TestMemory>,
        state: QpState,
        peer: &Self,
        qp_type: QpType,
    ) -> Modified {
        fabric_modify(fabric, (self.client, self.qpn), state, (peer.client, peer.qpn), qp_type)
    }

    fn to_rts(&self, fabric: &mut Fabric<TestMemory>, peer: &Self, qp_type: QpType) -> Modified {
        self.modify(fabric, QpState::Init, peer, qp_type);
        let modified = self.modify(fabric, QpState::Rtr, peer, qp_type);
        self.modify(fabric, QpState::Rts, peer, qp_type);
        modified
    }

    fn state(&self, fabric: &mut Fabric<TestMemory>) -> QpState {
        QpState::try_from(fabric.query_qp(self.client, self.qpn).unwrap().qp_state).unwrap()
    }
}

/// Moves a QP (client and number) to a state, with a peer that it has from RTR on.
fn fabric_modify(
    fabric: &mut Fabric<TestMemory>,
    qp: (u32, u32),
    state: QpState,
    peer: (u32, u32),
    qp_type: QpType,
) -> Modified {
    fabric_modify_tuned(fabric, qp, state, peer, qp_type, |_| ())
}

/// The same with other attributes than the usual ones.
fn fabric_modify_tuned(
    fabric: &mut Fabric<TestMemory>,
    (client, qpn): (u32, u32),
    state: QpState,
    peer: (u32, u32),
    qp_type: QpType,
    tune: impl Fn(&mut QpAttr),
) -> Modified {
    let mut attr = QpAttr {
        qp_state: state.value(),
        path_mtu: 5,
        port_num: 1,
        qkey: 0x11,
        dest_qp_num: peer.1,
        qp_access_flags: 0xe,
        ah_attr: AhAttr { dgid: gid(peer.0), is_global: 1, port_num: 1, ..AhAttr::default() },
        timeout: 10,
        retry_cnt: 2,
        rnr_retry: 1,
        min_rnr_timer: 1,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        ..QpAttr::default()
    };
    tune(&mut attr);
    let from = QpState::try_from(fabric.query_qp(client, qpn).unwrap().qp_state).unwrap();
    let rule = verbs_abi::qp_state::rule(qp_type, from, state).unwrap();
    let mut mask = rule.required | Mask::STATE;
    if attr.en_sqd_async_notify != 0 {
        mask |= Mask::EN_SQD_ASYNC_NOTIFY;
    }
    fabric.modify_qp(client, qpn, mask.bits(), &attr).unwrap()
}

fn pair(qp_type: QpType) -> (Fabric<TestMemory>, App, App) {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, qp_type, Mode::Isolated);
    let b = App::new(&mut fabric, 2, qp_type, Mode::Isolated);
    a.to_rts(&mut fabric, &b, qp_type);
    b.to_rts(&mut fabric, &a, qp_type);
    (fabric, a, b)
}

/// Two connected QPs whose attributes `tune` changes.
fn tuned_pair(qp_type: QpType, tune: impl Fn(&mut QpAttr)) -> (Fabric<TestMemory>, App, App) {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, qp_type, Mode::Isolated);
    let b = App::new(&mut fabric, 2, qp_type, Mode::Isolated);
    for (app, peer) in [(&a, &b), (&b, &a)] {
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let peer = (peer.client, peer.qpn);
            fabric_modify_tuned(&mut fabric, (app.client, app.qpn), state, peer, qp_type, &tune);
        }
    }
    (fabric, a, b)
}

/// The events that an application has not taken yet, each of which must be of its QP.
fn events(app: &mut App) -> Vec<EventType> {
    let taken = std::iter::from_fn(|| app.events.pop());
    taken
        .map(|event| {
            assert_eq!(event.element, app.qpn);
            EventType::try_from(event.kind).unwrap()
        })
        .collect()
}

/// Lets the fabric come to rest, with all accesses to foreign memory performed.
fn turn(fabric: &mut Fabric<TestMemory>, now: u64) {
    for _ in 0..1000 {
        let accesses = turn_without_accesses(fabric, now);
        if accesses.is_empty() {
            return;
        }
        for access in accesses {
            perform(fabric, access);
        }
    }
    panic!("there is no end of accesses");
}

/// Lets the fabric come to rest but for the accesses that it gives out.
fn turn_without_accesses(fabric: &mut Fabric<TestMemory>, now: u64) -> Vec<Access> {
    fabric.collect();
    assert!((0..1000).any(|_| !fabric.run(now)), "the fabric never comes to rest");
    std::iter::from_fn(|| fabric.next_access()).collect()
}

/// What the host does with an access.
fn perform(fabric: &mut Fabric<TestMemory>, mut access: Access) {
    if let Some(memory) = fabric.memory_mut(access.client()) {
        access.perform(memory);
    }
    fabric.finish(access);
}

fn send(opcode: Opcode, sge: Sge) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.opcode, wqe.flags) = (42, opcode.value() as u8, flag::SIGNALED);
    wqe.push_sge(sge);
    wqe
}

/// The same work request under another id.
fn with_id(mut wqe: SendWqe, wr_id: u64) -> SendWqe {
    wqe.wr_id = wr_id;
    wqe
}

fn status(cqe: Option<Cqe>) -> WcStatus {
    WcStatus::try_from(u32::from(cqe.expect("a completion").status)).unwrap()
}

#[test]
fn a_write_of_every_kind_of_length_and_alignment_arrives() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    for (i, byte) in a.bytes().iter_mut().enumerate() {
        *byte = (i * 7 + i / 256) as u8;
    }
    for (from, to, len) in
        [(0, 0, 1), (3, 5, 8), (1, 4090, 20), (4095, 1, 8193), (0, 0, 1 << 20), (9, 9, 700_001)]
    {
        b.bytes().fill(0);
        let mut wqe = send(Opcode::Write, a.sge(from, len));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + to, b.key);
        a.post(&wqe);
        turn(&mut fabric, 0);
        let done = a.sends.pop().expect("a completion");
        assert_eq!((done.wr_id, done.status, done.byte_len), (42, 0, len));
        let (from, to, len) = (from as usize, to as usize, len as usize);
        let sent = a.bytes()[from..from + len].to_vec();
        assert_eq!(b.bytes()[to..to + len], sent);
        let bytes = b.bytes();
        assert!(bytes[..to].iter().chain(&bytes[to + len..]).all(|byte| *byte == 0));
    }
}

#[test]
fn a_read_brings_the_peers_bytes() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    b.bytes()[100..600_000].fill(9);
    let mut wqe = send(Opcode::Read, a.sge(7, 600_000));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + 100, b.key);
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop().unwrap().opcode, WcOpcode::RdmaRead.value() as u8);
    assert!(a.bytes()[7..7 + 599_900].iter().all(|byte| *byte == 9));
    assert_eq!(a.bytes()[6], 0);
}

#[test]
fn a_send_fills_the_scatter_list_and_raises_the_event_asked_for() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes()[..10].copy_from_slice(b"0123456789");
    b.post_recv(5, &[b.sge(0, 3), b.sge(100, 0), b.sge(200, 7)]);
    b.cq.arm(Arm::Solicited, 0);
    let mut wqe = send(Opcode::SendWithImm, a.sge(0, 10));
    wqe.imm = 0xabcd;
    wqe.flags |= flag::SOLICITED;
    a.post(&wqe);
    turn(&mut fabric, 0);
    let got = b.receives.pop().unwrap();
    assert_eq!((got.wr_id, got.byte_len, got.imm, got.src_qp), (5, 10, 0xabcd, a.qpn));
    assert_eq!(&b.bytes()[..3], b"012");
    assert_eq!(&b.bytes()[200..207], b"3456789");
    assert_eq!(b.bell.0.load(Ordering::Relaxed), 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn atomics_work_on_mapped_and_on_foreign_words() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    for offset in [0u64, 64 * 1024] {
        b.buffer[offset as usize / 8] = 40;
        let mut add = send(Opcode::FetchAndAdd, a.sge(8, 8));
        (add.remote_addr, add.rkey, add.compare_add) = (b.addr() + offset, b.key, 2);
        a.post(&add);
        let mut swap = send(Opcode::CmpAndSwp, a.sge(16, 8));
        (swap.remote_addr, swap.rkey, swap.compare_add, swap.swap) = (b.addr() + offset, b.key, 42, 7);
        a.post(&swap);
        turn(&mut fabric, 0);
        assert_eq!((a.buffer[1], a.buffer[2], b.buffer[offset as usize / 8]), (40, 42, 7));
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
}

#[test]
fn a_send_without_a_receive_waits_and_ends_in_rnr_retry_exceeded() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post(&send(Opcode::Send, a.sge(0, 10)));
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop(), None);
    let first = fabric.next_timer().expect("an RNR timer");
    assert_eq!(first, 10_000, "code 1 is 10 us");
    turn(&mut fabric, first);
    assert_eq!(status(a.sends.pop()), WcStatus::RnrRetryExcErr);
    assert_eq!(a.state(&mut fabric), QpState::Err);
    assert_eq!(b.state(&mut fabric), QpState::Rts, "the responder of an RNR stays as it is");
}

#[test]
fn a_receive_posted_late_ends_the_wait_at_once() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.post(&send(Opcode::Send, a.sge(0, 10)));
    turn(&mut fabric, 0);
    b.post_recv(1, &[b.sge(0, 100)]);
    turn(&mut fabric, 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!(fabric.next_timer(), None, "nobody waits any more");
}

#[test]
fn a_dead_peer_is_a_silent_wire() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    fabric.close(b.client);
    let mut wqe = send(Opcode::Write, a.sge(0, 10));
    wqe.flags = 0;
    a.post(&wqe);
    a.post(&send(Opcode::Write, a.sge(0, 10)));
    turn(&mut fabric, 0);
    let mut now = 0;
    let mut waits = 0;
    while let Some(next) = fabric.next_timer() {
        assert_eq!(a.sends.pop(), None);
        (now, waits) = (next, waits + 1);
        turn(&mut fabric, now);
    }
    assert_eq!(waits, 3, "the first try and retry_cnt = 2 more");
    assert_eq!(now, 3 * (4096 << 10));
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr, "an error is reported although unsignaled");
    assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
    assert_eq!(a.state(&mut fabric), QpState::Err);
}

#[test]
fn a_request_sent_before_the_peer_is_ready_succeeds_when_it_is() {
    let mut fabric = Fabric::new();
    let mut a = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
    let b = App::new(&mut fabric, 2, QpType::Rc, Mode::Isolated);
    a.to_rts(&mut fabric, &b, QpType::Rc);
    let mut wqe = send(Opcode::Write, a.sge(0, 10));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.post(&wqe);
    turn(&mut fabric, MS);
    assert_eq!(a.sends.pop(), None);
    b.modify(&mut fabric, QpState::Init, &a, QpType::Rc);
    b.modify(&mut fabric, QpState::Rtr, &a, QpType::Rc);
    turn(&mut fabric, MS + 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn each_bad_request_ends_with_its_own_status_at_both_ends() {
    type Spoil = fn(&App, &App, &mut SendWqe);
    let cases: [(Spoil, Opcode, WcStatus, QpState); 8] = [
        (|_, _, wqe| wqe.rkey ^= 1, Opcode::Write, WcStatus::RemAccessErr, QpState::Err),
        (
            |_, b, wqe| wqe.remote_addr = b.addr() + (1 << 20) - 4,
            Opcode::Write,
            WcStatus::RemAccessErr,
            QpState::Err,
        ),
        (|_, b, wqe| wqe.remote_addr = b.addr() - 1, Opcode::Read, WcStatus::RemAccessErr, QpState::Err),
        (
            |_, b, wqe| wqe.remote_addr = b.addr() + 4,
            Opcode::FetchAndAdd,
            WcStatus::RemInvReqErr,
            QpState::Err,
        ),
        (
            |_, _, wqe| wqe.remote_addr = u64::MAX - 7,
            Opcode::FetchAndAdd,
            WcStatus::RemAccessErr,
            QpState::Err,
        ),
        (
            |a, _, wqe| *wqe = send(Opcode::Write, Sge { lkey: 9, ..a.sge(0, 8) }),
            Opcode::Write,
            WcStatus::LocProtErr,
            QpState::Rts,
        ),
        (
            |a, _, wqe| *wqe = send(Opcode::Write, a.sge((1 << 20) - 4, 8)),
            Opcode::Write,
            WcStatus::LocProtErr,
            QpState::Rts,
        ),
        (|_, _, wqe| wqe.opcode = 200, Opcode::Write, WcStatus::LocQpOpErr, QpState::Rts),
    ];
    for (case, (spoil, opcode, expected, peer_state)) in cases.into_iter().enumerate() {
        let (mut fabric, mut a, b) = pair(QpType::Rc);
        let mut wqe = send(opcode, a.sge(0, 8));
        (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
        spoil(&a, &b, &mut wqe);
        a.post(&wqe);
        a.post(&send(Opcode::Send, a.sge(0, 8)));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), expected, "case {case}");
        assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr, "case {case}");
        assert_eq!(a.state(&mut fabric), QpState::Err, "case {case}");
        assert_eq!(b.state(&mut fabric), peer_state, "case {case}");
    }
}

#[test]
fn a_message_longer_than_the_receive_fails_both_ends() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    b.post_recv(1, &[b.sge(0, 9)]);
    b.post_recv(2, &[b.sge(0, 9)]);
    a.post(&send(Opcode::Send, a.sge(0, 10)));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::RemInvReqErr);
    assert_eq!(status(b.receives.pop()), WcStatus::LocLenErr);
    assert_eq!(status(b.receives.pop()), WcStatus::WrFlushErr);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Err));
}

#[test]
fn in_err_everything_is_flushed_in_order_also_what_comes_later() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post_recv(1, &[]);
    a.modify(&mut fabric, QpState::Err, &b, QpType::Rc);
    a.post_recv(2, &[]);
    a.post(&send(Opcode::Send, a.sge(0, 1)));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
    let flushed: Vec<_> =
        std::iter::from_fn(|| a.receives.pop()).map(|cqe| (cqe.wr_id, cqe.status)).collect();
    let flush = WcStatus::WrFlushErr.value() as u8;
    assert_eq!(flushed, [(1, flush), (2, flush)]);
}

#[test]
fn after_reset_a_qp_starts_anew() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post(&send(Opcode::Send, a.sge(0, 1)));
    turn(&mut fabric, 0);
    a.modify(&mut fabric, QpState::Reset, &b, QpType::Rc);
    a.sends = CompletionReader::new(a.area.sq_cqes.clone(), 0);
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop(), None, "what was posted before RESET is gone");
    a.to_rts(&mut fabric, &b, QpType::Rc);
    let mut wqe = send(Opcode::Write, a.sge(0, 1));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn an_unreliable_connection_loses_what_does_not_fit_and_goes_on() {
    let (mut fabric, mut a, mut b) = pair(QpType::Uc);
    a.post(&send(Opcode::Send, a.sge(0, 10)));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success, "lost, and nobody says so");
    b.post_recv(1, &[b.sge(0, 10)]);
    a.post(&send(Opcode::Send, a.sge(0, 10)));
    turn(&mut fabric, 0);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
}

#[test]
fn a_datagram_carries_its_header_and_its_qkey_is_checked() {
    let (mut fabric, mut a, mut b) = pair(QpType::Ud);
    a.bytes()[..5].copy_from_slice(b"hello");
    b.post_recv(3, &[b.sge(0, 100)]);
    let mut wqe = send(Opcode::Send, a.sge(0, 5));
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: gid(2), qpn: b.qpn, qkey: 0x12, ..Address::default() };
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(b.receives.pop(), None, "a wrong Q_Key");
    wqe.address.qkey = 0x11;
    a.post(&wqe);
    turn(&mut fabric, 0);
    let got = b.receives.pop().unwrap();
    assert_eq!((got.byte_len, got.src_qp, got.flags & 1), (45, a.qpn, 1));
    assert_eq!(&b.bytes()[40..45], b"hello");
    assert_eq!(b.bytes()[8..24], gid(1));
}

#[test]
fn a_tail_that_cannot_be_ends_the_qp_and_nobody_else() {
    let (mut fabric, a, b) = pair(QpType::Rc);
    a.area.header.sq_tail().store(1 << 40, Ordering::Release);
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(a.state(&mut fabric), QpState::Err);
    assert_eq!(b.state(&mut fabric), QpState::Rts);
}

/// The owner's seat: what the provider does in `ibv_post_send` in direct mode.
struct Owner {
    requester: Requester,
    peer: Responder,
    own: TestMemory,
    other: TestMemory,
}

impl Owner {
    fn new(fabric: &Fabric<TestMemory>, app: &App, peer: &App) -> Self {
        let completions = |app: &App, ring: &Window, slot| {
            let queue = Arc::new(CompletionQueue::new(app.cq.clone(), Some(app.bell.clone())));
            Completions::new(verbs_abi::shm::cqe::CompletionWriter::new(ring.clone(), 0), queue, slot)
        };
        let memory = |client| fabric.clients[fabric.client_index[&client]].as_ref().unwrap().memory.clone();
        let at = fabric.owned(app.client, app.qpn).unwrap();
        let qp_type = fabric.qps[at].as_ref().unwrap().requester.qp_type();
        Self {
            requester: Requester::new(
                app.qpn,
                qp_type,
                PD,
                app.area.clone(),
                completions(app, &app.area.sq_cqes, 0),
            )
            .in_owners_seat(),
            peer: Responder::new(qp_type, PD, peer.area.clone(), completions(peer, &peer.area.rq_cqes, 1)),
            own: mapped_whole(memory(app.client)),
            other: mapped_whole(memory(peer.client)),
        }
    }

    /// Executes what is posted; false when the router must go on.
    fn run(&mut self, app: &App) -> bool {
        let seat = app.area.header.seat();
        if !seat.enter(false) {
            return false;
        }
        self.requester.resume();
        self.peer.resume();
        let tail = app.area.header.sq_tail().load(Ordering::Acquire);
        loop {
            self.peer.refresh();
            if self.requester.execute_next(tail, &self.own, (&mut self.peer, &self.other), u64::MAX) {
                continue;
            }
            if self.requester.fetch() != Fetch::Ready {
                break;
            }
            let mut budget = u64::MAX;
            let attempt =
                self.requester.attempt(&self.own, Some((&mut self.peer, &self.other)), 0, &mut budget);
            if attempt != Attempt::Done {
                self.requester.save();
                seat.park();
                return false;
            }
        }
        self.requester.save();
        seat.leave();
        true
    }
}

/// The same memory where a seat maps all of it.
fn mapped_whole(mut memory: TestMemory) -> TestMemory {
    for mr in &mut memory.table {
        (mr.shared_start, mr.shared_end) = (mr.addr, mr.addr + mr.len);
    }
    memory
}

fn direct_pair() -> (Fabric<TestMemory>, App, App) {
    direct_pair_of(QpType::Rc)
}

fn direct_pair_of(qp_type: QpType) -> (Fabric<TestMemory>, App, App) {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, qp_type, Mode::Direct);
    let b = App::new(&mut fabric, 2, qp_type, Mode::Direct);
    assert!(a.to_rts(&mut fabric, &b, qp_type).direct.is_some());
    assert!(b.to_rts(&mut fabric, &a, qp_type).direct.is_some());
    turn(&mut fabric, 0);
    (fabric, a, b)
}

#[test]
fn the_owner_executes_alone_and_the_router_goes_on_where_it_stopped() {
    let (mut fabric, mut a, mut b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.bytes()[..8].copy_from_slice(b"directly");
    a.post(&wqe);
    assert!(owner.run(&a));
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(&b.bytes()[..8], b"directly");

    // Nobody posted a receive: the router waits for it.
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(!owner.run(&a));
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop(), None);
    b.post_recv(1, &[b.sge(64, 8)]);
    turn(&mut fabric, 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);

    // And gives the seat back.
    b.post_recv(2, &[b.sge(64, 8)]);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(owner.run(&a));
    assert_eq!(b.receives.pop().unwrap().wr_id, 2);
}

#[test]
fn a_receive_is_taken_once_whichever_way_a_request_goes() {
    let (mut fabric, mut a, mut b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut with_imm = send(Opcode::WriteWithImm, a.sge(0, 8));
    (with_imm.remote_addr, with_imm.rkey) = (b.addr(), b.key);
    for round in 0..20 {
        b.post_recv(round, &[b.sge(64, 8)]);
        let plain = send(Opcode::Send, a.sge(0, 8));
        a.post(if round % 3 == 0 { &plain } else { &with_imm });
        assert!(owner.run(&a), "round {round}");
        assert_eq!(b.receives.pop().map(|cqe| cqe.wr_id), Some(round));
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
    // What is in the queue still was taken.
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(!owner.run(&a));
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!((a.sends.pop(), b.receives.pop()), (None, None));
}

#[test]
fn an_owners_bad_request_fails_both_ends() {
    let (mut fabric, mut a, b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), 1);
    a.post(&wqe);
    assert!(!owner.run(&a));
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::RemAccessErr);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Err));
}

#[test]
fn an_owner_executes_what_goes_well_without_answers_and_leaves_the_rest_to_the_router() {
    let (mut fabric, mut a, mut b) = direct_pair_of(QpType::Uc);
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut write = send(Opcode::Write, a.sge(0, 8));
    (write.remote_addr, write.rkey) = (b.addr(), b.key);
    a.bytes()[..8].copy_from_slice(b"no reply");
    b.post_recv(1, &[b.sge(64, 8)]);
    a.post(&write);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(owner.run(&a));
    assert_eq!(&b.bytes()[..8], b"no reply");
    assert_eq!(&b.bytes()[64..72], b"no reply");
    assert_eq!((status(a.sends.pop()), status(a.sends.pop())), (WcStatus::Success, WcStatus::Success));
    assert_eq!(b.receives.pop().unwrap().wr_id, 1);

    // Without a receive, and beyond its reach: both are lost, and nobody fails.
    write.rkey = 1;
    for wqe in [&send(Opcode::Send, a.sge(0, 8)), &write] {
        a.post(wqe);
        assert!(!owner.run(&a));
        a.doorbells.ring(a.slot);
        turn(&mut fabric, 0);
        assert_eq!((status(a.sends.pop()), b.receives.pop()), (WcStatus::Success, None));
    }
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts));

    // A receive that is at fault itself ends its QP, and nothing else.
    b.post_recv(2, &[Sge { lkey: 1, ..b.sge(64, 8) }]);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(!owner.run(&a));
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Err));
}

#[test]
fn what_a_killed_owner_published_counts_once_and_what_it_did_not_never() {
    let (mut fabric, a, mut b) = direct_pair();
    b.post_recv(1, &[b.sge(0, 8)]);
    b.post_recv(2, &[b.sge(0, 8)]);
    // Killed after it published the receive completion and before it moved the count.
    assert!(a.area.header.seat().enter(false));
    let mut writer = verbs_abi::shm::cqe::CompletionWriter::new(b.area.rq_cqes.clone(), 0);
    writer.push(&Cqe { wr_id: 1, ..Cqe::default() });
    b.cq.arm(Arm::Any, 0);
    fabric.close(a.client);
    assert_eq!(b.area.header.rq_done().load(Ordering::Relaxed), 1);
    assert_eq!(b.bell.0.load(Ordering::Relaxed), 1, "who sleeps hears of it");
    assert_eq!(b.receives.pop().unwrap().wr_id, 1);
    b.modify(&mut fabric, QpState::Err, &a, QpType::Rc);
    let flushed = b.receives.pop().unwrap();
    assert_eq!((flushed.wr_id, flushed.status), (2, WcStatus::WrFlushErr.value() as u8));
    assert_eq!(b.receives.pop(), None);
}

#[test]
fn a_running_peer_is_seized_when_it_leaves() {
    let (mut fabric, a, b) = direct_pair();
    assert!(a.area.header.seat().enter(false));
    assert!(!fabric.seize(b.client, b.qpn));
    assert!(!fabric.is_quiet(b.client));
    a.area.header.seat().leave();
    assert!(fabric.is_quiet(b.client));
    assert!(!a.area.header.seat().enter(false), "the router holds the seat");
    turn(&mut fabric, 0);
    assert!(a.area.header.seat().enter(false), "and gives it back");
}

#[test]
fn a_client_leaves_nothing_behind() {
    let (mut fabric, a, b) = direct_pair();
    fabric.close(a.client);
    fabric.close(b.client);
    turn(&mut fabric, 0);
    assert!(fabric.qps.iter().all(Option::is_none));
    assert!(fabric.qpn_index.is_empty() && fabric.client_index.is_empty());
    assert_eq!(fabric.next_timer(), None);
    drop((a.arena, b.arena));
}
