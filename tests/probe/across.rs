//! Two processes that send each other numbered messages, WRITEs, READs and additions for a while, on several QPs, and
//! check every one: nothing lost, nothing twice, nothing out of order, nothing changed on its way.
//!
//! They tell each other by files in a folder where they are and how they ended, for they may be on different hosts. What
//! ends a QP early is told, and what must hold then is checked: the other's counter lies between what has succeeded and
//! what was tried.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    cq::{Wc, status_name},
    meet::{hear, tell},
    pair::{Address, End, Setup},
    qp::Send,
    verbs::Context,
};

/// Receives that are posted: so far a sender may be ahead of the checks of what it sent.
const RECEIVES: u64 = 8;
/// Places of the peer's that are written to in turn.
const SLOTS: u64 = 2 * RECEIVES;
const LEN: usize = 40_000;
/// What is READ: the same all the time.
const FIXED: usize = 0;
const READ: usize = 1 << 16;
const SOURCE: usize = 2 << 16;
const COUNTER: usize = 3 << 16;
const FETCHED: usize = COUNTER + 8;
const TARGETS: usize = 4 << 16;
const BUFFER: usize = TARGETS + SLOTS as usize * (1 << 16);
/// After its time, a run ends in this time at the latest.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to run.
pub(crate) struct Options {
    pub(crate) time: Duration,
    pub(crate) qps: usize,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
}

/// One QP, both as requester and as responder.
struct Flow {
    end: End,
    remote: (u64, u32),
    /// Rounds that have succeeded, and those that were begun.
    succeeded: u64,
    begun: u64,
    /// What ended its send queue.
    failed: Option<ibv_wc_status>,
    /// Whether its receives came back flushed.
    flushed: bool,
    /// Messages that have come.
    received: u64,
    longest: Duration,
    since: Instant,
}

pub(crate) fn run(folder: &str, own: &str, other: &str, options: &Options) -> Result<()> {
    let file = |name: &str, step: &str| -> PathBuf { Path::new(folder).join(format!("{name}.{step}")) };
    let mut setup = Setup::new(IBV_QPT_RC);
    (setup.timeout, setup.retry_cnt, setup.buffer) = (options.timeout, options.retry_cnt, BUFFER);
    let context = Context::open()?;
    let ends = (0..options.qps).map(|_| End::on(&context, &setup)).collect::<Result<Vec<_>>>()?;
    let mut text = format!("{}", u128::from_be_bytes(context.gid(0)?));
    for end in &ends {
        end.buffer.write(FIXED, &pattern(u64::MAX, LEN));
        let (addr, rkey) = end.remote(0);
        text += &format!(" {} {addr} {rkey}", end.qp.number());
    }
    tell(&file(own, "here"), &text)?;
    let theirs: Vec<u128> =
        hear(&file(other, "here"))?.iter().map(|word| word.parse()).collect::<Result<_, _>>()?;
    ensure!(theirs.len() == 1 + 3 * options.qps, "the other has another number of QPs");
    let mut flows = Vec::new();
    for (end, words) in ends.into_iter().zip(theirs[1..].chunks_exact(3)) {
        end.connect(Address { gid: theirs[0].to_be_bytes(), qpn: words[0] as u32 })?;
        (0..RECEIVES).try_for_each(|id| end.qp.recv(id, &[]))?;
        let remote = (words[1] as u64, words[2] as u32);
        flows.push(Flow {
            end,
            remote,
            succeeded: 0,
            begun: 0,
            failed: None,
            flushed: false,
            received: 0,
            longest: Duration::ZERO,
            since: Instant::now(),
        });
    }
    tell(&file(own, "ready"), "")?;
    hear(&file(other, "ready"))?;
    println!("READY");
    std::io::stdout().flush()?;
    let until = Instant::now() + options.time;
    let mut told = false;
    loop {
        let theirs = theirs_of(&file(other, "ended"));
        let all_here = flows.iter().zip(&theirs).all(|(flow, theirs)| flow.has_all(*theirs));
        if told && theirs.len() == flows.len() && all_here {
            break;
        }
        ensure!(Instant::now() < until + PATIENCE, "it hangs: {}", summary(&flows));
        for flow in &mut flows {
            flow.step(Instant::now() < until)?;
        }
        if !told && flows.iter().all(|flow| flow.is_over(until)) {
            told = true;
            let ended = flows
                .iter()
                .map(|flow| format!("{} {} {}", flow.succeeded, flow.begun, u32::from(flow.is_broken())));
            tell(&file(own, "ended"), &ended.collect::<Vec<_>>().join(" "))?;
        }
    }
    let theirs = theirs_of(&file(other, "ended"));
    for (flow, theirs) in flows.iter().zip(&theirs) {
        flow.check_end(*theirs)?;
    }
    println!("{}", summary(&flows));
    Ok(())
}

/// How the other's flows ended: rounds that succeeded, rounds that were begun, whether one failed.
fn theirs_of(path: &PathBuf) -> Vec<(u64, u64, bool)> {
    let words: Vec<u64> = std::fs::read_to_string(path)
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    words.chunks_exact(3).map(|words| (words[0], words[1], words[2] != 0)).collect()
}

