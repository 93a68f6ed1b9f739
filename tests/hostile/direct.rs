//! A member of a tenant in direct mode, who may write its peer's arena and moved memory. What that costs the peer is
//! told in the threat model; here is what it must not cost anybody else.

use std::{
    os::fd::OwnedFd,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    fs::{FallocateFlags, fallocate, ftruncate},
    io::Errno,
};
use verbs_abi::{
    proto::{Answer, DirectPeer, Mode, Request},
    shm::{
        PAGE, Window, arena,
        cq::{Arm, CqArea},
        doorbell::Doorbells,
        queue::QueueArea,
        wqe::{SendWqe, Sge, flag},
    },
    verbs::{Opcode, QpState, QpType},
};

use crate::{
    client::{BASE, Client, LEN, Qp, event, eventually},
    field::{Case, Field},
    noise::Noise,
    rig::Rig,
};

const WHILE: Duration = Duration::from_millis(300);
/// How long a verb may take when a peer is in the middle of something: the router waits ten seconds at most.
const BOUND: Duration = Duration::from_secs(15);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("member: scribbles over its peer's arena", arena_of_the_peer),
        Case::new("member: scribbles over its peer's memory", memory_of_the_peer),
        Case::new("member: empties its peer's files, and cannot resize them", files_of_the_peer),
        Case::new("member: fills its peer's completion channel", channel_of_the_peer),
        Case::new("member: posts in its peer's name, with a victim's keys", in_the_peers_name),
        Case::new("member: executes for ever", for_ever),
        Case::new("member: blames a QP that is not connected with it", verdicts),
        Case::new("member: wants a client that is not direct", |field| introduced(field, Mode::Isolated)),
        Case::new("member: wants itself", itself),
        Case::new("member: wants a QP of another type", other_type),
        Case::new("member: wants a hundred peers at a time", crowd),
    ]
}

/// The peer's arena, as its member maps it.
fn peer_arena(rig: &Rig) -> Result<(DirectPeer, Window)> {
    let (offer, files) = rig.offer.as_ref().context("no direct peer")?;
    Ok((*offer, Window::map(&files[0], 0, arena::ARENA_LEN, true)?))
}

fn rig(field: &Field) -> Result<Rig> {
    Rig::new(field, Mode::Direct, QpType::Rc)
}

fn arena_of_the_peer(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    let (offer, arena) = peer_arena(&rig)?;
    let (mut noise, began) = (Noise::new(9), Instant::now());
    while began.elapsed() < WHILE {
        for _ in 0..500 {
            let at = match noise.below(3) {
                0 => noise.below(4 * PAGE as u64),
                1 => offer.cq_offset + noise.below(2 * PAGE as u64),
                _ => offer.offset + noise.below(offer.geometry.len() as u64),
            };
            arena.u64(at as usize & !7).store(noise.next() >> noise.below(64), Ordering::SeqCst);
        }
        rig.hostile.post(&rig.qp, &rig.good(Opcode::Write));
        rig.peer.ring(rig.peer_qp.new.slot);
    }
    rig.victim_is_whole()?;
    field.traffic_goes_on()
}

fn memory_of_the_peer(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    let (_, files) = rig.offer.as_ref().context("no direct peer")?;
    let memory = Window::map(&files[1], BASE, LEN, true)?;
    let mut noise = Noise::new(4);
    for _ in 0..100_000 {
        memory.u64(noise.below(LEN as u64 / 8) as usize * 8).store(noise.next(), Ordering::Relaxed);
    }
    rig.victim_is_whole()
}

fn files_of_the_peer(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    let (_, files) = rig.offer.as_ref().context("no direct peer")?;
    for file in files.iter().take(2) {
        for len in [0, PAGE as u64] {
            ensure!(ftruncate(file, len) == Err(Errno::PERM), "a peer's file can be resized");
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, punch, 0, 1 << 30)?;
    }
    rig.peer.ring(rig.peer_qp.new.slot);
    rig.hostile.post(&rig.qp, &rig.good(Opcode::Write));
    field.traffic_goes_on()?;
    rig.victim_is_whole()
}

