//! Registered memory stays the program's own: with neighbours, through fork, after deregistration.

use std::{
    io,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::{Buffer, pattern},
    library::library,
    pair::{End, Pair, Setup},
    qp::Send,
    verbs::{ALL_ACCESS, Mr},
};

pub(super) const PAGE: usize = 4096;

/// Brings bytes from one end's own buffer into memory of the other by a WRITE.
pub(crate) fn write_to(from: &End, addr: usize, rkey: u32, bytes: &[u8]) -> Result<()> {
    from.buffer.write(0, bytes);
    from.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(from.sge(0, bytes.len())).remote((addr as u64, rkey)))?;
    Ok(())
}

/// Fetches bytes of the other end by a READ.
pub(crate) fn read_from(from: &End, addr: usize, rkey: u32, len: usize) -> Result<Vec<u8>> {
    from.buffer.fill(0, len, 0);
    from.execute(&Send::new(IBV_WR_RDMA_READ).sge(from.sge(0, len)).remote((addr as u64, rkey)))?;
    Ok(from.buffer.read(0, len))
}

pub(crate) fn beyond_4_gib() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let len = (5 << 30) + 12_345;
    let huge = Buffer::new(len)?;
    huge.write(len - 100, &[7; 100]);
    let mr = Mr::new(&b.pd, huge.addr(), len, ALL_ACCESS)?;
    for at in [0, (1 << 32) - 50, (4 << 30) + 4096, len - 3000] {
        let data = pattern(at as u64, 2900);
        write_to(a, huge.addr() + at, mr.rkey(), &data)?;
        ensure!(huge.read(at, 2900) == data, "what was written at {at} is not there");
        ensure!(
            read_from(a, huge.addr() + at, mr.rkey(), 2900)? == data,
            "READ at {at} brings something else"
        );
    }
    ensure!(huge.read(len - 100, 100) == [7; 100], "a neighbour changed");
    let past =
        Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(((huge.addr() + len - 4) as u64, mr.rkey()));
    a.qp.send(&past)?;
    a.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)
}

/// A heap block whose registered middle has live neighbours on its first and last page.
struct Neighbours {
    block: Vec<u8>,
    start: usize,
    len: usize,
}

impl Neighbours {
    fn new() -> Self {
        let (start, len) = (1000, 10 * PAGE + 77);
        let mut block = vec![0x6e; start + len + 3000];
        block[start..start + len].copy_from_slice(&pattern(1, len));
        Self { block, start, len }
    }

    fn register(&self, end: &End) -> Result<Mr> {
        Ok(Mr::new(&end.pd, self.block.as_ptr() as usize + self.start, self.len, ALL_ACCESS)?)
    }

    fn addr(&self) -> usize {
        self.block.as_ptr() as usize + self.start
    }

    /// Reads past what the compiler believes to know of the block.
    fn bytes(&self) -> Vec<u8> {
        // SAFETY: bytes of a live block; volatile, for the device wrote them.
        self.block.iter().map(|byte| unsafe { std::ptr::read_volatile(byte) }).collect()
    }

    fn expect(&self, data: &[u8]) -> Result<()> {
        let bytes = self.bytes();
        let (before, rest) = bytes.split_at(self.start);
        let (inside, behind) = rest.split_at(self.len);
        ensure!(before.iter().chain(behind).all(|&byte| byte == 0x6e), "a neighbour changed");
        ensure!(inside == data, "the registered bytes are others");
        Ok(())
    }
}

/// The same as [`fork`], for a program that asks libibverbs to keep registered memory from its children.
pub(crate) fn fork_init() -> Result<()> {
    // SAFETY: no argument; before the first device is looked for, as it must be.
    crate::verbs::check("ibv_fork_init", unsafe { (library().ibv_fork_init)() })?;
    fork()
}

pub(crate) fn fork() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    for round in 0..10 {
        let mut memory = Neighbours::new();
        let mr = memory.register(b)?;
        let data = pattern(round, memory.len);
        write_to(a, memory.addr(), mr.rkey(), &data)?;
        // SAFETY: the child only looks at memory, writes to its own copy and exits.
        let child = unsafe { libc::fork() };
        ensure!(child >= 0, "fork: {}", io::Error::last_os_error());
        if child == 0 {
            let seen = memory.expect(&data).is_ok();
            memory.block.fill(0xcc);
            let kept = memory.bytes().iter().all(|&byte| byte == 0xcc);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(if seen { i32::from(!kept) } else { 2 }) };
        }
        // Meanwhile the device goes on writing to the parent.
        let newer = pattern(round + 100, memory.len);
        write_to(a, memory.addr(), mr.rkey(), &newer)?;
        let mut status = 0;
        // SAFETY: the child is ours and was not waited for.
        let ended = unsafe { libc::waitpid(child, &mut status, 0) };
        ensure!(ended == child, "waitpid: {}", io::Error::last_os_error());
        ensure!(status == 0, "the child saw other data, or could not write it: wait status {status:#x}");
        memory.expect(&newer)?;
        memory.block[0] = 0x6e;
        ensure!(read_from(a, memory.addr(), mr.rkey(), memory.len)? == newer, "the device sees other memory");
    }
    Ok(())
}

