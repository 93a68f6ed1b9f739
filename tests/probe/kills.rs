//! Processes that are killed at random moments, and one that survives them all.
//!
//! The parent opens no device. It forks one survivor, and for each round a victim that it kills. Both ends run SEND,
//! WRITE, WRITE_WITH_IMM, READ and atomics against each other without a pause; `survivor` and `victim` say what must
//! be true of them. Does: processes, time and chance. The same seed makes the same rounds.

mod survivor;
mod traffic;
mod victim;

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{end_after, pair::Address, verbs};

/// A round's longest life after it began, then the victim dies.
const LONGEST: u64 = 3_000;
/// How long a survivor may take to see the end of a round, all told.
const HANG: Duration = Duration::from_secs(5);

/// How the ends find each other, as it crosses a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Card {
    gid: [u8; 16],
    qpn: u32,
    rkey: u32,
    addr: u64,
}

impl Card {
    fn address(&self) -> Address {
        Address { gid: self.gid, qpn: self.qpn }
    }
}

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

/// One end of a socket that keeps messages apart.
#[derive(Debug)]
struct Socket(OwnedFd);

fn socket_pair() -> Result<(Socket, Socket)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let code = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    ensure!(code == 0, "socketpair: {}", io::Error::last_os_error());
    // SAFETY: two new descriptors that nobody else owns.
    Ok(unsafe { (Socket(OwnedFd::from_raw_fd(fds[0])), Socket(OwnedFd::from_raw_fd(fds[1]))) })
}

impl Socket {
    fn send<T: Copy>(&self, value: &T) -> Result<()> {
        // SAFETY: the bytes of a value without padding, alive during the call.
        let sent = unsafe {
            let bytes = (&raw const *value).cast();
            libc::send(self.0.as_raw_fd(), bytes, size_of::<T>(), libc::MSG_NOSIGNAL)
        };
        ensure!(sent == size_of::<T>() as isize, "send: {}", io::Error::last_os_error());
        Ok(())
    }

    /// The next message; nothing where none comes in time. The end of the other side is an error.
    fn receive<T: Copy + Default>(&self, patience: Duration) -> Result<Option<T>> {
        if !verbs::readable(self.0.as_raw_fd(), patience) {
            return Ok(None);
        }
        let mut value = T::default();
        // SAFETY: room for the value, whose every bit pattern is valid: all are numbers.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), (&raw mut value).cast(), size_of::<T>(), 0) };
        if got != size_of::<T>() as isize {
            bail!("the other side is gone ({got})");
        }
        Ok(Some(value))
    }
}

/// A child that does this and exits: 0, or 1 after it said what is wrong.
fn fork_into(work: impl FnOnce() -> Result<()>) -> Result<i32> {
    let parent = std::process::id();
    // SAFETY: this process has one thread and no opened device: the child may go on as it likes.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid > 0 {
        return Ok(pid);
    }
    // SAFETY: plain system calls; nobody is left behind when the parent is killed.
    let orphan = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid() as u32 != parent
    };
    let code = match (orphan, work()) {
        (false, Ok(())) => 0,
        (true, _) => 2,
        (false, Err(error)) => {
            eprintln!("freeflow-probe: {error:#}");
            1
        }
    };
    // SAFETY: ends the child without running the parent's destructors.
    unsafe { libc::_exit(code) }
}

fn kill(pid: i32) {
    // SAFETY: a child that was not waited for, so the number is its.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

fn wait(pid: i32) -> Result<i32> {
    let mut status = 0;
    // SAFETY: a child of ours; the result is ours.
    ensure!(unsafe { libc::waitpid(pid, &mut status, 0) } == pid, "waitpid: {}", io::Error::last_os_error());
    Ok(status)
}
