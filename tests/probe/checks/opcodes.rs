//! What each operation does to memory and what it completes with.

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    pair::{End, Pair, QUIET, SOON, Setup},
    qp::Send,
};

const LEN: usize = 5000;
/// Where replies and receives go, away from what is sent.
const INBOX: usize = 512 << 10;

pub(crate) fn reliable() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        for round in 0..20 {
            sends(from, to, round)?;
            writes(from, to, round)?;
            read(from, to, round)?;
            atomics(from, to)?;
        }
    }
    Ok(())
}

pub(crate) fn unreliable() -> Result<()> {
    let pair = Pair::of(IBV_QPT_UC)?;
    let (a, b) = (&pair.a, &pair.b);
    for round in 0..20 {
        sends(a, b, round)?;
        writes(a, b, round)?;
    }
    for opcode in [IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP] {
        let work = Send::new(opcode).sge(a.sge(INBOX, 8)).remote(b.remote(0));
        let code = a.qp.refusal(&work)?;
        ensure!(matches!(code, libc::EINVAL | libc::EOPNOTSUPP), "{opcode} on UC: errno {code}");
    }
    sends(a, b, 99)
}

fn sends(from: &End, to: &End, round: u64) -> Result<()> {
    for (opcode, imm) in [(IBV_WR_SEND, 0), (IBV_WR_SEND_WITH_IMM, 0xfeed_0000 | round as u32)] {
        let data = pattern(round << 8 | u64::from(opcode), LEN);
        from.buffer.write(0, &data);
        to.buffer.fill(INBOX, LEN + 1, 0xee);
        to.qp.recv(round, &[to.sge(INBOX, LEN + 100)])?;
        let done = from.execute(&Send::new(opcode).id(7 + round).sge(from.sge(0, LEN)).imm(imm))?;
        ensure!(done.opcode == IBV_WC_SEND && done.qp_num == from.qp.number(), "{done:?}");
        let got = to.received()?;
        let flags = if opcode == IBV_WR_SEND { 0 } else { IBV_WC_WITH_IMM };
        ensure!((got.wr_id, got.opcode, got.byte_len) == (round, IBV_WC_RECV, LEN as u32), "{got:?}");
        ensure!((got.flags, got.src_qp) == (flags, from.qp.number()), "{got:?}");
        ensure!(opcode == IBV_WR_SEND || got.imm == imm, "{got:?}");
        ensure!(to.buffer.read(INBOX, LEN) == data, "the payload of opcode {opcode} is not what was sent");
        ensure!(to.buffer.read(INBOX + LEN, 1) == [0xee], "a byte behind the message was touched");
    }
    Ok(())
}

fn writes(from: &End, to: &End, round: u64) -> Result<()> {
    let data = pattern(round << 8 | 0x77, LEN);
    from.buffer.write(0, &data);
    to.buffer.fill(INBOX - 1, LEN + 2, 0xdd);
    let work = Send::new(IBV_WR_RDMA_WRITE).id(1).sge(from.sge(0, LEN)).remote(to.remote(INBOX));
    let done = from.execute(&work)?;
    ensure!(done.opcode == IBV_WC_RDMA_WRITE, "{done:?}");
    // UC completes at the requester when it is sent; here nothing is in flight by then.
    ensure!(to.buffer.read(INBOX, LEN) == data, "the payload of a WRITE is not what was sent");
    ensure!(to.buffer.read(INBOX - 1, 1) == [0xdd], "a byte before the target was touched");
    ensure!(to.buffer.read(INBOX + LEN, 1) == [0xdd], "a byte behind the target was touched");

    let data = pattern(round << 8 | 0x88, LEN);
    from.buffer.write(0, &data);
    to.qp.recv(40 + round, &[])?;
    let imm = 0xbeef_0000 | round as u32;
    let work = Send::new(IBV_WR_RDMA_WRITE_WITH_IMM).sge(from.sge(0, LEN)).remote(to.remote(INBOX)).imm(imm);
    from.execute(&work)?;
    let got = to.received()?;
    ensure!((got.wr_id, got.opcode) == (40 + round, IBV_WC_RECV_RDMA_WITH_IMM), "{got:?}");
    ensure!((got.imm, got.flags, got.byte_len) == (imm, IBV_WC_WITH_IMM, LEN as u32), "{got:?}");
    ensure!(to.buffer.read(INBOX, LEN) == data, "the payload of a WRITE_WITH_IMM is not what was sent");
    Ok(())
}

