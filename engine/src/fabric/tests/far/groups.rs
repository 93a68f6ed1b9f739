//! Groups with members on both hosts: who gets what, and what routers must know of each other for that.

use super::*;

fn group(number: u8) -> Gid {
    std::array::from_fn(|i| match i {
        0 => 0xff,
        15 => number,
        _ => 0,
    })
}

/// A QP for datagrams on a host.
fn ud(hosts: &mut Hosts, host: usize, tenant: u32, client: u32) -> App {
    let fabric = &mut hosts.fabrics[host];
    let app = App::in_tenant(tenant, fabric, client, QpType::Ud, Mode::Isolated);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        fabric_modify(fabric, (app.client, app.qpn), state, (0, 0), QpType::Ud);
    }
    app.post_recv(7, &[app.sge(0, 100)]);
    app
}

fn attach(hosts: &mut Hosts, host: usize, app: &App) {
    assert_eq!(hosts.fabrics[host].attach(app.client, app.qpn, &group(1)), Ok(true));
    hosts.settle();
}

fn post(from: &mut App, number: u8, text: &[u8]) {
    from.bytes()[8192..8192 + text.len()].copy_from_slice(text);
    let mut wqe = send(Opcode::Send, from.sge(8192, text.len() as u32));
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: group(number), qpn: 0x00ff_ffff, qkey: 0x11, ..Address::default() };
    from.post(&wqe);
}

/// What an app has received, once.
fn received(app: &mut App) -> Option<Vec<u8>> {
    let done = app.receives.pop()?;
    let length = done.byte_len as usize;
    let text = app.bytes()[40..length].to_vec();
    app.post_recv(7, &[app.sge(0, 100)]);
    Some(text)
}

#[test]
fn members_on_the_other_host_get_it_once_each_and_nobody_else() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let mut sender = ud(&mut hosts, 0, 0, 1);
    let mut near = ud(&mut hosts, 0, 0, 2);
    let mut far: Vec<App> = (11..14).map(|client| ud(&mut hosts, 1, 0, client)).collect();
    let mut stranger = ud(&mut hosts, 1, 1, 15);
    attach(&mut hosts, 0, &near);
    // One is in no group.
    [0, 1].into_iter().for_each(|at| attach(&mut hosts, 1, &far[at]));
    attach(&mut hosts, 1, &stranger);
    post(&mut sender, 1, b"hello");
    hosts.settle();
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    for member in std::iter::once(&mut near).chain(&mut far[..2]) {
        assert_eq!(received(member).as_deref(), Some(&b"hello"[..]));
        assert_eq!(received(member), None);
    }
    assert_eq!((received(&mut far[2]), received(&mut stranger), received(&mut sender)), (None, None, None));
    // Nobody is left there: nothing is sent.
    for app in &far[..2] {
        hosts.fabrics[1].detach(app.client, app.qpn, &group(1)).unwrap();
    }
    hosts.settle();
    let before = hosts.sent;
    post(&mut sender, 1, b"again");
    hosts.settle();
    assert_eq!(received(&mut near).as_deref(), Some(&b"again"[..]));
    assert_eq!(hosts.sent, before);
}

#[test]
fn a_sender_is_told_by_the_router_whose_members_came_before_there_was_a_link() {
    let mut hosts = Hosts::new();
    let mut member = ud(&mut hosts, 1, 0, 11);
    assert_eq!(hosts.fabrics[1].attach(11, member.qpn, &group(1)), Ok(true));
    assert_eq!(hosts.fabrics[1].next_call(), Some(STREAM), "it wants to tell");
    hosts.connect();
    hosts.settle();
    let mut sender = ud(&mut hosts, 0, 0, 1);
    post(&mut sender, 1, b"one");
    hosts.settle();
    assert_eq!(received(&mut member).as_deref(), Some(&b"one"[..]));
    // While the link is away for good, what is sent is lost; over the next one it is known anew.
    hosts.cut();
    post(&mut sender, 1, b"two");
    hosts.settle();
    assert_eq!(status(sender.sends.pop()), WcStatus::Success);
    hosts.fabrics[1].detach(11, member.qpn, &group(1)).unwrap();
    hosts.connect();
    hosts.settle();
    let before = hosts.sent;
    post(&mut sender, 1, b"three");
    hosts.settle();
    assert_eq!((received(&mut member), hosts.sent), (None, before));
}

