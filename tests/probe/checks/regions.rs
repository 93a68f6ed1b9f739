//! MRs that are not simply memory under its own address.

use std::{fs, os::fd::AsRawFd as _};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use super::Skip;
use crate::{
    buffer::{Buffer, pattern},
    pair::{Pair, QUIET},
    qp::Send,
    verbs::{ALL_ACCESS, Errno, Mr},
};

fn code<T>(result: Result<T, Errno>) -> Option<i32> {
    result.err().map(|error| error.code)
}

/// What is scattered to a null MR is gone, what is gathered from it are zeros; between them all is as it was.
pub(crate) fn null() -> Result<()> {
    const PART: usize = 6000;
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let (nothing, hole) = (Mr::null(&a.pd)?, Mr::null(&b.pd)?);
    let zeros = |addr: u64, len: usize| ibv_sge { addr, length: len as u32, lkey: nothing.lkey() };
    let drop_it = |len: usize| ibv_sge { addr: 0x1234_5678_9abc, length: len as u32, lkey: hole.lkey() };
    let data = pattern(5, 3 * PART);
    a.buffer.write(0, &data);
    b.buffer.fill(0, 4 * PART, 0xee);

    // SEND of data, zeros, data, to a receive that drops its middle.
    b.qp.recv(1, &[b.sge(0, PART / 2), drop_it(PART), b.sge(PART, 3 * PART)])?;
    let gathered = Send::new(IBV_WR_SEND).sge(a.sge(0, PART)).sge(zeros(u64::MAX - 2 * PART as u64, PART));
    a.execute(&gathered.sge(a.sge(PART, PART)))?;
    ensure!(b.received()?.byte_len as usize == 3 * PART, "the message has another length");
    let mut sent = data[..PART].to_vec();
    sent.extend(vec![0; PART]);
    sent.extend(&data[PART..2 * PART]);
    ensure!(b.buffer.read(0, PART / 2) == sent[..PART / 2], "before the hole");
    ensure!(b.buffer.read(PART / 2, PART / 2) == vec![0xee; PART / 2], "the hole was written somewhere");
    let tail = b.buffer.read(PART, 3 * PART / 2);
    ensure!(tail == sent[3 * PART / 2..], "behind the hole");
    ensure!(b.buffer.read(PART + 3 * PART / 2, 100) == [0xee; 100], "beyond the message");

    // WRITE of zeros, and READ into nothing.
    a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(zeros(0, PART)).remote(b.remote(0)))?;
    ensure!(b.buffer.read(0, PART) == vec![0; PART], "a WRITE from a null MR");
    b.buffer.write(0, &data[..PART]);
    let read = Send::new(IBV_WR_RDMA_READ).sge(zeros(7, PART / 2)).sge(a.sge(2 * PART, PART / 2));
    a.execute(&read.remote(b.remote(0)))?;
    ensure!(a.buffer.read(2 * PART, PART / 2) == data[PART / 2..PART], "a READ half into a null MR");
    // An atomic whose result nobody wants.
    b.buffer.write(0, &5_u64.to_ne_bytes());
    let mut add = Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD).sge(zeros(0, 8)).remote(b.remote(0));
    add.compare_add = 2;
    a.execute(&add)?;
    ensure!(b.buffer.read(0, 8) == 7_u64.to_ne_bytes(), "an atomic into a null MR");

    // A peer cannot name it.
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote((0, hole.rkey())))?;
    a.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)?;
    b.context.async_event(QUIET)?;
    Ok(())
}

