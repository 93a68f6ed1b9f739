//! Objects of one device, used by many threads at once: each completion is seen once, each event is read or taken back.

use std::{
    collections::HashSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use verbs_abi::ffi::*;

use crate::{
    cancel,
    cq::{Channel, Cq},
    pair::{Address, End, SOON, Setup},
    qp::{Qp, QpInit, Send},
    verbs::Context,
};

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
}

/// A QP of this end's PD that is connected to itself, with one CQ for both directions.
fn own_peer(end: &End, cq: &Arc<Cq>) -> Result<Qp> {
    let cap =
        ibv_qp_cap { max_send_wr: 32, max_recv_wr: 64, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let qp = Qp::new(&end.pd, cq, cq, QpInit { qp_type: IBV_QPT_RC, cap, sq_sig_all: true })?;
    let peer = Address { qpn: qp.number(), ..end.address()? };
    let steps = [end.init_attr(), end.rtr_attr(peer), end.rts_attr()];
    steps.iter().try_for_each(|(attr, mask)| qp.modify(attr, *mask))?;
    Ok(qp)
}

/// Threads of the device in this process take none of its signals, so no handler of the program's runs on them.
pub(crate) fn deaf_to_signals() -> Result<()> {
    // All but those that nobody can block, and the two that glibc keeps for itself.
    const ALL: u64 = !(1 << (9 - 1) | 1 << (19 - 1) | 0b11 << (32 - 1));
    let _end = End::new(&Setup::new(IBV_QPT_RC))?;
    let mut found = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if !fs::read_to_string(task.join("comm"))?.starts_with("freeflow-watch") {
            continue;
        }
        found += 1;
        let status = fs::read_to_string(task.join("status"))?;
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).context("no SigBlk")?;
        let blocked = u64::from_str_radix(blocked.trim(), 16)?;
        ensure!(blocked & ALL == ALL, "{} takes the signals {:x}", task.display(), ALL & !blocked);
    }
    ensure!(found > 0, "the device has no thread here that could be looked at");
    Ok(())
}

/// Several threads take from one CQ what other threads' QPs complete there.
pub(crate) fn shared_cq() -> Result<()> {
    const QPS: u64 = 4;
    const EACH: u64 = 2000;
    const ALL: usize = (2 * QPS * EACH) as usize;
    const RECEIVED: u64 = 1 << 63;
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let cq = Cq::new(&end.context, 1024, None)?;
    let qps = (0..QPS).map(|_| own_peer(&end, &cq)).collect::<Result<Vec<_>>>()?;
    let taken = AtomicUsize::new(0);
    let under_way: Vec<AtomicU64> = (0..QPS).map(|_| AtomicU64::new(0)).collect();
    let post = |number: u64| {
        let (qp, under_way) = (&qps[number as usize], &under_way[number as usize]);
        let start = Instant::now();
        for id in number * EACH..(number + 1) * EACH {
            while under_way.load(Ordering::Acquire) >= 40 {
                ensure!(start.elapsed() < 20 * SOON, "completions of QP {number} are missing");
                thread::yield_now();
            }
            under_way.fetch_add(2, Ordering::AcqRel);
            qp.recv(RECEIVED | id, &[])?;
            qp.send(&Send::new(IBV_WR_SEND).id(id))?;
        }
        Ok(())
    };
    let take = || {
        let (mut seen, start) = (Vec::new(), Instant::now());
        while taken.load(Ordering::Acquire) < ALL {
            ensure!(
                start.elapsed() < 20 * SOON,
                "{} of {ALL} completions came",
                taken.load(Ordering::Acquire)
            );
            for wc in cq.poll(7)? {
                wc.expect(IBV_WC_SUCCESS)?;
                under_way[((wc.wr_id & !RECEIVED) / EACH) as usize].fetch_sub(1, Ordering::AcqRel);
                taken.fetch_add(1, Ordering::AcqRel);
                seen.push(wc.wr_id);
            }
        }
        Ok(seen)
    };
    let seen = thread::scope(|scope| {
        let takers: Vec<_> = (0..3).map(|_| scope.spawn(take)).collect();
        let posters: Vec<_> = (0..QPS).map(|number| scope.spawn(move || post(number))).collect();
        posters.into_iter().try_for_each(joined)?;
        takers.into_iter().map(joined).collect::<Result<Vec<_>>>()
    })?;
    let seen = seen.concat();
    let distinct: HashSet<u64> = seen.iter().copied().collect();
    ensure!(
        seen.len() == ALL && distinct.len() == ALL,
        "{} completions, {} of them",
        seen.len(),
        distinct.len()
    );
    cq.stays_empty(Duration::from_millis(5))
}

