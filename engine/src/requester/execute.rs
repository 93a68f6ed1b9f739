//! Executing a checked request against the peer's responder.

use verbs_abi::verbs::Opcode;

use super::Requester;
use crate::{
    Memory, Responder,
    memory::{Span, all_reached},
    place::Atomic,
    responder::{OPERATION, Reply, Request},
    stage::Stage,
    transfer::{Broken, Side, are_mapped, transfer},
};

impl Requester {
    pub(super) fn execute<M: Memory>(
        &self,
        opcode: Opcode,
        local: &M,
        (responder, remote): (&mut Responder, &M),
        budget: u64,
        stage: &mut Stage,
    ) -> Reply {
        let request = self.request(opcode, local, budget);
        match opcode {
            Opcode::Read => match responder.read(remote, &request) {
                Ok(span) => self.fill(local, (remote, span.as_slice()), &request, stage),
                Err(reply) => reply,
            },
            // What was found must have its place before it is changed.
            _ if opcode.is_atomic() && self.owner && !self.reaches_own(local) => Reply::OutOfReach,
            Opcode::CmpAndSwp | Opcode::FetchAndAdd => {
                let operation = match opcode {
                    Opcode::CmpAndSwp => {
                        Atomic::CompareSwap { compare: self.wqe.compare_add, swap: self.wqe.swap }
                    }
                    _ => Atomic::FetchAdd(self.wqe.compare_add),
                };
                let reply = match stage.found() {
                    Some(word) => Reply::Found(word),
                    None => responder.atomic(remote, &request, operation, stage),
                };
                match reply {
                    Reply::Found(word) => self.store_found(local, word, stage),
                    reply => reply,
                }
            }
            _ => responder.handle(remote, &request, stage),
        }
    }

    /// Whether this seat reaches all of the requester's memory by itself.
    fn reaches_own(&self, local: &impl Memory) -> bool {
        all_reached(local, &self.spans) && are_mapped(&self.spans)
    }

    /// Moves the next slice of an RDMA READ's data.
    fn fill<M: Memory>(
        &self,
        local: &M,
        from: (&M, &[Span]),
        request: &Request<'_, M>,
        stage: &mut Stage,
    ) -> Reply {
        let left = request.len - request.placed;
        let skip = (request.placed, request.placed);
        let now = left.min(request.budget);
        match transfer(Side::Spans(from.0, from.1), (local, &self.spans), skip, now, stage) {
            Ok(moved) if moved == left => Reply::Ack,
            Ok(moved) => Reply::Partly(request.placed + moved),
            Err(Broken::Target) => Reply::SourceFault,
            Err(Broken::Source) => OPERATION,
            Err(Broken::Foreign) => Reply::Foreign,
        }
    }

    fn store_found<M: Memory>(&self, local: &M, word: u64, stage: &mut Stage) -> Reply {
        match transfer(Side::Bytes(&word.to_ne_bytes()), (local, &self.spans), (0, 0), 8, stage) {
            Ok(_) => Reply::Ack,
            Err(Broken::Foreign) => {
                stage.keep_found(word);
                Reply::Foreign
            }
            Err(_) => Reply::SourceFault,
        }
    }
}
