//! SRQs and XRC domains come and go; whose receives a QP takes; what is told of them.

use std::sync::Arc;

use verbs_abi::{
    proto::NewSrq,
    shm::{
        Window, arena,
        cq::{CQ_LEN, CqArea},
        cqe::CompletionWriter,
        events::AsyncEvent,
        srq::{SrqArea, SrqGeometry},
    },
    verbs::{EventType, Opcode, QpType},
};

use super::{Client, Fabric};
use crate::{CompletionQueue, Completions, Memory, srq::SharedReceives, wire::packet::Header};

const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const ENOENT: i32 = 2;
/// SRQ numbers have as many bits as a work request has room for.
const LAST_SRQN: u32 = (1 << verbs_abi::shm::wqe::SRQN_BITS) - 1;

/// What a new SRQ is made of.
#[derive(Debug)]
pub struct SrqInit {
    /// Protection domain.
    pub pd: u32,
    /// Its place in the arena.
    pub area: SrqArea,
    /// Offset of that place.
    pub offset: u64,
    /// For an XRC queue its domain, the CQ that it completes to, and the ring for that.
    pub xrc: Option<XrcInit>,
}

/// What makes an SRQ an XRC queue.
#[derive(Debug)]
pub struct XrcInit {
    /// The XRC domain, by its number on this host.
    pub domain: u32,
    /// The CQ.
    pub cq: u32,
    /// The completion ring, with an entry for each slot of the queue.
    pub ring: Window,
    /// Where the ring lies in the arena.
    pub ring_offset: u64,
}

/// One SRQ.
#[derive(Debug)]
pub(super) struct Srq {
    /// Index of its client.
    owner: usize,
    slot: u32,
    pub(super) queue: Arc<SharedReceives>,
    geometry: SrqGeometry,
    /// QPs that take receives from it; those of an XRC domain are not among them.
    qps: Vec<usize>,
    /// Domain, CQ and ring of an XRC queue.
    xrc: Option<(u32, u32, u32)>,
}

#[cfg(test)]
impl Srq {
    /// Its doorbell slot.
    pub(super) fn slot(&self) -> u32 {
        self.slot
    }
}

impl<M: Memory> Fabric<M> {
    /// Adds an SRQ.
    ///
    /// # Errors
    /// ENOENT for an unknown CQ, ENOMEM without a free slot.
    pub fn create_srq(&mut self, client: u32, init: SrqInit) -> Result<NewSrq, i32> {
        let SrqInit { pd, area, offset, xrc } = init;
        let owner = *self.client_index.get(&client).ok_or(EINVAL)?;
        let number = self.new_srqn().ok_or(ENOMEM)?;
        let client = self.clients[owner].as_mut().ok_or(EINVAL)?;
        let slot = client.free_slots.last().copied().unwrap_or(client.slots.len() as u32);
        if slot >= arena::MAX_QP {
            return Err(ENOMEM);
        }
        let mut ring_slot = 0;
        let completions = match &xrc {
            None => None,
            Some(xrc) => {
                let (queue, ring) = client.cqs.get_mut(&xrc.cq).ok_or(ENOENT)?.take_ring().ok_or(ENOMEM)?;
                ring_slot = ring;
                Some(Completions::new(CompletionWriter::new(xrc.ring.clone(), 0), queue, ring))
            }
        };
        client.free_slots.pop();
        if slot as usize == client.slots.len() {
            client.slots.push(None);
        }
        client.srq_slots.insert(slot, number);
        let geometry = area.geometry();
        let (ring_offset, xrc) =
            xrc.map_or((0, None), |xrc| (xrc.ring_offset, Some((xrc.domain, xrc.cq, ring_slot))));
        let queue = SharedReceives::new(number, pd, area, completions);
        self.srqs.insert(number, Srq { owner, slot, queue, geometry, qps: Vec::new(), xrc });
        Ok(NewSrq { number, slot, offset, geometry, ring_offset, ring_slot })
    }

    /// Removes an SRQ.
    ///
    /// # Errors
    /// ENOENT without such an SRQ, EBUSY while a QP uses it.
    pub fn destroy_srq(&mut self, client: u32, number: u32) -> Result<(), i32> {
        let srq = self.owned_srq(client, number).ok_or(ENOENT)?;
        if !srq.qps.is_empty() {
            return Err(EBUSY);
        }
        self.remove_srq(number);
        Ok(())
    }

