//! The life of a QP.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    pair::{Pair, QKEY, QUIET, SOON, Setup},
    qp::Send,
};

pub(crate) fn transitions() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD] {
        walk(qp_type).with_context(|| format!("QP type {qp_type}"))?;
    }
    Ok(())
}

fn walk(qp_type: ibv_qp_type) -> Result<()> {
    let pair = Pair::unconnected(&Setup::new(qp_type))?;
    let qp = &pair.a.qp;
    let (init, rtr, rts) = (pair.a.init_attr(), pair.a.rtr_attr(pair.b.address()?), pair.a.rts_attr());
    let refused = |what: &str, (attr, mask): (ibv_qp_attr, u32), state: ibv_qp_state| {
        let code = qp.modify(&attr, mask).err().map(|error| error.code);
        ensure!(code == Some(libc::EINVAL), "{what}: {code:?} instead of EINVAL");
        ensure!(qp.state()? == state, "{what} was refused, yet the state is {}", qp.state()?);
        Ok(())
    };
    let sqd = (ibv_qp_attr { qp_state: IBV_QPS_SQD, ..ibv_qp_attr::default() }, IBV_QP_STATE);
    ensure!(qp.state()? == IBV_QPS_RESET, "a new QP is in {}", qp.state()?);
    refused("RESET to RTR", rtr, IBV_QPS_RESET)?;
    refused("RESET to RTS", rts, IBV_QPS_RESET)?;
    refused("RESET to SQD", sqd, IBV_QPS_RESET)?;
    refused("INIT without a port", (init.0, init.1 & !IBV_QP_PORT), IBV_QPS_RESET)?;
    refused("INIT with an attribute of RTS", (init.0, init.1 | IBV_QP_SQ_PSN), IBV_QPS_RESET)?;
    refused("INIT on port 2", (ibv_qp_attr { port_num: 2, ..init.0 }, init.1), IBV_QPS_RESET)?;
    qp.modify(&init.0, init.1)?;
    refused("INIT to RTS", rts, IBV_QPS_INIT)?;
    if qp_type != IBV_QPT_UD {
        refused("RTR without a destination", (rtr.0, rtr.1 & !IBV_QP_DEST_QPN), IBV_QPS_INIT)?;
        let mut bad = rtr;
        bad.0.ah_attr.grh.sgid_index = 200;
        refused("RTR by a GID index that is none", bad, IBV_QPS_INIT)?;
    }
    qp.modify(&rtr.0, rtr.1)?;
    refused("RTR to INIT", init, IBV_QPS_RTR)?;
    if qp_type == IBV_QPT_RC {
        refused("RTS without a timeout", (rts.0, rts.1 & !IBV_QP_TIMEOUT), IBV_QPS_RTR)?;
    }
    let wrong = ibv_qp_attr { cur_qp_state: IBV_QPS_RTS, ..rts.0 };
    refused("RTS from a state it is not in", (wrong, rts.1 | IBV_QP_CUR_STATE), IBV_QPS_RTR)?;
    qp.modify(&rts.0, rts.1)?;
    refused("RTS to RTR", rtr, IBV_QPS_RTS)?;
    refused("RTS to INIT", init, IBV_QPS_RTS)?;
    qp.set_state(IBV_QPS_ERR)?;
    refused("ERR to RTS", (rts.0, IBV_QP_STATE), IBV_QPS_ERR)?;
    qp.set_state(IBV_QPS_RESET)?;
    qp.modify(&init.0, init.1)?;
    ensure!(qp.state()? == IBV_QPS_INIT, "no way back to INIT");
    Ok(())
}