/// Threads make, connect, use and destroy objects of one device, beside traffic that goes on.
pub(crate) fn coming_and_going() -> Result<()> {
    const ROUNDS: u64 = 12;
    let context = Context::open()?;
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.buffer = 16 << 10;
    let steady = End::on(&context, &setup)?;
    steady.connect(steady.address()?)?;
    let is_over = AtomicBool::new(false);
    let round = |thread: u64, round: u64| {
        let (a, b) = (End::on(&context, &setup)?, End::on(&context, &setup)?);
        a.connect(b.address()?)?;
        b.connect(a.address()?)?;
        let byte = (thread * ROUNDS + round) as u8;
        a.buffer.fill(0, 4096, byte);
        b.qp.recv(1, &[b.sge(0, 4096)])?;
        b.recv_cq.arm(false)?;
        a.qp.send(&Send::new(IBV_WR_SEND).sge(a.sge(0, 4096)).flags(IBV_SEND_SIGNALED))?;
        let event = b.recv_cq.channel()?.event()?;
        ensure!(event == b.recv_cq.addr(), "the event is of another CQ");
        b.recv_cq.next()?.expect(IBV_WC_SUCCESS)?;
        a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
        ensure!(b.buffer.read(0, 4096).iter().all(|&found| found == byte), "bytes of another thread");
        Ok(())
    };
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let write = Send::new(IBV_WR_RDMA_WRITE).sge(steady.sge(0, 64)).remote(steady.remote(8192));
            let mut count = 0_u64;
            while !is_over.load(Ordering::Acquire) {
                steady.execute(&write)?.expect(IBV_WC_SUCCESS)?;
                count += 1;
            }
            Ok(count)
        });
        let run = |thread: u64| (0..ROUNDS).try_for_each(|number| round(thread, number));
        let threads: Vec<_> = (0..4).map(|thread| scope.spawn(move || run(thread))).collect();
        let ended = threads.into_iter().try_for_each(joined);
        is_over.store(true, Ordering::Release);
        let count = joined(traffic)?;
        ensure!(count > 0, "the traffic stood still");
        ended
    })
}

/// The channel goes on: the next event is there for another thread.
pub(crate) fn cancelled() -> Result<()> {
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let channel = Channel::new(&end.context)?;
    cancel::while_it_waits(&channel.wait())?;
    let cq = Cq::new(&end.context, 8, Some(&channel))?;
    let qp = own_peer(&end, &cq)?;
    cq.arm(false)?;
    qp.recv(1, &[])?;
    qp.send(&Send::new(IBV_WR_SEND))?;
    ensure!(channel.event()? == cq.addr(), "an event of another CQ");
    Ok(())
}

/// CQs go while their events are unread, being read, or waited for by a thread that sleeps on the channel.
pub(crate) fn destroyed_under_a_reader() -> Result<()> {
    const ROUNDS: usize = 200;
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let channel = Channel::new(&end.context)?;
    let stop = Cq::new(&end.context, 4, Some(&channel))?;
    let last = own_peer(&end, &stop)?;
    let raise = |qp: &Qp, cq: &Cq| {
        cq.arm(false)?;
        qp.recv(1, &[])?;
        qp.send(&Send::new(IBV_WR_SEND))
    };
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut count = 0;
            while channel.event()? != stop.addr() {
                count += 1;
            }
            Ok(count)
        });
        let rounds = (0..ROUNDS).try_for_each(|round| {
            let cq = Cq::new(&end.context, 8, Some(&channel))?;
            let qp = own_peer(&end, &cq)?;
            raise(&qp, &cq)?;
            if round % 3 == 0 {
                // Until the completion, and so the event, is there.
                cq.wait(2, SOON)?;
            }
            drop(qp);
            drop(cq);
            anyhow::Ok(())
        });
        raise(&last, &stop)?;
        let read = joined(reader)?;
        rounds?;
        ensure!(read <= ROUNDS, "{read} events of {ROUNDS}");
        anyhow::Ok(())
    })?;
    // One event for an arm, and it was read: what was taken back has left no count behind.
    ensure!(!channel.has_event(Duration::from_millis(20)), "a count without an event is left");
    Ok(())
}
