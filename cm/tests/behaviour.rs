//! Promise: ports, listeners, time-outs, private data, ends of connections and of clients, quotas.

#![allow(clippy::unwrap_used, reason = "a test")]

mod bed;

use std::time::Duration;

use bed::{Bed, CHANNEL, PORT, data, ip, param, place};
use cm::{Refusal, Settings, reason, sidr, space};
use verbs_abi::proto::cm::{CmAnswer, CmOption, Command, ConnParam, EventKind};

const LONG: Duration = Duration::from_secs(120);

fn bind(bed: &mut Bed, client: u32, id: u32, address: &str) -> Result<CmAnswer, Refusal> {
    bed.ask(client, Command::Bind { id, address: ip(address) })
}

#[test]
fn only_own_addresses_can_be_bound() {
    let mut bed = Bed::new();
    let id = bed.create(1, space::TCP);
    assert_eq!(bind(&mut bed, 1, id, "10.0.0.2:7001"), Err(Refusal::AddressNotAvailable));
    assert!(bind(&mut bed, 1, id, "10.0.0.1:7001").is_ok());
}

#[test]
fn a_port_has_one_holder_in_its_namespace() {
    let mut bed = Bed::new();
    bed.open(3, place(0, 1, &["10.0.0.1", "fd00::1"]));
    let mut try_bind = |client, address: &str, reuse: bool| {
        let id = bed.create(client, space::TCP);
        bed.ask(client, Command::SetOption { id, option: CmOption::ReuseAddr(reuse) }).unwrap();
        bind(&mut bed, client, id, address).map(|_| id)
    };
    assert!(try_bind(1, "10.0.0.1:7001", false).is_ok());
    assert_eq!(try_bind(3, "10.0.0.1:7001", false), Err(Refusal::AddressInUse));
    assert_eq!(try_bind(3, "0.0.0.0:7001", false), Err(Refusal::AddressNotAvailable));
    assert!(try_bind(3, "[fd00::1]:7001", false).is_ok(), "another address");
    assert!(try_bind(2, "0.0.0.0:7001", false).is_ok(), "another namespace");
    assert!(try_bind(1, "10.0.0.1:7002", true).is_ok());
    assert_eq!(try_bind(3, "10.0.0.1:7002", false), Err(Refusal::AddressInUse), "both must agree");
    assert!(try_bind(3, "10.0.0.1:7002", true).is_ok());
}

#[test]
fn of_those_who_share_a_port_one_may_listen_if_it_is_alone() {
    let mut bed = Bed::new();
    let shared = |bed: &mut Bed| {
        let id = bed.create(1, space::TCP);
        bed.ask(1, Command::SetOption { id, option: CmOption::ReuseAddr(true) }).unwrap();
        bind(bed, 1, id, "10.0.0.1:7001").unwrap();
        id
    };
    let (a, b) = (shared(&mut bed), shared(&mut bed));
    let listen = Command::Listen { id: a, backlog: 0 };
    assert_eq!(bed.ask(1, listen.clone()), Err(Refusal::AddressInUse));
    bed.destroy(1, b);
    assert!(bed.ask(1, listen).is_ok());
}

#[test]
fn a_wildcard_takes_both_families_unless_told_otherwise() {
    for (only, kind) in [(false, EventKind::ConnectRequest), (true, EventKind::Rejected)] {
        let mut bed = Bed::new();
        let id = bed.create(1, space::TCP);
        bed.ask(1, Command::SetOption { id, option: CmOption::AfOnly(only) }).unwrap();
        bind(&mut bed, 1, id, &format!("[::]:{PORT}")).unwrap();
        bed.ask(1, Command::Listen { id, backlog: 0 }).unwrap();
        bed.asking(space::TCP);
        bed.expect(if only { 2 } else { 1 }, kind);
        let six = bed.routed(2, space::TCP, &format!("[fd00::1]:{PORT}"));
        bed.ask(2, Command::Connect { id: six, param: param(2) }).unwrap();
        bed.expect(1, EventKind::ConnectRequest);
    }
}

