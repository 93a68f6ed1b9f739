//! Posting work requests: into the queues in shared memory, without system calls unless the router sleeps.
//!
//! A place in a queue is free again when the completion of its WQE, or of a later one of the same queue, was
//! polled: that is what keeps the completion rings from overflowing.

use std::ffi::c_int;
use std::slice;
use std::sync::atomic::Ordering;

use verbs_abi::ffi::{ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge};
use verbs_abi::shm::queue::QueueArea;
use verbs_abi::shm::wqe::{MAX_SGE, RecvWqe, SRQN_BITS, SendWqe, Sge, flag};
use verbs_abi::verbs::{Opcode, QpState, QpType};

use crate::abi::edge::{self, Errno};
use crate::ah::Ah;
use crate::direct::{Seat, Tried};
use crate::mw;
use crate::qp::{self, Qp};

/// The send flags that a work request may have; they are the WQE's own.
const SEND_FLAGS: u32 = (flag::FENCE | flag::SIGNALED | flag::SOLICITED | flag::INLINE) as u32;

/// Outstanding sends from which on a QP streams.
const STREAM: u64 = 4;

/// The owner's end of a send queue.
#[derive(Debug)]
pub(crate) struct SendQueue {
    /// The WQE being built.
    pub(crate) wqe: Box<SendWqe>,
    /// The application's own seat, where it has one.
    pub(crate) seat: Option<Box<Seat>>,
    /// Who executes what is being posted.
    turn: Turn,
    tail: u64,
    posted: u64,
    /// Where each outstanding WQE begins: low 32 bits of its block's number.
    starts: Box<[u32]>,
    /// What the extended interface is about.
    pub(crate) session: crate::wr::Session,
}

/// Who executes what is being posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The router, from the queue.
    Router,
    /// This thread, each work request as it is built.
    Owner,
    /// This thread began; the router goes on from the queue.
    Parked,
}

/// A place in a send queue to return to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    tail: u64,
    posted: u64,
}

impl SendQueue {
    pub(crate) fn new(max_send_wr: u32) -> SendQueue {
        let starts = vec![0; max_send_wr.max(1).next_power_of_two() as usize].into_boxed_slice();
        SendQueue {
            wqe: Box::default(),
            seat: None,
            turn: Turn::Router,
            tail: 0,
            posted: 0,
            starts,
            session: Default::default(),
        }
    }

    /// WQEs appended since the last restart.
    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// Forgets everything: the QP is in RESET.
    pub(crate) fn restart(&mut self) {
        (self.tail, self.posted) = (0, 0);
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark { tail: self.tail, posted: self.posted }
    }

    /// Takes back what was appended and not published since `mark`.
    pub(crate) fn roll_back(&mut self, mark: Mark) {
        (self.tail, self.posted) = (mark.tail, mark.posted);
    }

    /// Whether one more WQE has a place.
    #[inline]
    pub(crate) fn check_room(&self, qp: &Qp) -> Result<(), Errno> {
        let outstanding = self.posted.wrapping_sub(qp.sq_freed.load(Ordering::Acquire));
        if outstanding < u64::from(qp.limits.cap.max_send_wr) { Ok(()) } else { Err(Errno::NOMEM) }
    }

    /// Whether so much waits for its completion that more is to come soon.
    #[inline]
    pub(crate) fn streams(&self, qp: &Qp) -> bool {
        self.posted.wrapping_sub(qp.sq_freed.load(Ordering::Relaxed)) > STREAM
    }

    /// Begins to post: from here to [`Self::end`] this thread executes, if it may.
    #[inline]
    pub(crate) fn begin_posting(&mut self, qp: &Qp) {
        let tail = self.tail;
        let may = self.seat.as_mut().is_some_and(|seat| seat.enter(qp, tail));
        self.turn = if may { Turn::Owner } else { Turn::Router };
    }

    /// Posts the WQE that was built.
    #[inline]
    pub(crate) fn post(&mut self, qp: &Qp) {
        if self.turn == Turn::Owner
            && let Some(seat) = &mut self.seat
        {
            match seat.execute(qp, &mut self.wqe) {
                Tried::Done => {
                    self.posted += 1;
                    return;
                }
                Tried::Failed => {
                    self.posted += 1;
                    self.turn = Turn::Parked;
                    return;
                }
                Tried::NotNow => self.turn = Turn::Parked,
            }
        }
        self.append(qp);
    }

    /// Ends posting. True: the router must be rung.
    #[inline]
    pub(crate) fn end_posting(&mut self, qp: &Qp) -> bool {
        if self.turn != Turn::Owner {
            self.publish(qp);
        }
        match (self.turn, &mut self.seat) {
            (Turn::Owner, Some(seat)) => return seat.leave(qp),
            (Turn::Parked, Some(seat)) => seat.park(qp),
            _ => {}
        }
        true
    }

