//! A manager with clients that speak in whole steps, for tests.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses its own part")]

use std::{net::SocketAddr, time::Duration};

use cm::{Manager, Place, Refusal, Settings, space};
use verbs_abi::{
    ids,
    proto::Gid,
    proto::cm::{Address, CmAnswer, Command, ConnParam, Event, EventKind, EventParam},
};

/// The channel that everybody has.
pub(crate) const CHANNEL: u32 = 1;
pub(crate) const PORT: u16 = 7000;

/// A manager and the time.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) manager: Manager,
    pub(crate) now: Duration,
}

pub(crate) fn place(tenant: u32, namespace: u64, addresses: &[&str]) -> Place {
    let gid = |ip: &&str| -> Gid { ids::Gid::from(ip.parse::<std::net::IpAddr>().unwrap()).0 };
    Place { tenant, namespace, gids: addresses.iter().map(gid).collect() }
}

pub(crate) fn ip(text: &str) -> Address {
    Address::Ip(text.parse::<SocketAddr>().unwrap())
}

impl Bed {
    /// Client 1 at 10.0.0.1 and client 2 at 10.0.0.2, in namespaces of their own, each with a channel.
    pub(crate) fn new() -> Bed {
        Bed::with(Settings { seed: 1, ids: 4000, tenant_ids: 60_000, channels: 4, mtu: 5 })
    }

    pub(crate) fn with(settings: Settings) -> Bed {
        let mut bed = Bed { manager: Manager::new(settings), now: Duration::ZERO };
        bed.open(1, place(0, 1, &["10.0.0.1", "fd00::1"]));
        bed.open(2, place(0, 2, &["10.0.0.2", "fd00::2"]));
        bed
    }

    pub(crate) fn open(&mut self, client: u32, place: Place) {
        self.manager.open(client, place);
        self.manager.open_channel(client, CHANNEL).unwrap();
    }

    /// A command, and all that follows from it.
    pub(crate) fn ask(&mut self, client: u32, command: Command) -> Result<CmAnswer, Refusal> {
        let answer = self.manager.handle(client, CHANNEL, command, self.now);
        self.settle();
        answer
    }

    /// Delivers every message.
    pub(crate) fn settle(&mut self) {
        while let Some(message) = self.manager.next_message() {
            self.manager.receive(message, self.now);
        }
    }

    /// Lets time go by.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.manager.tick(self.now);
        self.settle();
    }

    pub(crate) fn create(&mut self, client: u32, space: u16) -> u32 {
        let uid = 1000 + u64::from(client);
        match self.ask(client, Command::CreateId { uid, space, qp_type: 2 }) {
            Ok(CmAnswer::Id(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn event(&mut self, client: u32) -> Option<Event> {
        match self.ask(client, Command::NextEvent) {
            Ok(CmAnswer::Event(event)) => event,
            other => panic!("{other:?}"),
        }
    }

    /// The next event, which must be there and of this kind.
    pub(crate) fn expect(&mut self, client: u32, kind: EventKind) -> Event {
        let event = self.event(client).unwrap_or_else(|| panic!("no {kind:?} for client {client}"));
        assert_eq!(event.kind, kind, "{event:?}");
        event
    }

    pub(crate) fn kinds(&mut self, client: u32) -> Vec<EventKind> {
        std::iter::from_fn(|| self.event(client).map(|event| event.kind)).collect()
    }

    /// A listener of client 1 at the wildcard.
    pub(crate) fn listener(&mut self, space: u16, backlog: u32) -> u32 {
        let id = self.create(1, space);
        self.ask(1, Command::Bind { id, address: ip(&format!("0.0.0.0:{PORT}")) }).unwrap();
        self.ask(1, Command::Listen { id, backlog }).unwrap();
        id
    }

    /// An id of a client whose route to an address is resolved.
    pub(crate) fn routed(&mut self, client: u32, space: u16, to: &str) -> u32 {
        let id = self.create(client, space);
        let destination = ip(to);
        self.ask(client, Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 }).unwrap();
        self.expect(client, EventKind::AddrResolved);
        self.ask(client, Command::ResolveRoute { id }).unwrap();
        self.expect(client, EventKind::RouteResolved);
        id
    }

    /// An id of client 2 that asked the listener.
    pub(crate) fn asking(&mut self, space: u16) -> u32 {
        let id = self.routed(2, space, &format!("10.0.0.1:{PORT}"));
        self.ask(2, Command::Connect { id, param: param(2) }).unwrap();
        id
    }

    /// Both ends of a connection, of clients 1 and 2, over a fresh listener that goes on.
    pub(crate) fn connected(&mut self) -> (u32, u32) {
        self.listener(space::TCP, 8);
        let active = self.asking(space::TCP);
        let passive = self.expect(1, EventKind::ConnectRequest).id;
        self.ask(1, Command::Accept { id: passive, uid: 5, param: Some(param(1)) }).unwrap();
        self.expect(2, EventKind::ConnectResponse);
        self.ask(2, Command::Accept { id: active, uid: 0, param: None }).unwrap();
        self.expect(1, EventKind::Established);
        (passive, active)
    }

    pub(crate) fn destroy(&mut self, client: u32, id: u32) -> (u32, u32) {
        match self.ask(client, Command::DestroyId { id }) {
            Ok(CmAnswer::Reported { events, revoked }) => (events, revoked),
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn param(qpn: u32) -> ConnParam {
    ConnParam { qpn, private_data: vec![qpn as u8; 3], retry_count: 7, ..ConnParam::default() }
}

/// The private data of an event.
pub(crate) fn data(event: &Event) -> &[u8] {
    match &event.param {
        EventParam::Conn(param) => &param.private_data,
        EventParam::Ud(param) => &param.private_data,
    }
}
