//! Memory windows, ATOMIC WRITE and FLUSH.

use super::*;
use crate::MemoryWindow;

const WINDOW: u32 = 0x5500;
const REMOTE_WRITE: u32 = 2;

/// A pair whose second application has a window, to an MR that may be bound.
fn pair_with_window(is_type_2: bool) -> (Fabric<TestMemory>, App, App) {
    let (mut fabric, a, b) = pair(QpType::Rc);
    let memory = fabric.memory_mut(b.client).unwrap();
    memory.table[0].access |= AccessFlags::MW_BIND.bits();
    *memory.windows.borrow_mut() = vec![MemoryWindow { key: WINDOW, pd: PD, is_type_2, bound: None }];
    (fabric, a, b)
}

/// A work request without payload.
fn bare(opcode: Opcode) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.opcode, wqe.flags) = (7, opcode.value() as u8, flag::SIGNALED);
    wqe
}

/// Binds the window to bytes of the application's buffer.
fn bind(app: &App, key: u32, offset: u64, len: u64, access: u32) -> SendWqe {
    let mut wqe = bare(Opcode::BindMw);
    wqe.rkey = key;
    (wqe.remote_addr, wqe.compare_add) = (app.addr() + offset, len);
    wqe.swap = u64::from(access) << 32 | u64::from(app.key);
    wqe
}

fn invalidate(key: u32) -> SendWqe {
    let mut wqe = bare(Opcode::LocalInv);
    wqe.imm = key;
    wqe
}

fn done(fabric: &mut Fabric<TestMemory>, app: &mut App, wqe: &SendWqe) -> WcStatus {
    app.post(wqe);
    turn(fabric, 0);
    status(app.sends.pop())
}

fn write_to(a: &App, b: &App, key: u32, offset: u64, len: u32) -> SendWqe {
    let mut wqe = send(Opcode::Write, a.sge(0, len));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + offset, key);
    wqe
}

#[test]
fn a_window_opens_its_part_under_its_key_and_no_more() {
    for is_type_2 in [false, true] {
        let (mut fabric, mut a, mut b) = pair_with_window(is_type_2);
        a.bytes().fill(3);
        let wqe = bind(&b, WINDOW + 1, 8192, 4096, REMOTE_WRITE);
        assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
        let wqe = write_to(&a, &b, WINDOW + 1, 8192, 4096);
        assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::Success);
        assert!(b.bytes()[8192..12288].iter().all(|byte| *byte == 3));
        assert_eq!((b.bytes()[8191], b.bytes()[12288]), (0, 0));
        let wqe = write_to(&a, &b, WINDOW + 1, 8191, 4096);
        assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
    }
}

#[test]
fn the_key_before_a_binding_and_rights_that_were_not_given_are_refused() {
    for (key, access) in [(WINDOW, REMOTE_WRITE), (WINDOW + 1, 4)] {
        let (mut fabric, mut a, mut b) = pair_with_window(false);
        let wqe = bind(&b, WINDOW + 1, 0, 4096, access);
        assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
        let wqe = write_to(&a, &b, key, 0, 8);
        assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
    }
}

#[test]
fn what_may_not_be_bound_fails_at_the_binder() {
    type Change = fn(&mut SendWqe, &mut TestMemory);
    let cases: [(&str, Change); 6] = [
        ("beyond the MR", |wqe, _| wqe.compare_add = 1 << 30),
        ("before the MR", |wqe, _| wqe.remote_addr -= 8),
        ("no MR", |wqe, _| wqe.swap += 1),
        ("no window", |wqe, _| wqe.rkey += 0x100),
        ("an MR without MW_BIND", |_, memory| memory.table[0].access = RIGHTS),
        ("rights that the MR lacks", |_, memory| memory.table[0].access &= !1),
    ];
    for (what, change) in cases {
        let (mut fabric, _a, mut b) = pair_with_window(false);
        let mut wqe = bind(&b, WINDOW + 1, 0, 4096, REMOTE_WRITE);
        change(&mut wqe, fabric.memory_mut(b.client).unwrap());
        assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::MwBindErr, "{what}");
        assert_eq!(b.state(&mut fabric), QpState::Err, "{what}");
    }
}

#[test]
fn a_window_of_type_1_is_closed_by_binding_nothing() {
    let (mut fabric, mut a, mut b) = pair_with_window(false);
    for (key, len) in [(WINDOW + 1, 64), (WINDOW + 2, 64), (WINDOW + 3, 0)] {
        let wqe = bind(&b, key, 0, len, REMOTE_WRITE);
        assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
    }
    let wqe = write_to(&a, &b, WINDOW + 3, 0, 8);
    assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
}

