//! The extended interfaces: each function of `ibv_qp_ex` by what it does to memory and at the peer, and each field of
//! `ibv_cq_ex` by its value.

use std::{ffi::c_void, sync::atomic::Ordering};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    cq::{ALL_FIELDS, Cq, Fields, Wc},
    library::library,
    pair::{End, QKEY, Setup, ah_attr},
    qp::{Qp, QpInit},
    verbs::{ALL_ACCESS, Ah, Mr},
};

const INBOX: usize = 512 << 10;
const LEN: usize = 3000;
const RC_OPS: u32 = IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_SEND
    | IBV_QP_EX_WITH_SEND_WITH_IMM
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | IBV_QP_EX_WITH_LOCAL_INV
    | IBV_QP_EX_WITH_BIND_MW
    | IBV_QP_EX_WITH_SEND_WITH_INV
    | IBV_QP_EX_WITH_ATOMIC_WRITE;

/// An end whose QP and CQs are extended ones.
fn end(qp_type: ibv_qp_type, ops: u32) -> Result<End> {
    let setup = Setup::new(qp_type);
    let mut end = End::new(&setup)?;
    let cq = || Cq::extended(&end.context, 64, ALL_FIELDS);
    let (send_cq, recv_cq) = (cq()?, cq()?);
    let init = QpInit { qp_type, cap: setup.cap, sq_sig_all: false };
    end.qp = Qp::extended(&end.pd, &send_cq, &recv_cq, init, ops)?;
    (end.send_cq, end.recv_cq) = (send_cq, recv_cq);
    Ok(end)
}

fn pair() -> Result<(End, End)> {
    let (a, b) = (end(IBV_QPT_RC, RC_OPS)?, end(IBV_QPT_RC, RC_OPS)?);
    a.connect(b.address()?)?;
    b.connect(a.address()?)?;
    Ok((a, b))
}

/// Calls a function of the extended QP that every provider with its operation has.
macro_rules! call {
    ($qp:expr, $function:ident $(, $argument:expr)*) => {{
        let raw = $qp;
        // SAFETY: the QP is alive and an extended one, and was made with the operation; what the arguments point to is
        // alive.
        unsafe { (*raw).$function.context(concat!("no ", stringify!($function)))?(raw $(, $argument)*) }
    }};
}

/// Posts what is built between start and complete, and takes its completion.
fn post(end: &End, wr_id: u64, build: impl FnOnce(*mut ibv_qp_ex) -> Result<()>) -> Result<Fields> {
    // SAFETY: the QP is alive.
    let raw = unsafe { (library().ibv_qp_to_qp_ex)(end.qp.raw()) };
    ensure!(!raw.is_null(), "the QP is no extended one");
    call!(raw, wr_start);
    // SAFETY: the QP is alive, and this thread's between start and complete.
    unsafe { ((*raw).wr_id, (*raw).wr_flags) = (wr_id, IBV_SEND_SIGNALED) };
    build(raw)?;
    let code = call!(raw, wr_complete);
    ensure!(code == 0, "wr_complete: errno {code}");
    let done = end.send_cq.next_fields()?;
    let expected = (wr_id, end.qp.number(), done.wc.status);
    ensure!((done.wc.wr_id, done.wc.qp_num, done.vendor_err) == expected, "{done:?}");
    Ok(done)
}

/// The same with one SGE, for a completion of this kind.
fn execute(
    end: &End,
    sge: (usize, usize),
    opcode: ibv_wc_opcode,
    build: impl FnOnce(*mut ibv_qp_ex) -> Result<()>,
) -> Result<Fields> {
    let sge = end.sge(sge.0, sge.1);
    let done = post(end, 0x1_0000_0000 | u64::from(opcode), |qp| {
        build(qp)?;
        call!(qp, wr_set_sge, sge.lkey, sge.addr, sge.length);
        Ok(())
    })?;
    done.wc.expect(IBV_WC_SUCCESS)?;
    ensure!(done.wc.opcode == opcode, "{done:?}");
    Ok(done)
}

