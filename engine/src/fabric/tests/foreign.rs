//! Memory that no seat maps: accesses that take their time, fail, come back late or never.

use super::*;

/// Inside the mapped part of every app's buffer.
const MAPPED: u64 = 64 * 1024;
/// Longer than any access may take.
const LONG: u64 = 60_000 * MS;

/// Where the mapped part of an app's buffer begins.
fn mapped_start(app: &App) -> u64 {
    app.addr().next_multiple_of(4096) - app.addr()
}

fn write(from: (&App, u64), to: (&App, u64), len: u32) -> SendWqe {
    let mut wqe = send(Opcode::Write, from.0.sge(from.1, len));
    (wqe.remote_addr, wqe.rkey) = (to.0.addr() + to.1, to.0.key);
    wqe
}

fn datagram(from: (&App, u64), to: &App, len: u32) -> SendWqe {
    let mut wqe = send(Opcode::Send, from.0.sge(from.1, len));
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: gid(to.client), qpn: to.qpn, qkey: 0x11, ..Address::default() };
    wqe
}

fn only(mut accesses: Vec<Access>) -> Access {
    assert_eq!(accesses.len(), 1);
    accesses.remove(0)
}

/// Lets time pass until nobody waits for it.
fn wait_long(fabric: &mut Fabric<TestMemory>) -> u64 {
    let mut now = 0;
    assert!(turn_without_accesses(fabric, now).is_empty());
    while let Some(next) = fabric.next_timer() {
        assert!(next < LONG, "somebody waits too long");
        now = next;
        assert!(turn_without_accesses(fabric, now).is_empty());
    }
    now
}

#[test]
fn a_peers_access_that_never_ends_is_silence_and_holds_up_nobody_else() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    let mut c = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
    let d = App::new(&mut fabric, 4, QpType::Rc, Mode::Isolated);
    c.to_rts(&mut fabric, &d, QpType::Rc);
    d.to_rts(&mut fabric, &c, QpType::Rc);
    a.bytes().fill(1);
    a.post(&write((&a, MAPPED), (&b, 0), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!(access.client(), b.client);

    c.post(&write((&c, MAPPED), (&d, MAPPED), 8));
    assert!(turn_without_accesses(&mut fabric, 1).is_empty());
    assert_eq!(status(c.sends.pop()), WcStatus::Success);

    let waited = wait_long(&mut fabric);
    assert!(waited >= 3 * 100 * MS, "an honest peer may be slow");
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Rts));
    perform(&mut fabric, access);
    turn(&mut fabric, waited);
    assert_eq!(b.bytes()[..8], [0; 8], "nobody waits for it any more");
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_peer_that_answers_slowly_is_waited_for() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes().fill(1);
    a.post(&write((&a, MAPPED), (&b, 0), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    // A receive that comes in the meantime wakes the peer, but brings no answer.
    b.post_recv(1, &[]);
    assert!(turn_without_accesses(&mut fabric, 300 * MS).is_empty());
    assert_eq!(a.sends.pop(), None);
    perform(&mut fabric, access);
    turn(&mut fabric, 301 * MS);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(b.bytes()[..8], [1; 8]);
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_requesters_own_memory_may_take_as_long_as_it_likes() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes()[..8].fill(3);
    a.post(&write((&a, 0), (&b, MAPPED), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!(access.client(), a.client);
    assert_eq!(fabric.next_timer(), None);
    assert!(turn_without_accesses(&mut fabric, LONG).is_empty());
    perform(&mut fabric, access);
    turn(&mut fabric, LONG);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(b.bytes()[MAPPED as usize..][..8], [3; 8]);
}

#[test]
fn memory_that_cannot_be_accessed_fails_the_side_it_belongs_to() {
    type Case = (Opcode, u64, u64, u32, WcStatus);
    let cases: [Case; 6] = [
        (Opcode::Write, 0, MAPPED, 1, WcStatus::LocProtErr),
        (Opcode::Write, MAPPED, 0, 2, WcStatus::RemOpErr),
        (Opcode::Read, 0, MAPPED, 1, WcStatus::LocProtErr),
        (Opcode::Read, MAPPED, 0, 2, WcStatus::RemOpErr),
        (Opcode::FetchAndAdd, 0, MAPPED, 1, WcStatus::LocProtErr),
        (Opcode::FetchAndAdd, MAPPED, 0, 2, WcStatus::RemOpErr),
    ];
    for (opcode, local, remote, broken, expected) in cases {
        let (mut fabric, mut a, b) = pair(QpType::Rc);
        fabric.memory_mut(broken).unwrap().unreachable = true;
        let mut wqe = send(opcode, a.sge(local, 8));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + remote, b.key);
        a.post(&wqe);
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), expected, "{opcode:?} with client {broken} broken");
    }
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    fabric.memory_mut(b.client).unwrap().unreachable = true;
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::RemOpErr);
    assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr);
}

