//! What is refused because it is too much, or in use.

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::Buffer,
    cq::Cq,
    pair::{Pair, SOON, Setup, ah_attr},
    qp::{Qp, QpInit, Refused, Send},
    verbs::{ALL_ACCESS, Ah, Context, Errno, Mr, Pd},
};

pub(crate) fn full_queues() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let depth = a.qp.cap.max_send_wr as usize;
    // Nobody receives, so nothing completes.
    let message = |id: usize| Send::new(IBV_WR_SEND).id(id as u64).sge(a.sge(0, 8));
    for id in 0..depth - 2 {
        a.qp.send(&message(id))?;
    }
    let refused = a.qp.send_list(&(depth - 2..depth + 3).map(message).collect::<Vec<_>>()).err();
    ensure!(refused == Some(Refused { code: libc::ENOMEM, at: 2 }), "SQ: {refused:?}");
    let depth_recv = b.qp.cap.max_recv_wr as usize;
    let receives: Vec<_> = (0..depth_recv + 1).map(|id| (id as u64, vec![b.sge(64, 8)])).collect();
    let refused = b.qp.recv_list(&receives).err();
    ensure!(refused == Some(Refused { code: libc::ENOMEM, at: depth_recv }), "RQ: {refused:?}");
    // What was taken is executed, what was refused is not, and completions make room.
    for (id, wc) in a.send_cq.wait(depth, SOON)?.iter().enumerate() {
        wc.expect(IBV_WC_SUCCESS)?;
        ensure!(wc.wr_id == id as u64, "{wc:?} instead of WR {id}");
    }
    ensure!(b.recv_cq.wait(depth.min(depth_recv), SOON)?.iter().all(|wc| wc.status == IBV_WC_SUCCESS));
    b.qp.recv(1, &[b.sge(64, 8)])?;
    a.execute(&message(5))?;
    b.received()?;
    Ok(())
}

pub(crate) fn busy_objects() -> Result<()> {
    let busy = |what: &str, result: Result<(), Errno>| {
        let code = result.err().map(|error| error.code);
        ensure!(code == Some(libc::EBUSY), "{what}: {code:?} instead of EBUSY");
        Ok(())
    };
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    busy("the CQ of a QP's sends", a.send_cq.try_destroy())?;
    busy("the CQ of a QP's receives", a.recv_cq.try_destroy())?;
    busy("the PD of a QP", a.pd.try_dealloc())?;
    let context = Context::open()?;
    let pd = Pd::new(&context)?;
    let buffer = Buffer::new(4096)?;
    let mr = Mr::new(&pd, buffer.addr(), 4096, ALL_ACCESS)?;
    busy("the PD of an MR", pd.try_dealloc())?;
    drop(mr);
    let ah = Ah::new(&pd, &ah_attr(b.address()?.gid, 0))?;
    busy("the PD of an AH", pd.try_dealloc())?;
    drop(ah);
    // And nothing is broken by having tried.
    a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0)))?;
    Ok(())
}

pub(crate) fn excess() -> Result<()> {
    let context = Context::open()?;
    let attr = context.device_attr()?;
    let pd = Pd::new(&context)?;
    let cq = Cq::new(&context, 16, None)?;
    let usual = Setup::new(IBV_QPT_RC).cap;
    let too_much = [
        ibv_qp_cap { max_send_wr: attr.max_qp_wr as u32 + 1, ..usual },
        ibv_qp_cap { max_recv_wr: attr.max_qp_wr as u32 + 1, ..usual },
        ibv_qp_cap { max_send_sge: attr.max_sge as u32 + 1, ..usual },
        ibv_qp_cap { max_recv_sge: attr.max_sge as u32 + 1, ..usual },
        ibv_qp_cap { max_inline_data: 1 << 20, ..usual },
    ];
    for cap in too_much {
        let init = QpInit { qp_type: IBV_QPT_RC, cap, sq_sig_all: false };
        let code = Qp::new(&pd, &cq, &cq, init).err().map(|error| error.code);
        ensure!(matches!(code, Some(libc::EINVAL | libc::ENOMEM)), "{cap:?}: {code:?}");
    }
    for entries in [0, attr.max_cqe as u32 + 1] {
        let code = Cq::new(&context, entries, None).err().map(|error| error.code);
        ensure!(matches!(code, Some(libc::EINVAL | libc::ENOMEM)), "a CQ of {entries}: {code:?}");
    }
    // All that the device says it can do, it does.
    let cap = ibv_qp_cap {
        max_send_wr: attr.max_qp_wr as u32,
        max_recv_wr: attr.max_qp_wr as u32,
        max_send_sge: attr.max_sge as u32,
        max_recv_sge: attr.max_sge as u32,
        max_inline_data: 256,
    };
    Qp::new(&pd, &cq, &cq, QpInit { qp_type: IBV_QPT_RC, cap, sq_sig_all: false })?;
    Cq::new(&context, attr.max_cqe as u32, None)?;
    let pair = Pair::of(IBV_QPT_RC)?;
    let (a, b) = (&pair.a, &pair.b);
    let mut work = Send::new(IBV_WR_RDMA_WRITE).remote(b.remote(0));
    work.sges = vec![a.sge(0, 8); a.qp.cap.max_send_sge as usize + 1];
    let code = a.qp.refusal(&work)?;
    ensure!(matches!(code, libc::EINVAL | libc::ENOMEM), "an SGE too many: errno {code}");
    Ok(())
}

pub(crate) fn attributes() -> Result<()> {
    let context = Context::open()?;
    let attr = context.device_attr()?;
    ensure!(attr.max_sge >= 30 && attr.max_qp_wr >= 1024 && attr.max_qp >= 1024, "small: {attr:?}");
    ensure!(attr.phys_port_cnt == 1 && attr.node_guid != 0 && attr.fw_ver[0] != 0, "{attr:?}");
    ensure!(attr.atomic_cap != IBV_ATOMIC_NONE, "no atomics");
    let port = context.port_attr()?;
    ensure!(port.state == IBV_PORT_ACTIVE && port.link_layer == IBV_LINK_LAYER_ETHERNET as u8, "{port:?}");
    ensure!(port.active_mtu == IBV_MTU_4096 && port.max_msg_sz >= 1 << 30, "{port:?}");
    ensure!(port.gid_tbl_len > 0 && port.pkey_tbl_len == 1 && port.phys_state == 5, "{port:?}");
    Ok(())
}