pub(crate) fn commands() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let memory = Neighbours::new();
    let mr = memory.register(b)?;
    for round in 0..5 {
        // SAFETY: a C string.
        ensure!(unsafe { libc::system(c"true".as_ptr()) } == 0, "system() failed");
        // SAFETY: C strings; the stream is closed by pclose.
        let status = unsafe {
            let stream = libc::popen(c"echo lively".as_ptr(), c"r".as_ptr());
            let mut line = [0; 16];
            let got = !stream.is_null() && !libc::fgets(line.as_mut_ptr().cast(), 16, stream).is_null();
            ensure!(got && line.starts_with(b"lively\n"), "popen() brought {line:?}");
            libc::pclose(stream)
        };
        ensure!(status == 0, "pclose() says {status}");
        let output = Command::new("cat").stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "a child program failed");
        let data = pattern(round, memory.len);
        write_to(a, memory.addr(), mr.rkey(), &data)?;
        memory.expect(&data)?;
    }
    Ok(())
}

pub(crate) fn overlaps() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let buffer = Buffer::new(32 * PAGE)?;
    let data = pattern(5, buffer.len());
    buffer.write(0, &data);
    let parts =
        [(0, 32 * PAGE), (0, 32 * PAGE), (PAGE + 5, 9 * PAGE), (7 * PAGE, 12 * PAGE), (18 * PAGE, 14 * PAGE)];
    for order in [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 4, 1, 2, 0]] {
        let mut mrs = Vec::new();
        for at in order {
            let (start, len) = parts[at];
            mrs.push((start, len, Mr::new(&b.pd, buffer.addr() + start, len, ALL_ACCESS)?));
        }
        while let Some((start, len, mr)) = mrs.pop() {
            let seen = read_from(a, buffer.addr() + start, mr.rkey(), len)?;
            ensure!(seen == data[start..start + len], "the part at {start} is not what it was");
            for (start, len, mr) in &mrs {
                write_to(a, buffer.addr() + start, mr.rkey(), &data[*start..start + len])?;
            }
            ensure!(buffer.read(0, buffer.len()) == data, "the buffer changed");
        }
        ensure!(buffer.read(0, buffer.len()) == data, "the buffer changed when the last MR went");
    }
    // The same MR made and ended many times costs nothing that lasts.
    for _ in 0..500 {
        Mr::new(&b.pd, buffer.addr(), buffer.len(), ALL_ACCESS)?;
    }
    ensure!(buffer.read(0, buffer.len()) == data, "the buffer changed by being registered often");
    Ok(())
}

pub(crate) fn deregistered() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let buffer = Buffer::new(16 * PAGE)?;
    for round in 0..10 {
        let mr = Mr::new(&b.pd, buffer.addr(), buffer.len(), ALL_ACCESS)?;
        let data = pattern(round, buffer.len());
        write_to(a, buffer.addr(), mr.rkey(), &data)?;
        drop(mr);
        ensure!(buffer.read(0, buffer.len()) == data, "deregistration changed the data");
        buffer.advise(0, buffer.len(), libc::MADV_DONTNEED)?;
        ensure!(buffer.read(0, buffer.len()).iter().all(|&byte| byte == 0), "MADV_DONTNEED left data");
    }
    Ok(())
}

pub(crate) fn small_neighbours() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    // Many small MRs on few pages, with bytes between them that are nobody's but the program's.
    let buffer = Buffer::new(4 * PAGE)?;
    buffer.fill(0, buffer.len(), 0x6e);
    let places: Vec<(usize, usize)> = (0..150).map(|n| (n * 107 + 3, 1 + n % 50)).collect();
    let register = |&(at, len): &(usize, usize)| Mr::new(&b.pd, buffer.addr() + at, len, ALL_ACCESS);
    let mrs = places.iter().map(register).collect::<Result<Vec<_>, _>>()?;
    for (n, (mr, &(at, len))) in mrs.iter().zip(&places).enumerate() {
        buffer.fill(at - 1, 1, n as u8);
        write_to(a, buffer.addr() + at, mr.rkey(), &pattern(n as u64, len))?;
    }
    for (n, (mr, &(at, len))) in mrs.iter().zip(&places).enumerate() {
        ensure!(buffer.read(at, len) == pattern(n as u64, len), "MR {n} holds other bytes");
        ensure!(buffer.read(at - 1, 1) == [n as u8], "the byte before MR {n} changed");
        ensure!(buffer.read(at + len, 1) == [0x6e], "the byte behind MR {n} changed");
        ensure!(
            read_from(a, buffer.addr() + at, mr.rkey(), len)? == pattern(n as u64, len),
            "READ of MR {n}"
        );
    }
    // Atomics work on such a page, too.
    let word = (2 * PAGE + 64, 8);
    let mr = register(&word)?;
    buffer.word(word.0).store(5, Ordering::SeqCst);
    let mut work = Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD).sge(a.sge(0, 8));
    (work.compare_add, work.remote) = (2, ((buffer.addr() + word.0) as u64, mr.rkey()));
    a.execute(&work)?;
    let left = buffer.word(word.0).load(Ordering::SeqCst);
    ensure!(left == 7, "5 + 2 is {left}");
    Ok(())
}

