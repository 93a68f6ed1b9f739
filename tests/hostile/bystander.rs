//! Two clients that keep the rules and talk to each other all the while: whatever others do, their traffic goes on,
//! and every byte of it is right.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use verbs_abi::{
    proto::Mode,
    shm::wqe::{SendWqe, Sge, flag},
    verbs::{Opcode, QpType},
};

use crate::client::{BASE, Client, LIMIT, Qp, RIGHTS};

/// Words of a message.
const WORDS: u64 = 512;
const BYTES: u64 = WORDS * 8;
/// Where messages come to lie.
const INBOX: u64 = 16 * 1024;
/// Between two messages: this is a guard, no load.
const PAUSE: Duration = Duration::from_micros(300);

/// What others may try to reach of a bystander.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) qpn: u32,
    pub(crate) key: u32,
    pub(crate) pd: u32,
    pub(crate) cq: u32,
}

/// The pair, at work in a thread.
#[derive(Debug)]
pub(crate) struct Bystander {
    pub(crate) target: Target,
    pings: Arc<AtomicU64>,
    error: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Side {
    client: Client,
    qp: Qp,
    key: u32,
}

impl Bystander {
    pub(crate) fn start(path: &Path) -> Result<Self> {
        let (mut a, pd, cq) = Side::open(path)?;
        let (mut b, _, _) = Side::open(path)?;
        a.client.connect(&a.qp, (b.qp.new.qpn, b.client.gid()?))?;
        b.client.connect(&b.qp, (a.qp.new.qpn, a.client.gid()?))?;
        let target = Target { qpn: a.qp.new.qpn, key: a.key, pd, cq };
        let (pings, error, stop) = (
            Arc::<AtomicU64>::default(),
            Arc::<Mutex<Option<String>>>::default(),
            Arc::<AtomicBool>::default(),
        );
        let (counted, told, ended) = (Arc::clone(&pings), Arc::clone(&error), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let number = counted.load(Ordering::Relaxed) + 1;
                // One after the other in both directions, so that both are requester and responder.
                if let Err(error) = ping(&mut a, &mut b, number).and_then(|()| ping(&mut b, &mut a, number)) {
                    let text = format!("message {number}: {error:#}");
                    *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    return;
                }
                counted.store(number, Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
        });
        Ok(Self { target, pings, error, stop, thread: Some(thread) })
    }

    /// Fails unless messages went through from now on, and none ever went wrong.
    pub(crate) fn check(&self) -> Result<()> {
        let (began, before) = (Instant::now(), self.pings.load(Ordering::Relaxed));
        // The one under way may have begun before.
        while self.pings.load(Ordering::Relaxed) < before + 3 {
            if let Some(error) = &*self.error.lock().unwrap_or_else(PoisonError::into_inner) {
                bail!("a bystander's traffic failed: {error}");
            }
            ensure!(began.elapsed() < LIMIT, "a bystander's traffic stands still");
            thread::sleep(PAUSE);
        }
        Ok(())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Side {
    fn open(path: &Path) -> Result<(Self, u32, u32)> {
        let client = Client::open(path, Mode::Isolated)?;
        let (pd, (cq, _)) = (client.pd()?, client.cq(None)?);
        let qp = client.qp(pd, cq, QpType::Rc)?;
        let key = client.mr(pd, 0, 2 * INBOX, RIGHTS)?;
        Ok((Self { client, qp, key }, pd, cq))
    }

    fn sge(&self, offset: u64) -> Sge {
        Sge { addr: BASE + offset, length: BYTES as u32, lkey: self.key }
    }
}

/// The word at a place of a message.
fn content(number: u64, at: u64) -> u64 {
    (number << 16 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// An RDMA WRITE and a SEND of the same bytes.
fn ping(from: &mut Side, to: &mut Side, number: u64) -> Result<()> {
    for at in 0..WORDS {
        from.client.memory.u64(at as usize * 8).store(content(number, at), Ordering::Relaxed);
    }
    to.client.post_recv(&to.qp, number, &[to.sge(INBOX + BYTES)]);
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags, wqe.opcode) = (number, flag::SIGNALED, Opcode::Write.value() as u8);
    (wqe.remote_addr, wqe.rkey) = (BASE + INBOX, to.key);
    ensure!(wqe.push_sge(from.sge(0)), "no room for an SGE");
    from.client.post(&from.qp, &wqe);
    wqe.opcode = Opcode::Send.value() as u8;
    from.client.post(&from.qp, &wqe);
    for _ in 0..2 {
        let done = from.qp.completion()?;
        ensure!((done.wr_id, done.status) == (number, 0), "a request ended so: {done:?}");
    }
    let received = to.qp.receives.pop().context("acknowledged, but not received")?;
    ensure!(
        (received.wr_id, received.status, u64::from(received.byte_len)) == (number, 0, BYTES),
        "a receive ended so: {received:?}"
    );
    for at in 0..2 * WORDS {
        let found = to.client.memory.u64((INBOX + at * 8) as usize).load(Ordering::Relaxed);
        ensure!(found == content(number, at % WORDS), "word {at} is {found:#x}");
    }
    Ok(())
}
