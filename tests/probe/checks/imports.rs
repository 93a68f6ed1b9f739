//! Objects of one opened device in further contexts of it.

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    pair::{End, SOON, Setup},
    qp::Send,
    verbs::{Errno, Mr, Pd},
};

const LEN: usize = 10_000;

fn refused<T>(result: Result<T, Errno>, what: &str) -> Result<()> {
    ensure!(result.is_err(), "{what} was imported");
    Ok(())
}

pub(crate) fn shared() -> Result<()> {
    let setup = Setup::new(IBV_QPT_RC);
    let (far, owner) = (End::new(&setup)?, End::new(&setup)?);
    let context = owner.context.import()?;
    let pd = Pd::import(&context, owner.pd.handle())?;
    let mr = Mr::import(&pd, owner.mr.handle())?;
    ensure!((mr.lkey(), mr.rkey()) == (owner.mr.lkey(), owner.mr.rkey()), "an imported MR has other keys");

    // A QP of the imported PD serves and uses the memory of the one that it is of.
    let near = End::within(&context, pd, &setup)?;
    far.connect(near.address()?)?;
    near.connect(far.address()?)?;
    let data = pattern(3, LEN);
    far.buffer.write(0, &data);
    let target = (owner.buffer.addr() as u64, mr.rkey());
    far.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(far.sge(0, LEN)).remote(target))?;
    ensure!(owner.buffer.read(0, LEN) == data, "WRITE by an imported key");
    far.qp.recv(1, &[far.sge(LEN, LEN)])?;
    let gathered = ibv_sge { addr: target.0, length: LEN as u32, lkey: mr.lkey() };
    near.execute(&Send::new(IBV_WR_SEND).sge(gathered))?;
    far.received()?;
    ensure!(far.buffer.read(LEN, LEN) == data, "SEND by an imported key");

    // What is not there, or in another PD, or another device's.
    refused(Pd::import(&context, 0xffff_0000), "a PD that is not there")?;
    let other = Pd::new(&context)?;
    refused(Mr::import(&other, owner.mr.handle()), "an MR of another PD")?;
    refused(Mr::import(&other, owner.mr.handle() ^ 1), "an MR that is not there")?;
    refused(Mr::import(&other, far.mr.handle()), "another device's MR")?;

    // The one that was opened first goes; the device stays open, with its events.
    drop(mr);
    let End { qp, mr, send_cq, recv_cq, pd, context: first, .. } = owner;
    drop((qp, mr, send_cq, recv_cq));
    ensure!(pd.try_dealloc().is_err_and(|errno| errno.code == libc::EBUSY), "a PD went that is imported");
    drop((pd, first));
    far.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(far.sge(0, 8)).remote(near.remote(0)))?;
    ensure!(near.buffer.read(0, 8) == data[..8], "WRITE after the first context is closed");
    far.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(far.sge(0, 8)).remote((target.0, target.1)))?;
    far.send_cq.next()?.expect(IBV_WC_REM_ACCESS_ERR)?;
    let event = near.context.async_event(SOON)?.context("no event reached the imported context")?;
    ensure!((event.kind, event.element) == (IBV_EVENT_QP_ACCESS_ERR, near.qp.addr()), "{event:?}");
    Ok(())
}
