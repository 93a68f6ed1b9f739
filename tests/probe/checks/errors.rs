//! What goes wrong between two QPs, and what each end learns of it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::{ffi::*, timer};

use crate::{
    pair::{Pair, QUIET, SOON, Setup},
    qp::Send,
    verbs::{ALL_ACCESS, Mr},
};

pub(crate) fn remote_access() -> Result<()> {
    for opcode in [IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD] {
        let pair = Pair::of(IBV_QPT_RC)?;
        let (a, b) = (&pair.a, &pair.b);
        b.qp.recv(3, &[b.sge(0, 8)])?;
        let (address, rkey) = b.remote(0);
        let work = Send::new(opcode).id(1).sge(a.sge(0, 8)).remote((address, rkey ^ 1));
        let after = Send::new(IBV_WR_RDMA_WRITE).id(2).sge(a.sge(0, 8)).remote(b.remote(0));
        a.qp.send_list(&[work, after])?;
        let ended = a.send_cq.wait(2, SOON)?;
        ended[0].expect(IBV_WC_REM_ACCESS_ERR)?;
        ended[1].expect(IBV_WC_WR_FLUSH_ERR)?;
        ensure!((ended[0].wr_id, ended[1].wr_id) == (1, 2), "{ended:?}");
        let event = b.context.async_event(SOON)?.context("the responder hears of nothing")?;
        ensure!(event.kind == IBV_EVENT_QP_ACCESS_ERR && event.element == b.qp.addr(), "{event:?}");
        b.recv_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)?;
        let states = (a.qp.state()?, b.qp.state()?);
        ensure!(states == (IBV_QPS_ERR, IBV_QPS_ERR), "states {states:?}");
        ensure!(a.context.async_event(QUIET)?.is_none(), "the requester got an event besides its completion");
    }
    Ok(())
}

pub(crate) fn missing_rights() -> Result<()> {
    let operations = [
        (IBV_WR_RDMA_WRITE, IBV_ACCESS_REMOTE_WRITE),
        (IBV_WR_RDMA_READ, IBV_ACCESS_REMOTE_READ),
        (IBV_WR_ATOMIC_CMP_AND_SWP, IBV_ACCESS_REMOTE_ATOMIC),
    ];
    for (opcode, right) in operations {
        // The QP has all rights, the MR lacks this one; then the other way round.
        for qp_lacks in [false, true] {
            let mut setup = Setup::new(IBV_QPT_RC);
            if qp_lacks {
                setup.access &= !right;
            }
            let pair = Pair::new(&setup)?;
            let (a, b) = (&pair.a, &pair.b);
            let access = if qp_lacks { ALL_ACCESS } else { ALL_ACCESS & !right };
            let mr = Mr::new(&b.pd, b.buffer.addr(), b.buffer.len(), access)?;
            let work = Send::new(opcode).sge(a.sge(0, 8)).remote((b.buffer.addr() as u64, mr.rkey()));
            a.qp.send(&work)?;
            // What the QP does not allow is an invalid request, whatever the key says.
            let (status, event) = if qp_lacks {
                (IBV_WC_REM_INV_REQ_ERR, IBV_EVENT_QP_REQ_ERR)
            } else {
                (IBV_WC_REM_ACCESS_ERR, IBV_EVENT_QP_ACCESS_ERR)
            };
            a.send_cq.next()?.expect(status).with_context(|| format!("opcode {opcode}"))?;
            let raised = b.context.async_event(SOON)?.context("the responder hears of nothing")?;
            ensure!(raised.kind == event && raised.element == b.qp.addr(), "{raised:?}");
        }
    }
    Ok(())
}

pub(crate) fn local_protection() -> Result<()> {
    // A key that is none, the end of the MR passed, and a READ into memory that may not be written.
    for case in 0..3 {
        let pair = Pair::of(IBV_QPT_RC)?;
        let (a, b) = (&pair.a, &pair.b);
        let readable = Mr::new(&a.pd, a.buffer.addr(), a.buffer.len(), IBV_ACCESS_REMOTE_READ)?;
        let mut sge = a.sge(0, 8);
        let mut opcode = IBV_WR_RDMA_WRITE;
        match case {
            0 => sge.lkey ^= 0x10,
            1 => sge = a.sge(a.buffer.len() - 4, 8),
            _ => (sge.lkey, opcode) = (readable.lkey(), IBV_WR_RDMA_READ),
        }
        a.qp.send(&Send::new(opcode).sge(sge).remote(b.remote(0)))?;
        a.send_cq.next()?.expect(IBV_WC_LOC_PROT_ERR).with_context(|| format!("case {case}"))?;
        ensure!(b.qp.state()? == IBV_QPS_RTS, "case {case}: the peer learned of it");
    }
    Ok(())
}