    /// Asks for an event when fewer receives are left. 0 asks for none.
    ///
    /// # Errors
    /// ENOENT without such an SRQ.
    pub fn limit_srq(&mut self, client: u32, number: u32, limit: u32) -> Result<(), i32> {
        self.owned_srq(client, number).ok_or(ENOENT)?.queue.set_limit(limit);
        Ok(())
    }

    /// The limit that was asked for and not reached yet.
    ///
    /// # Errors
    /// ENOENT without such an SRQ.
    pub fn srq_limit(&self, client: u32, number: u32) -> Result<u32, i32> {
        Ok(self.owned_srq(client, number).ok_or(ENOENT)?.queue.limit())
    }

    /// Entries that the completion ring of a QP needs which takes its receives from there.
    ///
    /// # Errors
    /// ENOENT without such an SRQ, EINVAL for an XRC queue.
    pub fn srq_entries(&self, client: u32, number: u32) -> Result<u32, i32> {
        let srq = self.owned_srq(client, number).ok_or(ENOENT)?;
        if srq.xrc.is_some() { Err(EINVAL) } else { Ok(srq.geometry.entries) }
    }

    fn owned_srq(&self, client: u32, number: u32) -> Option<&Srq> {
        let owner = self.client_index.get(&client)?;
        self.srqs.get(&number).filter(|srq| srq.owner == *owner)
    }

    pub(super) fn remove_srq(&mut self, number: u32) {
        let Some(srq) = self.srqs.remove(&number) else { return };
        if let Some(client) = self.clients[srq.owner].as_mut() {
            client.srq_slots.remove(&srq.slot);
            client.free_slots.push(srq.slot);
            if let Some((_, cq, ring)) = srq.xrc {
                client.give_ring(cq, ring);
            }
        }
    }

    /// Lets a QP take its receives from an SRQ.
    pub(super) fn join_srq(&mut self, at: usize, number: u32) {
        let queue = self.srqs.get_mut(&number).map(|srq| {
            srq.qps.push(at);
            Arc::clone(&srq.queue)
        });
        if let Some(qp) = self.qps[at].as_mut() {
            qp.responder.share(queue);
        }
    }

    pub(super) fn leave_srq(&mut self, at: usize, number: u32) {
        if let Some(srq) = self.srqs.get_mut(&number) {
            srq.qps.retain(|other| *other != at);
        }
    }

    /// An SRQ's owner rang: whoever waits for a receive of it may find one.
    pub(super) fn answer_srq(&mut self, number: u32) {
        let Some(srq) = self.srqs.get(&number) else { return };
        if !srq.queue.rings_me() || !srq.queue.has_receive() {
            return;
        }
        srq.queue.set_ring_me(false);
        let waited_for = match srq.xrc {
            None => srq.qps.clone(),
            Some((domain, ..)) => {
                self.domains.get(&domain).map_or_else(Vec::new, |domain| domain.qps.clone())
            }
        };
        waited_for.into_iter().for_each(|at| self.poke_waiters_for(at));
    }

