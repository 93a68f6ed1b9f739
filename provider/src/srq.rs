//! Shared receive queues and XRC domains.
//!
//! A receive lies in a slot of the queue until its completion was polled, from whichever CQ. An XRC queue has a
//! completion ring of its own in its CQ; the other queues' receives complete to the rings of the QPs that took them.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use verbs_abi::ffi::{self, ibv_context, ibv_cq, ibv_pd, ibv_recv_wr, ibv_srq, ibv_srq_attr, ibv_xrcd};
use verbs_abi::proto::{Answer, CreateSrq, NewSrq, Request};
use verbs_abi::shm::Window;
use verbs_abi::shm::cqe::{CQE_LEN, CompletionReader};
use verbs_abi::shm::srq::SrqArea;
use verbs_abi::shm::wqe::{MAX_SGE, Sge};

use crate::abi::edge::{self, Errno};
use crate::bell::Bell;
use crate::cq::Cq;
use crate::device;
use crate::event;
use crate::lock::Lock;
use crate::overrun::Bound;
use crate::pd::Pd;
use crate::post;

/// What later releases have appended to `ibv_srq`, with room to spare.
pub(crate) const ROOM: usize = 8;

/// An SRQ as C sees it.
#[repr(C)]
struct SrqObject {
    public: ibv_srq,
    room: [u64; ROOM],
    srq: Arc<Srq>,
    /// Of an XRC queue.
    xrcd: *mut ibv_xrcd,
}

/// An SRQ.
#[derive(Debug)]
pub(crate) struct Srq {
    number: u32,
    slot: u32,
    address: u64,
    max_sge: u32,
    area: SrqArea,
    bell: Arc<Bell>,
    queue: Lock<Queue>,
    /// Async events handed to the application.
    pub(crate) async_delivered: AtomicU32,
    /// The CQ of an XRC queue, the ring in it, and its slot.
    cq: Option<(Arc<Cq>, Window, u32)>,
}

/// The owner's end.
#[derive(Debug)]
struct Queue {
    posted: u64,
    /// Receives in slots, polled completions not counted.
    used: u32,
    max_wr: u32,
    /// Slots that were used and are free again.
    free: Vec<u32>,
    /// The first slot that was never used.
    fresh: u32,
    sges: [Sge; MAX_SGE],
}

impl Srq {
    /// The SRQ that C names.
    ///
    /// # Safety
    /// `srq` must be a live SRQ of ours, and the reference must not outlive it.
    pub(crate) unsafe fn of<'a>(srq: *const ibv_srq) -> &'a Arc<Srq> {
        // SAFETY: the caller's promise; the member is never written after creation.
        unsafe { &(*srq.cast::<SrqObject>()).srq }
    }

    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The address of its `ibv_srq`.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The completions that its receives can have at a time.
    pub(crate) fn bound(&self) -> Bound {
        Bound::Shared(self.number, self.area.geometry().entries)
    }

    /// Receives that lie in slots.
    #[cfg(test)]
    pub(crate) fn used(&self) -> u32 {
        self.queue.lock().used
    }

    /// Takes slots for so many receives, as posting them does.
    #[cfg(test)]
    pub(crate) fn fill(&self, receives: u32) -> Vec<u32> {
        let mut queue = self.queue.lock();
        (0..receives).map_while(|_| queue.take(self.area.geometry().entries)).collect()
    }

    /// Frees a slot, whose completion was polled.
    pub(crate) fn free(&self, slot: u32) {
        let mut queue = self.queue.lock();
        // Nobody but the router wrote the number, yet what is not in use cannot be freed.
        if slot < queue.fresh && queue.used > 0 {
            queue.used -= 1;
            queue.free.push(slot);
        }
    }

    /// The completions of an XRC queue, from their beginning.
    pub(crate) fn completions(&self) -> Option<CompletionReader> {
        self.cq.as_ref().map(|(_, ring, _)| CompletionReader::new(ring.clone(), 0))
    }

