//! Promise: QPs that want more of a stream than it carries get equal shares of it.

use super::{
    super::fairness::{fill_queue, further_qp},
    *,
};
use crate::wire::SEGMENT;

/// Two hosts, an application on each, and that many further connections between them, whose send queues hold writes of
/// these lengths in turn.
fn busy(count: usize, lengths: &[u32]) -> (Hosts, App, App, Vec<u32>, Vec<QueueArea>) {
    let (mut hosts, a, b) = pair_across(QpType::Rc, |_| ());
    hosts.settle();
    hosts.up = false;
    let (mut numbers, mut areas) = (Vec::new(), Vec::new());
    for i in 0..count {
        let (near, slot, area) = further_qp(&mut hosts.fabrics[0], &a);
        let (far, _, far_area) = further_qp(&mut hosts.fabrics[1], &b);
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let (own, peer) = ((a.client, near), (b.client, far));
            fabric_modify(&mut hosts.fabrics[0], own, state, peer, QpType::Rc);
            fabric_modify(&mut hosts.fabrics[1], peer, state, own, QpType::Rc);
        }
        fill_queue(&area, &a, &b, lengths[i % lengths.len()]);
        a.doorbells.ring(slot);
        numbers.push(far);
        areas.extend([area, far_area]);
    }
    hosts.up = true;
    (hosts, a, b, numbers, areas)
}

impl Hosts {
    /// Lets both go on until so many bytes more have come; says how many each of these QPs has had.
    fn carry(&mut self, bytes: u64, qps: &[u32]) -> Vec<u64> {
        self.carried.clear();
        while self.carried.values().sum::<u64>() < bytes {
            assert!(self.step(), "nothing moves any more");
        }
        qps.iter().map(|qpn| self.carried.get(qpn).copied().unwrap_or(0)).collect()
    }
}

#[test]
fn a_hundred_busy_qps_get_equal_shares_of_a_stream_whatever_the_length_of_their_messages() {
    for lengths in [&[65_536][..], &[1 << 18], &[65_536, 1 << 18, 40_000, 100_000]] {
        let (mut hosts, _a, _b, qps, _areas) = busy(100, lengths);
        // Who came first found a stream that nobody else wanted.
        hosts.carry(200 * SEGMENT, &qps);
        let moved = hosts.carry(10 * 100 * SEGMENT, &qps);
        let (least, most) = (moved.iter().min().unwrap(), moved.iter().max().unwrap());
        assert!(most - least <= 2 * SEGMENT, "{lengths:?}: {least} to {most}");
    }
}

#[test]
fn a_write_beside_busy_qps_does_not_wait_for_a_round_of_them() {
    let (mut hosts, mut a, b, qps, _areas) = busy(200, &[65_536]);
    hosts.carry(200 * SEGMENT, &qps);
    for round in 0..20 {
        let mut wqe = send(Opcode::Write, a.sge(MAPPED, 8));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
        a.post(&wqe);
        hosts.carried.clear();
        while a.sends.pop().is_none() {
            assert!(hosts.step());
        }
        let meanwhile = hosts.carried.values().sum::<u64>();
        assert!(meanwhile <= 40 * SEGMENT, "round {round}: {meanwhile} B");
    }
}

#[test]
fn those_that_were_called_and_want_nothing_any_more_hold_nobody_up() {
    let (mut hosts, a, _b, qps, _areas) = busy(100, &[65_536]);
    hosts.carry(30 * SEGMENT, &qps);
    // The other half ends in the middle of it all.
    let near: Vec<u32> = hosts.fabrics[0].snapshot().iter().map(|qp| qp.qpn).collect();
    for qpn in near.iter().filter(|qpn| **qpn != a.qpn).step_by(2) {
        hosts.fabrics[0].destroy_qp(a.client, *qpn).unwrap();
    }
    hosts.carried.clear();
    hosts.settle();
    let ended = qps.iter().filter(|qpn| hosts.carried.get(qpn).is_some_and(|bytes| *bytes > 11 * 65_536));
    assert_eq!(ended.count(), 50, "all that are left have sent all they had");
}
