//! The application's own seat: executing a QP's send queue in its own thread, against a peer of the same tenant.
//!
//! The router pairs the QPs at RTR and hands over the peer's arena and region. From then on the thread that posts
//! runs the engine itself, as long as the seat token is the owner's; what cannot complete now (no receive posted, a
//! peer that is not ready, memory that was not moved) goes to the router with the token.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use engine::{Attempt, CompletionQueue, Completions, Fetch, KeyedRange, Memory, Requester, Responder};
use verbs_abi::proto::DirectPeer;
use verbs_abi::shm::cq::CqArea;
use verbs_abi::shm::cqe::CompletionWriter;
use verbs_abi::shm::mr_table::{MrEntry, MrTable, WINDOW, index_of};
use verbs_abi::shm::queue::QueueArea;
use verbs_abi::shm::wqe::SendWqe;
use verbs_abi::shm::{Window, arena, barrier};
use verbs_abi::verbs::{AccessFlags, QpState};

use crate::context::Context;
use crate::memory::View;
use crate::qp::Qp;

/// Bytes of a message that its owner moves in one go. A longer one is the router's from there on, so that
/// posting takes no longer than that.
const SLICE: u64 = 1 << 20;

/// The peers of an opened device, by client.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<HashMap<u32, Weak<Peer>>>);

impl Peers {
    /// The peer client, mapped once however many QPs are connected with it.
    fn find(&self, client: u32, arena: &OwnedFd, region: OwnedFd) -> std::io::Result<Arc<Peer>> {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = peers.get(&client).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let arena = Window::map(arena, 0, arena::ARENA_LEN, true)?;
        let table = MrTable::new(&arena).ok_or(std::io::ErrorKind::InvalidData)?;
        let peer = Arc::new(Peer { arena, table, region, windows: Mutex::default() });
        peers.retain(|_, peer| peer.strong_count() > 0);
        peers.insert(client, Arc::downgrade(&peer));
        Ok(peer)
    }
}

/// Another client's shared memory.
#[derive(Debug)]
struct Peer {
    arena: Window,
    table: MrTable,
    region: OwnedFd,
    /// Shared sub-ranges that are mapped here, by key.
    windows: Mutex<HashMap<u32, (MrEntry, Arc<View>)>>,
}

impl Peer {
    /// The shared sub-range of an MR, mapped at the first use.
    fn window(&self, mr: &MrEntry) -> Option<Arc<View>> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, window)) = windows.get(&mr.key)
            && known == mr
        {
            return Some(Arc::clone(window));
        }
        // Regions that are gone need no address space.
        windows.retain(|key, (entry, _)| self.table.lookup(*key).as_ref() == Some(entry));
        let len = usize::try_from(mr.shared_end.checked_sub(mr.shared_start)?).ok()?;
        let window = Arc::new(View::map(&self.region, mr.shared_start, len).ok()?);
        windows.insert(mr.key, (*mr, Arc::clone(&window)));
        Some(window)
    }
}

/// Either side's memory, as this process reaches it.
#[derive(Debug)]
struct Reach {
    table: MrTable,
    /// The peer whose memory it is, of which what was moved is reached. Our own is reached by address.
    peer: Option<Arc<Peer>>,
    /// Keys used lately, each at the place that its index names.
    known: [Cell<Known>; KNOWN],
    /// What keeps the peer's ranges mapped that they name.
    views: RefCell<[Option<Arc<View>>; KNOWN]>,
}

/// Keys that are remembered.
const KNOWN: usize = 8;

/// What a key has given access to: true as long as the table's entry has this stamp.
#[derive(Debug, Default, Clone, Copy)]
struct Known {
    key: u32,
    stamp: u64,
    pd: u32,
    access: u32,
    /// What of the MR is mapped in one piece, as the key's users name it.
    iova: u64,
    len: u64,
    /// Where that begins in this process.
    base: usize,
}

impl Known {
    /// Where a range is, if the key allows it.
    #[inline(always)]
    fn find(&self, range: &KeyedRange) -> Option<NonNull<u8>> {
        let offset = range.iova.wrapping_sub(self.iova);
        let need = range.need.bits();
        // An address below the first one has an offset beyond every length.
        let inside = offset <= self.len && range.len <= self.len - offset;
        if !inside || self.pd != range.pd || self.access & need != need {
            return None;
        }
        NonNull::new((self.base + offset as usize) as *mut u8)
    }
}

impl Reach {
    fn new(table: MrTable, peer: Option<Arc<Peer>>) -> Reach {
        Reach { table, peer, known: Default::default(), views: RefCell::default() }
    }