    /// Posts receives until one fails; `next` is then that one.
    ///
    /// # Safety
    /// `next` must begin a list of work requests as `ibv_post_srq_recv` takes it.
    unsafe fn post_list(&self, queue: &mut Queue, next: &mut *mut ibv_recv_wr) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        while let Some(wr) = unsafe { next.as_ref() } {
            // SAFETY: the caller's promise: `num_sge` elements at `sg_list`.
            let list = unsafe { post::list(wr.sg_list, wr.num_sge)? };
            if list.len() > self.max_sge as usize {
                return Err(Errno::INVAL);
            }
            for (to, from) in queue.sges.iter_mut().zip(list) {
                *to = post::element(from);
            }
            let slot = queue.take(self.area.geometry().entries).ok_or(Errno::NOMEM)?;
            self.area.write(queue.posted, slot, wr.wr_id, &queue.sges[..list.len()]);
            queue.posted += 1;
            *next = wr.next;
        }
        Ok(())
    }
}

impl Queue {
    /// A free slot.
    fn take(&mut self, entries: u32) -> Option<u32> {
        if self.used >= self.max_wr {
            return None;
        }
        let slot = self.free.pop().or_else(|| {
            let fresh = self.fresh;
            (fresh < entries).then(|| {
                self.fresh += 1;
                fresh
            })
        })?;
        self.used += 1;
        Some(slot)
    }
}

pub(crate) unsafe extern "C" fn create(pd: *mut ibv_pd, attr: *mut ffi::ibv_srq_init_attr) -> *mut ibv_srq {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours and the application's attributes.
        unsafe { new(pd, &mut (*attr).attr, (*attr).srq_context, None) }
    })
}

pub(crate) unsafe extern "C" fn create_ex(
    context: *mut ibv_context,
    attr: *mut ffi::ibv_srq_init_attr_ex,
) -> *mut ibv_srq {
    const KNOWN: u32 = ffi::IBV_SRQ_INIT_ATTR_TYPE
        | ffi::IBV_SRQ_INIT_ATTR_PD
        | ffi::IBV_SRQ_INIT_ATTR_XRCD
        | ffi::IBV_SRQ_INIT_ATTR_CQ;
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        let attr = unsafe { &mut *attr };
        let has = |bit| attr.comp_mask & bit != 0;
        if attr.comp_mask & !KNOWN != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        // SAFETY: the application names a live PD.
        if !has(ffi::IBV_SRQ_INIT_ATTR_PD) || attr.pd.is_null() || unsafe { (*attr.pd).context } != context {
            return Err(Errno::INVAL);
        }
        let kind = if has(ffi::IBV_SRQ_INIT_ATTR_TYPE) { attr.srq_type } else { ffi::IBV_SRQT_BASIC };
        let xrc = match kind {
            ffi::IBV_SRQT_BASIC => None,
            ffi::IBV_SRQT_XRC => {
                let whole = has(ffi::IBV_SRQ_INIT_ATTR_XRCD) && has(ffi::IBV_SRQ_INIT_ATTR_CQ);
                if !whole || attr.xrcd.is_null() || attr.cq.is_null() {
                    return Err(Errno::INVAL);
                }
                Some((attr.xrcd, attr.cq))
            }
            _ => return Err(Errno::OPNOTSUPP),
        };
        // SAFETY: as above; the domain and the CQ are live.
        unsafe { new(attr.pd, &mut attr.attr, attr.srq_context, xrc) }
    })
}

