//! Copies beside the fabric: the QP waits, others go on, and whatever happens meanwhile nothing is told too early.

use super::*;
use crate::Copy;

/// Where everything is mapped.
const INSIDE: u64 = 8192;
/// More than one part.
const LONG: u32 = 100_000;

/// Two connected pairs whose fabric several threads serve, each with an RDMA WRITE of [`LONG`] that was rung for.
fn two_pairs() -> (Fabric<TestMemory>, [App; 4]) {
    let mut fabric = Fabric::new();
    fabric.share_copies(true);
    let apps = [1, 2, 3, 4].map(|client| App::new(&mut fabric, client, QpType::Rc, Mode::Isolated));
    for (at, peer) in [(0, 1), (1, 0), (2, 3), (3, 2)] {
        apps[at].to_rts(&mut fabric, &apps[peer], QpType::Rc);
    }
    turn(&mut fabric, 0);
    (fabric, apps)
}

fn long(opcode: Opcode, from: &App, to: &App) -> SendWqe {
    let mut wqe = send(opcode, from.sge(INSIDE, LONG));
    (wqe.remote_addr, wqe.rkey) = (to.addr() + INSIDE, to.key);
    wqe
}

/// Both pairs have a long request, and the first one's is set aside.
fn set_aside(opcode: Opcode) -> (Fabric<TestMemory>, [App; 4], Copy) {
    let (mut fabric, apps) = two_pairs();
    apps[0].post(&long(opcode, &apps[0], &apps[1]));
    apps[2].post(&long(opcode, &apps[2], &apps[3]));
    fabric.collect();
    fabric.run(0);
    let copy = fabric.next_copy().expect("two have something to do");
    (fabric, apps, copy)
}

fn copy_and_end(fabric: &mut Fabric<TestMemory>, copy: Copy) {
    // SAFETY: the tests' memory lives as long as they do.
    unsafe { copy.perform() };
    fabric.end_copy(copy);
}

/// Lets the fabric come to rest, with what it sets aside copied at once.
fn rest(fabric: &mut Fabric<TestMemory>) {
    for _ in 0..1000 {
        let more = fabric.run(0);
        match fabric.next_copy() {
            Some(copy) => copy_and_end(fabric, copy),
            None if !more => return,
            None => {}
        }
    }
    panic!("the fabric never comes to rest");
}

fn part(app: &mut App) -> &mut [u8] {
    &mut app.bytes()[INSIDE as usize..][..LONG as usize]
}

#[test]
fn long_payload_arrives_by_copies_and_is_completed_after_the_last() {
    for opcode in [Opcode::Write, Opcode::Read] {
        let (mut fabric, mut apps, copy) = set_aside(opcode);
        let [from, to] = if opcode == Opcode::Read { [1, 0] } else { [0, 1] };
        for (i, byte) in part(&mut apps[from]).iter_mut().enumerate() {
            *byte = (i * 7 + i / 256) as u8;
        }
        // The other one has its turn meanwhile.
        fabric.run(0);
        let second = fabric.next_copy();
        assert_eq!(apps[0].sends.pop(), None);
        second.into_iter().for_each(|second| copy_and_end(&mut fabric, second));
        copy_and_end(&mut fabric, copy);
        assert_eq!(apps[0].sends.pop(), None, "that was the first part");
        rest(&mut fabric);
        let expected = part(&mut apps[from]).to_vec();
        assert!(part(&mut apps[to]) == expected, "other bytes have come");
        for at in [0, 2] {
            assert_eq!(apps[at].sends.pop().map(|cqe| (cqe.status, cqe.byte_len)), Some((0, LONG)));
        }
        assert!(apps.iter_mut().all(|app| app.sends.pop().is_none() && app.receives.pop().is_none()));
    }
}

#[test]
fn a_qp_that_is_copied_for_has_no_turn() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    apps[0].post(&send(Opcode::Write, apps[0].sge(INSIDE, 8)));
    for _ in 0..3 {
        apps[0].doorbells.ring(apps[0].slot);
        fabric.collect();
        fabric.run(0);
        let other = fabric.next_copy();
        other.into_iter().for_each(|other| copy_and_end(&mut fabric, other));
    }
    assert_eq!((apps[0].sends.pop(), status(apps[2].sends.pop())), (None, WcStatus::Success));
    copy_and_end(&mut fabric, copy);
    rest(&mut fabric);
    assert_eq!(status(apps[0].sends.pop()), WcStatus::Success);
}

