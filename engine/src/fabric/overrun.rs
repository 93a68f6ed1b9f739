//! A CQ that has got more completions than it has entries: it is in error, and with it the QPs that complete to it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use verbs_abi::{
    shm::events::AsyncEvent,
    verbs::{EventType, QpState},
};

use super::Fabric;
use crate::{Bell, Memory};

/// The CQs whose overrun is not acted upon yet, as clients and their ids.
#[derive(Debug, Default)]
pub(super) struct Overruns {
    is_any: AtomicBool,
    cqs: Mutex<Vec<(u32, u32)>>,
}

impl Overruns {
    pub(super) fn note(&self, client: u32, cq: u32) {
        self.cqs().push((client, cq));
        self.is_any.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_any(&self) -> bool {
        self.is_any.load(Ordering::Relaxed)
    }

    fn take(&self) -> Vec<(u32, u32)> {
        self.is_any.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.cqs())
    }

    fn cqs(&self) -> MutexGuard<'_, Vec<(u32, u32)>> {
        self.cqs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells of the overrun of one CQ.
#[derive(Debug)]
pub(super) struct Alarm {
    pub(super) overruns: Arc<Overruns>,
    pub(super) client: u32,
    pub(super) cq: u32,
}

impl Bell for Alarm {
    fn ring(&self) {
        self.overruns.note(self.client, self.cq);
    }
}

impl<M: Memory> Fabric<M> {
    /// Acts on the overruns that were noted.
    pub(super) fn heed_overruns(&mut self) {
        if self.overruns.is_any() {
            for (client, cq) in self.overruns.take() {
                self.fail_cq(client, cq);
            }
        }
    }

    /// Notes an overrun that the owner of a QP met while it executed: of its own CQ, or of its peer's.
    pub(super) fn notice_overruns(&self, at: usize, peer_at: Option<usize>) {
        let qp = self.qps[at].as_ref().filter(|qp| qp.requester.has_overrun());
        let peer = peer_at.and_then(|peer| self.qps[peer].as_ref());
        let peer = peer.filter(|peer| peer.responder.has_overrun());
        let cqs =
            [qp.map(|qp| (qp.owner, qp.create.send_cq)), peer.map(|peer| (peer.owner, peer.create.recv_cq))];
        for (owner, cq) in cqs.into_iter().flatten() {
            if let Some(client) = self.clients[owner].as_ref() {
                self.overruns.note(client.id, cq);
            }
        }
    }

    fn fail_cq(&mut self, client: u32, cq: u32) {
        let Some(client) = self.client_mut(client) else { return };
        let Some(found) = client.cqs.get_mut(&cq) else { return };
        if std::mem::replace(&mut found.failed, true) {
            return;
        }
        client.events.push(AsyncEvent { kind: EventType::CqErr.value(), element: cq });
        client.event_bell.ring();
        let slots: Vec<usize> = client.slots.iter().flatten().copied().collect();
        for at in slots {
            let fails = self.qps[at].as_ref().is_some_and(|qp| {
                [qp.create.send_cq, qp.create.recv_cq].contains(&cq)
                    && !matches!(qp.state, QpState::Reset | QpState::Err)
            });
            if fails {
                self.raise(at, EventType::QpFatal);
                self.condemn(at);
            }
        }
    }
}
