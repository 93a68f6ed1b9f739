//! Promises of the router's connection manager, the protocol spoken directly.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

mod bed;

use std::os::fd::{AsFd, OwnedFd};

use bed::{Bed, ask, event, eventually, hello, is_dropped};
use router::{client, config::Config};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use verbs_abi::{
    proto::{
        Answer, Endpoint, Mode, Reply, Request,
        cm::{Address, CmAnswer, CmRequest, Command, ConnParam, Event, EventKind},
    },
    shm::LAYOUT_VERSION,
};

/// A process that uses rdma_cm.
struct Process {
    endpoint: Endpoint,
    counter: OwnedFd,
    channel: u32,
}

impl Process {
    fn new(bed: &Bed) -> Process {
        let endpoint = bed.dial();
        let (reply, _) = ask(&endpoint, &Request::CmHello { version: LAYOUT_VERSION }, &[]);
        assert!(matches!(reply, Ok(Answer::CmWelcome { guid }) if guid != [0; 8]));
        let counter = event();
        let Ok(Answer::Handle(channel)) = open_channel(&endpoint, &counter) else { panic!("no channel") };
        Process { endpoint, counter, channel }
    }

    fn ask(&self, command: Command) -> Result<CmAnswer, i32> {
        let channel = self.channel;
        match ask(&self.endpoint, &Request::Cm(CmRequest::Ask { channel, command }), &[]).0? {
            Answer::Cm(answer) => Ok(answer),
            other => panic!("{other:?}"),
        }
    }

    fn create(&self) -> u32 {
        match self.ask(Command::CreateId { uid: 9, space: 0x106, qp_type: 2 }) {
            Ok(CmAnswer::Id(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    fn has_count(&self) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.counter, PollFlags::IN)], Some(&at_once)).unwrap() > 0
    }

    /// Takes a count and its event.
    fn event(&self, kind: EventKind) -> Event {
        eventually("an event", || self.has_count());
        rustix::io::read(&self.counter, &mut [0; 8]).unwrap();
        match self.ask(Command::NextEvent) {
            Ok(CmAnswer::Event(Some(event))) if event.kind == kind => event,
            other => panic!("no {kind:?}: {other:?}"),
        }
    }

    fn listener(&self, address: &str) -> u32 {
        let id = self.create();
        self.ask(Command::Bind { id, address: ip(address) }).unwrap();
        self.ask(Command::Listen { id, backlog: 4 }).unwrap();
        id
    }

    /// Asks for a connection to an address.
    fn connect(&self, address: &str) -> u32 {
        let id = self.create();
        let destination = ip(address);
        self.ask(Command::ResolveAddr { id, source: None, destination, timeout_ms: 100 }).unwrap();
        self.event(EventKind::AddrResolved);
        self.ask(Command::ResolveRoute { id }).unwrap();
        self.event(EventKind::RouteResolved);
        self.ask(Command::Connect { id, param: ConnParam { qpn: 5, ..ConnParam::default() } }).unwrap();
        id
    }
}

fn open_channel(endpoint: &Endpoint, counter: &OwnedFd) -> Reply {
    ask(endpoint, &Request::Cm(CmRequest::OpenChannel), &[counter.as_fd()]).0
}

fn ip(text: &str) -> Address {
    Address::Ip(text.parse().unwrap())
}

/// Both ends of a connection: listener, passive end, active end.
fn connected(server: &Process, client: &Process) -> (u32, u32, u32) {
    let listener = server.listener("127.0.0.1:7471");
    let active = client.connect("127.0.0.1:7471");
    let passive = server.event(EventKind::ConnectRequest).id;
    server.ask(Command::Accept { id: passive, uid: 8, param: Some(ConnParam::default()) }).unwrap();
    client.event(EventKind::ConnectResponse);
    client.ask(Command::Accept { id: active, uid: 0, param: None }).unwrap();
    server.event(EventKind::Established);
    (listener, passive, active)
}

#[test]
fn two_processes_connect_and_leave() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    let (_, passive, active) = connected(&server, &client);
    client.ask(Command::Disconnect { id: active }).unwrap();
    server.event(EventKind::Disconnected);
    server.ask(Command::Disconnect { id: passive }).unwrap();
    client.event(EventKind::Disconnected);
    assert!(!server.has_count() && !client.has_count(), "a count without an event");
}

/// A connection that the server has left, whose end the client has not heard of. The client's id.
fn left(server: &Process, client: &Process) -> u32 {
    let (_, passive, active) = connected(server, client);
    server.ask(Command::Disconnect { id: passive }).unwrap();
    eventually("an event", || client.has_count());
    active
}

#[test]
fn the_count_of_an_event_is_gone_before_its_id_is() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    let active = left(&server, &client);
    // Of another id, and not to be taken with it.
    let other = client.create();
    client
        .ask(Command::ResolveAddr { id: other, source: None, destination: ip("127.0.0.1:1"), timeout_ms: 9 })
        .unwrap();
    // Three were handed out: two of the address and the route, one of the connection.
    let gone = client.ask(Command::DestroyId { id: active });
    assert_eq!(gone, Ok(CmAnswer::Reported { events: 3, revoked: 0 }));
    assert_eq!(client.event(EventKind::AddrResolved).id, other);
    assert!(!client.has_count(), "a count without an event");
}

#[test]
fn a_reader_that_has_taken_a_count_gets_its_event_though_the_id_is_destroyed() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    let active = left(&server, &client);
    rustix::io::read(&client.counter, &mut [0; 8]).unwrap();
    let gone = client.ask(Command::DestroyId { id: active });
    assert_eq!(gone, Ok(CmAnswer::Reported { events: 4, revoked: 0 }), "it waits for this event, too");
    let Ok(CmAnswer::Event(Some(event))) = client.ask(Command::NextEvent) else { panic!("no event") };
    assert_eq!((event.id, event.kind), (active, EventKind::Disconnected));
    assert_eq!(client.ask(Command::NextEvent), Ok(CmAnswer::Event(None)));
    assert!(!client.has_count());
}

