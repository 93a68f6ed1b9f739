//! The shortest way: requests from one mapped piece to one mapped piece, executed without lists.
//!
//! It succeeds or does nothing. Whatever is not as it should be, the general way finds out again, and says why.

use std::ptr::NonNull;

use verbs_abi::verbs::{AccessFlags, Opcode, QpType};

use super::Requester;
use crate::{Memory, Responder, memory::check, place::place};

impl Requester {
    /// An RDMA WRITE of at most `budget` bytes. False: nothing has happened.
    #[inline]
    pub(super) fn write_at_once<M: Memory>(
        &self,
        local: &M,
        responder: &Responder,
        remote: &M,
        budget: u64,
    ) -> bool {
        let wqe = &*self.wqe;
        if u32::from(wqe.opcode) != Opcode::Write.value() || self.qp_type == QpType::Ud || self.placed != 0 {
            return false;
        }
        let source = match (wqe.inline(), wqe.sges()) {
            (Some(bytes), _) => NonNull::from(bytes).cast(),
            (None, [sge]) => {
                let len = u64::from(sge.length);
                match check(local, self.pd, sge.lkey, sge.addr, len, AccessFlags::empty()) {
                    Some(span) => match span.mapped(local) {
                        Some(source) => source,
                        None => return false,
                    },
                    None => return false,
                }
            }
            _ => return false,
        };
        let len = wqe.length();
        if len == 0 || len > budget {
            return false;
        }
        match responder.write_target(remote, self.qpn, wqe.rkey, wqe.remote_addr, len) {
            Some(target) => {
                // SAFETY: both are valid for `len` bytes, as `Memory::mapped` promises or as a slice of that length.
                unsafe { place(source.as_ptr(), target.as_ptr(), len as usize) };
                local.is_intact() && remote.is_intact()
            }
            None => false,
        }
    }
}
