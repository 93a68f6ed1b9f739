//! What turns cost, without threads and processes: the same write alone, and beside a client that floods its lane.

#![allow(missing_docs, reason = "criterion's macros make undocumented items")]
#![expect(clippy::unwrap_used, reason = "what a bench cannot set up it cannot measure")]

use std::{
    ptr::NonNull,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::{Bell, ClientInit, Fabric, Memory, QpInit};
use verbs_abi::{
    proto::{AhAttr, CreateQp, Mode, QpAttr, QpCap},
    shm::{
        Window,
        cq::CqArea,
        cqe::CompletionReader,
        doorbell::Doorbells,
        events::EventWriter,
        mr_table::MrEntry,
        queue::{Geometry, QueueArea},
        wqe::{SendWqe, Sge, flag},
    },
    verbs::{Opcode, QpAttrMask as Mask, QpState, QpType},
};

const PD: u32 = 1;
const KEY: u32 = 7;
const HALF: usize = 1 << 20;
/// As many work requests as a queue of the flooder holds.
const DEPTH: u32 = 64;

/// One buffer, where it lies.
#[derive(Debug)]
struct Plain(MrEntry);

impl Memory for Plain {
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        (key == KEY).then_some(self.0)
    }

    fn mapped(&self, _: &MrEntry, addr: u64, _: usize) -> Option<NonNull<u8>> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(addr as usize))
    }
}

#[derive(Debug)]
struct Silent;

impl Bell for Silent {
    fn ring(&self) {}
}

/// A client with a buffer of two halves, and some QPs, each connected to itself.
struct Client {
    id: u32,
    doorbells: Doorbells,
    start: u64,
    qps: Vec<Qp>,
    _buffer: Vec<u64>,
}

struct Qp {
    slot: u32,
    area: QueueArea,
    sends: CompletionReader,
    tail: u64,
}

impl Client {
    fn new(fabric: &mut Fabric<Plain>, id: u32, qps: usize) -> Self {
        let arena = Window::heap(1 << 20);
        let mut buffer = vec![1_u64; HALF / 4];
        let start = buffer.as_mut_ptr().expose_provenance() as u64;
        let len = 2 * HALF as u64;
        let mr = MrEntry {
            key: KEY,
            pd: PD,
            access: 0xf,
            iova: start,
            addr: start,
            len,
            shared_start: start,
            shared_end: start + len,
        };
        let doorbells = Doorbells::new(&arena).unwrap();
        let init = ClientInit {
            tenant: 0,
            mode: Mode::Isolated,
            doorbells: doorbells.clone(),
            events: EventWriter::new(&arena).unwrap(),
            event_bell: Arc::new(Silent),
            memory: Plain(mr),
            gids: vec![gid(id)],
        };
        fabric.open(id, init);
        let cq = fabric.create_cq(id, CqArea::new(&arena, 64 << 10).unwrap(), 64 << 10, None).unwrap();
        let qps = (0..qps).map(|_| Qp::new(fabric, id, cq)).collect();
        Self { id, doorbells, start, qps, _buffer: buffer }
    }

    /// Posts a write of `len` bytes from one half of the buffer to the other.
    fn post(&mut self, qp: usize, len: u32, flags: u8) {
        let qp = &mut self.qps[qp];
        let mut wqe = SendWqe::default();
        (wqe.opcode, wqe.flags, wqe.rkey) = (Opcode::Write.value() as u8, flags, KEY);
        wqe.remote_addr = self.start + HALF as u64;
        assert!(wqe.push_sge(Sge { addr: self.start, length: len, lkey: KEY }));
        qp.tail += wqe.encode(|i, block| qp.area.write_sq_block(qp.tail + i, block));
        qp.area.header.sq_tail().store(qp.tail, Ordering::Release);
        self.doorbells.ring(qp.slot);
    }

    /// Fills the queues of all QPs anew that are empty.
    fn refill(&mut self, len: u32) {
        for at in 0..self.qps.len() {
            let qp = &self.qps[at];
            if qp.area.header.sq_head().load(Ordering::Acquire) == qp.tail {
                (0..DEPTH).for_each(|_| self.post(at, len, 0));
            }
        }
    }
}

