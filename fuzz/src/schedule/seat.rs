//! The owner's seat of a QP in direct mode, one work request at a time, so that anything can happen in between.

use std::{ptr::NonNull, sync::atomic::Ordering};

use engine::{Attempt, CompletionQueue, Completions, Fault, Fetch, Memory, Requester, Responder, Verdict};
use verbs_abi::{
    proto::DirectPeer,
    shm::{cq::CqArea, cqe::CompletionWriter, mr_table::MrEntry, queue::QueueArea},
    verbs::{QpState, QpType},
};

use crate::{
    memory::{Guarded, PD},
    world::{Client, Qp},
};

/// Memory as an application's thread reaches it.
#[derive(Debug)]
enum View {
    /// Its own, all of it.
    Own(Guarded),
    /// A direct peer's: what is mapped.
    Peer(Guarded),
}

impl Memory for View {
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        match self {
            Self::Own(memory) => {
                let mr = memory.lookup(key)?;
                Some(MrEntry { shared_start: mr.addr, shared_end: mr.addr + mr.len, ..mr })
            }
            Self::Peer(memory) => memory.lookup(key),
        }
    }

    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        match self {
            Self::Own(memory) => Some(memory.pointer(addr, len)),
            Self::Peer(memory) => memory.mapped(mr, addr, len),
        }
    }

    fn reaches(&self, mr: &MrEntry, addr: u64, len: u64) -> bool {
        match self {
            Self::Own(_) => true,
            Self::Peer(_) => addr >= mr.shared_start && addr + len <= mr.shared_end,
        }
    }

    fn read(&self, addr: u64, _: &mut [u8]) -> Result<(), Fault> {
        panic!("an owner reads {addr:#x} by a call");
    }

    fn write(&self, addr: u64, _: &[u8]) -> Result<(), Fault> {
        panic!("an owner writes {addr:#x} by a call");
    }
}

/// What an owner needs to execute.
#[derive(Debug)]
pub(crate) struct Seat {
    requester: Requester,
    responder: Responder,
    own: View,
    peer: View,
    peer_area: QueueArea,
    /// Between entering and leaving.
    pub(crate) running: bool,
}

/// How far a step came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is more.
    More,
    /// Nothing is left.
    Idle,
    /// The router has to go on, and must be rung.
    Ring,
}

impl Seat {
    /// The seat of `qp`, as the router offers it.
    pub(crate) fn new(own: &Client, qp: &Qp, peer: &Client, offer: &DirectPeer) -> Self {
        let sends = CompletionQueue::new(own.cq(), None);
        let sends = Completions::new(
            CompletionWriter::new(qp.area.sq_cqes.clone(), 0),
            sends.into(),
            qp.new.send_slot,
        );
        let requester = Requester::new(qp.new.qpn, QpType::Rc, PD, qp.area.clone(), sends).in_owners_seat();
        let peer_area = QueueArea::new(&peer.arena, offer.offset, offer.geometry).unwrap();
        let receives = CompletionQueue::new(CqArea::new(&peer.arena, offer.cq_offset).unwrap(), None);
        let writer = CompletionWriter::new(peer_area.rq_cqes.clone(), 0);
        let receives = Completions::new(writer, receives.into(), offer.recv_slot);
        let responder = Responder::new(QpType::Rc, offer.pd, peer_area.clone(), receives);
        let (own, peer) = (View::Own(own.memory.clone()), View::Peer(peer.memory.clone()));
        Self { requester, responder, own, peer, peer_area, running: false }
    }

    /// Enters, or executes one work request, or leaves.
    pub(crate) fn step(&mut self, qp: &Qp) -> Step {
        let header = &qp.area.header;
        if !self.running {
            if !header.seat().enter() {
                return Step::Ring;
            }
            self.running = true;
            assert!(self.requester.resume(), "the router left counts that cannot be");
            return Step::More;
        }
        if self.requester.fetch() != Fetch::Ready {
            header.seat().leave();
            self.running = false;
            return Step::Idle;
        }
        let ready = header.state().load(Ordering::Acquire) == QpState::Rts.value();
        if ready && self.attempt() {
            return Step::More;
        }
        header.seat().park();
        self.running = false;
        Step::Ring
    }

    fn attempt(&mut self) -> bool {
        self.responder.refresh();
        let (mut budget, peer) = (u64::MAX, Some((&mut self.responder, &self.peer)));
        match self.requester.attempt(&self.own, peer, 0, &mut budget) {
            Attempt::Done => true,
            Attempt::Failed { peer_failed, peer_event } => {
                self.requester.leave_verdict(Verdict { peer_failed, peer_event });
                false
            }
            Attempt::Unfinished | Attempt::Wait(_) => false,
        }
    }

    /// Executes one work request and is killed in the middle of it: of the words that tell of it, the first `stores`
    /// were written.
    pub(crate) fn die(&mut self, qp: &Qp, stores: usize) {
        if !self.running && self.step(qp) != Step::More {
            return;
        }
        let (own, peer) = (&qp.area.header, &self.peer_area.header);
        let words = [peer.rq_done(), own.sq_completions(), own.sq_done(), own.sq_head()];
        let before = words.map(|word| word.load(Ordering::Relaxed));
        if self.requester.fetch() == Fetch::Ready {
            self.attempt();
        }
        let (own, peer) = (&qp.area.header, &self.peer_area.header);
        let words = [peer.rq_done(), own.sq_completions(), own.sq_done(), own.sq_head()];
        for (word, before) in words.into_iter().zip(before).skip(stores) {
            word.store(before, Ordering::Relaxed);
        }
    }
}
