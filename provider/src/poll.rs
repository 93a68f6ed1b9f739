//! Taking completions: from the rings of a CQ's QPs, in turn, without system calls.
//!
//! A CQ of few rings looks at each; one of many asks the ready bits which hold something, keeps those that it could
//! not empty, and serves them in turn. When the router is dead, the provider flushes what is outstanding.

use std::collections::VecDeque;
use std::sync::Arc;

use verbs_abi::shm::cq::CqArea;
use verbs_abi::shm::cqe::{CompletionReader, Cqe};

use crate::clock::{Clocks, Times};
use crate::overrun::{Bound, Overrun};
use crate::qp::Qp;
use crate::srq::Srq;

/// Rings that are looked at one by one.
const FEW_RINGS: usize = 4;

/// Which queue of a QP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Send,
    Recv,
}

/// Whose completions a ring holds.
#[derive(Debug, Clone)]
enum Queue {
    Of(Arc<Qp>, Side),
    /// An XRC queue's: each tells the QP that took the receive.
    Xrc(Arc<Srq>),
}

/// The completions of one QP and direction, or of an XRC queue, at the consumer's end.
#[derive(Debug)]
struct Ring {
    reader: CompletionReader,
    of: Queue,
    is_pending: bool,
    /// Nothing is taken from it: the provider completes what is outstanding, and what a direct peer may still publish
    /// comes too late; or its queue is being emptied.
    is_flushed: bool,
    /// Of a queue that is being emptied: the places in an SRQ of receives whose completions nobody will poll.
    unpolled: Vec<u32>,
}

impl Ring {
    fn new(reader: CompletionReader, of: Queue) -> Ring {
        Ring { reader, of, is_pending: false, is_flushed: false, unpolled: Vec::new() }
    }

    /// Takes up to `limit` completions.
    #[inline]
    fn drain(&mut self, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        if self.is_flushed {
            return 0;
        }
        match &self.of {
            Queue::Of(qp, side) => {
                for taken in 0..limit {
                    let Some(cqe) = self.reader.pop() else { return taken };
                    qp.free(*side, cqe.wqe);
                    emit(qp.number(), &cqe);
                }
            }
            Queue::Xrc(srq) => {
                for taken in 0..limit {
                    let Some(cqe) = self.reader.pop() else { return taken };
                    srq.free(cqe.wqe);
                    emit(cqe.src_qp, &Cqe { src_qp: 0, ..cqe });
                }
            }
        }
        limit
    }

    /// Frees those places.
    fn forget_unpolled(&mut self) {
        if let Queue::Of(qp, side) = &self.of {
            self.unpolled.drain(..).for_each(|wqe| qp.free(*side, wqe));
        }
    }

    /// Whether there is a completion.
    #[inline]
    fn is_ready(&self) -> bool {
        self.reader.is_ready()
    }

    /// Whether the next completion says that the QP failed before.
    #[inline]
    fn is_flushing(&self) -> bool {
        matches!(self.of, Queue::Of(_, Side::Recv)) && self.reader.is_flushing()
    }

    /// How many completions it can hold.
    fn bound(&self) -> Bound {
        match &self.of {
            Queue::Of(qp, Side::Send) => Bound::Own(qp.limits.cap.max_send_wr),
            Queue::Of(qp, Side::Recv) => match &qp.srq {
                Some(srq) => srq.bound(),
                None => Bound::Own(qp.limits.cap.max_recv_wr),
            },
            Queue::Xrc(srq) => srq.bound(),
        }
    }

    fn is_of(&self, qp: &Qp) -> bool {
        matches!(&self.of, Queue::Of(own, _) if std::ptr::eq(&**own, qp))
    }
}

/// The rings of a CQ.
#[derive(Debug, Default)]
pub(crate) struct Rings {
    by_slot: Vec<Option<Ring>>,
    /// The slots that are taken.
    slots: Vec<u32>,
    /// Slots whose ready bit was cleared and that may hold something still.
    pending: VecDeque<u32>,
    /// Where the next look at few rings begins.
    turn: usize,
    /// Polls in a row that found nothing.
    pub(crate) idle: u32,
    /// The completion that an extended CQ shows, and its QP number.
    pub(crate) shown: (Cqe, u32),
    /// The clocks that such a CQ was asked for, and when it took that completion.
    pub(crate) clocks: Clocks,
    pub(crate) times: Times,
    /// Whether it can overrun.
    pub(crate) overrun: Overrun,
}