/// # Safety
/// `pd` and what `xrc` names must be live objects of ours.
unsafe fn new(
    pd: *mut ibv_pd,
    attr: &mut ibv_srq_attr,
    srq_context: *mut std::ffi::c_void,
    xrc: Option<(*mut ibv_xrcd, *mut ibv_cq)>,
) -> Result<*mut ibv_srq, Errno> {
    // SAFETY: the caller's promise; the PD's context is open.
    let (context, own, device) = unsafe { ((*pd).context, Pd::of(pd), device::state((*pd).context)) };
    // SAFETY: the caller's promise.
    let parts = xrc.map(|(xrcd, cq)| unsafe { (Xrcd::of(xrcd).id, Arc::clone(Cq::of(cq))) });
    let request = Request::CreateSrq(CreateSrq {
        pd: own.id,
        max_wr: attr.max_wr,
        max_sge: attr.max_sge,
        xrc: parts.as_ref().map(|(xrcd, cq)| (*xrcd, cq.id)),
    });
    let (Answer::Srq(given), _) = device.link.ask(&request, &[])? else { return Err(Errno::PROTO) };
    let object = Box::into_raw(Box::<SrqObject>::new_uninit()).cast::<SrqObject>();
    let cq = parts.map(|(_, cq)| cq);
    let Some(srq) = build(&device.arena, &device.bell, object as u64, &given, *attr, cq) else {
        // SAFETY: allocated above, and nobody else has it.
        drop(unsafe { Box::from_raw(object.cast::<std::mem::MaybeUninit<SrqObject>>()) });
        return Err(Errno::PROTO);
    };
    own.hold();
    // SAFETY: just allocated; the public part is integers and pointers, for which zero is a value.
    unsafe {
        let xrcd = xrc.map_or(ptr::null_mut(), |(xrcd, _)| xrcd);
        object.write(SrqObject { public: std::mem::zeroed(), room: [0; ROOM], srq: Arc::clone(&srq), xrcd });
        let public = &mut (*object).public;
        (public.context, public.srq_context, public.pd) = (context, srq_context, pd);
        public.handle = given.number;
        event::init_sync(&raw mut public.mutex, &raw mut public.cond);
    }
    device.events.elements().srqs.insert(given.number, srq);
    Ok(object.cast())
}

/// The SRQ that the router has given, its ring attached to its CQ. `None` when what it gave lies outside the arena.
pub(crate) fn build(
    arena: &Window,
    bell: &Arc<Bell>,
    address: u64,
    given: &NewSrq,
    attr: ibv_srq_attr,
    cq: Option<Arc<Cq>>,
) -> Option<Arc<Srq>> {
    let area = SrqArea::new(arena, given.offset, given.geometry)?;
    let cq = match cq {
        None => None,
        Some(cq) => {
            let ring = arena.sub(given.ring_offset, given.geometry.entries as usize * CQE_LEN)?;
            Some((cq, ring, given.ring_slot))
        }
    };
    let queue = Queue {
        posted: 0,
        used: 0,
        max_wr: attr.max_wr,
        free: Vec::new(),
        fresh: 0,
        sges: [Sge::default(); MAX_SGE],
    };
    let srq = Arc::new(Srq {
        number: given.number,
        slot: given.slot,
        address,
        max_sge: attr.max_sge,
        area,
        bell: Arc::clone(bell),
        queue: Lock::new(queue),
        async_delivered: AtomicU32::new(0),
        cq,
    });
    if let Some((cq, _, slot)) = &srq.cq {
        cq.attach_srq(*slot, &srq);
    }
    Some(srq)
}

