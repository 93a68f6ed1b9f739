//! Which work completes when, and who is woken by it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, anyhow, ensure};
use verbs_abi::ffi::*;

use crate::{
    cq::{Channel, Cq},
    pair::{Address, End, Pair, QUIET, SOON, Setup},
    qp::{Qp, QpInit, Send},
    verbs::Context,
};

pub(crate) fn unsignaled() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let write =
        |id, flags| Send::new(IBV_WR_RDMA_WRITE).id(id).flags(flags).sge(a.sge(0, 100)).remote(b.remote(0));
    let mut list: Vec<_> = (0..8).map(|id| write(id, 0)).collect();
    list.push(write(8, IBV_SEND_SIGNALED));
    a.qp.send_list(&list)?;
    let wc = a.send_cq.next()?;
    ensure!((wc.wr_id, wc.status) == (8, IBV_WC_SUCCESS), "{wc:?}");
    a.send_cq.stays_empty(QUIET)?;
    // An error is told although nobody asked.
    a.qp.send(&write(9, 0).remote((0, 1)))?;
    let wc = a.send_cq.next()?;
    ensure!((wc.wr_id, wc.status) == (9, IBV_WC_REM_ACCESS_ERR), "{wc:?}");
    Ok(())
}

pub(crate) fn all_signaled() -> Result<()> {
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.sq_sig_all = true;
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let list: Vec<_> = (0..5)
        .map(|id| Send::new(IBV_WR_RDMA_WRITE).id(id).flags(0).sge(a.sge(0, 9)).remote(b.remote(0)))
        .collect();
    a.qp.send_list(&list)?;
    let ids: Vec<u64> = a.send_cq.wait(5, SOON)?.iter().map(|wc| wc.wr_id).collect();
    ensure!(ids == [0, 1, 2, 3, 4], "{ids:?}");
    Ok(())
}

pub(crate) fn solicited() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let channel = b.recv_cq.channel()?;
    let message = |flags| Send::new(IBV_WR_SEND).flags(IBV_SEND_SIGNALED | flags).sge(a.sge(0, 8));
    (0..4).try_for_each(|id| b.qp.recv(id, &[b.sge(0, 8)]))?;
    b.recv_cq.arm(true)?;
    a.execute(&message(0))?;
    ensure!(!channel.has_event(QUIET), "an unsolicited message woke a solicited-only CQ");
    a.execute(&message(IBV_SEND_SOLICITED))?;
    ensure!(channel.has_event(SOON), "a solicited message woke nobody");
    ensure!(channel.event()? == b.recv_cq.addr(), "the event is of another CQ");
    b.recv_cq.wait(2, SOON)?;
    // An arm for any completion is not weakened by one for solicited ones only.
    b.recv_cq.arm(false)?;
    b.recv_cq.arm(true)?;
    a.execute(&message(0))?;
    ensure!(channel.has_event(SOON), "a later solicited-only arm took an earlier arm away");
    channel.event()?;
    b.recv_cq.wait(1, SOON)?;
    // A completion in error wakes in any case.
    b.recv_cq.arm(true)?;
    b.qp.set_state(IBV_QPS_ERR)?;
    ensure!(channel.has_event(SOON), "a flushed receive did not wake a solicited-only CQ");
    channel.event()?;
    b.recv_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)
}

pub(crate) fn one_event_an_arm() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let channel = a.send_cq.channel()?;
    let write = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0));
    a.execute(&write)?;
    ensure!(!channel.has_event(QUIET), "an event that nobody asked for");
    for _ in 0..100 {
        a.send_cq.arm(false)?;
        a.qp.send_list(&[write.clone(), write.clone(), write.clone()])?;
        a.send_cq.wait(3, SOON)?;
        ensure!(channel.has_event(SOON), "an armed CQ woke nobody");
        channel.event()?;
    }
    ensure!(!channel.has_event(QUIET), "two events for one arm");
    Ok(())
}

pub(crate) fn ping_pong_by_events() -> Result<()> {
    const ROUNDS: u64 = 20_000;
    let pair = Pair::of(IBV_QPT_RC)?;
    // Both have receives and ask for events before either sends.
    for end in [&pair.a, &pair.b] {
        end.recv_cq.arm(false)?;
        (0..8).try_for_each(|id| end.qp.recv(id, &[end.sge(4096, 8)]))?;
    }
    thread::scope(|scope| {
        let passive = scope.spawn(|| play(&pair.b, ROUNDS, false));
        let active = play(&pair.a, ROUNDS, true);
        let passive = passive.join().unwrap_or_else(|_| Err(anyhow!("the passive side panicked")));
        active.and(passive)
    })
}

