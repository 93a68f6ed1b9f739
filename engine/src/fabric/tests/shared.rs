//! Shared receive queues and XRC.

use verbs_abi::shm::{
    cqe::CQE_LEN,
    srq::{SrqArea, SrqGeometry},
};

use super::{far::Hosts, *};
use crate::{SrqInit, XrcInit};

const SRQ_AT: u64 = 512 * 1024;
const RING_AT: u64 = 640 * 1024;
const QPS_AT: u64 = 704 * 1024;
const CQ: u32 = 1;

/// A receiver with an SRQ, and the QPs that use it.
struct Receiver {
    app: App,
    area: SrqArea,
    number: u32,
    posted: u64,
    qps: Vec<(u32, CompletionReader)>,
}

impl Receiver {
    fn new(fabric: &mut Fabric<TestMemory>, client: u32) -> Self {
        let app = App::new(fabric, client, QpType::Rc, Mode::Isolated);
        let area = SrqArea::new(&app.arena, SRQ_AT, SrqGeometry::new(8, 2).unwrap()).unwrap();
        let init = SrqInit { pd: PD, area: area.clone(), offset: SRQ_AT, xrc: None };
        let number = fabric.create_srq(client, init).unwrap().number;
        Self { app, area, number, posted: 0, qps: Vec::new() }
    }

    /// A QP that takes its receives from the SRQ, connected with that of `peer`.
    fn connect(&mut self, fabric: &mut Fabric<TestMemory>, peer: &App) {
        let slots = fabric.srq_entries(self.app.client, self.number).unwrap();
        let geometry = Geometry::new(16, 0, 4, 0, 64).unwrap().with_shared_receives(slots);
        let create = CreateQp {
            pd: PD,
            send_cq: CQ,
            recv_cq: CQ,
            srq: Some(self.number),
            qp_type: QpType::Rc.value(),
            ..CreateQp::default()
        };
        let qpn = self.create(fabric, create, geometry);
        connect(fabric, (self.app.client, qpn), (peer.client, peer.qpn), QpType::Rc);
        connect(fabric, (peer.client, peer.qpn), (self.app.client, qpn), QpType::Rc);
    }

    fn create(&mut self, fabric: &mut Fabric<TestMemory>, create: CreateQp, geometry: Geometry) -> u32 {
        let offset = QPS_AT + self.qps.len() as u64 * 32 * 1024;
        let area = QueueArea::new(&self.app.arena, offset, geometry).unwrap();
        let reader = CompletionReader::new(area.rq_cqes.clone(), 0);
        let qp = fabric.create_qp(self.app.client, QpInit { create, geometry, area, offset }).unwrap();
        self.qps.push((qp.qpn, reader));
        qp.qpn
    }

    /// Posts a receive of 64 bytes under the number of its slot.
    fn post(&mut self, fabric: &Fabric<TestMemory>, slot: u32) {
        let sge = self.app.sge(u64::from(slot) * 64, 64);
        self.area.write(self.posted, slot, u64::from(slot), &[sge]);
        self.posted += 1;
        self.area.tail().store(self.posted, Ordering::SeqCst);
        if self.area.ring_me().load(Ordering::SeqCst) != 0 {
            self.app.doorbells.ring(fabric.srqs[&self.number].slot());
        }
    }

    /// The receive that a QP completed next: its id, its slot and its status.
    fn completion(&mut self, qp: usize) -> Option<(u64, u32, WcStatus)> {
        let cqe = self.qps[qp].1.pop()?;
        Some((cqe.wr_id, cqe.wqe, status(Some(cqe))))
    }

    fn events(&mut self) -> Vec<(EventType, u32)> {
        let taken = std::iter::from_fn(|| self.app.events.pop());
        taken.map(|event| (EventType::try_from(event.kind).unwrap(), event.element)).collect()
    }
}

fn connect(fabric: &mut Fabric<TestMemory>, qp: (u32, u32), peer: (u32, u32), qp_type: QpType) {
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        fabric_modify(fabric, qp, state, peer, qp_type);
    }
}

/// Two senders, each connected with a QP of one receiver's SRQ.
fn shared() -> (Fabric<TestMemory>, [App; 2], Receiver) {
    let mut fabric = Fabric::new();
    let senders = [1, 3].map(|client| App::new(&mut fabric, client, QpType::Rc, Mode::Isolated));
    let mut receiver = Receiver::new(&mut fabric, 2);
    for sender in &senders {
        receiver.connect(&mut fabric, sender);
    }
    (fabric, senders, receiver)
}

