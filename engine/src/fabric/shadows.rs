//! Pairs of shadow QPs: how two routers agree on them, their turns, their end.
//!
//! ```text
//!   Awaiting --link up--> Opening --> Offered --the peer's offer--> Connecting --> Connected
//!       |                    |           |                              |             | RTS, and heard by the peer:
//!       +--------------------+-----------+--(decline, either way)-------+             v requests go to the NIC
//!                            v
//!                     the link alone                     Closing: until the NIC touches nothing any more
//! ```
//!
//! Until it is decided, requests wait; a peer that says nothing for too long is silence, as on a wire. Once a side has
//! said that it hears its peer it does not decline any more, and nothing is sent by NIC before the peer has said so, so
//! the two never take different ways.

use verbs_abi::{
    proto::QpAttr,
    shm::wqe::SendWqe,
    verbs::{EventType, QpState, QpType, WcStatus},
};

use super::{Fabric, access::Half, far::Far, schedule::WORK};
use crate::{
    Memory,
    nic::{Bounce, Completion, Endpoint, Order, Rights, ShadowId, ShadowInit},
    shadow::{Finished, Known, Landed, Pool, Shadow, Stage, Step, Taken, Tools, Word},
    wire::{Emit, packet::Header},
};

/// How long the peer may be silent at least while the two agree, ns.
const PATIENCE: u64 = 500_000_000;
/// How soon to look again for memory to bounce through, ns.
const LOOK_AGAIN: u64 = 1_000_000;
/// Work requests in a shadow's queue at the most.
const QUEUE: u32 = 4096;

impl<M: Memory> Fabric<M> {
    /// Gives a QP whose peer lives behind that router a shadow, if it can have one.
    pub(super) fn attach_shadow(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(peer) = qp.far.as_ref().map(|far| far.peer) else { return };
        let Some(nic) = self.nics.nic.as_ref().filter(|_| self.nics.is_usable) else { return };
        let can = qp.requester.qp_type() == QpType::Rc
            && qp.create.srq.is_none()
            && self.nics.peers.get(&peer) != Some(&false)
            && nic.limits().sge >= qp.create.cap.max_recv_sge.max(1);
        if !can {
            return;
        }
        self.nics.next = self.nics.next.wrapping_add(1).max(1);
        let (id, qpn) = (self.nics.next, qp.qpn);
        self.nics.shadows.insert(id, (at, qpn));
        if let Some(far) = self.far_mut(at) {
            far.shadow = Some(Box::new(Shadow::new(id)));
        }
        self.open_shadow(at);
    }

    fn far_mut(&mut self, at: usize) -> Option<&mut Far> {
        self.qps[at].as_mut()?.far.as_deref_mut()
    }

    fn shadow_mut(&mut self, at: usize) -> Option<&mut Shadow> {
        self.far_mut(at)?.shadow.as_deref_mut()
    }

    /// Has the shadow made as soon as the link is there, or does without.
    fn open_shadow(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(far) = qp.far.as_ref() else { return };
        let Some(shadow) = far.shadow.as_ref().filter(|shadow| shadow.stage == Stage::Awaiting) else {
            return;
        };
        let (peer, id, cap) = (far.peer, shadow.id, qp.create.cap);
        let init = ShadowInit {
            tenant: qp.tenant,
            send_wr: cap.max_send_wr.clamp(1, QUEUE),
            recv_wr: cap.max_recv_wr.clamp(1, QUEUE),
            access: qp.attr.qp_access_flags,
        };
        match self.nics.peers.get(&peer) {
            Some(true) if self.nics.is_usable => {
                if let Some(shadow) = self.shadow_mut(at) {
                    shadow.stage = Stage::Opening;
                }
                self.order(Order::Open(id, init));
            }
            None if self.nics.is_usable => {
                if let Some(stream) = self.stream_of(at) {
                    self.links.call(stream);
                }
            }
            _ => self.drop_shadow(at),
        }
    }

    /// The link to a peer is new: what was said may be lost.
    pub(super) fn resume_shadow(&mut self, at: usize) {
        self.open_shadow(at);
        let Some(shadow) = self.shadow_mut(at) else { return };
        shadow.sender.forget_all();
        let (stage, end, seen) = (shadow.stage, shadow.mine, shadow.theirs.is_some());
        let has_said = shadow.has_said;
        if matches!(stage, Stage::Offered | Stage::Connecting | Stage::Connected) {
            self.say(at, &Word::Offer { seen, end });
        }
        if has_said {
            self.say(at, &Word::Heard);
        }
    }

