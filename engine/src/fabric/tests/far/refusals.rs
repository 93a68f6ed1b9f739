//! What goes wrong between two hosts ends as it does on one, with the status and the events that belong to it.

use super::*;

fn write(a: &App, b: &App, len: u32) -> SendWqe {
    let mut wqe = send(Opcode::Write, a.sge(MAPPED, len));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
    wqe
}

/// Posts it with one before and one behind, and says how it ended.
fn refused(wqe: &SendWqe, (mut hosts, mut a, mut b): (Hosts, App, App)) -> (WcStatus, Vec<EventType>) {
    a.post(&with_id(write(&a, &b, 8), 1));
    a.post(&with_id(wqe.clone(), 2));
    a.post(&with_id(write(&a, &b, 8), 3));
    hosts.settle();
    assert_eq!(a.sends.pop().map(|done| (done.wr_id, done.status)), Some((1, 0)));
    let done = a.sends.pop().expect("it ends");
    assert_eq!(done.wr_id, 2);
    let flushed = a.sends.pop().expect("it is flushed");
    assert_eq!((flushed.wr_id, u32::from(flushed.status)), (3, WcStatus::WrFlushErr.value()));
    assert_eq!(a.state(&mut hosts.fabrics[0]), QpState::Err);
    let mut seen = events(&mut b);
    seen.retain(|event| *event != EventType::CommEst);
    let failed = b.state(&mut hosts.fabrics[1]) == QpState::Err;
    let status = status(Some(done));
    let by_peer = matches!(status, WcStatus::RemInvReqErr | WcStatus::RemAccessErr | WcStatus::RemOpErr);
    assert_eq!(failed, by_peer, "{status:?}");
    (status, seen)
}

#[test]
fn refusals_have_their_status_and_event() {
    let pair = || pair_across(QpType::Rc, |_| ());
    let (hosts, a, b) = pair();
    let mut wrong_key = write(&a, &b, 100_000);
    wrong_key.rkey = 1;
    assert_eq!(refused(&wrong_key, (hosts, a, b)), (WcStatus::RemAccessErr, vec![EventType::QpAccessErr]));
    let (hosts, a, b) = pair();
    let mut own = send(Opcode::Write, Sge { lkey: 5, ..a.sge(0, 8) });
    (own.remote_addr, own.rkey) = (b.addr(), b.key);
    assert_eq!(refused(&own, (hosts, a, b)), (WcStatus::LocProtErr, vec![]));
    let (hosts, a, b) = pair();
    b.post_recv(1, &[b.sge(0, 99_999)]);
    let long = send(Opcode::Send, a.sge(0, 100_000));
    assert_eq!(refused(&long, (hosts, a, b)), (WcStatus::RemInvReqErr, vec![]));
    let (hosts, a, b) = pair_across(QpType::Rc, |attr| attr.qp_access_flags = 2);
    let mut read = send(Opcode::Read, a.sge(0, 8));
    (read.remote_addr, read.rkey) = (b.addr(), b.key);
    assert_eq!(refused(&read, (hosts, a, b)), (WcStatus::RemInvReqErr, vec![EventType::QpReqErr]));
}

#[test]
fn a_silent_peer_is_given_up_after_the_retries_and_no_sooner() {
    let (mut hosts, mut a, b) = pair_across(QpType::Rc, |_| ());
    hosts.cut();
    a.post(&write(&a, &b, 8));
    hosts.settle();
    assert!((0..100).any(|_| has_completed(&a) || !hosts.wait()), "it ends");
    let timeout = 4 * (4096 << 10);
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert!(hosts.now >= 3 * timeout, "{} ns", hosts.now);
    assert_eq!(a.state(&mut hosts.fabrics[0]), QpState::Err);
}

/// Whether something completed that was not polled.
fn has_completed(app: &App) -> bool {
    app.sends.clone().pop().is_some()
}

#[test]
fn a_link_that_is_away_for_less_than_the_retries_is_not_noticed() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    hosts.cut();
    fill(&mut a);
    a.post(&write(&a, &b, 300_000));
    hosts.settle();
    assert!(hosts.wait() && hosts.wait());
    assert_eq!(a.sends.pop(), None);
    hosts.connect();
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    let sent = a.bytes()[MAPPED as usize..][..300_000].to_vec();
    assert_eq!(b.bytes()[MAPPED as usize..][..300_000], sent);
}

#[test]
fn without_a_receive_the_sender_pauses_and_gives_up_or_goes_on() {
    let (mut hosts, mut a, b) = pair_across(QpType::Rc, |_| ());
    a.post(&send(Opcode::Send, a.sge(0, 70_000)));
    hosts.settle();
    assert_eq!(hosts.fabrics[0].snapshot()[0].rnr_naks, 1);
    assert!((0..100).any(|_| has_completed(&a) || !hosts.wait()), "it ends");
    assert_eq!(status(a.sends.pop()), WcStatus::RnrRetryExcErr);
    assert_eq!(b.state(&mut hosts.fabrics[1]), QpState::Rts);

    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |attr| attr.rnr_retry = 7);
    a.post(&send(Opcode::Send, a.sge(0, 70_000)));
    a.post(&send(Opcode::Send, a.sge(0, 8)));
    hosts.settle();
    assert_eq!(a.sends.pop(), None);
    b.post_recv(1, &[b.sge(0, 70_000)]);
    b.post_recv(2, &[b.sge(0, 70_000)]);
    hosts.settle();
    assert_eq!(hosts.now, 0, "the receive ends the pause");
    for wr_id in [1, 2] {
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!(b.receives.pop().map(|done| (done.wr_id, done.status)), Some((wr_id, 0)));
    }
}

