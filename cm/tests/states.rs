//! Promise: every command is taken in the states in which Linux takes it, and in no other.

#![allow(clippy::unwrap_used, reason = "a test")]

mod bed;

use bed::{Bed, PORT, ip, param};
use cm::{Refusal, space};
use verbs_abi::proto::cm::{CmOption, Command, EventKind};

/// How an id gets into a state, and whose it is then.
type Way = fn(&mut Bed) -> (u32, u32);

const STATES: &[(&str, Way)] = &[
    ("idle", |bed| (2, bed.create(2, space::TCP))),
    ("bound", |bed| {
        let id = bed.create(2, space::TCP);
        bed.ask(2, Command::Bind { id, address: ip("10.0.0.2:7001") }).unwrap();
        (2, id)
    }),
    ("resolving", |bed| {
        let id = bed.create(2, space::TCP);
        let destination = ip("10.0.0.99:1");
        bed.ask(2, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 }).unwrap();
        (2, id)
    }),
    ("resolved", |bed| {
        let id = bed.create(2, space::TCP);
        let destination = ip("10.0.0.1:7000");
        bed.ask(2, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 }).unwrap();
        bed.expect(2, EventKind::AddrResolved);
        (2, id)
    }),
    ("routed", |bed| (2, bed.routed(2, space::TCP, "10.0.0.1:7000"))),
    ("listening", |bed| (1, bed.listener(space::TCP, 0))),
    ("asking", |bed| {
        bed.listener(space::TCP, 0);
        (2, bed.asking(space::TCP))
    }),
    ("asked", |bed| {
        bed.listener(space::TCP, 0);
        bed.asking(space::TCP);
        (1, bed.expect(1, EventKind::ConnectRequest).id)
    }),
    ("accepting", |bed| {
        bed.listener(space::TCP, 0);
        bed.asking(space::TCP);
        let id = bed.expect(1, EventKind::ConnectRequest).id;
        bed.ask(1, Command::Accept { id, uid: 5, param: Some(param(1)) }).unwrap();
        (1, id)
    }),
    ("accepted", |bed| {
        bed.listener(space::TCP, 0);
        let active = bed.asking(space::TCP);
        let id = bed.expect(1, EventKind::ConnectRequest).id;
        bed.ask(1, Command::Accept { id, uid: 5, param: Some(param(1)) }).unwrap();
        (2, active)
    }),
    ("established", |bed| (2, bed.connected().1)),
    ("leaving", |bed| {
        let (_, id) = bed.connected();
        bed.ask(2, Command::Disconnect { id }).unwrap();
        (2, id)
    }),
    ("left", |bed| {
        let (id, active) = bed.connected();
        bed.ask(2, Command::Disconnect { id: active }).unwrap();
        (1, id)
    }),
    ("rejected", |bed| {
        let id = bed.asking(space::TCP);
        bed.expect(2, EventKind::Rejected);
        (2, id)
    }),
];

fn check(name: &str, command: fn(u32) -> Command, good: &[&str]) {
    for (state, way) in STATES {
        let mut bed = Bed::new();
        let (client, id) = way(&mut bed);
        let answer = bed.ask(client, command(id));
        assert_eq!(answer.is_ok(), good.contains(state), "{name} of an id that is {state}: {answer:?}");
        bed.destroy(client, id);
    }
}

const ALL: &[&str] = &[
    "idle",
    "bound",
    "resolving",
    "resolved",
    "routed",
    "listening",
    "asking",
    "asked",
    "accepting",
    "accepted",
    "established",
    "leaving",
    "left",
    "rejected",
];

#[test]
fn binding_takes_an_idle_id() {
    check("bind", |id| Command::Bind { id, address: ip("0.0.0.0:0") }, &["idle"]);
}

#[test]
fn resolving_takes_an_idle_or_a_bound_id() {
    let resolve =
        |id| Command::ResolveAddr { id, source: None, destination: ip("10.0.0.1:7000"), timeout_ms: 1 };
    check("resolve", resolve, &["idle", "bound"]);
    check("route", |id| Command::ResolveRoute { id }, &["resolved"]);
    check("path", |id| Command::SetOption { id, option: CmOption::Path }, &["resolved"]);
}

