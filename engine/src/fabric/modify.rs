//! `ibv_modify_qp`: the checks are the state table's, the consequences are here.

use verbs_abi::{
    proto::QpAttr,
    qp_state::{self, AttrLimits},
    verbs::{AccessFlags, EventType, Mtu, QpAttrMask, QpState, QpType},
};

use super::{Fabric, GID_TABLE_LEN, MAX_RATE, MAX_RD_ATOMIC, Modified, Qp};
use crate::{Memory, retry::Retries};

const EINVAL: i32 = 22;
const ENOENT: i32 = 2;
/// The QP number that no QP has.
const NOBODY: u32 = 0;

/// The limits that attributes are checked against.
pub const ATTR_LIMITS: AttrLimits = AttrLimits {
    gid_tbl_len: GID_TABLE_LEN,
    max_mtu: Mtu::Mtu4096,
    max_rd_atomic: MAX_RD_ATOMIC,
    max_dest_rd_atomic: MAX_RD_ATOMIC,
    max_rate: MAX_RATE,
};

impl<M: Memory> Fabric<M> {
    /// Changes a QP's attributes and state. Before a transition to RESET or ERR the caller made sure that no
    /// direct peer executes on it ([`Fabric::seize`]), and before RESET that it is not busy ([`Fabric::is_busy`]).
    ///
    /// # Errors
    /// ENOENT without such a QP; the errno of what the state table refuses.
    pub fn modify_qp(&mut self, client: u32, qpn: u32, mask: u32, attr: &QpAttr) -> Result<Modified, i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        let Some(qp) = self.qps[at].as_mut() else { return Err(ENOENT) };
        let from = qp.state;
        let qp_type = qp.requester.qp_type();
        let to = qp_state::modify(qp_type, from, mask, attr, &ATTR_LIMITS).map_err(|_| EINVAL)?;
        let mask = qp_state::heeded(qp_type, QpAttrMask::try_from(mask).map_err(|_| EINVAL)?);
        merge(&mut qp.attr, attr, mask);
        if from == QpState::Init && to == QpState::Rtr {
            self.connect_far(at);
        }
        let source = self.source(at);
        if let Some(qp) = self.qps[at].as_mut() {
            qp.apply(source);
        }
        if mask.contains(QpAttrMask::RATE_LIMIT) {
            self.change_pace(at);
        }
        if mask.intersects(QpAttrMask::ACCESS_FLAGS | QpAttrMask::MIN_RNR_TIMER) {
            self.change_shadow(at);
        }
        Ok(self.enter(
            at,
            from,
            to,
            attr.en_sqd_async_notify != 0 && mask.contains(QpAttrMask::EN_SQD_ASYNC_NOTIFY),
        ))
    }

    /// What a transition brings with it.
    fn enter(&mut self, at: usize, from: QpState, to: QpState, announce_drain: bool) -> Modified {
        let mut modified = Modified::default();
        match to {
            QpState::Reset => self.reset(at),
            QpState::Err => self.fail_all(at),
            _ => self.set_state(at, to),
        }
        if from == QpState::Init && to == QpState::Rtr {
            modified.direct = self.connect_direct(at);
            // Whoever sent too early need not wait for its timeout.
            self.poke_waiters_for(at);
        }
        if to == QpState::Rts && from != to {
            if from == QpState::Rtr {
                self.start_far(at);
            }
            self.give_seat(at);
            // The doorbell of what was posted too early has passed.
            if self.qps[at].as_ref().is_some_and(|qp| qp.direct.is_some() || qp.requester.has_work()) {
                self.schedule.enqueue(at);
            }
        }
        if to == QpState::Sqd && from == QpState::Rts {
            self.drain(at, announce_drain);
        }
        modified
    }

    /// Stops the send queue behind what was begun.
    fn drain(&mut self, at: usize, announce: bool) {
        let holds = self.hold_seat(at);
        let Some(qp) = self.qps[at].as_mut() else { return };
        if qp.state != QpState::Sqd {
            return;
        }
        qp.draining = Some(announce);
        if !holds {
            self.look_again(at);
        } else if !qp.has_begun() {
            self.end_drain(at);
        } else if qp.waiting.is_none() {
            self.schedule.enqueue(at);
        }
    }

    /// The send queue stands still.
    pub(super) fn end_drain(&mut self, at: usize) {
        if self.qps[at].as_mut().and_then(|qp| qp.draining.take()) == Some(true) {
            self.raise(at, EventType::SqDrained);
        }
    }

    /// The number of the one QP that a connected QP hears: its peer, if that lives at the address it names.
    fn source(&self, at: usize) -> u32 {
        let Some(qp) = self.qps[at].as_ref() else { return NOBODY };
        let (qpn, gid) = (qp.attr.dest_qp_num, qp.attr.ah_attr.dgid);
        if qp.far.is_some() {
            return qpn;
        }
        if qp.requester.qp_type() == QpType::Ud || self.resolve(qp, qpn, &gid).is_none() {
            return NOBODY;
        }
        qpn
    }

    /// Hears a peer that got its address after this QP was connected.
    pub(super) fn admit_late_source(&mut self, at: usize) {
        let deaf = |qp: &Qp| qp.state.may_respond() && qp.responder.accepts(NOBODY);
        if !self.qps[at].as_ref().is_some_and(deaf) {
            return;
        }
        self.connect_far(at);
        let source = self.source(at);
        if let Some(qp) = self.qps[at].as_mut() {
            qp.apply(source);
        }
        if source != NOBODY {
            self.poke_waiters_for(at);
        }
    }

    fn set_state(&mut self, at: usize, state: QpState) {
        if let Some(qp) = self.qps[at].as_mut() {
            if state != QpState::Sqd {
                qp.draining = None;
            }
            let fails = state == QpState::Err && qp.state != state;
            qp.state = state;
            qp.responder.set_state(state);
            if fails {
                self.tell_last_wqe(at);
            }
        }
    }

    /// Back to the start: nothing posted, nothing completed, no peer.
    fn reset(&mut self, at: usize) {
        self.disconnect(at);
        self.disconnect_far(at);
        self.stop_waiting(at);
        let Some(qp) = self.qps[at].as_mut() else { return };
        self.schedule.forget(at);
        qp.copying = None;
        qp.area_seat_to_router();
        qp.forget_unpolled();
        qp.requester.reset();
        qp.responder.reset();
        qp.attr = QpAttr { cap: qp.attr.cap, path_mig_state: qp.attr.path_mig_state, ..QpAttr::default() };
        qp.apply(NOBODY);
        qp.peer = None;
        self.set_state(at, QpState::Reset);
    }

    /// Into ERR: everything posted, now or later, is flushed.
    pub(super) fn fail_all(&mut self, at: usize) {
        self.set_state(at, QpState::Err);
        let holds = self.hold_seat(at);
        let receives = self.seize_receives(at);
        self.stop_waiting(at);
        let Some(qp) = self.qps[at].as_mut() else { return };
        if let Some(far) = qp.far.as_mut() {
            far.initiator.abandon();
            far.target.abandon();
        }
        qp.responder.set_ring_me(true);
        if !self.halt_shadow(at) {
            // The NIC may still write: its end has another turn.
            return;
        }
        let Some(qp) = self.qps[at].as_mut() else { return };
        if qp.busy > 0 {
            // What comes back flushed is not written to any more: the end of the access has another turn.
            return;
        }
        let more_sends = holds && qp.requester.flush();
        let more_receives = receives && qp.responder.flush();
        if more_sends || more_receives {
            self.schedule.enqueue(at);
        }
        if !holds || !receives {
            self.look_again(at);
        }
    }

    /// Into ERR at its next turn.
    pub(super) fn condemn(&mut self, at: usize) {
        self.set_state(at, QpState::Err);
        self.schedule.enqueue(at);
    }

    /// The error of an unreliable QP's send queue: receives go on.
    pub(super) fn fail_sends(&mut self, at: usize) {
        self.set_state(at, QpState::Sqe);
        if let Some(far) = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut()) {
            far.initiator.abandon();
        }
        if self.qps[at].as_ref().is_some_and(|qp| qp.busy > 0) {
            return;
        }
        if self.qps[at].as_mut().is_some_and(|qp| qp.requester.flush()) {
            self.schedule.enqueue(at);
        }
    }
}

