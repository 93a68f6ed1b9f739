//! The responder's end: receives are the NIC's as soon as they are posted, and what it puts there is announced.

use std::collections::VecDeque;

use verbs_abi::{
    shm::{cqe::Cqe, wqe::RecvWqe},
    verbs::{AccessFlags, WcFlags, WcOpcode, WcStatus},
};

use super::{
    Announced, Announcements, Pool, Reach, Slot, Tools,
    parts::{Bounced, Part, bounced, cut, place_parts},
};
use crate::{
    Memory, Responder,
    memory::{check, list_len},
    nic::{Completion, NicSge, Refusal},
    requester::Obstacle,
    stage::Stage,
};

/// Bytes that are written to foreign memory at a time.
const SLICE: u64 = 32 * 1024;
/// A local key that no memory has: the NIC finds out that a receive is bad when a message reaches it, as it must be.
const NO_KEY: u32 = 0;

/// A receive that the NIC has.
#[derive(Debug)]
struct Posted {
    id: u32,
    wqe: Box<RecvWqe>,
    bounced: VecDeque<Bounced>,
    /// Bytes of the first part that bounced which are where they belong.
    moved: u64,
    landed: Option<Completion>,
}

/// What an attempt to post came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Posted.
    Posted,
    /// The NIC has all that is posted, or all that it takes.
    Done,
    /// Something must come back first, and will be told.
    Later,
    /// There is no memory to bounce through just now.
    NoRoom,
    /// The queue holds what no provider writes, or the NIC does not take it.
    Broken,
}

/// What completions came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Landed {
    /// All is well.
    Well,
    /// An access to foreign memory must come first.
    Foreign,
    /// A receive completed with an error.
    Failed,
}

/// The responder's end.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    /// Oldest first: the NIC takes them in this order.
    posted: VecDeque<Posted>,
    next_id: u32,
}

impl Receiver {
    /// Posts the next receive.
    pub(crate) fn advance<M: Memory>(
        &mut self,
        responder: &Responder,
        local: &M,
        tools: &mut Tools<'_>,
    ) -> Taken {
        if self.posted.len() >= tools.wr as usize {
            return Taken::Done;
        }
        let mut wqe = Box::<RecvWqe>::default();
        match responder.look_ahead(self.posted.len() as u64, &mut wqe) {
            Ok(true) => {}
            Ok(false) => return Taken::Done,
            Err(_) => return Taken::Broken,
        }
        let Some(parts) = parts_of(responder.pd(), local, &wqe, tools) else { return Taken::Later };
        if bounced(&parts) > tools.pool.capacity() / 2 {
            return Taken::Broken;
        }
        let Some((sges, bounced)) = place_parts(&parts, tools.pool) else { return Taken::NoRoom };
        let id = self.next_id;
        match tools.nic.post_receive(tools.shadow, id, &sges) {
            Ok(()) => {
                self.next_id = id.wrapping_add(1);
                let bounced = bounced.into();
                self.posted.push_back(Posted { id, wqe, bounced, moved: 0, landed: None });
                Taken::Posted
            }
            Err(refusal) => {
                bounced.into_iter().for_each(|piece| tools.pool.give(piece.slot));
                if refusal == Refusal::Full { Taken::Done } else { Taken::Broken }
            }
        }
    }

    /// A receive has ended on the NIC.
    pub(crate) fn complete(&mut self, completion: Completion) {
        let waits = |posted: &&mut Posted| posted.id == completion.id && posted.landed.is_none();
        if let Some(posted) = self.posted.iter_mut().find(waits) {
            posted.landed = Some(completion);
        }
    }

    /// Announces what has landed, in order.
    pub(crate) fn reap<M: Memory>(
        &mut self,
        responder: &mut Responder,
        local: &M,
        pool: &mut Pool,
        stage: &mut Stage,
        announced: &mut Announcements,
    ) -> Landed {
        while let Some(front) = self.posted.front_mut() {
            let Some(completion) = front.landed else { break };
            // What is flushed is the fabric's to announce, in its own time.
            if stage.in_flight() || completion.status == WcStatus::WrFlushErr {
                break;
            }
            let mut cqe = receipt(&front.wqe, &completion, responder.peer());
            if completion.status == WcStatus::Success {
                match front.move_home(responder, local, pool, stage) {
                    Ok(()) => {}
                    Err(Obstacle::Foreign) => return Landed::Foreign,
                    Err(Obstacle::Fault(status)) => fail(&mut cqe, status),
                }
                heed(announced, &completion, responder, local, &mut cqe);
            }
            if let Some(front) = self.posted.pop_front() {
                front.bounced.into_iter().for_each(|piece| pool.give(piece.slot));
            }
            responder.announce(&cqe);
            if u32::from(cqe.status) != WcStatus::Success.value() {
                return Landed::Failed;
            }
        }
        Landed::Well
    }