/// One side of the game: sleeps for each message, as `ibv_rc_pingpong -e` does.
fn play(end: &End, rounds: u64, mut my_turn: bool) -> Result<()> {
    let mut received = 0;
    let mut sent = 0;
    while received < rounds || sent < rounds {
        if my_turn && sent < rounds {
            end.buffer.word(0).store(sent, Ordering::SeqCst);
            let flags = if sent % 16 == 15 { IBV_SEND_SIGNALED } else { 0 };
            end.qp.send(&Send::new(IBV_WR_SEND).flags(flags | IBV_SEND_INLINE).sge(end.sge(0, 8)))?;
            if flags & IBV_SEND_SIGNALED != 0 {
                end.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
            }
            (sent, my_turn) = (sent + 1, false);
        }
        if received == rounds {
            continue;
        }
        let channel = end.recv_cq.channel()?;
        ensure!(channel.has_event(SOON), "asleep for ever in round {received}: a wake-up was lost");
        channel.event()?;
        end.recv_cq.arm(false)?;
        for wc in end.recv_cq.poll(8)? {
            wc.expect(IBV_WC_SUCCESS)?;
            let number = end.buffer.word(4096).load(Ordering::SeqCst);
            ensure!(number == received, "message {number} instead of {received}");
            end.qp.recv(received, &[end.sge(4096, 8)])?;
            (received, my_turn) = (received + 1, true);
        }
    }
    Ok(())
}

pub(crate) fn shared_queue() -> Result<()> {
    const QPS: usize = 24;
    const EACH: u64 = 500;
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.cqe = 4096;
    let hub = End::new(&setup)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: setup.cap, sq_sig_all: false };
    let spokes = (0..QPS).map(|_| End::new(&setup)).collect::<Result<Vec<_>>>()?;
    let mut qps = Vec::new();
    for spoke in &spokes {
        let qp = Qp::new(&hub.pd, &hub.recv_cq, &hub.recv_cq, init)?;
        let mut peer = hub.address()?;
        peer.qpn = qp.number();
        spoke.connect(peer)?;
        let steps = [hub.init_attr(), hub.rtr_attr(spoke.address()?), hub.rts_attr()];
        steps.iter().try_for_each(|(attr, mask)| qp.modify(attr, *mask))?;
        (0..32).try_for_each(|id| qp.recv(id, &[hub.sge(0, 64)]))?;
        qps.push(qp);
    }
    let mut next = [0; QPS];
    let (mut posted, mut acknowledged) = ([0; QPS], [0; QPS]);
    while next.iter().any(|&count| count < EACH) {
        for (at, spoke) in spokes.iter().enumerate() {
            while posted[at] < EACH && posted[at] - acknowledged[at] < 16 {
                let work = Send::new(IBV_WR_SEND_WITH_IMM).imm(posted[at] as u32).sge(spoke.sge(0, 16));
                spoke.qp.send(&work)?;
                posted[at] += 1;
            }
            for wc in spoke.send_cq.poll(16)? {
                wc.expect(IBV_WC_SUCCESS)?;
                acknowledged[at] += 1;
            }
        }
        for wc in hub.recv_cq.poll(64)? {
            wc.expect(IBV_WC_SUCCESS)?;
            let at = qps.iter().position(|qp| qp.number() == wc.qp_num);
            let at = at.ok_or_else(|| anyhow!("a completion of no QP: {wc:?}"))?;
            ensure!(wc.src_qp == spokes[at].qp.number(), "{wc:?}");
            ensure!(u64::from(wc.imm) == next[at], "QP {at}: {} instead of {}", wc.imm, next[at]);
            next[at] += 1;
            qps[at].recv(next[at] + 31, &[hub.sge(0, 64)])?;
        }
    }
    Ok(())
}