/// Takes a receive completion, all fields of which but length, immediate data and flags are as for any of RC.
fn received(end: &End, peer: &End, wr_id: u64, opcode: ibv_wc_opcode) -> Result<Wc> {
    let got = end.recv_cq.next_fields()?;
    got.wc.expect(IBV_WC_SUCCESS)?;
    ensure!((got.wc.wr_id, got.wc.opcode, got.wc.qp_num) == (wr_id, opcode, end.qp.number()), "{got:?}");
    ensure!(got.wc.src_qp == peer.qp.number() && got.vendor_err == 0, "{got:?}");
    ensure!((got.slid, got.sl, got.path_bits) == (0, 0, 0), "{got:?}");
    Ok(got.wc)
}

pub(crate) fn reliable() -> Result<()> {
    let (a, b) = pair()?;
    writes(&a, &b)?;
    sends(&a, &b)?;
    replies(&a, &b)
}

fn writes(a: &End, b: &End) -> Result<()> {
    let data = pattern(1, LEN);
    a.buffer.write(0, &data);
    let (addr, rkey) = b.remote(INBOX);
    execute(a, (0, LEN), IBV_WC_RDMA_WRITE, |qp| {
        call!(qp, wr_rdma_write, rkey, addr);
        Ok(())
    })?;
    ensure!(b.buffer.read(INBOX, LEN) == data, "wr_rdma_write wrote something else");
    let data = pattern(2, LEN);
    a.buffer.write(0, &data);
    b.qp.recv(21, &[])?;
    execute(a, (0, LEN), IBV_WC_RDMA_WRITE, |qp| {
        call!(qp, wr_rdma_write_imm, rkey, addr, 0x1122_3344);
        Ok(())
    })?;
    let got = received(b, a, 21, IBV_WC_RECV_RDMA_WITH_IMM)?;
    ensure!((got.imm, got.flags, got.byte_len) == (0x1122_3344, IBV_WC_WITH_IMM, LEN as u32), "{got:?}");
    ensure!(b.buffer.read(INBOX, LEN) == data, "wr_rdma_write_imm wrote something else");
    let word = 0x0102_0304_0506_0708_u64;
    let done = post(a, 22, |qp| {
        call!(qp, wr_atomic_write, rkey, addr, (&raw const word).cast::<c_void>());
        Ok(())
    })?;
    done.wc.expect(IBV_WC_SUCCESS)?;
    ensure!(b.buffer.word(INBOX).load(Ordering::SeqCst) == word, "wr_atomic_write wrote another word");
    Ok(())
}

fn sends(a: &End, b: &End) -> Result<()> {
    let data = pattern(3, LEN);
    a.buffer.write(0, &data);
    b.qp.recv(31, &[b.sge(INBOX, LEN + 9)])?;
    execute(a, (0, LEN), IBV_WC_SEND, |qp| {
        call!(qp, wr_send);
        Ok(())
    })?;
    let got = received(b, a, 31, IBV_WC_RECV)?;
    ensure!((got.flags, got.byte_len) == (0, LEN as u32), "{got:?}");
    ensure!(b.buffer.read(INBOX, LEN) == data, "wr_send sent something else");
    // The other ways to name the payload.
    let mut list = [a.sge(100, 50), a.sge(0, 100)];
    let listed = [&data[100..150], &data[..100]].concat();
    let mut text = *b"inline";
    let mut parts =
        [(2, 4), (0, 2)].map(|(at, length)| ibv_data_buf { addr: text[at..].as_mut_ptr().cast(), length });
    for (case, expected) in [&listed[..], b"inline", b"linein"].into_iter().enumerate() {
        b.qp.recv(32, &[b.sge(INBOX, LEN)])?;
        let done = post(a, 33, |qp| {
            call!(qp, wr_send_imm, 0x5500 + case as u32);
            match case {
                0 => call!(qp, wr_set_sge_list, list.len(), list.as_mut_ptr()),
                1 => call!(qp, wr_set_inline_data, text.as_mut_ptr().cast(), text.len()),
                _ => call!(qp, wr_set_inline_data_list, parts.len(), parts.as_mut_ptr()),
            }
            Ok(())
        })?;
        done.wc.expect(IBV_WC_SUCCESS)?;
        let got = received(b, a, 32, IBV_WC_RECV)?;
        let length = expected.len() as u32;
        ensure!(
            (got.imm, got.flags, got.byte_len) == (0x5500 + case as u32, IBV_WC_WITH_IMM, length),
            "{got:?}"
        );
        ensure!(b.buffer.read(INBOX, expected.len()) == expected, "case {case} sent something else");
    }
    Ok(())
}

