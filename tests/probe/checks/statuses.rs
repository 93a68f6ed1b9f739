//! Each completion status by its own fault, over stock libibverbs, and what the other end sees of it.

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    pair::{Address, End, Pair, QKEY, QUIET, SOON, Setup, ah_attr},
    qp::Send,
    verbs::{ALL_ACCESS, Ah, Mr, Pd},
};

/// Bytes of the receives here.
const ROOM: usize = 64;

/// An end's further keys, with what they hold on to.
struct Keys {
    /// Of an MR without rights.
    read_only: Mr,
    /// Of another PD.
    foreign: Mr,
}

impl Keys {
    fn new(end: &End) -> Result<Self> {
        let (addr, len) = (end.buffer.addr(), end.buffer.len());
        let other = Pd::new(&end.context)?;
        Ok(Self {
            read_only: Mr::new(&end.pd, addr, len, 0)?,
            foreign: Mr::new(&other, addr, len, ALL_ACCESS)?,
        })
    }
}

/// A work request of `a`, which is wrong, and the status that says so.
type Fault<'a> = (&'static str, Send<'a>, ibv_wc_status);

/// Faults that any QP of this type finds before it sends anything.
fn local_faults(qp_type: ibv_qp_type, a: &End, b: &End, keys: &Keys) -> Vec<Fault<'static>> {
    let send = |sge| Send::new(IBV_WR_SEND).sge(sge);
    let with_key = |lkey| ibv_sge { lkey, ..a.sge(0, 8) };
    let end = a.buffer.len();
    let mut faults = vec![
        ("a key that is none", send(with_key(a.mr.lkey() ^ 0x10)), IBV_WC_LOC_PROT_ERR),
        ("a key of another PD", send(with_key(keys.foreign.lkey())), IBV_WC_LOC_PROT_ERR),
        ("the end passed", send(a.sge(end - 4, 8)), IBV_WC_LOC_PROT_ERR),
        (
            "an address before the MR",
            send(ibv_sge { addr: a.sge(0, 8).addr - 1, ..a.sge(0, 8) }),
            IBV_WC_LOC_PROT_ERR,
        ),
    ];
    if qp_type == IBV_QPT_UD {
        faults.push(("more than the MTU", send(a.sge(0, 4097)), IBV_WC_LOC_LEN_ERR));
        return faults;
    }
    // Each element is short enough, all of them together are not.
    let mut long = send(a.sge(0, 1 << 30));
    long.sges.push(a.sge(0, 1));
    faults.push(("more than max_msg_sz", long, IBV_WC_LOC_LEN_ERR));
    if qp_type == IBV_QPT_RC {
        let brings = |opcode, sge| Send::new(opcode).sge(sge).remote(b.remote(0));
        let read_only = with_key(keys.read_only.lkey());
        faults.extend([
            ("a READ into read-only memory", brings(IBV_WR_RDMA_READ, read_only), IBV_WC_LOC_PROT_ERR),
            (
                "an atomic into read-only memory",
                brings(IBV_WR_ATOMIC_FETCH_AND_ADD, read_only),
                IBV_WC_LOC_PROT_ERR,
            ),
            ("an atomic of 4 bytes", brings(IBV_WR_ATOMIC_FETCH_AND_ADD, a.sge(0, 4)), IBV_WC_LOC_LEN_ERR),
        ]);
    }
    faults
}

/// Gives a datagram its address.
fn aimed<'a>(work: Send<'_>, ah: Option<&'a Ah>, b: &End) -> Send<'a> {
    Send { to: ah.map(|ah| (ah, b.qp.number(), QKEY)), ..Send { to: None, ..unborrowed(work) } }
}

/// The same work request without an address.
fn unborrowed<'a>(work: Send<'_>) -> Send<'a> {
    let Send { wr_id, opcode, flags, imm, sges, remote, compare_add, swap, srqn, .. } = work;
    Send { wr_id, opcode, flags, imm, sges, remote, compare_add, swap, srqn, to: None }
}