#[test]
fn a_key_that_dies_during_an_access_ends_the_request() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post(&write((&a, MAPPED), (&b, 0), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    let mark = fabric.access_mark(b.client);
    fabric.memory_mut(b.client).unwrap().table.clear();
    assert!(!fabric.has_passed(b.client, mark), "its memory may still be written to");
    assert!(fabric.has_passed(a.client, fabric.access_mark(a.client)));
    perform(&mut fabric, access);
    assert!(fabric.has_passed(b.client, mark));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::RemAccessErr);
}

#[test]
fn a_receive_is_flushed_only_when_nothing_is_written_to_it_any_more() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert!(fabric.is_busy(b.client, b.qpn) && !fabric.is_busy(a.client, a.qpn));
    b.modify(&mut fabric, QpState::Err, &a, QpType::Rc);
    assert!(turn_without_accesses(&mut fabric, 1).is_empty());
    assert_eq!(b.receives.pop(), None);
    perform(&mut fabric, access);
    turn(&mut fabric, 2);
    assert_eq!(status(b.receives.pop()), WcStatus::WrFlushErr);
    assert!(!fabric.is_busy(b.client, b.qpn));
    assert_eq!(a.sends.pop(), None, "the peer does not answer any more");
}

#[test]
fn a_read_is_flushed_only_when_nothing_is_written_to_its_buffer_any_more() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    let mut wqe = send(Opcode::Read, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
    a.post(&wqe);
    let access = only(turn_without_accesses(&mut fabric, 0));
    a.modify(&mut fabric, QpState::Err, &b, QpType::Rc);
    assert!(turn_without_accesses(&mut fabric, 1).is_empty());
    assert_eq!(a.sends.pop(), None);
    perform(&mut fabric, access);
    turn(&mut fabric, 2);
    assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
}

#[test]
fn a_client_that_ends_leaves_its_peers_a_silent_wire_and_nothing_else() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    a.post(&write((&a, MAPPED), (&b, 0), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    fabric.close(b.client);
    wait_long(&mut fabric);
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    perform(&mut fabric, access);
    turn(&mut fabric, 0);

    let (mut fabric, a, mut b) = pair(QpType::Rc);
    a.post(&write((&a, MAPPED), (&b, 0), 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    fabric.close(a.client);
    assert!(fabric.is_busy(b.client, b.qpn), "whoever asked");
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    assert!(!fabric.is_busy(b.client, b.qpn));
    assert_eq!(b.bytes()[..8], [0; 8]);
}

#[test]
fn an_atomic_is_executed_once_although_its_result_must_be_stored_later() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    for (local, remote, accesses) in [(0u64, MAPPED, 1), (8, 0, 2)] {
        b.buffer[remote as usize / 8] = 40;
        let mut add = send(Opcode::FetchAndAdd, a.sge(local, 8));
        (add.remote_addr, add.rkey, add.compare_add) = (b.addr() + remote, b.key, 2);
        a.post(&add);
        for _ in 0..accesses {
            assert_eq!(a.sends.pop(), None);
            let access = only(turn_without_accesses(&mut fabric, 0));
            perform(&mut fabric, access);
        }
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!((a.buffer[local as usize / 8], b.buffer[remote as usize / 8]), (40, 42));
    }
}

#[test]
fn the_last_byte_becomes_visible_last_whatever_holds_it() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes().fill(9);
    // A foreign head and a mapped tail.
    let edge = mapped_start(&b);
    a.post(&write((&a, MAPPED), (&b, edge - 8), 16));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!(b.bytes()[edge as usize..][..8], [0; 8], "the tail waits for the head");
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    assert_eq!(b.bytes()[edge as usize - 8..][..16], [9; 16]);
    // A mapped head and a foreign tail.
    b.bytes().fill(0);
    let end = (b.addr() + (1 << 20)) & !4095;
    let edge = end - b.addr();
    a.post(&write((&a, MAPPED), (&b, edge - 8), 16));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!(b.bytes()[edge as usize - 8..][..8], [9; 8], "the head is there before the tail");
    b.bytes()[edge as usize - 8..][..8].fill(5);
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    assert_eq!(b.bytes()[edge as usize..][..8], [9; 8]);
    assert_eq!(b.bytes()[edge as usize - 8..][..8], [5; 8], "and is not written again after it");
}

#[test]
fn a_receive_that_is_changed_during_an_access_is_believed_as_it_is_afterwards() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    a.bytes().fill(9);
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    let access = only(turn_without_accesses(&mut fabric, 0));
    RecvWqe::encode(1, &[b.sge(16, 8)], |part, block| b.area.write_rq_block(0, part, block));
    perform(&mut fabric, access);
    let access = only(turn_without_accesses(&mut fabric, 0));
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!(b.bytes()[16..24], [9; 8]);
}