#[test]
fn ephemeral_ports_differ_and_run_out() {
    let mut bed = Bed::with(Settings { seed: 3, ids: 60_000, tenant_ids: 60_000, channels: 4, mtu: 5 });
    let mut ports = std::collections::BTreeSet::new();
    for round in 0.. {
        let id = bed.create(1, space::UDP);
        match bind(&mut bed, 1, id, "10.0.0.1:0") {
            Ok(_) => {
                let Ok(CmAnswer::Route(route)) = bed.ask(1, Command::Query { id }) else {
                    panic!("no route")
                };
                assert!(ports.insert(format!("{:?}", route.source)));
            }
            Err(refusal) => {
                assert_eq!((round, refusal), (61_000 - 32_768, Refusal::AddressNotAvailable));
                break;
            }
        }
    }
}

#[test]
fn an_address_that_nobody_has_is_looked_for_as_long_as_asked() {
    let mut bed = Bed::new();
    let id = bed.create(2, space::TCP);
    let destination = ip("10.0.0.9:7000");
    let resolve = Command::ResolveAddr { id, source: None, destination, timeout_ms: 500 };
    bed.ask(2, resolve.clone()).unwrap();
    bed.pass(Duration::from_millis(499));
    assert_eq!(bed.event(2), None);
    bed.pass(Duration::from_millis(1));
    assert_eq!(bed.expect(2, EventKind::AddrError).status, -110);
    bed.ask(2, resolve).unwrap();
    bed.open(9, place(0, 9, &["10.0.0.9"]));
    bed.expect(2, EventKind::AddrResolved);
    assert_eq!(bed.manager.deadline(), None);
}

#[test]
fn private_data_comes_whole_and_padded_and_too_much_is_refused() {
    for (space, lengths) in [(space::TCP, [56, 196]), (space::UDP, [180, 136])] {
        let mut bed = Bed::new();
        bed.listener(space, 0);
        let active = bed.routed(2, space, &format!("10.0.0.1:{PORT}"));
        let with = |len: usize| ConnParam { private_data: vec![7; len], ..param(2) };
        let connect = |len| Command::Connect { id: active, param: with(len) };
        assert_eq!(bed.ask(2, connect(lengths[0] + 1)), Err(Refusal::Invalid));
        bed.ask(2, connect(2)).unwrap();
        let request = bed.expect(1, EventKind::ConnectRequest);
        assert_eq!((data(&request).len(), &data(&request)[..3]), (lengths[0], &[7, 7, 0][..]));
        let accept = |len| Command::Accept { id: request.id, uid: 1, param: Some(with(len)) };
        assert_eq!(bed.ask(1, accept(lengths[1] + 1)), Err(Refusal::Invalid));
        bed.ask(1, accept(lengths[1])).unwrap();
        let reply = bed.event(2).unwrap();
        assert_eq!(data(&reply), vec![7; lengths[1]]);
    }
}

#[test]
fn a_rejection_tells_its_reason_and_its_data() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 0);
    bed.asking(space::TCP);
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    let reject = |reason, len| Command::Reject { id, reason, private_data: vec![9; len] };
    assert_eq!(bed.ask(1, reject(7, 1)), Err(Refusal::Invalid));
    assert_eq!(bed.ask(1, reject(0, 149)), Err(Refusal::Invalid));
    bed.ask(1, reject(0, 2)).unwrap();
    let event = bed.expect(2, EventKind::Rejected);
    assert_eq!(event.status, i32::from(reason::CONSUMER_DEFINED));
    assert_eq!((data(&event).len(), &data(&event)[..3]), (148, &[9, 9, 0][..]));
}

#[test]
fn datagrams_are_refused_as_unreachable() {
    let mut bed = Bed::new();
    bed.asking(space::UDP);
    assert_eq!(bed.expect(2, EventKind::Unreachable).status, i32::from(sidr::UNSUPPORTED));
    bed.listener(space::UDP, 0);
    bed.asking(space::UDP);
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    bed.ask(1, Command::Reject { id, reason: 0, private_data: vec![1] }).unwrap();
    let event = bed.expect(2, EventKind::Unreachable);
    assert_eq!((event.status, data(&event)[0]), (i32::from(sidr::REJECT), 1));
}

