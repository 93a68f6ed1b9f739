//! Silence, RNR, and how often and how long a requester tries again.

use verbs_abi::timer::{ack_timeout, rnr_timer};

use super::*;

/// Lets the clock jump from timer to timer; returns when each was due.
fn run_out(fabric: &mut Fabric<TestMemory>) -> Vec<u64> {
    let mut due = Vec::new();
    while let Some(next) = fabric.next_timer() {
        assert!(due.len() < 100, "it waits for ever");
        due.push(next);
        turn(fabric, next);
    }
    due
}

fn write(a: &App, b: &App) -> SendWqe {
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    wqe
}

#[test]
fn rnr_retries_are_as_many_as_asked_and_as_far_apart_as_the_responder_says() {
    for rnr_retry in 0..7 {
        for code in [0, 1, 14, 31] {
            for opcode in [Opcode::Send, Opcode::WriteWithImm] {
                // The requester's own timer is another one, and does not count.
                let (mut fabric, mut a, b) = tuned_pair(QpType::Rc, |attr| {
                    attr.rnr_retry = rnr_retry;
                    attr.min_rnr_timer = if attr.dest_qp_num == 0x100 { code } else { 5 };
                });
                assert_eq!(a.qpn, 0x100);
                let mut wqe = write(&a, &b);
                wqe.opcode = opcode.value() as u8;
                a.post(&wqe);
                turn(&mut fabric, 0);
                let pause = rnr_timer(code).as_nanos() as u64;
                let expected: Vec<u64> = match rnr_retry {
                    // A peer on the same host has some time all the same.
                    0 => vec![100 * MS],
                    _ => (1..=u64::from(rnr_retry)).map(|n| n * pause).collect(),
                };
                assert_eq!(run_out(&mut fabric), expected, "rnr_retry {rnr_retry}, code {code}, {opcode}");
                assert_eq!(status(a.sends.pop()), WcStatus::RnrRetryExcErr);
                assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Rts));
            }
        }
    }
}

#[test]
fn seven_rnr_retries_are_endless() {
    let (mut fabric, mut a, mut b) = tuned_pair(QpType::Rc, |attr| attr.rnr_retry = 7);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    for _ in 0..1000 {
        let next = fabric.next_timer().expect("another try");
        turn(&mut fabric, next);
        assert_eq!((a.sends.pop(), a.state(&mut fabric)), (None, QpState::Rts));
    }
    b.post_recv(1, &[b.sge(0, 8)]);
    let now = fabric.now;
    turn(&mut fabric, now);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
}

#[test]
fn each_message_has_its_own_rnr_retries() {
    let (mut fabric, mut a, b) =
        tuned_pair(QpType::Rc, |attr| (attr.rnr_retry, attr.min_rnr_timer) = (2, 14));
    for wr_id in 0..3 {
        a.post(&with_id(send(Opcode::Send, a.sge(0, 8)), wr_id));
    }
    turn(&mut fabric, 0);
    for wr_id in 0..3 {
        // The last retry that is left finds a receive.
        let next = fabric.next_timer().expect("an RNR timer");
        turn(&mut fabric, next);
        assert_eq!(a.sends.pop(), None);
        b.post_recv(wr_id, &[b.sge(0, 8)]);
        turn(&mut fabric, next + 1);
        assert_eq!(a.sends.pop().map(|cqe| (cqe.wr_id, cqe.status)), Some((wr_id, 0)));
    }
}

#[test]
fn a_pause_after_an_rnr_nak_is_not_cut_short_by_what_brings_no_receive() {
    let (mut fabric, mut a, b) =
        tuned_pair(QpType::Rc, |attr| (attr.rnr_retry, attr.min_rnr_timer, attr.timeout) = (1, 14, 20));
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    let end = fabric.next_timer().expect("an RNR timer");
    // The peer starts anew, and everybody who waits for it is woken.
    for state in [QpState::Err, QpState::Reset, QpState::Init, QpState::Rtr] {
        b.modify(&mut fabric, state, &a, QpType::Rc);
        b.doorbells.ring(b.slot);
        turn(&mut fabric, 1);
        assert_eq!((a.sends.pop(), fabric.next_timer()), (None, Some(end)), "{state}");
    }
    turn(&mut fabric, end);
    assert_eq!(status(a.sends.pop()), WcStatus::RnrRetryExcErr);
}

