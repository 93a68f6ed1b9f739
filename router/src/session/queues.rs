//! CQs and QPs: their places in the arena, their quotas, and the verbs that the fabric carries out.

use std::sync::Arc;

use engine::{Bell, QpInit};
use rustix::io::Errno;
use verbs_abi::{
    proto::{Answer, CreateQp, Gid, NewQp, QpAttr, Reply},
    shm::{
        Window,
        cq::{CQ_LEN, CqArea},
        queue::{Geometry, QueueArea},
    },
    verbs::{QpAttrMask, QpState},
};

use super::{
    Step,
    client::{Client, errno},
};
use crate::{account::Resource, arena::Place, heap::pages};

/// A CQ.
#[derive(Debug)]
pub(super) struct Cq {
    place: Place,
    pub(super) channel: Option<u32>,
    /// A direct peer that was not waited for may still write there.
    haunted: bool,
}

/// A QP.
#[derive(Debug)]
pub(super) struct Qp {
    place: Place,
    pd: u32,
    recv_cq: u32,
    xrcd: Option<u32>,
}

impl Client {
    /// Room in the arena for one more QP or CQ of `len` bytes, within the quotas.
    pub(super) fn place(&mut self, resource: Resource, len: usize) -> Result<(Place, Window), i32> {
        let held = [(resource, 1), (Resource::Queues, pages(len))];
        if !self.account.take_all(&held) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        self.arena.place(len).map_err(|error| {
            self.account.give_all(&held);
            errno(&error)
        })
    }

    pub(super) fn release(&mut self, resource: Resource, place: Place) {
        self.arena.release(place);
        self.account.give_all(&[(resource, 1), (Resource::Queues, pages(place.len))]);
    }

    pub(super) fn create_cq(&mut self, cqe: u32, channel: Option<u32>) -> Reply {
        if cqe == 0 || cqe > self.limits.max_cqe {
            return Err(Errno::INVAL.raw_os_error());
        }
        let bell = match channel.map(|channel| self.channels.get(&channel)) {
            None => None,
            Some(Some(channel)) => Some(Arc::clone(&channel.bell) as Arc<dyn Bell>),
            Some(None) => return Err(Errno::INVAL.raw_os_error()),
        };
        let (place, window) = self.place(Resource::Cqs, CQ_LEN)?;
        let area = CqArea::new(&window, 0).ok_or(Errno::NOMEM.raw_os_error());
        let made = area
            .and_then(|area| self.lane.with(|fabric| fabric.create_cq(self.id, area, place.offset, bell)));
        let cq = match made {
            Ok(cq) => cq,
            Err(errno) => {
                self.release(Resource::Cqs, place);
                return Err(errno);
            }
        };
        self.use_channel(channel, true);
        self.cqs.insert(cq, Cq { place, channel, haunted: false });
        Ok(Answer::Cq { cq, cqe, offset: place.offset })
    }

    pub(super) fn destroy_cq(&mut self, cq: u32) -> Reply {
        if !self.cqs.contains_key(&cq) {
            return Err(Errno::INVAL.raw_os_error());
        }
        self.lane.with(|fabric| fabric.destroy_cq(self.id, cq))?;
        if let Some(cq) = self.cqs.remove(&cq) {
            if cq.haunted {
                self.account.give(Resource::Cqs, 1);
            } else {
                self.release(Resource::Cqs, cq.place);
            }
            self.use_channel(cq.channel, false);
        }
        Ok(Answer::Done)
    }

    fn use_channel(&mut self, channel: Option<u32>, more: bool) {
        if let Some(channel) = channel.and_then(|channel| self.channels.get_mut(&channel)) {
            channel.users = if more { channel.users + 1 } else { channel.users - 1 };
        }
    }

    pub(super) fn create_qp(&mut self, create: &CreateQp) -> Reply {
        let (known, shared) = self.check_qp(create)?;
        let cap = &create.cap;
        let geometry = Geometry::new(
            cap.max_send_wr,
            cap.max_recv_wr,
            cap.max_send_sge,
            cap.max_recv_sge,
            cap.max_inline_data,
        );
        let geometry = geometry.ok_or(Errno::INVAL.raw_os_error())?;
        let geometry = match create.xrcd {
            None => shared.map_or(geometry, |slots| geometry.with_shared_receives(slots)),
            Some(_) => without_queues()?,
        };
        let (place, mut window) = self.place(Resource::Qps, geometry.len())?;
        if create.xrcd.is_some() {
            // It may outlive its creator's memory, and nobody but the router executes on it.
            window = Window::heap(geometry.len());
        }
        let area = QueueArea::new(&window, 0, geometry).ok_or(Errno::NOMEM.raw_os_error());
        let made = area.and_then(|area| {
            let init = QpInit { create: known, geometry, area, offset: place.offset };
            self.lane.with(|fabric| fabric.create_qp(self.id, init))
        });
        let qp = match made {
            Ok(qp) => qp,
            Err(errno) => {
                self.release(Resource::Qps, place);
                return Err(errno);
            }
        };
        self.use_pd(create.pd, true);
        self.use_xrcd(create.xrcd, true);
        let CreateQp { pd, recv_cq, xrcd, .. } = *create;
        self.qps.entry(qp.qpn).or_default().push(Qp { place, pd, recv_cq, xrcd });
        Ok(Answer::Qp(qp))
    }