pub(crate) fn query() -> Result<()> {
    let setup = Setup { sq_sig_all: true, rnr_retry: 3, ..Setup::new(IBV_QPT_RC) };
    let pair = Pair::new(&setup)?;
    let (attr, init) = pair.a.qp.query()?;
    let peer = pair.b.address()?;
    ensure!(attr.qp_state == IBV_QPS_RTS && attr.cur_qp_state == IBV_QPS_RTS, "state {}", attr.qp_state);
    ensure!(attr.path_mtu == IBV_MTU_1024, "path_mtu {}", attr.path_mtu);
    ensure!((attr.rq_psn, attr.sq_psn) == (77, 77), "PSNs {} {}", attr.rq_psn, attr.sq_psn);
    ensure!(attr.dest_qp_num == peer.qpn, "dest_qp_num {}", attr.dest_qp_num);
    ensure!(attr.qp_access_flags == setup.access, "qp_access_flags {:#x}", attr.qp_access_flags);
    ensure!((attr.port_num, attr.pkey_index) == (1, 0), "port {}", attr.port_num);
    ensure!((attr.timeout, attr.retry_cnt, attr.rnr_retry) == (14, 7, 3), "timeout {}", attr.timeout);
    ensure!((attr.max_rd_atomic, attr.max_dest_rd_atomic) == (4, 4), "rd_atomic {}", attr.max_rd_atomic);
    ensure!(attr.min_rnr_timer == setup.min_rnr_timer, "min_rnr_timer {}", attr.min_rnr_timer);
    // SAFETY: any bytes are a raw GID.
    let gid = unsafe { attr.ah_attr.grh.dgid.raw };
    ensure!(gid == peer.gid && attr.ah_attr.is_global == 1, "dgid {gid:x?}");
    ensure!(attr.ah_attr.grh.hop_limit == 64 && attr.ah_attr.grh.sgid_index == 0, "the GRH is another");
    ensure!(attr.ah_attr.port_num == 1, "ah_attr.port_num {}", attr.ah_attr.port_num);
    for cap in [attr.cap, init.cap] {
        let got = [cap.max_send_wr, cap.max_recv_wr, cap.max_send_sge, cap.max_recv_sge, cap.max_inline_data];
        let asked = setup.cap;
        let asked = [
            asked.max_send_wr,
            asked.max_recv_wr,
            asked.max_send_sge,
            asked.max_recv_sge,
            asked.max_inline_data,
        ];
        ensure!(got.iter().zip(asked).all(|(&got, asked)| got >= asked), "capacities {got:?}");
    }
    ensure!(init.qp_type == IBV_QPT_RC && init.sq_sig_all != 0, "qp_init_attr is another");
    ensure!(init.send_cq as usize == pair.a.send_cq.addr(), "send_cq is another");
    ensure!(init.recv_cq as usize == pair.a.recv_cq.addr(), "recv_cq is another");
    let (attr, _) = Pair::of(IBV_QPT_UD)?.a.qp.query()?;
    ensure!(attr.qkey == QKEY, "qkey {:#x}", attr.qkey);
    Ok(())
}

pub(crate) fn reset() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let write = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 64)).remote(b.remote(0));
    for round in 0..50 {
        (0..5).try_for_each(|id| a.qp.recv(id, &[a.sge(0, 8)]))?;
        for _ in 0..round {
            a.execute(&write)?;
        }
        // Completions that nobody takes are gone with the QP's contents.
        a.qp.send_list(&[write.clone(), write.clone()])?;
        for end in [a, b] {
            end.qp.set_state(IBV_QPS_RESET)?;
        }
        a.send_cq.stays_empty(Duration::from_millis(1))?;
        ensure!(a.qp.refusal(&write)? == libc::EINVAL, "RESET takes sends");
        a.connect(b.address()?)?;
        b.connect(a.address()?)?;
        b.qp.recv(round, &[b.sge(0, 8)])?;
        a.execute(&Send::new(IBV_WR_SEND).sge(a.sge(0, 8)))?;
        ensure!(b.received()?.wr_id == round, "a receive of an earlier life was consumed");
        a.recv_cq.stays_empty(Duration::from_millis(1))?;
    }
    Ok(())
}

pub(crate) fn flush() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let flushed = |cq: &crate::cq::Cq, ids: &[u64]| {
        for &id in ids {
            let wc = cq.next()?;
            wc.expect(IBV_WC_WR_FLUSH_ERR)?;
            ensure!(wc.wr_id == id && wc.qp_num == a.qp.number(), "{wc:?} instead of WR {id}");
        }
        Ok(())
    };
    (0..10).try_for_each(|id| a.qp.recv(id, &[a.sge(0, 8)]))?;
    // Nobody receives them at the peer: they wait.
    for id in 0..5 {
        a.qp.send(&Send::new(IBV_WR_SEND).id(id).flags(0).sge(a.sge(0, 8)))?;
    }
    a.send_cq.stays_empty(QUIET)?;
    a.qp.set_state(IBV_QPS_ERR)?;
    flushed(&a.send_cq, &[0, 1, 2, 3, 4])?;
    flushed(&a.recv_cq, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9])?;
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).id(7).sge(a.sge(0, 8)).remote(b.remote(0)))?;
    a.qp.recv(77, &[a.sge(0, 8)])?;
    flushed(&a.send_cq, &[7])?;
    flushed(&a.recv_cq, &[77])?;
    ensure!(b.qp.state()? == IBV_QPS_RTS, "the peer's QP does not stay as it is");
    Ok(())
}