fn summary(flows: &[Flow]) -> String {
    let one = |flow: &Flow| {
        let ended = match flow.failed {
            Some(status) => status_name(status),
            None if flow.flushed => "flushed".to_owned(),
            None => "OK".to_owned(),
        };
        let longest = flow.longest.as_millis();
        format!("{} rounds, {} received, longest {longest} ms, ended {ended}", flow.succeeded, flow.received)
    };
    flows.iter().map(one).collect::<Vec<_>>().join("\n")
}

impl Flow {
    /// Whether it will begin nothing more.
    fn is_over(&self, until: Instant) -> bool {
        let rests = self.begun == self.succeeded;
        self.failed.is_some() || rests && (self.flushed || Instant::now() >= until)
    }

    /// Whether every message is here that the other has had acknowledged.
    fn has_all(&self, (succeeded, _, failed): (u64, u64, bool)) -> bool {
        failed || self.is_broken() || self.received >= succeeded
    }

    fn is_broken(&self) -> bool {
        self.failed.is_some() || self.flushed
    }

    fn step(&mut self, goes_on: bool) -> Result<()> {
        for wc in self.end.recv_cq.poll(4)? {
            self.take(&wc)?;
        }
        for wc in self.end.send_cq.poll(4)? {
            if wc.status != IBV_WC_SUCCESS {
                self.failed.get_or_insert(wc.status);
            } else if wc.opcode == IBV_WC_SEND {
                self.conclude(&wc)?;
            }
        }
        if goes_on && !self.is_broken() && self.begun == self.succeeded {
            self.begin()?;
        }
        Ok(())
    }

    /// A message: all that was done before it must be here.
    fn take(&mut self, wc: &Wc) -> Result<()> {
        if wc.status != IBV_WC_SUCCESS {
            ensure!(wc.status == IBV_WC_WR_FLUSH_ERR, "a receive ended with {}", status_name(wc.status));
            self.flushed = true;
            return Ok(());
        }
        let number = self.received + 1;
        ensure!(u64::from(wc.imm) == number, "message {} came instead of {number}", wc.imm);
        let at = TARGETS + (number % SLOTS) as usize * (1 << 16);
        ensure!(self.end.buffer.read(at, LEN) == pattern(number, LEN), "WRITE {number} is not what was sent");
        self.received = number;
        if !self.is_broken() {
            self.end.qp.recv(number, &[])?;
        }
        Ok(())
    }

    /// A WRITE, a READ, an addition and a message at once.
    fn begin(&mut self) -> Result<()> {
        self.begun += 1;
        self.since = Instant::now();
        let (number, end, (addr, rkey)) = (self.begun, &self.end, self.remote);
        let there = |at: usize| (addr + at as u64, rkey);
        end.buffer.write(SOURCE, &pattern(number, LEN));
        end.buffer.fill(READ, LEN, 0);
        let slot = TARGETS + (number % SLOTS) as usize * (1 << 16);
        let write = Send::new(IBV_WR_RDMA_WRITE).flags(0).sge(end.sge(SOURCE, LEN)).remote(there(slot));
        let read = Send::new(IBV_WR_RDMA_READ).flags(0).sge(end.sge(READ, LEN)).remote(there(FIXED));
        let mut add =
            Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD).flags(0).sge(end.sge(FETCHED, 8)).remote(there(COUNTER));
        add.compare_add = 1;
        let message = Send::new(IBV_WR_SEND_WITH_IMM).id(number).imm(number as u32);
        let posted = end.qp.send_list(&[write, read, add, message]);
        ensure!(posted.is_ok(), "what may be posted was refused");
        Ok(())
    }

    fn conclude(&mut self, wc: &Wc) -> Result<()> {
        ensure!(wc.wr_id == self.begun, "{wc:?}");
        self.succeeded = self.begun;
        self.longest = self.longest.max(self.since.elapsed());
        let found = self.end.buffer.word(FETCHED).load(Ordering::Acquire);
        ensure!(found + 1 == self.succeeded, "the addition of round {} found {found}", self.succeeded);
        ensure!(
            self.end.buffer.read(READ, LEN) == pattern(u64::MAX, LEN),
            "what was READ is not what is there"
        );
        Ok(())
    }

    /// Nothing was executed twice, nothing that succeeded was not.
    fn check_end(&self, (succeeded, begun, failed): (u64, u64, bool)) -> Result<()> {
        let counted = self.end.buffer.word(COUNTER).load(Ordering::Acquire);
        if counted < succeeded || counted > begun || !failed && counted != succeeded {
            bail!("{counted} additions were executed of {begun}, of which {succeeded} succeeded");
        }
        let received = self.received;
        ensure!(received <= begun, "{received} messages came of {begun}");
        ensure!(failed || self.is_broken() || received == succeeded, "{received} messages of {succeeded}");
        Ok(())
    }
}