#[test]
fn requests_that_come_in_the_place_of_one_that_was_read_go_with_their_listener() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    let listener = server.create();
    server.ask(Command::Bind { id: listener, address: ip("127.0.0.1:7471") }).unwrap();
    server.ask(Command::Listen { id: listener, backlog: 1 }).unwrap();
    (0..2).for_each(|_| _ = client.connect("127.0.0.1:7471"));
    eventually("an event", || server.has_count());
    rustix::io::read(&server.counter, &mut [0; 8]).unwrap();
    let gone = server.ask(Command::DestroyId { id: listener });
    assert_eq!(gone, Ok(CmAnswer::Reported { events: 1, revoked: 0 }));
    let kinds = |answer| match answer {
        Ok(CmAnswer::Event(event)) => event.map(|event| event.kind),
        other => panic!("{other:?}"),
    };
    assert_eq!(kinds(server.ask(Command::NextEvent)), Some(EventKind::ConnectRequest));
    assert_eq!(kinds(server.ask(Command::NextEvent)), None);
    assert!(!server.has_count());
    client.event(EventKind::Rejected);
}

#[test]
fn listeners_are_shown_and_go_with_their_process() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    let (_, _, active) = connected(&server, &client);
    let listeners = client::status(&bed.path).unwrap().listeners;
    assert_eq!(listeners.len(), 1);
    let shown = (listeners[0].pid, listeners[0].space.as_str(), listeners[0].address.as_str());
    assert_eq!(shown, (std::process::id(), "tcp", "127.0.0.1:7471"));
    drop(server);
    assert_eq!(client.event(EventKind::Disconnected).id, active);
    assert!(client::status(&bed.path).unwrap().listeners.is_empty());
    let asking = client.connect("127.0.0.1:7471");
    let event = client.event(EventKind::Rejected);
    assert_eq!((event.id, event.status), (asking, 8));
}

#[test]
fn a_timeout_comes_without_being_asked_for() {
    let bed = Bed::new();
    let process = Process::new(&bed);
    let id = process.create();
    let destination = ip("203.0.113.77:1");
    process.ask(Command::ResolveAddr { id, source: None, destination, timeout_ms: 50 }).unwrap();
    assert_eq!(process.event(EventKind::AddrError).status, -libc::ETIMEDOUT);
}

#[test]
fn a_refusal_is_the_errno_of_linux() {
    let bed = Bed::new();
    let process = Process::new(&bed);
    let id = process.create();
    let bind = |address: &str| process.ask(Command::Bind { id, address: ip(address) });
    assert_eq!(bind("203.0.113.77:1"), Err(libc::EADDRNOTAVAIL));
    assert_eq!(process.ask(Command::Listen { id: 99, backlog: 1 }), Err(libc::ENOENT));
    assert_eq!(process.ask(Command::ResolveRoute { id }), Err(libc::EINVAL));
    process.listener("127.0.0.1:7471");
    assert_eq!(bind("127.0.0.1:7471"), Err(libc::EADDRINUSE));
    assert_eq!(bind("0.0.0.0:7471"), Err(libc::EADDRNOTAVAIL));
}

#[test]
fn a_closed_channel_takes_its_ids_along() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    connected(&server, &client);
    let channel = server.channel;
    let (reply, _) = ask(&server.endpoint, &Request::Cm(CmRequest::CloseChannel { channel }), &[]);
    assert_eq!(reply, Ok(Answer::Done));
    client.event(EventKind::Disconnected);
    assert_eq!(server.ask(Command::NextEvent), Err(libc::EINVAL));
}

#[test]
fn ids_and_channels_are_bounded() {
    let mut config = Config::default();
    config.limits.cm_ids = 3;
    let bed = Bed::with(config);
    let process = Process::new(&bed);
    for _ in 0..3 {
        process.create();
    }
    let create = Command::CreateId { uid: 9, space: 0x106, qp_type: 2 };
    assert_eq!(process.ask(create), Err(libc::ENOMEM));
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert_eq!(open_channel(&process.endpoint, &file), Err(libc::EBADF));
}

#[test]
fn devices_and_the_connection_manager_keep_apart() {
    let bed = Bed::new();
    let manage = Request::Cm(CmRequest::CloseChannel { channel: 1 });
    // The connection manager before its Hello, a second Hello of either kind, verbs without a device.
    let device = bed.open();
    device.endpoint.send(&manage, &[]).unwrap();
    assert!(is_dropped(&device.endpoint));
    for request in [hello(Mode::Isolated), Request::CmHello { version: LAYOUT_VERSION }, Request::AllocPd] {
        let process = Process::new(&bed);
        let counter = event();
        let fds = if matches!(request, Request::Hello { .. }) { vec![counter.as_fd()] } else { Vec::new() };
        process.endpoint.send(&request, &fds).unwrap();
        assert!(is_dropped(&process.endpoint), "{request:?}");
    }
    let stranger = bed.dial();
    let (reply, _) = ask(&stranger, &Request::CmHello { version: LAYOUT_VERSION + 1 }, &[]);
    assert_eq!(reply, Err(libc::EPROTONOSUPPORT));
    assert!(bed.serves());
}

#[test]
fn a_full_counter_stops_nobody() {
    let bed = Bed::new();
    let (server, client) = (Process::new(&bed), Process::new(&bed));
    server.listener("127.0.0.1:7471");
    rustix::io::write(&server.counter, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    client.connect("127.0.0.1:7471");
    assert!(bed.serves());
}
