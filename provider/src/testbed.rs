//! A device without a router, for tests of the data path, which play the router's part on the same memory.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use verbs_abi::ffi::{self, ibv_qp, ibv_qp_init_attr};
use verbs_abi::proto::{NewQp, NewSrq};
use verbs_abi::shm::cq::{CQ_LEN, CqArea};
use verbs_abi::shm::cqe::{CompletionWriter, Cqe};
use verbs_abi::shm::doorbell::Doorbells;
use verbs_abi::shm::lane::{LanePage, WakeWord};
use verbs_abi::shm::queue::Geometry;
use verbs_abi::shm::srq::SrqGeometry;
use verbs_abi::shm::{PAGE, Window, arena};
use verbs_abi::verbs::QpState;

use crate::bell::Bell;
use crate::cq::Cq;
use crate::event::CqEvents;
use crate::health::Health;
use crate::poll::Side;
use crate::qp::{Qp, QpObject};
use crate::qp_create::{self, Parts};
use crate::srq::{self, Srq};

/// A device.
pub(crate) struct Bed {
    arena: Window,
    heap: Cell<u64>,
    slots: Cell<u32>,
    bell: Arc<Bell>,
    pub(crate) health: Arc<Health>,
}

impl Bed {
    pub(crate) fn new() -> Bed {
        let arena = Window::heap(8 << 20);
        let health = Arc::new(Health::new().unwrap());
        let lane = LanePage::new(Window::heap(PAGE));
        let words = WakeWord::all(&Window::heap(PAGE)).unwrap();
        let doorbells = Doorbells::new(&arena).unwrap();
        let bell = Arc::new(Bell::new(doorbells, lane, words, 64, Arc::clone(&health)));
        Bed { arena, heap: Cell::new(arena::MR_TABLE), slots: Cell::new(0), bell, health }
    }

    fn allocate(&self, len: usize) -> u64 {
        self.heap.replace(self.heap.get() + len as u64)
    }

    pub(crate) fn cq(&self) -> Arc<Cq> {
        let area = CqArea::new(&self.arena, self.allocate(CQ_LEN)).unwrap();
        let (delivered, async_delivered) = (AtomicU32::new(0), AtomicU32::new(0));
        let events = Arc::new(CqEvents { area, address: 0, delivered, async_delivered });
        Arc::new(Cq::new(1, events, &self.bell, None))
    }

    /// An SRQ of so many receives.
    pub(crate) fn srq(&self, receives: u32) -> Arc<Srq> {
        let geometry = SrqGeometry::new(receives, 1).unwrap();
        let slot = self.slots.replace(self.slots.get() + 1);
        let offset = self.allocate(geometry.len());
        let given = NewSrq { number: 7, slot, offset, geometry, ring_offset: 0, ring_slot: 0 };
        let attr = ffi::ibv_srq_attr { max_wr: receives, max_sge: 1, srq_limit: 0 };
        srq::build(&self.arena, &self.bell, 0, &given, attr, None).unwrap()
    }

    /// A QP in RTS whose queues hold `depth` work requests each.
    pub(crate) fn qp(&self, cq: &Arc<Cq>, qp_type: u32, depth: u32) -> TestQp {
        self.qp_with(cq, qp_type, depth, None)
    }

    /// The same, which may take its receives from an SRQ.
    pub(crate) fn qp_with(&self, cq: &Arc<Cq>, qp_type: u32, depth: u32, srq: Option<&Arc<Srq>>) -> TestQp {
        // SAFETY: integers and pointers, for which zero is a value.
        let mut attr: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.qp_type = qp_type;
        attr.cap = ffi::ibv_qp_cap {
            max_send_wr: depth,
            max_recv_wr: depth,
            max_send_sge: 4,
            max_recv_sge: 4,
            max_inline_data: 64,
        };
        let limits = qp_create::limits(&attr).unwrap();
        let geometry = Geometry::new(depth, depth, 4, 4, 64).unwrap();
        let slot = self.slots.replace(self.slots.get() + 1);
        let (send_slot, recv_slot) = (slot * 2, slot * 2 + 1);
        let offset = self.allocate(geometry.len());
        let given = NewQp { qpn: 100 + slot, slot, offset, geometry, send_slot, recv_slot };
        let parts = Parts { send_cq: Some(Arc::clone(cq)), recv_cq: Some(Arc::clone(cq)), srq: srq.cloned() };
        let qp = qp_create::build(&self.arena, &self.bell, 0, &given, limits, parts).unwrap();
        qp.area.header.state().store(QpState::Rts.value(), Ordering::Relaxed);
        TestQp {
            object: Box::new(QpObject::new(&qp)),
            send: Cell::new(0),
            recv: Cell::new(0),
            slots: [send_slot, recv_slot],
            cq: Arc::clone(cq),
            qp,
        }
    }
}

/// A QP with the router's end of its completion rings.
pub(crate) struct TestQp {
    object: Box<QpObject>,
    send: Cell<u64>,
    recv: Cell<u64>,
    slots: [u32; 2],
    cq: Arc<Cq>,
    pub(crate) qp: Arc<Qp>,
}

impl TestQp {
    /// The QP as C names it.
    pub(crate) fn c(&self) -> *mut ibv_qp {
        (&raw const *self.object).cast_mut().cast()
    }

    /// Completes WQE `wqe` as the router does.
    pub(crate) fn complete(&self, side: Side, wqe: u32, wr_id: u64) {
        self.complete_as(side, wqe, wr_id, 0);
    }

    /// The same with a status.
    pub(crate) fn complete_as(&self, side: Side, wqe: u32, wr_id: u64, status: u8) {
        let (ring, tail, slot) = match side {
            Side::Send => (&self.qp.area.sq_cqes, &self.send, self.slots[0]),
            Side::Recv => (&self.qp.area.rq_cqes, &self.recv, self.slots[1]),
        };
        let mut writer = CompletionWriter::new(ring.clone(), tail.get());
        writer.push(&Cqe { wr_id, wqe, status, ..Cqe::default() });
        tail.set(writer.tail());
        let _ = self.cq.events.area.publish(slot, false);
    }
}

/// Takes up to `limit` completions: QP number, id, status.
pub(crate) fn poll(cq: &Cq, limit: usize) -> Vec<(u32, u64, u8)> {
    let mut taken = Vec::new();
    let mut rings = cq.rings.lock();
    cq.take(&mut rings, limit, &mut |number, cqe| taken.push((number, cqe.wr_id, cqe.status)));
    taken
}
