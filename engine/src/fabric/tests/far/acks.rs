//! Promise: an acknowledgement goes with the request that answers a message, where one does, and is late for nobody else.

use super::*;

/// What an acknowledgement waits for at the longest, ns, and a little more.
const AWHILE: u64 = 150_000;

/// A message from the first to the second application, and its answer, `think` ns later. True: the first one's request was
/// complete before there was an answer.
fn round(hosts: &mut Hosts, a: &mut App, b: &mut App, think: u64) -> bool {
    b.post_recv(1, &[b.sge(MAPPED, 8)]);
    a.post_recv(1, &[a.sge(MAPPED, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    hosts.settle();
    assert!(b.receives.pop().is_some());
    hosts.now += think;
    hosts.settle();
    let early = a.sends.pop().is_some();
    b.post(&send(Opcode::Send, b.sge(MAPPED, 8)));
    hosts.settle();
    assert!(a.receives.pop().is_some());
    assert!(early || a.sends.pop().is_some(), "the answer does not say that the message has come");
    early
}

/// Lets what waits for the clock happen, and clears the second one's completion away.
fn rest(hosts: &mut Hosts, b: &mut App) {
    hosts.now += AWHILE;
    hosts.settle();
    assert!(b.sends.pop().is_some());
    hosts.writes = 0;
}

#[test]
fn those_who_play_ping_pong_write_once_a_message() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    for _ in 0..20 {
        round(&mut hosts, &mut a, &mut b, 1000);
        while b.sends.pop().is_some() {}
    }
    hosts.writes = 0;
    for _ in 0..100 {
        assert!(!round(&mut hosts, &mut a, &mut b, 1000));
        while b.sends.pop().is_some() {}
    }
    assert_eq!(hosts.writes, 200);
}

#[test]
fn who_is_not_answered_waits_a_moment_once_and_then_no_longer() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    for _ in 0..20 {
        round(&mut hosts, &mut a, &mut b, 1000);
        while b.sends.pop().is_some() {}
    }
    for waits in [true, false, false, false] {
        b.post_recv(1, &[b.sge(MAPPED, 8)]);
        a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
        hosts.settle();
        assert!(b.receives.pop().is_some());
        if waits {
            assert_eq!(a.sends.pop(), None);
            let due = hosts.fabrics[1].next_ack().expect("somebody looks at the clock");
            assert_eq!(hosts.fabrics[1].next_timer(), Some(due));
            assert!(due <= hosts.now + AWHILE);
            hosts.now = due;
            hosts.settle();
        }
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!(hosts.fabrics[1].next_ack(), None);
    }
    assert_eq!(hosts.fabrics[0].snapshot()[0].timeouts, 0);
}

#[test]
fn who_answers_late_or_never_makes_nobody_wait() {
    for think in [AWHILE, 1000 * AWHILE] {
        let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
        for _ in 0..30 {
            assert!(round(&mut hosts, &mut a, &mut b, think));
            rest(&mut hosts, &mut b);
        }
    }
}

#[test]
fn the_second_of_two_messages_is_acknowledged_at_once() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    for _ in 0..20 {
        round(&mut hosts, &mut a, &mut b, 1000);
        while b.sends.pop().is_some() {}
    }
    for _ in 0..2 {
        b.post_recv(1, &[b.sge(MAPPED, 8)]);
        a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    }
    hosts.settle();
    for _ in 0..2 {
        assert!(b.receives.pop().is_some());
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
}

#[test]
fn a_connection_that_ends_acknowledges_what_it_has_executed() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    for _ in 0..20 {
        round(&mut hosts, &mut a, &mut b, 1000);
        while b.sends.pop().is_some() {}
    }
    b.post_recv(1, &[b.sge(MAPPED, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    hosts.settle();
    assert_eq!(a.sends.pop(), None);
    b.modify(&mut hosts.fabrics[1], QpState::Reset, &a, QpType::Rc);
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}
