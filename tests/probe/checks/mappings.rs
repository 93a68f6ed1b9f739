//! Registered memory of every kind, and what the program does to its mappings under a live MR.

use std::{
    fs, io, ptr,
    sync::atomic::{Ordering, fence},
};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use super::{
    Skip,
    memory::{PAGE, read_from, write_to},
};
use crate::{
    buffer::{Buffer, pattern},
    pair::{End, Pair, Setup},
    verbs::{ALL_ACCESS, Context, Mr, Pd},
};

const READ: i32 = libc::PROT_READ;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_ANONYMOUS;

/// A peer can write to all of `memory` and read it; nothing else changes.
fn serves(pair: &Pair, what: &str, memory: &Buffer) -> Result<()> {
    let (a, b) = (&pair.a, &pair.b);
    let (at, len) = (3, memory.len() - 7);
    memory.fill(0, memory.len(), 0x6e);
    let mr = Mr::new(&b.pd, memory.addr() + at, len, ALL_ACCESS).with_context(|| what.to_owned())?;
    for round in 0..3 {
        let data = pattern(round, len);
        write_to(a, memory.addr() + at, mr.rkey(), &data)?;
        ensure!(memory.read(at, len) == data, "WRITE to {what}");
        ensure!(read_from(a, memory.addr() + at, mr.rkey(), len)? == data, "READ of {what}");
    }
    let data = memory.read(at, len);
    drop(mr);
    ensure!(memory.read(at, len) == data, "deregistration changed {what}");
    let (before, behind) = (memory.read(0, at), memory.read(at + len, memory.len() - at - len));
    ensure!(before.iter().chain(&behind).all(|&byte| byte == 0x6e), "a neighbour in {what} changed");
    Ok(())
}

fn file_of(len: usize) -> Result<fs::File> {
    // SAFETY: a C string; the descriptor is new and this program's own.
    let file = unsafe {
        let fd = libc::memfd_create(c"probe".as_ptr(), libc::MFD_CLOEXEC);
        ensure!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
        <fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd)
    };
    file.set_len(len as u64)?;
    Ok(file)
}

pub(crate) fn shared_and_files() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let len = 6 * PAGE;
    serves(&pair, "shared anonymous memory", &Buffer::map(len, BOTH, libc::MAP_SHARED | ANONYMOUS, None)?)?;
    for (what, flags) in [("a shared mapping", libc::MAP_SHARED), ("a private mapping", libc::MAP_PRIVATE)] {
        let memory_file = file_of(len)?;
        serves(&pair, &format!("{what} of a memfd"), &Buffer::map(len, BOTH, flags, Some(&memory_file))?)?;
        let path = std::env::temp_dir().join(format!("freeflow-probe-{}", std::process::id()));
        let file = fs::File::options().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        file.set_len(len as u64)?;
        serves(&pair, &format!("{what} of a file"), &Buffer::map(len, BOTH, flags, Some(&file))?)?;
    }
    // What a peer wrote to a shared mapping is in the file.
    let file = file_of(len)?;
    let memory = Buffer::map(len, BOTH, libc::MAP_SHARED, Some(&file))?;
    let mr = Mr::new(&pair.b.pd, memory.addr(), len, ALL_ACCESS)?;
    write_to(&pair.a, memory.addr() + PAGE - 3, mr.rkey(), b"through")?;
    let mut seen = [0; 7];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, PAGE as u64 - 3)?;
    ensure!(&seen == b"through", "the file holds {seen:?}");
    // A file that may only be read can be read by a peer, and not registered for writing.
    let memory = Buffer::map(len, READ, libc::MAP_SHARED, Some(&file))?;
    let code = Mr::new(&pair.b.pd, memory.addr(), len, ALL_ACCESS).err().map(|error| error.code);
    ensure!(code == Some(libc::EFAULT), "LOCAL_WRITE on a read-only file: {code:?}");
    let mr = Mr::new(&pair.b.pd, memory.addr(), len, IBV_ACCESS_REMOTE_READ)?;
    ensure!(
        read_from(&pair.a, memory.addr() + PAGE - 3, mr.rkey(), 7)? == b"through",
        "READ of a read-only file"
    );
    Ok(())
}

