//! Promise: clients come and go, and the router's descriptors and mappings are what they were.
//! Alone in its file, for it counts those of the whole process.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

mod bed;

use std::{fs, time::Duration};

use bed::{Bed, Client, eventually};
use verbs_abi::proto::{Answer, Mode, RegMr, Request};

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of files that were shared with clients.
fn mappings() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains("freeflow")).count()
}

/// Both, when they have not changed for a while: connections end a moment after their other end was closed.
fn settled() -> (usize, usize) {
    let mut last = (descriptors(), mappings());
    let mut same = 0;
    eventually("nothing changes", || {
        std::thread::sleep(Duration::from_millis(5));
        let now = (descriptors(), mappings());
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same == 20
    });
    last
}

/// One client's life, ended without a word.
fn live(bed: &Bed, round: u64) {
    let client = Client::new(bed.dial(), if round.is_multiple_of(2) { Mode::Direct } else { Mode::Isolated });
    let pd = client.pd();
    let channel = bed::event();
    let Ok(Answer::Handle(channel)) = client.channel(&channel) else { panic!() };
    let cq = client.cq(Some(channel));
    let qp = client.qp(pd, cq);
    client.connect(qp.new.qpn, qp.new.qpn, client.gid());
    for i in 0..4u64 {
        let addr = 0x1000_0000_0000 + (i << 32);
        let reg = RegMr { shared_start: addr, shared_end: addr + 8192, ..bed::reg_mr(pd, addr, 8192) };
        let Ok(Answer::Mr { key }) = client.ask(&Request::RegMr(reg)) else { panic!() };
        if i == round % 4 {
            assert_eq!(client.ask(&Request::DeregMr { key }), Ok(Answer::Done));
        }
    }
    if round.is_multiple_of(3) {
        assert_eq!(client.ask(&Request::DestroyQp { qpn: qp.new.qpn }), Ok(Answer::Done));
    }
}

#[test]
fn two_hundred_clients_leave_nothing_behind() {
    let bed = Bed::new();
    let gone = || router::client::status(&bed.path).unwrap().clients.is_empty();
    live(&bed, 0);
    eventually("the first is gone", gone);
    let before = settled();
    (0..200).for_each(|round| live(&bed, round));
    let mut clients: Vec<_> = (0..50).map(|_| bed.open()).collect();
    clients.iter().for_each(|client| drop(client.qp(client.pd(), client.cq(None))));
    assert!(descriptors() > before.0 + 50);
    clients.clear();
    eventually("all are gone", gone);
    eventually("descriptors and mappings are what they were", || (descriptors(), mappings()) == before);
}