#[test]
fn a_request_that_is_not_answered_times_out_and_cannot_be_accepted_later() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 0);
    bed.asking(space::TCP);
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    bed.pass(LONG);
    assert_eq!(bed.expect(2, EventKind::Unreachable).status, -110);
    let accept = Command::Accept { id, uid: 1, param: Some(param(1)) };
    assert_eq!(bed.ask(1, accept), Err(Refusal::WrongState));
}

#[test]
fn an_acceptance_that_is_not_confirmed_times_out_at_both_ends() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 0);
    bed.asking(space::TCP);
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    bed.ask(1, Command::Accept { id, uid: 1, param: Some(param(1)) }).unwrap();
    bed.expect(2, EventKind::ConnectResponse);
    bed.pass(LONG);
    assert_eq!(bed.expect(1, EventKind::Unreachable).status, -110);
    bed.expect(2, EventKind::Rejected);
}

#[test]
fn each_end_hears_of_the_end_once_and_of_the_time_wait_later() {
    let mut bed = Bed::new();
    let (passive, active) = bed.connected();
    bed.ask(2, Command::Disconnect { id: active }).unwrap();
    assert_eq!(bed.event(2), None, "the other end has not answered");
    bed.expect(1, EventKind::Disconnected);
    bed.ask(1, Command::Disconnect { id: passive }).unwrap();
    bed.expect(2, EventKind::Disconnected);
    bed.ask(2, Command::Disconnect { id: active }).unwrap();
    bed.pass(LONG);
    assert_eq!(bed.kinds(1), [EventKind::TimewaitExit]);
    assert_eq!(bed.kinds(2), [EventKind::TimewaitExit]);
}

#[test]
fn both_may_leave_at_once_and_one_may_never_answer() {
    let mut bed = Bed::new();
    let (passive, active) = bed.connected();
    // Both commands before any message is delivered.
    for (client, id) in [(1, passive), (2, active)] {
        bed.manager.handle(client, CHANNEL, Command::Disconnect { id }, bed.now).unwrap();
    }
    bed.settle();
    assert_eq!(bed.kinds(1), [EventKind::Disconnected]);
    assert_eq!(bed.kinds(2), [EventKind::Disconnected]);

    let mut bed = Bed::new();
    let (_, active) = bed.connected();
    bed.ask(2, Command::Disconnect { id: active }).unwrap();
    bed.pass(LONG);
    assert_eq!(bed.expect(2, EventKind::Disconnected).status, -110);
}

#[test]
fn destroyed_ids_and_closed_clients_tell_the_other_end() {
    let ends: [fn(&mut Bed, u32); 3] = [
        |bed, id| assert_eq!(bed.destroy(1, id).1, 0),
        |bed, _| bed.manager.close_channel(1, CHANNEL),
        |bed, _| bed.manager.close(1),
    ];
    for end in ends {
        let mut bed = Bed::new();
        let (passive, _) = bed.connected();
        let asking = bed.asking(space::TCP);
        end(&mut bed, passive);
        bed.settle();
        bed.manager.close(1);
        bed.settle();
        let events: Vec<_> = std::iter::from_fn(|| bed.event(2)).collect();
        let rejected = events.iter().find(|event| event.kind == EventKind::Rejected).unwrap();
        assert_eq!((rejected.id, rejected.status), (asking, i32::from(reason::CONSUMER_DEFINED)));
        assert!(events.iter().any(|event| event.kind == EventKind::Disconnected && event.status == 0));
        assert_eq!((events.len(), bed.manager.listeners().count()), (2, 0));
    }
}

#[test]
fn queued_events_of_a_destroyed_id_are_taken_back_and_those_handed_out_are_counted() {
    let mut bed = Bed::new();
    let id = bed.routed(2, space::TCP, "10.0.0.1:7000");
    let other = bed.create(2, space::TCP);
    let destination = ip("10.0.0.1:7000");
    bed.ask(2, Command::ResolveAddr { id: other, source: None, destination, timeout_ms: 1 }).unwrap();
    bed.ask(2, Command::Connect { id, param: param(2) }).unwrap();
    assert_eq!(bed.destroy(2, id), (2, 1), "two were handed out, the rejection was not");
    assert_eq!(bed.expect(2, EventKind::AddrResolved).id, other);
    assert_eq!(bed.destroy(2, other), (1, 0));
}

