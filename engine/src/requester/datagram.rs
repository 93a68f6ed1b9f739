//! A datagram on its way: checked at each turn, handed to one receiver after the other.

use std::sync::atomic::Ordering;

use verbs_abi::{
    proto::Gid,
    verbs::{Opcode, WcStatus},
};

use super::{Attempt, OWN_QKEY, Requester};
use crate::{Memory, Responder, responder::Reply};

impl Requester {
    /// Makes the fetched datagram ready to be handed over; `qkey` is the QP's own Q_Key.
    ///
    /// # Errors
    /// What the attempt comes to instead.
    pub(crate) fn prepare_datagram<M: Memory>(&mut self, local: &M, qkey: u32) -> Result<Opcode, Attempt> {
        if self.stage.in_flight() {
            return Err(Attempt::Foreign(None));
        }
        let opcode = self.check(local).map_err(|status| self.fail(status, false, None))?;
        if self.wqe.address.qkey & OWN_QKEY != 0 {
            self.wqe.address.qkey = qkey;
        }
        Ok(opcode)
    }

    /// Hands it to a receiver, which may take it or not.
    ///
    /// # Errors
    /// What the attempt comes to when its bytes cannot be read, now or at all.
    pub(crate) fn hand_over<M: Memory>(
        &mut self,
        opcode: Opcode,
        (local, sgid): (&M, &Gid),
        (responder, remote): (&mut Responder, &M),
    ) -> Result<(), Attempt> {
        let mut stage = std::mem::take(&mut self.stage);
        let request = self.request(opcode, local, u64::MAX);
        let reply = responder.datagram(remote, &request, sgid, &self.wqe.address, &mut stage);
        self.stage = stage;
        match reply {
            Reply::SourceFault => Err(self.fail(WcStatus::LocProtErr, false, None)),
            Reply::Foreign => Err(Attempt::Foreign(None)),
            _ => Ok(()),
        }
    }

    /// Completes it: sent is sent, whoever took it.
    pub(crate) fn end_datagram(&mut self, opcode: Opcode) -> Attempt {
        self.succeed(opcode, self.wqe.length());
        Attempt::Done
    }

    /// The least number of a QP of its group that has not been handed it yet.
    pub(crate) fn next_receiver(&self) -> u32 {
        self.placed as u32
    }

    /// Remembers that all QPs of its group below this number have been handed it.
    pub(crate) fn set_next_receiver(&mut self, qpn: u32) {
        self.placed = qpn.into();
        self.area.header.journal_wqe().store(self.done.wrapping_add(1), Ordering::Relaxed);
    }
}