fn read(from: &End, to: &End, round: u64) -> Result<()> {
    let data = pattern(round << 8 | 0x99, LEN);
    to.buffer.write(INBOX, &data);
    from.buffer.fill(0, LEN + 1, 0);
    let work = Send::new(IBV_WR_RDMA_READ).sge(from.sge(0, LEN)).remote(to.remote(INBOX));
    let done = from.execute(&work)?;
    ensure!(done.opcode == IBV_WC_RDMA_READ && done.byte_len == LEN as u32, "{done:?}");
    ensure!(from.buffer.read(0, LEN) == data, "a READ brought something else");
    ensure!(from.buffer.read(LEN, 1) == [0], "a byte behind the READ was touched");
    Ok(())
}

fn atomics(from: &End, to: &End) -> Result<()> {
    // Words at the edges of pages too: the last of a page, and the first.
    for at in [INBOX, INBOX + 4088, INBOX + 4096] {
        let (word, found) = (to.buffer.word(at), from.buffer.word(64));
        word.store(u64::MAX - 1, Ordering::SeqCst);
        let mut work = Send::new(IBV_WR_ATOMIC_FETCH_AND_ADD).sge(from.sge(64, 8)).remote(to.remote(at));
        work.compare_add = 3;
        let done = from.execute(&work)?;
        ensure!(done.opcode == IBV_WC_FETCH_ADD && done.byte_len == 8, "{done:?}");
        ensure!(found.load(Ordering::SeqCst) == u64::MAX - 1, "FETCH_AND_ADD found another word");
        ensure!(word.load(Ordering::SeqCst) == 1, "FETCH_AND_ADD does not wrap");

        work.opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
        for (compare, swap, before, after) in [(1, 42, 1, 42), (1, 43, 42, 42)] {
            (work.compare_add, work.swap) = (compare, swap);
            let done = from.execute(&work)?;
            ensure!(done.opcode == IBV_WC_COMP_SWAP, "{done:?}");
            ensure!(found.load(Ordering::SeqCst) == before, "CMP_AND_SWP found another word");
            ensure!(word.load(Ordering::SeqCst) == after, "CMP_AND_SWP left another word");
        }
    }
    Ok(())
}

pub(crate) fn fence() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    for round in 0..200 {
        let data = pattern(round, 64 << 10);
        b.buffer.write(INBOX, &data);
        b.qp.recv(round, &[b.sge(0, 64 << 10)])?;
        a.qp.send_list(&[
            Send::new(IBV_WR_RDMA_READ).sge(a.sge(0, 64 << 10)).remote(b.remote(INBOX)),
            Send::new(IBV_WR_SEND).flags(IBV_SEND_SIGNALED | IBV_SEND_FENCE).sge(a.sge(0, 64 << 10)),
        ])?;
        b.received()?;
        ensure!(b.buffer.read(0, 64 << 10) == data, "the fenced SEND overtook the READ in round {round}");
        a.send_cq.wait(2, SOON)?;
    }
    Ok(())
}

pub(crate) fn inline() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC] {
        let pair = Pair::of(qp_type)?;
        let (a, b) = (&pair.a, &pair.b);
        ensure!(a.qp.cap.max_inline_data >= 256, "inline data only to {}", a.qp.cap.max_inline_data);
        for len in 0..=256 {
            let data = pattern(len as u64, len);
            a.buffer.write(0, &data);
            b.buffer.fill(0, 300, 0xaa);
            b.qp.recv(1, &[b.sge(0, 300)])?;
            // Two SGEs, keys that are none, and a buffer that is overwritten after the post.
            let (mut first, mut second) = (a.sge(0, len / 3), a.sge(len / 3, len - len / 3));
            (first.lkey, second.lkey) = (0xdead, 0);
            let flags = IBV_SEND_SIGNALED | IBV_SEND_INLINE;
            a.qp.send(&Send::new(IBV_WR_SEND).flags(flags).sge(first).sge(second))?;
            a.buffer.fill(0, 300, 0xff);
            let got = b.received()?;
            ensure!(got.byte_len == len as u32, "{got:?} of {len} inline bytes");
            ensure!(b.buffer.read(0, len) == data, "{len} inline bytes arrived as others");
            ensure!(b.buffer.read(len, 1) == [0xaa], "{len} inline bytes wrote one more");
            a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;

            a.buffer.write(0, &data);
            let work =
                Send::new(IBV_WR_RDMA_WRITE).flags(flags).sge(first).sge(second).remote(b.remote(1001));
            a.qp.send(&work)?;
            a.buffer.fill(0, 300, 0xff);
            a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
            ensure!(b.buffer.read(1001, len) == data, "{len} inline bytes were written as others");
        }
        let excess = a.qp.cap.max_inline_data as usize + 1;
        let work = Send::new(IBV_WR_SEND).flags(IBV_SEND_INLINE).sge(a.sge(0, excess));
        let code = a.qp.refusal(&work)?;
        ensure!(matches!(code, libc::EINVAL | libc::ENOMEM), "too much inline data: errno {code}");
    }
    Ok(())
}