    /// Appends the WQE that was built.
    #[inline]
    pub(crate) fn append(&mut self, qp: &Qp) {
        let at = self.tail;
        let mask = self.starts.len() - 1;
        self.starts[self.posted as usize & mask] = at as u32;
        self.tail += self.wqe.encode(|i, block| qp.area.write_sq_block(at + i, block));
        self.posted += 1;
    }

    /// Publishes what was appended. Release: the blocks come before the tail.
    #[inline]
    pub(crate) fn publish(&self, qp: &Qp) {
        qp.area.header.sq_tail().store(self.tail, Ordering::Release);
    }

    /// The id and the completion opcode of WQE `number`, if it was posted.
    pub(crate) fn read(&mut self, area: &QueueArea, number: u64) -> Option<(u64, u8)> {
        if number >= self.posted {
            return None;
        }
        let mask = self.starts.len() - 1;
        let start = self.starts[number as usize & mask];
        let block = self.tail - u64::from((self.tail as u32).wrapping_sub(start));
        match area.read_send(block, &mut self.wqe) {
            Ok(true) => {
                let opcode = Opcode::try_from(u32::from(self.wqe.opcode)).ok()?;
                Some((self.wqe.wr_id, opcode.wc_opcode().value() as u8))
            }
            _ => None,
        }
    }

    /// Builds the WQE of a work request.
    ///
    /// # Safety
    /// `wr` must be a work request as `ibv_post_send` takes it.
    #[inline]
    unsafe fn build(&mut self, qp: &Qp, wr: &ibv_send_wr) -> Result<(), Errno> {
        let limits = &qp.limits;
        if wr.opcode >= 32 || limits.opcodes >> wr.opcode & 1 == 0 || wr.send_flags & !SEND_FLAGS != 0 {
            return Err(Errno::INVAL);
        }
        let wqe = &mut self.wqe;
        wqe.reset();
        wqe.wr_id = wr.wr_id;
        wqe.opcode = wr.opcode as u8;
        wqe.flags = wr.send_flags as u8 | if limits.sq_sig_all { flag::SIGNALED } else { 0 };
        // SAFETY: both members of the union are four bytes of any value.
        wqe.imm = unsafe { wr.__bindgen_anon_1.imm_data };
        // SAFETY: the caller's promise: the members that the opcode and the QP type ask for are set.
        unsafe { fill_target(wqe, qp, wr)? };
        // SAFETY: the caller's promise: `num_sge` elements at `sg_list`.
        let sges = unsafe { list(wr.sg_list, wr.num_sge)? };
        if wqe.flags & flag::INLINE == 0 {
            return gather(wqe, qp, sges);
        }
        let parts = sges.iter().map(|sge| (sge.addr as *const u8, sge.length as usize));
        // SAFETY: the caller's promise: inline payload is readable now.
        unsafe { copy_inline(wqe, qp, parts) }
    }
}

/// Where the work request goes: remote memory, or for a datagram the address.
///
/// # Safety
/// The members of `wr.wr` that the opcode and the QP type ask for must be set.
#[inline]
unsafe fn fill_target(wqe: &mut SendWqe, qp: &Qp, wr: &ibv_send_wr) -> Result<(), Errno> {
    const ATOMIC: u32 = 1 << Opcode::CmpAndSwp.value() | 1 << Opcode::FetchAndAdd.value();
    const RDMA: u32 = 1 << Opcode::Write.value()
        | 1 << Opcode::WriteWithImm.value()
        | 1 << Opcode::Read.value()
        | 1 << Opcode::AtomicWrite.value();
    // SAFETY: the caller's promise, for each of them.
    unsafe {
        if qp.limits.qp_type == QpType::Ud {
            let ud = wr.wr.ud;
            if ud.ah.is_null() {
                return Err(Errno::INVAL);
            }
            set_address(wqe, Ah::of(ud.ah), ud.remote_qpn, ud.remote_qkey);
            return Ok(());
        }
        if qp.limits.qp_type == QpType::XrcSend {
            wqe.srqn = check_srqn(wr.qp_type.xrc.remote_srqn)?;
        }
        if RDMA >> wr.opcode & 1 == 1 {
            let rdma = wr.wr.rdma;
            (wqe.remote_addr, wqe.rkey) = (rdma.remote_addr, rdma.rkey);
        } else if ATOMIC >> wr.opcode & 1 == 1 {
            let atomic = wr.wr.atomic;
            (wqe.remote_addr, wqe.rkey) = (atomic.remote_addr, atomic.rkey);
            (wqe.compare_add, wqe.swap) = (atomic.compare_add, atomic.swap);
        } else if wr.opcode == Opcode::BindMw.value() {
            let bind = wr.__bindgen_anon_2.bind_mw;
            mw::fill(wqe, bind.rkey, &bind.bind_info);
        } else if wr.opcode == Opcode::Flush.value() {
            // Only the extended interface has room for what it takes.
            return Err(Errno::INVAL);
        }
    }
    Ok(())
}

