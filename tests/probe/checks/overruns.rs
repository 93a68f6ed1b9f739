//! A CQ that gets more completions than it has entries, and what holds events back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    cq::{Channel, Cq},
    pair::{End, Pair, QUIET, SOON, Setup},
    qp::{Qp, QpInit, Send},
    verbs::AsyncEvent,
};

/// One less than a power of two: what is asked for is what there is.
const ENTRIES: u32 = 7;

fn small(entries: u32) -> Setup {
    Setup { cqe: entries, ..Setup::new(IBV_QPT_RC) }
}

fn write(from: &End, to: &End) -> Send<'static> {
    Send::new(IBV_WR_RDMA_WRITE).sge(from.sge(0, 8)).remote(to.remote(0))
}

/// Fails unless these events come, in any order, and no other.
fn expect_events(end: &End, mut expected: Vec<AsyncEvent>) -> Result<()> {
    while !expected.is_empty() {
        let event = end.context.async_event(SOON)?.with_context(|| format!("{expected:?} did not come"))?;
        let at = expected.iter().position(|other| *other == event);
        expected.swap_remove(at.with_context(|| format!("{event:?} instead of {expected:?}"))?);
    }
    let event = end.context.async_event(QUIET)?;
    ensure!(event.is_none(), "one event too many: {event:?}");
    Ok(())
}

fn failure(cq: &Cq, qp: &Qp) -> Vec<AsyncEvent> {
    vec![
        AsyncEvent { kind: IBV_EVENT_CQ_ERR, element: cq.addr() },
        AsyncEvent { kind: IBV_EVENT_QP_FATAL, element: qp.addr() },
    ]
}

pub(crate) fn of_sends() -> Result<()> {
    let pair = Pair::new(&small(ENTRIES))?;
    let (a, b) = (&pair.a, &pair.b);
    for _ in 0..3 {
        (0..ENTRIES).try_for_each(|_| a.qp.send(&write(a, b)))?;
        a.send_cq.wait(ENTRIES as usize, SOON)?;
    }
    (0..ENTRIES).try_for_each(|_| a.qp.send(&write(a, b)))?;
    expect_events(a, Vec::new())?;
    a.qp.send(&write(a, b))?;
    expect_events(a, failure(&a.send_cq, &a.qp))?;
    ensure!(a.qp.state()? == IBV_QPS_ERR, "the QP goes on");
    let wcs = a.send_cq.wait(ENTRIES as usize, SOON)?;
    ensure!(wcs.iter().all(|wc| wc.status == IBV_WC_SUCCESS), "{wcs:?}");
    expect_events(b, Vec::new())
}

pub(crate) fn of_receives() -> Result<()> {
    let pair = Pair::new(&small(ENTRIES))?;
    let (a, b) = (&pair.a, &pair.b);
    (0..2 * ENTRIES).try_for_each(|id| b.qp.recv(id.into(), &[b.sge(64, 8)]))?;
    for _ in 0..ENTRIES {
        a.execute(&Send::new(IBV_WR_SEND).sge(a.sge(0, 8)))?;
    }
    expect_events(b, Vec::new())?;
    a.qp.send(&Send::new(IBV_WR_SEND).sge(a.sge(0, 8)))?;
    expect_events(b, failure(&b.recv_cq, &b.qp))?;
    ensure!(b.qp.state()? == IBV_QPS_ERR, "the QP goes on");
    let wcs = b.recv_cq.wait(ENTRIES as usize, SOON)?;
    ensure!(wcs.iter().all(|wc| wc.status == IBV_WC_SUCCESS), "{wcs:?}");
    Ok(())
}

