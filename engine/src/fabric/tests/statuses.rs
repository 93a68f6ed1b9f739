//! Each completion status that RC, UC and UD can produce, for its own reasons; and what the other end learns of it.

use super::*;

/// The last MR of a table, with other properties.
fn add_mr(fabric: &mut Fabric<TestMemory>, app: &App, key: u32, change: impl Fn(&mut MrEntry)) {
    let table = &mut fabric.memory_mut(app.client).unwrap().table;
    let mut mr = MrEntry { key, ..table[0] };
    change(&mut mr);
    table.push(mr);
}

const READ_ONLY: u32 = 50;
const FOREIGN: u32 = 51;

/// A pair with two MRs more at each end: one without rights, one of another PD.
fn pair_with_keys(qp_type: QpType, tune: impl Fn(&mut QpAttr)) -> (Fabric<TestMemory>, App, App) {
    let (mut fabric, a, b) = tuned_pair(qp_type, tune);
    for app in [&a, &b] {
        add_mr(&mut fabric, app, READ_ONLY, |mr| mr.access = 0);
        add_mr(&mut fabric, app, FOREIGN, |mr| mr.pd = PD + 1);
    }
    (fabric, a, b)
}

/// Makes a work request what the QP takes: with a remote address, or for UD with an address.
fn aim(mut wqe: SendWqe, qp_type: QpType, b: &App) -> SendWqe {
    if qp_type == QpType::Ud {
        wqe.flags |= flag::ADDRESS;
        wqe.address = Address { dgid: gid(b.client), qpn: b.qpn, qkey: 0x11, ..Address::default() };
    } else {
        (wqe.remote_addr, wqe.rkey) = (b.addr(), b.key);
    }
    wqe
}

/// A wrong work request of `a`, and the status that it ends with before the peer learns of anything.
type LocalFault = (fn(&App) -> SendWqe, WcStatus);

/// Faults that every service finds.
const LOCAL_FAULTS: [LocalFault; 6] = [
    (|a| send(Opcode::Send, Sge { lkey: 9, ..a.sge(0, 8) }), WcStatus::LocProtErr),
    (|a| send(Opcode::Send, Sge { lkey: FOREIGN, ..a.sge(0, 8) }), WcStatus::LocProtErr),
    (|a| send(Opcode::Send, a.sge((1 << 20) - 4, 8)), WcStatus::LocProtErr),
    (|a| send(Opcode::Send, Sge { addr: a.addr() - 1, ..a.sge(0, 8) }), WcStatus::LocProtErr),
    (|a| send(Opcode::Send, a.sge(0, crate::MAX_MESSAGE as u32 + 1)), WcStatus::LocLenErr),
    (no_opcode, WcStatus::LocQpOpErr),
];

/// Faults of one service.
const FAULTS_OF: [(QpType, LocalFault); 9] = [
    (QpType::Rc, (|a| read_into(a, READ_ONLY), WcStatus::LocProtErr)),
    (QpType::Rc, (|a| add_into(a, Sge { lkey: READ_ONLY, ..a.sge(0, 8) }), WcStatus::LocProtErr)),
    (QpType::Rc, (|a| add_into(a, a.sge(0, 7)), WcStatus::LocLenErr)),
    (QpType::Rc, (|a| add_into(a, a.sge(0, 9)), WcStatus::LocLenErr)),
    (QpType::Uc, (|a| read_into(a, a.key), WcStatus::LocQpOpErr)),
    (QpType::Uc, (|a| add_into(a, a.sge(0, 8)), WcStatus::LocQpOpErr)),
    (QpType::Ud, (|a| send(Opcode::Write, a.sge(0, 8)), WcStatus::LocQpOpErr)),
    (QpType::Ud, (|a| send(Opcode::Send, a.sge(0, crate::MAX_DATAGRAM as u32 + 1)), WcStatus::LocLenErr)),
    (QpType::Rc, (inline_read, WcStatus::LocQpOpErr)),
];

fn no_opcode(a: &App) -> SendWqe {
    let mut wqe = send(Opcode::Send, a.sge(0, 8));
    wqe.opcode = 200;
    wqe
}

