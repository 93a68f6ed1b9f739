//! A QP as it lies in the arena: header, send queue, receive queue, and one completion ring for each.
//!
//! ```text
//! 0    owner line      SQ tail (blocks), RQ tail (entries), polled  owner writes
//! 64   requester line  SQ head (blocks), WQEs done, CQEs written    seat holder writes
//!                      what the owner does (seat)                   owner writes
//! 128  seat line       what the router grants (seat)                router writes
//! 192  responder line  receives done                                seat holder of the peer's SQ writes
//! 256  journal         the WQE in progress                          seat holder writes
//! 320  state line      state, rights and depths, "ring me" flag      router writes, owner and direct peer read often
//! 512  SQ blocks | RQ entries | SQ completions | RQ completions
//! ```
//!
//! A receive is consumed exactly when its completion is published, so "receives done" can be rolled forward
//! from the ring alone when whoever wrote it is killed between the two.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{
    BLOCK, PAGE, Window,
    cqe::CQE_LEN,
    seat::Seat,
    wqe::{self, BadWqe, RecvWqe, SendWqe},
};

const HEADER: usize = 512;

/// Sizes of a QP's queues. All but the stride are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Blocks of the send queue.
    pub sq_blocks: u32,
    /// Entries of the send completion ring; at least the WRs that may be outstanding.
    pub sq_cqes: u32,
    /// Entries of the receive queue and of its completion ring.
    pub rq_entries: u32,
    /// Blocks of one receive entry; 0 if receives come from a shared queue.
    pub rq_stride: u32,
}

impl Geometry {
    /// The geometry for what `ibv_create_qp` asked for, `None` beyond what any device gives.
    #[must_use]
    pub fn new(send_wr: u32, recv_wr: u32, send_sge: u32, recv_sge: u32, inline: u32) -> Option<Self> {
        if send_wr > wqe::MAX_WR
            || recv_wr > wqe::MAX_WR
            || send_sge as usize > wqe::MAX_SGE
            || recv_sge as usize > wqe::MAX_SGE
            || inline as usize > wqe::MAX_INLINE
        {
            return None;
        }
        let blocks = wqe::send_blocks(send_sge as usize, inline as usize) as u32;
        Some(Self {
            sq_blocks: (send_wr.max(1) * blocks).next_power_of_two(),
            sq_cqes: send_wr.max(1).next_power_of_two(),
            rq_entries: recv_wr.max(1).next_power_of_two(),
            rq_stride: wqe::recv_blocks(recv_sge as usize) as u32,
        })
    }

    /// The same for a QP that takes its receives from a shared queue of so many slots, each of which it may complete.
    #[must_use]
    pub fn with_shared_receives(self, slots: u32) -> Self {
        Self { rq_entries: slots.max(1).next_power_of_two(), rq_stride: 0, ..self }
    }

    /// Offsets of SQ, RQ, SQ completions, RQ completions and the end; the one place that computes them.
    fn offsets(self) -> [usize; 5] {
        let sq = HEADER;
        let rq = sq + self.sq_blocks as usize * BLOCK;
        let sq_cqes = rq + self.rq_entries as usize * self.rq_stride as usize * BLOCK;
        let rq_cqes = sq_cqes + self.sq_cqes as usize * CQE_LEN;
        [sq, rq, sq_cqes, rq_cqes, rq_cqes + self.rq_entries as usize * CQE_LEN]
    }

    /// Bytes of the whole QP, in pages.
    #[must_use]
    pub fn len(self) -> usize {
        self.offsets()[4].next_multiple_of(PAGE)
    }

    /// Never true; a QP has at least a header.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }
}

/// The header words of a QP. Who writes each is in the module's drawing.
#[derive(Clone, Debug)]
pub struct QpHeader(Window);

impl QpHeader {
    /// SQ blocks published.
    #[inline]
    #[must_use]
    pub fn sq_tail(&self) -> &AtomicU64 {
        self.0.u64(0)
    }

    /// RQ entries published.
    #[inline]
    #[must_use]
    pub fn rq_tail(&self) -> &AtomicU64 {
        self.0.u64(8)
    }

    /// Send completions polled, and receive completions: what the owner leaves unpolled when the queues are emptied.
    #[must_use]
    pub fn polled(&self) -> [&AtomicU64; 2] {
        [self.0.u64(16), self.0.u64(24)]
    }

    /// SQ blocks consumed.
    #[inline]
    #[must_use]
    pub fn sq_head(&self) -> &AtomicU64 {
        self.0.u64(64)
    }