#[test]
fn whoever_sends_first_takes_the_first_receive() {
    let (mut fabric, mut senders, mut receiver) = shared();
    for slot in [5, 2, 7] {
        receiver.post(&fabric, slot);
    }
    for (turns, sender) in [1, 0, 1].into_iter().enumerate() {
        senders[sender].bytes()[..64].fill(turns as u8 + 1);
        senders[sender].post(&send(Opcode::Send, senders[sender].sge(0, 64)));
        turn(&mut fabric, 0);
        assert_eq!(status(senders[sender].sends.pop()), WcStatus::Success);
    }
    let success = WcStatus::Success;
    assert_eq!(receiver.completion(1), Some((5, 5, success)));
    assert_eq!(receiver.completion(0), Some((2, 2, success)));
    assert_eq!(receiver.completion(1), Some((7, 7, success)));
    let bytes = receiver.app.bytes();
    assert_eq!([bytes[5 * 64], bytes[2 * 64], bytes[7 * 64]], [1, 2, 3]);
}

#[test]
fn a_receive_posted_later_ends_the_wait_of_whoever_comes_first() {
    let (mut fabric, mut senders, mut receiver) = shared();
    for sender in &senders {
        sender.post(&send(Opcode::Send, sender.sge(0, 8)));
    }
    turn(&mut fabric, 0);
    assert!(senders.iter_mut().all(|sender| sender.sends.pop().is_none()));
    for slot in [0, 1] {
        receiver.post(&fabric, slot);
        turn(&mut fabric, 1);
    }
    assert!(senders.iter_mut().all(|sender| status(sender.sends.pop()) == WcStatus::Success));
    assert_eq!(receiver.qps.iter_mut().filter_map(|qp| qp.1.pop()).count(), 2);
}

#[test]
fn the_limit_is_told_once_when_it_is_passed() {
    let (mut fabric, senders, mut receiver) = shared();
    (0..5).for_each(|slot| receiver.post(&fabric, slot));
    fabric.limit_srq(2, receiver.number, 3).unwrap();
    assert_eq!(fabric.srq_limit(2, receiver.number), Ok(3));
    receiver.events();
    for (sent, expected) in [(1, 0), (2, 0), (3, 1), (4, 0)] {
        senders[0].post(&send(Opcode::Send, senders[0].sge(0, 8)));
        turn(&mut fabric, 0);
        let told = receiver.events();
        let limit = told.iter().filter(|event| **event == (EventType::SrqLimitReached, receiver.number));
        assert_eq!(limit.count(), expected, "{sent} sent");
    }
    assert_eq!(fabric.srq_limit(2, receiver.number), Ok(0));
}

#[test]
fn a_qp_in_error_says_that_it_takes_no_more_and_leaves_the_rest_to_others() {
    let (mut fabric, mut senders, mut receiver) = shared();
    (0..2).for_each(|slot| receiver.post(&fabric, slot));
    let failed = receiver.qps[0].0;
    receiver.events();
    let attr = QpAttr { qp_state: QpState::Err.value(), ..QpAttr::default() };
    fabric.modify_qp(2, failed, Mask::STATE.bits(), &attr).unwrap();
    turn(&mut fabric, 0);
    assert_eq!(receiver.events(), [(EventType::QpLastWqeReached, failed)]);
    assert_eq!(receiver.completion(0), None, "what is shared is not flushed");
    for _ in 0..2 {
        senders[1].post(&send(Opcode::Send, senders[1].sge(0, 8)));
    }
    turn(&mut fabric, 0);
    assert_eq!(status(senders[1].sends.pop()), WcStatus::Success);
    assert_eq!(status(senders[1].sends.pop()), WcStatus::Success);
}

#[test]
fn a_receive_that_a_message_has_begun_to_fill_is_nobody_elses() {
    let (mut fabric, mut senders, mut receiver) = shared();
    let len = 900 * 1024;
    let sge = receiver.app.sge(1024, len);
    receiver.area.write(0, 0, 77, &[sge]);
    receiver.posted = 1;
    receiver.area.tail().store(1, Ordering::SeqCst);
    receiver.post(&fabric, 1);
    senders[0].bytes()[..len as usize].fill(9);
    senders[0].post(&send(Opcode::Send, senders[0].sge(0, len)));
    fabric.collect();
    fabric.run(0);
    assert!(senders[0].sends.pop().is_none(), "too long for one turn");
    senders[1].post(&send(Opcode::Send, senders[1].sge(0, 8)));
    turn(&mut fabric, 0);
    assert_eq!(receiver.completion(0), Some((77, 0, WcStatus::Success)));
    assert_eq!(receiver.completion(1), Some((1, 1, WcStatus::Success)));
    assert!(receiver.app.bytes()[1024..1024 + len as usize].iter().all(|byte| *byte == 9));
}

