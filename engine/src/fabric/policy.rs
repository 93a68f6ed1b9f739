//! A change of policy while QPs run: what was direct becomes the router's, what may be direct is offered to its owner.

use std::sync::atomic::Ordering;

use verbs_abi::{
    proto::{DirectPeer, Mode},
    verbs::{QpState, QpType},
};

use super::Fabric;
use crate::Memory;

const ENOENT: i32 = 2;

impl<M: Memory> Fabric<M> {
    /// Changes the mode of a client. Connections that may not be direct any more become the router's as soon as their
    /// owners pause; those that may be now are offered to their owners, who ask by [`Fabric::pair`].
    pub fn set_mode(&mut self, client: u32, mode: Mode) {
        let Some(&owner) = self.client_index.get(&client) else { return };
        let Some(state) = self.clients[owner].as_mut() else { return };
        if std::mem::replace(&mut state.mode, mode) == mode {
            return;
        }
        match mode {
            Mode::Isolated => self.withdraw_seats(owner),
            Mode::Direct => self.offer_seats(owner),
        }
    }

    /// Connects a client's QP directly, if that was offered and still may be.
    ///
    /// # Errors
    /// ENOENT without such a QP.
    pub fn pair(&mut self, client: u32, qpn: u32) -> Result<Option<(DirectPeer, u32)>, i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        if !self.is_open_to_offers(at) {
            return Ok(None);
        }
        let paired = self.connect_direct(at);
        // The seat is given at the end of a turn.
        self.schedule.enqueue(at);
        Ok(paired)
    }

    /// The peer with which a QP may be connected directly.
    pub(super) fn direct_peer(&mut self, at: usize) -> Option<usize> {
        let peer_at = self.resolve_peer(at)?;
        let (qp, peer) = (self.qps[at].as_ref()?, self.qps[peer_at].as_ref()?);
        let [one, other] = [qp, peer].map(|qp| qp.requester.qp_type());
        let connects = one == other && matches!(one, QpType::Rc | QpType::Uc);
        // Receives of a shared queue are given out by the router.
        let may = connects && !qp.pace.is_limited() && peer.create.srq.is_none() && at != peer_at;
        (may && self.are_direct(qp.owner, peer.owner)).then_some(peer_at)
    }

    /// Whether a QP that is connected directly may stay so.
    pub(super) fn may_stay_direct(&self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_ref().filter(|qp| !qp.pace.is_limited()) else { return false };
        let peer = qp.direct.and_then(|peer| self.qps[peer].as_ref());
        peer.is_some_and(|peer| self.are_direct(qp.owner, peer.owner))
    }

    /// Ends a direct connection whose seat the router holds; what was posted goes on in the router.
    pub(super) fn part(&mut self, at: usize) {
        let peer = self.qps[at].as_mut().and_then(|qp| qp.direct.take());
        if let Some(peer) = peer.and_then(|peer| self.qps[peer].as_mut()) {
            peer.attached.retain(|other| *other != at);
        }
    }

    /// A QP has got another rate: one with a limit is the router's, who has a clock.
    pub(super) fn change_pace(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        if qp.direct.is_some() && qp.pace.is_limited() {
            if self.hold_seat(at) {
                self.part(at);
                self.schedule.enqueue(at);
            } else {
                self.look_again(at);
            }
        } else {
            self.offer_seat(at);
        }
    }

    fn are_direct(&self, one: usize, other: usize) -> bool {
        let is_direct =
            |at: usize| self.clients[at].as_ref().is_some_and(|client| client.mode == Mode::Direct);
        is_direct(one) && is_direct(other)
    }

    fn withdraw_seats(&mut self, owner: usize) {
        let paired: Vec<usize> =
            self.clients[owner].iter().flat_map(|client| client.paired.iter().copied()).collect();
        self.ask_for_seats(&paired);
        for at in paired {
            let attached = self.qps[at].as_ref().map(|qp| qp.attached.clone()).unwrap_or_default();
            for direct in attached.into_iter().chain([at]) {
                if self.hold_seat(direct) {
                    self.part(direct);
                    self.schedule.enqueue(direct);
                } else {
                    self.look_again(direct);
                }
            }
        }
    }

    fn offer_seats(&mut self, owner: usize) {
        let slots = self.clients[owner].iter().flat_map(|client| client.slots.iter().flatten().copied());
        for at in slots.collect::<Vec<_>>() {
            let peer = self.resolve_peer(at);
            peer.into_iter().chain([at]).for_each(|open| self.offer_seat(open));
        }
    }

    fn offer_seat(&mut self, at: usize) {
        if self.is_open_to_offers(at)
            && self.direct_peer(at).is_some()
            && let Some(qp) = self.qps[at].as_ref()
        {
            qp.requester.area().header.offer().store(1, Ordering::Relaxed);
        }
    }

    fn is_open_to_offers(&self, at: usize) -> bool {
        self.qps[at].as_ref().is_some_and(|qp| {
            qp.direct.is_none() && matches!(qp.state, QpState::Rtr | QpState::Rts | QpState::Sqd)
        })
    }
}