pub(crate) fn read_only() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let buffer = Buffer::with_protection(8 * PAGE, libc::PROT_READ)?;
    let code = Mr::new(&b.pd, buffer.addr(), buffer.len(), ALL_ACCESS).err().map(|error| error.code);
    ensure!(code == Some(libc::EFAULT), "LOCAL_WRITE on read-only memory: {code:?}");
    let mr = Mr::new(&b.pd, buffer.addr(), buffer.len(), IBV_ACCESS_REMOTE_READ)?;
    ensure!(read_from(a, buffer.addr(), mr.rkey(), PAGE)?.iter().all(|&byte| byte == 0), "other bytes");
    Ok(())
}

pub(crate) fn unmapped() -> Result<()> {
    let end = End::new(&Setup::new(IBV_QPT_RC))?;
    let buffer = Buffer::new(8 * PAGE)?;
    let addr = buffer.addr();
    // SAFETY: two pages of the own mapping, which nobody uses.
    unsafe { libc::munmap((addr + 4 * PAGE) as *mut libc::c_void, 2 * PAGE) };
    for (start, len) in [(addr, 8 * PAGE), (addr + 4 * PAGE, 10), (addr + PAGE, 3 * PAGE + 1)] {
        let code = Mr::new(&end.pd, start, len, ALL_ACCESS).err().map(|error| error.code);
        ensure!(code == Some(libc::EFAULT), "unmapped memory: {code:?} instead of EFAULT");
    }
    let code = Mr::new(&end.pd, usize::MAX - 10, 100, ALL_ACCESS).err().map(|error| error.code);
    ensure!(matches!(code, Some(libc::EFAULT | libc::EINVAL)), "a range past the end: {code:?}");
    let code = Mr::new(&end.pd, addr, PAGE, IBV_ACCESS_REMOTE_WRITE).err().map(|error| error.code);
    ensure!(code == Some(libc::EINVAL), "REMOTE_WRITE without LOCAL_WRITE: {code:?}");
    Ok(())
}

/// A static of the program, in a file mapping that was written to.
static STATIC: AtomicU64 = AtomicU64::new(0);

pub(crate) fn kinds() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let try_word = |what: &str, word: &AtomicU64| {
        word.store(3, Ordering::SeqCst);
        let addr = word.as_ptr() as usize;
        let mr = Mr::new(&b.pd, addr, 8, ALL_ACCESS)?;
        ensure!(read_from(a, addr, mr.rkey(), 8)? == 3_u64.to_ne_bytes(), "READ of {what}");
        write_to(a, addr, mr.rkey(), &4_u64.to_ne_bytes())?;
        ensure!(word.load(Ordering::SeqCst) == 4, "WRITE to {what}");
        Ok(())
    };
    try_word("the heap", &Box::new(AtomicU64::new(0)))?;
    try_word("a static", &STATIC)?;
    try_word("the stack", &AtomicU64::new(0))?;
    // Whole pages of a thread's stack, above and below what runs on it.
    let result = thread::scope(|scope| {
        let on_stack = scope.spawn(|| {
            let mut pages = [0_u8; 20 * PAGE];
            let data = pattern(9, pages.len());
            pages.copy_from_slice(&data);
            let mr = Mr::new(&b.pd, pages.as_ptr() as usize, pages.len(), ALL_ACCESS)?;
            let seen = read_from(a, pages.as_ptr() as usize, mr.rkey(), pages.len())?;
            ensure!(seen == data, "READ of a thread's stack");
            try_word("a thread's stack", &AtomicU64::new(0))
        });
        on_stack.join()
    });
    result.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
}

pub(crate) fn stale_key() -> Result<()> {
    for opcode in [IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ] {
        let pair = Pair::of(IBV_QPT_RC)?;
        let (a, b) = (&pair.a, &pair.b);
        let buffer = Buffer::new(4 * PAGE)?;
        let mr = Mr::new(&b.pd, buffer.addr(), buffer.len(), ALL_ACCESS)?;
        let rkey = mr.rkey();
        write_to(a, buffer.addr(), rkey, b"while it lasts")?;
        drop(mr);
        // Another MR may get the same table entry, but never the same key.
        let again = Mr::new(&b.pd, buffer.addr(), buffer.len(), ALL_ACCESS)?;
        ensure!(again.rkey() != rkey, "a key was given twice");
        a.buffer.write(0, b"and not after.");
        a.qp.send(&Send::new(opcode).sge(a.sge(0, 14)).remote((buffer.addr() as u64, rkey)))?;
        a.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)?;
        ensure!(buffer.read(0, 14) == b"while it lasts", "a stale key still writes");
    }
    Ok(())
}