#[test]
fn listening_takes_an_idle_or_a_bound_id() {
    check("listen", |id| Command::Listen { id, backlog: 1 }, &["idle", "bound"]);
}

#[test]
fn connecting_takes_a_routed_id() {
    check("connect", |id| Command::Connect { id, param: param(9) }, &["routed"]);
}

#[test]
fn accepting_takes_who_was_asked_and_confirming_who_was_accepted() {
    check("accept", |id| Command::Accept { id, uid: 1, param: Some(param(9)) }, &["asked"]);
    check("confirm", |id| Command::Accept { id, uid: 1, param: None }, &["accepted"]);
}

#[test]
fn rejecting_takes_who_is_not_connected_yet() {
    let reject = |id| Command::Reject { id, reason: 0, private_data: Vec::new() };
    check("reject", reject, &["asking", "asked", "accepting", "accepted"]);
}

#[test]
fn disconnecting_takes_everybody_who_asked_or_was_asked() {
    let good = ["asking", "asked", "accepting", "accepted", "established", "leaving", "left", "rejected"];
    check("disconnect", |id| Command::Disconnect { id }, &good);
}

#[test]
fn attributes_are_told_of_ids_on_a_device() {
    let good: Vec<_> =
        ALL.iter().copied().filter(|s| !matches!(*s, "idle" | "resolving" | "listening")).collect();
    check("attributes", |id| Command::InitQpAttr { id, state: 1 }, &good);
    check("query", |id| Command::Query { id }, ALL);
    check("attributes of no state", |id| Command::InitQpAttr { id, state: 77 }, &[]);
}

#[test]
fn a_received_message_establishes_an_accepting_id() {
    check("notify", |id| Command::Notify { id, event: 4 }, &["accepting"]);
    check("notify of nothing", |id| Command::Notify { id, event: 77 }, &[]);
}

#[test]
fn options_are_taken_while_they_can_matter() {
    let good: Vec<_> = ALL.iter().copied().filter(|s| *s != "listening").collect();
    check("reuse", |id| Command::SetOption { id, option: CmOption::ReuseAddr(true) }, &good);
    check("not reuse", |id| Command::SetOption { id, option: CmOption::ReuseAddr(false) }, &["idle"]);
    check("one family", |id| Command::SetOption { id, option: CmOption::AfOnly(true) }, &["idle", "bound"]);
    check("tos", |id| Command::SetOption { id, option: CmOption::Tos(1) }, ALL);
}

#[test]
fn joining_takes_a_datagram_id_with_an_address() {
    check(
        "join",
        |id| Command::JoinMulticast { id, uid: 1, address: ip("239.0.0.1:0"), send_only: false },
        &[],
    );
    let mut bed = Bed::new();
    let id = bed.create(1, space::UDP);
    let join = |address: &str| Command::JoinMulticast { id, uid: 1, address: ip(address), send_only: false };
    assert_eq!(bed.ask(1, join("239.0.0.1:0")), Err(Refusal::WrongState));
    bed.ask(1, Command::Bind { id, address: ip("10.0.0.1:0") }).unwrap();
    assert_eq!(bed.ask(1, join("10.0.0.2:0")), Err(Refusal::WrongState), "no group");
    assert!(bed.ask(1, join("239.0.0.1:0")).is_ok());
}

#[test]
fn ids_are_found_on_their_own_channel_and_by_their_own_client_alone() {
    let mut bed = Bed::new();
    let id = bed.listener(space::TCP, 0);
    assert_eq!(bed.ask(2, Command::Query { id }), Err(Refusal::NoSuchId));
    bed.manager.open_channel(1, 2).unwrap();
    let elsewhere = bed.manager.handle(1, 2, Command::Query { id }, bed.now);
    assert_eq!(elsewhere, Err(Refusal::WrongChannel));
    let nowhere = bed.manager.handle(1, 3, Command::Query { id }, bed.now);
    assert_eq!(nowhere, Err(Refusal::WrongChannel));
    assert_eq!(bed.ask(1, Command::CreateId { uid: 1, space: 77, qp_type: 2 }), Err(Refusal::Invalid));
    assert_eq!(bed.manager.listeners().next().unwrap().address.port(), PORT);
}
