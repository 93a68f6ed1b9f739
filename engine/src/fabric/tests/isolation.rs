//! Two tenants on one fabric: each is silence to the other, whatever it tries.

use super::*;

/// Posts a write to `b` and lets time pass until its completion.
fn outcome(fabric: &mut Fabric<TestMemory>, a: &mut App, b: &App) -> WcStatus {
    let mut wqe = send(Opcode::Write, a.sge(0, 1));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.post(&wqe);
    turn(fabric, 0);
    while let Some(next) = fabric.next_timer() {
        turn(fabric, next);
    }
    status(a.sends.pop())
}

fn strangers(qp_type: QpType, mode: Mode) -> (Fabric<TestMemory>, App, App) {
    let mut fabric = Fabric::new();
    let a = App::in_tenant(1, &mut fabric, 1, qp_type, mode);
    let b = App::in_tenant(2, &mut fabric, 2, qp_type, mode);
    (fabric, a, b)
}

#[test]
fn tenants_never_meet() {
    for mode in [Mode::Isolated, Mode::Direct] {
        let (mut fabric, mut a, b) = strangers(QpType::Rc, mode);
        assert!(a.to_rts(&mut fabric, &b, QpType::Rc).direct.is_none());
        assert!(b.to_rts(&mut fabric, &a, QpType::Rc).direct.is_none());
        assert_eq!(outcome(&mut fabric, &mut a, &b), WcStatus::RetryExcErr);
        assert_eq!(b.state(&mut fabric), QpState::Rts, "and the other has felt nothing");
    }
}

#[test]
fn a_datagram_to_another_tenant_vanishes() {
    let (mut fabric, mut a, mut b) = strangers(QpType::Ud, Mode::Isolated);
    a.to_rts(&mut fabric, &b, QpType::Ud);
    b.to_rts(&mut fabric, &a, QpType::Ud);
    b.post_recv(1, &[b.sge(0, 100)]);
    let mut wqe = send(Opcode::Send, a.sge(0, 5));
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: gid(2), qpn: b.qpn, qkey: 0x11, ..Address::default() };
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(b.receives.pop(), None);
}

#[test]
fn a_number_that_another_tenant_got_meanwhile_is_a_stranger() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    assert_eq!(outcome(&mut fabric, &mut a, &b), WcStatus::Success);
    fabric.destroy_qp(b.client, b.qpn).unwrap();
    // All other numbers were used since.
    fabric.next_qpn = b.qpn;
    let c = App::in_tenant(1, &mut fabric, 3, QpType::Rc, Mode::Isolated);
    assert_eq!((c.qpn, fabric.qpn_index[&c.qpn]), (b.qpn, 1), "the same number at the same place");
    c.to_rts(&mut fabric, &a, QpType::Rc);
    assert_eq!(outcome(&mut fabric, &mut a, &c), WcStatus::RetryExcErr);
}

#[test]
fn one_who_waits_for_anothers_qp_is_not_woken_by_it_and_costs_it_nothing() {
    for tenant in [0, 1] {
        let (mut fabric, mut a, mut b) = pair(QpType::Rc);
        // A stranger to this connection, of the same tenant or of another, that names B as its peer.
        let c = App::in_tenant(tenant, &mut fabric, 3, QpType::Rc, Mode::Isolated);
        c.to_rts(&mut fabric, &b, QpType::Rc);
        c.post(&send(Opcode::Send, c.sge(0, 8)));
        turn(&mut fabric, 0);
        assert_eq!(b.area.header.rq_ring_me().load(Ordering::SeqCst), 0, "B need not ring for C");
        // A waits for a receive of B's; the receive wakes A.
        a.post(&send(Opcode::Send, a.sge(0, 8)));
        turn(&mut fabric, 0);
        assert_eq!(a.sends.pop(), None);
        b.post_recv(1, &[b.sge(0, 8)]);
        fabric.collect();
        assert_eq!(fabric.schedule.len(), 2, "A and B, and nobody else");
        turn(&mut fabric, 1);
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!(status(b.receives.pop()), WcStatus::Success);
    }
}
