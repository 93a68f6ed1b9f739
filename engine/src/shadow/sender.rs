//! The requester's end: work requests become the NIC's, translated, in order.
//!
//! Who may call it: the holder of the QP's seat, the router. What must wait comes to a [`Step`] and is attempted anew,
//! with all checks.

use std::collections::{BTreeMap, HashMap, VecDeque};

use verbs_abi::{
    shm::wqe::{BadWqe, SendWqe, flag},
    verbs::{AccessFlags, Opcode, WcStatus},
};

use super::{
    Pool, Reach, Slot, Tools,
    parts::{Bounced, Part, bounced, cut, place_parts},
};
use crate::{
    Memory, Requester,
    nic::{NicSend, Refusal},
    requester::Obstacle,
    stage::Stage,
};

/// Bytes of a one-sided request that may bounce; one with more goes over the link.
const MOST_BOUNCED: u64 = 32 * 1024;
/// Remote keys that are remembered for one QP.
const KEYS: usize = 4096;
/// Work request boxes that are kept for others.
const SPARE: usize = 16;

/// What a peer's router says of one of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It was asked.
    Asked,
    /// The NIC reaches this part of it.
    Granted(Grant),
    /// The NIC does not reach it.
    Denied,
}

/// A part of a peer's memory region that the NIC reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// The peer's NIC's key.
    pub(crate) rkey: u32,
    /// The region's rights.
    pub(crate) access: u32,
    /// First address as the application names it, and its length.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// The same address as the peer's NIC knows it.
    pub(crate) base: u64,
}

impl Grant {
    /// The address that the NIC is to use, if all of the range may be reached so.
    fn translate(&self, addr: u64, len: u64, need: AccessFlags) -> Option<u64> {
        let offset = addr.checked_sub(self.start)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        (inside && self.access & need.bits() == need.bits()).then(|| self.base.wrapping_add(offset))
    }
}

/// A work request that the NIC has, or that waits for those that it has.
#[derive(Debug)]
struct Posted {
    id: u32,
    wqe: Box<SendWqe>,
    opcode: Opcode,
    bounced: Vec<Bounced>,
    status: Option<WcStatus>,
}

/// What an attempt to post came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes were posted.
    Posted(u64),
    /// There is nothing to be posted.
    Empty,
    /// Something must come back first, and will be told.
    Later,
    /// The peer's router must be asked for a key.
    Ask(u32),
    /// The next work request goes over the link.
    Link,
    /// An access to foreign memory must come first.
    Foreign,
    /// There is no memory to bounce through just now.
    NoRoom,
    /// The queue holds what no provider writes.
    Bad(BadWqe),
    /// The NIC does not take it.
    Broken,
}

/// What completions came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finished {
    /// All is well.
    Well,
    /// An access to foreign memory must come first.
    Foreign,
    /// A work request completed with an error.
    Failed,
}

/// The requester's end.
#[derive(Debug, Default)]
pub(crate) struct Sender {
    /// Oldest first.
    flight: VecDeque<Posted>,
    /// Blocks that they occupy.
    ahead: u64,
    next_id: u32,
    /// Foreign payload of the next work request, by its place in the message.
    gathered: BTreeMap<u64, Vec<u8>>,
    grants: HashMap<u32, Known>,
    /// The key that was asked for.
    asked: Option<u32>,
    /// What remains to be done of a work request whose first half went over the link.
    rest: Option<Box<SendWqe>>,
    #[expect(clippy::vec_box, reason = "they are swapped with the requester's, and long")]
    spare: Vec<Box<SendWqe>>,
}

impl Sender {
    /// Whether work requests were begun.
    pub(crate) fn has_begun(&self) -> bool {
        !self.flight.is_empty() || self.rest.is_some()
    }

    /// The rest of a work request whose first half went over the link.
    pub(crate) fn take_rest(&mut self, wqe: Box<SendWqe>) {
        self.rest = Some(wqe);
    }

