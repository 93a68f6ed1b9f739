//! Processes that only keep objects alive, and one that keeps the router busy.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    cq::Cq,
    end_after,
    pair::{End, Pair, Setup},
    qp::{Qp, QpInit, Send},
};

/// How long a process sleeps at most.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(600);

/// Pairs of connected QPs on two opened devices.
pub(crate) fn hold(pairs: usize) -> Result<()> {
    let pairs = (0..pairs).map(|_| Pair::of(IBV_QPT_RC)).collect::<Result<Vec<_>>>()?;
    sleep(&pairs)
}

/// Many QPs of one opened device, each connected to its neighbour.
pub(crate) fn qps(count: usize) -> Result<()> {
    ensure!(count.is_multiple_of(2), "QPs come in pairs; {count} is odd");
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.cap =
        ibv_qp_cap { max_send_wr: 4, max_recv_wr: 4, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let base = End::new(&setup)?;
    let cq = Cq::new(&base.context, 1024, None)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: setup.cap, sq_sig_all: false };
    let qps = (0..count).map(|_| Ok(Qp::new(&base.pd, &cq, &cq, init)?)).collect::<Result<Vec<_>>>()?;
    for (at, qp) in qps.iter().enumerate() {
        let mut peer = base.address()?;
        peer.qpn = qps[at ^ 1].number();
        let steps = [base.init_attr(), base.rtr_attr(peer), base.rts_attr()];
        steps.iter().try_for_each(|(attr, mask)| qp.modify(attr, *mask))?;
    }
    sleep(&(base, qps))
}

/// What a flood writes at a time.
const FLOOD: usize = 65_536;
/// How often its queues are filled.
const REFILL: std::time::Duration = std::time::Duration::from_millis(100);

/// Many QPs, each connected to itself, whose send queues are kept full of long writes. The process itself sleeps
/// most of the time: what it costs others, it costs them in the router.
pub(crate) fn flood(count: usize) -> Result<()> {
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.buffer = 2 * FLOOD;
    setup.cap =
        ibv_qp_cap { max_send_wr: 256, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let base = End::new(&setup)?;
    let cq = Cq::new(&base.context, 1024, None)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: setup.cap, sq_sig_all: false };
    let qps = (0..count).map(|_| Ok(Qp::new(&base.pd, &cq, &cq, init)?)).collect::<Result<Vec<_>>>()?;
    for qp in &qps {
        let mut peer = base.address()?;
        peer.qpn = qp.number();
        let steps = [base.init_attr(), base.rtr_attr(peer), base.rts_attr()];
        steps.iter().try_for_each(|(attr, mask)| qp.modify(attr, *mask))?;
    }
    end_after(LIMIT);
    let work = Send::new(IBV_WR_RDMA_WRITE).sge(base.sge(0, FLOOD)).remote(base.remote(FLOOD));
    let mut is_ready = false;
    loop {
        while !cq.poll(256)?.is_empty() {}
        // Until each queue refuses one more.
        qps.iter().for_each(|qp| while qp.send(&work).is_ok() {});
        if !is_ready {
            println!("READY");
            stdout().flush()?;
            is_ready = true;
        }
        std::thread::sleep(REFILL);
    }
}

/// Says READY and sleeps until stdin is closed, or, where there is none, until it is killed.
fn sleep<T>(_alive: &T) -> Result<()> {
    end_after(LIMIT);
    println!("READY");
    stdout().flush()?;
    let mut byte = [0];
    if is_pipe() {
        while stdin().read(&mut byte)? > 0 {}
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}

fn is_pipe() -> bool {
    // SAFETY: an all-zero stat is a value, and fstat fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: descriptor 0 may be anything, the result is ours.
    unsafe { libc::fstat(0, &mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFIFO }
}