pub(crate) fn huge_pages() -> Result<()> {
    const HUGE: usize = 2 << 20;
    // Transparent ones, where the kernel gives them.
    let memory = Buffer::new(4 * HUGE)?;
    let _ = memory.advise(0, memory.len(), libc::MADV_HUGEPAGE);
    let small = Setup { buffer: 8 << 20, ..Setup::new(IBV_QPT_RC) };
    serves(&Pair::new(&small)?, "transparent huge pages", &memory)?;
    for (what, kind) in [("huge pages", libc::MAP_PRIVATE), ("shared huge pages", libc::MAP_SHARED)] {
        let Ok(memory) = Buffer::map(2 * HUGE, BOTH, kind | ANONYMOUS | libc::MAP_HUGETLB, None) else {
            return Err(Skip("no huge pages are set aside (vm.nr_hugepages)".to_owned()).into());
        };
        serves(&Pair::new(&small)?, what, &memory)?;
    }
    Ok(())
}

/// Bytes of this process that are locked into memory.
fn locked() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).context("no VmLck")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? << 10)
}

pub(crate) fn locked_memory() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let memory = Buffer::new(8 * PAGE)?;
    // SAFETY: the own mapping.
    if unsafe { libc::mlock(memory.addr() as *const libc::c_void, memory.len()) } != 0 {
        return Err(Skip(format!("mlock: {}", io::Error::last_os_error())).into());
    }
    let before = locked()?;
    for round in 0..3 {
        let mr = Mr::new(&pair.b.pd, memory.addr(), memory.len(), ALL_ACCESS)?;
        ensure!(locked()? == before, "registered, {} of {before} bytes are locked", locked()?);
        let data = pattern(round, 5 * PAGE);
        write_to(&pair.a, memory.addr() + 77, mr.rkey(), &data)?;
        drop(mr);
        ensure!(locked()? == before, "given back, {} of {before} bytes are locked", locked()?);
        ensure!(memory.read(77, data.len()) == data, "the bytes changed");
    }
    serves(&pair, "locked memory", &memory)
}

pub(crate) fn no_locking() -> Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a live structure; only this process is limited.
    ensure!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &none) } == 0, "setrlimit");
    // Root may lock beyond the limit; what is not locked at all needs no right.
    let before = locked()?;
    let pair = Pair::of(IBV_QPT_RC)?;
    let memory = Buffer::new(256 << 20)?;
    let mr = Mr::new(&pair.b.pd, memory.addr(), memory.len(), ALL_ACCESS)?;
    write_to(&pair.a, memory.addr() + (200 << 20), mr.rkey(), b"unlocked")?;
    ensure!(memory.read(200 << 20, 8) == b"unlocked", "WRITE");
    ensure!(locked()? == before, "{} bytes were locked", locked()?);
    Ok(())
}

