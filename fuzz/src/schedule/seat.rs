//! The send queue as its owner keeps it, in direct mode with a seat, one call at a time: anything can happen in between.
//!
//! What a provider does in `post.rs` and `direct.rs`, without its locks.

use std::{ptr::NonNull, sync::atomic::Ordering};

use engine::{Attempt, CompletionQueue, Completions, Fetch, Memory, Requester, Responder, SLICE};
use verbs_abi::{
    proto::DirectPeer,
    shm::{cq::CqArea, cqe::CompletionWriter, mr_table::MrEntry, queue::QueueArea, wqe::SendWqe},
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
}

/// What an owner needs to execute.
#[derive(Debug)]
pub(crate) struct Seat {
    requester: Requester,
    responder: Responder,
    own: View,
    peer: View,
    peer_area: QueueArea,
    /// The term in which it executed last.
    term: Option<u32>,
}

/// Who executes what is posted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Owner,
    /// The owner until it met what the router has to do.
    Parked,
    Router,
}

/// The send queue at its owner's end, as a provider keeps it.
#[derive(Debug, Default)]
pub(crate) struct SendQueue {
    pub(crate) seat: Option<Seat>,
    wqe: Box<SendWqe>,
    /// Between the first and the last work request of a list.
    turn: Option<Turn>,
    tail: u64,
}

impl SendQueue {
    /// Whether a list is being posted. Its owner may be executing.
    pub(crate) fn is_posting(&self) -> bool {
        self.turn.is_some()
    }

    /// Begins to post a list.
    pub(crate) fn begin(&mut self, qp: &Qp) {
        let may = self.seat.as_mut().is_some_and(|seat| seat.enter(qp, self.tail));
        self.turn = Some(if may { Turn::Owner } else { Turn::Router });
    }

    /// Posts one of the list.
    pub(crate) fn post(&mut self, qp: &Qp, wqe: SendWqe) {
        *self.wqe = wqe;
        if self.turn == Some(Turn::Owner)
            && let Some(seat) = &mut self.seat
        {
            if let Some(single) = self.wqe.single()
                && seat.is_ready(qp)
                && seat.requester.execute_single(&single, &seat.own, (&mut seat.responder, &seat.peer), SLICE)
            {
                return;
            }
            seat.requester.offer(&mut self.wqe);
            match seat.attempt(qp) {
                Attempt::Done => return,
                Attempt::Failed { .. } => {
                    self.turn = Some(Turn::Parked);
                    return;
                }
                Attempt::Unfinished | Attempt::Wait(_) | Attempt::Foreign(_) => {
                    seat.requester.withdraw(&mut self.wqe);
                    self.turn = Some(Turn::Parked);
                }
            }
        }
        let at = self.tail;
        self.tail += self.wqe.encode(|i, block| qp.area.write_sq_block(at + i, block));
    }

    /// Ends the list. True: the router must be rung.
    pub(crate) fn end(&mut self, qp: &Qp) -> bool {
        let Some(turn) = self.turn.take() else { return true };
        if turn != Turn::Owner {
            qp.area.header.sq_tail().store(self.tail, Ordering::Release);
        }
        match (turn, &mut self.seat) {
            (Turn::Owner, Some(seat)) => return seat.leave(qp),
            (Turn::Parked, Some(seat)) => seat.park(qp),
            _ => {}
        }
        true
    }

    /// Posts one more and is killed in the middle of it: whether it said how far the peer's receives are.
    pub(crate) fn die(&mut self, qp: &Qp, wqe: SendWqe, told: bool) {
        if self.turn.is_none() {
            self.begin(qp);
        }
        let Some(seat) = self.seat.as_mut().filter(|_| self.turn == Some(Turn::Owner)) else { return };
        let before = seat.peer_area.header.rq_done().load(Ordering::Relaxed);
        *self.wqe = wqe;
        seat.requester.offer(&mut self.wqe);
        seat.attempt(qp);
        if !told {
            seat.peer_area.header.rq_done().store(before, Ordering::Relaxed);
        }
    }
}

impl Seat {
    /// The seat of `qp`, as the router offers it.
    pub(crate) fn new(own: &Client, qp: &Qp, peer: &Client, offer: &DirectPeer) -> Self {
        let sends = CompletionQueue::new(own.cq(), None);
        let writer = CompletionWriter::new(qp.area.sq_cqes.clone(), 0);
        let sends = Completions::new(writer, sends.into(), qp.new.send_slot);
        let requester = Requester::new(qp.new.qpn, QpType::Rc, PD, qp.area.clone(), sends).in_owners_seat();
        let peer_area = QueueArea::new(&peer.arena, offer.offset, offer.geometry).unwrap();
        let receives = CompletionQueue::new(CqArea::new(&peer.arena, offer.cq_offset).unwrap(), None);
        let writer = CompletionWriter::new(peer_area.rq_cqes.clone(), 0);
        let receives = Completions::new(writer, receives.into(), offer.recv_slot);
        let responder = Responder::new(QpType::Rc, offer.pd, peer_area.clone(), receives);
        let (own, peer) = (View::Own(own.memory.clone()), View::Peer(peer.memory.clone()));
        Self { requester, responder, own, peer, peer_area, term: None }
    }

    /// Begins to execute, with what the queue holds. False: the router holds the seat, or goes on from here.
    fn enter(&mut self, qp: &Qp, tail: u64) -> bool {
        let token = qp.area.header.seat();
        if !token.enter(false) {
            return false;
        }
        let term = Some(token.term());
        if self.term != term {
            self.term = term;
            assert!(self.requester.resume(), "the router left counts that cannot be");
            self.responder.resume();
        }
        while !self.requester.is_at(tail) {
            if self.is_ready(qp) {
                let peer = (&mut self.responder, &self.peer);
                if self.requester.execute_next(tail, &self.own, peer, SLICE) {
                    continue;
                }
            }
            if self.requester.fetch() != Fetch::Ready || self.attempt(qp) != Attempt::Done {
                self.park(qp);
                return false;
            }
        }
        true
    }

    fn is_ready(&mut self, qp: &Qp) -> bool {
        self.responder.refresh();
        qp.area.header.state().load(Ordering::Acquire) == QpState::Rts.value()
    }

    fn attempt(&mut self, qp: &Qp) -> Attempt {
        if !self.is_ready(qp) {
            return Attempt::Wait(None);
        }
        let (mut budget, peer) = (SLICE, Some((&mut self.responder, &self.peer)));
        self.requester.attempt(&self.own, peer, 0, &mut budget)
    }

    fn leave(&mut self, qp: &Qp) -> bool {
        if qp.area.header.seat().is_wanted() {
            self.park(qp);
            return true;
        }
        self.requester.save();
        qp.area.header.seat().leave();
        false
    }

    fn park(&mut self, qp: &Qp) {
        self.requester.save();
        qp.area.header.seat().park();
    }
}
