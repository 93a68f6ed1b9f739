//! Traffic in both directions for a while, every message checked: nothing lost, nothing twice, nothing out of order.

use std::{
    io::Write,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use verbs_abi::ffi::*;

use crate::{
    pair::{End, Pair},
    qp::Send,
};

/// Bytes of a buffer that belong to one direction.
const HALF: usize = 1 << 19;
/// Where things lie in a half: what is written from, what is written to, what is added to, what was there.
const SOURCE: usize = 0;
const TARGET: usize = 1 << 16;
const COUNTER: usize = 1 << 17;
const FETCHED: usize = 1 << 18;
const LEN: usize = 4096;

/// Two connected QPs of two opened devices, in each direction as many rounds as fit into the time.
pub(crate) fn run(time: Duration) -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    println!("READY");
    std::io::stdout().flush()?;
    let until = Instant::now() + time;
    let rounds = thread::scope(|scope| {
        let flows = [(a, b, 0), (b, a, HALF)];
        let threads = flows.map(|(from, to, half)| scope.spawn(move || flow(from, to, half, until)));
        threads.map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a direction panicked"))))
    });
    for rounds in rounds {
        println!("{} rounds", rounds?);
    }
    Ok(())
}

fn flow(from: &End, to: &End, half: usize, until: Instant) -> Result<u64> {
    let mut number = 0;
    while Instant::now() < until {
        number += 1;
        round(from, to, half, number).map_err(|error| error.context(format!("round {number}")))?;
    }
    let counted = to.buffer.word(half + COUNTER).load(Ordering::Acquire);
    ensure!(counted == number, "{counted} additions were executed of {number}");
    Ok(number)
}

/// A WRITE, an addition and a SEND at once, then what became of them.
fn round(from: &End, to: &End, half: usize, number: u64) -> Result<()> {
    to.qp.recv(number, &[])?;
    for at in (0..LEN).step_by(8) {
        from.buffer.word(half + SOURCE + at).store(number, Ordering::Relaxed);
    }
    let write = Send::new(IBV_WR_RDMA_WRITE)
        .flags(0)
        .sge(from.sge(half + SOURCE, LEN))
        .remote(to.remote(half + TARGET));
    let mut add = Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD)
        .id(number)
        .sge(from.sge(half + FETCHED, 8))
        .remote(to.remote(half + COUNTER));
    add.compare_add = 1;
    let tell = Send::new(IBV_WR_SEND_WITH_IMM).id(number).imm(number as u32);
    from.qp.send_list(&[write, add, tell])?;
    for opcode in [IBV_WC_FETCH_ADD, IBV_WC_SEND] {
        let wc = from.send_cq.next()?;
        wc.expect(IBV_WC_SUCCESS)?;
        ensure!((wc.wr_id, wc.opcode) == (number, opcode), "{wc:?}");
    }
    let wc = to.received()?;
    ensure!((wc.wr_id, wc.imm) == (number, number as u32), "{wc:?}");
    let fetched = from.buffer.word(half + FETCHED).load(Ordering::Acquire);
    ensure!(fetched == number - 1, "fetched {fetched}");
    for at in (0..LEN).step_by(8) {
        let word = to.buffer.word(half + TARGET + at).load(Ordering::Relaxed);
        ensure!(word == number, "{word} at {at}");
    }
    Ok(())
}