pub(crate) fn local() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD] {
        let mut case = 0;
        loop {
            let pair = Pair::of(qp_type)?;
            let keys = Keys::new(&pair.a)?;
            let mut faults = local_faults(qp_type, &pair.a, &pair.b, &keys);
            if case == faults.len() {
                break;
            }
            let (what, work, status) = faults.swap_remove(case);
            local_fault(qp_type, &pair, work, status)
                .with_context(|| format!("QP type {qp_type}, {what}"))?;
            case += 1;
        }
    }
    Ok(())
}

fn local_fault(qp_type: ibv_qp_type, pair: &Pair, work: Send<'_>, status: ibv_wc_status) -> Result<()> {
    let (a, b) = (&pair.a, &pair.b);
    let ah = if qp_type == IBV_QPT_UD { Some(Ah::new(&a.pd, &ah_attr(b.address()?.gid, 0))?) } else { None };
    let good = aimed(Send::new(IBV_WR_SEND).sge(a.sge(0, 8)), ah.as_ref(), b);
    a.qp.recv(5, &[a.sge(4096, ROOM)])?;
    b.qp.recv(6, &[b.sge(4096, ROOM)])?;
    a.qp.send_list(&[aimed(work, ah.as_ref(), b).id(1), good.clone().id(2)])?;
    let ended = a.send_cq.wait(2, SOON)?;
    ended[0].expect(status)?;
    ended[1].expect(IBV_WC_WR_FLUSH_ERR)?;
    ensure!((ended[0].wr_id, ended[1].wr_id) == (1, 2), "{ended:?}");
    b.recv_cq.stays_empty(QUIET / 4)?;
    ensure!(b.qp.state()? == IBV_QPS_RTS, "the peer learned of it");
    ensure!(a.context.async_event(QUIET / 4)?.is_none(), "an event besides the completion");
    if qp_type == IBV_QPT_RC {
        a.recv_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)?;
        ensure!(a.qp.state()? == IBV_QPS_ERR, "the QP is in {}", a.qp.state()?);
        return Ok(());
    }
    // Only the send queue is in error, and it recovers.
    a.recv_cq.stays_empty(QUIET / 4)?;
    ensure!(a.qp.state()? == IBV_QPS_SQE, "the QP is in {}", a.qp.state()?);
    a.qp.send(&good)?;
    a.send_cq.next()?.expect(IBV_WC_WR_FLUSH_ERR)?;
    a.qp.set_state(IBV_QPS_RTS)?;
    a.execute(&good)?;
    ensure!(b.received()?.wr_id == 6, "another receive");
    Ok(())
}

pub(crate) fn initiator_depth() -> Result<()> {
    for opcode in [IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP] {
        let setup = Setup { initiator_depth: 0, ..Setup::new(IBV_QPT_RC) };
        let pair = Pair::new(&setup)?;
        let (a, b) = (&pair.a, &pair.b);
        a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0)))?;
        a.qp.send(&Send::new(opcode).sge(a.sge(0, 8)).remote(b.remote(0)))?;
        a.send_cq.next()?.expect(IBV_WC_LOC_QP_OP_ERR)?;
        ensure!(
            (a.qp.state()?, b.qp.state()?) == (IBV_QPS_ERR, IBV_QPS_RTS),
            "opcode {opcode}: other states"
        );
    }
    Ok(())
}

/// What becomes of a request that the responder refuses: the requester's status, that of the responder's first
/// receive, the responder's event.
type Refusal =
    (&'static str, fn(&End, &End, &Keys) -> Send<'static>, ibv_wc_status, ibv_wc_status, Option<u32>);

const ACCESS: Option<u32> = Some(IBV_EVENT_QP_ACCESS_ERR);
const REQUEST: Option<u32> = Some(IBV_EVENT_QP_REQ_ERR);
const FLUSHED: ibv_wc_status = IBV_WC_WR_FLUSH_ERR;

fn to(a: &End, b: &End, opcode: ibv_wr_opcode, at: usize, rkey: u32) -> Send<'static> {
    Send::new(opcode).sge(a.sge(0, 8)).remote((b.remote(at).0, rkey))
}