pub(crate) fn many_sges() -> Result<()> {
    let mut setup = Setup::new(IBV_QPT_RC);
    (setup.cap.max_send_sge, setup.cap.max_recv_sge) = (30, 30);
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    // Lengths differ at both ends, so that no piece falls onto a piece.
    let lengths = |step: usize| (0..30).map(move |n| 100 + (n * step) % 450).collect::<Vec<_>>();
    let (out, inn) = (lengths(37), lengths(53));
    let total: usize = out.iter().sum::<usize>().min(inn.iter().sum());
    let spread = |end: &End, lengths: &[usize], base: usize| {
        lengths.iter().enumerate().map(|(n, &len)| end.sge(base + n * 1111, len)).collect::<Vec<_>>()
    };
    let data = pattern(30, total);
    let (from, to) = (cut(spread(a, &out, 3), total), spread(b, &inn, INBOX));
    place(a, &from, &data);
    b.qp.recv(1, &to)?;
    let mut work = Send::new(IBV_WR_SEND);
    work.sges.clone_from(&from);
    a.execute(&work)?;
    ensure!(b.received()?.byte_len == total as u32, "the message has another length");
    ensure!(gather(b, &cut(to, total)) == data, "scattered data is not what was gathered");

    // The same by WRITE, and back by READ into pieces.
    work.opcode = IBV_WR_RDMA_WRITE;
    work.remote = b.remote(5);
    a.execute(&work)?;
    ensure!(b.buffer.read(5, total) == data, "gathered data was written as other data");
    from.iter().for_each(|sge| a.buffer.fill(sge.addr as usize - a.buffer.addr(), sge.length as usize, 0));
    work.opcode = IBV_WR_RDMA_READ;
    a.execute(&work)?;
    ensure!(gather(a, &from) == data, "a READ was scattered wrongly");
    Ok(())
}

/// The SGEs of the first `total` bytes.
fn cut(sges: Vec<ibv_sge>, total: usize) -> Vec<ibv_sge> {
    let mut left = total as u32;
    let cut = sges.into_iter().map(|mut sge| {
        sge.length = sge.length.min(left);
        left -= sge.length;
        sge
    });
    cut.collect()
}

fn place(end: &End, sges: &[ibv_sge], data: &[u8]) {
    let mut at = 0;
    for sge in sges {
        let len = sge.length as usize;
        end.buffer.write(sge.addr as usize - end.buffer.addr(), &data[at..at + len]);
        at += len;
    }
}

fn gather(end: &End, sges: &[ibv_sge]) -> Vec<u8> {
    let read = |sge: &ibv_sge| end.buffer.read(sge.addr as usize - end.buffer.addr(), sge.length as usize);
    sges.iter().flat_map(read).collect()
}

pub(crate) fn empty() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    b.buffer.fill(0, 4096, 0x5a);
    for sges in [vec![], vec![a.sge(0, 0)], vec![ibv_sge { addr: 0, length: 0, lkey: 0 }]] {
        for opcode in [IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM] {
            b.qp.recv(1, &[b.sge(0, 4096)])?;
            let mut work = Send::new(opcode).imm(9);
            work.sges.clone_from(&sges);
            a.execute(&work)?;
            ensure!(b.received()?.byte_len == 0, "an empty message has a length");
        }
        // An empty access checks no key.
        for opcode in [IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ] {
            let mut work = Send::new(opcode).remote((0, 0));
            work.sges.clone_from(&sges);
            a.execute(&work)?;
        }
    }
    ensure!(b.buffer.read(0, 4096).iter().all(|&byte| byte == 0x5a), "an empty message wrote something");
    Ok(())
}

pub(crate) fn one_gib() -> Result<()> {
    const GIB: usize = 1 << 30;
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.buffer = GIB + 4096;
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let marks = [1, 4096, (64 << 20) - 3, GIB / 2, GIB - 7];
    for at in marks {
        a.buffer.write(at, b"marked");
    }
    b.buffer.write(GIB, b"behind");
    let limit = 10 * SOON;
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, GIB)).remote(b.remote(0)))?;
    a.send_cq.wait(1, limit)?[0].expect(IBV_WC_SUCCESS)?;
    for at in marks {
        ensure!(b.buffer.read(at, 6) == b"marked", "nothing was written at {at}");
    }
    ensure!(b.buffer.read(GIB, 6) == b"behind", "more than 1 GiB was written");
    ensure!(b.buffer.read(0, 1) == [0] && b.buffer.read(GIB / 2 - 1, 1) == [0], "something else was written");

    b.buffer.fill(GIB - 7, 6, 0);
    b.qp.recv(1, &[b.sge(0, GIB)])?;
    a.qp.send(&Send::new(IBV_WR_SEND).sge(a.sge(0, GIB)))?;
    let got = b.recv_cq.wait(1, limit)?[0];
    got.expect(IBV_WC_SUCCESS)?;
    ensure!(got.byte_len == GIB as u32, "{got:?}");
    ensure!(b.buffer.read(GIB - 7, 6) == b"marked", "the SEND did not bring its end");
    a.send_cq.wait(1, limit)?[0].expect(IBV_WC_SUCCESS)?;

    let work = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, GIB + 1)).remote(b.remote(0));
    if a.qp.send_list(&[work]).is_ok() {
        let wc = a.send_cq.next()?;
        ensure!(matches!(wc.status, IBV_WC_LOC_LEN_ERR | IBV_WC_REM_INV_REQ_ERR), "{wc:?}");
    }
    Ok(())
}

