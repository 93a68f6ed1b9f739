//! Sending datagrams: to the one QP that is named, or to all that are attached to a group.

use verbs_abi::{
    ids::{self, Qpn},
    shm::wqe::Address,
    verbs::{Opcode, QpState, QpType},
};

use super::{Fabric, run::halves, schedule::WORK};
use crate::{Attempt, Memory};

impl<M: Memory> Fabric<M> {
    /// Sends the fetched datagram, or as much of it to a group as `budget` allows.
    pub(super) fn send_datagram(&mut self, at: usize, budget: &mut u64) -> Attempt {
        let Some(qp) = self.qps[at].as_mut() else { return Attempt::Wait(None) };
        let Some(local) = self.clients[qp.owner].as_ref() else { return Attempt::Wait(None) };
        let opcode = match qp.requester.prepare_datagram(&local.memory, qp.attr.qkey) {
            Ok(opcode) => opcode,
            Err(attempt) => return attempt,
        };
        let sent = if is_group(qp.requester.address()) {
            self.send_to_group(at, opcode, budget)
        } else {
            match self.resolve_datagram(at) {
                Some(peer_at) => self.hand_over(at, peer_at, opcode),
                None => self.ship(at, opcode),
            }
        };
        match (sent, self.qps[at].as_mut()) {
            (Ok(()), Some(qp)) => qp.requester.end_datagram(opcode),
            (Err(attempt), _) => attempt,
            (_, None) => Attempt::Wait(None),
        }
    }

    /// Sends it to each member of its group, in the order of their numbers, so that a later turn knows where to go on,
    /// and then to the routers of other hosts that have some.
    fn send_to_group(&mut self, at: usize, opcode: Opcode, budget: &mut u64) -> Result<(), Attempt> {
        loop {
            let Some(qp) = self.qps[at].as_mut() else { return Err(Attempt::Wait(None)) };
            if !matches!(qp.state, QpState::Rts | QpState::Sqd) {
                // It was a receiver, too, and failed as such: the datagram is flushed.
                return Err(Attempt::Done);
            }
            let from = qp.requester.next_receiver();
            let group = qp.requester.address().dgid;
            let Some((qpn, member)) = self.groups.next(qp.tenant, &group, from) else {
                return self.send_to_routers(at, opcode, budget);
            };
            if *budget < WORK {
                return Err(Attempt::Unfinished);
            }
            *budget -= WORK;
            if member != at || !qp.create.block_self_mcast {
                self.hand_over(at, member, opcode)?;
            }
            if let Some(qp) = self.qps[at].as_mut() {
                qp.requester.set_next_receiver(qpn + 1);
            }
        }
    }

    /// Hands the fetched datagram to a QP.
    fn hand_over(&mut self, at: usize, peer_at: usize, opcode: Opcode) -> Result<(), Attempt> {
        let found = halves(&mut self.qps, at, Some(peer_at));
        let Some((requester, owner, Some((responder, peer_owner)))) = found else { return Ok(()) };
        let (local, remote) = (self.clients[owner].as_ref(), self.clients[peer_owner].as_ref());
        let (Some(local), Some(remote)) = (local, remote) else { return Ok(()) };
        let sgid = local.gids.get(requester.address().sgid_index as usize).copied().unwrap_or_default();
        let handed = requester.hand_over(opcode, (&local.memory, &sgid), (responder, &remote.memory));
        self.heed(Some(peer_at));
        if self.qps[peer_at].as_ref().is_some_and(|peer| peer.responder.has_parcels()) {
            self.schedule.enqueue(peer_at);
        }
        handed
    }

    fn resolve_datagram(&self, at: usize) -> Option<usize> {
        let qp = self.qps[at].as_ref()?;
        let address = qp.requester.address();
        let found = self.resolve(qp, address.qpn, &address.dgid)?;
        let peer = self.qps[found].as_ref()?;
        (peer.requester.qp_type() == QpType::Ud).then_some(found)
    }
}

/// Whether an address is that of a multicast group.
fn is_group(address: &Address) -> bool {
    address.qpn == Qpn::MULTICAST.value() && ids::Gid(address.dgid).is_multicast()
}
