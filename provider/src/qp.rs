//! Queue pairs: modified, asked and destroyed. They are made in [`crate::qp_create`]; posting is in [`crate::post`],
//! taking completions in [`crate::poll`].

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use engine::{CompletionQueue, Completions};
use verbs_abi::ffi::{ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_rate_limit_attr};
use verbs_abi::proto::{Answer, Gid, QpAttr, QpCap, Request};
use verbs_abi::shm::barrier;
use verbs_abi::shm::cqe::{CompletionReader, CompletionWriter, Cqe};
use verbs_abi::shm::queue::{QpHeader, QueueArea};
use verbs_abi::verbs::{QpAttrMask, QpState, QpType, WcStatus};
use verbs_abi::{qp_attr, qp_state};

use crate::abi::edge::{self, Errno};
use crate::bell::Bell;
use crate::context::Context;
use crate::cq::Cq;
use crate::device;
use crate::direct::Seat;
use crate::event;
use crate::lock::Lock;
use crate::log::{self, Level};
use crate::mcast;
use crate::pd::Pd;
use crate::poll::Side;
use crate::post::{RecvQueue, SendQueue};
use crate::srq::Srq;

/// A QP as C sees it: room for `verbs_qp`, whose size depends on the release, and ours.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct QpObject {
    pub(crate) public: [u64; 64],
    qp: Arc<Qp>,
}

impl QpObject {
    /// An object whose public part is zero.
    pub(crate) fn new(qp: &Arc<Qp>) -> QpObject {
        QpObject { public: [0; 64], qp: Arc::clone(qp) }
    }
}

/// A QP.
#[derive(Debug)]
pub(crate) struct Qp {
    pub(crate) number: u32,
    pub(crate) slot: u32,
    pub(crate) address: u64,
    pub(crate) area: QueueArea,
    pub(crate) bell: Arc<Bell>,
    pub(crate) limits: Limits,
    pub(crate) send: Lock<SendQueue>,
    pub(crate) recv: Lock<RecvQueue>,
    /// Send WQEs that a polled completion has freed, by itself or by a later one.
    pub(crate) sq_freed: AtomicU64,
    /// Receive WQEs whose completion was polled.
    pub(crate) rq_freed: AtomicU64,
    /// Whether the router was told to bring it to INIT, and may not have done it yet.
    pub(crate) begins: AtomicBool,
    /// Async events handed to the application.
    pub(crate) async_delivered: AtomicU32,
    /// The shared queue that it takes its receives from.
    pub(crate) srq: Option<Arc<Srq>>,
    /// The CQs, and its rings' slots in them; none for what an XRC QP lacks.
    pub(crate) send_cq: Option<(Arc<Cq>, u32)>,
    pub(crate) recv_cq: Option<(Arc<Cq>, u32)>,
    /// The multicast groups that it is attached to.
    pub(crate) groups: Lock<BTreeSet<Gid>>,
}

/// What a QP was created for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) qp_type: QpType,
    pub(crate) cap: QpCap,
    pub(crate) sq_sig_all: bool,
    /// One bit for each opcode that may be posted.
    pub(crate) opcodes: u32,
}

impl Qp {
    /// The QP that C names.
    ///
    /// # Safety
    /// `qp` must be a live QP of ours, and the reference must not outlive it.
    #[inline]
    pub(crate) unsafe fn of<'a>(qp: *const ibv_qp) -> &'a Arc<Qp> {
        // SAFETY: the caller's promise; the member is never written after creation, so other threads' changes to
        // the public part do not touch it.
        unsafe { &(*qp.cast::<QpObject>()).qp }
    }

    /// Its number.
    #[inline]
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The address of its `ibv_qp`.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Ends it, the router being dead: nobody executes on it from now on, direct peers included.
    pub(crate) fn fail(&self) {
        self.area.header.state().store(QpState::Err.value(), Ordering::SeqCst);
    }

    /// Its state, as the router last said.
    #[inline]
    pub(crate) fn state(&self) -> u32 {
        self.area.header.state().load(Ordering::Relaxed)
    }

