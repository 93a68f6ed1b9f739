//! QPs that may send so fast and no faster.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    pair::{End, Pair, SOON, Setup, ah_attr},
    qp::Send,
    verbs::Ah,
};

/// 80 Mbit/s: 10 bytes a microsecond.
const RATE: u32 = 80_000;

/// How long writes of this many bytes altogether take.
fn time(from: &End, to: &End, len: usize, count: usize) -> Result<Duration> {
    let begin = Instant::now();
    for _ in 0..count {
        from.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(from.sge(0, len)).remote(to.remote(0)))?;
    }
    for wc in from.send_cq.wait(count, SOON)? {
        wc.expect(IBV_WC_SUCCESS)?;
    }
    Ok(begin.elapsed())
}

/// What this many bytes take at [`RATE`], less a burst.
fn least(bytes: usize) -> Duration {
    Duration::from_micros((bytes.saturating_sub(96 * 1024) / 10) as u64)
}

fn keeps(what: &str, took: Duration, bytes: usize) -> Result<()> {
    let (least, most) = (least(bytes), 3 * least(bytes) + Duration::from_millis(300));
    ensure!(
        took >= least && took < most,
        "{what} took {took:?} for {bytes} bytes: not {least:?} to {most:?}"
    );
    Ok(())
}

pub(crate) fn kept() -> Result<()> {
    const LEN: usize = 1 << 20;
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let caps = a.context.device_attr_ex()?.packet_pacing_caps;
    ensure!(caps.qp_rate_limit_max >= RATE && caps.qp_rate_limit_min <= RATE, "{caps:?}");
    for kind in [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, IBV_QPT_XRC_SEND] {
        ensure!(caps.supported_qpts >> kind & 1 == 1, "{caps:?} lacks type {kind}");
    }
    let unlimited = time(a, b, LEN, 1)?;
    ensure!(unlimited < least(LEN), "1 MiB without a limit took {unlimited:?}");
    a.qp.limit_rate(RATE, 0)?;
    a.buffer.write(LEN - 8, b"the last");
    keeps("one message", time(a, b, LEN, 1)?, LEN)?;
    ensure!(b.buffer.read(LEN - 8, 8) == b"the last", "the message is not whole");
    keeps("many messages", time(a, b, 16 << 10, 48)?, 48 * (16 << 10))?;
    // The other way nothing is limited.
    let back = time(b, a, LEN, 1)?;
    ensure!(back < least(LEN), "the peer is limited, too: {back:?}");
    // A burst of its own, and another rate, in the middle of work.
    a.qp.limit_rate(RATE, 4096)?;
    keeps("small bursts", time(a, b, LEN / 2, 1)?, LEN / 2)?;
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, LEN)).remote(b.remote(0)))?;
    a.qp.limit_rate(0, 0)?;
    let begin = Instant::now();
    a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
    ensure!(begin.elapsed() < least(LEN), "the limit outlived its end by {:?}", begin.elapsed());
    for round in 0..3 {
        let free = time(a, b, LEN, 1)?;
        ensure!(free < least(LEN), "1 MiB after the limit took {free:?} in round {round}");
    }
    let beyond = a.qp.limit_rate(caps.qp_rate_limit_max + 1, 0).err().map(|error| error.code);
    ensure!(beyond == Some(libc::EINVAL), "a rate beyond the highest: {beyond:?}");
    Ok(())
}

/// By an attribute of `ibv_modify_qp` on the way to RTS, on each service.
pub(crate) fn by_attribute() -> Result<()> {
    const LEN: usize = 512 << 10;
    for kind in [IBV_QPT_RC, IBV_QPT_UC] {
        let pair = Pair::unconnected(&Setup::new(kind))?;
        let (a, b) = (&pair.a, &pair.b);
        b.connect(a.address()?)?;
        a.to_init()?;
        let refused = a.qp.limit_rate(RATE, 0).err().map(|error| error.code);
        ensure!(refused == Some(libc::EINVAL), "a rate in INIT: {refused:?}");
        a.to_rtr(b.address()?)?;
        let (attr, mask) = a.rts_attr();
        a.qp.modify(&ibv_qp_attr { rate_limit: RATE, ..attr }, mask | IBV_QP_RATE_LIMIT)?;
        keeps("a QP limited from the start", time(a, b, LEN, 1)?, LEN)?;
        // RESET ends it.
        a.qp.set_state(IBV_QPS_RESET)?;
        b.qp.set_state(IBV_QPS_RESET)?;
        a.connect(b.address()?)?;
        b.connect(a.address()?)?;
        let free = time(a, b, LEN, 1)?;
        ensure!(free < least(LEN), "the limit outlived RESET: {free:?}");
    }
    Ok(())
}

pub(crate) fn of_datagrams() -> Result<()> {
    const LEN: usize = 4000;
    const COUNT: usize = 60;
    let mut setup = Setup::new(IBV_QPT_UD);
    setup.cap.max_recv_wr = 64;
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let ah = Ah::new(&a.pd, &ah_attr(b.address()?.gid, 0))?;
    (0..COUNT as u64).try_for_each(|id| b.qp.recv(id, &[b.sge(0, LEN + 40)]))?;
    a.qp.limit_rate(RATE / 2, 8192)?;
    let begin = Instant::now();
    for id in 0..COUNT as u64 {
        let mut work = Send::new(IBV_WR_SEND).id(id).sge(a.sge(0, LEN));
        work.to = Some((&ah, b.qp.number(), crate::pair::QKEY));
        a.qp.send(&work)?;
    }
    a.send_cq.wait(COUNT, SOON)?;
    let took = begin.elapsed();
    // 5 bytes a microsecond.
    let least = Duration::from_micros(((COUNT * LEN - 16_384) / 5) as u64);
    ensure!(took >= least, "{COUNT} datagrams took {took:?}, less than {least:?}");
    b.recv_cq.wait(COUNT, SOON)?;
    Ok(())
}