/// All QPs of the CQ fail, and no other.
pub(crate) fn of_a_shared_queue() -> Result<()> {
    let hub = End::new(&small(ENTRIES))?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: Setup::new(IBV_QPT_RC).cap, sq_sig_all: false };
    let other = Qp::new(&hub.pd, &hub.send_cq, &hub.recv_cq, init)?;
    let elsewhere = Cq::new(&hub.context, 64, None)?;
    let bystander = Qp::new(&hub.pd, &elsewhere, &elsewhere, init)?;
    let peer = End::new(&Setup::new(IBV_QPT_RC))?;
    let (attr, mask) = hub.init_attr();
    other.modify(&attr, mask)?;
    bystander.modify(&attr, mask)?;
    hub.connect(peer.address()?)?;
    peer.connect(hub.address()?)?;
    for _ in 0..=ENTRIES {
        hub.qp.send(&write(&hub, &peer))?;
    }
    let mut expected = failure(&hub.send_cq, &hub.qp);
    expected.push(AsyncEvent { kind: IBV_EVENT_QP_FATAL, element: other.addr() });
    expect_events(&hub, expected)?;
    ensure!(other.state()? == IBV_QPS_ERR && bystander.state()? == IBV_QPS_INIT, "the wrong QPs failed");
    Ok(())
}

pub(crate) fn ignored() -> Result<()> {
    let hub = End::new(&Setup::new(IBV_QPT_RC))?;
    let peer = End::new(&Setup::new(IBV_QPT_RC))?;
    let cq = Cq::with_flags(&hub.context, 2, IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: Setup::new(IBV_QPT_RC).cap, sq_sig_all: false };
    let qp = Qp::new(&hub.pd, &cq, &cq, init)?;
    let own = crate::pair::Address { qpn: qp.number(), ..hub.address()? };
    for (attr, mask) in [hub.init_attr(), hub.rtr_attr(peer.address()?), hub.rts_attr()] {
        qp.modify(&attr, mask)?;
    }
    peer.connect(own)?;
    for _ in 0..40 {
        qp.send(&write(&hub, &peer))?;
    }
    let wcs = cq.wait(40, SOON)?;
    ensure!(wcs.iter().all(|wc| wc.status == IBV_WC_SUCCESS), "{wcs:?}");
    expect_events(&hub, Vec::new())?;
    let unknown = Cq::with_flags(&hub.context, 2, 1 << 20).err().map(|error| error.code);
    ensure!(unknown == Some(libc::EOPNOTSUPP), "an unknown flag: {unknown:?}");
    Cq::with_flags(&hub.context, 2, IBV_CREATE_CQ_ATTR_SINGLE_THREADED)?;
    Ok(())
}

/// Completions that go with a QP do not count for those that come after it.
pub(crate) fn emptied() -> Result<()> {
    const LEFT: u32 = 5;
    let pair = Pair::unconnected(&small(ENTRIES))?;
    let (a, b) = (&pair.a, &pair.b);
    for _ in 0..20 {
        a.connect(b.address()?)?;
        b.connect(a.address()?)?;
        b.qp.recv(0, &[b.sge(64, 8)])?;
        a.execute(&Send::new(IBV_WR_SEND).sge(a.sge(0, 8)))?;
        (0..LEFT).try_for_each(|_| a.qp.send(&write(a, b)))?;
        // The last one is done when what comes after it is.
        b.recv_cq.next()?.expect(IBV_WC_SUCCESS)?;
        a.qp.set_state(IBV_QPS_RESET)?;
        b.qp.set_state(IBV_QPS_RESET)?;
    }
    let init = QpInit { qp_type: IBV_QPT_RC, cap: Setup::new(IBV_QPT_RC).cap, sq_sig_all: false };
    for _ in 0..20 {
        let qp = Qp::new(&a.pd, &a.send_cq, &a.recv_cq, init)?;
        let (attr, mask) = a.init_attr();
        qp.modify(&attr, mask)?;
        (0..LEFT).try_for_each(|id| qp.recv(id.into(), &[a.sge(64, 8)]))?;
        qp.set_state(IBV_QPS_ERR)?;
    }
    a.connect(b.address()?)?;
    b.connect(a.address()?)?;
    (0..ENTRIES).try_for_each(|_| a.qp.send(&write(a, b)))?;
    let wcs = a.send_cq.wait(ENTRIES as usize, SOON)?;
    ensure!(wcs.iter().all(|wc| wc.status == IBV_WC_SUCCESS), "{wcs:?}");
    expect_events(a, Vec::new())
}

