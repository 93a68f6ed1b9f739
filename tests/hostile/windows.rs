//! Memory windows that are not the hostile client's, or are bound to what is not.

use std::sync::atomic::Ordering;

use anyhow::{Result, bail, ensure};
use verbs_abi::{
    proto::{Answer, Mode, Request},
    shm::wqe::{SendWqe, Sge, flag},
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
    let own =
        rows.into_iter().map(|row| Case::new(format!("window: {}", row.0), move |field| attempt(field, row)));
    let peers = reaches()
        .into_iter()
        .map(|row| Case::new(format!("window: of the peer, {}", row.0), move |field| reach(field, row)));
    own.chain(peers).collect()
}

/// What the hostile client posts to a peer that has opened a window for it, whose key it is told.
type Reach = (&'static str, Opened, fn(&Rig, u32) -> SendWqe, WcStatus);

/// How the peer's window was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opened {
    /// At the QP that is connected with the hostile client, for eight bytes.
    Here,
    /// At another QP.
    Elsewhere,
    /// It was, and is closed again.
    Before,
    /// For reading alone.
    ForReading,
}

fn reaches() -> Vec<Reach> {
    vec![
        ("as it may be used", Opened::Here, |rig, key| write(rig, key, WINDOW, 8), WcStatus::Success),
        ("beyond its end", Opened::Here, |rig, key| write(rig, key, WINDOW + 1, 8), WcStatus::RemAccessErr),
        ("before its start", Opened::Here, |rig, key| write(rig, key, WINDOW - 8, 8), WcStatus::RemAccessErr),
        ("longer than it is", Opened::Here, |rig, key| write(rig, key, WINDOW, 16), WcStatus::RemAccessErr),
        ("by another key", Opened::Here, |rig, key| write(rig, key ^ 1, WINDOW, 8), WcStatus::RemAccessErr),
        ("of another QP", Opened::Elsewhere, |rig, key| write(rig, key, WINDOW, 8), WcStatus::RemAccessErr),
        (
            "that is closed again",
            Opened::Before,
            |rig, key| write(rig, key, WINDOW, 8),
            WcStatus::RemAccessErr,
        ),
        (
            "without the right",
            Opened::ForReading,
            |rig, key| write(rig, key, WINDOW, 8),
            WcStatus::RemAccessErr,
        ),
        ("invalidated by a SEND", Opened::Here, |rig, key| send(rig, key), WcStatus::Success),
        ("of another QP, invalidated", Opened::Elsewhere, |rig, key| send(rig, key), WcStatus::RemAccessErr),
        ("closed, invalidated", Opened::Before, |rig, key| send(rig, key), WcStatus::RemAccessErr),
        (
            "its region invalidated",
            Opened::Here,
            |rig, _| send(rig, rig.peer_keys.full),
            WcStatus::RemAccessErr,
        ),
        (
            "a victim's region invalidated",
            Opened::Here,
            |rig, _| send(rig, rig.victim_key),
            WcStatus::RemAccessErr,
        ),
    ]
}

/// Where the peer's window is.
const WINDOW: u64 = BASE + 5 * PART + 64;
/// `IBV_ACCESS_MW_BIND`.
const MW_BIND: u32 = 16;

fn reach(field: &Field, (_, opened, make, status): Reach) -> Result<()> {
    let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
    let peer = &rig.peer;
    let region = peer.mr(rig.peer_pd, 5 * PART, PART, crate::client::RIGHTS | MW_BIND)?;
    let (key, mut elsewhere) =
        (window(peer, rig.peer_pd)?, peer.qp(rig.peer_pd, peer.cq(None)?.0, QpType::Rc)?);
    peer.connect(&elsewhere, (elsewhere.new.qpn, rig.gid))?;
    let binder = if opened == Opened::Elsewhere { &mut elsewhere } else { &mut rig.peer_qp };
    let mut wqe = bind(key, region, WINDOW, 8);
    if opened == Opened::ForReading {
        wqe.swap = u64::from(region) | 4 << 32;
    }
    for wqe in [Some(wqe), (opened == Opened::Before).then(|| invalidate(key))].into_iter().flatten() {
        peer.post(binder, &wqe);
        let done = binder.completion()?;
        ensure!(done.status == 0, "the peer cannot open its window: {done:?}");
    }
    peer.post_recv(&rig.peer_qp, 1, &[Sge { addr: BASE, length: 8, lkey: rig.peer_keys.full }]);
    // What comes through must be seen.
    [0, 8].into_iter().for_each(|at| rig.hostile.memory.u64(at).store(u64::MAX, Ordering::Relaxed));
    let wqe = make(&rig, key);
    rig.hostile.post(&rig.qp, &wqe);
    rig.ends_with(status)?;
    if wqe.opcode == Opcode::SendWithInv.value() as u8 {
        let known = rig.peer.ask(&Request::DeregMr { key: rig.peer_keys.full })?;
        ensure!(known == Ok(Answer::Done), "the peer's region is gone: {known:?}");
    }
    let far = (5 * PART + 72) as usize;
    rig.peer_is_whole_outside(if status == WcStatus::Success { far } else { 8 })
}

fn write(rig: &Rig, key: u32, addr: u64, len: u32) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, Opcode::Write.value() as u8);
    (wqe.remote_addr, wqe.rkey) = (addr, key);
    wqe.push_sge(Sge { length: len, ..rig.own() });
    wqe
}

fn send(rig: &Rig, key: u32) -> SendWqe {
    let mut wqe = rig.good(Opcode::SendWithInv);
    wqe.imm = key;
    wqe
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
