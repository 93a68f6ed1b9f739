//! Processes that are killed at random moments, and one that survives them all.
//!
//! The parent opens no device. It forks one survivor, and for each round a victim that it kills. Both ends run SEND,
//! WRITE, WRITE_WITH_IMM, READ and atomics against each other without a pause; `survivor` and `victim` say what must
//! be true of them. Does: processes, time and chance. The same seed makes the same rounds.

mod survivor;
mod traffic;
mod victim;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{
    end_after,
    family::{Card, Socket, fork_into, kill, socket_pair, wait},
    verbs,
};

/// A round's longest life after it began, then the victim dies.
const LONGEST: u64 = 3_000;
/// How long a survivor may take to see the end of a round, all told.
const HANG: Duration = Duration::from_secs(5);

/// What the survivor saw in one round, or in all.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Messages of the victim that arrived.
    received: u64,
    /// Own requests that succeeded.
    succeeded: u64,
    /// Own requests that ended in RETRY_EXC.
    retry_exc: u64,
    /// Own requests and receives that were flushed.
    flushed: u64,
    /// How long the round took, in microseconds.
    micros: u64,
}

/// What the parent tells the survivor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Start {
    /// 1: make a QP; 2: here is the victim; 3: there is none this time; 4: that is all.
    what: u64,
    card: Card,
}

const MAKE: u64 = 1;
const CONNECT: u64 = 2;
const GIVE_UP: u64 = 3;
const FINISH: u64 = 4;

/// Performs the rounds and prints what came of them as one line of JSON.
pub(crate) fn run(rounds: u64, seed: u64) -> Result<()> {
    end_after(Duration::from_secs(60 + rounds));
    // libibverbs is initialised once, here; the device is opened by children only.
    verbs::find_device()?;
    let mut chance = Chance(seed);
    let (socket, theirs) = socket_pair()?;
    let survivor = fork_into(|| survivor::run(&theirs))?;
    drop(theirs);
    let begin = Instant::now();
    let (mut sum, mut connected, mut longest) = (Tally::default(), 0, 0);
    for round in 0..rounds {
        let tally = perform(&socket, &mut chance)
            .with_context(|| format!("round {round} of seed {seed}"))
            .inspect_err(|_| kill(survivor))?;
        connected += u64::from(tally.is_some());
        let tally = tally.unwrap_or_default();
        sum.received += tally.received;
        sum.succeeded += tally.succeeded;
        sum.retry_exc += tally.retry_exc;
        sum.flushed += tally.flushed;
        longest = longest.max(tally.micros);
    }
    socket.send(&Start { what: FINISH, card: Card::default() })?;
    ensure!(wait(survivor)? == 0, "the survivor failed at its end");
    println!(
        "{{\"rounds\":{rounds},\"connected\":{connected},\"received\":{},\"succeeded\":{},\"retry_exc\":{},\
         \"flushed\":{},\"longest_ms\":{:.1},\"seconds\":{:.1}}}",
        sum.received,
        sum.succeeded,
        sum.retry_exc,
        sum.flushed,
        longest as f64 / 1e3,
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

/// One victim's life; nothing where it died before it was connected.
fn perform(socket: &Socket, chance: &mut Chance) -> Result<Option<Tally>> {
    socket.send(&Start { what: MAKE, card: Card::default() })?;
    let card: Card = socket.receive(HANG)?.context("the survivor made no QP")?;
    let (line, theirs) = socket_pair()?;
    let victim = fork_into(|| victim::run(&theirs, &card))?;
    drop(theirs);
    // A quarter die somewhere on their way, the others under traffic.
    let patience = if chance.next().is_multiple_of(4) { chance.micros() } else { HANG };
    let met: Option<Card> = line.receive(patience).inspect_err(|_| kill(victim))?;
    let start = match met {
        Some(card) => Start { what: CONNECT, card },
        None => Start { what: GIVE_UP, card: Card::default() },
    };
    socket.send(&start)?;
    if met.is_some() {
        std::thread::sleep(chance.micros());
    }
    kill(victim);
    let status = wait(victim)?;
    ensure!(libc::WIFSIGNALED(status), "the victim found something wrong: wait status {status:#x}");
    ensure!(met.is_some() || patience < HANG, "the victim was not connected within {HANG:?}");
    let tally: Tally = socket.receive(HANG)?.context("the survivor hangs, or failed")?;
    Ok(met.map(|_| tally))
}

/// A small generator of random numbers (splitmix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn micros(&mut self) -> Duration {
        Duration::from_micros(self.next() % LONGEST)
    }
}
