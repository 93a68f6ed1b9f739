//! The shortest way: requests from one mapped piece to one mapped piece, executed without lists.
//!
//! It succeeds or does nothing. Whatever is not as it should be, the general way finds out again, and says why.

use std::ptr::NonNull;

use verbs_abi::{
    shm::{
        cqe::Cqe,
        wqe::{InlineRoom, Payload, Single, flag},
    },
    verbs::{AccessFlags, Opcode, QpType, WcStatus},
};

use super::Requester;
use crate::{Memory, Responder, memory::KeyedRange, place::place};

const WRITE: u8 = Opcode::Write.value() as u8;
const READ: u8 = Opcode::Read.value() as u8;
const SEND: u8 = Opcode::Send.value() as u8;
const SEND_WITH_IMM: u8 = Opcode::SendWithImm.value() as u8;

impl Requester {
    /// Executes a work request that never lay in the queue, whose head is the next to be executed (owner). False:
    /// nothing has happened.
    #[inline]
    pub fn execute_single<M: Memory>(
        &mut self,
        wqe: &Single<'_>,
        local: &M,
        (responder, remote): (&mut Responder, &M),
        budget: u64,
    ) -> bool {
        let done = self.move_at_once(wqe, local, responder, remote, budget);
        if done {
            self.conclude(wqe, 0);
        }
        done
    }

    /// Executes the work request at the head of the queue, which holds blocks up to `tail`, if it is one of a single
    /// block and nobody has begun it (owner). False: nothing has happened.
    #[inline]
    pub fn execute_next<M: Memory>(
        &mut self,
        tail: u64,
        local: &M,
        (responder, remote): (&mut Responder, &M),
        budget: u64,
    ) -> bool {
        if tail == self.head || self.fetched || self.has_begun() {
            return false;
        }
        let (block, mut room) = (self.area.read_sq_block(self.head), InlineRoom::default());
        let Some(wqe) = Single::of_block(&block, &mut room) else { return false };
        let done = self.move_at_once(&wqe, local, responder, remote, budget);
        if done {
            self.conclude(&wqe, 1);
        }
        done
    }

    /// The same for an RDMA WRITE that was fetched.
    #[inline]
    pub(super) fn write_at_once<M: Memory>(
        &self,
        local: &M,
        responder: &Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        let may = self.wqe.opcode == WRITE && self.qp_type != QpType::Ud && self.placed == 0;
        let single = if may { self.wqe.single() } else { None };
        single.is_some_and(|wqe| self.write_single(&wqe, local, responder, remote, budget))
    }

    #[inline(always)]
    fn move_at_once<M: Memory>(
        &self,
        wqe: &Single<'_>,
        local: &M,
        responder: &mut Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        match wqe.opcode {
            WRITE => self.write_single(wqe, local, responder, remote, budget),
            SEND | SEND_WITH_IMM => self.send_single(wqe, local, responder, remote, budget),
            READ if self.qp_type != QpType::Uc => self.read_single(wqe, local, responder, remote, budget),
            _ => false,
        }
    }

    #[inline(always)]
    fn write_single<M: Memory>(
        &self,
        wqe: &Single<'_>,
        local: &M,
        responder: &Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        let len = wqe.payload.len();
        if len == 0 || len > budget {
            return false;
        }
        let Some(source) = self.source(wqe, local) else { return false };
        let need = AccessFlags::REMOTE_WRITE;
        let Some(target) = responder.keyed_range(remote, self.qpn, (wqe.rkey, wqe.remote_addr, len), need)
        else {
            return false;
        };
        // SAFETY: both are valid for `len` bytes, as `Memory::mapped` promises or as a slice of that length.
        unsafe { place(source.as_ptr(), target.as_ptr(), len as usize) };
        local.is_intact() && remote.is_intact()
    }

    #[inline(never)]
    fn read_single<M: Memory>(
        &self,
        wqe: &Single<'_>,
        local: &M,
        responder: &Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        let Payload::Memory(sge) = wqe.payload else { return false };
        let len = u64::from(sge.length);
        if len == 0 || len > budget || self.initiator_depth() == 0 {
            return false;
        }
        let need = AccessFlags::LOCAL_WRITE;
        let own = KeyedRange { key: sge.lkey, pd: self.pd, qpn: None, iova: sge.addr, len, need };
        let Some(target) = local.locate(&own) else { return false };
        let need = AccessFlags::REMOTE_READ;
        let Some(source) = responder.keyed_range(remote, self.qpn, (wqe.rkey, wqe.remote_addr, len), need)
        else {
            return false;
        };
        // SAFETY: both are valid for `len` bytes, as `Memory::mapped` promises.
        unsafe { place(source.as_ptr(), target.as_ptr(), len as usize) };
        local.is_intact() && remote.is_intact()
    }

    #[inline(never)]
    fn send_single<M: Memory>(
        &self,
        wqe: &Single<'_>,
        local: &M,
        responder: &mut Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        let len = wqe.payload.len();
        if len == 0 || len > budget {
            return false;
        }
        let Some(source) = self.source(wqe, local) else { return false };
        let Some((wr_id, target)) = responder.next_receive(remote, self.qpn, len) else { return false };
        // SAFETY: both are valid for `len` bytes, as `Memory::mapped` promises or as a slice of that length.
        unsafe { place(source.as_ptr(), target.as_ptr(), len as usize) };
        if !local.is_intact() || !remote.is_intact() {
            return false;
        }
        responder.receive(wqe, wr_id, self.qpn);
        true
    }

    /// Where the payload is.
    #[inline(always)]
    fn source<M: Memory>(&self, wqe: &Single<'_>, local: &M) -> Option<NonNull<u8>> {
        match wqe.payload {
            Payload::Inline(bytes) => Some(NonNull::from(bytes).cast()),
            Payload::Memory(sge) => local.locate(&KeyedRange {
                key: sge.lkey,
                pd: self.pd,
                qpn: None,
                iova: sge.addr,
                len: sge.length.into(),
                need: AccessFlags::empty(),
            }),
        }
    }

    /// Ends a work request of so many blocks that was executed well.
    #[inline]
    fn conclude(&mut self, wqe: &Single<'_>, blocks: u64) {
        let len = wqe.payload.len();
        self.messages += 1;
        self.bytes += len;
        if wqe.flags & flag::SIGNALED != 0 {
            let opcode = match wqe.opcode {
                WRITE => Opcode::Write,
                READ => Opcode::Read,
                _ => Opcode::Send,
            };
            let cqe = Cqe {
                wr_id: wqe.wr_id,
                byte_len: len as u32,
                wqe: self.done as u32,
                status: WcStatus::Success.value() as u8,
                opcode: opcode.wc_opcode().value() as u8,
                ..Cqe::default()
            };
            self.completions.push(&cqe, false);
        }
        self.head = self.head.wrapping_add(blocks);
        self.done = self.done.wrapping_add(1);
    }
}
