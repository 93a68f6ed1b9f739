//! What must not happen although two threads, or a program and the device, are at it at the same time.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, bail, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::Buffer,
    pair::{End, Pair, SOON, Setup},
    qp::Send,
    verbs::{ALL_ACCESS, Mr},
};

const PAGE: usize = 4096;

/// A setup whose requests into the void end soon.
fn impatient() -> Setup {
    Setup { timeout: 8, retry_cnt: 1, ..Setup::new(IBV_QPT_RC) }
}

/// Posts copies of a request without a pause until one fails, then takes the rest; how many succeeded.
fn hammer(end: &End, work: &Send<'_>, started: &AtomicBool) -> Result<u64> {
    let (mut under_way, mut succeeded, mut failed) = (0, 0, false);
    loop {
        while !failed && under_way < 8 {
            end.qp.send(work)?;
            under_way += 1;
        }
        for wc in end.send_cq.poll(8)? {
            under_way -= 1;
            failed |= wc.status != IBV_WC_SUCCESS;
            succeeded += u64::from(wc.status == IBV_WC_SUCCESS);
        }
        started.store(succeeded > 0, Ordering::Release);
        if failed && under_way == 0 {
            return Ok(succeeded);
        }
    }
}

fn wait_until(started: &AtomicBool) -> Result<()> {
    for _ in 0..SOON.as_millis() {
        if started.load(Ordering::Acquire) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("nothing succeeded at all")
}

/// Runs the device's side in a thread, and once it is at work `stop`; then looks that nothing more is written.
fn after_the_end(
    a: &End,
    work: &Send<'_>,
    target: &Buffer,
    at: usize,
    len: usize,
    stop: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let started = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| hammer(a, work, &started));
        wait_until(&started)?;
        stop()?;
        // From here on the memory is the program's alone.
        target.fill(at, len, 0x3c);
        thread::sleep(Duration::from_millis(3));
        let touched = target.read(at, len).iter().filter(|&&byte| byte != 0x3c).count();
        let ended = traffic.join().unwrap_or_else(|_| Err(anyhow!("the traffic panicked")))?;
        let later = target.read(at, len).iter().filter(|&&byte| byte != 0x3c).count();
        ensure!(
            touched + later == 0,
            "{touched}, then {later} bytes were written too late, after {ended} requests"
        );
        Ok(())
    })
}

pub(crate) fn deregistration_under_fire() -> Result<()> {
    for round in 0..40 {
        let pair = Pair::new(&impatient())?;
        let (a, b) = (&pair.a, &pair.b);
        let len = [64, 3 * PAGE, 60 * PAGE][round % 3];
        let target = Buffer::new(64 * PAGE)?;
        // Whole pages, or a piece of one.
        let at = if len < PAGE { 100 } else { 0 };
        let mr = Mr::new(&b.pd, target.addr() + at, len, ALL_ACCESS)?;
        let remote = ((target.addr() + at) as u64, mr.rkey());
        let work = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, len)).remote(remote);
        after_the_end(a, &work, &target, at, len, || {
            drop(mr);
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn error_state_under_fire() -> Result<()> {
    for round in 0..40 {
        let pair = Pair::new(&impatient())?;
        let (a, b) = (&pair.a, &pair.b);
        let len = [64, 100 * PAGE][round % 2];
        let work = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, len)).remote(b.remote(0));
        let state = if round % 4 < 2 { IBV_QPS_ERR } else { IBV_QPS_RESET };
        after_the_end(a, &work, &b.buffer, 0, len, || Ok(b.qp.set_state(state)?))?;
    }
    Ok(())
}