#[test]
fn requests_count_for_the_listener_and_go_with_it() {
    let mut bed = Bed::new();
    let listener = bed.listener(space::TCP, 0);
    bed.asking(space::TCP);
    bed.asking(space::TCP);
    bed.expect(1, EventKind::ConnectRequest);
    assert_eq!(bed.destroy(1, listener), (1, 1));
    assert_eq!(bed.kinds(2), [EventKind::Rejected], "the one that was handed out still lives");
    assert_eq!(bed.manager.id_count(1), 1);
}

#[test]
fn what_is_kept_for_a_reader_counts_as_handed_out_and_is_not_taken_back() {
    let mut bed = Bed::new();
    let listener = bed.listener(space::TCP, 0);
    (0..3).for_each(|_| _ = bed.asking(space::TCP));
    let destroy = Command::DestroyId { id: listener };
    assert_eq!(bed.manager.revocable(1, CHANNEL, &destroy), Some((CHANNEL, 3)));
    bed.manager.keep(1, CHANNEL, &destroy, 2);
    assert_eq!(bed.manager.revocable(1, CHANNEL, &destroy), Some((CHANNEL, 1)));
    assert_eq!(bed.destroy(1, listener), (2, 1));
    assert_eq!(bed.manager.revocable(1, CHANNEL, &destroy), None, "it is gone");
    assert_eq!(bed.kinds(2), [EventKind::Rejected], "the others are still asked");
    let request = bed.expect(1, EventKind::ConnectRequest);
    let accept = Command::Accept { id: request.id, uid: 1, param: Some(param(1)) };
    assert!(bed.ask(1, accept).is_ok());
    assert_eq!(bed.kinds(1), [EventKind::ConnectRequest]);
}

#[test]
fn an_id_that_migrates_leaves_what_is_kept_for_a_reader_of_its_old_channel() {
    let mut bed = Bed::new();
    let listener = bed.listener(space::TCP, 0);
    (0..2).for_each(|_| _ = bed.asking(space::TCP));
    bed.manager.open_channel(1, 2).unwrap();
    let migrate = Command::MigrateId { id: listener, from: CHANNEL };
    assert_eq!(bed.manager.revocable(1, 2, &migrate), Some((CHANNEL, 2)));
    bed.manager.keep(1, 2, &migrate, 1);
    let moved = bed.manager.handle(1, 2, migrate, bed.now);
    assert_eq!(moved, Ok(CmAnswer::Reported { events: 1, revoked: 1 }));
    assert_eq!(bed.kinds(1), [EventKind::ConnectRequest]);
}

#[test]
fn no_more_is_kept_than_threads_may_read() {
    let mut bed = Bed::new();
    for _ in 0..100 {
        let id = bed.create(2, space::TCP);
        let destination = ip("10.0.0.1:7000");
        bed.ask(2, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1 }).unwrap();
        let destroy = Command::DestroyId { id };
        bed.manager.keep(2, CHANNEL, &destroy, 1);
        bed.destroy(2, id);
    }
    assert_eq!(bed.kinds(2).len(), 64);
}

#[test]
fn requests_beyond_the_backlog_wait_for_room_in_their_order() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 2);
    let asking: Vec<u32> = (0..5).map(|_| bed.asking(space::TCP)).collect();
    assert_eq!(bed.manager.take_rings().iter().filter(|ring| ring.0 == 1).count(), 2);
    bed.destroy(2, asking[3]);
    let accepted: Vec<u32> = (0..4).map(|_| bed.expect(1, EventKind::ConnectRequest).id).collect();
    assert_eq!(bed.event(1), None, "who gave up is not heard of");
    for (passive, active) in accepted.iter().zip([0, 1, 2, 4]) {
        bed.ask(1, Command::Accept { id: *passive, uid: 1, param: Some(param(1)) }).unwrap();
        assert_eq!(bed.expect(2, EventKind::ConnectResponse).id, asking[active]);
    }
}