    /// Adds a receiver to its XRC domain.
    pub(super) fn join_domain(&mut self, at: usize, domain: u32) {
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.qps.push(at);
        }
    }

    pub(super) fn leave_domain(&mut self, at: usize, domain: u32) {
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.qps.retain(|other| *other != at);
        }
    }

    /// Points the receiver of an XRC request at the queue that the request names. `None`: there is none that it may
    /// take from; otherwise the index of the client whose memory the queue's receives name.
    pub(super) fn select_srq(&mut self, at: usize, peer_at: usize) -> Option<usize> {
        let requester = &self.qps[at].as_ref()?.requester;
        if requester.qp_type() != QpType::XrcSend {
            return None;
        }
        let number = requester.srqn();
        let domain = self.qps[peer_at].as_ref()?.create.xrcd?;
        let srq = self.srqs.get(&number).filter(|srq| srq.xrc.is_some_and(|(of, ..)| of == domain));
        let found = srq.map(|srq| (srq.owner, Arc::clone(&srq.queue)));
        let peer = self.qps[peer_at].as_mut()?;
        peer.responder.share(found.as_ref().map(|(_, queue)| Arc::clone(queue)));
        found.map(|(owner, _)| owner)
    }

    /// The same for a request that has come from another host.
    pub(super) fn select_srq_for(&mut self, at: usize, header: &Header) -> Option<usize> {
        let qp = self.qps[at].as_mut()?;
        let domain = qp.create.xrcd?;
        let opcode = Opcode::try_from(u32::from(header.code)).ok()?;
        let srq =
            self.srqs.get(&header.srqn(opcode)).filter(|srq| srq.xrc.is_some_and(|(of, ..)| of == domain));
        qp.responder.share(srq.map(|srq| Arc::clone(&srq.queue)));
        srq.map(|srq| srq.owner)
    }

    /// The client whose memory a receiver of XRC works on now.
    pub(super) fn selected_owner(&self, at: usize) -> Option<usize> {
        let number = self.qps[at].as_ref()?.responder.shared()?.number;
        self.srqs.get(&number).map(|srq| srq.owner)
    }

    /// Tells the owner of the queue that a QP has just taken from if it has run low.
    pub(super) fn heed_limit(&mut self, at: usize) {
        let Some(queue) = self.qps[at].as_ref().and_then(|qp| qp.responder.shared()) else { return };
        if queue.take_limit_reached() {
            let number = queue.number;
            self.raise_srq(number, EventType::SrqLimitReached);
        }
    }

    fn raise_srq(&mut self, number: u32, event: EventType) {
        let Some(owner) = self.srqs.get(&number).map(|srq| srq.owner) else { return };
        if let Some(client) = self.clients[owner].as_mut() {
            client.events.push(AsyncEvent { kind: event.value(), element: number });
            client.event_bell.ring();
        }
    }

    /// A QP that takes from an SRQ went to ERR: it takes no more.
    pub(super) fn tell_last_wqe(&mut self, at: usize) {
        if self.qps[at].as_ref().is_some_and(|qp| qp.create.srq.is_some()) {
            self.raise(at, EventType::QpLastWqeReached);
        }
    }

    fn new_srqn(&mut self) -> Option<u32> {
        for _ in 0..=self.srqs.len() {
            let number = self.next_srqn;
            self.next_srqn = if number >= LAST_SRQN { 1 } else { number + 1 };
            if !self.srqs.contains_key(&number) {
                return Some(number);
            }
        }
        None
    }

    /// Opens an XRC domain of the client's tenant: the one of that file, or one of its own.
    ///
    /// # Errors
    /// ENOENT if there is none and none is to be made.
    pub fn open_xrcd(&mut self, client: u32, file: Option<(u64, u64)>, creates: bool) -> Result<u32, i32> {
        let tenant = self.client_mut(client).ok_or(EINVAL)?.tenant;
        let same = |domain: &Domain| file.is_some() && domain.tenant == tenant && domain.file == file;
        if let Some((number, domain)) = self.domains.iter_mut().find(|(_, domain)| same(domain)) {
            domain.users += 1;
            return Ok(*number);
        }
        if !creates {
            return Err(ENOENT);
        }
        let number = self.next_domain;
        self.next_domain = number.checked_add(1).ok_or(ENOMEM)?;
        self.domains.insert(number, Domain { tenant, file, users: 1, qps: Vec::new() });
        Ok(number)
    }

    /// Whether the client's tenant has an XRC domain of that file.
    #[must_use]
    pub fn has_xrcd(&mut self, client: u32, file: (u64, u64)) -> bool {
        let Some(tenant) = self.client_mut(client).map(|client| client.tenant) else { return false };
        self.domains.values().any(|domain| domain.tenant == tenant && domain.file == Some(file))
    }

    /// Gives an XRC domain up once.
    pub fn close_xrcd(&mut self, number: u32) {
        if let Some(domain) = self.domains.get_mut(&number) {
            domain.users -= 1;
            if domain.users == 0 {
                self.domains.remove(&number);
            }
        }
    }
}

/// An XRC domain.
#[derive(Debug)]
pub(super) struct Domain {
    tenant: u32,
    /// Device and inode of the file that stands for it.
    file: Option<(u64, u64)>,
    /// How often it is open.
    users: u32,
    /// Its receivers.
    qps: Vec<usize>,
}

impl<M> Client<M> {
    /// The completions of a queue of a QP that has no CQ for it.
    pub(super) fn no_completions() -> Option<Completions> {
        let area = CqArea::new(&Window::heap(CQ_LEN), 0)?;
        let queue = Arc::new(CompletionQueue::new(area, None));
        Some(Completions::new(CompletionWriter::new(Window::heap(64), 0), queue, 0))
    }
}

/// The type of QP that this one talks to.
pub(crate) fn counterpart(qp_type: QpType) -> QpType {
    match qp_type {
        QpType::XrcSend => QpType::XrcRecv,
        QpType::XrcRecv => QpType::XrcSend,
        other => other,
    }
}
