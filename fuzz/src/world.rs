//! A host without threads, clock or sockets: clients of a [`Fabric`], with arenas and memory in this process.

use std::sync::{Arc, atomic::Ordering};

use engine::{Access, Bell, ClientInit, Fabric, Modified, QpInit};
use verbs_abi::{
    proto::{AhAttr, CreateQp, DirectPeer, Gid, Mode, NewQp, QpAttr, QpCap},
    qp_state,
    shm::{
        PAGE, Window,
        cq::{CQ_LEN, CqArea},
        cqe::CompletionReader,
        doorbell::Doorbells,
        events::EventWriter,
        queue::{Geometry, QueueArea},
        wqe::{RecvWqe, SendWqe},
    },
    verbs::{QpAttrMask as A, QpState, QpType},
};

use crate::{
    copies::Copies,
    memory::{Guarded, PD, canary},
};

/// Where a client's CQ lies.
const CQ_AT: usize = 4 * PAGE;
/// Where its QPs begin.
const QPS_AT: usize = CQ_AT + CQ_LEN;
/// WRs of each queue.
pub(crate) const DEPTH: u32 = 8;
/// SGEs of each WR.
pub(crate) const SGES: u32 = 5;
/// Inline bytes of each WR.
pub(crate) const INLINE: u32 = 80;

/// A bell that nobody hears.
#[derive(Debug)]
struct Silent;

impl Bell for Silent {
    fn ring(&self) {}
}

/// A client with one CQ.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: u32,
    pub(crate) arena: Window,
    pub(crate) doorbells: Doorbells,
    cq_id: u32,
    pub(crate) memory: Guarded,
    pub(crate) bytes: Window,
    pub(crate) qps: Vec<Qp>,
}

/// One of its QPs.
#[derive(Debug)]
pub(crate) struct Qp {
    pub(crate) new: NewQp,
    pub(crate) qp_type: QpType,
    pub(crate) area: QueueArea,
    pub(crate) sends: CompletionReader,
    pub(crate) receives: CompletionReader,
}

pub(crate) fn geometry() -> Geometry {
    Geometry::new(DEPTH, DEPTH, SGES, SGES, INLINE).unwrap()
}

/// The address of a client.
pub(crate) fn gid(client: u32) -> Gid {
    std::array::from_fn(|i| if i == 15 { client as u8 } else { 0xfd })
}

impl Client {
    /// Opens a client with a QP of each type given, all in RESET.
    pub(crate) fn open(fabric: &mut Fabric<Guarded>, id: u32, mode: Mode, types: &[QpType]) -> Self {
        let arena = Window::heap(QPS_AT + types.len() * geometry().len());
        let memory = Guarded::new(id);
        let (bytes, doorbells) = (memory.bytes(), Doorbells::new(&arena).unwrap());
        let init = ClientInit {
            tenant: 0,
            mode,
            doorbells: doorbells.clone(),
            events: EventWriter::new(&arena).unwrap(),
            event_bell: Arc::new(Silent),
            memory: memory.clone(),
            gids: vec![gid(id)],
        };
        fabric.open(id, init);
        let cq = CqArea::new(&arena, CQ_AT as u64).unwrap();
        let cq_id = fabric.create_cq(id, cq, CQ_AT as u64, Some(Arc::new(Silent))).unwrap();
        let mut client = Self { id, arena, doorbells, cq_id, memory, bytes, qps: Vec::new() };
        for (i, qp_type) in types.iter().enumerate() {
            let qp = client.create(fabric, (QPS_AT + i * geometry().len()) as u64, *qp_type);
            client.qps.push(qp);
        }
        client
    }

    fn create(&self, fabric: &mut Fabric<Guarded>, offset: u64, qp_type: QpType) -> Qp {
        let geometry = geometry();
        let area = QueueArea::new(&self.arena, offset, geometry).unwrap();
        let cap = QpCap {
            max_send_wr: DEPTH,
            max_recv_wr: DEPTH,
            max_send_sge: SGES,
            max_recv_sge: SGES,
            max_inline_data: INLINE,
        };
        let (send_cq, recv_cq) = (self.cq_id, self.cq_id);
        let create = CreateQp {
            pd: PD,
            send_cq,
            recv_cq,
            qp_type: qp_type.value(),
            cap,
            sq_sig_all: false,
            ..CreateQp::default()
        };
        let init = QpInit { create, geometry, area: area.clone(), offset };
        let new = fabric.create_qp(self.id, init).unwrap();
        let sends = CompletionReader::new(area.sq_cqes.clone(), 0);
        let receives = CompletionReader::new(area.rq_cqes.clone(), 0);
        Qp { new, qp_type, area, sends, receives }
    }

    /// Its CQ, as a seat sees it.
    pub(crate) fn cq(&self) -> CqArea {
        CqArea::new(&self.arena, CQ_AT as u64).unwrap()
    }

