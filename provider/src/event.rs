//! Completion channels and async events: the records that libibverbs reads, built inside the process.
//!
//! The descriptors are event counters, to which the router can only add. What happened is read from shared memory:
//! a CQ counts the events it raised, the async ring holds numbers. Records carry pointers, which therefore never
//! leave the process. A count without an event (its CQ is gone, or another reader was faster) leads to no record.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::{pthread_cond_t, pthread_mutex_t};
use rustix::io::ReadWriteFlags;
use verbs_abi::ffi_private::{AsyncEventDesc, CompEventDesc};
use verbs_abi::proto::Request;
use verbs_abi::shm::cq::CqArea;
use verbs_abi::shm::events::{AsyncEvent, EventReader};
use verbs_abi::verbs::EventType;

use crate::abi::edge::Errno;
use crate::qp::Qp;
use crate::router_link::RouterLink;
use crate::srq::Srq;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What events need of a CQ.
#[derive(Debug)]
pub(crate) struct CqEvents {
    /// Its shared words.
    pub(crate) area: CqArea,
    /// The address of its `ibv_cq`.
    pub(crate) address: u64,
    /// Completion events handed to the application.
    pub(crate) delivered: AtomicU32,
    /// Async events handed to the application.
    pub(crate) async_delivered: AtomicU32,
}

impl CqEvents {
    /// Events raised and not handed out. Both numbers count in a circle.
    fn undelivered(&self) -> u32 {
        (self.area.events() as u32).wrapping_sub(self.delivered.load(Ordering::SeqCst))
    }
}

/// The completion channels of one opened device.
#[derive(Debug, Default)]
pub(crate) struct Channels(Mutex<HashMap<RawFd, Arc<Channel>>>);

/// A completion channel.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: RawFd,
    handle: Mutex<Option<u32>>,
    cqs: Mutex<VecDeque<Arc<CqEvents>>>,
}

impl Channels {
    /// Enters a new channel.
    pub(crate) fn add(&self, fd: RawFd) {
        let channel = Channel { fd, handle: Mutex::default(), cqs: Mutex::default() };
        lock(&self.0).insert(fd, Arc::new(channel));
    }

    /// Takes a channel out, and out of the router if it knows it.
    pub(crate) fn remove(&self, link: &RouterLink, fd: RawFd) {
        let removed = lock(&self.0).remove(&fd);
        if let Some(channel) = removed.and_then(|channel| *lock(&channel.handle)) {
            let _ = link.release(&Request::DestroyChannel { channel });
        }
    }

    /// The channel with this descriptor.
    pub(crate) fn find(&self, fd: RawFd) -> Option<Arc<Channel>> {
        lock(&self.0).get(&fd).cloned()
    }

    /// Wakes every channel whose application waits for an event that the dead router will not raise.
    pub(crate) fn wake_all(&self) {
        let channels = lock(&self.0);
        for channel in channels.values() {
            for cq in lock(&channel.cqs).iter() {
                // One more than needed is harmless, one fewer is a hang.
                if cq.area.publish(0, true) || cq.undelivered() > 0 {
                    channel.tick();
                }
            }
        }
    }
}

impl Channel {
    /// The router's name for the channel, which it learns when the first CQ uses it.
    pub(crate) fn handle(&self, link: &RouterLink) -> Result<u32, Errno> {
        let mut handle = lock(&self.handle);
        if let Some(known) = *handle {
            return Ok(known);
        }
        Ok(*handle.insert(link.handle(&Request::CreateChannel, &[self.fd()])?))
    }

    /// Adds a CQ whose events go here.
    pub(crate) fn attach(&self, cq: &Arc<CqEvents>) {
        lock(&self.cqs).push_back(Arc::clone(cq));
    }

    /// Takes a CQ out that raises no more events, and the counts of those that nobody read.
    pub(crate) fn detach(&self, cq: &Arc<CqEvents>) {
        let mut cqs = lock(&self.cqs);
        cqs.retain(|other| !Arc::ptr_eq(other, cq));
        for _ in 0..cq.undelivered() {
            let mut count = [0; 8];
            // Never waits: another reader may have taken the count already.
            let taken = rustix::io::preadv2(
                self.fd(),
                &mut [IoSliceMut::new(&mut count)],
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            );
            if taken.is_err() {
                break;
            }
        }
    }

    /// The next event of any of the channel's CQs, in turn.
    pub(crate) fn next(&self) -> Option<CompEventDesc> {
        let mut cqs = lock(&self.cqs);
        let at = cqs.iter().position(|cq| cq.undelivered() > 0)?;
        cqs[at].delivered.fetch_add(1, Ordering::SeqCst);
        let cq_handle = cqs[at].address;
        cqs.rotate_left(at + 1);
        Some(CompEventDesc { cq_handle })
    }

