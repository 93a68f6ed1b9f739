use std::ptr;
use std::sync::Arc;

use verbs_abi::ffi::{self, ibv_recv_wr, ibv_send_wr};
use verbs_abi::verbs::WcStatus;

use super::Side;
use crate::cq::Cq;
use crate::post;
use crate::testbed::{Bed, TestQp, poll};

fn qps(bed: &Bed, cq: &Arc<Cq>, count: usize) -> Vec<TestQp> {
    (0..count).map(|_| bed.qp(cq, ffi::IBV_QPT_RC, 16)).collect()
}

#[test]
fn completions_of_one_qp_come_in_order_and_once() {
    let bed = Bed::new();
    let cq = bed.cq();
    let qp = bed.qp(&cq, ffi::IBV_QPT_RC, 4);
    for wqe in 0..50_u32 {
        qp.complete(Side::Send, wqe, u64::from(wqe));
        assert_eq!(poll(&cq, 4), [(100, u64::from(wqe), 0)]);
        assert!(poll(&cq, 4).is_empty());
    }
}

#[test]
fn the_send_that_failed_comes_before_the_receives_that_are_flushed_for_it() {
    let (failed, flushed) = (WcStatus::RemOpErr.value() as u8, WcStatus::WrFlushErr.value() as u8);
    for (count, polls) in [(1, 0), (1, 1), (10, 0)] {
        let bed = Bed::new();
        let cq = bed.cq();
        let qps = qps(&bed, &cq, count);
        // Whichever ring is looked at first.
        (0..polls).for_each(|_| assert!(poll(&cq, 1).is_empty()));
        for qp in &qps {
            qp.complete_as(Side::Send, 0, 1, failed);
            qp.complete_as(Side::Recv, 0, 2, flushed);
        }
        let mut began = Vec::new();
        for _ in 0..count * 2 {
            let (number, id, status) = poll(&cq, 1)[0];
            if began.contains(&number) {
                assert_eq!((id, status), (2, flushed));
            } else {
                assert_eq!((id, status), (1, failed));
                began.push(number);
            }
        }
        assert!(poll(&cq, 1).is_empty());
    }
}

#[test]
fn no_ring_starves_behind_a_full_one() {
    for count in [2, 40] {
        let bed = Bed::new();
        let cq = bed.cq();
        let qps = qps(&bed, &cq, count);
        for wqe in 0..8 {
            qps.iter().for_each(|qp| qp.complete(Side::Send, wqe, u64::from(wqe)));
        }
        let mut seen = vec![0; count];
        // One at a time, and the first QP always has more.
        for turn in 0..count * 8 {
            let taken = poll(&cq, 1);
            assert_eq!(taken.len(), 1, "turn {turn} of {count} QPs");
            seen[taken[0].0 as usize - 100] += 1;
            if turn == count * 2 {
                assert!(seen.iter().all(|&times| times > 0), "{seen:?}");
            }
        }
        assert!(seen.iter().all(|&times| times == 8));
        assert!(poll(&cq, 1).is_empty());
    }
}

#[test]
fn completions_of_a_destroyed_qp_vanish() {
    let bed = Bed::new();
    let cq = bed.cq();
    let qps = qps(&bed, &cq, 20);
    qps.iter().for_each(|qp| qp.complete(Side::Recv, 0, 1));
    qps[3].qp.detach();
    let from: Vec<_> = std::iter::from_fn(|| poll(&cq, 1).first().copied()).map(|wc| wc.0).collect();
    assert_eq!(from.len(), 19);
    assert!(!from.contains(&103));
}

#[test]
fn receives_of_an_srq_whose_completions_went_with_a_qp_are_free_again() {
    let bed = Bed::new();
    let cq = bed.cq();
    let srq = bed.srq(4);
    let qp = bed.qp_with(&cq, ffi::IBV_QPT_RC, 4, Some(&srq));
    let slots = srq.fill(9);
    assert_eq!(slots.len(), 4);
    slots[..3].iter().for_each(|slot| qp.complete(Side::Recv, *slot, 1));
    assert_eq!(poll(&cq, 1).len(), 1);
    assert_eq!(srq.used(), 3);
    // A RESET that was refused: nothing is lost.
    qp.qp.close_rings();
    assert!(poll(&cq, 1).is_empty());
    qp.qp.reopen_rings();
    assert_eq!((poll(&cq, 1).len(), srq.used()), (1, 2));
    qp.qp.close_rings();
    qp.qp.detach();
    assert_eq!((poll(&cq, 1).len(), srq.used()), (0, 1), "the one that nobody has taken");
    assert_eq!(srq.fill(9).len(), 3);
}

#[test]
fn what_a_dead_router_left_is_flushed_in_order() {
    let bed = Bed::new();
    let cq = bed.cq();
    let qp = bed.qp(&cq, ffi::IBV_QPT_RC, 8);
    // SAFETY: integers, pointers and unions of them, for which zero is a value.
    let mut send: ibv_send_wr = unsafe { std::mem::zeroed() };
    let mut recv = ibv_recv_wr { wr_id: 0, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 0 };
    for wr_id in 0..5 {
        (send.wr_id, recv.wr_id) = (wr_id, 10 + wr_id);
        // SAFETY: a live QP and lists that end in null.
        unsafe {
            assert_eq!(post::send(qp.c(), &raw mut send, &mut ptr::null_mut()), 0);
            assert_eq!(post::recv(qp.c(), &raw mut recv, &mut ptr::null_mut()), 0);
        }
    }
    qp.complete(Side::Send, 1, 1);
    assert!(cq.rings.lock().has_outstanding());
    bed.health.mark_dead();
    let flushed = WcStatus::WrFlushErr.value() as u8;
    assert_eq!(poll(&cq, 2), [(100, 1, 0)], "what was completed stands");
    let some = |taken: Vec<_>| (!taken.is_empty()).then_some(taken);
    let all: Vec<_> = std::iter::from_fn(|| some(poll(&cq, 3))).flatten().collect();
    let ids: Vec<_> = all.iter().map(|wc| wc.1).collect();
    assert_eq!(ids, [2, 3, 4, 10, 11, 12, 13, 14]);
    assert!(all.iter().all(|wc| wc.2 == flushed));
    assert!(poll(&cq, 3).is_empty() && !cq.rings.lock().has_outstanding());
}