    /// Says something to the peer's router about the pair.
    pub(super) fn say(&mut self, at: usize, word: &Word) {
        let Some(far) = self.qps[at].as_ref().and_then(|qp| qp.far.as_ref()) else { return };
        let Some(shadow) = &far.shadow else { return };
        let to = shadow.theirs.map_or(0, |(number, _)| number);
        let header = word.encode(&far.path, shadow.id, to);
        let Some(stream) = self.stream_of(at) else { return };
        self.links.outbox(stream).push(&header);
        self.links.call(stream);
    }

    /// A word of the peer's router about the pair.
    pub(super) fn take_word(&mut self, at: usize, header: &Header) {
        let Some((word, from, to)) = Word::decode(header) else { return };
        let Some(shadow) = self.shadow_mut(at) else {
            if matches!(word, Word::Offer { .. })
                && let Some(far) = self.far_mut(at)
            {
                let answer = Word::Decline.encode(&far.path, 0, from);
                let Some(stream) = self.stream_of(at) else { return };
                self.links.outbox(stream).push(&answer);
                self.links.call(stream);
            }
            return;
        };
        let is_partner = shadow.theirs.is_some_and(|(number, _)| number == from);
        if let Word::Offer { seen, end } = word {
            return self.take_offer(at, seen, (from, end));
        }
        if to != shadow.id || word != Word::Decline && !is_partner {
            return;
        }
        match word {
            Word::Heard => {
                shadow.is_heard = true;
                self.share_way(at);
            }
            Word::Decline if shadow.is_undecided() => self.drop_shadow(at),
            Word::Ask(key) if shadow.stage == Stage::Connected => return self.tell_key(at, key),
            Word::Grant(key, grant) => shadow.sender.learn(key, Known::Granted(grant)),
            Word::Deny(key) => shadow.sender.learn(key, Known::Denied),
            Word::Revoke(key) => shadow.sender.forget(key),
            Word::Offer { .. } | Word::Decline | Word::Ask(_) => return,
        }
        self.schedule.enqueue(at);
    }

    fn take_offer(&mut self, at: usize, seen: bool, theirs: (u32, Endpoint)) {
        let Some(shadow) = self.shadow_mut(at) else { return };
        let (stage, end, has_said) = (shadow.stage, shadow.mine, shadow.has_said);
        let is_known = shadow.theirs.is_some_and(|(number, _)| number == theirs.0);
        match stage {
            Stage::Awaiting | Stage::Opening => shadow.theirs = Some(theirs),
            Stage::Offered => {
                shadow.theirs = Some(theirs);
                if !seen {
                    self.say(at, &Word::Offer { seen: true, end });
                }
                self.connect_shadow(at);
            }
            // Another life of the peer's, or one that cannot be: this one is connected already.
            Stage::Connecting | Stage::Connected | Stage::Closing if !is_known || seen => {}
            Stage::Connecting => self.say(at, &Word::Offer { seen: true, end }),
            Stage::Connected => {
                self.say(at, &Word::Offer { seen: true, end });
                if has_said {
                    self.say(at, &Word::Heard);
                }
            }
            Stage::Closing => {}
        }
    }

    pub(super) fn shadow_opened(&mut self, at: usize, opened: Result<(Endpoint, Bounce), ()>) {
        let Some(tenant) = self.qps[at].as_ref().map(|qp| qp.tenant) else { return };
        let Some(shadow) = self.shadow_mut(at).filter(|shadow| shadow.stage == Stage::Opening) else {
            return;
        };
        let Ok((end, bounce)) = opened else { return self.decline(at) };
        (shadow.mine, shadow.stage) = (end, Stage::Offered);
        let seen = shadow.theirs.is_some();
        if !self.nics.pools.get(&tenant).is_some_and(|pool| pool.is_of(&bounce)) {
            self.nics.pools.insert(tenant, Pool::new(bounce));
        }
        self.say(at, &Word::Offer { seen, end });
        self.connect_shadow(at);
    }

