//! CQs and QPs come and go.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use verbs_abi::{
    proto::{NewQp, QpAttr},
    shm::{Window, arena, cq, cq::CqArea, cqe::CompletionWriter},
    verbs::{MigState, QpState, QpType},
};

use super::{Client, Cq, Fabric, Qp, QpInit, overrun::Alarm};
use crate::{Bell, CompletionQueue, Completions, Memory, Requester, Responder, pace::Pace};

const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const ENOENT: i32 = 2;
const EOPNOTSUPP: i32 = 95;
const LAST_QPN: u32 = 0x00ff_fffe;

impl<M: Memory> Fabric<M> {
    /// Adds a CQ that lies at `area` (`offset` in the arena) and returns its id.
    ///
    /// # Errors
    /// EINVAL without such a client.
    pub fn create_cq(
        &mut self,
        client: u32,
        area: CqArea,
        offset: u64,
        bell: Option<Arc<dyn Bell>>,
    ) -> Result<u32, i32> {
        let overruns = Arc::clone(&self.overruns);
        let client = self.client_mut(client).ok_or(EINVAL)?;
        let id = client.next_cq;
        client.next_cq += 1;
        let alarm = Arc::new(Alarm { overruns, client: client.id, cq: id });
        let queue = Arc::new(CompletionQueue::new(area, bell).with_alarm(alarm));
        let cq = Cq { queue, offset, rings: 0, free_rings: Vec::new(), next_ring: 0, failed: false };
        client.cqs.insert(id, cq);
        Ok(id)
    }

    /// Removes a CQ; returns its offset.
    ///
    /// # Errors
    /// ENOENT without such a CQ, EBUSY while a QP uses it.
    pub fn destroy_cq(&mut self, client: u32, cq: u32) -> Result<u64, i32> {
        let client = self.client_mut(client).ok_or(EINVAL)?;
        match client.cqs.get(&cq) {
            None => Err(ENOENT),
            Some(found) if found.rings > 0 => Err(EBUSY),
            Some(found) => {
                let offset = found.offset;
                client.cqs.remove(&cq);
                Ok(offset)
            }
        }
    }

    /// Adds a QP in RESET.
    ///
    /// # Errors
    /// EOPNOTSUPP for a type that this device does not have, ENOENT for an unknown CQ, ENOMEM without a free slot.
    pub fn create_qp(&mut self, client: u32, init: QpInit) -> Result<NewQp, i32> {
        let QpInit { create, geometry, area, offset } = init;
        let qp_type = QpType::try_from(create.qp_type).map_err(|_| EINVAL)?;
        let (sends, receives) = match qp_type {
            QpType::Rc | QpType::Uc | QpType::Ud => (true, true),
            QpType::XrcSend => (true, false),
            QpType::XrcRecv if create.xrcd.is_some() => (false, false),
            _ => return Err(EOPNOTSUPP),
        };
        if create.srq.is_some_and(|srq| !self.srqs.contains_key(&srq)) {
            return Err(ENOENT);
        }
        let qpn = self.new_qpn().ok_or(ENOMEM)?;
        let at = self.free_qps.last().copied().unwrap_or(self.qps.len());
        let owner = *self.client_index.get(&client).ok_or(EINVAL)?;
        let client = self.clients[owner].as_mut().ok_or(EINVAL)?;
        let slot = client.free_slots.last().copied().unwrap_or(client.slots.len() as u32);
        if slot >= arena::MAX_QP {
            return Err(ENOMEM);
        }
        let (sends, send_slot) = client.completions(sends.then_some(create.send_cq), &area.sq_cqes)?;
        let (receives, recv_slot) =
            match client.completions(receives.then_some(create.recv_cq), &area.rq_cqes) {
                Ok(made) => made,
                Err(errno) => {
                    client.give_ring(create.send_cq, send_slot);
                    return Err(errno);
                }
            };
        // Nothing fails from here on: what was only looked at is taken.
        client.free_slots.pop();
        self.free_qps.pop();
        if slot as usize == client.slots.len() {
            client.slots.push(None);
        }
        client.slots[slot as usize] = Some(at);
        self.schedule.adopt(at, owner);

        let attr =
            QpAttr { cap: create.cap, path_mig_state: MigState::Migrated.value(), ..QpAttr::default() };
        let mut responder = Responder::new(qp_type, create.pd, area.clone(), receives).numbered(qpn);
        responder.set_inbox(Arc::clone(&client.inboxes));
        let qp = Qp {
            qpn,
            owner,
            sharers: Vec::new(),
            tenant: client.tenant,
            slot,
            create,
            geometry,
            offset,
            rings: [send_slot, recv_slot],
            attr,
            state: QpState::Reset,
            requester: Requester::new(qpn, qp_type, create.pd, area, sends),
            responder,
            waiting: None,
            draining: None,
            peer: None,
            direct: None,
            far: None,
            attached: Vec::new(),
            groups: BTreeSet::new(),
            held: true,
            busy: 0,
            copying: None,
            pace: Pace::default(),
        };
        if at == self.qps.len() {
            self.qps.push(None);
        }
        self.qps[at] = Some(qp);
        self.qpn_index.insert(qpn, at);
        create.srq.into_iter().for_each(|srq| self.join_srq(at, srq));
        create.xrcd.into_iter().for_each(|domain| self.join_domain(at, domain));
        Ok(NewQp { qpn, slot, offset, geometry, send_slot, recv_slot })
    }