    /// Learns what a key that is valid now stands for, as far as it is mapped in one piece.
    #[cold]
    fn learn(&self, key: u32) -> Option<Known> {
        // Before the entry: one that changes meanwhile has another stamp.
        let stamp = self.table.stamp(key);
        let mr = self.lookup(key)?;
        let (start, end) = (mr.shared_start.max(mr.addr), mr.shared_end.min(mr.addr.checked_add(mr.len)?));
        let len = end.checked_sub(start).filter(|&len| len > 0)?;
        let base = self.mapped(&mr, start, usize::try_from(len).ok()?)?.addr().get();
        let iova = mr.iova.checked_add(start - mr.addr)?;
        let known = Known { key, stamp, pd: mr.pd, access: mr.access, iova, len, base };
        self.known[slot(key)].set(known);
        Some(known)
    }

    /// Where a peer's MR is mapped here: its shared sub-range, mapped at the first use.
    #[cold]
    fn view(&self, peer: &Peer, mr: &MrEntry) -> Option<*mut u8> {
        let view = peer.window(mr)?;
        let base = view.as_ptr();
        let place = slot(mr.key);
        // What it replaces may be what the key there was known by.
        self.known[place].set(Known::default());
        self.views.borrow_mut()[place] = Some(view);
        Some(base)
    }
}

/// Where a key is remembered.
#[inline]
fn slot(key: u32) -> usize {
    index_of(key) as usize % KNOWN
}

impl Memory for Reach {
    #[inline]
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        let mr = self.table.lookup(key)?;
        if self.peer.is_some() {
            return Some(mr);
        }
        let own = MrEntry { shared_start: mr.addr, shared_end: mr.addr.wrapping_add(mr.len), ..mr };
        (mr.access & WINDOW == 0).then_some(own)
    }

    #[inline(always)]
    fn locate(&self, range: &KeyedRange) -> Option<NonNull<u8>> {
        let known = self.known[slot(range.key)].get();
        // Of no key there is nothing to be found.
        if known.key == range.key && known.stamp == self.table.stamp(range.key) {
            return known.find(range);
        }
        self.learn(range.key)?.find(range)
    }

    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        let Some(peer) = &self.peer else {
            // Pages that are found on demand may not be there: no fault of the application's own thread.
            return if is_on_demand(mr) { None } else { NonNull::new(addr as *mut u8) };
        };
        if mr.access & WINDOW != 0 {
            return None;
        }
        let offset = usize::try_from(addr.checked_sub(mr.shared_start)?).ok()?;
        let inside = offset.checked_add(len)? as u64 <= mr.shared_end.checked_sub(mr.shared_start)?;
        let base = self.view(peer, mr).filter(|_| inside)?;
        NonNull::new(base.wrapping_add(offset))
    }

    fn reaches(&self, mr: &MrEntry, addr: u64, len: u64) -> bool {
        let Some(peer) = &self.peer else { return !is_on_demand(mr) };
        let end = addr.checked_add(len);
        let inside = addr >= mr.shared_start && end.is_some_and(|end| end <= mr.shared_end);
        inside && self.view(peer, mr).is_some()
    }
}

#[inline]
fn is_on_demand(mr: &MrEntry) -> bool {
    mr.access & AccessFlags::ON_DEMAND.bits() != 0
}

/// What the owner needs to execute. It belongs to the send queue, and to whoever holds that queue's lock.
#[derive(Debug)]
pub(crate) struct Seat {
    requester: Requester,
    responder: Responder,
    own: Reach,
    peer: Reach,
    /// The term in which this process executed last.
    term: Option<u32>,
    /// Whether the router pays for the fences around the seat.
    is_light: bool,
}

/// What became of a work request that the owner tried to execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tried {
    /// It completed.
    Done,
    /// It completed with an error; the router has to act on that.
    Failed,
    /// The router has to execute it.
    NotNow,
}

impl Seat {
    /// Connects the QP directly with its peer, as the router offers.
    ///
    /// # Errors
    /// What was offered cannot be mapped; the router executes then.
    pub(crate) fn new(
        device: &Context,
        qp: &Qp,
        pd: u32,
        to: &DirectPeer,
        fds: Vec<OwnedFd>,
    ) -> std::io::Result<Seat> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        let mut fds = fds.into_iter();
        let (arena, region, bell) =
            (fds.next().ok_or_else(invalid)?, fds.next().ok_or_else(invalid)?, fds.next());
        let peer = device.peers.find(to.client, &arena, region)?;

        let sends = qp.own_sends().ok_or_else(invalid)?;
        let qp_type = qp.limits.qp_type;
        let requester = Requester::new(qp.number(), qp_type, pd, qp.area.clone(), sends).in_owners_seat();