    /// Moves a QP to a state, with a peer that it has from RTR on. `None`: refused.
    pub(crate) fn modify(
        &self,
        fabric: &mut Fabric<Guarded>,
        qp: usize,
        to: QpState,
        peer: (u32, u32),
    ) -> Option<Modified> {
        let (qpn, qp_type) = (self.qps[qp].new.qpn, self.qps[qp].qp_type);
        let now = fabric.query_qp(self.id, qpn).ok()?;
        let from = QpState::try_from(now.qp_state).unwrap();
        let rule = qp_state::rule(qp_type, from, to)?;
        let mask = rule.required.union(A::STATE).bits();
        fabric.modify_qp(self.id, qpn, mask, &attributes(to, peer)).ok()
    }

    /// Brings a QP from RESET to RTS. A direct peer that the router offers.
    pub(crate) fn connect(
        &self,
        fabric: &mut Fabric<Guarded>,
        qp: usize,
        peer: (u32, u32),
    ) -> Option<DirectPeer> {
        let states = [QpState::Init, QpState::Rtr, QpState::Rts];
        let modified = states.map(|state| self.modify(fabric, qp, state, peer));
        modified.map(|modified| modified.expect("a QP can be connected"))[1].direct.map(|(peer, _)| peer)
    }

    pub(crate) fn state(&self, fabric: &mut Fabric<Guarded>, qp: usize) -> QpState {
        let attr = fabric.query_qp(self.id, self.qps[qp].new.qpn).unwrap();
        QpState::try_from(attr.qp_state).unwrap()
    }

    /// Whether a word of its memory is what it was at first.
    pub(crate) fn is_untouched(&self, at: u64) -> bool {
        self.bytes.u64(at as usize).load(Ordering::Relaxed) == canary(self.id, at)
    }
}

impl Qp {
    /// Begins anew after a RESET.
    pub(crate) fn restart(&mut self) {
        self.sends = CompletionReader::new(self.area.sq_cqes.clone(), 0);
        self.receives = CompletionReader::new(self.area.rq_cqes.clone(), 0);
    }

    /// Posts a send, as a provider that never posts too much.
    pub(crate) fn post(&self, wqe: &SendWqe) {
        let tail = self.area.header.sq_tail().load(Ordering::Relaxed);
        let blocks = wqe.encode(|i, block| self.area.write_sq_block(tail.wrapping_add(i), block));
        self.area.header.sq_tail().store(tail.wrapping_add(blocks), Ordering::Release);
    }

    /// Posts a receive. True: the router wants to be rung.
    pub(crate) fn post_recv(&self, wr_id: u64, sges: &[verbs_abi::shm::wqe::Sge]) -> bool {
        let tail = self.area.header.rq_tail().load(Ordering::Relaxed);
        RecvWqe::encode(wr_id, sges, |part, block| self.area.write_rq_block(tail, part, block));
        self.area.header.rq_tail().store(tail.wrapping_add(1), Ordering::SeqCst);
        self.area.header.rq_ring_me().load(Ordering::SeqCst) != 0
    }
}

/// Attributes with which every transition is possible.
fn attributes(to: QpState, peer: (u32, u32)) -> QpAttr {
    QpAttr {
        qp_state: to.value(),
        path_mtu: 5,
        port_num: 1,
        qkey: 0x11,
        dest_qp_num: peer.1,
        qp_access_flags: 0xe,
        ah_attr: AhAttr { dgid: gid(peer.0), is_global: 1, port_num: 1, ..AhAttr::default() },
        timeout: 10,
        retry_cnt: 2,
        rnr_retry: 2,
        min_rnr_timer: 1,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        ..QpAttr::default()
    }
}

/// Accesses to foreign memory that were given out and not yet performed.
#[derive(Debug, Default)]
pub(crate) struct Accesses(Vec<Access>);

impl Accesses {
    /// Takes what the fabric gives out.
    pub(crate) fn take(&mut self, fabric: &mut Fabric<Guarded>) {
        self.0.extend(std::iter::from_fn(|| fabric.next_access()));
    }

    /// Performs all of them. True: there were some.
    pub(crate) fn perform(&mut self, fabric: &mut Fabric<Guarded>) -> bool {
        self.take(fabric);
        let any = !self.0.is_empty();
        for mut access in self.0.drain(..) {
            if let Some(memory) = fabric.memory_mut(access.client()) {
                access.perform(memory);
            }
            fabric.finish(access);
        }
        any
    }
}

/// Doorbells, turns and accesses until nothing is left to do now; `false` if that takes too long.
pub(crate) fn settle(fabric: &mut Fabric<Guarded>, now: u64) -> bool {
    (0..10_000).any(|_| {
        let rung = fabric.collect();
        let more = fabric.run(now);
        let mut copies = Copies::default();
        let copied = copies.take(fabric) && copies.end_all(fabric);
        !Accesses::default().perform(fabric) && !rung && !more && !copied
    })
}
