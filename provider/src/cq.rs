//! Completion queues.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use verbs_abi::ffi::{
    IBV_CQ_ATTR_MODERATE, ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_modify_cq_attr, ibv_pd,
    ibv_wc, ibv_wc__bindgen_ty_1, ibv_wc_opcode,
};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::barrier;
use verbs_abi::shm::cq::{Arm, CqArea};
use verbs_abi::shm::cqe::Cqe;

use crate::abi::edge::{self, Errno};
use crate::bell::Bell;
use crate::context::Context;
use crate::device;
use crate::event::{self, Channel, CqEvents};
use crate::lock::Lock;
use crate::moderation::Moderation;
use crate::pd::Pd;
use crate::poll::{Rings, Side};
use crate::qp::Qp;
use crate::srq::Srq;
use crate::watch::{self, Timed};

/// Polls that find nothing before the thread steps aside.
const IDLE_POLLS: u32 = 1024;
/// The same before it lets a worker of the router run that waits for its processor.
const SHORT_WAIT: u32 = 32;

/// A CQ as C sees it: the public part first, room for what later releases append to it, and ours.
#[repr(C)]
pub(crate) struct CqObject {
    pub(crate) public: ibv_cq_ex,
    room: [u64; 16],
    cq: Arc<Cq>,
    /// Its parent domain, or null.
    pub(crate) domain: *mut ibv_pd,
}

/// A CQ.
#[derive(Debug)]
pub(crate) struct Cq {
    /// The router's name for it.
    pub(crate) id: u32,
    pub(crate) events: Arc<CqEvents>,
    pub(crate) rings: Lock<Rings>,
    pub(crate) bell: Arc<Bell>,
    channel: Option<Arc<Channel>>,
    pub(crate) moderation: Moderation,
}

impl Timed for Cq {
    fn expire(&self, now: Instant) -> Option<Instant> {
        let (due, again) = self.moderation.expire(now);
        if due.is_some_and(|held| self.events.area.release(held))
            && let Some(channel) = &self.channel
        {
            channel.tick();
        }
        again
    }
}

impl Cq {
    /// A CQ without rings.
    pub(crate) fn new(id: u32, events: Arc<CqEvents>, bell: &Arc<Bell>, channel: Option<Arc<Channel>>) -> Cq {
        // Who cannot end it must not begin it.
        if barrier::is_registered() {
            events.area.be_quiet();
        }
        let rings = Lock::new(Rings::default());
        Cq { id, events, rings, bell: Arc::clone(bell), channel, moderation: Moderation::default() }
    }

    /// The CQ that C names.
    ///
    /// # Safety
    /// `cq` must be a live CQ of ours, and the reference must not outlive it.
    #[inline]
    pub(crate) unsafe fn of<'a>(cq: *const ibv_cq) -> &'a Arc<Cq> {
        // SAFETY: the caller's promise; the member is never written after creation, so other threads' changes to
        // the public part do not touch it.
        unsafe { &(*cq.cast::<CqObject>()).cq }
    }

    /// Takes up to `limit` completions; the caller holds `rings`.
    #[inline]
    pub(crate) fn take(&self, rings: &mut Rings, limit: usize, emit: &mut impl FnMut(u32, &Cqe)) -> usize {
        let taken = rings.take(&self.events.area, limit, emit);
        if taken > 0 {
            rings.idle = 0;
            rings.overrun.took(taken, &self.events.area);
            return taken;
        }
        rings.idle = rings.idle.wrapping_add(1);
        if self.bell.health().is_dead() { rings.flush(limit, emit) } else { 0 }
    }

    /// After a poll that found nothing for the `idle`th time: lets others run now and then. True: it did, so look again.
    /// Who is told that there is nothing may look at something else next that has come later: a disconnection.
    #[inline]
    pub(crate) fn rest(&self, idle: u32) -> bool {
        if idle.is_multiple_of(IDLE_POLLS) {
            self.bell.step_aside()
        } else {
            idle.is_multiple_of(SHORT_WAIT) && self.bell.give_way()
        }
    }

    /// The event that was asked for waits no longer than until then.
    #[cold]
    fn hold(self: &Arc<Self>, held: u16, until: Instant) {
        let timed: Arc<dyn Timed> = Arc::clone(self) as _;
        if self.moderation.start(until, held) && !watch::at(until, &timed) {
            // Nobody would look at the clock.
            self.expire(until);
        }
    }

    /// What wakes its completion channel, if it has one.
    pub(crate) fn channel_bell(&self) -> Option<Arc<dyn engine::Bell>> {
        self.channel.clone().map(|channel| channel as Arc<dyn engine::Bell>)
    }

