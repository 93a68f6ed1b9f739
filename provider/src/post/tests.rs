use std::ptr;

use verbs_abi::ffi::{self, ibv_recv_wr, ibv_send_wr, ibv_sge};
use verbs_abi::shm::wqe::SendWqe;

use super::*;
use crate::poll::Side;
use crate::testbed::{Bed, TestQp, poll};

fn write(wr_id: u64, sge: &mut ibv_sge) -> ibv_send_wr {
    // SAFETY: integers, pointers and unions of them, for which zero is a value.
    let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = wr_id;
    wr.sg_list = sge;
    wr.num_sge = 1;
    wr.opcode = ffi::IBV_WR_RDMA_WRITE;
    wr
}

/// Posts, and tells errno and which request was bad.
fn post(qp: &TestQp, wr: &mut ibv_send_wr) -> (i32, *mut ibv_send_wr) {
    let mut bad = ptr::null_mut();
    // SAFETY: a live QP and a list that ends in null.
    (unsafe { send(qp.c(), wr, &raw mut bad) }, bad)
}

fn sge() -> ibv_sge {
    ibv_sge { addr: 0x1000, length: 8, lkey: 3 }
}

#[test]
fn a_full_queue_refuses_and_names_the_request() {
    let bed = Bed::new();
    let qp = bed.qp(&bed.cq(), ffi::IBV_QPT_RC, 2);
    let mut sge = sge();
    let mut last = write(3, &mut sge);
    let mut second = write(2, &mut sge);
    let mut first = write(1, &mut sge);
    second.next = &raw mut last;
    first.next = &raw mut second;
    assert_eq!(post(&qp, &mut first), (libc::ENOMEM, &raw mut last));
    let mut read = SendWqe::default();
    assert_eq!(qp.qp.area.read_send(0, &mut read), Ok(true), "those before it are posted");
    assert_eq!((read.wr_id, read.sges()[0].lkey), (1, 3));
}

#[test]
fn a_polled_completion_frees_the_unsignaled_work_before_it() {
    let bed = Bed::new();
    let cq = bed.cq();
    let qp = bed.qp(&cq, ffi::IBV_QPT_RC, 4);
    let mut sge = sge();
    for lap in 0..100_u32 {
        for i in 0..4 {
            assert_eq!(post(&qp, &mut write(i, &mut sge)).0, 0);
        }
        assert_eq!(post(&qp, &mut write(9, &mut sge)).0, libc::ENOMEM);
        qp.complete(Side::Send, lap * 4 + 3, 3);
        assert_eq!(post(&qp, &mut write(9, &mut sge)).0, libc::ENOMEM, "not before it is polled");
        assert_eq!(poll(&cq, 8), [(100, 3, 0)]);
    }
}

#[test]
fn a_request_that_its_qp_cannot_have_is_refused() {
    let bed = Bed::new();
    let cq = bed.cq();
    let mut sge = sge();
    let unconnected = bed.qp(&cq, ffi::IBV_QPT_UC, 4);
    let mut read = write(1, &mut sge);
    read.opcode = ffi::IBV_WR_RDMA_READ;
    assert_eq!(post(&unconnected, &mut read).0, libc::EINVAL);
    let mut unknown = write(1, &mut sge);
    unknown.opcode = 77;
    assert_eq!(post(&unconnected, &mut unknown).0, libc::EINVAL);
    let mut long = write(1, &mut sge);
    long.num_sge = 5;
    assert_eq!(post(&unconnected, &mut long).0, libc::EINVAL);
    let mut datagram = write(1, &mut sge);
    datagram.opcode = ffi::IBV_WR_SEND;
    assert_eq!(post(&bed.qp(&cq, ffi::IBV_QPT_UD, 4), &mut datagram).0, libc::EINVAL, "no address handle");
    let reset = bed.qp(&cq, ffi::IBV_QPT_RC, 4);
    reset.qp.area.header.state().store(ffi::IBV_QPS_INIT, Ordering::Relaxed);
    assert_eq!(post(&reset, &mut write(1, &mut sge)).0, libc::EINVAL);
}

#[test]
fn inline_payload_is_taken_when_it_is_posted() {
    let bed = Bed::new();
    let qp = bed.qp(&bed.cq(), ffi::IBV_QPT_RC, 4);
    let mut payload = *b"now, not later";
    let mut sge = ibv_sge { addr: payload.as_ptr() as u64, length: payload.len() as u32, lkey: 0 };
    let mut wr = write(1, &mut sge);
    wr.send_flags = ffi::IBV_SEND_INLINE;
    assert_eq!(post(&qp, &mut wr).0, 0);
    payload.fill(0);
    let mut read = SendWqe::default();
    assert_eq!(qp.qp.area.read_send(0, &mut read), Ok(true));
    assert_eq!(read.inline(), Some(b"now, not later".as_slice()));
    let mut long = ibv_sge { length: 65, ..sge };
    wr.sg_list = &raw mut long;
    assert_eq!(post(&qp, &mut wr).0, libc::EINVAL, "more than max_inline_data");
}

#[test]
fn a_receive_wakes_who_waits_for_it() {
    let bed = Bed::new();
    let qp = bed.qp(&bed.cq(), ffi::IBV_QPT_RC, 2);
    let mut sge = sge();
    let mut wr = ibv_recv_wr { wr_id: 5, next: ptr::null_mut(), sg_list: &raw mut sge, num_sge: 1 };
    let mut bad = ptr::null_mut();
    // SAFETY: a live QP and a list that ends in null.
    let mut post = || unsafe { recv(qp.c(), &raw mut wr, &raw mut bad) };
    assert_eq!(post(), 0);
    assert!(!qp.qp.bell.is_pending(), "nobody waits");
    qp.qp.area.header.rq_ring_me().store(1, Ordering::Relaxed);
    assert_eq!(post(), 0);
    assert!(qp.qp.bell.is_pending());
    assert_eq!(post(), libc::ENOMEM);
}

#[test]
fn what_is_posted_before_the_router_knows_the_state_is_taken() {
    let bed = Bed::new();
    let qp = bed.qp(&bed.cq(), ffi::IBV_QPT_RC, 2);
    let mut sge = sge();
    let mut receive = ibv_recv_wr { wr_id: 5, next: ptr::null_mut(), sg_list: &raw mut sge, num_sge: 1 };
    let mut states = |known: u32, begins: bool| {
        qp.qp.area.header.state().store(known, Ordering::Relaxed);
        qp.qp.begins.store(begins, Ordering::Relaxed);
        let (mut bad, list) = (ptr::null_mut(), &raw mut receive);
        // SAFETY: a live QP, a list of one.
        let received = unsafe { recv(qp.c(), list, &raw mut bad) } == 0;
        (received, post(&qp, &mut write(1, &mut self::sge())).0 == 0)
    };
    assert_eq!(states(ffi::IBV_QPS_RESET, false), (false, false));
    assert_eq!(states(ffi::IBV_QPS_RESET, true), (true, false), "receives, as in INIT");
    assert_eq!(states(ffi::IBV_QPS_RTS, true), (true, true));
}
