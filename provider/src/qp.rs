//! Queue pairs: made, modified, asked and destroyed. Posting is in [`crate::post`], taking completions in
//! [`crate::poll`].

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use engine::{CompletionQueue, Completions};
use verbs_abi::ffi::{self, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_init_attr_ex};
use verbs_abi::ffi_private;
use verbs_abi::proto::{Answer, CreateQp, NewQp, QpAttr, QpCap, Request};
use verbs_abi::qp_attr;
use verbs_abi::shm::Window;
use verbs_abi::shm::cqe::{CompletionReader, CompletionWriter, Cqe};
use verbs_abi::shm::queue::{Geometry, QueueArea};
use verbs_abi::verbs::{Opcode, QpAttrMask, QpState, QpType, WcStatus};

use crate::abi::edge::{self, Errno};
use crate::abi::layout::VERBS_QP_EX;
use crate::abi::library::Verbs;
use crate::bell::Bell;
use crate::cq::Cq;
use crate::device;
use crate::direct::Seat;
use crate::event;
use crate::lock::Lock;
use crate::log::{self, Level};
use crate::pd::Pd;
use crate::poll::Side;
use crate::post::{RecvQueue, SendQueue};
use crate::wr;

/// Operations that a send queue executes, on the QP types that have them.
const OPCODES: [Opcode; 12] = [
    Opcode::Write,
    Opcode::WriteWithImm,
    Opcode::Send,
    Opcode::SendWithImm,
    Opcode::Read,
    Opcode::CmpAndSwp,
    Opcode::FetchAndAdd,
    Opcode::SendWithInv,
    Opcode::LocalInv,
    Opcode::BindMw,
    Opcode::AtomicWrite,
    Opcode::Flush,
];

/// The functions of the extended interface that a QP can have: those of [`OPCODES`].
const SEND_OPS: u64 = (ffi::IBV_QP_EX_WITH_RDMA_WRITE
    | ffi::IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | ffi::IBV_QP_EX_WITH_SEND
    | ffi::IBV_QP_EX_WITH_SEND_WITH_IMM
    | ffi::IBV_QP_EX_WITH_RDMA_READ
    | ffi::IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | ffi::IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | ffi::IBV_QP_EX_WITH_SEND_WITH_INV
    | ffi::IBV_QP_EX_WITH_LOCAL_INV
    | ffi::IBV_QP_EX_WITH_BIND_MW
    | ffi::IBV_QP_EX_WITH_ATOMIC_WRITE
    | ffi_private::IBV_QP_EX_WITH_FLUSH) as u64;

/// A QP as C sees it: room for `verbs_qp`, whose size depends on the release, and ours.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct QpObject {
    public: [u64; 64],
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
    number: u32,
    slot: u32,
    address: u64,
    pub(crate) area: QueueArea,
    pub(crate) bell: Arc<Bell>,
    pub(crate) limits: Limits,
    pub(crate) send: Lock<SendQueue>,
    pub(crate) recv: Lock<RecvQueue>,
    /// Send WQEs that a polled completion has freed, by itself or by a later one.
    pub(crate) sq_freed: AtomicU64,
    /// Receive WQEs whose completion was polled.
    pub(crate) rq_freed: AtomicU64,
    /// Async events handed to the application.
    pub(crate) async_delivered: AtomicU32,
    send_cq: (Arc<Cq>, u32),
    recv_cq: (Arc<Cq>, u32),
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

    /// Tells the router that there is something new.
    #[inline]
    pub(crate) fn ring(&self) {
        self.bell.ring(self.slot);
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
    pub(crate) fn own_sends(&self) -> Completions {
        let (cq, slot) = &self.send_cq;
        let queue = CompletionQueue::new(cq.events.area.clone(), cq.channel_bell());
        Completions::new(CompletionWriter::new(self.area.sq_cqes.clone(), 0), Arc::new(queue), *slot)
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
        for (side, (cq, slot)) in [(Side::Send, &self.send_cq), (Side::Recv, &self.recv_cq)] {
            let mut rings = cq.rings.lock();
            self.freed(side).store(0, Ordering::Release);
            rings.restart(*slot);
        }
    }

    /// Takes its completions out of the CQs.
    pub(crate) fn detach(&self) {
        for (cq, slot) in [&self.send_cq, &self.recv_cq] {
            cq.rings.lock().detach(*slot, self);
        }
    }
}