    /// Send WQEs finished.
    #[inline]
    #[must_use]
    pub fn sq_done(&self) -> &AtomicU64 {
        self.0.u64(72)
    }

    /// Send completions written.
    #[inline]
    #[must_use]
    pub fn sq_completions(&self) -> &AtomicU64 {
        self.0.u64(80)
    }

    /// How an owner's failed request ended, for the router to act on when it takes the seat.
    #[inline]
    #[must_use]
    pub fn verdict(&self) -> &AtomicU32 {
        self.0.u32(96)
    }

    /// The seat token.
    #[inline]
    #[must_use]
    pub fn seat(&self) -> Seat<'_> {
        Seat::new(self.0.u32(128), self.0.u32(100))
    }

    /// Non-zero: the owner has met something that the router must see to, and hands the seat over when it leaves.
    #[inline]
    #[must_use]
    pub fn hands_over(&self) -> &AtomicU32 {
        self.0.u32(104)
    }

    /// `enum ibv_qp_state`, for the owner's and a direct peer's eyes.
    #[inline]
    #[must_use]
    pub fn state(&self) -> &AtomicU32 {
        self.0.u32(320)
    }

    /// QP number of the connected peer.
    #[inline]
    #[must_use]
    pub fn peer(&self) -> &AtomicU32 {
        self.0.u32(324)
    }

    /// `qp_access_flags` in the low half, `min_rnr_timer` in the high.
    #[inline]
    #[must_use]
    pub fn rights(&self) -> &AtomicU64 {
        self.0.u64(328)
    }

    /// `max_rd_atomic`, for the owner's eyes: without any depth there are no READs and atomics.
    #[inline]
    #[must_use]
    pub fn initiator_depth(&self) -> &AtomicU32 {
        self.0.u32(336)
    }

    /// Non-zero: a request was executed since RTR, so that nobody need tell of the first one.
    #[inline]
    #[must_use]
    pub fn established(&self) -> &AtomicU32 {
        self.0.u32(340)
    }

    /// What a direct peer must know before each request.
    #[inline]
    #[must_use]
    pub fn responder_words(&self) -> ResponderWords {
        let line = self.0.block(320);
        ResponderWords([
            line[0].load(Ordering::Acquire),
            line[1].load(Ordering::Relaxed),
            line[2].load(Ordering::Relaxed),
        ])
    }

    /// Non-zero: the QP may be connected directly; its owner clears this and asks for the pairing.
    #[inline]
    #[must_use]
    pub fn offer(&self) -> &AtomicU32 {
        self.0.u32(344)
    }

    /// Receives consumed, which is receive completions written.
    #[inline]
    #[must_use]
    pub fn rq_done(&self) -> &AtomicU64 {
        self.0.u64(192)
    }

    /// Non-zero: whoever posts a receive rings the router (a sender waits for it, or the QP flushes).
    #[inline]
    #[must_use]
    pub fn rq_ring_me(&self) -> &AtomicU32 {
        self.0.u32(348)
    }

    /// Journal: number of the send WQE in progress plus one, 0 when none.
    #[inline]
    #[must_use]
    pub fn journal_wqe(&self) -> &AtomicU64 {
        self.0.u64(256)
    }

    /// Journal: bytes of it already placed.
    #[inline]
    #[must_use]
    pub fn journal_placed(&self) -> &AtomicU64 {
        self.0.u64(264)
    }
}

/// The words of the state line that say what a QP answers, as they lie there, two halves each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponderWords([u64; 3]);

impl ResponderWords {
    /// [`QpHeader::state`].
    #[must_use]
    pub fn state(self) -> u32 {
        self.0[0] as u32
    }

    /// [`QpHeader::peer`].
    #[must_use]
    pub fn peer(self) -> u32 {
        (self.0[0] >> 32) as u32
    }

    /// [`QpHeader::rights`].
    #[must_use]
    pub fn rights(self) -> u64 {
        self.0[1]
    }

    /// [`QpHeader::established`].
    #[must_use]
    pub fn established(self) -> u32 {
        (self.0[2] >> 32) as u32
    }
}

/// A QP in an arena.
#[derive(Clone, Debug)]
pub struct QueueArea {
    /// Header words.
    pub header: QpHeader,
    sq: Window,
    rq: Window,
    /// Send completion ring.
    pub sq_cqes: Window,
    /// Receive completion ring.
    pub rq_cqes: Window,
    geometry: Geometry,
}