pub(crate) fn odd_places() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    for (n, len) in [1, 2, 3, 7, 63, 64, 65, 255, 1023, 4095, 4096, 4097, 65_537, 300_001].iter().enumerate()
    {
        for (from, to) in [(0, 0), (1, 3), (4095, 1), (77, 4093)] {
            let data = pattern(n as u64 ^ from as u64, *len);
            a.buffer.write(from, &data);
            b.buffer.fill(INBOX + to - 1 + usize::from(to == 0), 1, 0x11);
            b.buffer.fill(INBOX + to + len, 1, 0x22);
            a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(from, *len)).remote(b.remote(INBOX + to)))?;
            ensure!(b.buffer.read(INBOX + to, *len) == data, "{len} bytes from {from} to {to} are others");
            ensure!(
                b.buffer.read(INBOX + to + len, 1) == [0x22],
                "{len} bytes at {to}: one more was written"
            );
        }
    }
    Ok(())
}

pub(crate) fn wrap_around() -> Result<()> {
    const COUNT: u64 = 100_000;
    const DEPTH: u64 = 24;
    let mut setup = Setup::new(IBV_QPT_RC);
    (setup.cap.max_send_wr, setup.cap.max_recv_wr) = (DEPTH as u32, DEPTH as u32);
    let pair = Pair::new(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    let receive = |n: u64| b.qp.recv(n, &[b.sge((n % DEPTH) as usize * 64, 64)]);
    (0..DEPTH).try_for_each(receive)?;
    let (mut posted, mut done, mut received) = (0, 0, 0);
    while received < COUNT || done < COUNT {
        // Every fourth is signaled; its completion frees all before it.
        while posted < COUNT && posted - done < DEPTH - 4 {
            let (slot, last) = ((posted % DEPTH) as usize * 64, posted + 1 == COUNT);
            a.buffer.word(slot).store(posted, Ordering::SeqCst);
            let flags = if posted % 4 == 3 || last { IBV_SEND_SIGNALED } else { 0 };
            // Sizes differ, so that work requests take one block or more, and the ring wraps in the middle of one.
            let inline = if posted % 3 == 0 { IBV_SEND_INLINE } else { 0 };
            let len = 8 + (posted % 7) as usize * 8;
            let work = Send::new(IBV_WR_SEND).id(posted).flags(flags | inline).sge(a.sge(slot, len));
            a.qp.send(&work)?;
            posted += 1;
        }
        for wc in a.send_cq.poll(16)? {
            wc.expect(IBV_WC_SUCCESS)?;
            done = wc.wr_id + 1;
        }
        for wc in b.recv_cq.poll(16)? {
            wc.expect(IBV_WC_SUCCESS)?;
            ensure!(wc.wr_id == received, "receive {} completed instead of {received}", wc.wr_id);
            let payload = b.buffer.word((received % DEPTH) as usize * 64).load(Ordering::SeqCst);
            ensure!(payload == received, "message {payload} came instead of {received}");
            received += 1;
            if received + DEPTH <= COUNT {
                receive(received - 1 + DEPTH)?;
            }
        }
    }
    b.recv_cq.stays_empty(QUIET)
}

pub(crate) fn loopback() -> Result<()> {
    let setup = Setup::new(IBV_QPT_RC);
    let alone = End::new(&setup)?;
    alone.connect(alone.address()?)?;
    let pair = Pair { a: End::on(&alone.context, &setup)?, b: End::on(&alone.context, &setup)? };
    pair.a.connect(pair.b.address()?)?;
    pair.b.connect(pair.a.address()?)?;
    for round in 0..5 {
        for (from, to) in [(&alone, &alone), (&pair.a, &pair.b)] {
            sends(from, to, round)?;
            writes(from, to, round)?;
            read(from, to, round)?;
            atomics(from, to)?;
        }
    }
    Ok(())
}