#[test]
fn a_window_of_type_2_is_bound_once_until_it_is_invalidated() {
    let (mut fabric, mut a, mut b) = pair_with_window(true);
    let wqe = bind(&b, WINDOW + 1, 0, 64, REMOTE_WRITE);
    assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
    assert_eq!(done(&mut fabric, &mut b, &invalidate(WINDOW + 1)), WcStatus::Success);
    let wqe = bind(&b, WINDOW + 2, 0, 64, REMOTE_WRITE);
    assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
    let wqe = write_to(&a, &b, WINDOW + 2, 0, 8);
    assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::Success);
    let wqe = bind(&b, WINDOW + 3, 0, 64, REMOTE_WRITE);
    assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::MwBindErr, "still bound");
}

#[test]
fn a_window_of_type_2_serves_the_qp_that_bound_it() {
    let (mut fabric, mut a, mut b) = pair_with_window(true);
    let wqe = bind(&b, WINDOW + 1, 0, 64, REMOTE_WRITE);
    assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
    let memory = fabric.memory_mut(b.client).unwrap();
    memory.windows.borrow_mut()[0].bound.as_mut().unwrap().qpn += 1;
    let wqe = write_to(&a, &b, WINDOW + 1, 0, 8);
    assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
}

#[test]
fn a_send_invalidates_the_receivers_window_and_says_which() {
    let (mut fabric, mut a, mut b) = pair_with_window(true);
    let wqe = bind(&b, WINDOW + 1, 4096, 64, REMOTE_WRITE);
    assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
    b.post_recv(1, &[b.sge(0, 64)]);
    let mut wqe = send(Opcode::SendWithInv, a.sge(0, 16));
    wqe.imm = WINDOW + 1;
    assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::Success);
    let received = b.receives.pop().unwrap();
    assert_eq!((received.imm, received.flags), (WINDOW + 1, WcFlags::WITH_INV.bits() as u8));
    let wqe = write_to(&a, &b, WINDOW + 1, 4096, 8);
    assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
}

#[test]
fn a_send_that_may_not_invalidate_fails_at_both_ends() {
    // Not bound, an MR, and a window of type 1.
    for (is_type_2, binds, key) in [(true, false, WINDOW), (true, true, 1002), (false, true, WINDOW + 1)] {
        let (mut fabric, mut a, mut b) = pair_with_window(is_type_2);
        if binds {
            let wqe = bind(&b, WINDOW + 1, 4096, 64, REMOTE_WRITE);
            assert_eq!(done(&mut fabric, &mut b, &wqe), WcStatus::Success);
        }
        b.post_recv(1, &[b.sge(0, 64)]);
        let mut wqe = send(Opcode::SendWithInv, a.sge(0, 16));
        wqe.imm = key;
        assert_eq!(done(&mut fabric, &mut a, &wqe), WcStatus::RemAccessErr);
        assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr);
    }
}

#[test]
fn an_atomic_write_is_of_eight_aligned_bytes() {
    let cases = [(8, 0, WcStatus::Success), (8, 4, WcStatus::RemInvReqErr), (4, 0, WcStatus::RemInvReqErr)];
    for (len, offset, expected) in cases {
        let (mut fabric, mut a, mut b) = pair(QpType::Rc);
        a.buffer[0] = 0x0102_0304_0506_0708;
        let mut wqe = send(Opcode::AtomicWrite, a.sge(0, len));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + 8192 + offset, b.key);
        assert_eq!(done(&mut fabric, &mut a, &wqe), expected);
        let written = if expected == WcStatus::Success { a.buffer[0] } else { 0 };
        assert_eq!(b.buffer[1024], written);
        assert_eq!(b.bytes()[8200], 0);
    }
}

#[test]
fn a_flush_needs_its_right_at_the_qp_and_at_the_region() {
    let global = AccessFlags::FLUSH_GLOBAL.bits();
    let cases = [
        (global, global, 1, WcStatus::Success),
        (global, global, 2, WcStatus::RemAccessErr),
        (0, global, 1, WcStatus::RemAccessErr),
        (global, 0, 1, WcStatus::RemAccessErr),
        (global, global, 0, WcStatus::RemAccessErr),
    ];
    for (of_qp, of_mr, kind, expected) in cases {
        let (mut fabric, mut a, b) = pair(QpType::Rc);
        fabric.memory_mut(b.client).unwrap().table[0].access |= of_mr;
        let attr = QpAttr { qp_access_flags: 0xe | of_qp, ..QpAttr::default() };
        fabric.modify_qp(b.client, b.qpn, Mask::ACCESS_FLAGS.bits(), &attr).unwrap();
        let mut wqe = bare(Opcode::Flush);
        wqe.rkey = b.key;
        (wqe.remote_addr, wqe.compare_add, wqe.swap) = (b.addr(), 100, kind);
        assert_eq!(done(&mut fabric, &mut a, &wqe), expected, "{of_qp:#x} {of_mr:#x} {kind}");
    }
}