/// A CQ is resized while completions come, and is as large as it says.
pub(crate) fn resized() -> Result<()> {
    let pair = Pair::new(&small(ENTRIES))?;
    let (a, b) = (&pair.a, &pair.b);
    let mut filled = 0;
    for round in 0..200_usize {
        let entries = if round % 2 == 0 { 31 } else { ENTRIES };
        let resized = a.send_cq.resize(entries);
        if filled > entries as usize {
            let code = resized.err().map(|error| error.code);
            ensure!(code == Some(libc::EINVAL), "a CQ of {entries} with {filled} in it: {code:?}");
            a.send_cq.wait(filled, SOON)?;
            filled = 0;
            a.send_cq.resize(entries)?;
        } else if resized.is_err() {
            // One that completed just now may have been counted twice.
            std::thread::sleep(QUIET);
            a.send_cq.resize(entries)?;
        }
        let more = entries as usize - filled;
        (0..more).try_for_each(|_| a.qp.send(&write(a, b)))?;
        filled += more;
        // A part is taken, the rest waits.
        let taken = a.send_cq.wait(filled - filled.min(round % 11), SOON)?.len();
        filled -= taken;
    }
    expect_events(a, Vec::new())?;
    a.send_cq.wait(filled, SOON)?;
    a.send_cq.resize(15)?;
    (0..15).try_for_each(|_| a.qp.send(&write(a, b)))?;
    expect_events(a, Vec::new())?;
    a.qp.send(&write(a, b))?;
    expect_events(a, failure(&a.send_cq, &a.qp))
}

/// An event waits for its number of completions, or for its time.
pub(crate) fn moderated() -> Result<()> {
    const PERIOD: Duration = Duration::from_millis(60);
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let channel: &Channel = a.send_cq.channel()?;
    let caps = a.context.device_attr_ex()?.cq_mod_caps;
    ensure!(caps.max_cq_count >= 4 && u128::from(caps.max_cq_period) >= PERIOD.as_micros(), "{caps:?}");
    a.send_cq.moderate(4, PERIOD.as_micros() as u16)?;
    for _ in 0..20 {
        a.send_cq.arm(false)?;
        let begin = Instant::now();
        (0..3).try_for_each(|_| a.execute(&write(a, b)).map(drop))?;
        let early = channel.has_event(Duration::ZERO);
        ensure!(!early || begin.elapsed() >= PERIOD, "an event after three completions of four");
        a.execute(&write(a, b))?;
        ensure!(channel.has_event(SOON), "no event after four completions");
        channel.event()?;
    }
    for _ in 0..5 {
        let begin = Instant::now();
        a.send_cq.arm(false)?;
        a.execute(&write(a, b))?;
        ensure!(channel.has_event(SOON), "an event was held back for ever");
        channel.event()?;
        ensure!(begin.elapsed() >= PERIOD, "an event after {:?}", begin.elapsed());
    }
    // Nothing comes while the time goes by; what comes then is told at once.
    a.send_cq.arm(false)?;
    ensure!(!channel.has_event(2 * PERIOD), "an event without a completion");
    a.execute(&write(a, b))?;
    ensure!(channel.has_event(PERIOD / 2), "held back beyond the time");
    channel.event()?;
    a.send_cq.moderate(0, 0)?;
    a.send_cq.arm(false)?;
    a.execute(&write(a, b))?;
    ensure!(channel.has_event(PERIOD / 2), "moderation was not ended");
    channel.event()?;
    Ok(())
}
