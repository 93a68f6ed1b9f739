//! Promise: a key stands for what it was last registered for, and for nothing else.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

mod bed;

use bed::{Bed, Client, Qp, reg_mr, write};
use verbs_abi::{
    proto::{Answer, RegMr, Request, WHOLE_PROCESS},
    shm::wqe::Sge,
    verbs::{AccessFlags, WcStatus},
};

const LEN: usize = 64 * 1024;
const ACCESS: u32 = 15;

/// A client with a QP that is connected to the same client's other one.
struct Loop {
    client: Client,
    pd: u32,
    qp: Qp,
    source: Vec<u8>,
    sge: Sge,
}

impl Loop {
    fn new(bed: &Bed) -> Self {
        let client = bed.open();
        let pd = client.pd();
        let cq = client.cq(None);
        let (qp, peer) = (client.qp(pd, cq), client.qp(pd, cq));
        client.connect(qp.new.qpn, peer.new.qpn, client.gid());
        client.connect(peer.new.qpn, qp.new.qpn, client.gid());
        let source = vec![7u8; LEN];
        let lkey = client.mr(pd, addr(&source), LEN as u64);
        let sge = Sge { addr: addr(&source), length: LEN as u32, lkey };
        Self { client, pd, qp, source, sge }
    }

    /// Writes to memory of the same process and says how that ended.
    fn write(&mut self, to: u64, rkey: u32) -> u32 {
        assert_eq!(self.source[0], 7);
        self.client.post(&mut self.qp, &write(1, self.sge, to, rkey));
        u32::from(self.qp.completion().status)
    }
}

fn addr(bytes: &[u8]) -> u64 {
    bytes.as_ptr().addr() as u64
}

/// Whether all bytes are the source's. Volatile, for another thread wrote them by way of the kernel.
fn is_written(bytes: &[u8]) -> bool {
    // SAFETY: each is inside the slice.
    (0..bytes.len()).all(|i| unsafe { bytes.as_ptr().add(i).read_volatile() } == 7)
}

#[test]
fn a_key_that_was_registered_anew_reaches_the_new_memory_alone() {
    let bed = Bed::new();
    let mut own = Loop::new(&bed);
    let (old, new) = (vec![0u8; LEN], vec![0u8; LEN]);
    let key = own.client.mr(own.pd, addr(&old), LEN as u64);
    let reg = reg_mr(own.pd, addr(&new), LEN as u64);
    assert_eq!(own.client.ask(&Request::ReregMr { key, reg }), Ok(Answer::Done));
    assert_eq!(own.write(addr(&new), key), 0);
    assert!(is_written(&new) && !is_written(&old));
    assert_eq!(own.write(addr(&old), key), WcStatus::RemAccessErr.value());
    assert_eq!(own.client.ask(&Request::DeregMr { key }), Ok(Answer::Done));
}

#[test]
fn rights_that_were_taken_are_gone_and_a_refused_change_changes_nothing() {
    let bed = Bed::new();
    let mut own = Loop::new(&bed);
    let target = vec![0u8; LEN];
    let key = own.client.mr(own.pd, addr(&target), LEN as u64);
    let reg = reg_mr(own.pd, addr(&target), LEN as u64);
    let einval = Err(libc::EINVAL);
    assert_eq!(own.client.ask(&Request::ReregMr { key, reg: RegMr { pd: 99, ..reg } }), einval);
    assert_eq!(own.client.ask(&Request::ReregMr { key, reg: RegMr { access: 2, ..reg } }), einval);
    assert_eq!(own.client.ask(&Request::ReregMr { key: key ^ 1, reg }), einval);
    assert_eq!(own.write(addr(&target), key), 0, "as it was");
    let reg = RegMr { access: AccessFlags::LOCAL_WRITE.bits(), ..reg };
    assert_eq!(own.client.ask(&Request::ReregMr { key, reg }), Ok(Answer::Done));
    assert_eq!(own.write(addr(&target), key), WcStatus::RemAccessErr.value());
}

#[test]
fn a_pd_is_in_use_by_what_was_moved_into_it() {
    let bed = Bed::new();
    let client = bed.open();
    let (from, to) = (client.pd(), client.pd());
    let key = client.mr(from, 4096, 100);
    let reg = reg_mr(to, 4096, 100);
    assert_eq!(client.ask(&Request::ReregMr { key, reg }), Ok(Answer::Done));
    assert_eq!(client.ask(&Request::DeallocPd { pd: from }), Ok(Answer::Done));
    assert_eq!(client.ask(&Request::DeallocPd { pd: to }), Err(libc::EBUSY));
    assert_eq!(client.ask(&Request::DeregMr { key }), Ok(Answer::Done));
    assert_eq!(client.ask(&Request::DeallocPd { pd: to }), Ok(Answer::Done));
}

#[test]
fn one_key_on_demand_reaches_all_of_the_process_and_a_hole_is_an_error() {
    let bed = Bed::new();
    let mut own = Loop::new(&bed);
    let access = ACCESS | AccessFlags::ON_DEMAND.bits();
    let reg = RegMr { iova: 0, access, ..reg_mr(own.pd, 0, WHOLE_PROCESS) };
    let Ok(Answer::Mr { key }) = own.client.ask(&Request::RegMr(reg)) else { panic!("not registered") };
    let (one, other) = (vec![0u8; LEN], vec![0u8; LEN]);
    assert_eq!((own.write(addr(&one), key), own.write(addr(&other), key)), (0, 0));
    assert!(is_written(&one) && is_written(&other));
    assert_eq!(own.write(4096, key), WcStatus::RemOpErr.value(), "nothing is mapped there");
}