    /// Adds a count.
    pub(crate) fn tick(&self) {
        let _ = rustix::io::write(self.fd(), &1_u64.to_ne_bytes());
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: libibverbs closes the descriptor after it was taken out of `Channels` and no CQ uses it.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl engine::Bell for Channel {
    fn ring(&self) {
        self.tick();
    }
}

/// The async events of one opened device.
#[derive(Debug)]
pub(crate) struct AsyncEvents {
    counter: OwnedFd,
    sources: Mutex<Sources>,
    elements: Mutex<Elements>,
}

#[derive(Debug)]
struct Sources {
    router: EventReader,
    local: VecDeque<AsyncEvent>,
}

/// What events can be about, by the numbers that the router knows.
#[derive(Debug, Default)]
pub(crate) struct Elements {
    /// QPs by number; an XRC receiver can be open more than once.
    qps: HashMap<u32, VecDeque<Arc<Qp>>>,
    /// CQs by id.
    pub(crate) cqs: HashMap<u32, Arc<CqEvents>>,
    /// SRQs by number.
    pub(crate) srqs: HashMap<u32, Arc<Srq>>,
}

impl Elements {
    /// All QPs.
    pub(crate) fn qps(&self) -> impl Iterator<Item = &Arc<Qp>> {
        self.qps.values().flatten()
    }

    /// Enters a QP.
    pub(crate) fn add_qp(&mut self, qp: Arc<Qp>) {
        self.qps.entry(qp.number()).or_default().push_back(qp);
    }

    /// Takes a QP out.
    pub(crate) fn remove_qp(&mut self, qp: &Arc<Qp>) {
        let Some(same) = self.qps.get_mut(&qp.number()) else { return };
        same.retain(|other| !Arc::ptr_eq(other, qp));
        if same.is_empty() {
            self.qps.remove(&qp.number());
        }
    }

    /// The QP that the next event about this number is for: the router raises one for each time that it is open.
    fn next_qp(&mut self, number: u32) -> Option<&Arc<Qp>> {
        let same = self.qps.get_mut(&number)?;
        same.rotate_left(1);
        same.back()
    }
}

impl AsyncEvents {
    /// `counter` is the async descriptor, or a copy of it.
    pub(crate) fn new(counter: OwnedFd, router: EventReader) -> AsyncEvents {
        let sources = Mutex::new(Sources { router, local: VecDeque::new() });
        AsyncEvents { counter, sources, elements: Mutex::default() }
    }

    /// A further descriptor to read the events from: each is read through one of them.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd, Errno> {
        rustix::io::fcntl_dupfd_cloexec(&self.counter, 0)
    }

    /// The live QPs and CQs.
    pub(crate) fn elements(&self) -> MutexGuard<'_, Elements> {
        lock(&self.elements)
    }

    /// Raises an event of the provider's own.
    pub(crate) fn raise(&self, kind: EventType, element: u32) {
        lock(&self.sources).local.push_back(AsyncEvent { kind: kind.value(), element });
        let _ = rustix::io::write(self.counter.as_fd(), &1_u64.to_ne_bytes());
    }

    /// The next event whose element still lives.
    pub(crate) fn next(&self) -> Option<AsyncEventDesc> {
        let event = {
            let mut sources = lock(&self.sources);
            sources.router.pop().or_else(|| sources.local.pop_front())?
        };
        let mut elements = self.elements();
        let element = match EventType::try_from(event.kind).ok()? {
            EventType::CqErr => {
                let cq = elements.cqs.get(&event.element)?;
                cq.async_delivered.fetch_add(1, Ordering::SeqCst);
                cq.address
            }
            EventType::SrqErr | EventType::SrqLimitReached => {
                let srq = elements.srqs.get(&event.element)?;
                srq.async_delivered.fetch_add(1, Ordering::SeqCst);
                srq.address()
            }
            kind if is_of_qp(kind) => {
                let qp = elements.next_qp(event.element)?;
                qp.async_delivered.fetch_add(1, Ordering::SeqCst);
                qp.address()
            }
            _ => u64::from(event.element),
        };
        Some(AsyncEventDesc { element, event_type: event.kind, reserved: 0 })
    }
}

fn is_of_qp(kind: EventType) -> bool {
    matches!(
        kind,
        EventType::QpFatal
            | EventType::QpReqErr
            | EventType::QpAccessErr
            | EventType::CommEst
            | EventType::SqDrained
            | EventType::PathMig
            | EventType::PathMigErr
            | EventType::QpLastWqeReached
    )
}

/// Waits until the application has acknowledged every event of an object that is about to go, as the man pages of
/// `ibv_destroy_cq` and `ibv_destroy_qp` say.
///
/// # Safety
/// `mutex` and `cond` must be the object's, initialised, and signalled when the counts that `is_done` reads change.
pub(crate) unsafe fn wait_for_acks(
    mutex: *mut pthread_mutex_t,
    cond: *mut pthread_cond_t,
    is_done: impl Fn() -> bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        libc::pthread_mutex_lock(mutex);
        while !is_done() {
            libc::pthread_cond_wait(cond, mutex);
        }
        libc::pthread_mutex_unlock(mutex);
    }
}

/// Initialises the lock and the condition of an object that C sees.
///
/// # Safety
/// Both must be writable and not in use.
pub(crate) unsafe fn init_sync(mutex: *mut pthread_mutex_t, cond: *mut pthread_cond_t) {
    // SAFETY: the caller's promise; null attributes mean the defaults.
    unsafe {
        libc::pthread_mutex_init(mutex, ptr::null::<c_void>().cast());
        libc::pthread_cond_init(cond, ptr::null::<c_void>().cast());
    }
}
