//! The router dies under traffic: what a program sees then.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use verbs_abi::ffi::*;

use crate::{
    cm::{Channel, Id, errno, kind},
    cq::status_name,
    pair::{End, Pair, SOON},
    qp::Send,
    verbs::Context,
};

/// From the router's death until everybody knows.
const NOTICE: Duration = Duration::from_secs(3);
/// How long to wait for that death at most.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs traffic, says READY, and expects the router to be killed.
pub(crate) fn survive() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    // Receives that nobody will fill, waited for by a thread that sleeps in ibv_get_cq_event.
    let idle = Pair::of(IBV_QPT_RC)?;
    (0..10).try_for_each(|id| idle.a.qp.recv(id, &[idle.a.sge(0, 8)]))?;
    // Sends of which nobody will take the last. Those that were taken in silence do not come back flushed.
    (0..7).try_for_each(|id| idle.b.qp.recv(id, &[idle.b.sge(0, 8)]))?;
    for id in 0..12 {
        let flags = if id == 0 || id == 4 { IBV_SEND_SIGNALED } else { 0 };
        idle.a.qp.send(&Send::new(IBV_WR_SEND).id(id).flags(flags).sge(idle.a.sge(0, 8)))?;
    }
    idle.b.recv_cq.wait(7, SOON)?;
    idle.a.recv_cq.arm(false)?;
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| wake_up(&idle.a));
        println!("READY");
        std::io::stdout().flush()?;
        let (posted, mut ended) = run_until_it_ends(&pair.a, &pair.b)?;
        let event = pair.a.context.async_event(NOTICE)?.context("no event told of the router's death")?;
        ensure!(event.kind == IBV_EVENT_DEVICE_FATAL, "{event:?}");
        while ended < posted {
            pair.a.send_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)?;
            ended += 1;
        }
        sleeper.join().unwrap_or_else(|_| Err(anyhow!("the sleeping thread panicked")))
    })?;
    flushed_sends(&idle.a)?;
    for end in [&idle.a, &idle.b, &pair.b] {
        let event = end.context.async_event(NOTICE)?.context("a context heard of nothing")?;
        ensure!(event.kind == IBV_EVENT_DEVICE_FATAL, "{event:?}");
    }
    use_after_death(pair, idle)
}

/// Keeps the queue full until a work request does not succeed: how many were posted, how many ended.
fn run_until_it_ends(a: &End, b: &End) -> Result<(u64, u64)> {
    let start = Instant::now();
    let (mut posted, mut ended) = (0, 0);
    loop {
        ensure!(start.elapsed() < PATIENCE, "the router lives on");
        while posted - ended < 32 {
            let work = Send::new(IBV_WR_RDMA_WRITE).id(posted).sge(a.sge(0, 4096)).remote(b.remote(0));
            a.qp.send(&work)?;
            posted += 1;
        }
        let mut failed = false;
        for wc in a.send_cq.poll(16)? {
            ensure!(wc.wr_id == ended, "WR {} ended instead of {ended}", wc.wr_id);
            ensure!(!failed || wc.status != IBV_WC_SUCCESS, "WR {} succeeded after a failure", wc.wr_id);
            ended += 1;
            if wc.status != IBV_WC_SUCCESS {
                ensure!(wc.status == IBV_WC_WR_FLUSH_ERR, "it ended with {}", status_name(wc.status));
                failed = true;
            }
        }
        if failed {
            return Ok((posted, ended));
        }
    }
}

/// Sleeps as a program does that only waits for events.
fn wake_up(end: &End) -> Result<()> {
    let channel = end.recv_cq.channel()?;
    ensure!(channel.has_event(PATIENCE), "the sleeping thread was not woken");
    channel.event()?;
    for (id, wc) in end.recv_cq.wait(10, NOTICE)?.iter().enumerate() {
        wc.expect(IBV_WC_WR_FLUSH_ERR)?;
        ensure!(wc.wr_id == id as u64, "{wc:?}");
    }
    Ok(())
}

/// Seven sends were taken by the peer, of which two were signaled; the others were waiting.
fn flushed_sends(end: &End) -> Result<()> {
    let all = end.send_cq.wait(2 + 5, NOTICE)?;
    let of = |status| all.iter().filter(|wc| wc.status == status).map(|wc| wc.wr_id).collect::<Vec<_>>();
    ensure!(of(IBV_WC_SUCCESS) == [0, 4], "{all:?}");
    ensure!(of(IBV_WC_WR_FLUSH_ERR) == [7, 8, 9, 10, 11], "{all:?}");
    Ok(())
}

/// Nothing that a program does now hangs.
fn use_after_death(pair: Pair, idle: Pair) -> Result<()> {
    let start = Instant::now();
    let late = Send::new(IBV_WR_RDMA_WRITE).id(99).sge(pair.a.sge(0, 8)).remote(pair.b.remote(0));
    if pair.a.qp.send_list(std::slice::from_ref(&late)).is_ok() {
        pair.a.send_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)?;
    }
    ensure!(pair.a.qp.set_state(IBV_QPS_ERR).is_err() || pair.a.qp.state().is_ok(), "modify_qp");
    ensure!(Context::open().is_err(), "a device was opened without a router");
    let context = Arc::clone(&pair.a.context);
    drop((pair, idle));
    drop(context);
    ensure!(start.elapsed() < 2 * NOTICE, "destroying everything took {:?}", start.elapsed());
    Ok(())
}

/// A thread sleeps in `rdma_get_cm_event` when the router dies: each id that is bound to the device hears that it was
/// removed, no other does, and all of them can be ended as always.
pub(crate) fn survive_by_name() -> Result<()> {
    let (channel, other) = (Channel::new()?, Channel::new()?);
    let (unbound, listener) = (Id::new(&channel)?, Id::new(&channel)?);
    listener.bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    listener.listen(1)?;
    let resolved = Id::new(&channel)?;
    resolved.resolve(SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.port()?))?;
    channel.expect(kind::ADDR_RESOLVED)?;
    println!("READY");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let first = channel.unacknowledged()?;
    ensure!(start.elapsed() < PATIENCE, "the sleeping thread heard of the router's death late");
    ensure!(first.kind == kind::DEVICE_REMOVAL && first.is_of(&listener), "event {}", first.kind);
    let second = channel.expect(kind::DEVICE_REMOVAL)?;
    ensure!(second.is_of(&resolved), "the wrong id hears of the removal");
    for channel in [&channel, &other] {
        ensure!(channel.is_readable(NOTICE), "nothing wakes who waits for more");
        let more = channel.event().map(|_| ());
        ensure!(errno(&more) == Some(libc::EIO), "more is heard: {more:?}");
    }
    ensure!(errno(&unbound.listen(1)) == Some(libc::EIO), "a dead router listens");
    // An id waits for its events to be acknowledged, also now.
    let ended = thread::scope(|scope| {
        let end = scope.spawn(|| listener.destroy());
        thread::sleep(Duration::from_millis(100));
        let waits = !end.is_finished();
        first.acknowledge()?;
        end.join().unwrap_or_else(|_| Err(anyhow!("it panicked")))?;
        ensure!(waits, "an id went before its event was acknowledged");
        anyhow::Ok(())
    });
    ended?;
    resolved.destroy()?;
    unbound.destroy()
}