pub(crate) fn drained() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let attr = ibv_qp_attr { qp_state: IBV_QPS_SQD, en_sqd_async_notify: 1, ..ibv_qp_attr::default() };
    a.qp.modify(&attr, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY)?;
    let event = a.context.async_event(SOON)?.context("no event when the SQ was drained")?;
    ensure!(event.kind == IBV_EVENT_SQ_DRAINED && event.element == a.qp.addr(), "{event:?}");
    let write = Send::new(IBV_WR_RDMA_WRITE).id(3).sge(a.sge(0, 64)).remote(b.remote(0));
    a.qp.send(&write)?;
    a.send_cq.stays_empty(QUIET)?;
    a.qp.set_state(IBV_QPS_RTS)?;
    let wc = a.send_cq.next()?;
    wc.expect(IBV_WC_SUCCESS)?;
    a.execute(&write)?;
    Ok(())
}

pub(crate) fn drained_late() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    // Nobody receives it: it was begun and waits. What is posted behind it was not begun.
    a.qp.send(&Send::new(IBV_WR_SEND).id(1).sge(a.sge(0, 8)))?;
    a.send_cq.stays_empty(QUIET)?;
    a.qp.send(&Send::new(IBV_WR_SEND).id(2).sge(a.sge(0, 8)))?;
    let attr = ibv_qp_attr { qp_state: IBV_QPS_SQD, en_sqd_async_notify: 1, ..ibv_qp_attr::default() };
    a.qp.modify(&attr, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY)?;
    ensure!(a.context.async_event(QUIET)?.is_none(), "drained while a message waits");
    ensure!(a.qp.query()?.0.sq_draining == 1, "query_qp does not say that it drains");
    b.qp.recv(1, &[b.sge(0, 8)])?;
    b.qp.recv(2, &[b.sge(0, 8)])?;
    let event = a.context.async_event(SOON)?.context("no event when the SQ was drained")?;
    ensure!(event.kind == IBV_EVENT_SQ_DRAINED && event.element == a.qp.addr(), "{event:?}");
    let wc = a.send_cq.next()?;
    wc.expect(IBV_WC_SUCCESS)?;
    ensure!(wc.wr_id == 1 && a.qp.query()?.0.sq_draining == 0, "{wc:?}");
    a.send_cq.stays_empty(QUIET)?;
    a.qp.set_state(IBV_QPS_RTS)?;
    let wc = a.send_cq.next()?;
    wc.expect(IBV_WC_SUCCESS)?;
    ensure!(wc.wr_id == 2, "{wc:?}");
    Ok(())
}

pub(crate) fn established() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC] {
        let pair = Pair::unconnected(&Setup::new(qp_type))?;
        let (a, b) = (&pair.a, &pair.b);
        b.to_init()?;
        b.to_rtr(a.address()?)?;
        a.connect(b.address()?)?;
        ensure!(b.context.async_event(QUIET)?.is_none(), "an event without a request");
        let write = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0));
        a.execute(&write)?;
        let event = b.context.async_event(SOON)?.context("no event of the first request")?;
        ensure!(event.kind == IBV_EVENT_COMM_EST && event.element == b.qp.addr(), "{event:?}");
        (0..100).try_for_each(|_| a.execute(&write).map(drop))?;
        ensure!(b.context.async_event(QUIET)?.is_none(), "it came twice");
        ensure!(b.qp.state()? == IBV_QPS_RTR, "the QP is in {}", b.qp.state()?);
    }
    Ok(())
}

pub(crate) fn early_requests() -> Result<()> {
    let pair = Pair::unconnected(&Setup::new(IBV_QPT_RC))?;
    let (a, b) = (&pair.a, &pair.b);
    a.connect(b.address()?)?;
    b.to_init()?;
    b.qp.recv(9, &[b.sge(4096, 64)])?;
    a.buffer.write(0, b"too early");
    a.qp.send_list(&[
        Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 9)).remote(b.remote(0)),
        Send::new(IBV_WR_SEND).sge(a.sge(0, 9)),
    ])?;
    a.send_cq.stays_empty(QUIET)?;
    thread::sleep(Duration::from_millis(20));
    b.to_rtr(a.address()?)?;
    for wc in a.send_cq.wait(2, SOON)? {
        wc.expect(IBV_WC_SUCCESS)?;
    }
    ensure!(b.received()?.wr_id == 9, "another receive");
    ensure!(b.buffer.read(0, 9) == b"too early" && b.buffer.read(4096, 9) == b"too early", "other data");
    Ok(())
}
