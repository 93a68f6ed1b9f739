//! The process that lives: its own requests end, what it receives is whole, in order and complete.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use verbs_abi::ffi::*;

use super::{
    CONNECT, FINISH, GIVE_UP, MAKE, Start, Tally,
    traffic::{
        ADD_EVERY, COUNTER, FOUND, Kind, LATCH, RECEIVE_AREA, RECEIVES, SLOT, TEXT, WRITE_AREA, adds_up_to,
        compose, kind, length, recognise, slot,
    },
    victim,
};
use crate::{
    cq::{Wc, status_name},
    family::{Card, Socket},
    pair::{End, Setup},
    qp::{Qp, QpInit, Send},
    verbs::Context,
};

/// How long a round may take after the victim is connected: it is killed within 3 ms, and retries are exhausted a few
/// milliseconds later.
const ROUND: Duration = Duration::from_secs(2);
/// Waiting for the parent, which may wait for a slow machine.
const IDLE: Duration = Duration::from_secs(60);

/// Requests of ours, in the order in which they are posted, over and over.
const OWN: [ibv_wr_opcode; 4] =
    [IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_ATOMIC_CMP_AND_SWP];

pub(crate) fn run(socket: &Socket) -> Result<()> {
    // Three tries of a millisecond: a dead victim is noticed soon.
    let setup = Setup { timeout: 8, retry_cnt: 2, ..victim::setup() };
    let context = Context::open()?;
    let mut end = End::on(&context, &setup)?;
    compose(&end.buffer, TEXT, 0);
    let mut round = 0_u64;
    loop {
        let start: Start = socket.receive(IDLE)?.context("the parent says nothing")?;
        match start.what {
            MAKE => make(&mut end, &setup, socket, round)?,
            CONNECT => socket.send(&Round::new(&end, start.card)?.play()?)?,
            GIVE_UP => {
                end.qp.set_state(IBV_QPS_ERR)?;
                let mut tally = Tally::default();
                drain_receives(&end, RECEIVES, &mut tally)?;
                socket.send(&tally)?;
            }
            FINISH => return Ok(()),
            what => bail!("no such order: {what}"),
        }
        round += 1;
    }
}

/// A QP in INIT with all receives posted: the last one after a RESET, or a new one.
fn make(end: &mut End, setup: &Setup, socket: &Socket, round: u64) -> Result<()> {
    if round % 4 < 2 {
        let init = QpInit { qp_type: IBV_QPT_RC, cap: setup.cap, sq_sig_all: false };
        end.qp = Qp::new(&end.pd, &end.send_cq, &end.recv_cq, init)?;
    } else {
        end.qp.set_state(IBV_QPS_RESET)?;
    }
    end.buffer.word(COUNTER).store(0, Ordering::SeqCst);
    end.to_init()?;
    (0..RECEIVES).try_for_each(|number| post_receive(end, number))?;
    let own = end.address()?;
    let (addr, rkey) = end.remote(0);
    socket.send(&Card { gid: own.gid, qpn: own.qpn, rkey, addr })
}

fn post_receive(end: &End, number: u64) -> Result<()> {
    end.qp.recv(number, &[end.sge(slot(RECEIVE_AREA, number), SLOT)])
}

/// Takes the flushes of receives that nobody will fill.
fn drain_receives(end: &End, count: u64, tally: &mut Tally) -> Result<()> {
    for wc in end.recv_cq.wait(count as usize, ROUND)? {
        wc.expect(IBV_WC_WR_FLUSH_ERR)?;
        tally.flushed += 1;
    }
    Ok(())
}

struct Round<'a> {
    end: &'a End,
    victim: Card,
    began: Instant,
    tally: Tally,
    /// Own requests posted, and those that completed.
    posted: u64,
    ended: u64,
    /// The first request that did not succeed, if any has failed.
    failed: Option<u64>,
    /// Receives posted.
    receives: u64,
    /// Receives that were flushed.
    flushed: u64,
}

impl<'a> Round<'a> {
    fn new(end: &'a End, victim: Card) -> Result<Self> {
        end.to_rtr(victim.address())?;
        end.to_rts()?;
        let (tally, began) = (Tally::default(), Instant::now());
        Ok(Self {
            end,
            victim,
            began,
            tally,
            posted: 0,
            ended: 0,
            failed: None,
            receives: RECEIVES,
            flushed: 0,
        })
    }