impl Qp {
    /// Hands the attributes to the halves; requests of `source` will be executed.
    fn apply(&mut self, source: u32) {
        let attr = &self.attr;
        let mut access = AccessFlags::try_from(attr.qp_access_flags).unwrap_or_default();
        if attr.max_dest_rd_atomic == 0 {
            // Nothing to remember a READ or an atomic by: as if they were not enabled.
            access = access.difference(AccessFlags::REMOTE_READ | AccessFlags::REMOTE_ATOMIC);
        }
        let (mut timeout, retry_cnt, rnr_retry) = (attr.timeout, attr.retry_cnt, attr.rnr_retry);
        if self.far.is_some() && timeout & 31 != 0 {
            // A requester may wait up to four times as long as it is told (C9-140); what is between hosts needs it.
            timeout = (timeout & 31).saturating_add(2).min(31);
        }
        self.requester.configure(Retries { timeout, retry_cnt, rnr_retry }, attr.max_rd_atomic);
        self.responder.configure(source, access, attr.min_rnr_timer, attr.qkey);
        self.pace.set(attr.rate_limit, attr.max_burst_size);
    }

    /// What lies unpolled in its rings goes with them; its owner has left how much it polled.
    pub(super) fn forget_unpolled(&self) {
        self.requester.forget_unpolled();
        self.responder.forget_unpolled();
    }

    fn area_seat_to_router(&mut self) {
        self.requester.area().header.seat().take_from_dead();
        self.held = true;
    }
}

/// Takes over the attributes in the mask.
fn merge(into: &mut QpAttr, from: &QpAttr, mask: QpAttrMask) {
    macro_rules! take {
        ($($flag:ident => $($field:ident),+;)+) => {
            $(if mask.contains(QpAttrMask::$flag) { $(into.$field = from.$field;)+ })+
        };
    }
    take! {
        ACCESS_FLAGS => qp_access_flags;
        PKEY_INDEX => pkey_index;
        PORT => port_num;
        QKEY => qkey;
        AV => ah_attr;
        PATH_MTU => path_mtu;
        TIMEOUT => timeout;
        RETRY_CNT => retry_cnt;
        RNR_RETRY => rnr_retry;
        RQ_PSN => rq_psn;
        MAX_QP_RD_ATOMIC => max_rd_atomic;
        MIN_RNR_TIMER => min_rnr_timer;
        SQ_PSN => sq_psn;
        MAX_DEST_RD_ATOMIC => max_dest_rd_atomic;
        PATH_MIG_STATE => path_mig_state;
        DEST_QPN => dest_qp_num;
        EN_SQD_ASYNC_NOTIFY => en_sqd_async_notify;
        RATE_LIMIT => rate_limit, max_burst_size;
    }
}
