//! What a program that watches its memory may rely on: which bytes become visible after which.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use verbs_abi::ffi::*;

use crate::{buffer::Buffer, pair::Pair, qp::Send};

/// How long a watcher looks for something that is sure to come.
const LIMIT: Duration = Duration::from_secs(20);
const ROUNDS: u64 = 300;
/// Where the watched bytes begin, one word after a page.
const AT: usize = 4096 + 8;

/// Lengths of messages, in bytes: a word, a line, pages, more than a slice.
const LENGTHS: [usize; 6] = [8, 64, 4096, 4104, 65_536, 300_000];

/// Fills all words of a part with a number.
fn stamp(buffer: &Buffer, at: usize, len: usize, number: u64) {
    for word in 0..len / 8 {
        buffer.word(at + word * 8).store(number, Ordering::Relaxed);
    }
}

/// Waits until a word has a value.
fn watch(buffer: &Buffer, at: usize, value: u64) -> Result<()> {
    let limit = Instant::now() + LIMIT;
    for look in 0_u64.. {
        if buffer.word(at).load(Ordering::Acquire) == value {
            break;
        }
        if look % 64 == 63 {
            ensure!(Instant::now() < limit, "{value} was never seen");
            thread::yield_now();
        }
    }
    Ok(())
}

/// Checks that all words of a part have a value, from the end, where they come latest.
fn ensure_stamped(buffer: &Buffer, at: usize, len: usize, value: u64, what: &str) -> Result<()> {
    for word in (0..len / 8).rev() {
        let found = buffer.word(at + word * 8).load(Ordering::Relaxed);
        ensure!(found == value, "{what} of {len} bytes: word {word} is {found}, not {value} yet");
    }
    Ok(())
}

/// Rounds of a requester, each of which goes on when the watcher has seen the last one.
fn rounds(seen: &Buffer, work: impl Fn(u64) -> Result<()>) -> Result<()> {
    for round in 1..=ROUNDS {
        work(round)?;
        watch(seen, 0, round)?;
    }
    Ok(())
}

/// Runs a requester against a watcher.
fn race(
    requester: impl FnOnce() -> Result<()> + std::marker::Send,
    watcher: impl FnOnce() -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        let requester = scope.spawn(requester);
        let watched = watcher();
        let requested = requester.join().unwrap_or_else(|_| Err(anyhow!("the requester panicked")));
        watched.and(requested)
    })
}

pub(crate) fn last_word_last() -> Result<()> {
    for len in LENGTHS {
        let (pair, seen) = (Pair::of(IBV_QPT_RC)?, Buffer::new(4096)?);
        let (a, b) = (&pair.a, &pair.b);
        let write = |round| {
            stamp(&a.buffer, AT, len, round);
            let (half, rest) = (len / 16 * 8, len - len / 16 * 8);
            // One element or two: it is the message that has an end.
            let mut work = Send::new(IBV_WR_RDMA_WRITE).remote(b.remote(AT));
            work.sges = if round % 2 == 0 {
                vec![a.sge(AT, len)]
            } else {
                vec![a.sge(AT, half), a.sge(AT + half, rest)]
            };
            a.execute(&work).map(drop)
        };
        race(
            || rounds(&seen, write),
            || {
                for round in 1..=ROUNDS {
                    watch(&b.buffer, AT + len - 8, round)?;
                    ensure_stamped(&b.buffer, AT, len, round, "a WRITE")?;
                    seen.word(0).store(round, Ordering::SeqCst);
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

pub(crate) fn one_store() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let stop = AtomicBool::new(false);
    race(
        || {
            for round in 1..=20_000_u64 {
                a.buffer.word(0).store(round << 32 | round, Ordering::SeqCst);
                a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(AT)))?;
            }
            stop.store(true, Ordering::SeqCst);
            Ok(())
        },
        || {
            let limit = Instant::now() + LIMIT;
            while !stop.load(Ordering::SeqCst) && Instant::now() < limit {
                let word = b.buffer.word(AT).load(Ordering::Relaxed);
                ensure!(word >> 32 == word & 0xffff_ffff, "half a word became visible: {word:#x}");
                thread::yield_now();
            }
            Ok(())
        },
    )
}

pub(crate) fn messages_after_writes() -> Result<()> {
    for (len, opcode) in
        LENGTHS.into_iter().zip([IBV_WR_SEND, IBV_WR_RDMA_WRITE_WITH_IMM].into_iter().cycle())
    {
        let (pair, seen) = (Pair::of(IBV_QPT_RC)?, Buffer::new(4096)?);
        let (a, b) = (&pair.a, &pair.b);
        let send = |round| {
            stamp(&a.buffer, AT, len, round);
            let write = Send::new(IBV_WR_RDMA_WRITE).flags(0).sge(a.sge(AT, len)).remote(b.remote(AT));
            a.qp.send_list(&[write, Send::new(opcode).sge(a.sge(AT, 8)).remote(b.remote(0))])?;
            a.send_cq.next()?.expect(IBV_WC_SUCCESS)
        };
        race(
            || rounds(&seen, send),
            || {
                for round in 1..=ROUNDS {
                    b.qp.recv(round, &[b.sge(64, 8)])?;
                    ensure!(b.received()?.wr_id == round, "another receive");
                    ensure_stamped(&b.buffer, AT, len, round, "the WRITE before a message")?;
                    seen.word(0).store(round, Ordering::SeqCst);
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}