    fn connect_shadow(&mut self, at: usize) {
        let Some(attr) = self.qps[at].as_ref().map(|qp| qp.attr) else { return };
        let Some(limits) = self.nics.nic.as_ref().map(|nic| nic.limits()) else { return };
        let Some(shadow) = self.shadow_mut(at).filter(|shadow| shadow.stage == Stage::Offered) else {
            return;
        };
        let Some((_, remote)) = shadow.theirs else { return };
        shadow.stage = Stage::Connecting;
        let order = Order::Connect {
            shadow: shadow.id,
            remote,
            mtu: limits.port.mtu.min(remote.port.mtu),
            min_rnr_timer: attr.min_rnr_timer,
            dest_rd_atomic: attr.max_dest_rd_atomic.clamp(1, limits.port.dest_rd_atomic.max(1)),
        };
        self.order(order);
    }

    pub(super) fn shadow_connected(&mut self, at: usize, well: bool) {
        let Some(shadow) = self.shadow_mut(at).filter(|shadow| shadow.stage == Stage::Connecting) else {
            return;
        };
        if !well {
            return self.decline(at);
        }
        shadow.stage = Stage::Connected;
        self.share_way(at);
        self.start_shadow(at);
        self.schedule.enqueue(at);
    }

    /// When both hear each other, the link carries only what the NIC does not.
    fn share_way(&mut self, at: usize) {
        let Some(far) = self.far_mut(at) else { return };
        if far.shadow.as_ref().is_some_and(|shadow| shadow.stage == Stage::Connected && shadow.is_heard) {
            far.initiator.share_way();
            far.target.shares = true;
        }
    }

    /// Lets the shadow send, when it is connected and the virtual QP may.
    pub(super) fn start_shadow(&mut self, at: usize) {
        let Some(limits) = self.nics.nic.as_ref().map(|nic| nic.limits()) else { return };
        let Some(qp) = self.qps[at].as_mut() else { return };
        let (state, attr) = (qp.state, qp.attr);
        let Some(shadow) = qp.far.as_mut().and_then(|far| far.shadow.as_mut()) else { return };
        let ready = shadow.stage == Stage::Connected && !shadow.is_starting;
        if !ready || !matches!(state, QpState::Rts | QpState::Sqd) {
            return;
        }
        shadow.is_starting = true;
        let served = shadow.theirs.map_or(1, |(_, end)| end.port.dest_rd_atomic);
        let order = Order::Start {
            shadow: shadow.id,
            psn: shadow.mine.psn,
            timeout: attr.timeout,
            // Soft-RoCE takes 7 for ever.
            retry_cnt: attr.retry_cnt.min(6),
            rnr_retry: rnr_retries(attr.rnr_retry),
            rd_atomic: attr.max_rd_atomic.min(limits.rd_atomic).min(served).max(1),
            rights: rights(&attr),
        };
        self.order(order);
    }