fn read_into(a: &App, lkey: u32) -> SendWqe {
    send(Opcode::Read, Sge { lkey, ..a.sge(0, 8) })
}

fn add_into(_: &App, sge: Sge) -> SendWqe {
    send(Opcode::FetchAndAdd, sge)
}

fn inline_read(_: &App) -> SendWqe {
    let mut wqe = SendWqe::default();
    wqe.opcode = Opcode::Read.value() as u8;
    wqe.inline_mut(8).unwrap().fill(1);
    wqe
}

#[test]
fn a_fault_of_the_requester_ends_its_send_queue_and_no_peer_hears_of_it() {
    let services = [QpType::Rc, QpType::Uc, QpType::Ud];
    let common = services.into_iter().flat_map(|service| LOCAL_FAULTS.map(|fault| (service, fault)));
    for (case, (qp_type, (fault, expected))) in common.chain(FAULTS_OF).enumerate() {
        let (mut fabric, mut a, mut b) = pair_with_keys(qp_type, |_| ());
        a.post_recv(7, &[a.sge(64, 64)]);
        b.post_recv(8, &[b.sge(0, 64)]);
        a.post(&aim(fault(&a), qp_type, &b));
        a.post(&aim(send(Opcode::Send, a.sge(0, 8)), qp_type, &b));
        turn(&mut fabric, 0);
        let case = format!("case {case}, {qp_type}");
        assert_eq!(status(a.sends.pop()), expected, "{case}");
        assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr, "{case}");
        let flushed = a.receives.pop();
        if qp_type == QpType::Rc {
            assert_eq!(a.state(&mut fabric), QpState::Err, "{case}");
            assert_eq!(status(flushed), WcStatus::WrFlushErr, "{case}");
        } else {
            assert_eq!(a.state(&mut fabric), QpState::Sqe, "{case}: only the send queue is in error");
            assert_eq!(flushed, None, "{case}: receives go on");
        }
        assert_eq!((b.receives.pop(), b.state(&mut fabric)), (None, QpState::Rts), "{case}");
        assert_eq!((events(&mut a), events(&mut b)), (vec![], vec![]), "{case}");
    }
}

#[test]
fn a_send_queue_in_error_recovers_by_a_modify_and_receives_all_the_while() {
    for qp_type in [QpType::Uc, QpType::Ud] {
        let (mut fabric, mut a, mut b) = tuned_pair(qp_type, |_| ());
        a.post_recv(7, &[a.sge(64, 64)]);
        a.post(&aim(send(Opcode::Send, Sge { lkey: 9, ..a.sge(0, 8) }), qp_type, &b));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::LocProtErr);
        // Later sends are flushed.
        a.post(&aim(send(Opcode::Send, a.sge(0, 8)), qp_type, &b));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::WrFlushErr);
        b.post(&aim(send(Opcode::Send, b.sge(0, 8)), qp_type, &a));
        turn(&mut fabric, 0);
        assert_eq!(status(a.receives.pop()), WcStatus::Success, "{qp_type}");
        a.modify(&mut fabric, QpState::Rts, &b, qp_type);
        b.post_recv(8, &[b.sge(0, 64)]);
        a.post(&aim(send(Opcode::Send, a.sge(0, 8)), qp_type, &b));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::Success, "{qp_type}");
        assert_eq!(status(b.receives.pop()), WcStatus::Success, "{qp_type}");
    }
}

/// A wrong request to `b`, and what becomes of it: the requester's status, the status of the responder's first
/// receive, the responder's event.
type RemoteFault = (fn(&App, &App) -> SendWqe, WcStatus, WcStatus, Option<EventType>);

fn to(b: &App, opcode: Opcode, sge: Sge, offset: u64, rkey: u32) -> SendWqe {
    let mut wqe = send(opcode, sge);
    (wqe.remote_addr, wqe.rkey) = (b.addr().wrapping_add(offset), rkey);
    wqe
}

const FLUSHED: WcStatus = WcStatus::WrFlushErr;
const ACCESS: Option<EventType> = Some(EventType::QpAccessErr);
const REQUEST: Option<EventType> = Some(EventType::QpReqErr);