    /// Whether a client's QP holds sends that need nothing but a turn. On an adapter they would be under way when the
    /// QP is ended a moment later, and programs rest on that: they end a QP as soon as they have heard enough.
    pub fn is_sending(&mut self, client: u32, qpn: u32) -> bool {
        let Some(at) = self.owned(client, qpn) else { return false };
        let Some(qp) = self.qps[at].as_ref() else { return false };
        let header = &qp.requester.area().header;
        let is_posted = header.sq_tail().load(Ordering::SeqCst) != header.sq_head().load(Ordering::SeqCst);
        let sends = is_posted && qp.state == QpState::Rts && qp.waiting.is_none() && qp.far.is_none();
        if sends && qp.copying.is_none() {
            self.schedule.enqueue(at);
        }
        sends
    }

    /// What `ibv_query_qp` returns.
    ///
    /// # Errors
    /// ENOENT without such a QP.
    pub fn query_qp(&mut self, client: u32, qpn: u32) -> Result<QpAttr, i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        self.settle(at);
        let qp = self.qps[at].as_ref().ok_or(ENOENT)?;
        // An owner that still runs has its QP in error all the same.
        let state = if qp.has_failed_direct() { QpState::Err } else { qp.state }.value();
        let draining = qp.draining.is_some();
        Ok(QpAttr { qp_state: state, cur_qp_state: state, sq_draining: draining.into(), ..qp.attr })
    }

    /// Removes a QP, if no other client has it open. Pending work is dropped without completions. The caller made sure
    /// that no direct peer executes on it ([`Fabric::seize`]) and that it is not busy ([`Fabric::is_busy`]).
    ///
    /// # Errors
    /// ENOENT without such a QP, EBUSY for one that is attached to a multicast group.
    pub fn destroy_qp(&mut self, client: u32, qpn: u32) -> Result<(), i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        let owner = *self.client_index.get(&client).ok_or(ENOENT)?;
        if self.qps[at].as_ref().is_some_and(|qp| !qp.groups.is_empty()) {
            return Err(EBUSY);
        }
        if !self.let_go(at, owner) {
            self.remove_qp(at);
        }
        Ok(())
    }

    pub(super) fn remove_qp(&mut self, at: usize) {
        self.disconnect(at);
        self.disconnect_far(at);
        self.stop_waiting(at);
        let Some(mut qp) = self.qps[at].take() else { return };
        // A direct peer that still looks at the header sees a QP that does not answer.
        qp.responder.set_state(QpState::Reset);
        qp.responder.give_back();
        qp.forget_unpolled();
        self.leave_groups(qp.tenant, qp.qpn, &qp.groups);
        qp.create.srq.into_iter().for_each(|srq| self.leave_srq(at, srq));
        qp.create.xrcd.into_iter().for_each(|domain| self.leave_domain(at, domain));
        self.schedule.forget(at);
        self.qpn_index.remove(&qp.qpn);
        self.free_qps.push(at);
        if let Some(client) = self.clients[qp.owner].as_mut() {
            client.slots[qp.slot as usize] = None;
            client.paired.remove(&at);
            client.free_slots.push(qp.slot);
            for (cq, ring) in [qp.create.send_cq, qp.create.recv_cq].into_iter().zip(qp.rings) {
                client.give_ring(cq, ring);
            }
        }
    }

    /// A number that is not in use and was not for as long as possible.
    fn new_qpn(&mut self) -> Option<u32> {
        for _ in 0..=self.qpn_index.len() {
            let qpn = self.next_qpn;
            self.next_qpn = if qpn >= LAST_QPN { 0x100 } else { qpn + 1 };
            if !self.qpn_index.contains_key(&qpn) {
                return Some(qpn);
            }
        }
        None
    }
}

impl<M> Client<M> {
    /// The completions of a new queue, and their ring's slot in the CQ; into the void for a queue without CQ.
    fn completions(&mut self, cq: Option<u32>, ring: &Window) -> Result<(Completions, u32), i32> {
        let Some(cq) = cq else { return Self::no_completions().map(|none| (none, 0)).ok_or(ENOMEM) };
        let (queue, slot) = self.cqs.get_mut(&cq).ok_or(ENOENT)?.take_ring().ok_or(ENOMEM)?;
        Ok((Completions::new(CompletionWriter::new(ring.clone(), 0), queue, slot), slot))
    }

    pub(super) fn give_ring(&mut self, cq: u32, ring: u32) {
        if let Some(cq) = self.cqs.get_mut(&cq) {
            cq.free_rings.push(ring);
            cq.rings -= 1;
        }
    }
}

impl Cq {
    pub(super) fn take_ring(&mut self) -> Option<(Arc<CompletionQueue>, u32)> {
        let ring = self.free_rings.pop().unwrap_or_else(|| {
            self.next_ring += 1;
            self.next_ring - 1
        });
        if ring >= cq::MAX_RINGS {
            self.next_ring -= 1;
            return None;
        }
        self.rings += 1;
        Some((Arc::clone(&self.queue), ring))
    }
}
