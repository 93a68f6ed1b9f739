//! What no longer holds once a key, a connection or a QP is taken back in the middle of something.

use super::*;

#[test]
fn a_key_that_dies_in_the_middle_of_a_transfer_ends_it() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.bytes().fill(7);
    let mut wqe = send(Opcode::Read, a.sge(4096, 1_000_000));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + 4096, b.key);
    a.post(&wqe);
    fabric.collect();
    assert!(fabric.run(0), "more than a turn's work");
    fabric.memory_mut(a.client).unwrap().table.clear();
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::LocProtErr);
    assert_eq!(a.bytes()[4096 + 999_999], 7, "memory that is registered no more stays as it is");
}

#[test]
fn a_qp_that_was_reset_does_not_fail_for_what_was_before() {
    let (mut fabric, a, b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), 1);
    a.post(&wqe);
    assert!(!owner.run(&a));
    // The router has not looked since.
    a.modify(&mut fabric, QpState::Reset, &b, QpType::Rc);
    turn(&mut fabric, 0);
    assert_eq!(b.state(&mut fabric), QpState::Err, "the peer got the bad request");
    assert_eq!(a.state(&mut fabric), QpState::Reset);
    b.modify(&mut fabric, QpState::Reset, &a, QpType::Rc);
    a.to_rts(&mut fabric, &b, QpType::Rc);
    b.to_rts(&mut fabric, &a, QpType::Rc);
    turn(&mut fabric, 0);
    assert!(fabric.seize(b.client, b.qpn));
    turn(&mut fabric, 0);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts));
}

#[test]
fn who_polled_a_failure_finds_the_state_that_goes_with_it() {
    let (mut fabric, mut a, b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), 1);
    a.post(&wqe);
    assert!(!owner.run(&a));
    assert_eq!(status(a.sends.pop()), WcStatus::RemAccessErr);
    // The router was not rung, or did not look yet.
    assert_eq!((b.state(&mut fabric), a.state(&mut fabric)), (QpState::Err, QpState::Err));
}

#[test]
fn a_failure_counts_while_its_owner_still_runs() {
    let (mut fabric, a, b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    wqe.opcode = 200;
    a.post(&wqe);
    assert!(a.area.header.seat().enter(false));
    owner.requester.resume();
    owner.peer.resume();
    assert_eq!(owner.requester.fetch(), Fetch::Ready);
    let peer = Some((&mut owner.peer, &owner.other));
    let attempt = owner.requester.attempt(&owner.own, peer, 0, &mut 5000);
    assert_eq!(attempt, Attempt::Failed { peer_failed: false, peer_event: None });
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Rts));
}

#[test]
fn an_owner_that_runs_is_named_and_asked_for_its_seat() {
    let (mut fabric, a, b) = direct_pair();
    assert!(a.area.header.seat().enter(false));
    assert!(!fabric.seize(b.client, b.qpn));
    assert_eq!(fabric.executing_on(b.client), [a.client]);
    assert!(a.area.header.seat().is_wanted());
    a.area.header.seat().park();
    assert!(fabric.seize(b.client, b.qpn));
    assert_eq!(fabric.executing_on(b.client), [0; 0]);
    turn(&mut fabric, 0);
    assert!(a.area.header.seat().enter(false), "given back, and wanted no more");
    assert!(!a.area.header.seat().is_wanted());
}

#[test]
fn the_router_goes_on_where_an_owner_stopped_in_the_middle_of_a_message() {
    let (mut fabric, mut a, mut b) = direct_pair();
    a.bytes().fill(7);
    let mut wqe = send(Opcode::Write, a.sge(0, 1 << 16));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    let mut owner = Owner::new(&fabric, &a, &b);
    a.post(&wqe);
    assert!(a.area.header.seat().enter(false));
    owner.requester.resume();
    owner.peer.resume();
    assert_eq!(owner.requester.fetch(), Fetch::Ready);
    owner.peer.refresh();
    let peer = Some((&mut owner.peer, &owner.other));
    assert_eq!(owner.requester.attempt(&owner.own, peer, 0, &mut 5000), Attempt::Unfinished);
    owner.requester.save();
    a.area.header.seat().park();
    // What was placed is not placed again.
    b.bytes()[..5000].fill(9);
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert!(b.bytes()[..5000].iter().all(|byte| *byte == 9));
    assert!(b.bytes()[5000..1 << 16].iter().all(|byte| *byte == 7));
}