const REMOTE_FAULTS: [RemoteFault; 14] = [
    // Keys, bounds, the MR's rights, its PD.
    (|a, b| to(b, Opcode::Write, a.sge(0, 8), 0, 9), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Read, a.sge(0, 8), 0, 9), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::FetchAndAdd, a.sge(0, 8), 0, 9), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Write, a.sge(0, 8), (1 << 20) - 4, b.key), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Read, a.sge(0, 8), u64::MAX, b.key), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Write, a.sge(0, 8), 0, READ_ONLY), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Read, a.sge(0, 8), 0, READ_ONLY), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::CmpAndSwp, a.sge(0, 8), 0, READ_ONLY), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    (|a, b| to(b, Opcode::Write, a.sge(0, 8), 0, FOREIGN), WcStatus::RemAccessErr, FLUSHED, ACCESS),
    // With immediate data the receive tells, and no event besides.
    (
        |a, b| to(b, Opcode::WriteWithImm, a.sge(0, 8), 0, 9),
        WcStatus::RemAccessErr,
        WcStatus::LocAccessErr,
        None,
    ),
    // An atomic between two words.
    (|a, b| to(b, Opcode::CmpAndSwp, a.sge(0, 8), 4, b.key), WcStatus::RemInvReqErr, FLUSHED, REQUEST),
    (|a, b| to(b, Opcode::FetchAndAdd, a.sge(0, 8), 1, b.key), WcStatus::RemInvReqErr, FLUSHED, REQUEST),
    // A message longer than the receive (of 64 bytes).
    (|a, b| to(b, Opcode::Send, a.sge(0, 65), 0, 0), WcStatus::RemInvReqErr, WcStatus::LocLenErr, None),
    (
        |a, b| to(b, Opcode::SendWithImm, a.sge(0, 4096), 0, 0),
        WcStatus::RemInvReqErr,
        WcStatus::LocLenErr,
        None,
    ),
];

#[test]
fn a_fault_that_the_responder_finds_ends_both_qps_and_each_hears_its_part() {
    for (case, (fault, expected, received, event)) in REMOTE_FAULTS.into_iter().enumerate() {
        let (mut fabric, mut a, mut b) = pair_with_keys(QpType::Rc, |_| ());
        b.post_recv(1, &[b.sge(0, 64)]);
        b.post_recv(2, &[b.sge(0, 64)]);
        b.bytes().fill(3);
        a.post(&fault(&a, &b));
        a.post(&send(Opcode::Send, a.sge(0, 8)));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), expected, "case {case}");
        assert_eq!(status(a.sends.pop()), FLUSHED, "case {case}");
        assert_eq!(status(b.receives.pop()), received, "case {case}");
        assert_eq!(status(b.receives.pop()), FLUSHED, "case {case}");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Err), "case {case}");
        assert_eq!(events(&mut b), Vec::from_iter(event), "case {case}");
        assert_eq!(events(&mut a), [], "case {case}: the completion tells the requester");
        assert!(b.bytes().iter().all(|byte| *byte == 3), "case {case}: a refused request left a trace");
    }
}

#[test]
fn a_bad_receive_is_the_responders_fault_and_the_requester_hears_that() {
    let bad: [fn(&App) -> Sge; 4] = [
        |b| Sge { lkey: 9, ..b.sge(0, 64) },
        |b| Sge { lkey: FOREIGN, ..b.sge(0, 64) },
        |b| Sge { lkey: READ_ONLY, ..b.sge(0, 64) },
        |b| b.sge((1 << 20) - 4, 64),
    ];
    for (case, sge) in bad.into_iter().enumerate() {
        let (mut fabric, mut a, mut b) = pair_with_keys(QpType::Rc, |_| ());
        b.post_recv(1, &[sge(&b)]);
        a.post(&send(Opcode::Send, a.sge(0, 8)));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::RemOpErr, "case {case}");
        assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr, "case {case}");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Err), "case {case}");
        assert_eq!(events(&mut b), [], "case {case}");
    }
}