    fn play(mut self) -> Result<Tally> {
        loop {
            while self.failed.is_none() && self.posted - self.ended < 10 {
                self.post_next()?;
            }
            for wc in self.end.send_cq.poll(16)? {
                self.own_ended(&wc)?;
            }
            for wc in self.end.recv_cq.poll(16)? {
                self.received(&wc)?;
            }
            let receives_left = self.receives - self.tally.received - self.flushed;
            if self.failed.is_some() && self.ended == self.posted && receives_left == 0 {
                break;
            }
            ensure!(
                self.began.elapsed() < ROUND,
                "hangs: {} of {} requests ended, {receives_left} receives left, failed: {:?}",
                self.ended,
                self.posted,
                self.failed
            );
        }
        self.check_counter()?;
        self.tally.micros = self.began.elapsed().as_micros() as u64;
        Ok(self.tally)
    }

    fn post_next(&mut self) -> Result<()> {
        let (number, opcode) = (self.posted, OWN[(self.posted % 4) as usize]);
        let remote = |at: usize| (self.victim.addr + at as u64, self.victim.rkey);
        let found = FOUND + (number % 16) as usize * 64;
        let mut work = Send::new(opcode).id(number);
        // Each kind counts for itself: adds and swaps find how many went before.
        let before = number / 4;
        match opcode {
            IBV_WR_ATOMIC_FETCH_AND_ADD => {
                (work.compare_add, work.remote) = (1, remote(COUNTER));
                work.sges.push(self.end.sge(found, 8));
            }
            IBV_WR_ATOMIC_CMP_AND_SWP => {
                (work.compare_add, work.swap, work.remote) = (before, before + 1, remote(LATCH));
                work.sges.push(self.end.sge(found, 8));
            }
            IBV_WR_RDMA_READ => {
                work.sges.push(self.end.sge(FOUND + 2048, length(0)));
                work.remote = remote(TEXT);
            }
            _ => {
                work.sges.push(self.end.sge(TEXT, length(0)));
                work.remote = remote(WRITE_AREA);
            }
        }
        self.end.qp.send(&work)?;
        self.posted += 1;
        Ok(())
    }

    fn own_ended(&mut self, wc: &Wc) -> Result<()> {
        ensure!(wc.wr_id == self.ended, "request {} ended instead of {}", wc.wr_id, self.ended);
        let number = self.ended;
        self.ended += 1;
        match (wc.status, self.failed) {
            (IBV_WC_SUCCESS, None) => self.tally.succeeded += 1,
            (IBV_WC_RETRY_EXC_ERR, None) => {
                self.tally.retry_exc += 1;
                self.failed = Some(number);
                return Ok(());
            }
            (IBV_WC_WR_FLUSH_ERR, Some(_)) => {
                self.tally.flushed += 1;
                return Ok(());
            }
            (status, failed) => bail!("request {number}: {} after {failed:?}", status_name(status)),
        }
        let found = self.end.buffer.word(FOUND + (number % 16) as usize * 64).load(Ordering::SeqCst);
        match OWN[(number % 4) as usize] {
            IBV_WR_RDMA_READ => {
                let text = recognise(&self.end.buffer, FOUND + 2048, length(0));
                ensure!(text == Some(0), "a READ brought {text:?}");
            }
            IBV_WR_RDMA_WRITE => {}
            opcode => ensure!(found == number / 4, "atomic {opcode} found {found}, not {}", number / 4),
        }
        Ok(())
    }

    fn received(&mut self, wc: &Wc) -> Result<()> {
        if wc.status == IBV_WC_WR_FLUSH_ERR {
            ensure!(wc.wr_id == self.tally.received + self.flushed, "receive {} was flushed early", wc.wr_id);
            self.flushed += 1;
            self.tally.flushed += 1;
            return Ok(());
        }
        wc.expect(IBV_WC_SUCCESS)?;
        let number = self.tally.received;
        ensure!(wc.wr_id == number && self.flushed == 0, "receive {} instead of {number}", wc.wr_id);
        let (at, len) = match kind(number) {
            Kind::Send => (slot(RECEIVE_AREA, number), wc.byte_len as usize),
            _ => {
                ensure!(wc.imm == number as u32, "message {} came instead of {number}", wc.imm);
                (slot(WRITE_AREA, number), length(number))
            }
        };
        let seen = recognise(&self.end.buffer, at, len);
        ensure!(seen == Some(number), "{:?} {number} arrived as {seen:?}", kind(number));
        self.tally.received += 1;
        if self.failed.is_none() {
            post_receive(self.end, self.receives)?;
            self.receives += 1;
        }
        Ok(())
    }

    /// The victim's adds: all that went before a message that arrived, and at most the one after it.
    fn check_counter(&self) -> Result<()> {
        let counter = self.end.buffer.word(COUNTER).load(Ordering::SeqCst);
        let next = self.tally.received;
        let least = if next == 0 { 0 } else { adds_up_to(next - 1) };
        let most = least + u64::from(next.is_multiple_of(ADD_EVERY));
        ensure!(
            (least..=most).contains(&counter),
            "{counter} adds with {next} messages: not {least} to {most}"
        );
        Ok(())
    }
}