pub(crate) unsafe extern "C" fn create(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: libibverbs passes a live PD of ours and the application's attributes.
    edge::pointer(|| unsafe { new(pd, &*attr, false) }.map(|object| object.cast()))
}

pub(crate) unsafe extern "C" fn create_ex(
    context: *mut ffi::ibv_context,
    attr: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        let extended = unsafe { &*attr };
        let known = ffi::IBV_QP_INIT_ATTR_PD
            | ffi::IBV_QP_INIT_ATTR_CREATE_FLAGS
            | ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        if extended.comp_mask & !known != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let has = |bit| extended.comp_mask & bit != 0;
        if !has(ffi::IBV_QP_INIT_ATTR_PD) || extended.pd.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the application names a live PD.
        if !ptr::eq(unsafe { (*extended.pd).context }, context) {
            return Err(Errno::INVAL);
        }
        let send_ops = if has(ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) { extended.send_ops_flags } else { 0 };
        let flags = if has(ffi::IBV_QP_INIT_ATTR_CREATE_FLAGS) { extended.create_flags } else { 0 };
        if send_ops & !SEND_OPS != 0 || flags != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        // SAFETY: the extended attributes begin with the plain ones.
        let plain = unsafe { &*attr.cast::<ibv_qp_init_attr>() };
        // SAFETY: the PD is live, see above.
        let object = unsafe { new(extended.pd, plain, has(ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS)) }?;
        Ok(object.cast())
    })
}