    /// Refuses what its state, or INIT if it is sure to reach that, does not allow.
    #[inline]
    pub(crate) fn check_state(&self, allows: impl Fn(QpState) -> bool) -> Result<(), Errno> {
        let state = QpState::try_from(self.state()).map_err(|_| Errno::INVAL)?;
        let coming = || state == QpState::Reset && self.begins.load(Ordering::Acquire);
        if allows(state) || coming() && allows(QpState::Init) { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Goes to INIT without waiting for the router, which cannot refuse it: nobody else sees the difference. False:
    /// the router must be asked.
    ///
    /// Whatever is asked next is answered after it, and what is posted before the router knows lies in the queue
    /// then.
    fn begin(&self, device: &Context, request: &Request, attr: &QpAttr, named: QpAttrMask) -> bool {
        let Ok(from) = QpState::try_from(self.state()) else { return false };
        if self.limits.qp_type == QpType::XrcRecv {
            // Others may have it open, too.
            return false;
        }
        let told = named.contains(QpAttrMask::STATE) && !named.contains(QpAttrMask::CUR_STATE);
        if !told || attr.qp_state != QpState::Init.value() || !matches!(from, QpState::Reset | QpState::Init)
        {
            return false;
        }
        let limits = &engine::ATTR_LIMITS;
        let allowed = qp_state::modify(self.limits.qp_type, from, named.bits(), attr, limits).is_ok();
        let said = allowed && device.link.mention(request);
        if said {
            self.begins.store(true, Ordering::Release);
        }
        said
    }

    /// Tells the router that there is something new. `streams`: and more to come soon.
    #[inline]
    pub(crate) fn ring(&self, streams: bool) {
        self.bell.ring(self.slot, streams);
    }

    /// The completions of one side, from their beginning.
    pub(crate) fn completions(&self, side: Side) -> CompletionReader {
        let ring = match side {
            Side::Send => &self.area.sq_cqes,
            Side::Recv => &self.area.rq_cqes,
        };
        CompletionReader::new(ring.clone(), 0)
    }

    /// The send completions, as their producer sees them.
    pub(crate) fn own_sends(&self) -> Option<Completions> {
        let (cq, slot) = self.send_cq.as_ref()?;
        let queue = CompletionQueue::new(cq.events.area.clone(), cq.channel_bell())
            .with_alarm(self.alarm())
            .with_light_fences(barrier::is_registered());
        let writer = CompletionWriter::new(self.area.sq_cqes.clone(), 0);
        Some(Completions::new(writer, Arc::new(queue), *slot))
    }

    /// What tells the router of the overrun of a CQ that this process meets while it executes.
    pub(crate) fn alarm(&self) -> Arc<dyn engine::Bell> {
        Arc::new(HandOver(self.area.header.clone()))
    }

    #[inline]
    fn freed(&self, side: Side) -> &AtomicU64 {
        match side {
            Side::Send => &self.sq_freed,
            Side::Recv => &self.rq_freed,
        }
    }

    /// Frees the WQE with these low 32 bits, and all before it. The caller holds the CQ's lock.
    #[inline]
    pub(crate) fn free(&self, side: Side, wqe: u32) {
        if side == Side::Recv
            && let Some(srq) = &self.srq
        {
            return srq.free(wqe);
        }
        let freed = self.freed(side);
        let before = freed.load(Ordering::Relaxed);
        let more = wqe.wrapping_add(1).wrapping_sub(before as u32);
        // Release: whoever sees the place free may write to it.
        freed.store(before.wrapping_add(u64::from(more)), Ordering::Release);
    }

    /// WQEs posted and not freed.
    pub(crate) fn outstanding(&self, side: Side) -> u64 {
        let posted = match side {
            Side::Send => self.send.try_lock().map(|queue| queue.posted()),
            Side::Recv => self.recv.try_lock().map(|queue| queue.posted()),
        };
        // Somebody posts just now.
        posted.map_or(1, |posted| posted - self.freed(side).load(Ordering::Acquire))
    }

    /// Sends that are not finished; none as far as can be told while somebody posts.
    pub(crate) fn in_flight(&self) -> u64 {
        let done = self.area.header.sq_done().load(Ordering::Acquire);
        self.send.try_lock().map_or(0, |queue| queue.posted().saturating_sub(done))
    }

    /// Completes the oldest outstanding WQE as flushed, the router being dead. The caller holds the locks of the CQ
    /// and of the send queue.
    pub(crate) fn flush_oldest(&self, side: Side, sends: &mut SendQueue) -> Option<Cqe> {
        let mut at = self.freed(side).load(Ordering::Acquire);
        if side == Side::Send {
            // Work that was done in silence stays done.
            let done = self.area.header.sq_done().load(Ordering::Acquire);
            at = at.max(done.min(sends.posted()));
        }
        // Whoever holds the lock is posting; the next poll finds it.
        let (wr_id, opcode) = match side {
            Side::Send => sends.read(&self.area, at)?,
            Side::Recv => self.recv.try_lock()?.read(&self.area, at)?,
        };
        self.freed(side).store(at + 1, Ordering::Release);
        let status = WcStatus::WrFlushErr.value() as u8;
        Some(Cqe { wr_id, status, opcode, wqe: at as u32, ..Cqe::default() })
    }

    /// Begins anew after the router has emptied the queues.
    fn restart(&self, sends: &mut SendQueue) {
        sends.restart();
        self.recv.lock().restart();
        for (side, cq) in self.cqs() {
            let Some((cq, slot)) = cq else { continue };
            let mut rings = cq.rings.lock();
            self.freed(side).store(0, Ordering::Release);
            rings.restart(*slot);
        }
    }

    /// Takes nothing more from its rings, and leaves word for the router how much was taken: what is in them goes
    /// when it empties them.
    pub(crate) fn close_rings(&self) {
        for ((_, cq), polled) in self.cqs().zip(self.area.header.polled()) {
            if let Some((cq, slot)) = cq
                && let Some(taken) = cq.rings.lock().close(*slot)
            {
                polled.store(taken, Ordering::Relaxed);
            }
        }
    }

    /// The router has not emptied them.
    pub(crate) fn reopen_rings(&self) {
        for (cq, slot) in self.cqs().filter_map(|(_, cq)| cq.as_ref()) {
            cq.rings.lock().reopen(*slot, &cq.events.area);
        }
    }

    fn cqs(&self) -> impl Iterator<Item = (Side, &Option<(Arc<Cq>, u32)>)> {
        [(Side::Send, &self.send_cq), (Side::Recv, &self.recv_cq)].into_iter()
    }

    /// Takes its completions out of the CQs.
    pub(crate) fn detach(&self) {
        for (cq, slot) in [&self.send_cq, &self.recv_cq].into_iter().flatten() {
            cq.rings.lock().detach(*slot, self);
        }
    }
}

/// Has the owner of a QP hand its seat to the router when it leaves.
#[derive(Debug)]
struct HandOver(QpHeader);

impl engine::Bell for HandOver {
    fn ring(&self) {
        self.0.hands_over().store(1, Ordering::Relaxed);
    }
}

pub(crate) unsafe extern "C" fn modify(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*qp).context), Qp::of(qp)) };
        let named = QpAttrMask::try_from(mask as u32).map_err(|_| Errno::INVAL)?;
        // SAFETY: the application's attributes, of which it filled in those that it names.
        let attr = unsafe { qp_attr::read_qp_attr(attr, named) };
        let request = Request::ModifyQp { qpn: own.number, mask: mask as u32, attr };
        // First, since a lock that another thread held at a fork is never free in the child.
        device.health().check_owner()?;
        // This process executes nothing while the router changes the QP.
        let mut sends = own.send.lock();
        if own.begin(device, &request, &attr, named) {
            return Ok(());
        }
        own.begins.store(false, Ordering::Release);
        let resets = named.contains(QpAttrMask::STATE) && attr.qp_state == QpState::Reset.value();
        if resets {
            own.close_rings();
        }
        let asked = device.link.ask(&request, &[]);
        if resets && asked.is_err() {
            own.reopen_rings();
        }
        let (answer, fds) = asked?;
        if resets {
            sends.seat = None;
            own.restart(&mut sends);
        }
        if matches!(answer, Answer::Direct(_)) {
            // SAFETY: a QP that can be connected directly has a PD, which is live; an XRC receiver has none.
            let pd = unsafe { Pd::of((*qp).pd).id };
            take_seat(device, own, &mut sends, pd, answer, fds);
        }
        Ok(())
    })
}