pub(crate) unsafe extern "C" fn modify(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live SRQ of ours, whose context is open, and the application's attributes.
        let (device, own, attr) = unsafe { (device::state((*srq).context), Srq::of(srq), &*attr) };
        device.health().check_owner()?;
        let mask = mask as u32;
        if mask & !(ffi::IBV_SRQ_MAX_WR | ffi::IBV_SRQ_LIMIT) != 0 {
            return Err(Errno::INVAL);
        }
        let max_wr = if mask & ffi::IBV_SRQ_MAX_WR != 0 { attr.max_wr } else { own.queue.lock().max_wr };
        if mask & ffi::IBV_SRQ_LIMIT != 0 && attr.srq_limit > max_wr {
            return Err(Errno::INVAL);
        }
        if mask & ffi::IBV_SRQ_MAX_WR != 0 {
            let mut queue = own.queue.lock();
            // It cannot hold fewer than it holds; and it was laid out for at most so many.
            if max_wr == 0 || max_wr < queue.used {
                return Err(Errno::INVAL);
            }
            if max_wr > own.area.geometry().entries {
                return Err(Errno::NOMEM);
            }
            queue.max_wr = max_wr;
        }
        if mask & ffi::IBV_SRQ_LIMIT != 0 {
            device.link.tell(&Request::LimitSrq { srqn: own.number, limit: attr.srq_limit })?;
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn query(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live SRQ of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*srq).context), Srq::of(srq)) };
        let srq_limit = device.link.handle(&Request::QuerySrq { srqn: own.number }, &[])?;
        let max_wr = own.queue.lock().max_wr;
        // SAFETY: the application passes room for it.
        unsafe { attr.write(ibv_srq_attr { max_wr, max_sge: own.max_sge, srq_limit }) };
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn number(srq: *mut ibv_srq, number: *mut u32) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live SRQ of ours and room for its number.
        unsafe {
            let own = Srq::of(srq);
            // Only requests to an XRC queue name it.
            if own.cq.is_none() {
                return Err(Errno::OPNOTSUPP);
            }
            number.write(own.number);
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn destroy(srq: *mut ibv_srq) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live SRQ of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*srq).context), Arc::clone(Srq::of(srq))) };
        device.health().check_owner()?;
        device.link.release(&Request::DestroySrq { srqn: own.number })?;
        if let Some((cq, _, slot)) = &own.cq {
            cq.rings.lock().detach_srq(*slot, &own);
        }
        device.events.elements().srqs.remove(&own.number);
        // SAFETY: initialised at creation, and signalled by libibverbs at each acknowledgement.
        unsafe {
            event::wait_for_acks(&raw mut (*srq).mutex, &raw mut (*srq).cond, || {
                (*srq).events_completed == own.async_delivered.load(Ordering::SeqCst)
            });
            Pd::of((*srq).pd).let_go();
            drop(Box::from_raw(srq.cast::<SrqObject>()));
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn post_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    edge::quick_status(|| {
        // SAFETY: the application passes a live SRQ of ours.
        let srq = unsafe { Srq::of(srq) };
        let mut next = wr;
        let result = srq.bell.health().check_owner().and_then(|()| {
            let mut queue = srq.queue.lock();
            // SAFETY: the application passes a list of work requests that ends in null.
            let result = unsafe { srq.post_list(&mut queue, &mut next) };
            // Release: the entries come before the tail.
            srq.area.tail().store(queue.posted, Ordering::Release);
            drop(queue);
            // Either the router sees the new tail, or we see that it wants to be told.
            fence(Ordering::SeqCst);
            if srq.area.ring_me().load(Ordering::Relaxed) != 0 {
                srq.bell.ring(srq.slot, true);
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

/// An XRC domain. C sees the first member.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Xrcd {
    public: ibv_xrcd,
    /// The router's name for it.
    pub(crate) id: u32,
}

impl Xrcd {
    /// The domain that C names.
    ///
    /// # Safety
    /// `xrcd` must be a live XRC domain of ours, and the reference must not outlive it.
    pub(crate) unsafe fn of<'a>(xrcd: *mut ibv_xrcd) -> &'a Xrcd {
        // SAFETY: the caller's promise; the public part comes first.
        unsafe { &*xrcd.cast() }
    }
}

pub(crate) unsafe extern "C" fn open_xrcd(
    context: *mut ibv_context,
    attr: *mut ffi::ibv_xrcd_init_attr,
) -> *mut ibv_xrcd {
    const NEEDED: u32 = ffi::IBV_XRCD_INIT_ATTR_FD | ffi::IBV_XRCD_INIT_ATTR_OFLAGS;
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours and the application's attributes.
        let (device, attr) = unsafe { (device::state(context), &*attr) };
        if attr.comp_mask & !(ffi::IBV_XRCD_INIT_ATTR_RESERVED - 1) != 0 || attr.comp_mask & NEEDED != NEEDED
        {
            return Err(Errno::INVAL);
        }
        let creates = attr.oflags & libc::O_CREAT != 0;
        let exclusive = attr.oflags & libc::O_EXCL != 0;
        if attr.oflags & !(libc::O_CREAT | libc::O_EXCL) != 0 || attr.fd < 0 && !creates {
            return Err(Errno::INVAL);
        }
        // SAFETY: the application names a descriptor that stays open during this call.
        let file = (attr.fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(attr.fd) });
        let request = Request::OpenXrcd { creates, exclusive };
        let id = device.link.handle(&request, file.as_slice())?;
        Ok(Box::into_raw(Box::new(Xrcd { public: ibv_xrcd { context }, id })).cast())
    })
}

pub(crate) unsafe extern "C" fn close_xrcd(xrcd: *mut ibv_xrcd) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live XRC domain of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*xrcd).context), Xrcd::of(xrcd)) };
        device.link.release(&Request::CloseXrcd { xrcd: own.id })?;
        // SAFETY: from `open_xrcd`, and gone for C when this returns 0.
        drop(unsafe { Box::from_raw(xrcd.cast::<Xrcd>()) });
        Ok(())
    })
}