    /// Posts the next work request. `takes_new`: also one that was not begun.
    pub(crate) fn advance<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        stage: &mut Stage,
        takes_new: bool,
        tools: &mut Tools<'_>,
    ) -> Step {
        let stopped =
            self.flight.back().is_some_and(|last| !matches!(last.status, None | Some(WcStatus::Success)));
        if stage.in_flight() || stopped || self.flight.len() >= tools.wr as usize {
            return Step::Later;
        }
        let is_rest = self.rest.is_some();
        let mut wqe = match self.rest.take() {
            Some(rest) => rest,
            None if !takes_new => return Step::Empty,
            None => self.spare.pop().unwrap_or_default(),
        };
        let found = if is_rest { Ok(true) } else { requester.look_ahead(self.ahead, &mut wqe) };
        let posted = match found {
            Ok(true) => self.post(requester, local, stage, (&mut wqe, is_rest), tools),
            Ok(false) => Err(Step::Empty),
            Err(bad) => Err(Step::Bad(bad)),
        };
        match posted {
            Ok((opcode, bounced, status)) => {
                let (id, len) = (self.next_id, wqe.length());
                self.next_id = self.next_id.wrapping_add(1);
                self.ahead += u64::from(wqe.blocks);
                self.gathered.clear();
                self.flight.push_back(Posted { id, wqe, opcode, bounced, status });
                Step::Posted(len)
            }
            Err(step) => {
                if is_rest {
                    self.rest = Some(wqe);
                } else if self.spare.len() < SPARE {
                    self.spare.push(wqe);
                }
                step
            }
        }
    }

    /// Checks, translates and posts one. A status: it ends with that when its turn comes.
    fn post<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        stage: &mut Stage,
        (wqe, is_rest): (&mut Box<SendWqe>, bool),
        tools: &mut Tools<'_>,
    ) -> Result<(Opcode, Vec<Bounced>, Option<WcStatus>), Step> {
        let failed = |status| Ok((Opcode::Send, Vec::new(), Some(status)));
        let mut parts = Vec::new();
        let opcode = match requester.spans_of(local, wqe) {
            Err(status) => return failed(status),
            Ok((opcode, spans)) => {
                let (mut at, mut waits) = (0, false);
                for span in spans {
                    let key = match (tools.reach)(&span.mr) {
                        Reach::Key(key) => Some(key),
                        Reach::Never => None,
                        Reach::Later => {
                            waits = true;
                            None
                        }
                    };
                    cut(span, at, key, &mut parts);
                    at += span.len;
                }
                if waits {
                    return Err(Step::Later);
                }
                opcode
            }
        };
        let len = wqe.length();
        if !is_rest && goes_by_link(opcode) {
            return Err(Step::Link);
        }
        if wqe.inline().is_some() && len > 0 {
            parts = vec![Part::Bounced(0, len)];
        }
        let one_sided = matches!(opcode, Opcode::Write | Opcode::WriteWithImm | Opcode::Read);
        if is_rest && one_sided {
            parts.clear();
        }
        let (remote_addr, rkey) =
            if one_sided && len > 0 && !is_rest { self.remote(opcode, wqe, len)? } else { (0, 0) };
        let too_many = parts.len() > tools.sge as usize;
        if one_sided && (too_many || bounced(&parts) > MOST_BOUNCED) {
            return Err(Step::Link);
        }
        if too_many {
            parts = vec![Part::Bounced(0, len)];
        }
        if bounced(&parts) > tools.pool.capacity() / 2 {
            return failed(WcStatus::LocLenErr);
        }
        if opcode != Opcode::Read
            && let Err(obstacle) = self.gather(requester, local, stage, wqe, &parts)
        {
            return match obstacle {
                Obstacle::Foreign => Err(Step::Foreign),
                Obstacle::Fault(status) => failed(status),
            };
        }
        let (sges, bounced) = place_parts(&parts, tools.pool).ok_or(Step::NoRoom)?;
        for piece in &bounced {
            if let Some(bytes) = self.gathered.get(&piece.at) {
                tools.pool.put(&piece.slot, bytes);
            }
        }
        let send = NicSend {
            id: self.next_id,
            opcode: if opcode == Opcode::SendWithInv { Opcode::Send } else { opcode },
            is_fenced: wqe.flags & flag::FENCE != 0,
            is_solicited: wqe.flags & flag::SOLICITED != 0,
            imm: wqe.imm,
            remote_addr,
            rkey,
            sges: &sges,
        };
        let refusal = match tools.nic.post_send(tools.shadow, &send) {
            Ok(()) => return Ok((opcode, bounced, None)),
            Err(Refusal::Full) => Step::Later,
            Err(Refusal::Broken) => Step::Broken,
        };
        bounced.into_iter().for_each(|piece| tools.pool.give(piece.slot));
        Err(refusal)
    }

    /// The address and the key for the peer's NIC.
    fn remote(&mut self, opcode: Opcode, wqe: &SendWqe, len: u64) -> Result<(u64, u32), Step> {
        let need = if opcode == Opcode::Read { AccessFlags::REMOTE_READ } else { AccessFlags::REMOTE_WRITE };
        match self.grants.get(&wqe.rkey) {
            None => {
                if self.grants.len() >= KEYS {
                    self.grants.clear();
                }
                self.grants.insert(wqe.rkey, Known::Asked);
                self.asked = Some(wqe.rkey);
                Err(Step::Ask(wqe.rkey))
            }
            Some(Known::Asked) => Err(Step::Later),
            Some(Known::Denied) => Err(Step::Link),
            Some(Known::Granted(grant)) => {
                let addr = grant.translate(wqe.remote_addr, len, need).ok_or(Step::Link)?;
                Ok((addr, grant.rkey))
            }
        }
    }

    /// Brings the payload that bounces.
    fn gather<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        stage: &mut Stage,
        wqe: &mut Box<SendWqe>,
        parts: &[Part],
    ) -> Result<(), Obstacle> {
        for part in parts {
            if let Part::Bounced(at, len) = *part
                && self.gathered.get(&at).is_none_or(|bytes| bytes.len() as u64 != len)
            {
                let mut bytes = Vec::new();
                requester.export(local, wqe, (at, len), stage, &mut bytes)?;
                self.gathered.insert(at, bytes);
            }
        }
        Ok(())
    }

    /// What a peer's router says of its key.
    pub(crate) fn learn(&mut self, rkey: u32, known: Known) {
        if self.grants.get(&rkey) == Some(&Known::Asked) {
            self.grants.insert(rkey, known);
            self.asked = self.asked.filter(|asked| *asked != rkey);
        }
    }

    /// A key of the peer's stands for nothing, or for something else, any more.
    pub(crate) fn forget(&mut self, rkey: u32) {
        self.grants.remove(&rkey);
        self.asked = self.asked.filter(|asked| *asked != rkey);
    }

    /// Whether the answer to a question is awaited.
    pub(crate) fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// What was said of keys may have been taken back meanwhile.
    pub(crate) fn forget_all(&mut self) {
        self.grants.clear();
        self.asked = None;
    }

    /// A work request has ended on the NIC.
    pub(crate) fn complete(&mut self, id: u32, status: WcStatus) {
        let posted = self.flight.iter_mut().find(|posted| posted.id == id && posted.status.is_none());
        if let Some(posted) = posted {
            posted.status = Some(status);
        }
    }

    /// The NIC is gone: whatever is posted is not answered any more.
    pub(crate) fn lose(&mut self) {
        if let Some(first) = self.flight.iter_mut().find(|posted| posted.status.is_none()) {
            first.status = Some(WcStatus::RetryExcErr);
        }
    }

    /// Completes what has ended, in order.
    pub(crate) fn reap<M: Memory>(
        &mut self,
        requester: &mut Requester,
        local: &M,
        pool: &mut Pool,
        stage: &mut Stage,
    ) -> Finished {
        while let Some(front) = self.flight.front_mut() {
            let Some(status) = front.status else { break };
            if status == WcStatus::Success && front.opcode == Opcode::Read && !front.bounced.is_empty() {
                if stage.in_flight() {
                    break;
                }
                match bring_home(requester, local, pool, stage, front) {
                    Ok(()) => {}
                    Err(Obstacle::Foreign) => return Finished::Foreign,
                    Err(Obstacle::Fault(status)) => front.status = Some(status),
                }
                continue;
            }
            let Some(mut front) = self.flight.pop_front() else { break };
            front.bounced.into_iter().for_each(|piece| pool.give(piece.slot));
            self.ahead -= u64::from(front.wqe.blocks);
            requester.finish(&mut front.wqe, status);
            if status != WcStatus::Success {
                return Finished::Failed;
            }
            if self.spare.len() < SPARE {
                self.spare.push(front.wqe);
            }
        }
        Finished::Well
    }

    /// Forgets everything; the memory that it bounced through is free when the shadow is closed.
    pub(crate) fn abandon(&mut self) -> Vec<Slot> {
        let flight = std::mem::take(&mut self.flight);
        (self.ahead, self.rest) = (0, None);
        self.gathered.clear();
        flight.into_iter().flat_map(|posted| posted.bounced).map(|piece| piece.slot).collect()
    }
}

/// Writes what a READ has brought into bounce memory to where it belongs.
fn bring_home<M: Memory>(
    requester: &mut Requester,
    local: &M,
    pool: &mut Pool,
    stage: &mut Stage,
    front: &mut Posted,
) -> Result<(), Obstacle> {
    while let Some(piece) = front.bounced.last() {
        let bytes = pool.get(&piece.slot, piece.len);
        requester.import(local, &mut front.wqe, piece.at, &bytes, stage)?;
        stage.clear();
        if let Some(piece) = front.bounced.pop() {
            pool.give(piece.slot);
        }
    }
    Ok(())
}

/// Whether a work request goes over the link whatever memory it names. A NIC's atomics are not atomic against those of
/// a CPU, and `ff0` promises that all atomics on a word are atomic against each other: they are the target router's.
pub(crate) fn goes_by_link(opcode: Opcode) -> bool {
    !matches!(
        opcode,
        Opcode::Send | Opcode::SendWithImm | Opcode::Write | Opcode::WriteWithImm | Opcode::Read
    )
}
