//! Multicast groups: who gets what is sent to one, and who does not.

use super::*;

/// A group, by its number.
fn group(number: u8) -> Gid {
    std::array::from_fn(|i| match i {
        0 => 0xff,
        15 => number,
        _ => 0,
    })
}

fn ud(fabric: &mut Fabric<TestMemory>, tenant: u32, client: u32) -> App {
    let app = App::in_tenant(tenant, fabric, client, QpType::Ud, Mode::Isolated);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        fabric_modify(fabric, (app.client, app.qpn), state, (0, 0), QpType::Ud);
    }
    app
}

fn to_group(from: &App, number: u8, len: u32) -> SendWqe {
    to_group_from(number, from.sge(8192, len))
}

fn to_group_from(number: u8, sge: Sge) -> SendWqe {
    let mut wqe = send(Opcode::Send, sge);
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: group(number), qpn: 0x00ff_ffff, qkey: 0x11, ..Address::default() };
    wqe
}

fn attach(fabric: &mut Fabric<TestMemory>, app: &App, number: u8) {
    assert_eq!(fabric.attach(app.client, app.qpn, &group(number)), Ok(true));
}

/// What lies behind the header in the receive that `app` posted at its buffer's start.
fn payload(app: &mut App, len: usize) -> &[u8] {
    &app.bytes()[40..40 + len]
}

#[test]
fn every_member_of_the_tenant_gets_it_and_nobody_else() {
    let mut fabric = Fabric::new();
    let mut apps: Vec<App> = (1..=5).map(|client| ud(&mut fabric, 0, client)).collect();
    let mut stranger = ud(&mut fabric, 1, 6);
    // The sender, two others, one of another tenant; one is in another group, one in none.
    [0, 1, 2].into_iter().for_each(|at| attach(&mut fabric, &apps[at], 1));
    attach(&mut fabric, &stranger, 1);
    attach(&mut fabric, &apps[3], 2);
    apps.iter().for_each(|app| app.post_recv(7, &[app.sge(0, 100)]));
    stranger.post_recv(7, &[stranger.sge(0, 100)]);
    apps[0].bytes()[8192..8197].copy_from_slice(b"hello");
    apps[0].post(&to_group(&apps[0], 1, 5));
    turn(&mut fabric, 0);
    assert_eq!(status(apps[0].sends.pop()), WcStatus::Success);
    let source = apps[0].qpn;
    for app in &mut apps[..3] {
        let got = app.receives.pop().expect("a member's receive");
        assert_eq!((got.wr_id, got.byte_len, got.src_qp), (7, 45, source));
        assert_eq!(u32::from(got.flags) & WcFlags::GRH.bits(), WcFlags::GRH.bits());
        assert_eq!(app.bytes()[24..40], group(1), "the header's destination is the group");
        assert_eq!(payload(app, 5), b"hello");
        assert_eq!(app.receives.pop(), None, "once");
    }
    assert_eq!((apps[3].receives.pop(), apps[4].receives.pop(), stranger.receives.pop()), (None, None, None));
}

#[test]
fn a_member_that_cannot_take_it_costs_the_others_nothing() {
    let mut fabric = Fabric::new();
    let mut apps: Vec<App> = (1..=4).map(|client| ud(&mut fabric, 0, client)).collect();
    apps.iter().for_each(|app| attach(&mut fabric, app, 1));
    // The second has no receive, the third one that is too short.
    apps[0].post_recv(1, &[apps[0].sge(0, 100)]);
    apps[2].post_recv(1, &[apps[2].sge(0, 41)]);
    apps[3].post_recv(1, &[apps[3].sge(0, 100)]);
    apps[1].post(&to_group(&apps[1], 1, 5));
    turn(&mut fabric, 0);
    assert_eq!(status(apps[1].sends.pop()), WcStatus::Success);
    let got: Vec<bool> = apps.iter_mut().map(|app| app.receives.pop().is_some()).collect();
    assert_eq!(got, [true, false, false, true]);
}

#[test]
fn a_sender_whose_own_receive_is_bad_fails_and_what_it_sent_is_flushed_once() {
    let mut fabric = Fabric::new();
    let mut a = ud(&mut fabric, 0, 1);
    let mut b = ud(&mut fabric, 0, 2);
    attach(&mut fabric, &a, 1);
    attach(&mut fabric, &b, 1);
    a.post_recv(1, &[Sge { addr: a.addr(), length: 100, lkey: 1 }]);
    b.post_recv(1, &[b.sge(0, 100)]);
    a.post(&to_group(&a, 1, 5));
    a.post(&to_group(&a, 1, 5));
    turn(&mut fabric, 0);
    assert_eq!(a.state(&mut fabric), QpState::Err);
    assert_eq!(status(a.receives.pop()), WcStatus::LocProtErr);
    assert_eq!([status(a.sends.pop()), status(a.sends.pop())], [WcStatus::WrFlushErr; 2]);
    assert_eq!((a.sends.pop(), b.receives.pop()), (None, None));
}