#[test]
fn nothing_is_set_aside_for_one_alone_or_for_one_thread() {
    let (mut fabric, mut apps) = two_pairs();
    apps[0].post(&long(Opcode::Write, &apps[0], &apps[1]));
    turn(&mut fabric, 0);
    assert!(fabric.next_copy().is_none());
    assert_eq!(status(apps[0].sends.pop()), WcStatus::Success);
    fabric.share_copies(false);
    for at in [0, 2] {
        apps[at].post(&long(Opcode::Write, &apps[at], &apps[at + 1]));
    }
    turn(&mut fabric, 0);
    assert!(fabric.next_copy().is_none());
    assert_eq!(
        (status(apps[0].sends.pop()), status(apps[2].sends.pop())),
        (WcStatus::Success, WcStatus::Success)
    );
}

#[test]
fn neither_end_is_flushed_while_it_is_copied_for() {
    for failing in [0, 1] {
        let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
        for at in [0, 1] {
            apps[at].post(&with_id(send(Opcode::Send, apps[at].sge(INSIDE, 8)), 43));
            apps[at].post_recv(9, &[apps[at].sge(INSIDE, 8)]);
        }
        let (one, other) = (&apps[failing], &apps[1 - failing]);
        one.modify(&mut fabric, QpState::Err, other, QpType::Rc);
        fabric.collect();
        fabric.run(0);
        let second = fabric.next_copy();
        assert_eq!((apps[failing].receives.pop(), apps[0].sends.pop()), (None, None), "{failing}");
        second.into_iter().for_each(|second| copy_and_end(&mut fabric, second));
        copy_and_end(&mut fabric, copy);
        rest(&mut fabric);
        assert_eq!(status(apps[failing].receives.pop()), WcStatus::WrFlushErr);
        if failing == 0 {
            assert_eq!(status(apps[0].sends.pop()), WcStatus::WrFlushErr);
        }
    }
}

#[test]
fn a_copy_that_comes_back_to_a_qp_of_another_life_ends_nothing() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    for at in [0, 1] {
        apps[at].modify(&mut fabric, QpState::Reset, &apps[1 - at], QpType::Rc);
        assert!(!fabric.is_busy(apps[at].client, apps[at].qpn), "RESET need not wait");
    }
    for at in [0, 1] {
        apps[at].to_rts(&mut fabric, &apps[1 - at], QpType::Rc);
    }
    apps[0].post(&long(Opcode::Write, &apps[0], &apps[1]));
    copy_and_end(&mut fabric, copy);
    fabric.collect();
    assert_eq!(apps[0].sends.pop(), None);
    rest(&mut fabric);
    assert_eq!((status(apps[0].sends.pop()), apps[0].sends.pop()), (WcStatus::Success, None));

    // Destroyed, the client gone, and an index that is another's by now.
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    fabric.destroy_qp(apps[0].client, apps[0].qpn).unwrap();
    fabric.close(apps[1].client);
    let late = App::new(&mut fabric, 5, QpType::Rc, Mode::Isolated);
    fabric.end_copy(copy);
    rest(&mut fabric);
    assert_eq!(late.state(&mut fabric), QpState::Reset);
    assert_eq!((apps[0].sends.pop(), status(apps[2].sends.pop())), (None, WcStatus::Success));
}

#[test]
fn a_key_that_dies_between_two_parts_ends_the_request() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    fabric.memory_mut(apps[1].client).unwrap().table.clear();
    copy_and_end(&mut fabric, copy);
    rest(&mut fabric);
    assert_eq!(status(apps[0].sends.pop()), WcStatus::RemAccessErr);
    assert_eq!((apps[0].state(&mut fabric), apps[1].state(&mut fabric)), (QpState::Err, QpState::Err));
}

#[test]
fn what_was_copied_from_memory_that_is_lost_is_not_completed_well() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    fabric.memory_mut(apps[0].client).unwrap().lost = true;
    copy_and_end(&mut fabric, copy);
    rest(&mut fabric);
    assert_eq!(status(apps[0].sends.pop()), WcStatus::LocProtErr);
}

