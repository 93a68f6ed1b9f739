//! Promise: what one client has posted costs another a bounded wait, counted in bytes that the lane moves.

use super::{schedule::QUANTUM, *};

/// Where memory is mapped, as most memory is.
const MAPPED: u64 = 64 * 1024;

/// A further QP of `app`'s client: its number, its doorbell and its queues.
pub(super) fn further_qp(fabric: &mut Fabric<TestMemory>, app: &App) -> (u32, u32, QueueArea) {
    let geometry = Geometry::new(16, 16, 1, 1, 0).unwrap();
    let area = QueueArea::new(&Window::heap(geometry.len()), 0, geometry).unwrap();
    let cap =
        QpCap { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let create = CreateQp {
        pd: PD,
        send_cq: 1,
        recv_cq: 1,
        qp_type: QpType::Rc.value(),
        cap,
        sq_sig_all: false,
        ..CreateQp::default()
    };
    let init = QpInit { create, geometry, area: area.clone(), offset: 0 };
    let qp = fabric.create_qp(app.client, init).unwrap();
    (qp.qpn, qp.slot, area)
}

/// Fills a send queue with writes of `len` bytes to the memory of `target`.
pub(super) fn fill_queue(area: &QueueArea, app: &App, target: &App, len: u32) {
    let mut tail = 0;
    for _ in 0..16 {
        let mut wqe = send(Opcode::Write, app.sge(MAPPED, len));
        wqe.flags = 0;
        (wqe.remote_addr, wqe.rkey) = (target.addr() + (1 << 19), target.key);
        tail += wqe.encode(|i, block| area.write_sq_block(tail + i, block));
    }
    area.header.sq_tail().store(tail, Ordering::Release);
}

/// A further QP of `app`'s client in RTS, connected to itself, with its queue full of writes of `len` bytes.
fn flood(fabric: &mut Fabric<TestMemory>, app: &App, len: u32) -> QueueArea {
    let (qpn, slot, area) = further_qp(fabric, app);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        fabric_modify(fabric, (app.client, qpn), state, (app.client, qpn), QpType::Rc);
    }
    fill_queue(&area, app, app, len);
    app.doorbells.ring(slot);
    area
}

/// What a lane does between two looks at the clock.
fn step(fabric: &mut Fabric<TestMemory>) {
    fabric.collect();
    fabric.run(0);
}

/// The most that is done between two looks at the doorbells when somebody rings.
const LOOK: u64 = 2 * QUANTUM + 8 * 1024;

#[test]
fn a_write_beside_a_thousand_busy_qps_waits_for_a_quantum_or_two() {
    for len in [8, 4096, 65_536, 1 << 18] {
        let (mut fabric, mut a, b) = pair(QpType::Rc);
        let flooder = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
        let _areas: Vec<_> = (0..1000).map(|_| flood(&mut fabric, &flooder, len)).collect();
        for _ in 0..50 {
            step(&mut fabric);
        }
        let mut wqe = send(Opcode::Write, a.sge(MAPPED, 8));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
        for round in 0..20 {
            // Rung just after the lane has looked.
            fabric.collect();
            a.post(&wqe);
            let before = fabric.lane_use(flooder.client);
            assert!(fabric.run(0));
            let meanwhile = fabric.lane_use(flooder.client) - before;
            assert!((1..=LOOK).contains(&meanwhile), "{len} B, round {round}: {meanwhile} B");
            fabric.collect();
            assert!(fabric.run(0));
            assert_eq!(status(a.sends.pop()), WcStatus::Success);
        }
    }
}

#[test]
fn a_client_that_is_alone_goes_on_for_longer() {
    let (mut fabric, a, _b) = pair(QpType::Rc);
    let _areas: Vec<_> = (0..100).map(|_| flood(&mut fabric, &a, 65_536)).collect();
    for _ in 0..10 {
        step(&mut fabric);
    }
    let before = fabric.lane_use(a.client);
    assert!(fabric.run(0));
    assert!(fabric.lane_use(a.client) - before >= crate::SLICE);
}

#[test]
fn doorbells_that_ring_everywhere_and_timers_that_are_due_together_hold_nobody_up() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    let flooder = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
    let _areas: Vec<_> = (0..2000).map(|_| flood(&mut fabric, &flooder, 8)).collect();
    while fabric.collect() | fabric.run(0) {}
    let mut wqe = send(Opcode::Write, a.sge(MAPPED, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
    (0..2000).for_each(|slot| flooder.doorbells.ring(slot));
    a.post(&wqe);
    fabric.collect();
    assert!(fabric.schedule.len() <= 1 + 64, "{}", fabric.schedule.len());
    fabric.run(0);
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    while fabric.collect() | fabric.run(0) {}
    for at in 0..1000 {
        fabric.qps[at + 3].as_mut().unwrap().waiting = Some(Some(5));
        fabric.schedule.set_timer(5, at + 3);
    }
    a.post(&wqe);
    fabric.collect();
    assert!(fabric.run(5), "the other timers are due now");
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert_eq!(fabric.next_timer(), Some(5));
    while fabric.collect() | fabric.run(5) {}
    assert_eq!(fabric.next_timer(), None);
}

#[test]
fn a_heavier_client_gets_so_much_more() {
    let mut fabric = Fabric::new();
    let apps = [1, 2].map(|client| App::new(&mut fabric, client, QpType::Rc, Mode::Isolated));
    fabric.set_weight(2, 3);
    let _areas: Vec<_> = apps
        .iter()
        .flat_map(|app| (0..200).map(|_| flood(&mut fabric, app, 65_536)).collect::<Vec<_>>())
        .collect();
    for _ in 0..100 {
        step(&mut fabric);
    }
    let [light, heavy] = [1, 2].map(|client| fabric.lane_use(client) as f64);
    assert!((2.5..3.5).contains(&(heavy / light)), "{heavy} to {light}");
}

#[test]
fn a_client_with_many_qps_ends_bit_by_bit_and_is_looked_at_bit_by_bit() {
    let (mut fabric, a, b) = pair(QpType::Rc);
    let flooder = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
    let _areas: Vec<_> = (0..199).map(|_| flood(&mut fabric, &flooder, 8)).collect();
    assert_eq!((fabric.owner_of(flooder.qpn), fabric.owner_of(1)), (Some(3), None));
    let parts: Vec<usize> = (0..)
        .step_by(64)
        .map_while(|start| fabric.snapshot_part(start..start + 64))
        .map(|part| part.len())
        .collect();
    assert_eq!(parts, [64, 64, 64, 10], "two of the pair, one of its own and the 199");
    let mut left = 200;
    while fabric.close_some(flooder.client, 64) {
        let now = fabric.snapshot().iter().filter(|qp| qp.client == flooder.client).count();
        assert!(left - now <= 64);
        left = now;
        // The lane goes on in between, and what is left of it is still served.
        step(&mut fabric);
    }
    assert!(left <= 64);
    assert!(fabric.clients[2].is_none());
    assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts));
    assert!(!fabric.close_some(flooder.client, 64), "and is gone");
}