/// Maps fresh private memory in the place of a part of `memory`.
fn map_anew(memory: &Buffer, at: usize, len: usize) -> Result<()> {
    let flags = libc::MAP_PRIVATE | ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: a part of the own mapping.
    let mapped = unsafe { libc::mmap((memory.addr() + at) as *mut libc::c_void, len, BOTH, flags, -1, 0) };
    ensure!(mapped != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    Ok(())
}

pub(crate) fn mapped_anew() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let memory = Buffer::new(16 * PAGE)?;
    memory.fill(0, memory.len(), 1);
    let old = Mr::new(&b.pd, memory.addr(), memory.len(), ALL_ACCESS)?;
    // The MR keeps the old pages; the new ones are the program's alone.
    map_anew(&memory, 4 * PAGE, 8 * PAGE)?;
    memory.fill(4 * PAGE, 8 * PAGE, 2);
    write_to(a, memory.addr() + 5 * PAGE, old.rkey(), &[3; 100])?;
    ensure!(read_from(a, memory.addr() + 5 * PAGE, old.rkey(), 100)? == [3; 100], "the MR lost its pages");
    ensure!(
        memory.read(4 * PAGE, 8 * PAGE).iter().all(|&byte| byte == 2),
        "an MR of before reaches new memory"
    );
    memory.advise(4 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    ensure!(memory.read(4 * PAGE, PAGE).iter().all(|&byte| byte == 0), "new memory is not private");
    // What is left of the old mapping is reached as before.
    write_to(a, memory.addr(), old.rkey(), &[4; 100])?;
    ensure!(memory.read(0, 100) == [4; 100], "what was not mapped anew is out of reach");
    // A new MR has the new pages.
    let new = Mr::new(&b.pd, memory.addr(), memory.len(), ALL_ACCESS)?;
    write_to(a, memory.addr() + 6 * PAGE, new.rkey(), &[5; 100])?;
    ensure!(memory.read(6 * PAGE, 100) == [5; 100], "a new MR reaches other pages");
    let all = memory.read(0, memory.len());
    drop(old);
    ensure!(memory.read(0, memory.len()) == all, "the old MR's end changed new memory");
    write_to(a, memory.addr() + 6 * PAGE, new.rkey(), &[6; 100])?;
    ensure!(memory.read(6 * PAGE, 100) == [6; 100], "the old MR's end cut the new one off");
    drop(new);
    memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
    ensure!(memory.read(0, memory.len()).iter().all(|&byte| byte == 0), "MADV_DONTNEED left data");
    Ok(())
}

pub(crate) fn unmapped_and_moved() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let (memory, elsewhere) = (Buffer::new(8 * PAGE)?, Buffer::new(8 * PAGE)?);
    memory.fill(0, memory.len(), 1);
    let mr = Mr::new(&b.pd, memory.addr(), memory.len(), ALL_ACCESS)?;
    // The program takes half of it elsewhere and gives a page back.
    // SAFETY: both are own mappings; `map_anew` fills the hole again.
    let moved = unsafe {
        let (from, to) = (memory.addr() as *mut libc::c_void, elsewhere.addr() as *mut libc::c_void);
        libc::mremap(from, 4 * PAGE, 4 * PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)
    };
    ensure!(moved as usize == elsewhere.addr(), "mremap: {}", io::Error::last_os_error());
    map_anew(&memory, 0, 4 * PAGE)?;
    map_anew(&memory, 6 * PAGE, PAGE)?;
    memory.fill(0, 4 * PAGE, 2);
    write_to(a, memory.addr() + PAGE, mr.rkey(), &[3; 50])?;
    ensure!(elsewhere.read(PAGE, 50) == [3; 50], "the MR follows its pages");
    ensure!(memory.read(0, 4 * PAGE).iter().all(|&byte| byte == 2), "an MR of before reaches new memory");
    drop(mr);
    ensure!(
        elsewhere.read(PAGE, 50) == [3; 50] && elsewhere.read(0, PAGE)[0] == 1,
        "mremapped memory changed"
    );
    ensure!(memory.read(0, 4 * PAGE).iter().all(|&byte| byte == 2), "new memory changed");
    ensure!(memory.read(5 * PAGE, PAGE).iter().all(|&byte| byte == 1), "memory that stayed changed");
    elsewhere.advise(0, 4 * PAGE, libc::MADV_DONTNEED)?;
    ensure!(elsewhere.read(PAGE, 50) == [0; 50], "MADV_DONTNEED left data");
    Ok(())
}

pub(crate) fn two_devices() -> Result<()> {
    let setup = Setup::new(IBV_QPT_RC);
    let (one, two) = (Pair::new(&setup)?, Pair::new(&setup)?);
    let memory = Buffer::new(9 * PAGE)?;
    let register = |end: &End| Mr::new(&end.pd, memory.addr() + 1, memory.len() - 2, ALL_ACCESS);
    for round in 0..6 {
        let (first, second) = (register(&one.b)?, register(&two.b)?);
        let (data, newer) = (pattern(round, 5 * PAGE), pattern(round + 50, 5 * PAGE));
        write_to(&one.a, memory.addr() + 9, first.rkey(), &data)?;
        ensure!(
            read_from(&two.a, memory.addr() + 9, second.rkey(), data.len())? == data,
            "READ by the other"
        );
        // Either may go first.
        let (gone, left) = if round % 2 == 0 { (first, (&two.a, second)) } else { (second, (&one.a, first)) };
        drop(gone);
        write_to(left.0, memory.addr() + 9, left.1.rkey(), &newer)?;
        ensure!(memory.read(9, newer.len()) == newer, "the device that is left writes elsewhere");
        drop(left);
        ensure!(memory.read(9, newer.len()) == newer, "the last deregistration changed the data");
    }
    memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
    ensure!(memory.read(0, memory.len()).iter().all(|&byte| byte == 0), "MADV_DONTNEED left data");
    // Also two PDs of one device, with MRs of their own.
    let context = Context::open()?;
    let pds = [Pd::new(&context)?, Pd::new(&context)?];
    let mrs = pds.iter().map(|pd| Mr::new(pd, memory.addr(), memory.len(), ALL_ACCESS));
    ensure!(mrs.collect::<Result<Vec<_>, _>>()?.len() == 2, "one MR for each");
    Ok(())
}