/// Sets how fast a QP may send, as the attribute of [`modify`] does. A packet's typical size matters to no frame here.
pub(crate) unsafe extern "C" fn modify_rate_limit(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_rate_limit_attr,
) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours, whose context is open, and the application's attributes.
        let (device, own, limit) = unsafe { (device::state((*qp).context), Qp::of(qp), &*attr) };
        if limit.comp_mask != 0 {
            return Err(Errno::INVAL);
        }
        let (rate_limit, max_burst_size) = (limit.rate_limit, limit.max_burst_sz);
        let attr = QpAttr { rate_limit, max_burst_size, ..QpAttr::default() };
        let mask = QpAttrMask::RATE_LIMIT.bits();
        device.link.tell(&Request::ModifyQp { qpn: own.number, mask, attr })
    })
}

/// Takes the seat that an answer offers, if it offers one.
fn take_seat(device: &Context, own: &Qp, sends: &mut SendQueue, pd: u32, answer: Answer, fds: Vec<OwnedFd>) {
    let Answer::Direct(peer) = answer else { return };
    match Seat::new(device, own, pd, &peer, fds) {
        Ok(seat) => sends.seat = Some(Box::new(seat)),
        Err(error) => log::say(Level::Warn, format_args!("QP {:#x} stays isolated: {error}", own.number)),
    }
}

