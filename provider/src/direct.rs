//! The application's own seat: executing a QP's send queue in its own thread, against a peer of the same tenant.
//!
//! The router pairs the QPs at RTR and hands over the peer's arena and region. From then on the thread that posts
//! runs the engine itself, as long as the seat token is the owner's; what cannot complete now (no receive posted, a
//! peer that is not ready, memory that was not moved) goes to the router with the token.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use engine::{Attempt, CompletionQueue, Completions, Fault, Fetch, Memory, Requester, Responder, Verdict};
use verbs_abi::proto::DirectPeer;
use verbs_abi::shm::cq::CqArea;
use verbs_abi::shm::cqe::CompletionWriter;
use verbs_abi::shm::mr_table::{MrEntry, MrTable, WINDOW};
use verbs_abi::shm::queue::QueueArea;
use verbs_abi::shm::{Window, arena};
use verbs_abi::verbs::{AccessFlags, QpState, QpType};

use crate::context::Context;
use crate::lock::{Guard, Lock};
use crate::log::{self, Level};
use crate::qp::Qp;

/// A QP's direct connection, if it has one.
#[derive(Debug)]
pub(crate) struct Direct(Lock<Option<Box<Seat>>>);

impl Default for Direct {
    fn default() -> Direct {
        Direct(Lock::new(None))
    }
}

impl Direct {
    /// Executes what was posted. False: the router has to, and must be rung.
    #[inline]
    pub(crate) fn run(&self, qp: &Qp) -> bool {
        match &mut *self.0.lock() {
            Some(seat) => seat.run(qp),
            None => false,
        }
    }

    /// Keeps this process from executing while the router changes the QP.
    pub(crate) fn pause(&self) -> Paused<'_> {
        Paused(self.0.lock())
    }

    /// The same where no thread executes just now.
    pub(crate) fn try_pause(&self) -> Option<Paused<'_>> {
        self.0.try_lock().map(Paused)
    }
}

/// A QP that its owner does not execute now.
pub(crate) struct Paused<'a>(Guard<'a, Option<Box<Seat>>>);

impl Paused<'_> {
    /// Ends the direct connection.
    pub(crate) fn disconnect(&mut self) {
        *self.0 = None;
    }

    /// Connects the QP directly with its peer, as the router offers. A failure leaves the router to execute.
    pub(crate) fn connect(
        &mut self,
        device: &Context,
        qp: &Qp,
        pd: u32,
        peer: &DirectPeer,
        fds: Vec<OwnedFd>,
    ) {
        match Seat::new(device, qp, pd, peer, fds) {
            Ok(seat) => *self.0 = Some(Box::new(seat)),
            Err(error) => {
                log::say(Level::Warn, format_args!("QP {:#x} stays isolated: {error}", qp.number()));
            }
        }
    }
}

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
    windows: Mutex<HashMap<u32, (MrEntry, Window)>>,
}

impl Peer {
    /// The shared sub-range of an MR, mapped at the first use.
    fn window(&self, mr: &MrEntry) -> Option<Window> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, window)) = windows.get(&mr.key)
            && known == mr
        {
            return Some(window.clone());
        }
        // Regions that are gone need no address space.
        windows.retain(|key, (entry, _)| self.table.lookup(*key).as_ref() == Some(entry));
        let len = usize::try_from(mr.shared_end.checked_sub(mr.shared_start)?).ok()?;
        let window = Window::map(&self.region, mr.shared_start, len, true).ok()?;
        windows.insert(mr.key, (*mr, window.clone()));
        Some(window)
    }
}

/// Either side's memory, as this process reaches it.
#[derive(Debug)]
enum Reach {
    /// Our own: all of it, by address.
    Own(MrTable),
    /// A peer's: what was moved. The region used last is at hand.
    Peer { peer: Arc<Peer>, last: Mutex<Option<(MrEntry, Window)>> },
}

impl Reach {
    fn window(&self, mr: &MrEntry) -> Option<NonNull<u8>> {
        let Reach::Peer { peer, last } = self else { return None };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|(known, _)| known != mr) {
            *last = Some((*mr, peer.window(mr)?));
        }
        last.as_ref().and_then(|(_, window)| NonNull::new(window.as_ptr()))
    }
}