#[test]
fn receives_are_flushed_however_long_both_owners_go_on() {
    let (mut fabric, a, mut b) = direct_pair();
    b.post_recv(1, &[b.sge(0, 8)]);
    assert!(a.area.header.seat().enter(false));
    assert!(b.area.header.seat().enter(false));
    b.modify(&mut fabric, QpState::Err, &a, QpType::Rc);
    for now in 1..10 {
        turn(&mut fabric, now * MS);
    }
    assert_eq!(b.receives.pop(), None, "the peer could still place something there");
    a.area.header.seat().leave();
    b.area.header.seat().leave();
    let soon = fabric.next_timer().expect("another look");
    turn(&mut fabric, soon);
    assert_eq!(status(b.receives.pop()), WcStatus::WrFlushErr);
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_seat_that_outlives_its_connection_is_taken_when_its_owner_leaves() {
    let (mut fabric, a, b) = direct_pair();
    assert!(a.area.header.seat().enter(false));
    b.modify(&mut fabric, QpState::Reset, &a, QpType::Rc);
    turn(&mut fabric, 0);
    turn(&mut fabric, 2 * MS);
    a.area.header.seat().leave();
    let soon = fabric.next_timer().expect("another look");
    turn(&mut fabric, soon);
    assert!(!a.area.header.seat().enter(false));
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_client_is_not_quiet_while_it_executes_itself() {
    let (mut fabric, a, _b) = direct_pair();
    assert!(a.area.header.seat().enter(false));
    assert!(!fabric.is_quiet(a.client));
    a.area.header.seat().leave();
    assert!(fabric.is_quiet(a.client));
    turn(&mut fabric, 0);
    assert!(a.area.header.seat().enter(false), "the seat came back");
}

#[test]
fn a_seat_that_changes_hands_wakes_nobody() {
    let (mut fabric, a, b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    b.cq.arm(Arm::Any, 0);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    assert!(!owner.run(&a), "no receive is posted");
    a.doorbells.ring(a.slot);
    turn(&mut fabric, 0);
    assert_eq!(b.bell.0.load(Ordering::Relaxed), 0, "there is nothing to poll for");
    b.post_recv(1, &[b.sge(0, 8)]);
    turn(&mut fabric, 1);
    assert_eq!(b.bell.0.load(Ordering::Relaxed), 1);
}

#[test]
fn what_may_not_be_direct_any_more_becomes_the_routers() {
    let (mut fabric, mut a, mut b) = direct_pair();
    let mut owner = Owner::new(&fabric, &a, &b);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    // In the middle of something its owner keeps the seat until that is done.
    assert!(a.area.header.seat().enter(false));
    fabric.set_mode(b.client, Mode::Isolated);
    a.area.header.seat().leave();
    turn(&mut fabric, 2 * MS);
    assert!(!owner.run(&a), "the seat is the router's");
    assert!(!b.area.header.seat().enter(false));
    a.bytes()[..8].copy_from_slice(b"isolated");
    a.post(&wqe);
    turn(&mut fabric, 2 * MS);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(&b.bytes()[..8], b"isolated");
    assert!(!a.area.header.seat().enter(false), "and stays so");
    assert!(fabric.snapshot().iter().all(|qp| qp.mode == Mode::Isolated));
}

#[test]
fn what_may_be_direct_again_is_offered_to_its_owner() {
    let (mut fabric, mut a, b) = direct_pair();
    fabric.set_mode(b.client, Mode::Isolated);
    turn(&mut fabric, 0);
    assert_eq!(fabric.pair(a.client, a.qpn), Ok(None), "nothing was offered");
    fabric.set_mode(b.client, Mode::Direct);
    for app in [&a, &b] {
        assert_eq!(app.area.header.offer().load(Ordering::Relaxed), 1);
        let (peer, _) = fabric.pair(app.client, app.qpn).unwrap().expect("it was offered");
        assert_eq!(peer.qpn, if app.qpn == a.qpn { b.qpn } else { a.qpn });
    }
    turn(&mut fabric, 0);
    let mut owner = Owner::new(&fabric, &a, &b);
    a.post(&send(Opcode::Write, a.sge(0, 0)));
    assert!(owner.run(&a));
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}