#[test]
fn silence_is_borne_for_the_timeout_times_the_retries_and_one() {
    for (timeout, retry_cnt) in [(1, 0), (1, 7), (8, 3), (14, 7), (19, 1), (31, 2)] {
        let (mut fabric, mut a, b) =
            tuned_pair(QpType::Rc, |attr| (attr.timeout, attr.retry_cnt) = (timeout, retry_cnt));
        fabric.destroy_qp(b.client, b.qpn).unwrap();
        a.post(&write(&a, &b));
        a.post(&write(&a, &b));
        turn(&mut fabric, 0);
        let each = ack_timeout(timeout).unwrap().as_nanos() as u64;
        let expected: Vec<u64> = (1..=u64::from(retry_cnt) + 1).map(|n| n * each).collect();
        assert_eq!(run_out(&mut fabric), expected, "timeout {timeout}, retry_cnt {retry_cnt}");
        assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
        assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
        assert_eq!(a.state(&mut fabric), QpState::Err);
    }
}

#[test]
fn a_timeout_of_zero_waits_for_ever() {
    let (mut fabric, mut a, b) = tuned_pair(QpType::Rc, |attr| attr.timeout = 0);
    b.modify(&mut fabric, QpState::Reset, &a, QpType::Rc);
    a.post(&write(&a, &b));
    turn(&mut fabric, 0);
    assert_eq!(fabric.next_timer(), None);
    turn(&mut fabric, u64::MAX / 2);
    assert_eq!((a.sends.pop(), a.state(&mut fabric)), (None, QpState::Rts));
    b.to_rts(&mut fabric, &a, QpType::Rc);
    turn(&mut fabric, u64::MAX / 2);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn a_peer_in_every_state_answers_or_does_not() {
    let steps = [
        (&[][..], false),
        (&[QpState::Init], false),
        (&[QpState::Init, QpState::Rtr], true),
        (&[QpState::Init, QpState::Rtr, QpState::Rts], true),
        (&[QpState::Init, QpState::Rtr, QpState::Rts, QpState::Sqd], true),
        (&[QpState::Init, QpState::Rtr, QpState::Err], false),
    ];
    for (states, answers) in steps {
        let mut fabric = Fabric::new();
        let mut a = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
        let b = App::new(&mut fabric, 2, QpType::Rc, Mode::Isolated);
        a.to_rts(&mut fabric, &b, QpType::Rc);
        for state in states {
            b.modify(&mut fabric, *state, &a, QpType::Rc);
        }
        a.post(&write(&a, &b));
        turn(&mut fabric, 0);
        run_out(&mut fabric);
        let expected = if answers { WcStatus::Success } else { WcStatus::RetryExcErr };
        assert_eq!(status(a.sends.pop()), expected, "{states:?}");
    }
}

#[test]
fn requests_that_were_too_early_succeed_in_order_if_the_peer_comes_in_time() {
    let mut fabric = Fabric::new();
    let mut a = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
    let mut b = App::new(&mut fabric, 2, QpType::Rc, Mode::Isolated);
    a.to_rts(&mut fabric, &b, QpType::Rc);
    for wr_id in 0..3 {
        a.post(&with_id(send(Opcode::Send, a.sge(0, 8)), wr_id));
    }
    // Two of three timeouts pass.
    let each = 4096 << 10;
    for n in 0..3 {
        turn(&mut fabric, n * each);
        assert_eq!(a.sends.pop(), None);
    }
    b.modify(&mut fabric, QpState::Init, &a, QpType::Rc);
    (0..3).for_each(|wr_id| b.post_recv(wr_id, &[b.sge(0, 8)]));
    b.modify(&mut fabric, QpState::Rtr, &a, QpType::Rc);
    turn(&mut fabric, 3 * each - 1);
    for wr_id in 0..3 {
        assert_eq!(a.sends.pop().map(|cqe| (cqe.wr_id, cqe.status)), Some((wr_id, 0)));
        assert_eq!(b.receives.pop().map(|cqe| (cqe.wr_id, cqe.status)), Some((wr_id, 0)));
    }
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_peer_that_comes_too_late_finds_a_requester_in_error() {
    let mut fabric = Fabric::new();
    let mut a = App::new(&mut fabric, 1, QpType::Rc, Mode::Isolated);
    let mut b = App::new(&mut fabric, 2, QpType::Rc, Mode::Isolated);
    a.to_rts(&mut fabric, &b, QpType::Rc);
    b.modify(&mut fabric, QpState::Init, &a, QpType::Rc);
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    run_out(&mut fabric);
    b.modify(&mut fabric, QpState::Rtr, &a, QpType::Rc);
    let now = fabric.now;
    turn(&mut fabric, now);
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!((b.receives.pop(), b.state(&mut fabric)), (None, QpState::Rtr));
}

#[test]
fn the_first_request_in_rtr_raises_comm_est_once() {
    let (isolated, direct) = (Mode::Isolated, Mode::Direct);
    for (qp_type, mode) in
        [QpType::Rc, QpType::Uc].into_iter().flat_map(|qp_type| [(qp_type, isolated), (qp_type, direct)])
    {
        let mut fabric = Fabric::new();
        let a = App::new(&mut fabric, 1, qp_type, mode);
        let mut b = App::new(&mut fabric, 2, qp_type, mode);
        for _ in 0..2 {
            b.modify(&mut fabric, QpState::Reset, &a, qp_type);
            a.modify(&mut fabric, QpState::Reset, &b, qp_type);
            b.modify(&mut fabric, QpState::Init, &a, qp_type);
            b.modify(&mut fabric, QpState::Rtr, &a, qp_type);
            a.to_rts(&mut fabric, &b, qp_type);
            turn(&mut fabric, 0);
            assert_eq!(events(&mut b), []);
            let mut owner = Owner::new(&fabric, &a, &b);
            for first in [true, false] {
                a.post(&write(&a, &b));
                if !owner.run(&a) {
                    assert!(first || mode == Mode::Isolated, "only the first one is the router's");
                    a.doorbells.ring(a.slot);
                }
                turn(&mut fabric, 0);
                let expected = if first { vec![EventType::CommEst] } else { vec![] };
                assert_eq!(events(&mut b), expected, "{mode:?}");
            }
        }
    }
}

#[test]
fn a_first_message_that_meets_a_bad_receive_raises_comm_est_too() {
    let mut fabric = Fabric::new();
    let mut a = App::new(&mut fabric, 1, QpType::Uc, Mode::Isolated);
    let mut b = App::new(&mut fabric, 2, QpType::Uc, Mode::Isolated);
    b.modify(&mut fabric, QpState::Init, &a, QpType::Uc);
    b.modify(&mut fabric, QpState::Rtr, &a, QpType::Uc);
    a.to_rts(&mut fabric, &b, QpType::Uc);
    b.post_recv(1, &[Sge { lkey: 1, ..b.sge(0, 8) }]);
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    turn(&mut fabric, 0);
    assert_eq!((status(a.sends.pop()), status(b.receives.pop())), (WcStatus::Success, WcStatus::LocProtErr));
    assert_eq!((events(&mut b), b.state(&mut fabric)), (vec![EventType::CommEst], QpState::Err));
}

#[test]
fn no_comm_est_is_raised_in_rts() {
    let (mut fabric, a, mut b) = pair(QpType::Rc);
    a.post(&write(&a, &b));
    turn(&mut fabric, 0);
    assert_eq!(events(&mut b), []);
}