#[test]
fn memory_of_the_responder_that_cannot_be_reached_is_an_operational_error() {
    // The first bytes of a buffer are reached the slow way, which fails here.
    for opcode in [Opcode::Write, Opcode::Read, Opcode::FetchAndAdd] {
        let (mut fabric, mut a, mut b) = pair(QpType::Rc);
        fabric.memory_mut(b.client).unwrap().unreachable = true;
        a.post(&to(&b, opcode, a.sge(8192, 8), 0, b.key));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::RemOpErr, "{opcode}");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Err), "{opcode}");
        assert_eq!(events(&mut b), [EventType::QpFatal], "{opcode}");
    }
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    fabric.memory_mut(b.client).unwrap().unreachable = true;
    b.post_recv(1, &[b.sge(0, 8)]);
    a.post(&send(Opcode::Send, a.sge(8192, 8)));
    turn(&mut fabric, 0);
    assert_eq!(status(a.sends.pop()), WcStatus::RemOpErr);
    assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr);
    assert_eq!(events(&mut b), []);
}

#[test]
fn what_was_copied_from_or_to_memory_that_is_lost_is_never_a_success() {
    // Bytes 8192 and on are mapped.
    for opcode in [Opcode::Write, Opcode::Read, Opcode::FetchAndAdd] {
        for (is_own, expected) in [(true, WcStatus::LocProtErr), (false, WcStatus::RemOpErr)] {
            let (mut fabric, mut a, b) = pair(QpType::Rc);
            fabric.memory_mut(if is_own { a.client } else { b.client }).unwrap().lost = true;
            a.post(&to(&b, opcode, a.sge(8192, 8), 8192, b.key));
            turn(&mut fabric, 0);
            assert_eq!(status(a.sends.pop()), expected, "{opcode}, own: {is_own}");
        }
    }
    for (is_own, expected) in [(true, WcStatus::LocProtErr), (false, WcStatus::RemOpErr)] {
        let (mut fabric, mut a, mut b) = pair(QpType::Rc);
        fabric.memory_mut(if is_own { a.client } else { b.client }).unwrap().lost = true;
        b.post_recv(1, &[b.sge(8192, 8)]);
        a.post(&send(Opcode::Send, a.sge(8192, 8)));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), expected, "SEND, own: {is_own}");
        assert!(b.receives.pop().is_none_or(|done| done.status != 0), "a message of nothing came");
    }
}

#[test]
fn operations_that_the_responders_qp_does_not_allow_are_invalid_requests() {
    let disabled: [fn(&mut QpAttr); 3] = [
        |attr| attr.qp_access_flags = AccessFlags::LOCAL_WRITE.bits(),
        |attr| attr.qp_access_flags = AccessFlags::LOCAL_WRITE.bits(),
        // READs and atomics need a place to be remembered.
        |attr| attr.max_dest_rd_atomic = 0,
    ];
    let operations = [
        &[Opcode::Write, Opcode::WriteWithImm][..],
        &[Opcode::Read, Opcode::CmpAndSwp, Opcode::FetchAndAdd],
        &[Opcode::Read, Opcode::CmpAndSwp, Opcode::FetchAndAdd],
    ];
    for (tune, opcodes) in disabled.into_iter().zip(operations) {
        for opcode in opcodes {
            // No receive is posted: that the operation is not allowed comes first.
            let (mut fabric, mut a, mut b) = tuned_pair(QpType::Rc, tune);
            a.post(&to(&b, *opcode, a.sge(0, 8), 0, b.key));
            turn(&mut fabric, 0);
            assert_eq!(status(a.sends.pop()), WcStatus::RemInvReqErr, "{opcode}");
            assert_eq!(events(&mut b), [EventType::QpReqErr], "{opcode}");
            assert_eq!(
                (a.state(&mut fabric), b.state(&mut fabric)),
                (QpState::Err, QpState::Err),
                "{opcode}"
            );
        }
    }
}

