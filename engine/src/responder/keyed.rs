//! Requests for memory that a key names: READ, WRITE, atomics, ATOMIC WRITE, FLUSH.

use std::sync::atomic::{Ordering, fence};

use verbs_abi::verbs::AccessFlags;

use super::{ACCESS, INVALID_REQUEST, OPERATION, Reply, Request, Responder, place_slice};
use crate::{
    Memory,
    memory::{Span, all_reached, check_remote},
    place::{Atomic, atomic},
    stage::Stage,
    transfer::mapped_word,
};

impl Responder {
    /// Finds what an RDMA READ may read; the requester moves the bytes.
    pub(crate) fn read<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
    ) -> Result<Option<Span>, Reply> {
        self.admit(request.source_qpn)?;
        if !self.access.contains(AccessFlags::REMOTE_READ) {
            return Err(INVALID_REQUEST);
        }
        if request.len == 0 {
            return Ok(None);
        }
        let need = AccessFlags::REMOTE_READ;
        let span = self.reachable(memory, request, request.len, need).ok_or(ACCESS)?;
        if all_reached(memory, &[span]) { Ok(Some(span)) } else { Err(Reply::OutOfReach) }
    }

    /// Executes an atomic.
    pub(crate) fn atomic<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        operation: Atomic,
        stage: &mut Stage,
    ) -> Reply {
        if let Err(reply) = self.admit(request.source_qpn) {
            return reply;
        }
        if !self.access.contains(AccessFlags::REMOTE_ATOMIC) || !request.remote_addr.is_multiple_of(8) {
            return INVALID_REQUEST;
        }
        let need = AccessFlags::REMOTE_ATOMIC;
        let Some(span) = self.reachable(memory, request, 8, need) else {
            return ACCESS;
        };
        if !span.addr.is_multiple_of(8) {
            return INVALID_REQUEST;
        }
        if !all_reached(memory, &[span]) {
            return Reply::OutOfReach;
        }
        match mapped_word(memory, &span) {
            Some(word) => {
                // SAFETY: eight mapped bytes, aligned: the application's address is, and pages keep alignment.
                let found = unsafe { atomic(word.as_ptr(), operation) };
                if memory.is_intact() { Reply::Found(found) } else { OPERATION }
            }
            None => match stage.want_atomic(span.addr, operation) {
                Ok(()) => Reply::Foreign,
                Err(_) => OPERATION,
            },
        }
    }

    /// What a WRITE may write to.
    pub(super) fn written<M: Memory>(&self, memory: &M, request: &Request<'_, M>) -> Option<Span> {
        let need = AccessFlags::REMOTE_WRITE;
        let allowed = self.access.contains(need);
        if allowed { self.reachable(memory, request, request.len, need) } else { None }
    }

    pub(super) fn write<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        stage: &mut Stage,
    ) -> Reply {
        if !self.access.contains(AccessFlags::REMOTE_WRITE) {
            return INVALID_REQUEST;
        }
        if request.len == 0 {
            return Reply::Ack;
        }
        let need = AccessFlags::REMOTE_WRITE;
        let Some(span) = self.reachable(memory, request, request.len, need) else {
            return ACCESS;
        };
        if !all_reached(memory, &[span]) {
            return Reply::OutOfReach;
        }
        place_slice(request, (memory, &[span]), stage)
    }

    /// What the request's key gives it of its range.
    fn reachable<M: Memory>(
        &self,
        memory: &M,
        request: &Request<'_, M>,
        len: u64,
        need: AccessFlags,
    ) -> Option<Span> {
        check_remote(memory, (self.pd, self.qpn), request.rkey, request.remote_addr, len, need)
    }

    /// Eight aligned bytes, written in one piece.
    pub(super) fn atomic_write<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        stage: &mut Stage,
    ) -> Reply {
        if request.len != 8 || !request.remote_addr.is_multiple_of(8) {
            return INVALID_REQUEST;
        }
        self.write(memory, request, stage)
    }

    /// A FLUSH: what was placed is visible already, so its rights are all there is to it.
    pub(super) fn make_visible<M: Memory>(&mut self, memory: &M, request: &Request<'_, M>) -> Reply {
        let flush = request.flush;
        let (len, addr) = if flush.is_whole_mr { (0, None) } else { (flush.len, Some(request.remote_addr)) };
        if flush.need.is_empty() || !self.access.contains(flush.need) {
            return ACCESS;
        }
        let Some(mr) = memory.lookup_remote(request.rkey, self.qpn) else { return ACCESS };
        let addr = addr.unwrap_or(mr.iova);
        match check_remote(memory, (self.pd, self.qpn), request.rkey, addr, len, flush.need) {
            Some(_) => {
                fence(Ordering::SeqCst);
                Reply::Ack
            }
            None => ACCESS,
        }
    }
}