#[test]
fn a_flood_of_requests_is_bounded_and_harms_no_other_listener() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 4);
    for _ in 0..2000 {
        bed.asking(space::TCP);
        while bed.event(2).is_some_and(|event| {
            assert_eq!(event.status, i32::from(reason::NO_RESOURCES));
            true
        }) {}
    }
    assert!(bed.manager.id_count(1) <= 6, "{} ids were made for requests", bed.manager.id_count(1));
    bed.open(3, place(0, 3, &["10.0.0.3"]));
    let id = bed.create(3, space::TCP);
    bind(&mut bed, 3, id, "10.0.0.3:7000").unwrap();
    bed.ask(3, Command::Listen { id, backlog: 1 }).unwrap();
    let asking = bed.routed(2, space::TCP, "10.0.0.3:7000");
    bed.ask(2, Command::Connect { id: asking, param: param(2) }).unwrap();
    bed.expect(3, EventKind::ConnectRequest);
}

#[test]
fn a_request_between_two_listeners_of_one_port_waits_for_the_second() {
    let mut bed = Bed::new();
    let first = bed.listener(space::TCP, 0);
    bed.destroy(1, first);
    let (asking, given_up) = (bed.asking(space::TCP), bed.asking(space::TCP));
    bed.destroy(2, given_up);
    bed.pass(Duration::from_millis(100));
    assert_eq!(bed.event(2), None);
    bed.listener(space::TCP, 0);
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    assert_eq!(bed.event(1), None, "who gave up is not heard of");
    bed.ask(1, Command::Accept { id, uid: 1, param: Some(param(1)) }).unwrap();
    assert_eq!(bed.expect(2, EventKind::ConnectResponse).id, asking);
}

#[test]
fn a_request_after_the_last_listener_is_refused_a_little_later() {
    let mut bed = Bed::new();
    let first = bed.listener(space::TCP, 0);
    bed.destroy(1, first);
    bed.pass(Duration::from_millis(1900));
    bed.asking(space::TCP);
    bed.pass(Duration::from_millis(200));
    assert_eq!(bed.expect(2, EventKind::Rejected).status, i32::from(reason::INVALID_SERVICE_ID));
    bed.asking(space::TCP);
    bed.expect(2, EventKind::Rejected);
}

#[test]
fn a_request_to_a_port_that_is_bound_waits_a_little_for_its_listener() {
    let mut bed = Bed::new();
    let listener = bed.create(1, space::TCP);
    bind(&mut bed, 1, listener, "0.0.0.0:7000").unwrap();
    let asking = bed.asking(space::TCP);
    bed.pass(Duration::from_millis(100));
    assert_eq!(bed.event(2), None);
    bed.ask(1, Command::Listen { id: listener, backlog: 0 }).unwrap();
    let id = bed.expect(1, EventKind::ConnectRequest).id;
    bed.ask(1, Command::Accept { id, uid: 1, param: Some(param(1)) }).unwrap();
    assert_eq!(bed.expect(2, EventKind::ConnectResponse).id, asking);
}

#[test]
fn a_bound_port_whose_holder_never_listens_refuses_a_little_later_and_no_other_does() {
    let mut bed = Bed::new();
    let holder = bed.create(1, space::TCP);
    bind(&mut bed, 1, holder, "10.0.0.1:7000").unwrap();
    bed.asking(space::UDP);
    bed.expect(2, EventKind::Unreachable);
    bed.asking(space::TCP);
    assert_eq!(bed.event(2), None);
    bed.pass(Duration::from_millis(2100));
    assert_eq!(bed.expect(2, EventKind::Rejected).status, i32::from(reason::INVALID_SERVICE_ID));
    bed.destroy(1, holder);
    bed.asking(space::TCP);
    bed.expect(2, EventKind::Rejected);
}

