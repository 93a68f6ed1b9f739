//! Memory whose pages somebody else holds in place: what they write arrives, whenever it is registered and given back.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use super::{
    Skip,
    memory::{PAGE, read_from, write_to},
};
use crate::{
    buffer::{Buffer, pattern},
    pair::Pair,
    ring::{Operation, Ring},
    verbs::{ALL_ACCESS, Mr},
};

const LEN: usize = 8 * PAGE;
const RACE: Duration = Duration::from_secs(2);

/// A file of the probe's own that is gone when it is closed.
fn file(flags: i32) -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("freeflow-probe-pinned-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).custom_flags(flags).open(&path);
    let _ = fs::remove_file(&path);
    file
}

/// What io_uring reads into the buffer is there for the program, and what it writes is what the program has.
fn transfers(ring: &Ring, buffer: &Buffer, file: &File, seed: u64) -> Result<Vec<u8>> {
    let data = pattern(seed, LEN);
    file.write_all_at(&data, 0)?;
    ring.execute(Operation::Read, file, buffer.addr(), LEN)?;
    ensure!(buffer.read(0, LEN) == data, "what io_uring read into its buffer is lost ({seed})");
    let other = pattern(seed + 1000, LEN);
    buffer.write(0, &other);
    ring.execute(Operation::Write, file, buffer.addr(), LEN)?;
    let mut found = vec![0; LEN];
    file.read_exact_at(&mut found, 0)?;
    ensure!(found == other, "io_uring wrote other bytes than the program's ({seed})");
    Ok(other)
}

pub(crate) fn registered_with_io_uring() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let ring = match Ring::new() {
        Ok(ring) => ring,
        Err(error) => return Err(Skip(format!("no io_uring here: {error}")).into()),
    };
    let (buffer, file) = (Buffer::new(LEN)?, file(0)?);
    buffer.fill(0, LEN, 1);
    let register = || Mr::new(&b.pd, buffer.addr() + 100, LEN - 200, ALL_ACCESS);
    let pin = || match ring.register(&buffer) {
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
            Err(anyhow::Error::from(Skip("ulimit -l permits no registered buffer".to_owned())))
        }
        other => other.context("the buffer cannot be registered with io_uring"),
    };
    // The peer sees what io_uring brought, and the other way round.
    let meets = |mr: &Mr, seed: u64| -> Result<()> {
        let there = transfers(&ring, &buffer, &file, seed)?;
        let seen = read_from(a, buffer.addr() + 100, mr.rkey(), LEN - 200)?;
        ensure!(seen == there[100..LEN - 100], "the peer sees other bytes ({seed})");
        let data = pattern(seed + 2000, LEN - 200);
        write_to(a, buffer.addr() + 100, mr.rkey(), &data)?;
        ring.execute(Operation::Write, &file, buffer.addr(), LEN)?;
        let mut found = vec![0; LEN - 200];
        file.read_exact_at(&mut found, 100)?;
        ensure!(found == data, "io_uring does not see what the peer wrote ({seed})");
        Ok(())
    };
    for round in 0..3 {
        // Pinned first.
        pin()?;
        let mr = register()?;
        meets(&mr, 10 * round)?;
        drop(mr);
        transfers(&ring, &buffer, &file, 10 * round + 1)?;
        ring.unregister()?;
        // Registered first, and given back while it is pinned.
        let mr = register()?;
        pin()?;
        meets(&mr, 10 * round + 2)?;
        drop(mr);
        transfers(&ring, &buffer, &file, 10 * round + 3)?;
        let mr = register()?;
        meets(&mr, 10 * round + 4)?;
        ring.unregister()?;
        // And in between.
        meets_without(&pair, &buffer, &mr, round)?;
        drop(mr);
    }
    // Nothing is pinned any more: the memory becomes the program's own again.
    drop(register()?);
    buffer.advise(0, LEN, libc::MADV_DONTNEED)?;
    ensure!(buffer.read(0, LEN).iter().all(|&byte| byte == 0), "the memory is not private again");
    Ok(())
}

/// The MR lives, the ring's registration does not.
fn meets_without(pair: &Pair, buffer: &Buffer, mr: &Mr, seed: u64) -> Result<()> {
    let data = pattern(seed, LEN - 200);
    write_to(&pair.a, buffer.addr() + 100, mr.rkey(), &data)?;
    ensure!(buffer.read(100, LEN - 200) == data, "a peer's write is lost ({seed})");
    Ok(())
}

/// A thread reads a file past the page cache into the buffer, which is registered and given back meanwhile.
pub(crate) fn direct_reads() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let data: Vec<u8> = (0..16).flat_map(|seed| pattern(seed, LEN)).collect();
    let source = match file(libc::O_DIRECT) {
        Ok(source) => source,
        Err(error) => return Err(Skip(format!("O_DIRECT in the temporary folder: {error}")).into()),
    };
    let (aligned, buffer) = (Buffer::new(data.len())?, Buffer::new(LEN)?);
    aligned.write(0, &data);
    // SAFETY: the whole mapping, which nobody changes.
    let whole = unsafe { std::slice::from_raw_parts(aligned.addr() as *const u8, data.len()) };
    source.write_all_at(whole, 0).context("O_DIRECT write")?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reads = scope.spawn(|| -> Result<u64> {
            let mut round = 0_u64;
            while !over.load(Ordering::Acquire) {
                let at = round as usize % 16 * LEN;
                // SAFETY: the live buffer, into which nobody else writes.
                let room = unsafe { std::slice::from_raw_parts_mut(buffer.addr() as *mut u8, LEN) };
                source.read_exact_at(room, at as u64)?;
                ensure!(buffer.read(0, LEN) == data[at..at + LEN], "read {round} is lost");
                round += 1;
            }
            Ok(round)
        });
        let (began, mut cycles) = (Instant::now(), 0);
        let registered = loop {
            match Mr::new(&pair.b.pd, buffer.addr(), LEN, ALL_ACCESS) {
                Ok(mr) => drop(mr),
                Err(error) => break Err(error),
            }
            cycles += 1;
            if began.elapsed() > RACE || reads.is_finished() {
                break Ok(());
            }
        };
        over.store(true, Ordering::Release);
        let reads = reads.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        registered?;
        ensure!(reads > 0 && cycles > 0, "{reads} reads, {cycles} registrations");
        Ok(())
    })
}
