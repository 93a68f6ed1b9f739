//! Nothing is lost that is written into memory while it is registered and given back: by threads, by the kernel for
//! them, by a peer.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use super::memory::{PAGE, write_to};
use crate::{
    buffer::{Buffer, pattern},
    pair::{End, Pair},
    verbs::{ALL_ACCESS, Mr},
};

const RACE: Duration = Duration::from_secs(4);

/// Ends a race when its scope is left, however that is.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The writers' common ground: each has words of its own on every page.
struct Field<'a> {
    buffer: &'a Buffer,
    over: &'a AtomicBool,
}

impl Field<'_> {
    fn pages(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        (0..self.buffer.len()).step_by(PAGE)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// A thread that counts, by plain writes.
    fn count(&self, place: usize) -> Result<u64> {
        let mut round = 0;
        while !self.is_over() {
            for page in self.pages() {
                let word = self.buffer.word(page + place);
                let found = word.load(Ordering::Relaxed);
                ensure!(found == round, "a thread's write to {} is lost: {found} for {round}", page + place);
                word.store(round + 1, Ordering::Relaxed);
            }
            round += 1;
        }
        Ok(round)
    }

    /// A thread that has the kernel write.
    fn read(&self, place: usize, mut from: File) -> Result<u64> {
        for (round, page) in (1_u64..).zip(self.pages().cycle()) {
            let addr = self.buffer.addr() + page + place;
            // SAFETY: eight bytes of the live buffer that no other thread writes.
            let room = unsafe { std::slice::from_raw_parts_mut(addr as *mut u8, 8) };
            let got = from.read(room)?;
            if got == 0 {
                return Ok(round);
            }
            ensure!(got == 8, "a read of 8 bytes was cut short to {got}");
            let found = self.buffer.word(page + place).load(Ordering::Relaxed);
            ensure!(found == round, "what was read into {} is lost: {found} for {round}", page + place);
        }
        Ok(0)
    }

    fn feed(&self, mut to: File) -> Result<()> {
        for round in 1_u64..=u64::MAX {
            if self.is_over() {
                break;
            }
            to.write_all(&round.to_ne_bytes())?;
            if round % 32 == 0 {
                thread::sleep(Duration::from_micros(500));
            }
        }
        Ok(())
    }

    /// A peer that writes to a few bytes by a registration of their own.
    fn write_from(&self, peer: &End, mr: &Mr, at: usize, len: usize) -> Result<u64> {
        let mut round = 0;
        while !self.is_over() {
            let data = pattern(round, len);
            write_to(peer, self.buffer.addr() + at, mr.rkey(), &data)?;
            ensure!(self.buffer.read(at, len) == data, "a peer's write is lost in round {round}");
            round += 1;
        }
        Ok(round)
    }
}

pub(crate) fn none_loses_a_write() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let (buffer, over) = (Buffer::new(16 * PAGE)?, AtomicBool::new(false));
    let field = Field { buffer: &buffer, over: &over };
    let (reader, writer) = io::pipe()?;
    let (reader, writer) = (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)));
    // The peer's bytes lie across two pages, both owned in part.
    let (at, len) = (5 * PAGE - 100, 200);
    let own = Mr::new(&b.pd, buffer.addr() + at, len, ALL_ACCESS)?;
    thread::scope(|scope| {
        let field = &field;
        let ends = Ends(&over);
        let counters = [1024, 1536].map(|place| scope.spawn(move || field.count(place)));
        let reads = scope.spawn(move || field.read(2048, reader));
        let feeds = scope.spawn(move || field.feed(writer));
        let writes = scope.spawn(|| field.write_from(a, &own, at, len));
        let cycles = register_for_a_while(b, &buffer);
        drop(ends);
        let failed = |_| anyhow::anyhow!("a thread panicked");
        for counter in counters {
            ensure!(counter.join().map_err(failed)?? > 0, "a thread never ran");
        }
        feeds.join().map_err(failed)??;
        ensure!(
            reads.join().map_err(failed)?? > 0 && writes.join().map_err(failed)?? > 0,
            "nothing was written"
        );
        ensure!(cycles? > 0, "nothing was registered");
        Ok(())
    })
}

/// Registers and gives back: all of it, and parts that overlap.
fn register_for_a_while(end: &End, buffer: &Buffer) -> Result<usize> {
    let began = Instant::now();
    let mut cycles = 0;
    while began.elapsed() < RACE {
        let whole = Mr::new(&end.pd, buffer.addr(), buffer.len(), ALL_ACCESS)?;
        let part = Mr::new(&end.pd, buffer.addr() + 7 * PAGE + 9, 5 * PAGE, ALL_ACCESS)?;
        drop(whole);
        drop(part);
        cycles += 1;
    }
    Ok(cycles)
}
