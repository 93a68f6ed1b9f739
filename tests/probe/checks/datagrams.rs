//! UD: headers, answers, and what is lost.

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    pair::{End, Pair, QKEY, QUIET, ah_attr},
    qp::Send,
    verbs::Ah,
};

const GRH: usize = 40;
const INBOX: usize = 64 << 10;

fn ready() -> Result<Pair> {
    Pair::of(IBV_QPT_UD)
}

fn ah_to(from: &End, to: &End) -> Result<Ah> {
    Ok(Ah::new(&from.pd, &ah_attr(to.address()?.gid, 0))?)
}

pub(crate) fn answered() -> Result<()> {
    let pair = ready()?;
    let (a, b) = (&pair.a, &pair.b);
    let ah = ah_to(a, b)?;
    for (len, opcode) in
        [(0, IBV_WR_SEND), (1, IBV_WR_SEND), (1000, IBV_WR_SEND_WITH_IMM), (1024, IBV_WR_SEND)]
    {
        let data = pattern(len as u64, len);
        a.buffer.write(0, &data);
        b.qp.recv(5, &[b.sge(INBOX, GRH), b.sge(0, 4096)])?;
        let mut work = Send::new(opcode).sge(a.sge(0, len)).imm(0x0102_0304);
        work.to = Some((&ah, b.qp.number(), QKEY));
        a.execute(&work)?;
        let got = b.received()?;
        ensure!((got.byte_len as usize, got.src_qp) == (GRH + len, a.qp.number()), "{got:?}");
        let imm = if opcode == IBV_WR_SEND { 0 } else { IBV_WC_WITH_IMM };
        ensure!(got.flags == IBV_WC_GRH | imm && (imm == 0 || got.imm == 0x0102_0304), "{got:?}");
        ensure!(b.buffer.read(0, len) == data, "a datagram of {len} bytes brought others");

        // The answer goes where the header says.
        let attr = Ah::attr_of_sender(&b.context, &got, &b.buffer.read(INBOX, GRH))?;
        // SAFETY: any bytes are a raw GID.
        let back = unsafe { attr.grh.dgid.raw };
        ensure!(back == a.address()?.gid, "the header does not name its sender: {back:x?}");
        let answer = Ah::new(&b.pd, &attr)?;
        a.qp.recv(6, &[a.sge(INBOX, 4096)])?;
        let mut work =
            Send::new(IBV_WR_SEND).flags(IBV_SEND_SIGNALED | IBV_SEND_INLINE).sge(b.sge(0, len.min(256)));
        work.to = Some((&answer, got.src_qp, QKEY));
        b.execute(&work)?;
        let got = a.received()?;
        ensure!(got.src_qp == b.qp.number(), "{got:?}");
        ensure!(a.buffer.read(INBOX + GRH, len.min(256)) == data[..len.min(256)], "the answer is another");
    }
    Ok(())
}

pub(crate) fn lost() -> Result<()> {
    let pair = ready()?;
    let (a, b) = (&pair.a, &pair.b);
    let ah = ah_to(a, b)?;
    let nowhere = Ah::new(&a.pd, &ah_attr([0xfd; 16], 0))?;
    b.qp.recv(1, &[b.sge(INBOX, 4096)])?;
    let number = b.qp.number();
    for to in [(&ah, number, QKEY + 1), (&ah, 0x00ff_fffe, QKEY), (&nowhere, number, QKEY)] {
        let mut work = Send::new(IBV_WR_SEND).sge(a.sge(0, 100));
        work.to = Some(to);
        // Sent is sent: the sender does not learn of it.
        a.execute(&work)?;
        b.recv_cq.stays_empty(QUIET)?;
    }
    let mut work = Send::new(IBV_WR_SEND).sge(a.sge(0, 100));
    work.to = Some((&ah, number, QKEY));
    a.execute(&work)?;
    b.received()?;
    // Without a receive it is lost, and the QP goes on.
    a.execute(&work)?;
    b.recv_cq.stays_empty(QUIET)?;
    b.qp.recv(2, &[b.sge(INBOX, 4096)])?;
    b.recv_cq.stays_empty(QUIET)?;
    a.execute(&work)?;
    ensure!(b.received()?.wr_id == 2, "another receive was consumed");
    // One that is longer than the receive is lost, and the receive stays.
    b.qp.recv(3, &[b.sge(INBOX, GRH + 99)])?;
    a.execute(&work)?;
    b.recv_cq.stays_empty(QUIET)?;
    let mut short = Send::new(IBV_WR_SEND).sge(a.sge(0, 99));
    short.to = Some((&ah, number, QKEY));
    a.execute(&short)?;
    ensure!(b.received()?.wr_id == 3, "another receive was consumed");
    // The high bit stands for the sender's own Q_Key.
    b.qp.recv(4, &[b.sge(INBOX, 4096)])?;
    short.to = Some((&ah, number, 1 << 31));
    a.execute(&short)?;
    ensure!(b.received()?.wr_id == 4, "another receive was consumed");
    // Nothing but SEND, and not more than an MTU.
    let mut work = Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0));
    work.to = None;
    let code = a.qp.refusal(&work)?;
    ensure!(matches!(code, libc::EINVAL | libc::EOPNOTSUPP), "WRITE on UD: errno {code}");
    Ok(())
}