/// The peer with a completion channel, and what its member gets.
fn with_channel(field: &Field) -> Result<(Client, Client, Qp, u64, Vec<OwnedFd>)> {
    let (hostile, peer) =
        (Client::open(field.socket(), Mode::Direct)?, Client::open(field.socket(), Mode::Direct)?);
    let Ok(Answer::Handle(channel)) = peer.channel(event()?)? else { bail!("no channel") };
    let (cq, at) = peer.cq(Some(channel))?;
    let peer_qp = peer.qp(peer.pd()?, cq, QpType::Rc)?;
    let qp = hostile.qp(hostile.pd()?, hostile.cq(None)?.0, QpType::Rc)?;
    let gid = hostile.gid()?;
    let (answer, files) = hostile.connect(&qp, (peer_qp.new.qpn, gid))?;
    ensure!(matches!(answer, Answer::Direct(_)), "{answer:?}");
    peer.connect(&peer_qp, (peer_qp.new.qpn, gid))?;
    Ok((hostile, peer, peer_qp, at, files))
}

fn channel_of_the_peer(field: &Field) -> Result<()> {
    let (_hostile, peer, mut peer_qp, at, files) = with_channel(field)?;
    let bell = files.get(2).context("no channel of the peer")?;
    rustix::io::write(bell, &(u64::MAX - 1).to_ne_bytes())?;
    let area = CqArea::new(&peer.arena, at).context("a CQ outside the arena")?;
    for _ in 0..3 {
        area.arm(Arm::Any, 0);
        let mut wqe = SendWqe::default();
        wqe.flags = flag::SIGNALED;
        peer.post(&peer_qp, &wqe);
        peer_qp.completion()?;
        field.traffic_goes_on()?;
    }
    Ok(())
}

/// Whoever can write a queue can post to it: what it gets is what that queue's owner may do, not more.
fn in_the_peers_name(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    let (offer, arena) = peer_arena(&rig)?;
    let area = QueueArea::new(&arena, offer.offset, offer.geometry).context("no QP there")?;
    for key in [rig.victim_key, rig.keys.full, field.target().key] {
        let mut wqe = rig.good(Opcode::Write);
        wqe.reset();
        ensure!(wqe.push_sge(Sge { addr: BASE, length: 8, lkey: key }), "no room for an SGE");
        let tail = area.header.sq_tail().load(Ordering::Relaxed);
        wqe.encode(|i, block| area.write_sq_block(tail + i, block));
        area.header.sq_tail().store(tail + 1, Ordering::SeqCst);
        area.header.seat().park();
        Doorbells::new(&arena).context("no doorbells")?.ring(rig.peer_qp.new.slot);
        rig.hostile.ring(rig.qp.new.slot);
        eventually("the peer's QP is in error", || Ok(rig.peer.state(rig.peer_qp.new.qpn)? == QpState::Err))?;
    }
    rig.victim_is_whole()
}

fn for_ever(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    // Between entering and leaving, for good.
    eventually("the seat is the owner's", || Ok(rig.qp.area.header.seat().enter(false)))?;
    let (qpn, key) = (rig.peer_qp.new.qpn, rig.peer_keys.full);
    for request in [
        Request::DeregMr { key },
        crate::client::transition(&rig.peer_qp, QpState::Err, (0, rig.gid), 0),
        crate::client::transition(&rig.peer_qp, QpState::Reset, (0, rig.gid), 0),
        Request::DestroyQp { qpn },
    ] {
        let began = Instant::now();
        let reply = rig.peer.ask(&request)?;
        ensure!(reply == Ok(Answer::Done), "{request:?}: {reply:?}");
        ensure!(began.elapsed() < BOUND, "{request:?} took {:?}", began.elapsed());
    }
    field.traffic_goes_on()
}