#[test]
fn requests_sent_before_the_peer_is_ready_succeed_when_it_is() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let mut a = App::new(&mut hosts.fabrics[0], 1, QpType::Rc, Mode::Isolated);
    let b = App::new(&mut hosts.fabrics[1], 11, QpType::Rc, Mode::Isolated);
    a.to_rts(&mut hosts.fabrics[0], &b, QpType::Rc);
    for wr_id in 0..3 {
        a.post(&with_id(write(&a, &b, 40_000), wr_id));
    }
    hosts.settle();
    assert_eq!(a.sends.pop(), None);
    b.to_rts(&mut hosts.fabrics[1], &a, QpType::Rc);
    hosts.settle();
    assert_eq!(hosts.now, 0, "nobody waits for a timeout");
    assert!((0..3).all(|_| status(a.sends.pop()) == WcStatus::Success));
}

#[test]
fn whoever_is_not_named_is_not_heard() {
    // The second QP of a host names a QP that does not name it.
    let (mut hosts, a, b) = pair_across(QpType::Rc, |_| ());
    let mut c = App::new(&mut hosts.fabrics[0], 2, QpType::Rc, Mode::Isolated);
    c.to_rts(&mut hosts.fabrics[0], &b, QpType::Rc);
    c.post(&write(&c, &b, 8));
    hosts.settle();
    assert!((0..100).any(|_| has_completed(&c) || !hosts.wait()), "it ends");
    assert_eq!(status(c.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!(b.state(&mut hosts.fabrics[1]), QpState::Rts);
    // Nor does a QP of the same host that has the peer's number pass for the peer.
    let mut d = App::new(&mut hosts.fabrics[1], 12, QpType::Rc, Mode::Isolated);
    let number_of_peer = a.qpn;
    assert_eq!(number_of_peer, b.qpn);
    d.to_rts(&mut hosts.fabrics[1], &b, QpType::Rc);
    d.post(&write(&d, &b, 8));
    hosts.settle();
    assert!((0..100).any(|_| has_completed(&d) || !hosts.wait()), "it ends");
    assert_eq!(status(d.sends.pop()), WcStatus::RetryExcErr);
}

#[test]
fn tenants_of_one_address_do_not_meet() {
    let (mut hosts, mut a, b) = pair_across(QpType::Rc, |_| ());
    // What the peer calls tenant 0 is another one here.
    hosts.fabrics[1].link_up(STREAM, 1, HashMap::from([(0, 5)]));
    a.post(&write(&a, &b, 8));
    hosts.settle();
    assert!((0..100).any(|_| has_completed(&a) || !hosts.wait()), "it ends");
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!(b.state(&mut hosts.fabrics[1]), QpState::Rts);
}

#[test]
fn a_full_outbox_holds_its_qp_up_until_there_is_room() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    fill(&mut a);
    a.post(&write(&a, &b, 900_000));
    turn(&mut hosts.fabrics[0], 0);
    let mut bytes = Vec::new();
    assert!(hosts.fabrics[0].take_packets(STREAM, &mut bytes));
    assert!(bytes.len() < 400_000, "{}", bytes.len());
    hosts.pipes[1].extend(bytes);
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    let sent = a.bytes()[MAPPED as usize..][..900_000].to_vec();
    assert_eq!(b.bytes()[MAPPED as usize..][..900_000], sent);
}

#[test]
fn an_unreliable_message_of_which_a_part_is_lost_is_lost_whole() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Uc, |_| ());
    fill(&mut a);
    b.post_recv(1, &[b.sge(0, 1 << 20)]);
    hosts.fuse = Some(70_000);
    a.post(&send(Opcode::Send, a.sge(0, 200_000)));
    hosts.settle();
    hosts.connect();
    a.post(&send(Opcode::Send, a.sge(0, 100)));
    hosts.settle();
    for _ in 0..2 {
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
    let done = b.receives.pop().expect("the second");
    assert_eq!((done.wr_id, done.byte_len, done.status), (1, 100, 0));
    assert_eq!(b.receives.pop(), None);
}

#[test]
fn nothing_that_a_peer_sends_makes_more_than_an_error() {
    let (mut hosts, a, b) = pair_across(QpType::Rc, |_| ());
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut sent = Vec::new();
    a.post(&write(&a, &b, 100));
    turn(&mut hosts.fabrics[0], 0);
    hosts.fabrics[0].take_packets(STREAM, &mut sent);
    for _ in 0..20_000 {
        let mut packet = sent.clone();
        for _ in 0..random() % 4 {
            let at = random() as usize % packet.len();
            packet[at] = random() as u8;
        }
        packet.truncate(if random() % 8 == 0 { random() as usize % sent.len() } else { sent.len() });
        let _ = hosts.fabrics[1].receive(PEER, &packet, 0);
        let _ = hosts.fabrics[0].receive(PEER, &packet, 0);
    }
    turn(&mut hosts.fabrics[1], 0);
}
