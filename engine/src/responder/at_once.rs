//! What the shortest way of a request needs of the responder (`requester/at_once.rs`): either all is well, or nothing
//! has happened and the general way finds out why.

use std::{ptr::NonNull, sync::atomic::Ordering};

use verbs_abi::{
    shm::{cqe::Cqe, wqe::Single},
    verbs::{AccessFlags, Opcode, QpState, WcFlags, WcOpcode},
};

use super::Responder;
use crate::{Memory, memory::KeyedRange};

const SEND_WITH_IMM: u8 = Opcode::SendWithImm.value() as u8;
const WC_RECV: u8 = WcOpcode::Recv.value() as u8;

impl Responder {
    /// Whether a request of that QP is executed without ado.
    #[inline]
    fn is_open_to(&self, source_qpn: u32) -> bool {
        let is_new = self.state == QpState::Rtr && !self.established;
        self.state.may_respond() && !is_new && self.peer == source_qpn
    }

    /// Where a request of the connected peer finds what its key names (key, address, length), if all is well with it
    /// and that is one mapped piece.
    #[inline(always)]
    pub(crate) fn keyed_range<M: Memory>(
        &self,
        memory: &M,
        source_qpn: u32,
        (key, iova, len): (u32, u64, u64),
        need: AccessFlags,
    ) -> Option<NonNull<u8>> {
        if !self.is_open_to(source_qpn) || !self.access.contains(need) {
            return None;
        }
        memory.locate(&KeyedRange { key, pd: self.pd, qpn: Some(self.qpn), iova, len, need })
    }

    /// The id of the next receive and where a message of `len` bytes goes, if it goes to one mapped piece.
    #[inline]
    pub(crate) fn next_receive<M: Memory>(
        &mut self,
        memory: &M,
        source_qpn: u32,
        len: u64,
    ) -> Option<(u64, NonNull<u8>)> {
        if !self.is_open_to(source_qpn) || self.shared.is_some() {
            return None;
        }
        let at = self.completions.count();
        // The general way may have taken more than was seen here.
        let known = self.posted.wrapping_sub(at);
        let is_known = known != 0 && known <= u64::from(self.area.geometry().rq_entries);
        if !is_known && !self.look_for_receives(at) {
            return None;
        }
        let (wr_id, sge) = self.area.read_single_recv(at)?;
        let next = at.wrapping_add(1);
        if next != self.posted {
            // It comes from the cache of who posted it, while this one is filled.
            self.area.expect_recv(next);
        }
        if len > u64::from(sge.length) {
            return None;
        }
        let need = AccessFlags::LOCAL_WRITE;
        let range = KeyedRange { key: sge.lkey, pd: self.pd, qpn: None, iova: sge.addr, len, need };
        Some((wr_id, memory.locate(&range)?))
    }

    /// Looks how many receives are posted, which is a look into the peer's cache. False: none, or too many to be true.
    fn look_for_receives(&mut self, at: u64) -> bool {
        let tail = self.area.header.rq_tail().load(Ordering::Acquire);
        let is_sane = tail.wrapping_sub(at) <= u64::from(self.area.geometry().rq_entries);
        self.posted = if is_sane { tail } else { at };
        self.posted != at
    }

    /// Completes the next receive, which that message has filled.
    #[inline]
    pub(crate) fn receive(&mut self, wqe: &Single<'_>, wr_id: u64, source_qpn: u32) {
        let has_imm = wqe.opcode == SEND_WITH_IMM;
        let flags = if has_imm { WcFlags::WITH_IMM } else { WcFlags::empty() };
        let cqe = Cqe {
            wr_id,
            byte_len: wqe.payload.len() as u32,
            imm: if has_imm { wqe.imm } else { 0 },
            src_qp: source_qpn,
            wqe: self.completions.count() as u32,
            opcode: WC_RECV,
            flags: flags.bits() as u8,
            ..Cqe::default()
        };
        self.completions.push(&cqe, wqe.flags & verbs_abi::shm::wqe::flag::SOLICITED != 0);
        self.publish();
    }
}