#[test]
fn ids_and_channels_have_a_quota() {
    let mut bed = Bed::with(Settings { seed: 1, ids: 3, tenant_ids: 6, channels: 2, mtu: 5 });
    let ids: Vec<u32> = (0..3).map(|_| bed.create(1, space::TCP)).collect();
    let create = Command::CreateId { uid: 1, space: space::TCP, qp_type: 2 };
    assert_eq!(bed.ask(1, create.clone()), Err(Refusal::TooMany));
    bed.destroy(1, ids[1]);
    assert_eq!(bed.ask(1, create), Ok(CmAnswer::Id(ids[1])), "the lowest free number");
    let of_others = (0..3).map(|_| bed.create(2, space::TCP)).count();
    bed.open(3, place(0, 3, &["10.0.0.3"]));
    let create = Command::CreateId { uid: 1, space: space::TCP, qp_type: 2 };
    assert_eq!((of_others, bed.ask(3, create)), (3, Err(Refusal::TooMany)), "the tenant has six");
    bed.open(4, place(1, 4, &["10.0.0.4"]));
    bed.create(4, space::TCP);
    bed.manager.open_channel(1, 8).unwrap();
    assert_eq!(bed.manager.open_channel(1, 9), Err(Refusal::TooMany));
}

#[test]
fn tenants_do_not_see_each_other() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 0);
    bed.open(3, place(1, 1, &["10.0.0.1", "10.0.0.3"]));
    // Its own tenant has this address as well, and nobody there listens.
    let id = bed.routed(3, space::TCP, &format!("10.0.0.1:{PORT}"));
    bed.ask(3, Command::Connect { id, param: param(3) }).unwrap();
    assert_eq!(bed.expect(3, EventKind::Rejected).status, i32::from(reason::INVALID_SERVICE_ID));
    let id = bed.create(3, space::TCP);
    let destination = ip("10.0.0.2:1");
    bed.ask(3, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1 }).unwrap();
    bed.pass(LONG);
    bed.expect(3, EventKind::AddrError);
    assert_eq!(bed.event(1), None);
}

#[test]
fn loopback_addresses_lead_to_the_own_namespace() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 0);
    let to = format!("127.0.0.1:{PORT}");
    let id = bed.routed(2, space::TCP, &to);
    bed.ask(2, Command::Connect { id, param: param(2) }).unwrap();
    bed.expect(2, EventKind::Rejected);
    bed.open(3, place(0, 1, &["10.0.0.1"]));
    let id = bed.routed(3, space::TCP, &to);
    bed.ask(3, Command::Connect { id, param: param(3) }).unwrap();
    bed.expect(1, EventKind::ConnectRequest);
}

#[test]
fn an_id_takes_its_events_to_another_channel() {
    let mut bed = Bed::new();
    let listener = bed.listener(space::TCP, 0);
    bed.asking(space::TCP);
    bed.manager.take_rings();
    bed.manager.open_channel(1, 2).unwrap();
    let moved = bed.manager.handle(1, 2, Command::MigrateId { id: listener, from: CHANNEL }, bed.now);
    assert_eq!(moved, Ok(CmAnswer::Reported { events: 0, revoked: 1 }));
    assert_eq!(bed.manager.take_rings(), [(1, 2)]);
    assert_eq!(bed.event(1), None);
    let event = bed.manager.handle(1, 2, Command::NextEvent, bed.now);
    let Ok(CmAnswer::Event(Some(event))) = event else { panic!("{event:?}") };
    let accept = Command::Accept { id: event.id, uid: 1, param: Some(param(1)) };
    assert!(bed.manager.handle(1, 2, accept, bed.now).is_ok(), "the new id is on the new channel");
}

#[test]
fn each_queued_event_rings_once() {
    let mut bed = Bed::new();
    bed.routed(2, space::TCP, "10.0.0.1:7000");
    assert_eq!(bed.manager.take_rings(), [(2, CHANNEL), (2, CHANNEL)]);
    assert!(bed.manager.take_rings().is_empty());
}

#[test]
fn a_message_of_somebody_else_is_not_believed() {
    let mut bed = Bed::new();
    let (passive, _) = bed.connected();
    bed.open(3, place(0, 3, &["10.0.0.3"]));
    let id = bed.routed(3, space::TCP, &format!("10.0.0.1:{PORT}"));
    bed.manager.handle(3, CHANNEL, Command::Connect { id, param: param(3) }, bed.now).unwrap();
    let honest = bed.manager.next_message().unwrap();
    // Whoever guesses the name of an end is still not its peer.
    for serial in 0..20 {
        let to = cm::CommId { host: 0, serial };
        for body in [cm::Body::DisconnectRequest { to }, cm::Body::ReadyToUse { to }] {
            let forged = cm::Message { body, ..honest.clone() };
            bed.manager.receive(forged, bed.now);
            while bed.manager.next_message().is_some() {}
        }
    }
    assert_eq!(bed.event(1), None);
    assert_eq!(bed.event(2), None);
    assert!(bed.ask(1, Command::Disconnect { id: passive }).is_ok());
    bed.expect(2, EventKind::Disconnected);
}

