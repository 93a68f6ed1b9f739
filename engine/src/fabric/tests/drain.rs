//! SQD: what was begun is brought to its end, what was not waits, and the event comes between the two.

use super::*;

fn drain(fabric: &mut Fabric<TestMemory>, app: &App) {
    let attr = QpAttr { qp_state: QpState::Sqd.value(), en_sqd_async_notify: 1, ..QpAttr::default() };
    let mask = Mask::STATE | Mask::EN_SQD_ASYNC_NOTIFY;
    fabric.modify_qp(app.client, app.qpn, mask.bits(), &attr).unwrap();
}

fn is_draining(fabric: &mut Fabric<TestMemory>, app: &App) -> bool {
    fabric.query_qp(app.client, app.qpn).unwrap().sq_draining != 0
}

fn write(a: &App, b: &App, length: u32) -> SendWqe {
    let mut wqe = send(Opcode::Write, a.sge(0, length));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    wqe
}

const DRAINED: [EventType; 1] = [EventType::SqDrained];

#[test]
fn an_idle_send_queue_is_drained_at_once() {
    for qp_type in [QpType::Rc, QpType::Uc, QpType::Ud] {
        let (mut fabric, mut a, _b) = pair(qp_type);
        drain(&mut fabric, &a);
        assert_eq!(events(&mut a), DRAINED);
        assert!(!is_draining(&mut fabric, &a));
    }
}

#[test]
fn no_event_comes_that_nobody_asked_for() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.modify(&mut fabric, QpState::Sqd, &b, QpType::Rc);
    turn(&mut fabric, 0);
    assert_eq!(events(&mut a), []);
}

#[test]
fn a_message_that_waits_for_a_receive_is_finished_before_the_event() {
    let (mut fabric, mut a, mut b) = tuned_pair(QpType::Rc, |attr| attr.rnr_retry = 7);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    a.post(&write(&a, &b, 8));
    turn(&mut fabric, 0);
    drain(&mut fabric, &a);
    for now in 1..5 {
        turn(&mut fabric, now * 20 * MS);
        assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], true));
    }
    b.post_recv(1, &[b.sge(0, 8)]);
    turn(&mut fabric, 100 * MS);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (DRAINED.to_vec(), false));
    assert_eq!(a.sends.pop(), None, "what was not begun waits");
    turn(&mut fabric, 200 * MS);
    assert_eq!((events(&mut a), a.sends.pop()), (vec![], None));
    a.modify(&mut fabric, QpState::Rts, &b, QpType::Rc);
    turn(&mut fabric, 200 * MS);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn a_long_message_is_moved_to_its_end_before_the_event() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes().fill(7);
    a.post(&write(&a, &b, 1 << 20));
    a.post(&write(&a, &b, 8));
    fabric.collect();
    // Its edges are foreign memory, so more than a turn's work.
    fabric.run(0);
    drain(&mut fabric, &a);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], true));
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop().map(|cqe| (cqe.status, cqe.byte_len)), Some((0, 1 << 20)));
    assert_eq!(b.bytes().last(), Some(&7));
    assert_eq!((events(&mut a), a.sends.pop()), (DRAINED.to_vec(), None));
}

#[test]
fn a_message_that_fails_while_draining_ends_the_qp_without_the_event() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    drain(&mut fabric, &a);
    turn(&mut fabric, 100 * MS);
    assert_eq!(status(a.sends.pop()), WcStatus::RnrRetryExcErr);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Rts));
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], false));
}

#[test]
fn going_back_to_rts_ends_the_draining() {
    let (mut fabric, mut a, b) = tuned_pair(QpType::Rc, |attr| attr.rnr_retry = 7);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    drain(&mut fabric, &a);
    a.modify(&mut fabric, QpState::Rts, &b, QpType::Rc);
    b.post_recv(1, &[b.sge(0, 8)]);
    turn(&mut fabric, MS);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], false));
}

#[test]
fn what_the_owner_began_and_left_is_finished_by_the_router() {
    let (mut fabric, mut a, mut b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(!owner.run(&a), "nobody receives");
    drain(&mut fabric, &a);
    turn(&mut fabric, 0);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], true));
    b.post_recv(1, &[b.sge(0, 8)]);
    turn(&mut fabric, 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!(events(&mut a), DRAINED);
    // In SQD the owner has no seat.
    a.post(&write(&a, &b, 8));
    assert!(!owner.run(&a));
    turn(&mut fabric, 1);
    assert_eq!(a.sends.pop(), None);
    a.modify(&mut fabric, QpState::Rts, &b, QpType::Rc);
    turn(&mut fabric, 1);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn an_owner_that_runs_is_waited_for() {
    let (mut fabric, mut a, _b) = direct_pair();
    assert!(a.area.header.seat().enter(false));
    drain(&mut fabric, &a);
    turn(&mut fabric, 2 * MS);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (vec![], true));
    a.area.header.seat().leave();
    let soon = fabric.next_timer().expect("another look");
    turn(&mut fabric, soon);
    assert_eq!((events(&mut a), is_draining(&mut fabric, &a)), (DRAINED.to_vec(), false));
    assert_eq!(fabric.next_timer(), None);
}