    /// Gathers the completions of a QP at the slot that the router chose.
    pub(crate) fn attach(&self, slot: u32, side: Side, qp: &Arc<Qp>) {
        let mut rings = self.rings.lock();
        rings.attach(slot, side, qp);
        rings.check_overrun(&self.events.area);
    }

    /// The same for an XRC queue.
    pub(crate) fn attach_srq(&self, slot: u32, srq: &Arc<Srq>) {
        let mut rings = self.rings.lock();
        rings.attach_srq(slot, srq);
        rings.check_overrun(&self.events.area);
    }

    /// It has so many entries from now on; 0: it never overruns.
    pub(crate) fn set_entries(&self, rings: &mut Rings, entries: u32) {
        rings.overrun.set_entries(entries, &self.events.area);
        rings.check_overrun(&self.events.area);
    }

    fn arm(self: &Arc<Self>, arm: Arm) {
        self.events.area.end_quiet();
        let (held, period) = self.moderation.held();
        let is_new = self.events.area.arm(arm, held);
        if held != 0 && is_new {
            self.hold(held, Instant::now() + period);
        }
        if self.bell.health().is_dead()
            && self.rings.lock().has_outstanding()
            && self.events.area.publish(0, true)
            && let Some(channel) = &self.channel
        {
            channel.tick();
        }
    }
}

pub(crate) unsafe extern "C" fn create(
    context: *mut ibv_context,
    cqe: c_int,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: libibverbs passes an open context of ours and a channel of it, or none.
    edge::pointer(|| unsafe {
        let channel = (!channel.is_null()).then(|| (*channel).fd);
        let object = new(context, u32::try_from(cqe).unwrap_or(0), channel, comp_vector as u32)?;
        let (own, cqe) = (Cq::of(object.cast()), (*object).public.cqe as u32);
        own.set_entries(&mut own.rings.lock(), cqe);
        Ok(object.cast())
    })
}

/// Makes a CQ whose public part is zero but for what libibverbs does not fill in.
///
/// # Safety
/// `context` must be an open context of ours.
pub(crate) unsafe fn new(
    context: *mut ibv_context,
    cqe: u32,
    channel: Option<c_int>,
    comp_vector: u32,
) -> Result<*mut CqObject, Errno> {
    // SAFETY: the caller's promise.
    let device = unsafe { device::state(context) };
    if cqe == 0 || cqe > device.welcome.limits.max_cqe || comp_vector >= device.num_comp_vectors() as u32 {
        return Err(Errno::INVAL);
    }
    let channel = match channel {
        Some(fd) => Some(device.channels.find(fd).ok_or(Errno::BADF)?),
        None => None,
    };
    let cqe = given(cqe, device.welcome.limits.max_cqe);
    let handle = channel.as_ref().map(|channel| channel.handle(&device.link)).transpose()?;
    let answer = device.link.ask(&Request::CreateCq { cqe, channel: handle }, &[])?;
    let (Answer::Cq { cq: id, cqe, offset }, _) = answer else { return Err(Errno::PROTO) };
    let area = CqArea::new(&device.arena, offset).ok_or(Errno::PROTO)?;
    let object = Box::into_raw(Box::<CqObject>::new_uninit()).cast::<CqObject>();
    let events = Arc::new(CqEvents {
        area,
        address: object as u64,
        delivered: AtomicU32::new(0),
        async_delivered: AtomicU32::new(0),
    });
    if let Some(channel) = &channel {
        channel.attach(&events);
    }
    device.events.elements().cqs.insert(id, Arc::clone(&events));
    let cq = Arc::new(Cq::new(id, events, &device.bell, channel));
    // SAFETY: just allocated; the public part is integers, pointers and optional functions, so zero is a value.
    unsafe {
        object.write(CqObject {
            public: std::mem::zeroed(),
            room: [0; 16],
            cq,
            domain: std::ptr::null_mut(),
        });
        (*object).public.context = context;
        (*object).public.handle = id;
        (*object).public.cqe = cqe as c_int;
    }
    Ok(object)
}

/// The entries of a CQ that is asked for with so many: as for every queue in a ring, one less than a power of two.
fn given(cqe: u32, max_cqe: u32) -> u32 {
    cqe.max((u64::from(cqe) + 1).next_power_of_two().min(u64::from(max_cqe) + 1) as u32 - 1)
}