#[test]
fn a_requester_without_initiator_depth_does_not_read() {
    for opcode in [Opcode::Read, Opcode::CmpAndSwp, Opcode::FetchAndAdd] {
        let (mut fabric, mut a, b) = tuned_pair(QpType::Rc, |attr| attr.max_rd_atomic = 0);
        a.post(&to(&b, opcode, a.sge(0, 8), 0, b.key));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::LocQpOpErr, "{opcode}");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Err, QpState::Rts), "{opcode}");
    }
}

#[test]
fn an_unreliable_connection_drops_what_its_responder_refuses() {
    let refused: [fn(&App, &App) -> SendWqe; 5] = [
        |a, b| to(b, Opcode::Write, a.sge(0, 8), 0, 9),
        |a, b| to(b, Opcode::Write, a.sge(0, 8), 1 << 20, b.key),
        |a, b| to(b, Opcode::WriteWithImm, a.sge(0, 8), 0, READ_ONLY),
        |a, b| to(b, Opcode::Send, a.sge(0, 65), 0, 0),
        |a, b| to(b, Opcode::SendWithImm, a.sge(0, 99), 0, 0),
    ];
    for (case, fault) in refused.into_iter().enumerate() {
        let (mut fabric, mut a, mut b) = pair_with_keys(QpType::Uc, |_| ());
        b.post_recv(1, &[b.sge(0, 64)]);
        a.post(&fault(&a, &b));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::Success, "case {case}: nobody answers");
        assert_eq!((b.receives.pop(), events(&mut b)), (None, vec![]), "case {case}: lost without a trace");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Rts), "case {case}");
        a.post(&to(&b, Opcode::Send, a.sge(0, 64), 0, 0));
        turn(&mut fabric, 0);
        assert_eq!(b.receives.pop().unwrap().wr_id, 1, "case {case}: the receive was still there");
    }
}

#[test]
fn a_datagram_that_is_lost_leaves_no_trace() {
    type Spoil = fn(&mut SendWqe, &App);
    let lost: [Spoil; 5] = [
        |wqe, _| wqe.address.qkey += 1,
        |wqe, _| wqe.address.qpn += 100,
        |wqe, _| wqe.address.dgid = gid(9),
        // The sender's own address, where the receiver does not live.
        |wqe, a| wqe.address.dgid = gid(a.client),
        // 64 bytes of receive take 24 of payload.
        |wqe, a| wqe_with(wqe, a.sge(0, 25)),
    ];
    for (case, spoil) in lost.into_iter().enumerate() {
        let (mut fabric, mut a, mut b) = tuned_pair(QpType::Ud, |_| ());
        b.post_recv(1, &[b.sge(0, 64)]);
        let good = aim(send(Opcode::Send, a.sge(0, 24)), QpType::Ud, &b);
        let mut bad = good.clone();
        spoil(&mut bad, &a);
        a.post(&bad);
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::Success, "case {case}: sent is sent");
        assert_eq!((b.receives.pop(), b.state(&mut fabric)), (None, QpState::Rts), "case {case}");
        // Without a receive it is lost, too.
        a.post(&good);
        a.post(&good);
        turn(&mut fabric, 0);
        let got = b.receives.pop().unwrap();
        assert_eq!((got.wr_id, got.byte_len, b.receives.pop()), (1, 64, None), "case {case}");
    }
}

/// Gives a datagram another payload.
fn wqe_with(wqe: &mut SendWqe, sge: Sge) {
    let mut other = send(Opcode::Send, sge);
    (other.flags, other.address) = (wqe.flags, wqe.address);
    *wqe = other;
}

#[test]
fn a_bad_receive_ends_an_unreliable_qp_too() {
    for qp_type in [QpType::Uc, QpType::Ud] {
        let (mut fabric, mut a, mut b) = tuned_pair(qp_type, |_| ());
        b.post_recv(1, &[Sge { lkey: 9, ..b.sge(0, 64) }]);
        b.post_recv(2, &[b.sge(0, 64)]);
        a.post(&aim(send(Opcode::Send, a.sge(0, 8)), qp_type, &b));
        turn(&mut fabric, 0);
        assert_eq!(status(a.sends.pop()), WcStatus::Success, "{qp_type}");
        assert_eq!(status(b.receives.pop()), WcStatus::LocProtErr, "{qp_type}");
        assert_eq!(status(b.receives.pop()), WcStatus::WrFlushErr, "{qp_type}");
        assert_eq!((a.state(&mut fabric), b.state(&mut fabric)), (QpState::Rts, QpState::Err), "{qp_type}");
    }
}