#[test]
fn a_receive_whose_message_never_ends_goes_back_to_the_queue() {
    let (mut fabric, mut senders, mut receiver) = shared();
    let len = 900 * 1024;
    let sge = receiver.app.sge(1024, len);
    receiver.area.write(0, 3, 77, &[sge]);
    receiver.posted = 1;
    receiver.area.tail().store(1, Ordering::SeqCst);
    senders[0].post(&send(Opcode::Send, senders[0].sge(0, len)));
    fabric.collect();
    fabric.run(0);
    fabric.destroy_qp(2, receiver.qps[0].0).unwrap();
    senders[1].post(&send(Opcode::Send, senders[1].sge(0, 8)));
    turn(&mut fabric, 0);
    assert_eq!(receiver.completion(1), Some((77, 3, WcStatus::Success)));
    assert_eq!(status(senders[1].sends.pop()), WcStatus::Success);
}

#[test]
fn a_queue_with_made_up_contents_fails_the_qp_that_takes_from_it() {
    let (mut fabric, mut senders, receiver) = shared();
    receiver.area.tail().store(1000, Ordering::SeqCst);
    senders[0].post(&send(Opcode::Send, senders[0].sge(0, 8)));
    turn(&mut fabric, 0);
    assert_eq!(status(senders[0].sends.pop()), WcStatus::RemOpErr);
    assert_eq!(fabric.destroy_srq(2, receiver.number), Err(16), "in use");
}

/// A sender and a receiver of one XRC domain; the SRQ's completions, and the receiver's number.
fn xrc() -> (Fabric<TestMemory>, App, Receiver, CompletionReader, u32) {
    let mut fabric = Fabric::new();
    let sender = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
    let (receiver, completions, qpn) = xrc_receiver(&mut fabric, 2);
    let sender = as_xrc_sender(&mut fabric, sender);
    connect(&mut fabric, (2, qpn), (1, sender.qpn), QpType::XrcRecv);
    connect(&mut fabric, (1, sender.qpn), (2, qpn), QpType::XrcSend);
    (fabric, sender, receiver, completions, qpn)
}

/// A client with an XRC queue: the queue's completions, and the number of a receiver of its domain.
fn xrc_receiver(fabric: &mut Fabric<TestMemory>, client: u32) -> (Receiver, CompletionReader, u32) {
    let mut receiver = Receiver::new(fabric, client);
    let domain = fabric.open_xrcd(client, Some((1, 2)), true).unwrap();
    let geometry = SrqGeometry::new(8, 2).unwrap();
    let ring = receiver.app.arena.sub(RING_AT, geometry.entries as usize * CQE_LEN).unwrap();
    let xrc = XrcInit { domain, cq: CQ, ring: ring.clone(), ring_offset: RING_AT };
    fabric.destroy_srq(client, receiver.number).unwrap();
    let area = SrqArea::new(&receiver.app.arena, SRQ_AT, geometry).unwrap();
    let init = SrqInit { pd: PD, area, offset: SRQ_AT, xrc: Some(xrc) };
    receiver.number = fabric.create_srq(client, init).unwrap().number;
    let create = CreateQp { xrcd: Some(domain), qp_type: QpType::XrcRecv.value(), ..CreateQp::default() };
    let qpn = receiver.create(fabric, create, Geometry::new(0, 0, 0, 0, 0).unwrap());
    (receiver, CompletionReader::new(ring, 0), qpn)
}

/// The application with an XRC sender in place of its QP.
fn as_xrc_sender(fabric: &mut Fabric<TestMemory>, app: App) -> App {
    fabric.destroy_qp(app.client, app.qpn).unwrap();
    let geometry = app.area.geometry();
    let qp_type = QpType::XrcSend.value();
    let create = CreateQp { pd: PD, send_cq: CQ, qp_type, ..CreateQp::default() };
    let init = QpInit { create, geometry, area: app.area.clone(), offset: 128 * 1024 };
    let qp = fabric.create_qp(app.client, init).unwrap();
    App { qpn: qp.qpn, slot: qp.slot, ..app }
}