#[test]
fn a_router_that_serves_nobody_of_the_tenant_gets_nothing_of_it() {
    let mut hosts = Hosts::new();
    // Both have the tenant, but the directory knows no address of it over there.
    hosts.up = true;
    hosts.fabrics.iter_mut().for_each(|fabric| fabric.link_up(STREAM, 1, HashMap::from([(5, 5)])));
    let mut member = ud(&mut hosts, 1, 5, 11);
    let mut sender = ud(&mut hosts, 0, 5, 1);
    attach(&mut hosts, 1, &member);
    let path = Path { tenant: 5, source_qpn: 0, target_qpn: 0, sgid: [0; 16], dgid: group(1) };
    let claim = Header::new(Kind::Member, 1, &path, 0, 0).encode();
    hosts.fabrics[0].receive(PEER, &claim, 0).unwrap();
    post(&mut sender, 1, b"secret");
    hosts.settle();
    assert_eq!((received(&mut member), hosts.sent), (None, 0));
}

#[test]
fn a_datagram_to_a_group_comes_from_an_address_of_its_router() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let mut member = ud(&mut hosts, 1, 0, 11);
    attach(&mut hosts, 1, &member);
    for (source, arrives) in [(gid(1), true), (gid(12), false)] {
        let path = Path { tenant: 0, source_qpn: 9, target_qpn: 0x00ff_ffff, sgid: source, dgid: group(1) };
        let mut header = Header::new(Kind::Datagram, Opcode::Send.value() as u8, &path, 0, 0);
        (header.len, header.total, header.rkey) = (2, 2, 0x11);
        let packet = [&header.encode()[..], b"hi"].concat();
        hosts.fabrics[1].receive(PEER, &packet, 0).unwrap();
        hosts.settle();
        assert_eq!(received(&mut member).is_some(), arrives, "{source:?}");
    }
}

#[test]
fn a_large_group_gets_it_in_many_turns_and_each_member_once() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let mut members: Vec<App> = (11..20)
        .flat_map(|client| std::iter::repeat_n(client, 1))
        .chain(1000..1200)
        .map(|client| ud(&mut hosts, 1, 0, client))
        .collect();
    for app in &members {
        hosts.fabrics[1].attach(app.client, app.qpn, &group(1)).unwrap();
    }
    hosts.settle();
    let mut sender = ud(&mut hosts, 0, 0, 1);
    for text in [&b"one"[..], b"two", b"three"] {
        post(&mut sender, 1, text);
        hosts.settle();
        for member in &mut members {
            assert_eq!(received(member).as_deref(), Some(text), "client {}", member.client);
            assert_eq!(received(member), None);
        }
    }
}

#[test]
fn a_router_that_takes_nothing_holds_senders_up_for_a_moment_only() {
    let mut hosts = Hosts::new();
    hosts.connect();
    let member = ud(&mut hosts, 1, 0, 11);
    let mut near = ud(&mut hosts, 0, 0, 2);
    attach(&mut hosts, 1, &member);
    attach(&mut hosts, 0, &near);
    let mut sender = ud(&mut hosts, 0, 0, 1);
    // Nobody takes what the first host sends.
    hosts.up = false;
    let mut sent = 0;
    for _ in 0..10_000 {
        post(&mut sender, 1, &[7; 60]);
        turn(&mut hosts.fabrics[0], hosts.now);
        if sender.sends.pop().is_none() {
            break;
        }
        sent += 1;
    }
    assert!((1000..9000).contains(&sent), "{sent} before it must wait");
    let start = hosts.now;
    while sender.sends.pop().is_none() {
        hosts.now = hosts.fabrics[0].next_timer().expect("it does not wait for ever");
        turn(&mut hosts.fabrics[0], hosts.now);
    }
    assert!(hosts.now - start <= 100_000_000, "{} ns", hosts.now - start);
    // From now on that router's copies are lost at once.
    for _ in 0..100 {
        while received(&mut near).is_some() {}
        post(&mut sender, 1, &[8; 60]);
        turn(&mut hosts.fabrics[0], hosts.now);
        assert_eq!(status(sender.sends.pop()), WcStatus::Success);
        assert_eq!(received(&mut near).as_deref(), Some(&[8; 60][..]));
    }
}

#[test]
fn what_a_router_tells_is_bounded() {
    let mut hosts = Hosts::new();
    hosts.connect();
    for number in 0..40_000_u32 {
        let mut dgid = group(1);
        dgid[4..8].copy_from_slice(&number.to_be_bytes());
        let path = Path { tenant: 0, source_qpn: 0, target_qpn: 0, sgid: [0; 16], dgid };
        for code in [1, 1, 77] {
            let packet = Header::new(Kind::Member, code, &path, 0, 0).encode();
            hosts.fabrics[0].receive(PEER, &packet, 0).unwrap();
        }
    }
    assert!(hosts.fabrics[0].elsewhere.len() <= 16 * 1024);
    hosts.connect();
    assert_eq!(hosts.fabrics[0].elsewhere.len(), 0, "a new link begins anew");
}
