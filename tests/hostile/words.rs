//! Words of shared memory that hold what nobody would write there.

use std::{sync::atomic::Ordering, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use verbs_abi::{
    proto::{Answer, Mode},
    shm::{
        PAGE, Window,
        arena::{DOORBELLS, EVENTS, MR_TABLE},
        cq::CQ_LEN,
        mr_table::{MrEntry, MrTable},
        wqe::Sge,
    },
    verbs::{Opcode, QpState, QpType, WcStatus},
};

use crate::{
    client::{BASE, eventually, transition},
    field::{Case, Field},
    noise::Noise,
    rig::{PART, Rig},
};

/// What is put there. Queues here hold 16 entries, or 64 blocks.
const VALUES: [u64; 20] = [
    0,
    1,
    2,
    3,
    4,
    7,
    16,
    17,
    63,
    65,
    255,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    0x1_0000_0003,
    1 << 63,
    u64::MAX - 16,
    u64::MAX - 1,
    u64::MAX,
];
/// How long a lane has for what it may do with a word.
const MOMENT: Duration = Duration::from_millis(4);

/// The words of a QP's header, by offset.
const HEADER: [(&str, usize); 11] = [
    ("the send queue's tail", 0),
    ("the receive queue's tail", 8),
    ("the send queue's head", 64),
    ("the requests done", 72),
    ("the completions written", 80),
    ("the verdict", 96),
    ("the seat", 128),
    ("the state and the peer", 320),
    ("the rights", 328),
    ("the receives done", 192),
    ("the wish to be rung", 200),
];
const JOURNAL: [(&str, usize); 2] = [("the request in progress", 256), ("the bytes placed", 264)];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, at) in HEADER.into_iter().chain(JOURNAL) {
        for mode in [Mode::Isolated, Mode::Direct] {
            let name = format!("word: {name} ({mode:?})");
            cases.push(Case::new(name, move |field| {
                everywhere(field, mode, |rig| (rig.hostile.arena.clone(), rig.qp.new.offset as usize + at))
            }));
        }
    }
    cases.extend(rest_of_the_arena());
    cases.extend(forgeries());
    cases
}

/// Puts each value where `place` says, lets the lane see it, and sees that nobody else does.
fn everywhere(field: &Field, mode: Mode, place: impl Fn(&Rig) -> (Window, usize)) -> Result<()> {
    for value in VALUES {
        let rig = Rig::new(field, mode, QpType::Rc)?;
        let (window, at) = place(&rig);
        window.u64(at).store(value, Ordering::SeqCst);
        rig.hostile.ring(rig.qp.new.slot);
        thread::sleep(MOMENT);
        rig.hostile.post(&rig.qp, &rig.good(Opcode::Write));
        rig.peer.post(&rig.peer_qp, &back(&rig));
        thread::sleep(MOMENT);
        rig.victim_is_whole().with_context(|| format!("with {value:#x} there"))?;
        rig.peer_is_whole_outside(8)?;
        // It can still be asked about, and ended.
        rig.hostile.state(rig.qp.new.qpn)?;
    }
    field.traffic_goes_on()
}

/// What the peer sends to the hostile client: where a word is bad, a fair peer meets it, too.
fn back(rig: &Rig) -> verbs_abi::shm::wqe::SendWqe {
    let mut wqe = rig.good(Opcode::Send);
    wqe.reset();
    assert!(wqe.push_sge(Sge { addr: BASE, length: 8, lkey: rig.peer_keys.full }), "no room for an SGE");
    wqe
}

fn rest_of_the_arena() -> Vec<Case> {
    let rows: [(&str, usize); 9] = [
        ("the magic number", 0),
        ("the version", 8),
        ("a summary of doorbells", DOORBELLS as usize),
        ("the last summary of doorbells", DOORBELLS as usize + 24),
        ("the first doorbells", DOORBELLS as usize + 64),
        ("the last doorbells", DOORBELLS as usize + 64 + 255 * 8),
        ("the events raised", EVENTS as usize),
        ("the events read", EVENTS as usize + 8),
        ("a region's sequence and key", MR_TABLE as usize),
    ];
    let mut cases: Vec<Case> = rows
        .into_iter()
        .map(|(name, at)| {
            Case::new(format!("word: {name}"), move |field| {
                everywhere(field, Mode::Isolated, |rig| (rig.hostile.arena.clone(), at))
            })
        })
        .collect();
    for (name, at) in [("the wish for an event", 0), ("a summary of rings", 64), ("the ready rings", 128)] {
        cases.push(Case::new(format!("word: {name} of a CQ"), move |field| {
            // The CQ is the first object of each arena.
            everywhere(field, Mode::Isolated, |rig| {
                (rig.hostile.arena.clone(), verbs_abi::shm::arena::HEAP as usize + at)
            })
        }));
    }
    cases.extend([
        Case::new("words: every doorbell, again and again", doorbells),
        Case::new("words: the whole arena, at random", whole_arena),
        Case::new("words: the word that the lane sleeps on", wake_word),
        Case::new("words: events that are never read", events),
    ]);
    cases
}

