//! The process that is killed: it connects, then sends and checks until it dies.

use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use super::traffic::{
    ADD_EVERY, COUNTER, FOUND, Kind, LEN, SEND_AREA, TEXT, WRITE_AREA, adds_up_to, compose, kind, length,
    recognise, slot,
};
use crate::{
    cq::Wc,
    family::{Card, Socket},
    pair::{End, Setup},
    qp::Send,
};

/// Marks in a wr_id what the low bits number.
const MESSAGE: u64 = 1 << 60;
const ADD: u64 = 2 << 60;
const READ: u64 = 3 << 60;
const WHAT: u64 = 15 << 60;

pub(crate) fn setup() -> Setup {
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.buffer = LEN;
    setup.cap.max_send_wr = 64;
    setup
}

pub(crate) fn run(line: &Socket, survivor: &Card) -> Result<()> {
    let end = End::new(&setup())?;
    compose(&end.buffer, TEXT, 0);
    end.connect(survivor.address())?;
    let own = end.address()?;
    let (addr, rkey) = end.remote(0);
    line.send(&Card { gid: own.gid, qpn: own.qpn, rkey, addr })?;
    let mut stream = Stream { end, survivor: *survivor, next: 0, under_way: 0, added: 0 };
    loop {
        stream.step()?;
    }
}

struct Stream {
    end: End,
    survivor: Card,
    /// The next message's number.
    next: u64,
    /// Signaled requests that have not completed.
    under_way: u32,
    /// FETCH_AND_ADDs that have completed.
    added: u64,
}

impl Stream {
    fn step(&mut self) -> Result<()> {
        while self.under_way < 12 {
            self.post_next()?;
        }
        for wc in self.end.send_cq.poll(16)? {
            self.completed(&wc)?;
        }
        Ok(())
    }

    fn remote(&self, at: usize) -> (u64, u32) {
        (self.survivor.addr + at as u64, self.survivor.rkey)
    }

    fn post_next(&mut self) -> Result<()> {
        let (end, number) = (&self.end, self.next);
        let mut list = Vec::new();
        if number.is_multiple_of(ADD_EVERY) {
            let id = number / ADD_EVERY;
            let found = end.sge(FOUND + (id % 32) as usize * 8, 8);
            let mut work = Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD).id(ADD | id).sge(found);
            (work.compare_add, work.remote) = (1, self.remote(COUNTER));
            list.push(work);
        }
        if number.is_multiple_of(5) {
            let into = end.sge(FOUND + 2048, length(0));
            list.push(Send::new(IBV_WR_RDMA_READ).id(READ).sge(into).remote(self.remote(TEXT)));
        }
        let at = slot(SEND_AREA, number);
        compose(&end.buffer, at, number);
        let payload = end.sge(at, length(number));
        let (id, target) = (MESSAGE | number, self.remote(slot(WRITE_AREA, number)));
        match kind(number) {
            Kind::Send => list.push(Send::new(IBV_WR_SEND).id(id).sge(payload)),
            Kind::WriteWithImm => {
                let work = Send::new(IBV_WR_RDMA_WRITE_WITH_IMM).id(id).sge(payload);
                list.push(work.remote(target).imm(number as u32));
            }
            Kind::WriteThenSend => {
                list.push(Send::new(IBV_WR_RDMA_WRITE).flags(0).sge(payload).remote(target));
                list.push(Send::new(IBV_WR_SEND_WITH_IMM).id(id).imm(number as u32));
            }
        }
        self.under_way += list.iter().filter(|work| work.flags & IBV_SEND_SIGNALED != 0).count() as u32;
        self.end.qp.send_list(&list)?;
        self.next += 1;
        Ok(())
    }

    fn completed(&mut self, wc: &Wc) -> Result<()> {
        wc.expect(IBV_WC_SUCCESS).context("a request of the victim, whose peer is alive")?;
        self.under_way -= 1;
        match wc.wr_id & WHAT {
            ADD => {
                let id = wc.wr_id & !WHAT;
                let found = self.end.buffer.word(FOUND + (id % 32) as usize * 8).load(Ordering::SeqCst);
                ensure!(
                    (id, found) == (self.added, self.added),
                    "add {id} found {found}, after {}",
                    self.added
                );
                self.added += 1;
            }
            READ => {
                let text = recognise(&self.end.buffer, FOUND + 2048, length(0));
                ensure!(text == Some(0), "a READ brought {text:?}");
            }
            _ => {
                let number = wc.wr_id & !WHAT;
                // Requests complete in order, so the adds before this message have.
                ensure!(self.added >= adds_up_to(number), "message {number} overtook an atomic");
            }
        }
        Ok(())
    }
}