/// Each page is an MR of its own.
pub(crate) fn crowd_of_neighbours() -> Result<()> {
    crowd(PAGE, PAGE)
}

/// Between any two MRs lies a page that is none.
pub(crate) fn scattered_crowd() -> Result<()> {
    crowd(2 * PAGE, PAGE)
}

/// A few bytes of every other page.
pub(crate) fn crowd_of_bytes() -> Result<()> {
    crowd(2 * PAGE, 40)
}

fn crowd(stride: usize, len: usize) -> Result<()> {
    const COUNT: usize = 30_000;
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let most = b.context.device_attr()?.max_mr as usize;
    if most < COUNT + 16 {
        return Err(Skip(format!("the device has room for {most} MRs")).into());
    }
    let memory = Buffer::new(COUNT * stride)?;
    let place = |n: usize| memory.addr() + n * stride;
    let register = |n| Mr::new(&b.pd, place(n), len, ALL_ACCESS).with_context(|| format!("MR {n}"));
    let mrs = (0..COUNT).map(register).collect::<Result<Vec<_>>>()?;
    let some = || (0..COUNT).step_by(501).chain([COUNT - 1]);
    let data = |n: usize| pattern(n as u64, len.min(100));
    for n in some() {
        write_to(a, place(n), mrs[n].rkey(), &data(n))?;
        ensure!(memory.read(n * stride, data(n).len()) == data(n), "WRITE to MR {n}");
    }
    // The program itself can still map as it likes.
    let page = |_| Buffer::map(PAGE, READ, libc::MAP_SHARED | ANONYMOUS, None);
    drop((0..2000).map(page).collect::<Result<Vec<_>>>()?);
    drop(mrs);
    for n in some() {
        ensure!(memory.read(n * stride, data(n).len()) == data(n), "MR {n} lost its data at the end");
    }
    Ok(())
}

/// Blocks of all sizes from the allocator, registered, written to by a peer, given back and freed, while others live;
/// `calloc` must bring zeros, and no block may change under its owner.
pub(crate) fn allocator() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let sizes = [40, 1000, 5000, PAGE, 3 * PAGE, 40_000, 130_000, 300_000, 1_000_000];
    let mut kept: Vec<(*mut u8, usize, u8)> = Vec::new();
    for round in 0..90_usize {
        let size = sizes[round % sizes.len()] + round;
        // SAFETY: any size may be asked for.
        let block = unsafe { libc::calloc(1, size).cast::<u8>() };
        ensure!(!block.is_null(), "calloc({size})");
        ensure!(
            bytes(block, size).iter().all(|&byte| byte == 0),
            "calloc({size}) brought old bytes, in round {round}"
        );
        let mr = Mr::new(&b.pd, block as usize, size, ALL_ACCESS)?;
        let data = pattern(round as u64, size);
        write_to(a, block as usize, mr.rkey(), &data)?;
        ensure!(bytes(block, size) == data, "WRITE to a block of {size} bytes");
        drop(mr);
        // SAFETY: the own block.
        unsafe { ptr::write_bytes(block, round as u8, size) };
        kept.push((block, size, round as u8));
        if kept.len() > 12 {
            let (block, size, byte) = kept.swap_remove(round * 7 % kept.len());
            ensure!(bytes(block, size).iter().all(|&found| found == byte), "a block changed under its owner");
            // SAFETY: from calloc, and freed once.
            unsafe { libc::free(block.cast()) };
        }
        if round % 20 == 0 {
            // SAFETY: the C library's own; it gives back what other allocators do by themselves.
            unsafe { libc::malloc_trim(0) };
        }
    }
    Ok(())
}

fn bytes(block: *const u8, len: usize) -> Vec<u8> {
    fence(Ordering::SeqCst);
    let mut bytes = vec![0; len];
    // SAFETY: callers pass live blocks of that length.
    unsafe { ptr::copy_nonoverlapping(block, bytes.as_mut_ptr(), len) };
    bytes
}