impl QueueArea {
    /// The QP at `offset` of `arena`.
    #[must_use]
    pub fn new(arena: &Window, offset: u64, geometry: Geometry) -> Option<Self> {
        let area = arena.sub(offset, geometry.len())?;
        let [sq, rq, sq_cqes, rq_cqes, end] = geometry.offsets();
        let part = |from: usize, to: usize| area.sub(from as u64, to - from);
        Some(Self {
            header: QpHeader(part(0, HEADER)?),
            sq: part(sq, rq)?,
            rq: part(rq, sq_cqes)?,
            sq_cqes: part(sq_cqes, rq_cqes)?,
            rq_cqes: part(rq_cqes, end)?,
            geometry,
        })
    }

    /// Sizes.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Writes SQ block `index` (free-running; owner, before it publishes the tail).
    #[inline]
    pub fn write_sq_block(&self, index: u64, block: &[u64; 8]) {
        self.sq.write_block(self.sq_at(index), block);
    }

    /// Writes block `part` of RQ entry `index` (free-running; owner, before it publishes the tail).
    #[inline]
    pub fn write_rq_block(&self, index: u64, part: usize, block: &[u64; 8]) {
        debug_assert!(part < self.geometry.rq_stride as usize);
        self.rq.write_block(self.rq_at(index) + part * BLOCK, block);
    }

    /// Copies the WQE at block `head` into `wqe`. `Ok(false)`: nothing published there.
    ///
    /// # Errors
    /// [`BadWqe`] when the owner published something that cannot be a WQE.
    #[inline]
    pub fn read_send(&self, head: u64, wqe: &mut SendWqe) -> Result<bool, BadWqe> {
        let available = self.header.sq_tail().load(Ordering::Acquire).wrapping_sub(head);
        if available == 0 {
            return Ok(false);
        }
        if available > u64::from(self.geometry.sq_blocks) {
            return Err(BadWqe::Tail { ahead: available, capacity: self.geometry.sq_blocks });
        }
        wqe.decode(available, |i| self.sq.read_block(self.sq_at(head.wrapping_add(i))))?;
        Ok(true)
    }

    /// Copies SQ block `head` out, which is published.
    #[inline]
    #[must_use]
    pub fn read_sq_block(&self, head: u64) -> [u64; 8] {
        self.sq.read_block(self.sq_at(head))
    }

    /// Copies the receive WQE `index` out, which is published, if it has one SGE.
    #[inline]
    #[must_use]
    pub fn read_single_recv(&self, index: u64) -> Option<(u64, wqe::Sge)> {
        if self.geometry.rq_stride == 0 {
            return None;
        }
        RecvWqe::single(&self.rq.read_block(self.rq_at(index)))
    }

    /// Says that the receive WQE `index`, which is published, is read soon.
    #[inline]
    pub fn expect_recv(&self, index: u64) {
        if self.geometry.rq_stride != 0 {
            self.rq.prefetch(self.rq_at(index));
        }
    }

    /// Copies the receive WQE `index` into `wqe`. `Ok(false)`: nothing published there.
    ///
    /// # Errors
    /// [`BadWqe`] when the owner published something that cannot be a WQE.
    #[inline]
    pub fn read_recv(&self, index: u64, wqe: &mut RecvWqe) -> Result<bool, BadWqe> {
        let available = self.header.rq_tail().load(Ordering::Acquire).wrapping_sub(index);
        if available == 0 {
            return Ok(false);
        }
        if available > u64::from(self.geometry.rq_entries) {
            return Err(BadWqe::Tail { ahead: available, capacity: self.geometry.rq_entries });
        }
        let at = self.rq_at(index);
        wqe.decode(self.geometry.rq_stride as usize, |part| self.rq.read_block(at + part * BLOCK))?;
        Ok(true)
    }

    #[inline]
    fn sq_at(&self, index: u64) -> usize {
        (index as usize & (self.geometry.sq_blocks as usize - 1)) * BLOCK
    }

    #[inline]
    fn rq_at(&self, index: u64) -> usize {
        (index as usize & (self.geometry.rq_entries as usize - 1)) * self.geometry.rq_stride as usize * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_direct_peer_sees_the_words_that_the_router_writes() {
        let geometry = Geometry::new(1, 1, 1, 1, 0).unwrap();
        let area = QueueArea::new(&Window::heap(geometry.len()), 0, geometry).unwrap();
        let header = &area.header;
        header.state().store(1, Ordering::Relaxed);
        header.peer().store(2, Ordering::Relaxed);
        header.rights().store(3 << 32 | 4, Ordering::Relaxed);
        header.established().store(5, Ordering::Relaxed);
        let words = header.responder_words();
        let told = (words.state(), words.peer(), words.rights(), words.established());
        assert_eq!(told, (1, 2, 3 << 32 | 4, 5));
    }
}