#[test]
fn an_xrc_request_goes_to_the_queue_that_it_names() {
    let (mut fabric, mut sender, mut receiver, mut completions, qpn) = xrc();
    receiver.post(&fabric, 4);
    sender.bytes()[..16].fill(6);
    let mut wqe = send(Opcode::Send, sender.sge(0, 16));
    wqe.srqn = receiver.number;
    sender.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    let received = completions.pop().unwrap();
    assert_eq!((received.wr_id, received.wqe, received.byte_len, received.src_qp), (4, 4, 16, qpn));
    assert!(receiver.app.bytes()[4 * 64..4 * 64 + 16].iter().all(|byte| *byte == 6));
}

#[test]
fn xrc_writes_reads_and_atomics_use_the_protection_domain_of_the_queue() {
    let (mut fabric, mut sender, mut receiver, _completions, _) = xrc();
    sender.buffer[0] = 5;
    for opcode in [Opcode::Write, Opcode::FetchAndAdd, Opcode::Read] {
        let mut wqe = send(opcode, sender.sge(0, 8));
        (wqe.srqn, wqe.remote_addr, wqe.rkey) =
            (receiver.number, receiver.app.addr() + 8192, receiver.app.key);
        (wqe.compare_add, wqe.swap) = (10, 0);
        sender.post(&wqe);
        turn(&mut fabric, 0);
        assert_eq!(status(sender.sends.pop()), WcStatus::Success, "{opcode}");
    }
    assert_eq!((receiver.app.bytes()[8192], sender.buffer[0]), (15, 15));
}

#[test]
fn a_queue_that_is_not_of_the_domain_is_no_target() {
    for other in [false, true] {
        let (mut fabric, mut sender, receiver, _completions, _) = xrc();
        // A number that nothing has, or a queue that is no XRC queue.
        let area = SrqArea::new(&receiver.app.arena, SRQ_AT, receiver.area.geometry()).unwrap();
        let init = SrqInit { pd: PD, area, offset: SRQ_AT, xrc: None };
        let plain = fabric.create_srq(2, init).unwrap().number;
        let mut wqe = send(Opcode::Send, sender.sge(0, 16));
        wqe.srqn = if other { plain } else { 4_000_000 };
        sender.post(&wqe);
        turn(&mut fabric, 0);
        assert_eq!(status(sender.sends.pop()), WcStatus::RemInvReqErr);
    }
}

#[test]
fn a_wait_for_an_xrc_receive_ends_when_one_is_posted() {
    let (mut fabric, mut sender, mut receiver, mut completions, _) = xrc();
    let mut wqe = send(Opcode::Send, sender.sge(0, 16));
    wqe.srqn = receiver.number;
    sender.post(&wqe);
    turn(&mut fabric, 0);
    assert!(sender.sends.pop().is_none());
    receiver.post(&fabric, 0);
    turn(&mut fabric, 1);
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    assert!(completions.pop().is_some());
}

#[test]
fn an_xrc_domain_of_a_file_is_shared_within_a_tenant_and_one_without_by_nobody() {
    let mut fabric: Fabric<TestMemory> = Fabric::new();
    let _apps = [1, 2].map(|client| App::new(&mut fabric, client, QpType::Rc, Mode::Isolated));
    assert_eq!(fabric.open_xrcd(1, Some((7, 7)), false), Err(2), "there is none");
    let first = fabric.open_xrcd(1, Some((7, 7)), true).unwrap();
    assert_eq!(fabric.open_xrcd(2, Some((7, 7)), false), Ok(first));
    assert_ne!(fabric.open_xrcd(2, Some((7, 8)), true), Ok(first));
    assert_ne!(fabric.open_xrcd(1, None, true), fabric.open_xrcd(1, None, true));
    fabric.close_xrcd(first);
    assert!(fabric.has_xrcd(1, (7, 7)), "one has it open still");
    fabric.close_xrcd(first);
    assert!(!fabric.has_xrcd(1, (7, 7)));
}