fn replies(a: &End, b: &End) -> Result<()> {
    let data = pattern(4, LEN);
    b.buffer.write(INBOX, &data);
    let (addr, rkey) = b.remote(INBOX);
    let done = execute(a, (0, LEN), IBV_WC_RDMA_READ, |qp| {
        call!(qp, wr_rdma_read, rkey, addr);
        Ok(())
    })?;
    ensure!(done.wc.byte_len == LEN as u32 && a.buffer.read(0, LEN) == data, "wr_rdma_read: {done:?}");
    let (word, found) = (b.buffer.word(INBOX), a.buffer.word(64));
    word.store(40, Ordering::SeqCst);
    execute(a, (64, 8), IBV_WC_FETCH_ADD, |qp| {
        call!(qp, wr_atomic_fetch_add, rkey, addr, 2);
        Ok(())
    })?;
    ensure!((found.load(Ordering::SeqCst), word.load(Ordering::SeqCst)) == (40, 42), "wr_atomic_fetch_add");
    for (compare, swap, after) in [(42, 7, 7), (42, 8, 7)] {
        let before = word.load(Ordering::SeqCst);
        execute(a, (64, 8), IBV_WC_COMP_SWAP, |qp| {
            call!(qp, wr_atomic_cmp_swp, rkey, addr, compare, swap);
            Ok(())
        })?;
        ensure!(found.load(Ordering::SeqCst) == before, "wr_atomic_cmp_swp found another word");
        ensure!(word.load(Ordering::SeqCst) == after, "wr_atomic_cmp_swp left another word");
    }
    Ok(())
}

pub(crate) fn windows() -> Result<()> {
    let (a, b) = pair()?;
    let mr = Mr::new(&b.pd, b.buffer.addr(), b.buffer.len(), ALL_ACCESS | IBV_ACCESS_MW_BIND)?;
    let window = Window::new(&b)?;
    let info = ibv_mw_bind_info {
        mr: mr.raw(),
        addr: (b.buffer.addr() + INBOX) as u64,
        length: 64,
        mw_access_flags: IBV_ACCESS_REMOTE_WRITE,
    };
    let write = |key: u32, byte: u8| {
        a.buffer.fill(0, 8, byte);
        let sge = a.sge(0, 8);
        post(&a, 41, |qp| {
            call!(qp, wr_rdma_write, key, info.addr);
            call!(qp, wr_set_sge, sge.lkey, sge.addr, sge.length);
            Ok(())
        })
    };
    let mut key = window.key();
    for round in 0..2 {
        // The next tag, which the program chooses.
        key = key & !0xff | (key + 1) & 0xff;
        let done = post(&b, 42, |qp| {
            call!(qp, wr_bind_mw, window.0, key, &raw const info);
            Ok(())
        })?;
        done.wc.expect(IBV_WC_SUCCESS)?;
        ensure!(done.wc.opcode == IBV_WC_BIND_MW, "{done:?}");
        write(key, 0x60 + round)?.wc.expect(IBV_WC_SUCCESS)?;
        ensure!(b.buffer.read(INBOX, 8) == [0x60 + round; 8], "a window led elsewhere");
        if round == 0 {
            b.qp.recv(43, &[])?;
            let sent = post(&a, 44, |qp| {
                call!(qp, wr_send_inv, key);
                Ok(())
            })?;
            sent.wc.expect(IBV_WC_SUCCESS)?;
            let got = received(&b, &a, 43, IBV_WC_RECV)?;
            ensure!((got.flags, got.imm) == (IBV_WC_WITH_INV, key), "{got:?}");
        } else {
            let done = post(&b, 45, |qp| {
                call!(qp, wr_local_inv, key);
                Ok(())
            })?;
            done.wc.expect(IBV_WC_SUCCESS)?;
            ensure!(done.wc.opcode == IBV_WC_LOCAL_INV, "{done:?}");
            write(key, 0x70)?.wc.expect(IBV_WC_REM_ACCESS_ERR)?;
        }
    }
    ensure!(b.buffer.read(INBOX, 8) == [0x61; 8], "an invalidated window was written through");
    Ok(())
}