const REFUSALS: [Refusal; 11] = [
    (
        "a WRITE past the end",
        |a, b, _| to(a, b, IBV_WR_RDMA_WRITE, b.buffer.len() - 4, b.mr.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "a READ past the end",
        |a, b, _| to(a, b, IBV_WR_RDMA_READ, b.buffer.len(), b.mr.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "a WRITE to another PD's MR",
        |a, b, keys| to(a, b, IBV_WR_RDMA_WRITE, 0, keys.foreign.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "a READ of an MR without the right",
        |a, b, keys| to(a, b, IBV_WR_RDMA_READ, 0, keys.read_only.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "an atomic on an MR without the right",
        |a, b, keys| to(a, b, IBV_WR_ATOMIC_CMP_AND_SWP, 0, keys.read_only.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "a WRITE with immediate data and a wrong key",
        |a, b, _| to(a, b, IBV_WR_RDMA_WRITE_WITH_IMM, 0, b.mr.rkey() ^ 1),
        IBV_WC_REM_ACCESS_ERR,
        IBV_WC_LOC_ACCESS_ERR,
        None,
    ),
    (
        "an atomic between two words",
        |a, b, _| to(a, b, IBV_WR_ATOMIC_FETCH_AND_ADD, 4, b.mr.rkey()),
        IBV_WC_REM_INV_REQ_ERR,
        FLUSHED,
        REQUEST,
    ),
    (
        "a SEND longer than the receive",
        |a, _, _| Send::new(IBV_WR_SEND).sge(a.sge(0, ROOM + 1)),
        IBV_WC_REM_INV_REQ_ERR,
        IBV_WC_LOC_LEN_ERR,
        None,
    ),
    (
        "an inline SEND longer than the receive",
        |a, _, _| {
            Send::new(IBV_WR_SEND_WITH_IMM).flags(IBV_SEND_SIGNALED | IBV_SEND_INLINE).sge(a.sge(0, 2 * ROOM))
        },
        IBV_WC_REM_INV_REQ_ERR,
        IBV_WC_LOC_LEN_ERR,
        None,
    ),
    (
        "a WRITE to a key that is none",
        |a, b, _| to(a, b, IBV_WR_RDMA_WRITE, 0, 0),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
    (
        "an atomic past the end",
        |a, b, _| to(a, b, IBV_WR_ATOMIC_FETCH_AND_ADD, b.buffer.len(), b.mr.rkey()),
        IBV_WC_REM_ACCESS_ERR,
        FLUSHED,
        ACCESS,
    ),
];

pub(crate) fn refused() -> Result<()> {
    for (what, work, status, received, event) in REFUSALS {
        let pair = Pair::of(IBV_QPT_RC)?;
        let keys = Keys::new(&pair.b)?;
        refusal(&pair, work(&pair.a, &pair.b, &keys), status, received, event).context(what)?;
    }
    for opcode in [IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD] {
        let pair = Pair::new(&Setup { responder_depth: 0, ..Setup::new(IBV_QPT_RC) })?;
        let work = to(&pair.a, &pair.b, opcode, 0, pair.b.mr.rkey());
        refusal(&pair, work, IBV_WC_REM_INV_REQ_ERR, FLUSHED, REQUEST).context("max_dest_rd_atomic is 0")?;
    }
    Ok(())
}

fn refusal(
    pair: &Pair,
    work: Send<'_>,
    status: ibv_wc_status,
    received: ibv_wc_status,
    event: Option<u32>,
) -> Result<()> {
    let (a, b) = (&pair.a, &pair.b);
    b.buffer.fill(0, b.buffer.len(), 0x33);
    for id in 0..2 {
        b.qp.recv(id, &[b.sge(4096, ROOM)])?;
    }
    a.qp.send_list(&[work, Send::new(IBV_WR_SEND).sge(a.sge(0, 8))])?;
    let ended = a.send_cq.wait(2, SOON)?;
    ended[0].expect(status)?;
    ended[1].expect(FLUSHED)?;
    let receives = b.recv_cq.wait(2, SOON)?;
    receives[0].expect(received)?;
    receives[1].expect(FLUSHED)?;
    ensure!((receives[0].wr_id, receives[1].wr_id) == (0, 1), "{receives:?}");
    let states = (a.qp.state()?, b.qp.state()?);
    ensure!(states == (IBV_QPS_ERR, IBV_QPS_ERR), "states {states:?}");
    let wait = if event.is_some() { SOON } else { QUIET };
    let raised = b.context.async_event(wait)?;
    ensure!(raised.as_ref().map(|event| event.kind) == event, "the responder's event is {raised:?}");
    ensure!(a.context.async_event(QUIET / 4)?.is_none(), "the requester got an event besides its completion");
    ensure!(b.buffer.read(0, b.buffer.len()).iter().all(|byte| *byte == 0x33), "it left a trace");
    Ok(())
}

pub(crate) fn bad_receives() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD] {
        for case in 0..4 {
            let pair = Pair::of(qp_type)?;
            let (a, b) = (&pair.a, &pair.b);
            let keys = Keys::new(b)?;
            let good = b.sge(4096, ROOM);
            let bad = match case {
                0 => ibv_sge { lkey: b.mr.lkey() ^ 1, ..good },
                1 => ibv_sge { lkey: keys.read_only.lkey(), ..good },
                2 => ibv_sge { lkey: keys.foreign.lkey(), ..good },
                _ => b.sge(b.buffer.len() - 4, ROOM),
            };
            let ah = if qp_type == IBV_QPT_UD {
                Some(Ah::new(&a.pd, &ah_attr(b.address()?.gid, 0))?)
            } else {
                None
            };
            b.qp.recv(1, &[bad])?;
            b.qp.recv(2, &[good])?;
            a.qp.send(&aimed(Send::new(IBV_WR_SEND).sge(a.sge(0, 8)), ah.as_ref(), b))?;
            let reliable = qp_type == IBV_QPT_RC;
            let status = if reliable { IBV_WC_REM_OP_ERR } else { IBV_WC_SUCCESS };
            a.send_cq.next()?.expect(status).with_context(|| format!("QP type {qp_type}, case {case}"))?;
            let receives = b.recv_cq.wait(2, SOON)?;
            receives[0].expect(IBV_WC_LOC_PROT_ERR)?;
            receives[1].expect(FLUSHED)?;
            let states = (a.qp.state()?, b.qp.state()?);
            let sender = if reliable { IBV_QPS_ERR } else { IBV_QPS_RTS };
            ensure!(states == (sender, IBV_QPS_ERR), "QP type {qp_type}, case {case}: states {states:?}");
        }
    }
    Ok(())
}

pub(crate) fn lost_by_uc() -> Result<()> {
    for case in 0..4 {
        let pair = Pair::of(IBV_QPT_UC)?;
        let (a, b) = (&pair.a, &pair.b);
        b.buffer.fill(0, b.buffer.len(), 0x33);
        b.qp.recv(1, &[b.sge(4096, ROOM)])?;
        let work = match case {
            0 => to(a, b, IBV_WR_RDMA_WRITE, 0, b.mr.rkey() ^ 1),
            1 => to(a, b, IBV_WR_RDMA_WRITE, b.buffer.len(), b.mr.rkey()),
            2 => to(a, b, IBV_WR_RDMA_WRITE_WITH_IMM, 0, b.mr.rkey() ^ 1),
            _ => Send::new(IBV_WR_SEND).sge(a.sge(0, ROOM + 1)),
        };
        a.execute(&work)?;
        b.recv_cq.stays_empty(QUIET / 4)?;
        ensure!(b.context.async_event(QUIET / 4)?.is_none(), "case {case}: an event");
        ensure!((a.qp.state()?, b.qp.state()?) == (IBV_QPS_RTS, IBV_QPS_RTS), "case {case}: other states");
        ensure!(
            b.buffer.read(0, b.buffer.len()).iter().all(|byte| *byte == 0x33),
            "case {case}: it left a trace"
        );
        a.execute(&Send::new(IBV_WR_SEND).sge(a.sge(0, ROOM)))?;
        ensure!(b.received()?.wr_id == 1, "case {case}: the receive was gone");
    }
    Ok(())
}

pub(crate) fn strangers() -> Result<()> {
    // The peer has the right number, but is said to live elsewhere.
    let setup = Setup { timeout: 8, retry_cnt: 1, ..Setup::new(IBV_QPT_RC) };
    let pair = Pair::unconnected(&setup)?;
    let (a, b) = (&pair.a, &pair.b);
    a.connect(b.address()?)?;
    b.connect(Address { gid: [0xfd; 16], ..a.address()? })?;
    a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0)))?;
    a.send_cq.next()?.expect(IBV_WC_RETRY_EXC_ERR)?;
    // A third QP names a connected one.
    let (pair, third) = (Pair::new(&setup)?, End::new(&setup)?);
    third.connect(pair.b.address()?)?;
    third.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(third.sge(0, 8)).remote(pair.b.remote(0)))?;
    third.send_cq.next()?.expect(IBV_WC_RETRY_EXC_ERR)?;
    ensure!(pair.b.qp.state()? == IBV_QPS_RTS, "a stranger changed the QP's state");
    pair.a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(pair.a.sge(0, 8)).remote(pair.b.remote(0)))?;
    Ok(())
}