impl Qp {
    fn new(fabric: &mut Fabric<Plain>, client: u32, cq: u32) -> Self {
        let geometry = Geometry::new(DEPTH, 1, 1, 1, 0).unwrap();
        let area = QueueArea::new(&Window::heap(geometry.len()), 0, geometry).unwrap();
        let cap = QpCap {
            max_send_wr: DEPTH,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let create = CreateQp {
            pd: PD,
            send_cq: cq,
            recv_cq: cq,
            qp_type: QpType::Rc.value(),
            cap,
            sq_sig_all: false,
            ..CreateQp::default()
        };
        let init = QpInit { create, geometry, area: area.clone(), offset: 0 };
        let new = fabric.create_qp(client, init).unwrap();
        for to in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let from = fabric.query_qp(client, new.qpn).unwrap().qp_state;
            let from = QpState::try_from(from).unwrap();
            let rule = verbs_abi::qp_state::rule(QpType::Rc, from, to).unwrap();
            let mask = rule.required.union(Mask::STATE).bits();
            fabric.modify_qp(client, new.qpn, mask, &attr(to, client, new.qpn)).unwrap();
        }
        Self { slot: new.slot, sends: CompletionReader::new(area.sq_cqes.clone(), 0), area, tail: 0 }
    }
}

fn gid(client: u32) -> [u8; 16] {
    std::array::from_fn(|i| if i == 15 { client as u8 } else { 0xfd })
}

fn attr(state: QpState, client: u32, qpn: u32) -> QpAttr {
    QpAttr {
        qp_state: state.value(),
        path_mtu: 5,
        port_num: 1,
        dest_qp_num: qpn,
        qp_access_flags: 0xf,
        ah_attr: AhAttr { dgid: gid(client), is_global: 1, port_num: 1, ..AhAttr::default() },
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        ..QpAttr::default()
    }
}

/// Posts one write and runs the lane's loop until it is done; how long that took.
fn write(fabric: &mut Fabric<Plain>, client: &mut Client, len: u32) -> Duration {
    client.post(0, len, flag::SIGNALED);
    let start = Instant::now();
    while client.qps[0].sends.pop().is_none() {
        fabric.collect();
        fabric.run(0);
    }
    start.elapsed()
}

fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one client alone");
    for len in [8, 4096, 65_536, 1 << 20] {
        let mut fabric = Fabric::new();
        let mut client = Client::new(&mut fabric, 1, 1);
        let batch = if len > 65_536 { 4 } else { DEPTH };
        group.throughput(Throughput::Bytes(u64::from(len) * u64::from(batch)));
        group.bench_function(format!("{batch} writes of {len} B"), |bencher| {
            bencher.iter(|| {
                (1..batch).for_each(|_| client.post(0, len, 0));
                write(&mut fabric, &mut client, len)
            });
        });
    }
    group.finish();
}

fn together(criterion: &mut Criterion) {
    let mut fabric = Fabric::new();
    let mut clients: Vec<_> = (1..=32).map(|id| Client::new(&mut fabric, id, 1)).collect();
    let mut group = criterion.benchmark_group("32 clients together");
    for len in [8, 65_536] {
        group.throughput(Throughput::Bytes(32 * u64::from(DEPTH) * u64::from(len)));
        group.bench_function(format!("{DEPTH} writes of {len} B each"), |bencher| {
            bencher.iter(|| {
                clients.iter_mut().for_each(|client| client.refill(len));
                while fabric.collect() | fabric.run(0) {}
            });
        });
    }
    group.finish();
}

/// The time from a write's doorbell to its completion while another client keeps a thousand QPs full. The
/// lane may be at any point of its round when the doorbell rings: between two looks at the doorbells.
fn beside(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a write of 8 B beside 1000 busy QPs");
    for len in [8, 4096, 65_536] {
        let mut fabric = Fabric::new();
        let mut victim = Client::new(&mut fabric, 1, 1);
        let mut flooder = Client::new(&mut fabric, 2, 1000);
        group.bench_function(format!("of {len} B writes"), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    flooder.refill(len);
                    fabric.collect();
                    victim.post(0, 8, flag::SIGNALED);
                    let start = Instant::now();
                    while victim.qps[0].sends.pop().is_none() {
                        fabric.run(0);
                        fabric.collect();
                    }
                    total += start.elapsed();
                }
                total
            });
        });
        fabric.close(victim.id);
        fabric.close(flooder.id);
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(30);
    targets = alone, together, beside
}
criterion_main!(benches);