pub(crate) fn too_long() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    b.qp.recv(1, &[b.sge(0, 99)])?;
    b.buffer.fill(0, 200, 0x33);
    a.qp.send(&Send::new(IBV_WR_SEND).sge(a.sge(0, 100)))?;
    a.send_cq.next()?.expect(IBV_WC_REM_INV_REQ_ERR)?;
    b.recv_cq.next()?.expect(IBV_WC_LOC_LEN_ERR)?;
    ensure!(b.buffer.read(99, 1) == [0x33], "a byte behind the receive was written");
    Ok(())
}

pub(crate) fn late_receive() -> Result<()> {
    let setup = Setup { min_rnr_timer: 14, ..Setup::new(IBV_QPT_RC) };
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    for round in 0..20 {
        a.buffer.word(0).store(round, std::sync::atomic::Ordering::SeqCst);
        let kinds = [IBV_WR_SEND, IBV_WR_RDMA_WRITE_WITH_IMM];
        let work = Send::new(kinds[round as usize % 2]).sge(a.sge(0, 8)).remote(b.remote(64));
        a.qp.send(&work)?;
        a.send_cq.stays_empty(Duration::from_millis(round))?;
        b.qp.recv(round, &[b.sge(64, 8)])?;
        a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
        ensure!(b.received()?.wr_id == round, "another receive");
        let word = b.buffer.word(64).load(std::sync::atomic::Ordering::SeqCst);
        ensure!(word == round, "{word} arrived instead of {round}");
    }
    Ok(())
}

pub(crate) fn rnr_exceeded() -> Result<()> {
    // Code 14 is 1.28 ms; the first try and two more are at least two waits long.
    let setup = Setup { min_rnr_timer: 14, rnr_retry: 2, ..Setup::new(IBV_QPT_RC) };
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let start = Instant::now();
    a.qp.send(&Send::new(IBV_WR_SEND).sge(a.sge(0, 8)))?;
    a.send_cq.next()?.expect(IBV_WC_RNR_RETRY_EXC_ERR)?;
    let least = 2 * timer::rnr_timer(14);
    ensure!(start.elapsed() >= least, "given up after {:?} already, not {least:?}", start.elapsed());
    ensure!(b.qp.state()? == IBV_QPS_RTS, "the responder does not stay as it is");
    Ok(())
}

pub(crate) fn silent_peer() -> Result<()> {
    // Code 13 is 33.5 ms; three tries of it are 100 ms.
    let setup = Setup { timeout: 13, retry_cnt: 2, ..Setup::new(IBV_QPT_RC) };
    let pair = Pair::new(&setup)?;
    let (a, b) = (pair.a, pair.b);
    a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0)))?;
    let remote = b.remote(0);
    drop(b);
    thread::sleep(QUIET);
    ensure!(a.qp.state()? == IBV_QPS_RTS, "the survivor's QP does not stay as it is");
    ensure!(a.context.async_event(Duration::ZERO)?.is_none(), "an event of a peer's end");
    let timeout = timer::ack_timeout(13).unwrap_or_default();
    let start = Instant::now();
    a.qp.send_list(&[
        Send::new(IBV_WR_RDMA_WRITE).id(1).flags(0).sge(a.sge(0, 8)).remote(remote),
        Send::new(IBV_WR_SEND).id(2).sge(a.sge(0, 8)),
    ])?;
    a.send_cq.stays_empty(2 * timeout)?;
    ensure!(a.qp.state()? == IBV_QPS_RTS, "the survivor's QP gives up before its retries are used up");
    let ended = a.send_cq.wait(2, SOON)?;
    let took = start.elapsed();
    ended[0].expect(IBV_WC_RETRY_EXC_ERR)?;
    ended[1].expect(IBV_WC_WR_FLUSH_ERR)?;
    ensure!(
        took >= 3 * timeout && took < 20 * timeout,
        "it took {took:?}, three timeouts are {:?}",
        3 * timeout
    );
    ensure!(a.qp.state()? == IBV_QPS_ERR, "the QP is in {}", a.qp.state()?);
    Ok(())
}