/// A memory window of type 2.
struct Window(*mut ibv_mw, ibv_context_ops);

impl Window {
    fn new(end: &End) -> Result<Self> {
        // SAFETY: the context is alive.
        let ops = unsafe { (*end.context.raw()).ops };
        let alloc = ops.alloc_mw.context("no alloc_mw")?;
        // SAFETY: the PD is alive.
        let raw = unsafe { alloc(end.pd.raw(), IBV_MW_TYPE_2) };
        ensure!(!raw.is_null(), "ibv_alloc_mw: {}", std::io::Error::last_os_error());
        // Its end needs the context, which outlives it in these checks.
        Ok(Self(raw, ops))
    }

    fn key(&self) -> u32 {
        // SAFETY: the window is alive.
        unsafe { (*self.0).rkey }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(dealloc) = self.1.dealloc_mw {
            // SAFETY: it is freed once, here.
            unsafe { dealloc(self.0) };
        }
    }
}

pub(crate) fn datagram() -> Result<()> {
    const GRH: usize = 40;
    let ops = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;
    let (a, b) = (end(IBV_QPT_UD, ops)?, end(IBV_QPT_UD, ops)?);
    a.connect(b.address()?)?;
    b.connect(a.address()?)?;
    let ah = Ah::new(&a.pd, &ah_attr(b.address()?.gid, 0))?;
    for imm in [None, Some(0x0a0b_0c0d)] {
        let data = pattern(5, 1000);
        a.buffer.write(0, &data);
        b.qp.recv(51, &[b.sge(INBOX, 2000)])?;
        let done = execute(&a, (0, data.len()), IBV_WC_SEND, |qp| {
            match imm {
                None => call!(qp, wr_send),
                Some(imm) => call!(qp, wr_send_imm, imm),
            }
            call!(qp, wr_set_ud_addr, ah.raw(), b.qp.number(), QKEY);
            Ok(())
        })?;
        ensure!(done.wc.qp_num == a.qp.number(), "{done:?}");
        let got = b.recv_cq.next_fields()?;
        got.wc.expect(IBV_WC_SUCCESS)?;
        let flags = IBV_WC_GRH | if imm.is_some() { IBV_WC_WITH_IMM } else { 0 };
        let wc = Wc {
            wr_id: 51,
            status: IBV_WC_SUCCESS,
            opcode: IBV_WC_RECV,
            byte_len: (GRH + data.len()) as u32,
            imm: imm.unwrap_or(got.wc.imm),
            qp_num: b.qp.number(),
            src_qp: a.qp.number(),
            flags,
        };
        // What UCX reads there: the kind of packet.
        let is_ipv4 = a.address()?.gid[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let sl = if is_ipv4 { 0xa } else { 0x9 };
        let expected = Fields { wc, vendor_err: 0, slid: 0, sl, path_bits: 0 };
        ensure!(got == expected, "{got:?}, not {expected:?}");
        ensure!(b.buffer.read(INBOX + GRH, data.len()) == data, "another datagram");
    }
    Ok(())
}