pub(crate) fn wrong_states() -> Result<()> {
    for qp_type in [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD] {
        let pair = Pair::unconnected(&Setup::new(qp_type))?;
        let (a, b) = (&pair.a, &pair.b);
        let ah =
            if qp_type == IBV_QPT_UD { Some(Ah::new(&a.pd, &ah_attr(b.address()?.gid, 0))?) } else { None };
        let send = aimed(Send::new(IBV_WR_SEND).sge(a.sge(0, 8)), ah.as_ref(), b);
        let recv = |sges: Vec<ibv_sge>| a.qp.recv_list(&[(1, sges)]).err().map(|refused| refused.code);
        ensure!(recv(vec![a.sge(0, 8)]) == Some(libc::EINVAL), "RESET takes receives");
        ensure!(a.qp.refusal(&send)? == libc::EINVAL, "RESET takes sends");
        a.to_init()?;
        ensure!(recv(vec![a.sge(0, 8)]).is_none(), "INIT takes no receives");
        ensure!(a.qp.refusal(&send)? == libc::EINVAL, "INIT takes sends");
        a.to_rtr(b.address()?)?;
        ensure!(a.qp.refusal(&send)? == libc::EINVAL, "RTR takes sends");
        a.to_rts()?;
        let caps = a.qp.cap;
        ensure!(
            recv(vec![a.sge(0, 8); caps.max_recv_sge as usize + 1]) == Some(libc::EINVAL),
            "an SGE too many"
        );
        let mut wide = send.clone();
        wide.sges = vec![a.sge(0, 8); caps.max_send_sge as usize + 1];
        ensure!(a.qp.refusal(&wide)? == libc::EINVAL, "an SGE too many to send");
        let inline = send.clone().flags(IBV_SEND_SIGNALED | IBV_SEND_INLINE);
        let long = Send { sges: vec![a.sge(0, caps.max_inline_data as usize + 1)], ..inline.clone() };
        ensure!(a.qp.refusal(&long)? == libc::EINVAL, "inline data that is too long");
        ensure!(
            a.qp.refusal(&Send { opcode: 77, ..send.clone() })? == libc::EINVAL,
            "an opcode that is none"
        );
        let exact = Send { sges: vec![a.sge(0, caps.max_inline_data as usize)], ..inline };
        a.qp.send(&exact)?;
        if qp_type != IBV_QPT_RC {
            a.send_cq.next()?.expect(IBV_WC_SUCCESS)?;
        }
    }
    Ok(())
}