        let area = QueueArea::new(&peer.arena, to.offset, to.geometry).ok_or_else(invalid)?;
        let cq = CqArea::new(&peer.arena, to.cq_offset).ok_or_else(invalid)?;
        let bell = bell.map(|fd| Arc::new(PeerBell(fd)) as Arc<dyn engine::Bell>);
        let queue = CompletionQueue::new(cq, bell).with_alarm(qp.alarm());
        let queue = Arc::new(queue.with_light_fences(barrier::is_registered()));
        let receives = Completions::new(CompletionWriter::new(area.rq_cqes.clone(), 0), queue, to.recv_slot);
        let responder = Responder::new(qp_type, to.pd, area, receives);

        let own = MrTable::new(&device.arena).ok_or_else(invalid)?;
        let own = Reach::new(own, None);
        let peer = Reach::new(peer.table.clone(), Some(peer));
        Ok(Seat { requester, responder, own, peer, term: None, is_light: device.has_light_fences })
    }

    /// Begins to execute, if the seat is the owner's, with what the queue holds up to block `tail`. False: the router
    /// holds the seat.
    #[inline]
    pub(crate) fn enter(&mut self, qp: &Qp, tail: u64) -> bool {
        let token = qp.area.header.seat();
        if !token.enter(self.is_light) {
            return false;
        }
        let term = Some(token.term());
        if self.term != term {
            self.term = term;
            self.requester.resume();
            self.responder.resume();
        }
        if self.requester.is_at(tail) || self.drain(qp, tail) {
            return true;
        }
        self.park(qp);
        false
    }

    /// Executes what the queue holds. False: the router goes on from here.
    fn drain(&mut self, qp: &Qp, tail: u64) -> bool {
        loop {
            if self.is_ready(qp) {
                let peer = (&mut self.responder, &self.peer);
                if self.requester.execute_next(tail, &self.own, peer, SLICE) {
                    continue;
                }
            }
            match self.requester.fetch() {
                Fetch::Empty => return true,
                Fetch::Ready if self.attempt(qp) == Attempt::Done => {}
                _ => return false,
            }
        }
    }

    /// Executes a work request that is not in the queue.
    #[inline]
    pub(crate) fn execute(&mut self, qp: &Qp, wqe: &mut Box<SendWqe>) -> Tried {
        if let Some(single) = wqe.single()
            && self.is_ready(qp)
            && self.requester.execute_single(&single, &self.own, (&mut self.responder, &self.peer), SLICE)
        {
            return Tried::Done;
        }
        self.execute_offered(qp, wqe)
    }

    /// The same, in the general way.
    #[cold]
    fn execute_offered(&mut self, qp: &Qp, wqe: &mut Box<SendWqe>) -> Tried {
        self.requester.offer(wqe);
        match self.attempt(qp) {
            Attempt::Done => Tried::Done,
            Attempt::Failed { .. } => Tried::Failed,
            Attempt::Unfinished | Attempt::Wait(_) | Attempt::Foreign(_) => {
                self.requester.withdraw(wqe);
                Tried::NotNow
            }
        }
    }

    /// Whether the QP sends; learns what its peer answers now.
    #[inline(always)]
    fn is_ready(&mut self, qp: &Qp) -> bool {
        self.responder.refresh();
        qp.state() == QpState::Rts.value()
    }

    /// Executes the work request at hand.
    fn attempt(&mut self, qp: &Qp) -> Attempt {
        if !self.is_ready(qp) {
            return Attempt::Wait(None);
        }
        let mut budget = SLICE;
        let peer = Some((&mut self.responder, &self.peer));
        self.requester.attempt(&self.own, peer, 0, &mut budget)
    }

    /// Stops executing and keeps the seat, unless the router wants it. True: the router must be rung.
    #[inline]
    pub(crate) fn leave(&mut self, qp: &Qp) -> bool {
        let header = &qp.area.header;
        if header.seat().is_wanted() || header.hands_over().load(Ordering::Relaxed) != 0 {
            self.park(qp);
            return true;
        }
        self.requester.save();
        qp.area.header.seat().leave();
        false
    }

    /// Stops executing and hands the seat to the router, which must be rung.
    pub(crate) fn park(&mut self, qp: &Qp) {
        qp.area.header.hands_over().store(0, Ordering::Relaxed);
        self.requester.save();
        qp.area.header.seat().park();
    }
}

/// The eventfd of a peer's completion channel.
#[derive(Debug)]
struct PeerBell(OwnedFd);

impl engine::Bell for PeerBell {
    fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}