#[test]
fn a_qkey_with_the_high_bit_stands_for_the_qps_own() {
    let (mut fabric, a, mut b) = tuned_pair(QpType::Ud, |_| ());
    b.post_recv(1, &[b.sge(0, 64)]);
    let mut wqe = aim(send(Opcode::Send, a.sge(0, 8)), QpType::Ud, &b);
    wqe.address.qkey = 0x8000_0000;
    a.post(&wqe);
    turn(&mut fabric, 0);
    assert_eq!(status(b.receives.pop()), WcStatus::Success);
}

#[test]
fn sges_that_a_message_does_not_reach_may_be_anything() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    b.post_recv(1, &[b.sge(0, 16), Sge { lkey: 9, ..b.sge(64, 16) }]);
    b.post_recv(2, &[b.sge((1 << 20) - 16, 32)]);
    a.post(&send(Opcode::Send, a.sge(0, 16)));
    a.post(&send(Opcode::Send, a.sge(0, 16)));
    turn(&mut fabric, 0);
    for _ in 0..2 {
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        assert_eq!(status(b.receives.pop()), WcStatus::Success);
    }
}

#[test]
fn empty_messages_touch_no_memory_and_need_no_keys() {
    let (mut fabric, mut a, mut b) = pair(QpType::Rc);
    b.post_recv(1, &[]);
    b.post_recv(2, &[]);
    let nothing = Sge { addr: 1, length: 0, lkey: 9 };
    for opcode in [Opcode::Write, Opcode::Read, Opcode::Send, Opcode::WriteWithImm] {
        a.post(&to(&b, opcode, nothing, 5 << 40, 9));
        turn(&mut fabric, 0);
        let done = a.sends.pop().unwrap();
        assert_eq!((done.status, done.byte_len), (0, 0), "{opcode}");
    }
    assert_eq!(b.receives.pop().map(|cqe| (cqe.wr_id, cqe.status, cqe.byte_len)), Some((1, 0, 0)));
    assert_eq!(b.receives.pop().map(|cqe| (cqe.wr_id, cqe.status, cqe.byte_len)), Some((2, 0, 0)));
}

#[test]
fn the_longest_message_is_looked_up_and_one_byte_more_is_not() {
    for (length, expected) in [(1 << 30, WcStatus::LocProtErr), ((1 << 30) + 1, WcStatus::LocLenErr)] {
        for opcode in [Opcode::Write, Opcode::Read, Opcode::Send] {
            let (mut fabric, mut a, b) = pair(QpType::Rc);
            a.post(&to(&b, opcode, a.sge(0, length), 0, b.key));
            turn(&mut fabric, 0);
            assert_eq!(status(a.sends.pop()), expected, "{opcode} of {length}");
        }
    }
}

#[test]
fn everything_posted_is_flushed_in_order_after_the_fault() {
    let (mut fabric, mut a, b) = pair(QpType::Rc);
    for wr_id in 0..4 {
        a.post_recv(wr_id, &[a.sge(0, 8)]);
        let mut wqe = to(&b, Opcode::Write, a.sge(0, 8), 0, if wr_id == 1 { 9 } else { b.key });
        (wqe.wr_id, wqe.flags) = (wr_id, 0);
        a.post(&wqe);
    }
    turn(&mut fabric, 0);
    let taken = |ring: &mut CompletionReader| -> Vec<_> {
        std::iter::from_fn(|| ring.pop()).map(|cqe| (cqe.wr_id, u32::from(cqe.status))).collect()
    };
    let flush = FLUSHED.value();
    // The first one was unsignaled; errors are told of all the same.
    assert_eq!(taken(&mut a.sends), [(1, WcStatus::RemAccessErr.value()), (2, flush), (3, flush)]);
    assert_eq!(taken(&mut a.receives), [(0, flush), (1, flush), (2, flush), (3, flush)]);
}