/// The number of an SRQ, if it can be one.
pub(crate) fn check_srqn(number: u32) -> Result<u32, Errno> {
    if number >> SRQN_BITS == 0 { Ok(number) } else { Err(Errno::INVAL) }
}

/// Makes the WQE a datagram to this address.
#[inline]
pub(crate) fn set_address(wqe: &mut SendWqe, ah: &Ah, qpn: u32, qkey: u32) {
    wqe.flags |= flag::ADDRESS;
    wqe.address = ah.address;
    wqe.address.qpn = qpn;
    wqe.address.qkey = qkey;
}

/// The elements of a list in C.
///
/// # Safety
/// `count` elements must lie at `first`, if any.
#[inline]
pub(crate) unsafe fn list<'a, T>(first: *const T, count: c_int) -> Result<&'a [T], Errno> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count == 0 {
        return Ok(&[]);
    }
    if count > MAX_SGE || first.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { slice::from_raw_parts(first, count) })
}

/// Adds the gather list to the WQE.
#[inline]
pub(crate) fn gather(wqe: &mut SendWqe, qp: &Qp, sges: &[ibv_sge]) -> Result<(), Errno> {
    if sges.len() > qp.limits.cap.max_send_sge as usize {
        return Err(Errno::INVAL);
    }
    for sge in sges {
        wqe.push_sge(element(sge));
    }
    Ok(())
}

#[inline]
pub(crate) fn element(sge: &ibv_sge) -> Sge {
    Sge { addr: sge.addr, length: sge.length, lkey: sge.lkey }
}

/// Copies the payload into the WQE.
///
/// # Safety
/// Each part must be readable.
pub(crate) unsafe fn copy_inline(
    wqe: &mut SendWqe,
    qp: &Qp,
    parts: impl Iterator<Item = (*const u8, usize)> + Clone,
) -> Result<(), Errno> {
    let total = parts.clone().fold(0_usize, |sum, (_, len)| sum.saturating_add(len));
    let writes_locally = Opcode::try_from(u32::from(wqe.opcode)).is_ok_and(Opcode::writes_locally);
    if total > qp.limits.cap.max_inline_data as usize || writes_locally {
        return Err(Errno::INVAL);
    }
    let room = wqe.inline_mut(total).ok_or(Errno::INVAL)?;
    let mut at = 0;
    for (from, len) in parts {
        if len > 0 {
            // SAFETY: the caller's promise, and the sum of the lengths is the room's; C's buffer is not ours.
            unsafe { std::ptr::copy_nonoverlapping(from, room[at..at + len].as_mut_ptr(), len) };
        }
        at += len;
    }
    Ok(())
}

/// Refuses a send on a QP that is not ready, or not this process's.
#[inline]
pub(crate) fn check_send(qp: &Qp) -> Result<(), Errno> {
    qp.bell.health().check_owner()?;
    qp.check_state(QpState::may_post_send)
}

pub(crate) unsafe extern "C" fn send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    edge::quick_status(|| {
        // SAFETY: the application passes a live QP of ours.
        let (c, qp) = (qp, unsafe { Qp::of(qp) });
        let mut next = wr;
        let result = check_send(qp).and_then(|()| {
            // SAFETY: as above; its send queue is not locked here.
            unsafe { qp::accept_offer(c, qp) };
            let mut queue = qp.send.lock();
            queue.begin_posting(qp);
            // SAFETY: the application passes a list of work requests that ends in null.
            let result = unsafe { send_list(&mut queue, qp, &mut next) };
            let (must_ring, streams) = (queue.end_posting(qp), queue.streams(qp));
            drop(queue);
            if must_ring {
                qp.ring(streams);
            }
            result
        });
        if result.is_err() {
            // SAFETY: the application passes a place for the request that failed.
            unsafe { *bad = next };
        }
        result
    })
}