#[test]
fn a_large_group_gets_it_in_many_turns_and_each_member_once() {
    const MEMBERS: usize = 80;
    let mut fabric = Fabric::new();
    let mut apps: Vec<App> = (1..=MEMBERS as u32).map(|client| ud(&mut fabric, 0, client)).collect();
    // Numbers and places of their own order.
    for app in apps.iter().rev() {
        attach(&mut fabric, app, 1);
        app.post_recv(1, &[app.sge(4096, 2048)]);
        app.post_recv(2, &[app.sge(8192, 2048)]);
    }
    apps[3].post(&to_group(&apps[3], 1, 1000));
    fabric.collect();
    fabric.run(0);
    assert_eq!(apps[3].sends.pop(), None, "one round is not enough");
    // One that is behind leaves meanwhile, one that was served as well.
    for gone in [0, MEMBERS - 1] {
        fabric.detach(apps[gone].client, apps[gone].qpn, &group(1)).unwrap();
    }
    turn(&mut fabric, 0);
    assert_eq!(status(apps[3].sends.pop()), WcStatus::Success);
    let counts: Vec<usize> =
        apps.iter_mut().map(|app| std::iter::from_fn(|| app.receives.pop()).count()).collect();
    assert_eq!(counts[MEMBERS - 1], 0);
    assert!(counts[..MEMBERS - 1].iter().all(|count| *count == 1), "{counts:?}");
}

#[test]
fn a_payload_in_foreign_memory_is_read_once_for_all() {
    let mut fabric = Fabric::new();
    let mut apps: Vec<App> = (1..=3).map(|client| ud(&mut fabric, 0, client)).collect();
    apps.iter().for_each(|app| attach(&mut fabric, app, 1));
    apps.iter().for_each(|app| app.post_recv(1, &[app.sge(8192, 100)]));
    // The first page's part of the buffer is not mapped.
    apps[0].bytes()[..5].copy_from_slice(b"edges");
    apps[0].post(&to_group_from(1, apps[0].sge(0, 5)));
    let accesses = turn_without_accesses(&mut fabric, 0);
    assert_eq!(accesses.len(), 1);
    accesses.into_iter().for_each(|access| perform(&mut fabric, access));
    assert!(turn_without_accesses(&mut fabric, 0).is_empty());
    assert_eq!(status(apps[0].sends.pop()), WcStatus::Success);
    for app in &mut apps {
        assert_eq!(status(app.receives.pop()), WcStatus::Success);
        assert_eq!(&app.bytes()[8232..8237], b"edges");
    }
}

#[test]
fn attachments_are_counted_refused_and_given_up() {
    let (mut fabric, rc, _) = pair(QpType::Rc);
    let a = ud(&mut fabric, 0, 3);
    assert_eq!(fabric.attach(rc.client, rc.qpn, &group(1)), Err(22), "not UD");
    assert_eq!(fabric.attach(a.client, a.qpn, &gid(1)), Err(22), "no group");
    assert_eq!(fabric.attach(rc.client, a.qpn, &group(1)), Err(2), "another's QP");
    assert_eq!(fabric.detach(a.client, a.qpn, &group(1)), Err(22), "not attached");
    attach(&mut fabric, &a, 1);
    assert_eq!(fabric.attach(a.client, a.qpn, &group(1)), Ok(false));
    attach(&mut fabric, &a, 2);
    assert_eq!(fabric.destroy_qp(a.client, a.qpn).unwrap_err(), 16);
    assert_eq!(fabric.detach(a.client, a.qpn, &group(1)), Ok(()));
    assert_eq!(fabric.destroy_qp(a.client, a.qpn).unwrap_err(), 16);
    fabric.close(a.client);
    assert_eq!(fabric.groups.len(), 0, "a client that ends leaves its groups");
}

#[test]
fn a_sender_that_does_not_want_its_own_gets_what_others_send() {
    let mut fabric = Fabric::new();
    let mut apps: Vec<App> = (1..=2).map(|client| ud(&mut fabric, 0, client)).collect();
    apps.iter().for_each(|app| attach(&mut fabric, app, 1));
    let at = fabric.qpn_index[&apps[0].qpn];
    fabric.qps[at].as_mut().unwrap().create.block_self_mcast = true;
    for sender in [0, 1] {
        apps.iter().for_each(|app| app.post_recv(1, &[app.sge(0, 100)]));
        apps[sender].post(&to_group(&apps[sender], 1, 5));
        turn(&mut fabric, 0);
        assert_eq!(status(apps[sender].sends.pop()), WcStatus::Success);
        assert_eq!(apps[0].receives.pop().is_some(), sender == 1);
        assert!(apps[1].receives.pop().is_some());
    }
}