#[test]
fn a_queue_is_not_drained_while_it_is_copied_for() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    apps[0].post(&long(Opcode::Write, &apps[0], &apps[1]));
    let attr = QpAttr { qp_state: QpState::Sqd.value(), en_sqd_async_notify: 1, ..QpAttr::default() };
    let mask = Mask::STATE | Mask::EN_SQD_ASYNC_NOTIFY;
    fabric.modify_qp(apps[0].client, apps[0].qpn, mask.bits(), &attr).unwrap();
    fabric.collect();
    fabric.run(0);
    let second = fabric.next_copy();
    assert_eq!(events(&mut apps[0]), []);
    second.into_iter().for_each(|second| copy_and_end(&mut fabric, second));
    copy_and_end(&mut fabric, copy);
    rest(&mut fabric);
    assert_eq!(events(&mut apps[0]), [EventType::SqDrained]);
    assert_eq!((status(apps[0].sends.pop()), apps[0].sends.pop()), (WcStatus::Success, None));
}

#[test]
fn a_message_that_is_too_long_is_not_copied() {
    let (mut fabric, mut apps, copy) = set_aside(Opcode::Write);
    let memory = fabric.memory_mut(apps[2].client).unwrap();
    (memory.table[0].len, memory.table[0].shared_end) = (u64::from(u32::MAX), u64::MAX / 2);
    let memory = fabric.memory_mut(apps[3].client).unwrap();
    (memory.table[0].len, memory.table[0].shared_end) = (u64::from(u32::MAX), u64::MAX / 2);
    let mut wqe = send(Opcode::Write, apps[2].sge(INSIDE, (1 << 30) + 1));
    (wqe.remote_addr, wqe.rkey) = (apps[3].addr() + INSIDE, apps[3].key);
    apps[2].post(&wqe);
    copy_and_end(&mut fabric, copy);
    fabric.collect();
    rest(&mut fabric);
    assert_eq!(status(apps[2].sends.pop()), WcStatus::Success);
    assert_eq!(status(apps[2].sends.pop()), WcStatus::LocLenErr);
}

/// Bytes of long writes that clients of these weights move beside each other, copies coming back one turn late.
fn shares(weights: [u32; 4]) -> [u64; 4] {
    let mut fabric = Fabric::new();
    fabric.share_copies(true);
    let mut pairs = [1, 2, 3, 4].map(|n| {
        let [a, b] = [n, n + 4].map(|client| App::new(&mut fabric, client, QpType::Rc, Mode::Isolated));
        a.to_rts(&mut fabric, &b, QpType::Rc);
        b.to_rts(&mut fabric, &a, QpType::Rc);
        fabric.set_weight(n, weights[n as usize - 1]);
        (a, b)
    });
    turn(&mut fabric, 0);
    let (mut moved, mut posted, mut late) = ([0_u64; 4], [0_u64; 4], None);
    for _ in 0..4000 {
        for (at, (a, b)) in pairs.iter_mut().enumerate() {
            while let Some(cqe) = a.sends.pop() {
                moved[at] += u64::from(cqe.byte_len);
            }
            while posted[at] * u64::from(LONG) < moved[at] + 4 * u64::from(LONG) {
                a.post(&long(Opcode::Write, a, b));
                posted[at] += 1;
            }
        }
        fabric.collect();
        fabric.run(0);
        let copy = fabric.next_copy();
        if let Some(copy) = std::mem::replace(&mut late, copy) {
            copy_and_end(&mut fabric, copy);
        }
    }
    moved
}

#[test]
fn who_is_copied_for_keeps_its_share() {
    for weights in [[1, 1, 1, 1], [3, 1, 1, 1]] {
        let moved = shares(weights);
        let all: u64 = moved.iter().sum();
        let shares: u32 = weights.iter().sum();
        for (bytes, weight) in moved.into_iter().zip(weights) {
            let due = all * u64::from(weight) / u64::from(shares);
            assert!(bytes.abs_diff(due) * 10 < due, "{moved:?} by {weights:?}");
        }
    }
}