#[test]
fn an_unreliable_message_to_slow_memory_is_lost_in_the_end() {
    let (mut fabric, mut a, b) = pair(QpType::Uc);
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(MAPPED, 8)));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!(a.sends.pop(), None);
    wait_long(&mut fabric);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    perform(&mut fabric, access);
    turn(&mut fabric, LONG);
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts));
}

#[test]
fn a_sender_of_datagrams_never_waits_for_its_receiver() {
    let (mut fabric, mut a, mut b) = pair(QpType::Ud);
    a.bytes().fill(7);
    b.post_recv(1, &[b.sge(0, 100)]);
    b.post_recv(2, &[b.sge(MAPPED, 100)]);
    for len in [8, 9, 10] {
        a.post(&datagram((&a, MAPPED), &b, len));
    }
    let access = only(turn_without_accesses(&mut fabric, 0));
    for _ in 0..3 {
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
    assert_eq!(b.receives.pop(), None, "the first one is on its way, and the second behind it");
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    let got: Vec<_> = std::iter::from_fn(|| b.receives.pop()).map(|cqe| (cqe.wr_id, cqe.byte_len)).collect();
    assert_eq!(got, [(1, 48), (2, 49)], "the third one found no receive");
    assert_eq!(b.bytes()[40..48], [7; 8]);
    assert_eq!(b.bytes()[MAPPED as usize + 40..][..9], [7; 9]);
}

#[test]
fn datagrams_that_wait_are_bounded_for_a_client_and_go_with_their_qp() {
    let (mut fabric, a, b) = pair(QpType::Ud);
    let held = Arc::clone(&fabric.client_mut(b.client).unwrap().inboxes);
    for i in 0..16 {
        b.post_recv(i, &[b.sge(0, 5000)]);
    }
    for _ in 0..16 {
        a.post(&datagram((&a, MAPPED), &b, 4096));
        let _ = turn_without_accesses(&mut fabric, 0);
    }
    assert_eq!(held.load(Ordering::Relaxed), 16 * (4096 + 40));
    held.store(crate::inbox::ROOM, Ordering::Relaxed);
    b.post_recv(16, &[b.sge(0, 5000)]);
    a.post(&datagram((&a, MAPPED), &b, 4096));
    let _ = turn_without_accesses(&mut fabric, 0);
    assert_eq!(held.load(Ordering::Relaxed), crate::inbox::ROOM, "lost for want of room");
    held.store(16 * (4096 + 40), Ordering::Relaxed);
    fabric.close(b.client);
    assert_eq!(held.load(Ordering::Relaxed), 0);
}

#[test]
fn a_datagram_from_slow_memory_holds_its_sender_alone() {
    let (mut fabric, mut a, mut b) = pair(QpType::Ud);
    a.bytes()[..8].fill(7);
    b.post_recv(1, &[b.sge(MAPPED, 100)]);
    a.post(&datagram((&a, 0), &b, 8));
    let access = only(turn_without_accesses(&mut fabric, 0));
    assert_eq!((access.client(), a.sends.pop()), (a.client, None));
    perform(&mut fabric, access);
    turn(&mut fabric, 0);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
    assert_eq!(b.bytes()[MAPPED as usize + 40..][..8], [7; 8]);
}
