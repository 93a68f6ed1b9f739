//! Memory windows that are not the hostile client's, or are bound to what is not.

use anyhow::{Result, bail, ensure};
use verbs_abi::{
    proto::{Answer, Mode, Request},
    shm::wqe::{SendWqe, flag},
    verbs::{Opcode, QpType, WcStatus},
};

use crate::{
    client::{BASE, Client},
    field::{Case, Field},
    rig::{PART, Rig},
};

/// Remote read and write.
const RIGHTS: u64 = 6;

/// What is posted, with a window of the hostile client's own and one of a victim's.
type Row = (&'static str, fn(&Rig, u32, u32) -> SendWqe, WcStatus);

pub(crate) fn cases() -> Vec<Case> {
    let rows: Vec<Row> = vec![
        ("bound to a victim's region", |rig, own, _| bind(own, rig.victim_key, BASE, 8), WcStatus::MwBindErr),
        (
            "bound to the peer's region",
            |rig, own, _| bind(own, rig.peer_keys.full, BASE, 8),
            WcStatus::MwBindErr,
        ),
        ("of a victim, bound", |rig, _, other| bind(other, rig.keys.full, BASE, 8), WcStatus::MwBindErr),
        (
            "of a victim, bound to its own region",
            |rig, _, other| bind(other, rig.victim_key, BASE, 8),
            WcStatus::MwBindErr,
        ),
        ("that there is not", |rig, _, _| bind(0xdead_be00, rig.keys.full, BASE, 8), WcStatus::MwBindErr),
        (
            "bound beyond its region",
            |rig, own, _| bind(own, rig.keys.full, BASE, PART + 1),
            WcStatus::MwBindErr,
        ),
        ("bound before its region", |rig, own, _| bind(own, rig.keys.full, BASE - 1, 8), WcStatus::MwBindErr),
        (
            "bound to addresses that wrap",
            |rig, own, _| bind(own, rig.keys.full, u64::MAX - 3, 8),
            WcStatus::MwBindErr,
        ),
        (
            "bound to a region that is no more",
            |rig, own, _| bind(own, rig.keys.dead, BASE + 4 * PART, 8),
            WcStatus::MwBindErr,
        ),
        (
            "bound to a region of another PD",
            |rig, own, _| bind(own, rig.keys.other_pd, BASE + 3 * PART, 8),
            WcStatus::MwBindErr,
        ),
        (
            "bound to a region that takes none",
            |rig, own, _| bind(own, rig.keys.full, BASE, 8),
            WcStatus::MwBindErr,
        ),
        (
            "bound with all rights there could be",
            |rig, own, _| {
                let mut wqe = bind(own, rig.keys.full, BASE, 8);
                wqe.swap |= u64::from(u32::MAX) << 32;
                wqe
            },
            WcStatus::MwBindErr,
        ),
        ("of a victim, invalidated", |_, _, other| invalidate(other), WcStatus::MwBindErr),
        ("that is bound to nothing, invalidated", |_, own, _| invalidate(own), WcStatus::MwBindErr),
        (
            "that is a victim's region, invalidated",
            |rig, _, _| invalidate(rig.victim_key),
            WcStatus::MwBindErr,
        ),
        (
            "of a victim, written to",
            |rig, _, other| {
                let mut wqe = rig.good(Opcode::Write);
                wqe.rkey = other;
                wqe
            },
            WcStatus::RemAccessErr,
        ),
    ];
    rows.into_iter()
        .map(|row| Case::new(format!("window: {}", row.0), move |field| attempt(field, row)))
        .collect()
}

fn attempt(field: &Field, (_, make, status): Row) -> Result<()> {
    let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
    let (own, other) = (window(&rig.hostile, rig.pd)?, window(&rig.victim, rig.victim.pd()?)?);
    let wqe = make(&rig, own, other);
    rig.hostile.post(&rig.qp, &wqe);
    rig.ends_with(status)?;
    rig.peer_is_whole_outside(0)?;
    let still = rig.victim.ask(&Request::DeallocMw { key: other })?;
    ensure!(still == Ok(Answer::Done), "the victim's window is gone: {still:?}");
    Ok(())
}

fn window(client: &Client, pd: u32) -> Result<u32> {
    match client.ask(&Request::AllocMw { pd, is_type_2: true })? {
        Ok(Answer::Mr { key }) => Ok(key),
        other => bail!("no window: {other:?}"),
    }
}

fn bind(window: u32, region: u32, addr: u64, len: u64) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, Opcode::BindMw.value() as u8);
    (wqe.rkey, wqe.remote_addr, wqe.compare_add) = (window, addr, len);
    wqe.swap = u64::from(region) | RIGHTS << 32;
    wqe
}

fn invalidate(key: u32) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, Opcode::LocalInv.value() as u8);
    wqe.imm = key;
    wqe
}