    /// Forgets everything; the memory that it bounces through is free when the shadow is closed.
    pub(crate) fn abandon(&mut self) -> Vec<Slot> {
        let posted = std::mem::take(&mut self.posted);
        posted.into_iter().flat_map(|posted| posted.bounced).map(|piece| piece.slot).collect()
    }
}

impl Posted {
    /// Writes what bounced to where it belongs, as far as the message goes.
    fn move_home<M: Memory>(
        &mut self,
        responder: &mut Responder,
        local: &M,
        pool: &mut Pool,
        stage: &mut Stage,
    ) -> Result<(), Obstacle> {
        let len = match self.landed {
            Some(Completion { is_write: false, byte_len, .. }) => u64::from(byte_len),
            _ => 0,
        };
        while let Some(piece) = self.bounced.front() {
            let end = len.clamp(piece.at, piece.at + piece.len);
            let bytes = pool.get(&piece.slot, end - piece.at);
            while piece.at + self.moved < end {
                let upto = end.min(piece.at + self.moved + SLICE);
                let slice = &bytes[self.moved as usize..(upto - piece.at) as usize];
                responder.scatter(local, &self.wqe, piece.at + self.moved, slice, stage)?;
                stage.clear();
                self.moved = upto - piece.at;
            }
            self.moved = 0;
            if let Some(piece) = self.bounced.pop_front() {
                pool.give(piece.slot);
            }
        }
        Ok(())
    }
}

/// The list of a receive, cut. `None`: how the NIC reaches it is not known yet.
fn parts_of<M: Memory>(pd: u32, local: &M, wqe: &RecvWqe, tools: &mut Tools<'_>) -> Option<Vec<Part>> {
    let (mut parts, mut at, mut waits, mut is_bad) = (Vec::new(), 0, false, false);
    for sge in wqe.sges().iter().filter(|sge| sge.length > 0) {
        let len = u64::from(sge.length);
        match check(local, pd, sge.lkey, sge.addr, len, AccessFlags::LOCAL_WRITE) {
            None => {
                is_bad = true;
                parts.push(Part::Direct(NicSge { addr: sge.addr, len: sge.length, lkey: NO_KEY }));
            }
            Some(span) => {
                let key = match (tools.reach)(&span.mr) {
                    Reach::Key(key) => Some(key),
                    Reach::Never => None,
                    Reach::Later => {
                        waits = true;
                        None
                    }
                };
                cut(&span, at, key, &mut parts);
            }
        }
        at += len;
    }
    if waits {
        return None;
    }
    if parts.len() > tools.sge as usize && !is_bad {
        parts = vec![Part::Bounced(0, list_len(wqe.sges()))];
    }
    Some(parts)
}

fn receipt(wqe: &RecvWqe, completion: &Completion, peer: u32) -> Cqe {
    let opcode = if completion.is_write { WcOpcode::RecvRdmaWithImm } else { WcOpcode::Recv };
    let flags = if completion.imm.is_some() { WcFlags::WITH_IMM } else { WcFlags::empty() };
    let succeeded = completion.status == WcStatus::Success;
    Cqe {
        wr_id: wqe.wr_id,
        byte_len: if succeeded { completion.byte_len } else { 0 },
        imm: completion.imm.unwrap_or(0),
        src_qp: if succeeded { peer } else { 0 },
        status: completion.status.value() as u8,
        opcode: if succeeded { opcode } else { WcOpcode::Recv }.value() as u8,
        flags: flags.bits() as u8,
        ..Cqe::default()
    }
}

fn fail(cqe: &mut Cqe, status: WcStatus) {
    *cqe = Cqe {
        wr_id: cqe.wr_id,
        status: status.value() as u8,
        opcode: WcOpcode::Recv.value() as u8,
        ..Cqe::default()
    };
}

/// Adds what was told over the link.
fn heed<M: Memory>(
    announced: &mut Announcements,
    completion: &Completion,
    responder: &Responder,
    local: &M,
    cqe: &mut Cqe,
) {
    match announced.front() {
        Some(Announced::Written(len)) if completion.is_write && completion.byte_len == 0 => {
            cqe.byte_len = *len;
        }
        Some(Announced::Invalidates(key)) if !completion.is_write => {
            match responder.invalidate(local, *key) {
                true => {
                    (cqe.imm, cqe.flags) = (*key, WcFlags::WITH_INV.bits() as u8);
                }
                false => fail(cqe, WcStatus::LocProtErr),
            }
        }
        _ => return,
    }
    announced.pop_front();
}