/// Addresses of a zero-based MR, and of one with an iova, begin where they say, on both sides.
pub(crate) fn displaced() -> Result<()> {
    const LEN: usize = 20_000;
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let (near, far) = (Buffer::new(LEN + 100)?, Buffer::new(LEN + 100)?);
    let data = pattern(9, LEN);
    // The first byte lies in the middle of a page.
    for skip in [0, 40] {
        for base in [None, Some(0x7000_0000_0000 + skip as u64)] {
            let register = |pd, buffer: &Buffer| match base {
                None => Mr::new(pd, buffer.addr() + skip, LEN, ALL_ACCESS | IBV_ACCESS_ZERO_BASED),
                Some(iova) => Mr::with_iova(pd, buffer.addr() + skip, LEN, iova, ALL_ACCESS),
            };
            let (local, remote) = (register(&a.pd, &near)?, register(&b.pd, &far)?);
            let base = base.unwrap_or(0);
            near.write(skip, &data);
            far.fill(0, LEN, 0);
            let sge = |at: u64, len: usize, mr: &Mr| ibv_sge {
                addr: base + at,
                length: len as u32,
                lkey: mr.lkey(),
            };
            let to = (base + 16, remote.rkey());
            a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(sge(8, LEN - 16, &local)).remote(to))?;
            ensure!(far.read(skip + 16, LEN - 16) == data[8..LEN - 8], "WRITE at {base:#x}, skip {skip}");
            b.qp.recv(1, &[sge(0, LEN, &remote)])?;
            a.execute(&Send::new(IBV_WR_SEND).sge(sge(0, LEN, &local)))?;
            b.received()?;
            ensure!(far.read(skip, LEN) == data, "SEND at {base:#x}, skip {skip}");
            near.fill(skip, LEN, 0);
            a.execute(&Send::new(IBV_WR_RDMA_READ).sge(sge(0, LEN, &local)).remote((base, remote.rkey())))?;
            ensure!(near.read(skip, LEN) == data, "READ at {base:#x}, skip {skip}");
        }
    }
    // The address itself means nothing, and nothing lies before or behind.
    let pages = code(Mr::with_iova(&a.pd, near.addr(), LEN, 0x8001, ALL_ACCESS));
    ensure!(pages == Some(libc::EINVAL), "an iova with another offset in the page: {pages:?}");
    let remote = Mr::new(&b.pd, far.addr(), LEN, ALL_ACCESS | IBV_ACCESS_ZERO_BASED)?;
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote((far.addr() as u64, remote.rkey())))?;
    a.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)?;
    b.context.async_event(QUIET)?;
    Ok(())
}

/// With relaxed ordering, and with optional flags that nobody knows, an MR is one like all others.
pub(crate) fn relaxed() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let unknown = 1 << 28;
    let access = ALL_ACCESS | IBV_ACCESS_RELAXED_ORDERING | unknown;
    let mr = Mr::new(&b.pd, b.buffer.addr(), 4096, access)?;
    let data = pattern(2, 4096);
    a.buffer.write(0, &data);
    let to = (b.buffer.addr() as u64, mr.rkey());
    a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 4096)).remote(to))?;
    ensure!(b.buffer.read(0, 4096) == data);
    ensure!(code(Mr::new(&b.pd, b.buffer.addr(), 4096, 1 << 15)) == Some(libc::EINVAL), "an unknown flag");
    Ok(())
}

/// What is no dma-buf is refused as the kernel does; what is one carries data.
pub(crate) fn dma_buf() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let file = fs::File::open("/dev/zero")?;
    ensure!(code(Mr::of_dma_buf(&b.pd, 0, 4096, 0, file.as_raw_fd(), 1)) == Some(libc::EINVAL), "/dev/zero");
    ensure!(code(Mr::of_dma_buf(&b.pd, 0, 4096, 0, -1, 1)) == Some(libc::EBADF), "no descriptor");
    let bad = Mr::of_dma_buf(&b.pd, 0, 4096, 0, file.as_raw_fd(), IBV_ACCESS_ON_DEMAND);
    ensure!(code(bad) == Some(libc::EINVAL), "rights that it cannot have");
    let Some(made) = crate::buffer::udmabuf(8 * 4096)? else {
        anyhow::bail!(Skip("the kernel has no /dev/udmabuf to make a dma-buf with".to_owned()));
    };
    let (offset, len) = (4096_u64 + 24, 3 * 4096);
    let access = ALL_ACCESS;
    let mr = Mr::of_dma_buf(&b.pd, offset, len, offset, made.fd(), access)?;
    let data = pattern(6, len);
    a.buffer.write(0, &data);
    a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, len)).remote((offset, mr.rkey())))?;
    ensure!(made.read(offset as usize, len) == data, "WRITE into a dma-buf");
    a.buffer.fill(0, len, 0);
    a.execute(&Send::new(IBV_WR_RDMA_READ).sge(a.sge(0, len)).remote((offset, mr.rkey())))?;
    ensure!(a.buffer.read(0, len) == data, "READ from a dma-buf");
    let beyond = Mr::of_dma_buf(&b.pd, 4096, 8 * 4096, 4096, made.fd(), access);
    ensure!(code(beyond) == Some(libc::EINVAL), "more than there is");
    Ok(())
}