fn verdicts(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    for word in 0..=u32::from(u16::MAX) {
        rig.qp.area.header.verdict().store(word, Ordering::SeqCst);
        if word % 64 == 0 {
            rig.qp.area.header.seat().park();
            rig.hostile.ring(rig.qp.new.slot);
        }
    }
    rig.victim_is_whole()
}

/// Fails if a direct client is introduced to one that is not.
fn introduced(field: &Field, other: Mode) -> Result<()> {
    let (one, two) = (Client::open(field.socket(), Mode::Direct)?, Client::open(field.socket(), other)?);
    let qp = one.qp(one.pd()?, one.cq(None)?.0, QpType::Rc)?;
    let target = two.qp(two.pd()?, two.cq(None)?.0, QpType::Rc)?;
    let (answer, files) = one.connect(&qp, (target.new.qpn, one.gid()?))?;
    ensure!(answer == Answer::Done && files.is_empty(), "{answer:?}, {} files", files.len());
    let (answer, files) = one.connect_again(&qp, field.target().qpn)?;
    ensure!(answer == Answer::Done && files.is_empty(), "{answer:?}, {} files", files.len());
    Ok(())
}

impl Client {
    /// From any state to RTS, with another peer.
    fn connect_again(&self, qp: &Qp, peer: u32) -> Result<(Answer, Vec<OwnedFd>)> {
        let gid = self.gid()?;
        let reset = self.ask(&crate::client::transition(qp, QpState::Reset, (0, gid), 0))?;
        ensure!(reset == Ok(Answer::Done), "RESET: {reset:?}");
        self.connect(qp, (peer, gid))
    }
}

fn itself(field: &Field) -> Result<()> {
    let client = Client::open(field.socket(), Mode::Direct)?;
    let qp = client.qp(client.pd()?, client.cq(None)?.0, QpType::Rc)?;
    let (answer, files) = client.connect(&qp, (qp.new.qpn, client.gid()?))?;
    ensure!(answer == Answer::Done && files.is_empty(), "{answer:?}, {} files", files.len());
    Ok(())
}

fn other_type(field: &Field) -> Result<()> {
    let rig = Rig::new(field, Mode::Direct, QpType::Ud)?;
    ensure!(rig.offer.is_none(), "UD is executed by its owner");
    for (peer, own) in [(QpType::Rc, QpType::Uc), (QpType::Uc, QpType::Rc)] {
        let rig = Rig::new(field, Mode::Direct, peer)?;
        ensure!(rig.offer.is_some(), "{peer:?} is not executed by its owner");
        let (pd, cq) = (rig.hostile.pd()?, rig.hostile.cq(None)?.0);
        let qp = rig.hostile.qp(pd, cq, own)?;
        let (answer, files) = rig.hostile.connect(&qp, (rig.peer_qp.new.qpn, rig.gid))?;
        ensure!(answer == Answer::Done && files.is_empty(), "{own:?} may execute on {peer:?}: {answer:?}");
    }
    Ok(())
}

/// One that is in the middle of something on all of them still costs each a bounded time.
fn crowd(field: &Field) -> Result<()> {
    let rig = rig(field)?;
    let gid = rig.gid;
    let (pd, cq) = (rig.hostile.pd()?, rig.hostile.cq(None)?.0);
    let mut held = Vec::new();
    for _ in 0..100 {
        let qp = rig.hostile.qp(pd, cq, QpType::Rc)?;
        rig.hostile.connect(&qp, (rig.peer_qp.new.qpn, gid))?;
        let _ = qp.area.header.seat().enter(false);
        held.push(qp);
    }
    let began = Instant::now();
    let reply = rig.peer.ask(&Request::DeregMr { key: rig.peer_keys.full })?;
    ensure!(reply == Ok(Answer::Done), "{reply:?}");
    ensure!(began.elapsed() < BOUND, "it took {:?}", began.elapsed());
    field.traffic_goes_on()
}