pub(crate) fn destruction_under_fire() -> Result<()> {
    for round in 0..40 {
        let pair = Pair::new(&impatient())?;
        let (a, b) = (pair.a, pair.b);
        let len = [64, 100 * PAGE][round % 2];
        let work = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, len)).remote(b.remote(0));
        let (qp, rest) = (b.qp, (b.buffer, b.mr, b.send_cq, b.recv_cq, b.pd));
        after_the_end(&a, &work, &rest.0, 0, len, || {
            drop(qp);
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn flushed_receives() -> Result<()> {
    for _ in 0..40 {
        let pair = Pair::new(&impatient())?;
        let (a, b) = (&pair.a, &pair.b);
        let (len, count) = (16 * PAGE, 8);
        let started = AtomicBool::new(false);
        (0..count).try_for_each(|id| b.qp.recv(id, &[b.sge(id as usize * len, len)]))?;
        let work = Send::new(IBV_WR_SEND).sge(a.sge(0, len));
        thread::scope(|scope| {
            let traffic = scope.spawn(|| hammer(a, &work, &started));
            let mut posted = count;
            for id in 0..20 {
                b.received()?;
                b.qp.recv(count + id, &[b.sge((id % count) as usize * len, len)])?;
                posted += 1;
            }
            b.qp.set_state(IBV_QPS_ERR)?;
            let mut received = 20;
            for wc in b.recv_cq.wait((posted - 20) as usize, SOON)? {
                ensure!(wc.wr_id == received, "{wc:?} instead of receive {received}");
                received += 1;
            }
            // All receives have come back: the buffers are the program's.
            b.buffer.fill(0, b.buffer.len(), 0x3c);
            let sent = traffic.join().unwrap_or_else(|_| Err(anyhow!("the traffic panicked")))?;
            ensure!(b.buffer.read(0, b.buffer.len()).iter().all(|&byte| byte == 0x3c), "written too late");
            b.recv_cq.stays_empty(Duration::from_millis(2))?;
            ensure!(sent <= received, "{sent} SENDs succeeded, {received} receives completed");
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn many_threads() -> Result<()> {
    const THREADS: u64 = 4;
    const EACH: u64 = 3000;
    let mut setup = Setup::new(IBV_QPT_RC);
    (setup.cap.max_send_wr, setup.cap.max_recv_wr, setup.cqe) = (128, 128, 1024);
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let (received, sent) = (AtomicU64::new(0), AtomicU64::new(0));
    let sum = AtomicU64::new(0);
    (0..100).try_for_each(|id| b.qp.recv(id, &[b.sge(0, 64)]))?;
    // All post to the same SQ, and all take from the same CQs.
    let poster = |thread: u64| {
        for number in 0..EACH {
            let work = Send::new(IBV_WR_SEND_WITH_IMM).imm((thread * EACH + number) as u32);
            while let Err(refused) = a.qp.send_list(std::slice::from_ref(&work)) {
                ensure!(refused.code == libc::ENOMEM, "{refused}");
                for wc in a.send_cq.poll(8)? {
                    wc.expect(IBV_WC_SUCCESS)?;
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    };
    let taker = || {
        while received.load(Ordering::Relaxed) < THREADS * EACH {
            for wc in b.recv_cq.poll(8)? {
                wc.expect(IBV_WC_SUCCESS)?;
                received.fetch_add(1, Ordering::Relaxed);
                sum.fetch_add(u64::from(wc.imm), Ordering::Relaxed);
                b.qp.recv(wc.wr_id, &[b.sge(0, 64)])?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let mut threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || poster(thread))).collect();
        threads.extend((0..2).map(|_| scope.spawn(taker)));
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
    })?;
    let all = THREADS * EACH;
    let rest = a.send_cq.wait((all - sent.load(Ordering::Relaxed)) as usize, SOON)?;
    ensure!(rest.iter().all(|wc| wc.status == IBV_WC_SUCCESS), "a SEND failed");
    let sum = sum.load(Ordering::Relaxed);
    ensure!(sum == all * (all - 1) / 2, "messages are lost or doubled: the sum is {sum}");
    b.recv_cq.stays_empty(Duration::from_millis(5))
}

pub(crate) fn forked_child() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let write = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 64)).remote(b.remote(0));
    a.execute(&write)?;
    // SAFETY: the child calls verbs that must fail, and exits.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let refused = a.qp.send_list(std::slice::from_ref(&write)).is_err()
            && b.qp.recv(0, &[]).is_err()
            && a.qp.set_state(IBV_QPS_ERR).is_err()
            && Mr::new(&a.pd, a.buffer.addr(), PAGE, ALL_ACCESS).is_err();
        // Destroying the copies must not reach the parent's objects.
        drop(pair);
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(if refused { 0 } else { 3 }) };
    }
    let mut status = 0;
    // SAFETY: the child is ours and was not waited for.
    ensure!(unsafe { libc::waitpid(child, &mut status, 0) } == child, "waitpid");
    ensure!(status == 0, "the child could use its parent's device, or crashed: wait status {status:#x}");
    for _ in 0..100 {
        a.execute(&write)?;
    }
    Ok(())
}