pub(crate) fn destroyed_qp() -> Result<()> {
    let context = Context::open()?;
    let cq = Cq::new(&context, 256, Some(&Channel::new(&context)?))?;
    let setup = Setup::new(IBV_QPT_RC);
    let peers = [End::new(&setup)?, End::new(&setup)?];
    let base = End::on(&context, &setup)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: setup.cap, sq_sig_all: true };
    let mut qps = Vec::new();
    for peer in &peers {
        let qp = Qp::new(&base.pd, &cq, &cq, init)?;
        let mut address = base.address()?;
        address.qpn = qp.number();
        peer.connect(address)?;
        let steps = [base.init_attr(), base.rtr_attr(peer.address()?), base.rts_attr()];
        steps.iter().try_for_each(|(attr, mask)| qp.modify(attr, *mask))?;
        qps.push(qp);
    }
    for _ in 0..5 {
        for (qp, peer) in qps.iter().zip(&peers) {
            qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(base.sge(0, 8)).remote(peer.remote(0)))?;
        }
    }
    thread::sleep(Duration::from_millis(50));
    let gone = qps.remove(0).number();
    let left = cq.wait(5, SOON)?;
    ensure!(left.iter().all(|wc| wc.qp_num != gone && wc.status == IBV_WC_SUCCESS), "{left:?}");
    cq.stays_empty(QUIET)
}

pub(crate) fn nonblocking_channel() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let channel = a.send_cq.channel()?;
    for fd in [channel.fd(), a.context.async_fd()] {
        // SAFETY: a descriptor that is open; nobody else uses it.
        ensure!(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) } == 0, "fcntl");
    }
    let write = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0));
    for _ in 0..10 {
        let code = channel.event().err().map(|error| error.code);
        ensure!(code == Some(libc::EAGAIN), "an empty channel: {code:?}");
        a.send_cq.arm(false)?;
        a.execute(&write)?;
        ensure!(channel.has_event(SOON) && channel.event()? == a.send_cq.addr(), "no event");
    }
    let code = a.context.try_async_event().err().map(|error| error.code);
    ensure!(code == Some(libc::EAGAIN), "no async event: {code:?}");
    Ok(())
}

pub(crate) fn unacknowledged() -> Result<()> {
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let cq = Cq::new(&end.context, 16, Some(&Channel::new(&end.context)?))?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: Setup::new(IBV_QPT_RC).cap, sq_sig_all: false };
    let qp = Qp::new(&end.pd, &cq, &cq, init)?;
    let (attr, mask) = end.init_attr();
    qp.modify(&attr, mask)?;
    qp.recv(1, &[])?;
    cq.arm(false)?;
    qp.set_state(IBV_QPS_ERR)?;
    let event = cq.channel()?.take_event()?;
    drop(qp);
    let destroyed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            drop(cq);
            destroyed.store(true, Ordering::SeqCst);
        });
        thread::sleep(QUIET);
        let early = destroyed.load(Ordering::SeqCst);
        drop(event);
        ensure!(!early, "a CQ was destroyed before its event was acknowledged");
        Ok(())
    })
}

pub(crate) fn unacknowledged_qp() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let Pair { a, b } = pair;
    // The first request that the responder refuses raises an event.
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote((b.remote(0).0, 1)))?;
    a.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)?;
    let event = b.context.take_async_event()?;
    ensure!(event.kind() == IBV_EVENT_QP_ACCESS_ERR, "another event: {}", event.kind());
    let destroyed = AtomicBool::new(false);
    let qp = b.qp;
    thread::scope(|scope| {
        scope.spawn(|| {
            drop(qp);
            destroyed.store(true, Ordering::SeqCst);
        });
        thread::sleep(QUIET);
        let early = destroyed.load(Ordering::SeqCst);
        drop(event);
        ensure!(!early, "a QP was destroyed before its event was acknowledged");
        Ok(())
    })
}

pub(crate) fn times() -> Result<()> {
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK;
    let cq = Cq::extended(&end.context, 16, flags)?;
    let init = QpInit { qp_type: IBV_QPT_RC, cap: Setup::new(IBV_QPT_RC).cap, sq_sig_all: true };
    let qp = Qp::new(&end.pd, &cq, &cq, init)?;
    let own = Address { qpn: qp.number(), ..end.address()? };
    for (attr, mask) in [end.init_attr(), end.rtr_attr(own), end.rts_attr()] {
        qp.modify(&attr, mask)?;
    }
    let wall = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_nanos() as u64);
    for _ in 0..100 {
        let before = (end.context.clock()?, wall()?);
        qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(end.sge(0, 8)).remote(end.remote(64)))?;
        let (status, device, of_day) = cq.next_with_times()?;
        let after = (end.context.clock()?, wall()?);
        ensure!(status == IBV_WC_SUCCESS, "the WRITE failed: {status}");
        ensure!((before.0..=after.0).contains(&device), "{device} is not from {} to {}", before.0, after.0);
        ensure!((before.1..=after.1).contains(&of_day), "{of_day} is not from {} to {}", before.1, after.1);
    }
    Ok(())
}
