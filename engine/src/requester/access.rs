//! A request that waits for an access to foreign memory.
//!
//! The requester's own memory may take as long as it likes. The peer's is the peer's answer: what takes too long is
//! silence, as on a wire.

use std::sync::{Arc, atomic::AtomicBool};

use verbs_abi::verbs::{Opcode, QpType};

use super::{Attempt, Requester};
use crate::foreign::{Access, Kind, Task};

/// How long an access to the peer's memory may take at least before it counts as silence, ns: an honest peer's page
/// may have to come from a disk.
const PATIENCE: u64 = 500_000_000;

impl Requester {
    /// An access is wanted: from now on the peer has time for it, if it is the peer's memory.
    pub(super) fn begin_access(&mut self, now: u64) -> Attempt {
        self.retry.progress();
        self.await_access(now)
    }

    /// An access is on its way. One to the peer's memory is the peer's answer, and may come too late.
    pub(super) fn await_access(&mut self, now: u64) -> Attempt {
        if self.accesses_own_memory() {
            return Attempt::Foreign(None);
        }
        if self.qp_type == QpType::Uc {
            // Nobody answers a UC request: what takes too long is lost.
            if let Some(until) = self.retry.patience(now, PATIENCE) {
                return Attempt::Foreign(Some(until));
            }
            let opcode = Opcode::try_from(u32::from(self.wqe.opcode)).unwrap_or(Opcode::Send);
            self.succeed(opcode, self.wqe.length());
            return Attempt::Done;
        }
        match self.retry.slowness(now, PATIENCE) {
            Ok(until) => Attempt::Foreign(until),
            Err(status) => self.fail(status, false, None),
        }
    }

    /// Whether the access that is wanted or on its way is to the requester's memory.
    pub(crate) fn accesses_own_memory(&self) -> bool {
        let reads = matches!(Opcode::try_from(u32::from(self.wqe.opcode)), Ok(Opcode::Read));
        match self.stage.kind() {
            Some(Kind::Read) => !reads,
            Some(Kind::Write) => reads || self.stage.found().is_some(),
            Some(Kind::Atomic) | None => false,
        }
    }

    /// The access that the last attempt asked for, under that ticket.
    pub(crate) fn launch(&mut self, ticket: u64, cancelled: &Arc<AtomicBool>) -> Option<Task> {
        self.stage.launch(ticket, cancelled)
    }

    /// An access has come back. False: not the one that is waited for.
    pub(crate) fn arrive(&mut self, access: Access) -> bool {
        let arrived = self.stage.arrive(access);
        if arrived {
            self.retry.progress();
        }
        arrived
    }

    /// The memory of the access on its way is gone.
    pub(crate) fn lose_access(&mut self) {
        self.stage.clear();
        self.retry.progress();
    }
}
