//! Long payload from one mapped piece to one mapped piece that is copied beside the seat, part by part.
//!
//! What is not so the general way does, and finds out why.

use std::sync::atomic::Ordering;

use verbs_abi::{
    shm::wqe::Payload,
    verbs::{AccessFlags, Opcode, QpType},
};

use super::Requester;
use crate::{MAX_MESSAGE, Memory, Responder, memory::KeyedRange, place::Placement};

/// Bytes from which on a part is worth two more turns with the fabric.
const LEAST: u64 = if cfg!(fuzzing) { 64 } else { 16 * 1024 };
/// Bytes of a part: while it is copied nobody waits for it but its QP.
const MOST: u64 = if cfg!(fuzzing) { 512 } else { 64 * 1024 };

impl Requester {
    /// The next part of the fetched WRITE or READ, if it can be copied by itself: all is checked. From now on the work
    /// request counts as begun, and is not attempted before [`Self::advance`].
    pub(crate) fn next_part<M: Memory>(
        &self,
        local: &M,
        (responder, remote): (&Responder, &M),
        now: u64,
    ) -> Option<Placement> {
        let (len, connects) = (self.wqe.length(), matches!(self.qp_type, QpType::Rc | QpType::Uc));
        let part = (len - self.placed.min(len)).min(MOST);
        if len > MAX_MESSAGE
            || part < LEAST
            || !connects
            || self.stage.in_flight()
            || self.retry.pause(now).is_some()
        {
            return None;
        }
        let single = self.wqe.single()?;
        let Payload::Memory(sge) = single.payload else { return None };
        let reads = match Opcode::try_from(u32::from(single.opcode)) {
            Ok(Opcode::Write) => false,
            Ok(Opcode::Read) if self.qp_type == QpType::Rc && self.initiator_depth() > 0 => true,
            _ => return None,
        };
        let (own_right, peers_right) = match reads {
            true => (AccessFlags::LOCAL_WRITE, AccessFlags::REMOTE_READ),
            false => (AccessFlags::empty(), AccessFlags::REMOTE_WRITE),
        };
        // What is there is nobody's content: the general way says so.
        if !local.is_intact() || !remote.is_intact() {
            return None;
        }
        // What a window's key stands for may end beside any verb.
        remote.lookup(single.rkey)?;
        let own = KeyedRange { key: sge.lkey, pd: self.pd, qpn: None, iova: sge.addr, len, need: own_right };
        let own = local.locate(&own)?;
        let range = (single.rkey, single.remote_addr, len);
        let peers = responder.keyed_range(remote, self.qpn, range, peers_right)?;
        let (from, to) = if reads { (peers, own) } else { (own, peers) };
        let placement = Placement::inside(from, to, (self.placed as usize, part as usize))?;
        self.journal();
        Some(placement)
    }

    /// Tells what is placed of the work request at the head to whoever goes on with it.
    pub(super) fn journal(&self) {
        let header = &self.area.header;
        header.journal_placed().store(self.placed, Ordering::Relaxed);
        header.journal_wqe().store(self.done.wrapping_add(1), Ordering::Relaxed);
    }

    /// The part is placed, and with the last one the work request is done.
    pub(crate) fn advance(&mut self, part: u64) {
        self.placed += part;
        let length = self.wqe.length();
        if self.placed < length {
            self.retry.progress();
            return self.journal();
        }
        let opcode = if self.reads() { Opcode::Read } else { Opcode::Write };
        self.succeed(opcode, length);
    }
}
