//! Clients that write into their shared memory what no provider would.

use super::*;

/// A further QP of an app's client, in RESET.
fn create(fabric: &mut Fabric<TestMemory>, app: &App, cq: u32, area: &QueueArea) -> u32 {
    let cap =
        QpCap { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let create = CreateQp {
        pd: PD,
        send_cq: cq,
        recv_cq: cq,
        qp_type: QpType::Rc.value(),
        cap,
        sq_sig_all: false,
        ..CreateQp::default()
    };
    let init = QpInit { create, geometry: area.geometry(), area: area.clone(), offset: 0 };
    fabric.create_qp(app.client, init).unwrap().qpn
}

fn area() -> QueueArea {
    let geometry = Geometry::new(16, 16, 1, 1, 0).unwrap();
    QueueArea::new(&Window::heap(geometry.len()), 0, geometry).unwrap()
}

/// Posts a send and a receive whenever a completion is told of.
#[derive(Debug)]
struct Tireless {
    area: QueueArea,
    cq: CqArea,
    posted: Count,
}

impl Bell for Tireless {
    fn ring(&self) {
        self.posted.ring();
        // Against a fabric that never stops this test must.
        if self.posted.0.load(Ordering::Relaxed) < 100_000 {
            let header = &self.area.header;
            header.sq_tail().store(header.sq_head().load(Ordering::Relaxed) + 2, Ordering::Relaxed);
            header.rq_tail().store(header.rq_done().load(Ordering::Relaxed) + 2, Ordering::Relaxed);
            self.cq.arm(Arm::Any, 0);
        }
    }
}

#[test]
fn a_client_that_posts_as_fast_as_it_is_flushed_holds_nobody_up() {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
    let area = area();
    for i in 0..u64::from(area.geometry().sq_blocks) {
        SendWqe::default().encode(|_, block| area.write_sq_block(i, block));
    }
    let cq = CqArea::new(&a.arena, 512 * 1024).unwrap();
    let bell = Arc::new(Tireless { area: area.clone(), cq: cq.clone(), posted: Count::default() });
    let id = fabric.create_cq(a.client, cq, 512 * 1024, Some(bell.clone())).unwrap();
    let qpn = create(&mut fabric, &a, id, &area);
    bell.ring();
    fabric_modify(&mut fabric, (a.client, qpn), QpState::Err, (0, 0), QpType::Rc);
    assert!(bell.posted.0.load(Ordering::Relaxed) < 2000);
    assert!(fabric.run(0), "the rest has its turn later");
    assert!(bell.posted.0.load(Ordering::Relaxed) < 4000);
    turn(&mut fabric, 0);
    assert_eq!(area.header.sq_tail().load(Ordering::Relaxed), area.header.sq_head().load(Ordering::Relaxed));
    assert_eq!(area.header.rq_tail().load(Ordering::Relaxed), area.header.rq_done().load(Ordering::Relaxed));
}

#[test]
fn a_long_chain_of_failed_owners_is_served_one_by_one() {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, QpType::Rc, Mode::Direct);
    let areas: Vec<_> = (0..5000).map(|_| area()).collect();
    let qpns: Vec<_> = areas.iter().map(|area| create(&mut fabric, &a, 1, area)).collect();
    for (i, qpn) in qpns.iter().enumerate() {
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let peer = (a.client, qpns[i.saturating_sub(1)]);
            fabric_modify(&mut fabric, (a.client, *qpn), state, peer, QpType::Rc);
        }
    }
    turn(&mut fabric, 0);
    for area in &areas {
        area.header.verdict().store(3, Ordering::Relaxed);
    }
    fabric_modify(&mut fabric, (a.client, qpns[0]), QpState::Err, (0, 0), QpType::Rc);
    assert!((0..10_000).any(|_| !fabric.run(0)), "the fabric never comes to rest");
    assert_eq!(fabric.query_qp(a.client, qpns[4999]).unwrap().qp_state, QpState::Err.value());
}

#[test]
fn receives_that_were_not_posted_are_never_consumed() {
    let (mut fabric, a, b) = direct_pair();
    b.post_recv(1, &[b.sge(0, 8)]);
    b.post_recv(2, &[b.sge(0, 8)]);
    let mut writer = verbs_abi::shm::cqe::CompletionWriter::new(b.area.rq_cqes.clone(), 0);
    (0..16).for_each(|_| writer.push(&Cqe::default()));
    assert!(a.area.header.seat().enter(false));
    fabric.close(a.client);
    assert_eq!(b.area.header.rq_done().load(Ordering::Relaxed), 2);
}

#[test]
fn counts_at_the_end_of_their_range_go_on_from_zero() {
    let (mut fabric, a, b) = direct_pair();
    let header = &a.area.header;
    for word in [header.sq_done(), header.sq_completions()] {
        word.store(u64::MAX, Ordering::Relaxed);
    }
    // The CQ's word: asked for everything, raised as much as can be, and held back no longer.
    a.arena.u64(64 * 1024).store(!4, Ordering::Relaxed);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!((header.sq_done().load(Ordering::Relaxed), a.cq.events()), (0, 0));
    assert_eq!(a.state(&mut fabric), QpState::Rts);
}

#[test]
fn an_owner_cannot_fail_a_qp_that_is_not_connected_to_it() {
    let (mut fabric, a, b) = direct_pair();
    let c = App::new(&mut fabric, 3, QpType::Rc, Mode::Direct);
    assert!(c.to_rts(&mut fabric, &b, QpType::Rc).direct.is_some());
    turn(&mut fabric, 0);
    c.area.header.verdict().store(3, Ordering::Relaxed);
    c.area.header.seat().park();
    c.doorbells.ring(c.slot);
    turn(&mut fabric, 0);
    assert_eq!(c.state(&mut fabric), QpState::Err);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts));
}