/// Posts one work request without payload.
pub(crate) fn one(
    qp: &Qp,
    opcode: Opcode,
    wr_id: u64,
    flags: u32,
    fill: impl FnOnce(&mut SendWqe),
) -> Result<(), Errno> {
    check_send(qp)?;
    if qp.limits.opcodes >> opcode.value() & 1 == 0 {
        return Err(Errno::INVAL);
    }
    let mut queue = qp.send.lock();
    queue.check_room(qp)?;
    let wqe = &mut queue.wqe;
    wqe.reset();
    (wqe.wr_id, wqe.opcode, wqe.imm) = (wr_id, opcode.value() as u8, 0);
    wqe.flags = flags as u8 | if qp.limits.sq_sig_all { flag::SIGNALED } else { 0 };
    fill(wqe);
    queue.begin_posting(qp);
    queue.post(qp);
    let (must_ring, streams) = (queue.end_posting(qp), queue.streams(qp));
    drop(queue);
    if must_ring {
        qp.ring(streams);
    }
    Ok(())
}

/// Appends work requests until one fails; `next` is then that one.
///
/// # Safety
/// `next` must begin a list of work requests as `ibv_post_send` takes it.
#[inline]
unsafe fn send_list(queue: &mut SendQueue, qp: &Qp, next: &mut *mut ibv_send_wr) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    while let Some(wr) = unsafe { next.as_ref() } {
        queue.check_room(qp)?;
        // SAFETY: the caller's promise.
        unsafe { queue.build(qp, wr)? };
        queue.post(qp);
        *next = wr.next;
    }
    Ok(())
}

/// The owner's end of a receive queue.
#[derive(Debug)]
pub(crate) struct RecvQueue {
    posted: u64,
    sges: [Sge; MAX_SGE],
}

impl RecvQueue {
    pub(crate) fn new() -> RecvQueue {
        RecvQueue { posted: 0, sges: [Sge::default(); MAX_SGE] }
    }

    /// WQEs posted since the last restart.
    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// Forgets everything: the QP is in RESET.
    pub(crate) fn restart(&mut self) {
        self.posted = 0;
    }

    /// The id and the completion opcode of WQE `number`, if it was posted.
    pub(crate) fn read(&self, area: &QueueArea, number: u64) -> Option<(u64, u8)> {
        let mut wqe = RecvWqe::default();
        match area.read_recv(number, &mut wqe) {
            Ok(true) if number < self.posted => {
                Some((wqe.wr_id, verbs_abi::verbs::WcOpcode::Recv.value() as u8))
            }
            _ => None,
        }
    }

    /// Posts receives until one fails; `next` is then that one.
    ///
    /// # Safety
    /// `next` must begin a list of work requests as `ibv_post_recv` takes it.
    #[inline]
    unsafe fn post_list(&mut self, qp: &Qp, next: &mut *mut ibv_recv_wr) -> Result<(), Errno> {
        let cap = &qp.limits.cap;
        // SAFETY: the caller's promise.
        while let Some(wr) = unsafe { next.as_ref() } {
            if qp.srq.is_some() {
                return Err(Errno::INVAL);
            }
            if self.posted.wrapping_sub(qp.rq_freed.load(Ordering::Acquire)) >= u64::from(cap.max_recv_wr) {
                return Err(Errno::NOMEM);
            }
            // SAFETY: the caller's promise: `num_sge` elements at `sg_list`.
            let list = unsafe { list(wr.sg_list, wr.num_sge)? };
            if list.len() > cap.max_recv_sge as usize {
                return Err(Errno::INVAL);
            }
            for (to, from) in self.sges.iter_mut().zip(list) {
                *to = element(from);
            }
            let at = self.posted;
            let sges = &self.sges[..list.len()];
            RecvWqe::encode(wr.wr_id, sges, |part, block| qp.area.write_rq_block(at, part, block));
            self.posted += 1;
            *next = wr.next;
        }
        Ok(())
    }
}

pub(crate) unsafe extern "C" fn recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    edge::quick_status(|| {
        // SAFETY: the application passes a live QP of ours.
        let qp = unsafe { Qp::of(qp) };
        let mut next = wr;
        let result = check_recv(qp).and_then(|()| {
            let mut queue = qp.recv.lock();
            // SAFETY: the application passes a list of work requests that ends in null.
            let result = unsafe { queue.post_list(qp, &mut next) };
            // The entries come before the tail; and either the seat holder sees the new tail, or we see that it wants
            // to be told: it looks at the two the other way round.
            qp.area.header.rq_tail().store(queue.posted, Ordering::SeqCst);
            drop(queue);
            if qp.area.header.rq_ring_me().load(Ordering::SeqCst) != 0 {
                qp.ring(true);
            }
            result
        });
        if result.is_err() {
            // SAFETY: the application passes a place for the request that failed.
            unsafe { *bad = next };
        }
        result
    })
}

#[inline]
fn check_recv(qp: &Qp) -> Result<(), Errno> {
    qp.bell.health().check_owner()?;
    qp.check_state(QpState::may_post_recv)
}

#[cfg(test)]
mod tests;