/// # Safety
/// `pd` must be a live PD of ours, and the CQs in `attr` live CQs of ours or null.
unsafe fn new(pd: *mut ibv_pd, attr: &ibv_qp_init_attr, extended: bool) -> Result<*mut QpObject, Errno> {
    // SAFETY: the caller's promise; the PD's context is open.
    let (context, pd_id, device) = unsafe { ((*pd).context, Pd::of(pd).id, device::state((*pd).context)) };
    let limits = limits(attr)?;
    if attr.send_cq.is_null() || attr.recv_cq.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise.
    let foreign = unsafe { (*attr.send_cq).context != context || (*attr.recv_cq).context != context };
    if foreign {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise.
    let (send_cq, recv_cq) = unsafe { (Arc::clone(Cq::of(attr.send_cq)), Arc::clone(Cq::of(attr.recv_cq))) };
    let request = Request::CreateQp(CreateQp {
        pd: pd_id,
        send_cq: send_cq.id,
        recv_cq: recv_cq.id,
        qp_type: attr.qp_type,
        cap: limits.cap,
        sq_sig_all: limits.sq_sig_all,
    });
    let (Answer::Qp(given), _) = device.link.ask(&request, &[])? else { return Err(Errno::PROTO) };
    let object = Box::into_raw(Box::<QpObject>::new_uninit()).cast::<QpObject>();
    let Some(qp) = build(&device.arena, &device.bell, object as u64, &given, limits, send_cq, recv_cq) else {
        // SAFETY: allocated above, and nobody else has it.
        drop(unsafe { Box::from_raw(object.cast::<std::mem::MaybeUninit<QpObject>>()) });
        return Err(Errno::PROTO);
    };
    // SAFETY: just allocated.
    unsafe {
        object.write(QpObject::new(&qp));
        show(object, pd, attr, &qp);
    }
    if extended {
        // SAFETY: as above; there is room for every release's `verbs_qp`.
        unsafe { show_extended(object)? }
    }
    device.events.elements().qps.insert(qp.number, qp);
    Ok(object)
}

/// What the attributes ask for, if the device has it.
pub(crate) fn limits(attr: &ibv_qp_init_attr) -> Result<Limits, Errno> {
    let qp_type = QpType::try_from(attr.qp_type).map_err(|_| Errno::INVAL)?;
    if !matches!(qp_type, QpType::Rc | QpType::Uc | QpType::Ud) || !attr.srq.is_null() {
        return Err(Errno::OPNOTSUPP);
    }
    let cap = qp_attr::cap_from_c(attr.cap);
    Geometry::new(cap.max_send_wr, cap.max_recv_wr, cap.max_send_sge, cap.max_recv_sge, cap.max_inline_data)
        .ok_or(Errno::INVAL)?;
    let allowed = OPCODES.into_iter().filter(|opcode| opcode.allowed_on(qp_type));
    let opcodes = allowed.fold(0, |bits, opcode| bits | 1 << opcode.value());
    Ok(Limits { qp_type, cap, sq_sig_all: attr.sq_sig_all != 0, opcodes })
}

/// The QP that the router has given, attached to its CQs. `None` when what it gave lies outside the arena.
pub(crate) fn build(
    arena: &Window,
    bell: &Arc<Bell>,
    address: u64,
    given: &NewQp,
    limits: Limits,
    send_cq: Arc<Cq>,
    recv_cq: Arc<Cq>,
) -> Option<Arc<Qp>> {
    let area = QueueArea::new(arena, given.offset, given.geometry)?;
    let qp = Arc::new(Qp {
        number: given.qpn,
        slot: given.slot,
        address,
        area,
        bell: Arc::clone(bell),
        limits,
        send: Lock::new(SendQueue::new(limits.cap.max_send_wr)),
        recv: Lock::new(RecvQueue::new()),
        sq_freed: AtomicU64::new(0),
        rq_freed: AtomicU64::new(0),
        async_delivered: AtomicU32::new(0),
        send_cq: (send_cq, given.send_slot),
        recv_cq: (recv_cq, given.recv_slot),
    });
    qp.send_cq.0.rings.lock().attach(given.send_slot, Side::Send, &qp);
    qp.recv_cq.0.rings.lock().attach(given.recv_slot, Side::Recv, &qp);
    Some(qp)
}

/// Fills in the public part.
///
/// # Safety
/// `object` must be allocated, zero where C sees it, and nobody else's yet.
unsafe fn show(object: *mut QpObject, pd: *mut ibv_pd, attr: &ibv_qp_init_attr, qp: &Qp) {
    // SAFETY: the caller's promise; the public part begins with an `ibv_qp`.
    unsafe {
        let public = object.cast::<ibv_qp>();
        (*public).context = (*pd).context;
        (*public).qp_context = attr.qp_context;
        (*public).pd = pd;
        (*public).send_cq = attr.send_cq;
        (*public).recv_cq = attr.recv_cq;
        (*public).handle = qp.number;
        (*public).qp_num = qp.number;
        (*public).state = QpState::Reset.value();
        (*public).qp_type = attr.qp_type;
        event::init_sync(&raw mut (*public).mutex, &raw mut (*public).cond);
    }
}

/// Fills in the functions of the extended interface, and says that they are there.
///
/// # Safety
/// As for [`show`].
unsafe fn show_extended(object: *mut QpObject) -> Result<(), Errno> {
    let verbs = Verbs::loaded().ok().flatten().ok_or(Errno::NODEV)?;
    // SAFETY: the caller's promise; the probed offset lies behind the functions and within the room.
    unsafe {
        wr::show(object.cast(), verbs.qp_comp_mask);
        let mask = object.cast::<u8>().add(verbs.qp_comp_mask).cast::<u32>();
        mask.write(VERBS_QP_EX);
    }
    Ok(())
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
        let (answer, fds) = device.link.ask(&request, &[])?;
        if named.contains(QpAttrMask::STATE) && attr.qp_state == QpState::Reset.value() {
            sends.seat = None;
            own.restart(&mut sends);
        }
        if let Answer::Direct(peer) = answer {
            // SAFETY: a live QP's PD is live.
            let pd = unsafe { Pd::of((*qp).pd).id };
            match Seat::new(device, own, pd, &peer, fds) {
                Ok(seat) => sends.seat = Some(Box::new(seat)),
                Err(error) => {
                    log::say(Level::Warn, format_args!("QP {:#x} stays isolated: {error}", own.number));
                }
            }
        }
        Ok(())
    })
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
                srq: ptr::null_mut(),
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
        // First, since afterwards the router may give the rings' slots to another QP.
        own.detach();
        own.send.lock().seat = None;
        device.link.release(&Request::DestroyQp { qpn: own.number })?;
        device.events.elements().qps.remove(&own.number);
        // SAFETY: initialised at creation, and signalled by libibverbs at each acknowledgement.
        unsafe {
            event::wait_for_acks(&raw mut (*qp).mutex, &raw mut (*qp).cond, || {
                (*qp).events_completed == own.async_delivered.load(Ordering::SeqCst)
            });
            drop(Box::from_raw(qp.cast::<QpObject>()));
        }
        Ok(())
    })
}

const _: () = {
    // `verbs_qp` of every release: the public part, the mask behind it, a pointer.
    assert!(size_of::<[u64; 64]>() >= crate::abi::layout::QP_COMP_MASK[2] + 2 * size_of::<*mut c_void>());
};