/// Has a QP connected directly, if the router offers that. Where it comes to nothing the router goes on executing.
///
/// # Safety
/// `qp` must be a live QP of ours, whose send queue this thread has not locked.
#[inline]
pub(crate) unsafe fn accept_offer(qp: *mut ibv_qp, own: &Qp) {
    if own.area.header.offer().load(Ordering::Relaxed) != 0 {
        // SAFETY: the caller's promise.
        unsafe { pair(qp, own) };
    }
}

/// # Safety
/// As [`accept_offer`].
#[cold]
unsafe fn pair(qp: *mut ibv_qp, own: &Qp) {
    // SAFETY: the caller's promise: the context is open and the PD live.
    let (device, pd) = unsafe { (device::state((*qp).context), Pd::of((*qp).pd).id) };
    let mut sends = own.send.lock();
    // Before it is asked: what is offered from now on is a new offer.
    if own.area.header.offer().swap(0, Ordering::Relaxed) != 0
        && let Ok((answer, fds)) = device.link.ask(&Request::PairQp { qpn: own.number }, &[])
    {
        take_seat(device, own, &mut sends, pd, answer, fds);
    }
}

pub(crate) unsafe extern "C" fn query(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*qp).context), Qp::of(qp)) };
        let answer = device.link.ask(&Request::QueryQp { qpn: own.number }, &[])?;
        let (Answer::Attr(told), _) = answer else { return Err(Errno::PROTO) };
        // SAFETY: the application passes room for both.
        unsafe {
            qp_attr::write_qp_attr(&QpAttr { cap: own.limits.cap, ..told }, attr);
            init.write(ibv_qp_init_attr {
                qp_context: (*qp).qp_context,
                send_cq: (*qp).send_cq,
                recv_cq: (*qp).recv_cq,
                srq: (*qp).srq,
                cap: qp_attr::cap_to_c(own.limits.cap),
                qp_type: own.limits.qp_type.value(),
                sq_sig_all: own.limits.sq_sig_all.into(),
            });
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn destroy(qp: *mut ibv_qp) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live QP of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*qp).context), Arc::clone(Qp::of(qp))) };
        device.health().check_owner()?;
        if mcast::is_attached(&own) {
            return Err(Errno::BUSY);
        }
        // First, since afterwards the router may give the rings' slots to another QP.
        own.close_rings();
        own.detach();
        own.send.lock().seat = None;
        device.link.release(&Request::DestroyQp { qpn: own.number })?;
        device.events.elements().remove_qp(&own);
        // SAFETY: initialised at creation, and signalled by libibverbs at each acknowledgement.
        unsafe {
            event::wait_for_acks(&raw mut (*qp).mutex, &raw mut (*qp).cond, || {
                (*qp).events_completed == own.async_delivered.load(Ordering::SeqCst)
            });
            if own.limits.qp_type != QpType::XrcRecv {
                Pd::of((*qp).pd).let_go();
            }
            drop(Box::from_raw(qp.cast::<QpObject>()));
        }
        Ok(())
    })
}