impl Memory for Reach {
    #[inline]
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        match self {
            Reach::Own(table) => {
                let mr = table.lookup(key).filter(|mr| mr.access & WINDOW == 0)?;
                Some(MrEntry { shared_start: mr.addr, shared_end: mr.addr.wrapping_add(mr.len), ..mr })
            }
            Reach::Peer { peer, .. } => peer.table.lookup(key),
        }
    }

    #[inline]
    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        match self {
            // Pages that are found on demand may not be there: no fault of the application's own thread.
            Reach::Own(_) if is_on_demand(mr) => None,
            Reach::Own(_) => NonNull::new(addr as *mut u8),
            Reach::Peer { .. } => {
                let offset = usize::try_from(addr.checked_sub(mr.shared_start)?).ok()?;
                let inside = offset.checked_add(len)? as u64 <= mr.shared_end.checked_sub(mr.shared_start)?;
                let base = self.window(mr).filter(|_| inside)?;
                NonNull::new(base.as_ptr().wrapping_add(offset))
            }
        }
    }

    #[inline]
    fn reaches(&self, mr: &MrEntry, addr: u64, len: u64) -> bool {
        match self {
            Reach::Own(_) => !is_on_demand(mr),
            Reach::Peer { .. } => {
                let end = addr.checked_add(len);
                let inside = addr >= mr.shared_start && end.is_some_and(|end| end <= mr.shared_end);
                inside && self.window(mr).is_some()
            }
        }
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Fault> {
        Err(Fault)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault)
    }
}

#[inline]
fn is_on_demand(mr: &MrEntry) -> bool {
    mr.access & AccessFlags::ON_DEMAND.bits() != 0
}

/// What the owner needs to execute.
#[derive(Debug)]
struct Seat {
    requester: Requester,
    responder: Responder,
    own: Reach,
    peer: Reach,
}

impl Seat {
    fn new(device: &Context, qp: &Qp, pd: u32, to: &DirectPeer, fds: Vec<OwnedFd>) -> std::io::Result<Seat> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        let mut fds = fds.into_iter();
        let (arena, region, bell) =
            (fds.next().ok_or_else(invalid)?, fds.next().ok_or_else(invalid)?, fds.next());
        let peer = device.peers.find(to.client, &arena, region)?;

        let sends = qp.own_sends();
        let requester = Requester::new(qp.number(), QpType::Rc, pd, qp.area.clone(), sends).in_owners_seat();

        let area = QueueArea::new(&peer.arena, to.offset, to.geometry).ok_or_else(invalid)?;
        let cq = CqArea::new(&peer.arena, to.cq_offset).ok_or_else(invalid)?;
        let bell = bell.map(|fd| Arc::new(PeerBell(fd)) as Arc<dyn engine::Bell>);
        let queue = Arc::new(CompletionQueue::new(cq, bell));
        let receives = Completions::new(CompletionWriter::new(area.rq_cqes.clone(), 0), queue, to.recv_slot);
        let responder = Responder::new(QpType::Rc, to.pd, area, receives);

        let own = MrTable::new(&device.arena).ok_or_else(invalid)?;
        let peer = Reach::Peer { peer, last: Mutex::default() };
        Ok(Seat { requester, responder, own: Reach::Own(own), peer })
    }

    /// Executes what is posted, as far as it goes. False: the router holds the seat and must be rung.
    #[inline]
    fn run(&mut self, qp: &Qp) -> bool {
        let header = &qp.area.header;
        let token = header.seat();
        if !token.enter() {
            return false;
        }
        if !self.requester.resume() {
            token.park();
            return false;
        }
        while self.requester.fetch() == Fetch::Ready {
            let ready = header.state().load(Ordering::Acquire) == QpState::Rts.value();
            if !ready || !self.attempt() {
                token.park();
                return false;
            }
        }
        token.leave();
        true
    }

    /// Executes one work request. False: the router goes on from here.
    #[inline]
    fn attempt(&mut self) -> bool {
        self.responder.refresh();
        let mut budget = u64::MAX;
        let peer = Some((&mut self.responder, &self.peer));
        match self.requester.attempt(&self.own, peer, 0, &mut budget) {
            Attempt::Done => true,
            Attempt::Failed { peer_failed, peer_event } => {
                self.requester.leave_verdict(Verdict { peer_failed, peer_event });
                false
            }
            Attempt::Unfinished | Attempt::Wait(_) => false,
        }
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