    /// Opens a receiver of an XRC domain once more. Its place in the arena is for the owner's eyes alone.
    pub(super) fn open_qp(&mut self, xrcd: u32, qpn: u32) -> Reply {
        let domain = self.xrcds.get(&xrcd).ok_or(Errno::INVAL.raw_os_error())?.domain;
        let geometry = without_queues()?;
        let (place, _) = self.place(Resource::Qps, geometry.len())?;
        let offset = place.offset;
        let slot = match self.lane.with(|fabric| fabric.open_qp(self.id, qpn, domain)) {
            Ok(slot) => slot,
            Err(errno) => {
                self.release(Resource::Qps, place);
                return Err(errno);
            }
        };
        self.use_xrcd(Some(xrcd), true);
        self.qps.entry(qpn).or_default().push(Qp { place, pd: 0, recv_cq: 0, xrcd: Some(xrcd) });
        Ok(Answer::Qp(NewQp { qpn, slot, offset, geometry, send_slot: 0, recv_slot: 0 }))
    }

    pub(super) fn modify_qp(&mut self, qpn: u32, mask: u32, attr: &QpAttr, last: bool) -> Step {
        if !self.qps.contains_key(&qpn) {
            return Step::Done(Err(Errno::INVAL.raw_os_error()));
        }
        let ends = mask & QpAttrMask::STATE.bits() != 0
            && [QpState::Reset.value(), QpState::Err.value()].contains(&attr.qp_state);
        let resets = ends && attr.qp_state == QpState::Reset.value();
        let modified = self.lane.with(|fabric| {
            let free = !ends || fabric.seize(self.id, qpn);
            let busy =
                resets && fabric.is_busy(self.id, qpn) || ends && !last && fabric.is_sending(self.id, qpn);
            (!busy && (free || last)).then(|| fabric.modify_qp(self.id, qpn, mask, attr))
        });
        match modified {
            None => Step::Later,
            Some(Err(errno)) => Step::Done(Err(errno)),
            Some(Ok(modified)) => match modified.direct {
                Some((peer, recv_cq)) => Step::Direct(peer, recv_cq),
                None => Step::Done(Ok(Answer::Done)),
            },
        }
    }

    pub(super) fn query_qp(&self, qpn: u32) -> Reply {
        if !self.qps.contains_key(&qpn) {
            return Err(Errno::INVAL.raw_os_error());
        }
        self.lane.with(|fabric| fabric.query_qp(self.id, qpn)).map(Answer::Attr)
    }

    /// Takes up an offer to connect directly.
    pub(super) fn pair_qp(&self, qpn: u32) -> Step {
        match self.lane.with(|fabric| fabric.pair(self.id, qpn)) {
            Err(errno) => Step::Done(Err(errno)),
            Ok(None) => Step::Done(Ok(Answer::Done)),
            Ok(Some((peer, recv_cq))) => Step::Direct(peer, recv_cq),
        }
    }

    pub(super) fn destroy_qp(&mut self, qpn: u32, last: bool) -> Step {
        if !self.qps.contains_key(&qpn) {
            return Step::Done(Err(Errno::INVAL.raw_os_error()));
        }
        let (free, destroyed) = self.lane.with(|fabric| {
            let free = fabric.seize(self.id, qpn);
            let busy = fabric.is_busy(self.id, qpn) || !last && fabric.is_sending(self.id, qpn);
            (free, (!busy && (free || last)).then(|| fabric.destroy_qp(self.id, qpn)))
        });
        match destroyed {
            None => return Step::Later,
            Some(Err(errno)) => return Step::Done(Err(errno)),
            Some(Ok(_)) => {}
        }
        if let Some(qp) = self.close_entry(qpn) {
            // A peer that was stopped in the middle may still write there and into the CQ: neither room is ever
            // used again.
            if free {
                self.release(Resource::Qps, qp.place);
            } else {
                self.account.give(Resource::Qps, 1);
                if let Some(cq) = self.cqs.get_mut(&qp.recv_cq) {
                    cq.haunted = true;
                }
            }
            self.use_pd(qp.pd, false);
            self.use_xrcd(qp.xrcd, false);
        }
        Step::Done(Ok(Answer::Done))
    }

    /// Takes out one entry of a QP. Which one is the same: nothing of a QP that is open twice lies in its place.
    fn close_entry(&mut self, qpn: u32) -> Option<Qp> {
        let entries = self.qps.get_mut(&qpn)?;
        let closed = entries.pop();
        if entries.is_empty() {
            self.qps.remove(&qpn);
        }
        closed
    }

    pub(super) fn attach_mcast(&mut self, qpn: u32, group: &Gid) -> Reply {
        if !self.qps.contains_key(&qpn) {
            return Err(Errno::INVAL.raw_os_error());
        }
        if !self.account.take(Resource::Multicast, 1) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let attached = self.lane.with(|fabric| fabric.attach(self.id, qpn, group));
        if attached != Ok(true) {
            self.account.give(Resource::Multicast, 1);
        }
        attached.map(|_| Answer::Done)
    }

    pub(super) fn detach_mcast(&mut self, qpn: u32, group: &Gid) -> Reply {
        if !self.qps.contains_key(&qpn) {
            return Err(Errno::INVAL.raw_os_error());
        }
        self.lane.with(|fabric| fabric.detach(self.id, qpn, group))?;
        self.account.give(Resource::Multicast, 1);
        Ok(Answer::Done)
    }
}

/// The geometry of a QP that nothing is posted to.
fn without_queues() -> Result<Geometry, i32> {
    Geometry::new(0, 0, 0, 0, 0).ok_or(Errno::INVAL.raw_os_error())
}