#[test]
fn an_event_tells_what_would_be_asked_next() {
    let mut bed = Bed::new();
    bed.listener(space::TCP, 8);
    let check = |bed: &mut Bed, client: u32, kind: EventKind, states: &[u32]| {
        let event = bed.expect(client, kind);
        let id = event.id;
        let known = event.known.unwrap();
        let route = known.route.map(CmAnswer::Route);
        assert_eq!(route, bed.ask(client, Command::Query { id }).ok(), "{kind:?}");
        let told: Vec<_> = known.attrs.iter().map(|(_, attr)| attr.qp_state).collect();
        assert_eq!(told, states, "{kind:?}");
        for (mask, attr) in known.attrs {
            let asked = bed.ask(client, Command::InitQpAttr { id, state: attr.qp_state });
            assert_eq!(asked, Ok(CmAnswer::QpAttr { mask, attr }), "{kind:?}");
        }
        id
    };
    let (init, all) = (&[1][..], &[1, 2, 3][..]);
    let active = bed.create(2, space::TCP);
    let destination = ip(&format!("10.0.0.1:{PORT}"));
    let resolve = Command::ResolveAddr { id: active, source: None, destination, timeout_ms: 1000 };
    bed.ask(2, resolve).unwrap();
    check(&mut bed, 2, EventKind::AddrResolved, init);
    bed.ask(2, Command::ResolveRoute { id: active }).unwrap();
    check(&mut bed, 2, EventKind::RouteResolved, init);
    bed.ask(2, Command::Connect { id: active, param: param(2) }).unwrap();
    let passive = check(&mut bed, 1, EventKind::ConnectRequest, all);
    bed.ask(1, Command::Accept { id: passive, uid: 5, param: Some(param(1)) }).unwrap();
    check(&mut bed, 2, EventKind::ConnectResponse, all);
    bed.ask(2, Command::Accept { id: active, uid: 0, param: None }).unwrap();
    assert_eq!(bed.expect(1, EventKind::Established).known, None);
}

#[test]
fn each_end_of_an_xrc_connection_has_the_attributes_of_its_half() {
    // `enum ibv_qp_type`, then the masks that Linux gives for RTR and RTS (`cm_init_qp_rtr_attr`, `_rts_attr`).
    let (receives, sends) = ((10, [0x12_9181, 0x1_0201]), (9, [0x10_1181, 0x1_2e01]));
    let mut bed = Bed::new();
    let create = |bed: &mut Bed, client, qp_type| match bed
        .ask(client, Command::CreateId { uid: 7, space: space::IB, qp_type })
    {
        Ok(CmAnswer::Id(id)) => id,
        other => panic!("{other:?}"),
    };
    let id = create(&mut bed, 1, receives.0);
    bind(&mut bed, 1, id, &format!("0.0.0.0:{PORT}")).unwrap();
    bed.ask(1, Command::Listen { id, backlog: 0 }).unwrap();
    let id = create(&mut bed, 2, sends.0);
    let destination = ip(&format!("10.0.0.1:{PORT}"));
    bed.ask(2, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 }).unwrap();
    bed.ask(2, Command::ResolveRoute { id }).unwrap();
    bed.ask(2, Command::Connect { id, param: param(2) }).unwrap();
    bed.kinds(2);
    let passive = bed.expect(1, EventKind::ConnectRequest).id;
    for (client, id, (_, masks)) in [(1, passive, receives), (2, id, sends)] {
        for (state, wanted) in [2, 3].into_iter().zip(masks) {
            let answer = bed.ask(client, Command::InitQpAttr { id, state });
            let Ok(CmAnswer::QpAttr { mask, .. }) = answer else { panic!("{answer:?}") };
            assert_eq!(mask, wanted, "client {client}, state {state}");
        }
    }
}
