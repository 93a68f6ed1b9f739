//! Long payload that one thread copies while another has the fabric.
//!
//! ```text
//!   worker 0:  run, next_copy | perform ......... | end_copy, run, next_copy | perform ....
//!   worker 1:                 | run, next_copy    | perform ......... | end_copy, run
//! ```
//!
//! The QP whose request it is has no turn meanwhile, and neither it nor its peer is flushed. Control verbs must wait
//! until nothing is being performed: none of them finds memory in use.

use verbs_abi::verbs::QpState;

use super::{Fabric, access::Named};
use crate::{Memory, place::Placement};

/// Payload to be copied.
#[derive(Debug)]
pub struct Copy {
    ticket: u64,
    /// The QP whose request it is.
    user: Named,
    /// The connected one.
    peer: Named,
    placement: Placement,
}

/// The copies of a fabric.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// Whether several threads serve the fabric.
    are_shared: bool,
    next_ticket: u64,
    /// To be performed now.
    next: Option<Copy>,
}

impl Copies {
    /// Bytes of what is to be performed now, if anything is.
    pub(super) fn due(&self) -> Option<u64> {
        self.next.as_ref().map(|copy| copy.placement.len())
    }
}

impl Copy {
    /// Copies it.
    ///
    /// # Safety
    /// No control verb, and nothing else that takes memory from a client, has been at work on the fabric since
    /// [`Fabric::next_copy`] has told it.
    pub unsafe fn perform(&self) {
        // SAFETY: what was mapped when it was made is mapped until a verb ends it.
        unsafe { self.placement.perform() };
    }
}

impl<M: Memory> Fabric<M> {
    /// Says whether several threads serve the fabric, which pays for copies beside it where more than one QP has work.
    pub fn share_copies(&mut self, are_shared: bool) {
        self.copies.are_shared = are_shared;
    }

    /// The payload to be copied before the next turn, or beside it. Ask after each [`Fabric::run`]; what is told must be
    /// performed and brought back ([`Fabric::end_copy`]).
    pub fn next_copy(&mut self) -> Option<Copy> {
        self.copies.next.take()
    }

    /// Takes back a copy that was performed.
    pub fn end_copy(&mut self, copy: Copy) {
        let Copy { ticket, user, peer, placement } = copy;
        let intact = [user, peer].map(|name| self.lets_go(name));
        let Some(qp) = self.named_mut(user).filter(|qp| qp.copying == Some(ticket)) else { return };
        qp.copying = None;
        if intact == [true; 2] {
            qp.requester.advance(placement.len());
        }
        // Else the next attempt finds the key gone with its client, or tries in vain.
        self.schedule.take_back(user.at);
    }

    /// A QP is no longer kept busy by a copy: flushing may have waited for it. Whether its owner's memory is sound.
    fn lets_go(&mut self, name: Named) -> bool {
        let Some(qp) = self.named_mut(name) else { return false };
        qp.busy -= 1;
        let (owner, is_ending) = (qp.owner, matches!(qp.state, QpState::Err | QpState::Sqe));
        if is_ending {
            self.schedule.enqueue(name.at);
        }
        self.clients[owner].as_ref().is_some_and(|client| client.memory.is_intact())
    }

    /// Sets the next part of a QP's request aside to be copied, if it can be and others have something to do meanwhile.
    /// Says how long it is.
    pub(super) fn set_aside(&mut self, at: usize, now: u64) -> Option<u64> {
        if !self.copies.are_shared || self.schedule.len() == 0 {
            return None;
        }
        let peer_at = self.resolve_peer(at)?;
        let (requester, owner, peer) = super::run::halves(&mut self.qps, at, Some(peer_at))?;
        let (responder, peers_owner) = peer?;
        let (local, remote) = (self.clients[owner].as_ref()?, self.clients[peers_owner].as_ref()?);
        let placement = requester.next_part(&local.memory, (responder, &remote.memory), now)?;
        let [user, peer] = [at, peer_at].map(|at| self.qps[at].as_ref().map(|qp| Named { at, qpn: qp.qpn }));
        let (user, peer) = (user?, peer?);
        let (ticket, len) = (self.copies.next_ticket, placement.len());
        self.copies.next_ticket += 1;
        for name in [user, peer] {
            if let Some(qp) = self.named_mut(name) {
                qp.busy += 1;
            }
        }
        if let Some(qp) = self.named_mut(user) {
            qp.copying = Some(ticket);
        }
        debug_assert!(self.copies.next.is_none(), "what was set aside before was not asked for");
        self.copies.next = Some(Copy { ticket, user, peer, placement });
        Some(len)
    }
}
