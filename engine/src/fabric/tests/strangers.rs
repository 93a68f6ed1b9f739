//! A connected QP hears its peer alone: the QP with the number and at the address that it was given.

use super::*;

/// Two QPs in RTS, where `b` believes its peer to be at the address of client `at`.
fn pair_with_address(qp_type: QpType, mode: Mode, at: u32) -> (Fabric<TestMemory>, App, App) {
    let mut fabric = Fabric::new();
    let a = App::new(&mut fabric, 1, qp_type, mode);
    let b = App::new(&mut fabric, 2, qp_type, mode);
    a.to_rts(&mut fabric, &b, qp_type);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        fabric_modify(&mut fabric, (b.client, b.qpn), state, (at, a.qpn), qp_type);
    }
    (fabric, a, b)
}

fn write(a: &mut App, b: &App) {
    a.bytes()[..8].fill(1);
    let mut wqe = send(Opcode::Write, a.sge(0, 8));
    (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    a.post(&wqe);
}

fn run_out(fabric: &mut Fabric<TestMemory>) {
    turn(fabric, 0);
    while let Some(next) = fabric.next_timer() {
        turn(fabric, next);
    }
}

#[test]
fn a_peer_at_another_address_is_not_heard() {
    let (mut fabric, mut a, mut b) = pair_with_address(QpType::Rc, Mode::Isolated, 9);
    write(&mut a, &b);
    run_out(&mut fabric);
    assert_eq!(status(a.sends.pop()), WcStatus::RetryExcErr);
    assert_eq!((b.bytes()[0], b.state(&mut fabric)), (0, QpState::Rts));

    let (mut fabric, mut a, mut b) = pair_with_address(QpType::Uc, Mode::Isolated, 9);
    write(&mut a, &b);
    run_out(&mut fabric);
    assert_eq!((status(a.sends.pop()), b.bytes()[0]), (WcStatus::Success, 0), "UC loses it");
}

#[test]
fn a_direct_peer_at_another_address_is_not_heard() {
    let (mut fabric, mut a, mut b) = pair_with_address(QpType::Rc, Mode::Direct, 9);
    turn(&mut fabric, 0);
    let mut owner = Owner::new(&fabric, &a, &b);
    write(&mut a, &b);
    assert!(!owner.run(&a));
    a.doorbells.ring(a.slot);
    run_out(&mut fabric);
    assert_eq!((status(a.sends.pop()), b.bytes()[0]), (WcStatus::RetryExcErr, 0));
}

#[test]
fn a_third_qp_is_not_heard() {
    let (mut fabric, _a, mut b) = pair(QpType::Rc);
    let mut c = App::new(&mut fabric, 3, QpType::Rc, Mode::Isolated);
    c.to_rts(&mut fabric, &b, QpType::Rc);
    write(&mut c, &b);
    run_out(&mut fabric);
    assert_eq!((status(c.sends.pop()), b.bytes()[0]), (WcStatus::RetryExcErr, 0));
    assert_eq!(b.state(&mut fabric), QpState::Rts);
}

#[test]
fn a_peer_is_heard_once_it_has_the_address() {
    let (mut fabric, mut a, mut b) = pair_with_address(QpType::Rc, Mode::Isolated, 9);
    write(&mut a, &b);
    turn(&mut fabric, 0);
    assert_eq!(a.sends.pop(), None);
    fabric.set_gids(1, vec![gid(1), gid(9)]);
    turn(&mut fabric, 1);
    assert_eq!((status(a.sends.pop()), b.bytes()[0]), (WcStatus::Success, 1));
}