impl Rings {
    /// Adds a ring at the slot that the router chose.
    pub(crate) fn attach(&mut self, slot: u32, side: Side, qp: &Arc<Qp>) {
        let at = slot as usize;
        if self.by_slot.len() <= at {
            self.by_slot.resize_with(at + 1, || None);
        }
        let (reader, of) = (qp.completions(side), Queue::Of(Arc::clone(qp), side));
        self.put(at, Ring::new(reader, of));
        self.slots.retain(|&other| other != slot);
        self.slots.push(slot);
    }

    /// Adds the ring of an XRC queue.
    pub(crate) fn attach_srq(&mut self, slot: u32, srq: &Arc<Srq>) {
        let Some(reader) = srq.completions() else { return };
        let at = slot as usize;
        if self.by_slot.len() <= at {
            self.by_slot.resize_with(at + 1, || None);
        }
        let of = Queue::Xrc(Arc::clone(srq));
        self.put(at, Ring::new(reader, of));
        self.slots.retain(|&other| other != slot);
        self.slots.push(slot);
    }

    fn put(&mut self, at: usize, ring: Ring) {
        self.overrun.add(ring.bound());
        if let Some(before) = self.by_slot[at].replace(ring) {
            self.overrun.remove(before.bound());
        }
    }

    /// Has completions counted, if the CQ can overrun.
    pub(crate) fn check_overrun(&mut self, area: &CqArea) {
        let rings = &self.by_slot;
        self.overrun.check(area, || rings.iter().flatten().map(|ring| ring.reader.available()).sum());
    }

    /// Takes an XRC queue's ring out, with what is in it.
    pub(crate) fn detach_srq(&mut self, slot: u32, srq: &Arc<Srq>) {
        self.detach_if(slot, |ring| matches!(&ring.of, Queue::Xrc(own) if Arc::ptr_eq(own, srq)));
    }

    /// Takes a QP's ring out, with what is in it.
    pub(crate) fn detach(&mut self, slot: u32, qp: &Qp) {
        self.detach_if(slot, |ring| ring.is_of(qp));
    }

    /// Takes nothing more from a QP's ring, which is going to be emptied. Tells how many completions were taken.
    pub(crate) fn close(&mut self, slot: u32) -> Option<u64> {
        let ring = self.by_slot.get_mut(slot as usize)?.as_mut()?;
        ring.is_flushed = true;
        if matches!(&ring.of, Queue::Of(qp, Side::Recv) if qp.srq.is_some()) {
            let (mut ahead, most) = (ring.reader.clone(), ring.reader.available());
            ring.unpolled.extend((0..most).map_while(|_| ahead.pop()).map(|cqe| cqe.wqe));
        }
        Some(ring.reader.head())
    }

    /// It was not emptied.
    pub(crate) fn reopen(&mut self, slot: u32, area: &CqArea) {
        if let Some(Some(ring)) = self.by_slot.get_mut(slot as usize) {
            ring.is_flushed = false;
            ring.unpolled.clear();
            area.mark(slot);
        }
    }

    fn detach_if(&mut self, slot: u32, wanted: impl Fn(&Ring) -> bool) {
        let Some(place) = self.by_slot.get_mut(slot as usize) else { return };
        if let Some(mut ring) = place.take_if(|ring| wanted(ring)) {
            ring.forget_unpolled();
            self.overrun.remove(ring.bound());
            self.slots.retain(|&other| other != slot);
            self.pending.retain(|&other| other != slot);
        }
    }

    /// Begins a QP's ring anew, after the router emptied it.
    pub(crate) fn restart(&mut self, slot: u32) {
        if let Some(Some(ring)) = self.by_slot.get_mut(slot as usize)
            && let Queue::Of(qp, side) = ring.of.clone()
        {
            ring.forget_unpolled();
            ring.reader = qp.completions(side);
            ring.is_flushed = false;
        }
    }