fn doorbells(field: &Field) -> Result<()> {
    let rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
    for _ in 0..300 {
        for at in (0..64 + 256 * 8).step_by(8) {
            rig.hostile.arena.u64(DOORBELLS as usize + at).store(u64::MAX, Ordering::SeqCst);
        }
        rig.hostile.ring(16_383);
    }
    field.traffic_goes_on()?;
    rig.victim_is_whole()
}

fn whole_arena(field: &Field) -> Result<()> {
    for seed in 1..6 {
        let rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
        let mut noise = Noise::new(seed);
        let (first, len) = (rig.qp.new.offset as usize - CQ_LEN, CQ_LEN + rig.qp.new.geometry.len());
        for _ in 0..20_000 {
            let at = if noise.below(2) == 0 {
                noise.below(4 * PAGE as u64) as usize
            } else {
                first + noise.below(len as u64) as usize
            };
            let value = if noise.below(2) == 0 { noise.next() } else { noise.below(70) };
            rig.hostile.arena.u64(at & !7).store(value, Ordering::SeqCst);
        }
        rig.hostile.ring(rig.qp.new.slot);
        thread::sleep(MOMENT);
        rig.victim_is_whole()?;
        rig.peer_is_whole_outside(PART as usize)?;
    }
    field.traffic_goes_on()
}

/// The page belongs to all clients of the tenant, bystanders included: it can cost them a second at a time, not more.
fn wake_word(field: &Field) -> Result<()> {
    let client = field.open()?;
    let page = Window::map(&client.files[3], 0, PAGE, true)?;
    let mut noise = Noise::new(3);
    for _ in 0..200 {
        for at in (0..PAGE).step_by(8) {
            page.u64(at).store(noise.next(), Ordering::SeqCst);
        }
    }
    field.traffic_goes_on()
}

fn events(field: &Field) -> Result<()> {
    let rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
    for round in 0..400 {
        for state in [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts] {
            let reply = rig.hostile.ask(&transition(&rig.qp, state, (rig.qp.new.qpn, rig.gid), 0xf))?;
            ensure!(reply.is_ok(), "round {round}, {state:?}: {reply:?}");
        }
        rig.hostile.post_blocks(&rig.qp, &[[u64::MAX; 8]]);
        eventually("an event", || Ok(rig.hostile.state(rig.qp.new.qpn)? == QpState::Err))?;
    }
    Ok(())
}

/// What the arena says of regions and rights is for others to read; the router has its own books.
fn forgeries() -> Vec<Case> {
    vec![
        Case::new("forged: a region that there is not", |field| {
            let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
            let key = 5 << 15 | 77;
            forge(&rig, MrEntry { key, ..entry(&rig)? })?;
            let mut wqe = rig.good(Opcode::Write);
            wqe.reset();
            wqe.flags = 2;
            ensure!(wqe.push_sge(Sge { addr: BASE, length: 8, lkey: key }), "no room for an SGE");
            rig.hostile.post(&rig.qp, &wqe);
            rig.ends_with(WcStatus::LocProtErr)
        }),
        Case::new("forged: a region longer than it is", |field| {
            let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
            forge(&rig, MrEntry { len: 1 << 40, addr: 0, iova: 0, ..entry(&rig)? })?;
            let mut wqe = rig.good(Opcode::Write);
            wqe.reset();
            wqe.flags = 2;
            let sge = Sge { addr: BASE + PART, length: 8, lkey: rig.keys.full };
            ensure!(wqe.push_sge(sge), "no room for an SGE");
            rig.hostile.post(&rig.qp, &wqe);
            rig.ends_with(WcStatus::LocProtErr)
        }),
        Case::new("forged: a region with rights that it has not, for the peer", |field| {
            let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
            let table = MrTable::new(&rig.peer.arena).context("no table")?;
            let private = table.lookup(rig.peer_keys.private).context("no such region")?;
            table.publish(&MrEntry { access: 0xf, ..private });
            let mut wqe = rig.good(Opcode::Write);
            (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.private, BASE + 2 * PART);
            rig.hostile.post(&rig.qp, &wqe);
            rig.ends_with(WcStatus::RemAccessErr)?;
            rig.peer_is_whole_outside(0)
        }),
        Case::new("forged: rights of a QP that it has not", rights),
    ]
}

fn entry(rig: &Rig) -> Result<MrEntry> {
    let table = MrTable::new(&rig.hostile.arena).context("no table")?;
    table.lookup(rig.keys.full).context("no such region")
}

fn forge(rig: &Rig, entry: MrEntry) -> Result<()> {
    MrTable::new(&rig.hostile.arena).context("no table")?.publish(&entry);
    Ok(())
}

/// The peer's QP gives no rights; its header says that it does.
fn rights(field: &Field) -> Result<()> {
    let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
    for state in [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts] {
        let request = transition(&rig.peer_qp, state, (rig.qp.new.qpn, rig.gid), 0);
        ensure!(rig.peer.ask(&request)? == Ok(Answer::Done), "{state:?} is refused");
    }
    let header = &rig.peer_qp.area.header;
    header.rights().store(u64::MAX, Ordering::SeqCst);
    header.state().store(QpState::Rts.value(), Ordering::SeqCst);
    rig.hostile.post(&rig.qp, &rig.good(Opcode::Write));
    rig.ends_with(WcStatus::RemInvReqErr)?;
    rig.peer_is_whole_outside(0)
}