pub(crate) unsafe extern "C" fn destroy(cq: *mut ibv_cq) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live CQ of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*cq).context), Arc::clone(Cq::of(cq))) };
        // The events that it would take back are the parent's.
        device.health().check_owner()?;
        if !own.rings.lock().is_empty() {
            return Err(Errno::BUSY);
        }
        // Without QPs it raises no more events; and its count of them ends when the router lets it go.
        forget(device, &own);
        device.link.release(&Request::DestroyCq { cq: own.id })?;
        let (delivered, reported) = (&own.events.delivered, &own.events.async_delivered);
        // SAFETY: libibverbs initialised both when it created the CQ, and signals at each acknowledgement.
        unsafe {
            event::wait_for_acks(&raw mut (*cq).mutex, &raw mut (*cq).cond, || {
                (*cq).comp_events_completed == delivered.load(Ordering::SeqCst)
                    && (*cq).async_events_completed == reported.load(Ordering::SeqCst)
            });
            let object = Box::from_raw(cq.cast::<CqObject>());
            if !object.domain.is_null() {
                Pd::of(object.domain).let_go();
            }
        }
        Ok(())
    })
}

/// Gives a CQ another size: a number alone, as its rings hold whatever its QPs can complete. One that ignores overruns
/// goes on to do so.
pub(crate) unsafe extern "C" fn resize(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live CQ of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*cq).context), Cq::of(cq)) };
        device.health().check_owner()?;
        let wanted = u32::try_from(cqe).ok().filter(|&cqe| cqe > 0 && cqe <= device.welcome.limits.max_cqe);
        let wanted = wanted.ok_or(Errno::INVAL)?;
        let mut rings = own.rings.lock();
        if rings.filled() > u64::from(wanted) {
            return Err(Errno::INVAL);
        }
        let entries = given(wanted, device.welcome.limits.max_cqe);
        if rings.overrun.is_heeded() {
            own.set_entries(&mut rings, entries);
        }
        // SAFETY: as above; the field is written under the lock of the rings.
        unsafe { (*cq).cqe = entries as c_int };
        Ok(())
    })
}

/// Takes a CQ out of everything that could still find it.
fn forget(device: &Context, cq: &Cq) {
    if let Some(channel) = &cq.channel {
        channel.detach(&cq.events);
    }
    device.events.elements().cqs.remove(&cq.id);
}

pub(crate) unsafe extern "C" fn poll(cq: *mut ibv_cq, count: c_int, into: *mut ibv_wc) -> c_int {
    edge::value(-1, || {
        // SAFETY: the application passes a live CQ of ours.
        let cq = unsafe { Cq::of(cq) };
        let limit = usize::try_from(count).unwrap_or(0);
        if cq.bell.health().is_child() {
            return -1;
        }
        let mut next = into;
        let mut emit = |number, cqe: &Cqe| {
            // SAFETY: the application passes room for `count` completions, and no more than that are taken.
            unsafe {
                next.write(completion(number, cqe));
                next = next.add(1);
            }
        };
        let mut rings = cq.rings.lock();
        let mut taken = cq.take(&mut rings, limit, &mut emit);
        let idle = rings.idle;
        drop(rings);
        if taken == 0 && cq.rest(idle) {
            taken = cq.take(&mut cq.rings.lock(), limit, &mut emit);
        }
        taken as c_int
    })
}

/// A completion as C sees it.
#[inline]
fn completion(qp_num: u32, cqe: &Cqe) -> ibv_wc {
    ibv_wc {
        wr_id: cqe.wr_id,
        status: cqe.status.into(),
        // Bit 7 of an entry's opcode is IBV_WC_RECV's.
        opcode: ibv_wc_opcode::from(cqe.opcode),
        vendor_err: cqe.status.into(),
        byte_len: cqe.byte_len,
        __bindgen_anon_1: ibv_wc__bindgen_ty_1 { imm_data: cqe.imm },
        qp_num,
        src_qp: cqe.src_qp,
        wc_flags: cqe.flags.into(),
        pkey_index: 0,
        slid: 0,
        sl: cqe.sl,
        dlid_path_bits: 0,
    }
}

/// Changes when events come.
pub(crate) unsafe extern "C" fn modify(cq: *mut ibv_cq, attr: *mut ibv_modify_cq_attr) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes a live CQ of ours and its attributes.
        let (own, attr) = unsafe { (Cq::of(cq), &*attr) };
        own.bell.health().check_owner()?;
        if attr.attr_mask & !IBV_CQ_ATTR_MODERATE != 0 {
            return Err(Errno::INVAL);
        }
        if attr.attr_mask & IBV_CQ_ATTR_MODERATE != 0 {
            own.moderation.set(attr.moderate.cq_count, attr.moderate.cq_period);
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn request_notification(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes a live CQ of ours.
        let cq = unsafe { Cq::of(cq) };
        cq.bell.health().check_owner()?;
        cq.arm(if solicited_only == 0 { Arm::Any } else { Arm::Solicited });
        Ok(())
    })
}