    /// Whether no QP uses the CQ.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Takes up to `limit` completions.
    #[inline]
    pub(crate) fn take(&mut self, area: &CqArea, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        if self.slots.len() > FEW_RINGS {
            return self.take_ready(area, limit, emit);
        }
        let (mut taken, mut at) = (0, self.turn);
        for _ in 0..self.slots.len() {
            at = if at < self.slots.len() { at } else { 0 };
            let slot = self.slots[at];
            at += 1;
            if !self.by_slot.get(slot as usize).is_some_and(|ring| ring.as_ref().is_some_and(Ring::is_ready))
            {
                continue;
            }
            taken += self.drain(slot, limit - taken, emit);
            if taken == limit {
                break;
            }
        }
        self.turn = if self.turn + 1 < self.slots.len() { self.turn + 1 } else { 0 };
        taken
    }

    /// Takes up to `limit` completions of a ring. Of a QP whose receives come back flushed, its sends come first: among
    /// them is the one that failed.
    #[inline]
    fn drain(&mut self, slot: u32, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        let Some(Some(ring)) = self.by_slot.get(slot as usize) else { return 0 };
        let mut taken = 0;
        if ring.is_flushing()
            && let Some(sends) = self.sends_beside(ring)
            && let Some(Some(sends)) = self.by_slot.get_mut(sends as usize)
        {
            taken = sends.drain(limit, emit);
        }
        match self.by_slot.get_mut(slot as usize) {
            Some(Some(ring)) => taken + ring.drain(limit - taken, emit),
            _ => taken,
        }
    }

    /// The slot of the send completions of the QP whose receives these are, if they come here, too.
    #[cold]
    fn sends_beside(&self, ring: &Ring) -> Option<u32> {
        let Queue::Of(qp, Side::Recv) = &ring.of else { return None };
        let (_, slot) = qp.send_cq.as_ref()?;
        let sends = self.by_slot.get(*slot as usize)?.as_ref()?;
        matches!(&sends.of, Queue::Of(own, Side::Send) if Arc::ptr_eq(own, qp)).then_some(*slot)
    }

    fn take_ready(&mut self, area: &CqArea, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        if area.is_quiet() {
            area.end_quiet();
            // What came before sets no bit any more.
            self.slots.iter().for_each(|&slot| area.mark(slot));
        }
        area.take_ready(|slot| {
            if let Some(Some(ring)) = self.by_slot.get_mut(slot as usize)
                && !ring.is_pending
            {
                ring.is_pending = true;
                self.pending.push_back(slot);
            }
        });
        let mut taken = 0;
        for _ in 0..self.pending.len() {
            if taken == limit {
                break;
            }
            let Some(slot) = self.pending.pop_front() else { break };
            taken += self.drain(slot, limit - taken, emit);
            let Some(Some(ring)) = self.by_slot.get_mut(slot as usize) else { continue };
            // A full harvest may have left something; an empty look comes after the ready bit was cleared.
            if taken == limit {
                self.pending.push_back(slot);
            } else {
                ring.is_pending = false;
            }
        }
        taken
    }

    /// Completes what the dead router left outstanding: first what it had published, then everything else as
    /// flushed.
    pub(crate) fn flush(&mut self, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        let mut taken = 0;
        for &slot in &self.slots {
            let Some(Some(ring)) = self.by_slot.get_mut(slot as usize) else { continue };
            let Queue::Of(qp, side) = ring.of.clone() else {
                taken += ring.drain(limit - taken, emit);
                continue;
            };
            // Whoever holds the own seat is executing; the next poll finds it. Then nobody begins any more.
            qp.fail();
            let Some(mut sends) = qp.send.try_lock() else { continue };
            taken += ring.drain(limit - taken, emit);
            if taken == limit {
                break;
            }
            ring.is_flushed = true;
            while taken < limit
                && let Some(cqe) = qp.flush_oldest(side, &mut sends)
            {
                emit(qp.number(), &cqe);
                taken += 1;
            }
        }
        taken
    }

    /// Completions that wait to be polled, with those of sends that are being executed.
    pub(crate) fn filled(&self) -> u64 {
        let count = |ring: &Ring| match &ring.of {
            // First what is in flight: what is finished meanwhile counts twice, and not never.
            Queue::Of(qp, Side::Send) => qp.in_flight() + ring.reader.available(),
            _ => ring.reader.available(),
        };
        self.by_slot.iter().flatten().map(count).sum()
    }

    /// Whether something that was posted has not been polled yet.
    pub(crate) fn has_outstanding(&self) -> bool {
        let mut rings = self.by_slot.iter().flatten();
        rings.any(|ring| matches!(&ring.of, Queue::Of(qp, side) if qp.outstanding(*side) > 0))
    }
}

#[cfg(test)]
mod tests;