    /// Attributes of the virtual QP have changed that a shadow in RTS must follow. One that is not is told with the others.
    pub(super) fn change_shadow(&mut self, at: usize) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(shadow) = qp.far.as_ref().and_then(|far| far.shadow.as_ref()) else { return };
        if shadow.is_starting && shadow.stage == Stage::Connected {
            let order = Order::Change(shadow.id, rights(&qp.attr));
            self.order(order);
        }
    }

    pub(super) fn shadow_started(&mut self, at: usize, well: bool) {
        let Some(shadow) = self.shadow_mut(at) else { return };
        shadow.is_started = well;
        if !well && !shadow.is_lost {
            self.raise(at, EventType::QpFatal);
            self.fail_all(at);
        }
        self.schedule.enqueue(at);
    }

    /// There will be no shadow: the link alone.
    pub(super) fn decline(&mut self, at: usize) {
        self.say(at, &Word::Decline);
        self.drop_shadow(at);
    }

    /// Goes on without the shadow, which nobody has used.
    fn drop_shadow(&mut self, at: usize) {
        let Some(shadow) = self.far_mut(at).and_then(|far| far.shadow.take()) else { return };
        self.bury_shadow(at, *shadow);
        if let Some(qp) = self.qps[at].as_mut() {
            qp.requester.retry().begin();
        }
        self.schedule.enqueue(at);
    }

    /// Ends a shadow that no QP has any more.
    pub(super) fn bury_shadow(&mut self, at: usize, mut shadow: Shadow) {
        let (id, stage) = (shadow.id, shadow.stage);
        self.nics.shadows.remove(&id);
        if !shadow.is_made() {
            return;
        }
        let Some(tenant) = self.qps[at].as_ref().map(|qp| qp.tenant) else { return };
        let mut slots = shadow.sender.abandon();
        slots.extend(shadow.receiver.abandon());
        self.nics.closing.entry(id).or_insert((tenant, Vec::new())).1.extend(slots);
        if stage != Stage::Closing {
            self.order(Order::Close(id));
        }
    }

    /// Ends the shadow of a QP that fails, is reset or destroyed. False: the NIC may still touch something for it.
    pub(super) fn halt_shadow(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return true };
        let tenant = qp.tenant;
        let Some(far) = qp.far.as_mut() else { return true };
        let Some(shadow) = far.shadow.as_mut() else { return true };
        if shadow.stage == Stage::Closing {
            return false;
        }
        if shadow.is_unused() {
            // Nothing was posted yet.
            self.say(at, &Word::Decline);
            if let Some(shadow) = self.far_mut(at).and_then(|far| far.shadow.take()) {
                self.bury_shadow(at, *shadow);
            }
            return true;
        }
        shadow.stage = Stage::Closing;
        let (id, slots) = (shadow.id, shadow.sender.abandon());
        self.nics.closing.entry(id).or_insert((tenant, Vec::new())).1.extend(slots);
        self.order(Order::Close(id));
        false
    }

    pub(super) fn shadow_closed(&mut self, id: ShadowId) {
        if let Some((at, _)) = self.nics.shadows.remove(&id) {
            self.end_shadow(at, id);
        }
        if let Some((tenant, slots)) = self.nics.closing.remove(&id)
            && let Some(pool) = self.nics.pools.get_mut(&tenant)
        {
            slots.into_iter().for_each(|slot| pool.give(slot));
        }
    }

    /// The NIC has let go of a QP's shadow: what was posted can be flushed.
    fn end_shadow(&mut self, at: usize, id: ShadowId) {
        let Some(qp) = self.qps.get_mut(at).and_then(Option::as_mut) else { return };
        let tenant = qp.tenant;
        let Some(far) = qp.far.as_mut() else { return };
        if far.shadow.as_ref().is_none_or(|shadow| shadow.id != id) {
            return;
        }
        // What landed before the end is announced, unless that takes an access to foreign memory.
        let _ = self.announce(at);
        let Some(far) = self.far_mut(at) else { return };
        if let Some(mut shadow) = far.shadow.take() {
            let slots = shadow.receiver.abandon();
            self.nics.closing.entry(id).or_insert((tenant, Vec::new())).1.extend(slots);
        }
        self.schedule.enqueue(at);
    }

    pub(super) fn shadow_completed(&mut self, at: usize, completion: Completion) {
        let Some(shadow) = self.shadow_mut(at) else { return };
        if completion.is_receive && completion.status == WcStatus::WrFlushErr {
            // The NIC has put the shadow into error by itself, and need not have said why.
            shadow.is_spoilt = true;
        } else if completion.is_receive {
            shadow.receiver.complete(completion);
        } else {
            shadow.sender.complete(completion.id, completion.status);
        }
        self.schedule.enqueue(at);
    }

    /// One turn of a QP with a shadow. True: there is more.
    pub(super) fn serve_shadow(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        let Some(state) = self.qps[at].as_ref().map(|qp| qp.state) else { return false };
        self.open_shadow(at);
        if !self.announce(at) {
            return false;
        }
        if self.shadow_mut(at).is_some_and(|shadow| shadow.is_spoilt) {
            if self.finish_sent(at) {
                self.fail_all(at);
            }
            return false;
        }
        let mut more = false;
        if self.shadow_mut(at).is_some_and(|shadow| shadow.stage == Stage::Connected) && state.may_respond() {
            more |= self.post_receives(at, now, budget);
        }
        if matches!(state, QpState::Rts | QpState::Sqd) {
            more |= self.send_by_shadow(at, now, budget);
        }
        more
    }

    /// Announces what has landed. False: the QP has failed.
    fn announce(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(client) = self.clients[qp.owner].as_ref() else { return false };
        let Some(far) = qp.far.as_mut() else { return false };
        let Some(shadow) = far.shadow.as_mut() else { return true };
        let Some(pool) = self.nics.pools.get_mut(&qp.tenant) else { return true };
        let target = &mut far.target;
        let landed = shadow.receiver.reap(
            &mut qp.responder,
            &client.memory,
            pool,
            &mut target.stage,
            &mut target.announced,
        );
        match landed {
            Landed::Well => true,
            Landed::Foreign => {
                self.launch(at, Half::Target);
                true
            }
            Landed::Failed if qp.state == QpState::Err => true,
            Landed::Failed => {
                self.fail_all(at);
                false
            }
        }
    }

    /// Gives the NIC the receives that are posted. True: there are more.
    fn post_receives(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        while *budget >= WORK {
            if let Some(qp) = self.qps[at].as_ref() {
                qp.responder.set_ring_me(true);
            }
            match self.post_receive(at) {
                Taken::Posted => *budget = budget.saturating_sub(WORK / 4),
                Taken::Later => return false,
                Taken::Done => {
                    self.say_heard(at);
                    return false;
                }
                Taken::NoRoom => {
                    self.say_heard(at);
                    self.set_due(at, Some(now + LOOK_AGAIN));
                    return false;
                }
                Taken::Broken => {
                    self.raise(at, EventType::QpFatal);
                    self.fail_all(at);
                    return false;
                }
            }
        }
        true
    }

    /// Tells the peer that it is heard, once: what it sends finds the receives that were posted before.
    fn say_heard(&mut self, at: usize) {
        let Some(shadow) = self.shadow_mut(at) else { return };
        if !std::mem::replace(&mut shadow.has_said, true) {
            self.say(at, &Word::Heard);
        }
    }

    fn post_receive(&mut self, at: usize) -> Taken {
        let Some(qp) = self.qps[at].as_mut() else { return Taken::Later };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Taken::Later };
        let Some(shadow) = qp.far.as_mut().and_then(|far| far.shadow.as_mut()) else { return Taken::Later };
        let (Some(nic), Some(pool)) = (self.nics.nic.as_mut(), self.nics.pools.get_mut(&qp.tenant)) else {
            return Taken::Later;
        };
        let (keys, whose, user) = (&mut self.nics.keys, (client.id, client.tenant), (at, qp.qpn));
        let mut tools = Tools {
            shadow: shadow.id,
            wr: qp.create.cap.max_recv_wr.clamp(1, QUEUE),
            sge: nic.limits().sge,
            nic: nic.as_mut(),
            pool,
            reach: &mut |mr| keys.reach(whose, &client.memory, mr, user),
        };
        let taken = shadow.receiver.advance(&qp.responder, &client.memory, &mut tools);
        self.give_orders();
        taken
    }

    /// Sends by NIC, or by the link what must go there. True: there is more.
    fn send_by_shadow(&mut self, at: usize, now: u64, budget: &mut u64) -> bool {
        if !self.shadow_mut(at).is_some_and(|shadow| shadow.is_live()) {
            self.lose_patience(at, now);
            return false;
        }
        if !self.finish_sent(at) {
            return false;
        }
        while *budget >= WORK {
            if self.far_mut(at).is_some_and(|far| far.initiator.has_begun()) {
                let more = self.initiate(at, now, budget);
                let Some(far) = self.far_mut(at) else { return false };
                if let (Some(rest), Some(shadow)) = (far.initiator.take_split(), far.shadow.as_mut()) {
                    shadow.sender.take_rest(rest);
                }
                if far.initiator.has_begun() {
                    return more;
                }
            }
            match self.post_send(at) {
                Step::Posted(_) => *budget -= WORK,
                Step::Empty => {
                    self.end_drain_of_shadow(at);
                    return false;
                }
                Step::Later => {
                    // What fails at once has nothing to wait for.
                    let well = self.finish_sent(at);
                    if well {
                        self.watch_questions(at, now);
                    }
                    return false;
                }
                Step::Ask(key) => {
                    self.say(at, &Word::Ask(key));
                    self.watch_questions(at, now);
                    return false;
                }
                Step::Link => {
                    if self.shadow_mut(at).is_none_or(|shadow| shadow.sender.has_begun()) {
                        return false;
                    }
                    match self.emit_one(at, now) {
                        Emit::Sent(len) => *budget = budget.saturating_sub(WORK + len),
                        Emit::Foreign => self.launch(at, Half::Export),
                        Emit::NoRoom => self.await_room(at),
                        Emit::Idle | Emit::Bad(_) => {}
                    }
                }
                Step::Foreign => {
                    self.launch(at, Half::Export);
                    return false;
                }
                Step::NoRoom => {
                    self.set_due(at, Some(now + LOOK_AGAIN));
                    return false;
                }
                Step::Bad(_) | Step::Broken => {
                    self.raise(at, EventType::QpFatal);
                    self.fail_all(at);
                    return false;
                }
            }
            if !self.finish_sent(at) {
                return false;
            }
        }
        true
    }

    fn post_send(&mut self, at: usize) -> Step {
        let Some(qp) = self.qps[at].as_mut() else { return Step::Empty };
        let Some(client) = self.clients[qp.owner].as_ref() else { return Step::Empty };
        let Some(far) = qp.far.as_mut() else { return Step::Empty };
        let Some(shadow) = far.shadow.as_mut() else { return Step::Empty };
        let (Some(nic), Some(pool)) = (self.nics.nic.as_mut(), self.nics.pools.get_mut(&qp.tenant)) else {
            return Step::Empty;
        };
        let (keys, whose, user) = (&mut self.nics.keys, (client.id, client.tenant), (at, qp.qpn));
        let mut tools = Tools {
            shadow: shadow.id,
            wr: qp.create.cap.max_send_wr.clamp(1, QUEUE),
            sge: nic.limits().sge,
            nic: nic.as_mut(),
            pool,
            reach: &mut |mr| keys.reach(whose, &client.memory, mr, user),
        };
        let takes_new = qp.state == QpState::Rts;
        let stage = far.initiator.send_stage();
        let step = shadow.sender.advance(&mut qp.requester, &client.memory, stage, takes_new, &mut tools);
        self.give_orders();
        step
    }

    /// Completes what the NIC has done. False: the QP has failed.
    fn finish_sent(&mut self, at: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return false };
        let Some(client) = self.clients[qp.owner].as_ref() else { return false };
        let Some(far) = qp.far.as_mut() else { return false };
        let Some(shadow) = far.shadow.as_mut() else { return false };
        let Some(pool) = self.nics.pools.get_mut(&qp.tenant) else { return true };
        let stage = far.initiator.reply_stage();
        match shadow.sender.reap(&mut qp.requester, &client.memory, pool, stage) {
            Finished::Well => true,
            Finished::Foreign => {
                self.launch(at, Half::Reply);
                true
            }
            Finished::Failed => {
                self.set_failed(at, None);
                false
            }
        }
    }

    fn end_drain_of_shadow(&mut self, at: usize) {
        let drained = |qp: &super::Qp| qp.state == QpState::Sqd && !qp.has_begun();
        if self.qps[at].as_ref().is_some_and(drained) {
            self.end_drain(at);
        }
    }

    /// While the peer's router owes the answer to a question, its silence counts.
    fn watch_questions(&mut self, at: usize, now: u64) {
        let is_asking = self.shadow_mut(at).is_some_and(|shadow| shadow.sender.is_asking());
        if is_asking {
            self.lose_patience(at, now);
        } else if let Some(qp) = self.qps[at].as_mut() {
            qp.requester.retry().begin();
        }
    }

    /// Something is to be sent and the peer's router has not said what must be known: silence, as on a wire.
    fn lose_patience(&mut self, at: usize, now: u64) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let mut wqe = Box::<SendWqe>::default();
        if qp.state != QpState::Rts || !matches!(qp.requester.look_ahead(0, &mut wqe), Ok(true)) {
            return;
        }
        if qp.requester.retry().deadline().is_none() {
            qp.requester.retry().begin();
        }
        match qp.requester.retry().slowness(now, PATIENCE) {
            Ok(due) => self.set_due(at, due),
            Err(status) => self.end_first(at, status),
        }
    }

    /// Ends the oldest work request, of which nothing was done.
    fn end_first(&mut self, at: usize, status: WcStatus) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let mut wqe = Box::<SendWqe>::default();
        let begun = qp.has_begun();
        if !begun && matches!(qp.requester.look_ahead(0, &mut wqe), Ok(true)) {
            qp.requester.finish(&mut wqe, status);
            self.set_failed(at, None);
        }
    }
}

fn rights(attr: &QpAttr) -> Rights {
    Rights { access: attr.qp_access_flags, min_rnr_timer: attr.min_rnr_timer }
}

/// The NIC's RNR retries: one more than the application's, for a receive is the NIC's a moment after it was posted. 7 is
/// for ever.
fn rnr_retries(asked: u8) -> u8 {
    if asked < 6 { asked + 1 } else { asked }
}