#[test]
fn an_xrc_receiver_ends_with_the_last_who_has_it_open() {
    let (mut fabric, mut sender, mut receiver, mut completions, qpn) = xrc();
    let other = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
    let domain = fabric.open_xrcd(3, Some((1, 2)), false).unwrap();
    let elsewhere = fabric.open_xrcd(3, Some((1, 3)), true).unwrap();
    for (qpn, domain) in [(qpn, elsewhere), (other.qpn, domain), (qpn + 1000, domain)] {
        assert_eq!(fabric.open_qp(3, qpn, domain), Err(22));
    }
    let slots = [(); 2].map(|()| fabric.open_qp(3, qpn, domain).unwrap());
    assert_ne!(slots[0], slots[1]);
    fabric.destroy_qp(3, qpn).unwrap();
    // Its address is its owner's, who is another one from now on.
    fabric.set_gids(3, vec![gid(2)]);
    fabric.destroy_qp(2, qpn).unwrap();
    assert_eq!(fabric.destroy_qp(2, qpn), Err(2));
    assert_eq!(fabric.owner_of(qpn), Some(3));
    receiver.post(&fabric, 4);
    let mut wqe = send(Opcode::Send, sender.sge(0, 16));
    wqe.srqn = receiver.number;
    sender.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    assert!(completions.pop().is_some());
    fabric.close(3);
    assert_eq!(fabric.owner_of(qpn), None);
    receiver.post(&fabric, 5);
    sender.post(&wqe);
    turn(&mut fabric, 1);
    assert!(sender.sends.pop().is_none() && completions.pop().is_none());
}

/// The same as [`xrc`], on two hosts.
fn xrc_across() -> (Hosts, App, Receiver, CompletionReader, u32) {
    let mut hosts = Hosts::new();
    hosts.connect();
    let sender = App::new(&mut hosts.fabrics[0], 1, QpType::Rc, Mode::Isolated);
    let sender = as_xrc_sender(&mut hosts.fabrics[0], sender);
    let (receiver, completions, qpn) = xrc_receiver(&mut hosts.fabrics[1], 11);
    connect(&mut hosts.fabrics[1], (11, qpn), (1, sender.qpn), QpType::XrcRecv);
    connect(&mut hosts.fabrics[0], (1, sender.qpn), (11, qpn), QpType::XrcSend);
    hosts.settle();
    (hosts, sender, receiver, completions, qpn)
}

#[test]
fn an_xrc_request_goes_to_the_queue_that_it_names_on_another_host() {
    let (mut hosts, mut sender, mut receiver, mut completions, qpn) = xrc_across();
    for (opcode, slot) in [(Opcode::Send, 4), (Opcode::SendWithImm, 5), (Opcode::WriteWithImm, 6)] {
        receiver.post(&hosts.fabrics[1], slot);
        sender.bytes()[..16].fill(6);
        let mut wqe = send(opcode, sender.sge(0, 16));
        (wqe.srqn, wqe.imm) = (receiver.number, 0x77);
        (wqe.remote_addr, wqe.rkey) = (receiver.app.addr() + 8192, receiver.app.key);
        sender.post(&wqe);
        hosts.settle();
        assert_eq!(status(sender.sends.pop()), WcStatus::Success, "{opcode}");
        let received = completions.pop().unwrap();
        assert_eq!((received.wqe, received.byte_len, received.src_qp), (slot, 16, qpn), "{opcode}");
        if opcode.has_imm() {
            assert_eq!(received.imm, 0x77);
        }
        let at = if opcode == Opcode::WriteWithImm { 8192 } else { slot as usize * 64 };
        assert!(receiver.app.bytes()[at..at + 16].iter().all(|byte| *byte == 6), "{opcode}");
    }
    sender.buffer[0] = 5;
    for opcode in [Opcode::Write, Opcode::FetchAndAdd, Opcode::Read] {
        let mut wqe = send(opcode, sender.sge(0, 8));
        (wqe.srqn, wqe.remote_addr, wqe.rkey) =
            (receiver.number, receiver.app.addr() + 8192, receiver.app.key);
        (wqe.compare_add, wqe.swap) = (10, 0);
        sender.post(&wqe);
        hosts.settle();
        assert_eq!(status(sender.sends.pop()), WcStatus::Success, "{opcode}");
    }
    assert_eq!((receiver.app.bytes()[8192], sender.buffer[0]), (15, 15));
}

#[test]
fn an_xrc_request_from_another_host_waits_for_its_receive_and_is_refused_by_a_queue_that_is_not_there() {
    let (mut hosts, mut sender, mut receiver, mut completions, _) = xrc_across();
    let mut wqe = send(Opcode::Send, sender.sge(0, 16));
    wqe.srqn = receiver.number;
    sender.post(&wqe);
    hosts.settle();
    assert!(sender.sends.pop().is_none());
    receiver.post(&hosts.fabrics[1], 0);
    hosts.settle();
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    assert!(completions.pop().is_some());
    wqe.srqn = 4_000_000;
    sender.post(&wqe);
    hosts.settle();
    assert_eq!(status(sender.sends.pop()), WcStatus::RemInvReqErr);
}
