//! Several streams of one link: each QP keeps to one, and what happens to one stream is nothing to the others.

use super::*;
use crate::{fabric::far::spread, wire::Path};

const STREAMS: u32 = 4;

fn path(source_qpn: u32, target_qpn: u32, from: u32, to: u32) -> Path {
    Path { tenant: 0, source_qpn, target_qpn, sgid: gid(from), dgid: gid(to) }
}

#[test]
fn both_ends_choose_the_same_stream_and_a_thousand_qps_take_all_streams_evenly() {
    let mut taken = [0; STREAMS as usize];
    for qpn in 0x100..0x100 + 1000 {
        // Hosts count alike: the numbers at both ends are often the same.
        let chosen = spread(&path(qpn, qpn, 1, 11)) % STREAMS;
        assert_eq!(spread(&path(qpn, qpn, 11, 1)) % STREAMS, chosen);
        taken[chosen as usize] += 1;
    }
    assert!(taken.iter().all(|taken| (225..=275).contains(taken)), "{taken:?}");
    for qpn in 0..100 {
        assert_eq!(spread(&path(qpn, 7, 1, 11)), spread(&path(7, qpn, 11, 1)));
    }
}

/// Two hosts with that many streams between them, all there.
fn hosts(streams: u32) -> Hosts {
    let mut hosts = Hosts::new();
    hosts.up = true;
    hosts.sent_over = vec![0; streams as usize];
    for fabric in &mut hosts.fabrics {
        fabric.set_streams(streams);
        (0..streams).for_each(|index| {
            fabric.link_up(Stream { peer: PEER, index }, streams, HashMap::from([(0, 0)]));
        });
    }
    hosts
}

/// Connected pairs of different clients.
fn pairs(hosts: &mut Hosts, count: u32) -> Vec<(App, App)> {
    (0..count)
        .map(|i| {
            let a = App::new(&mut hosts.fabrics[0], 1 + i, QpType::Rc, Mode::Isolated);
            let b = App::new(&mut hosts.fabrics[1], 11 + i, QpType::Rc, Mode::Isolated);
            for (host, app, peer) in [(0, &a, &b), (1, &b, &a)] {
                for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
                    let (qp, peer) = ((app.client, app.qpn), (peer.client, peer.qpn));
                    fabric_modify_tuned(
                        &mut hosts.fabrics[host],
                        qp,
                        state,
                        peer,
                        QpType::Rc,
                        |_: &mut QpAttr| (),
                    );
                }
            }
            (a, b)
        })
        .collect()
}

#[test]
fn a_stream_that_stands_still_holds_up_its_own_qps_only() {
    let mut hosts = hosts(STREAMS);
    let mut pairs = pairs(&mut hosts, 8);
    let index_of = |(a, b): &(App, App)| spread(&path(a.qpn, b.qpn, a.client, b.client)) % STREAMS;
    let still = index_of(&pairs[0]);
    assert!(pairs.iter().any(|pair| index_of(pair) != still), "all take one stream");
    hosts.blocked = vec![still as usize];
    for (a, b) in &mut pairs {
        fill(a);
        let mut wqe = send(Opcode::Write, a.sge(MAPPED, 200_000));
        (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
        a.post(&wqe);
    }
    hosts.settle();
    for pair in &mut pairs {
        let waits = index_of(pair) == still;
        assert_eq!(pair.0.sends.pop().is_none(), waits);
    }
    hosts.blocked.clear();
    hosts.settle();
    for pair in pairs.iter_mut().filter(|pair| index_of(pair) == still) {
        assert_eq!(status(pair.0.sends.pop()), WcStatus::Success);
    }
}

#[test]
fn a_lost_stream_makes_its_own_qps_send_again_and_no_others() {
    let mut hosts = hosts(2);
    let mut pairs = pairs(&mut hosts, 8);
    // That all are ready was said.
    hosts.settle();
    let index_of = |(a, b): &(App, App)| spread(&path(a.qpn, b.qpn, a.client, b.client)) % 2;
    for (a, b) in &mut pairs {
        fill(a);
        let mut wqe = send(Opcode::Write, a.sge(MAPPED, 20_000));
        (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
        a.post(&wqe);
    }
    (0..50).for_each(|_| turn(&mut hosts.fabrics[0], 0));
    // Both streams lose what they have taken; only one of them says so.
    let streams = [0, 1].map(|index| Stream { peer: PEER, index });
    let mut lost = [Vec::new(), Vec::new()];
    for (stream, lost) in streams.iter().zip(&mut lost) {
        assert!(hosts.fabrics[0].take_packets(*stream, lost));
    }
    for fabric in &mut hosts.fabrics {
        fabric.link_down(streams[0], true);
        fabric.link_up(streams[0], 2, HashMap::from([(0, 0)]));
    }
    hosts.settle();
    for pair in &mut pairs {
        let again = index_of(pair) == 0;
        assert_eq!(pair.0.sends.pop().is_some(), again);
        if again {
            let sent = pair.0.bytes()[MAPPED as usize..][..20_000].to_vec();
            assert_eq!(pair.1.bytes()[..20_000], sent);
        }
    }
}

#[test]
fn an_end_that_wants_fewer_streams_gets_its_way() {
    let mut hosts = hosts(STREAMS);
    let mut pairs = pairs(&mut hosts, 8);
    for fabric in &mut hosts.fabrics {
        fabric.link_up(STREAM, 1, HashMap::from([(0, 0)]));
    }
    hosts.sent_over = vec![0; STREAMS as usize];
    for (a, b) in &mut pairs {
        let mut wqe = send(Opcode::Write, a.sge(MAPPED, 50_000));
        (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
        a.post(&wqe);
    }
    hosts.settle();
    for (a, _) in &mut pairs {
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
    }
    assert!(hosts.sent_over[0] > 0 && hosts.sent_over[1..] == [0; 3], "{:?}", hosts.sent_over);
}
