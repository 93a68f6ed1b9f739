//! The connection manager: processes that ask it for what is not theirs, for too much, or in no order.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use verbs_abi::{
    proto::{
        Answer, Endpoint, Mode, Request,
        cm::{Address, CmAnswer, CmRequest, Command, ConnParam, Event, EventKind, MAX_PRIVATE_DATA},
    },
    shm::LAYOUT_VERSION,
};

use crate::{
    client::{LIMIT, ask, dial, ensure_dropped, event, eventually, hello},
    field::{Case, Field},
    noise::Noise,
};

/// `RDMA_PS_TCP`.
const TCP: u16 = 0x106;
/// `RDMA_PS_UDP`.
const UDP: u16 = 0x111;
const HERE: &str = "127.0.0.1:7471";

/// A process that uses rdma_cm.
pub(crate) struct Process {
    endpoint: Endpoint,
    counter: OwnedFd,
    channel: u32,
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("cm: asks before its Hello", |field| dropped(&dial(field.socket())?, &create())),
        Case::new("cm: asks over a device's connection", |field| dropped(&field.open()?.endpoint, &create())),
        Case::new("cm: a second Hello", |field| {
            dropped(&Process::new(field.socket())?.endpoint, &Request::CmHello { version: LAYOUT_VERSION })
        }),
        Case::new("cm: a device over its connection", device),
        Case::new("cm: another version", version),
        Case::new("cm: channels without an event counter", wrong_counters),
        Case::new("cm: another's channel and ids", foreign),
        Case::new("cm: another's connection request", foreign_request),
        Case::new("cm: ids and channels that are no more", stale),
        Case::new("cm: commands cut off at each byte, or with bytes behind them", mutilated),
        Case::new("cm: more bytes for the other end than there may be", private_data),
        Case::new("cm: ids without end", ids),
        Case::new("cm: channels without end", channels),
        Case::new("cm: connections that nobody accepts, without end", backlog),
        Case::new("cm: an event counter that is full", full_counter),
        Case::new("cm: an address that is taken, and one that is nobody's", addresses),
        Case::new("cm: every command in every state", every_state),
        Case::new("cm: random commands", random),
        Case::new("cm: closed at every point of a connection", closed),
    ]
}

fn create() -> Request {
    let command = Command::CreateId { uid: 1, space: TCP, qp_type: 2 };
    Request::Cm(CmRequest::Ask { channel: 1, command })
}

fn dropped(endpoint: &Endpoint, request: &Request) -> Result<()> {
    endpoint.send(request, &[])?;
    ensure_dropped(endpoint)
}

fn ip(text: &str) -> Address {
    Address::Ip(text.parse().expect("an address"))
}

impl Process {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let endpoint = dial(path)?;
        let (reply, _) = ask(&endpoint, &Request::CmHello { version: LAYOUT_VERSION }, &[])?;
        ensure!(matches!(reply, Ok(Answer::CmWelcome { .. })), "no welcome: {reply:?}");
        let counter = event()?;
        let (reply, _) = ask(&endpoint, &Request::Cm(CmRequest::OpenChannel), &[counter.as_fd()])?;
        let Ok(Answer::Handle(channel)) = reply else { bail!("no channel: {reply:?}") };
        Ok(Self { endpoint, counter, channel })
    }

    fn ask_on(&self, channel: u32, command: Command) -> Result<Result<CmAnswer, i32>> {
        match ask(&self.endpoint, &Request::Cm(CmRequest::Ask { channel, command }), &[])?.0 {
            Ok(Answer::Cm(answer)) => Ok(Ok(answer)),
            Ok(other) => bail!("no answer of the connection manager: {other:?}"),
            Err(errno) => Ok(Err(errno)),
        }
    }

    fn ask(&self, command: Command) -> Result<Result<CmAnswer, i32>> {
        self.ask_on(self.channel, command)
    }

    /// A command that must go well.
    fn tell(&self, command: Command) -> Result<CmAnswer> {
        let text = format!("{command:?}");
        self.ask(command)?.map_err(|errno| anyhow::anyhow!("{text}: errno {errno}"))
    }

    fn refused(&self, command: Command, errno: i32) -> Result<()> {
        let text = format!("{command:?}");
        let answer = self.ask(command)?;
        ensure!(answer == Err(errno), "{text} is answered {answer:?}, not errno {errno}");
        Ok(())
    }

    fn create(&self, space: u16) -> Result<Result<u32, i32>> {
        match self.ask(Command::CreateId { uid: 9, space, qp_type: 2 })? {
            Ok(CmAnswer::Id(id)) => Ok(Ok(id)),
            Ok(other) => bail!("no id: {other:?}"),
            Err(errno) => Ok(Err(errno)),
        }
    }

    fn id(&self, space: u16) -> Result<u32> {
        self.create(space)?.map_err(|errno| anyhow::anyhow!("no id: errno {errno}"))
    }

    /// The next event, if one comes within a moment.
    fn next_event(&self, patience: Timespec) -> Result<Option<Event>> {
        if poll(&mut [PollFd::new(&self.counter, PollFlags::IN)], Some(&patience))? == 0 {
            return Ok(None);
        }
        rustix::io::read(&self.counter, &mut [0; 8])?;
        match self.tell(Command::NextEvent)? {
            CmAnswer::Event(event) => Ok(event),
            other => bail!("no event: {other:?}"),
        }
    }

    fn event(&self, kind: EventKind) -> Result<Event> {
        let patience = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        let event = self.next_event(patience)?.with_context(|| format!("no {kind:?}"))?;
        ensure!(event.kind == kind, "{event:?} in place of {kind:?}");
        Ok(event)
    }

    pub(crate) fn listen(&self) -> Result<u32> {
        let id = self.id(TCP)?;
        self.tell(Command::Bind { id, address: ip(HERE) })?;
        self.tell(Command::Listen { id, backlog: 8 })?;
        Ok(id)
    }

    /// Comes some steps far on the way to a connection with [`HERE`].
    fn approach(&self, steps: usize) -> Result<u32> {
        let id = self.id(TCP)?;
        if steps > 0 {
            let destination = ip(HERE);
            self.tell(Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 })?;
            self.event(EventKind::AddrResolved)?;
        }
        if steps > 1 {
            self.tell(Command::ResolveRoute { id })?;
            self.event(EventKind::RouteResolved)?;
        }
        if steps > 2 {
            self.tell(Command::Connect { id, param: ConnParam { qpn: 5, ..ConnParam::default() } })?;
        }
        Ok(id)
    }

    /// What becomes of a connection with [`HERE`].
    pub(crate) fn outcome(&self) -> Result<EventKind> {
        self.approach(3)?;
        let patience = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        Ok(self.next_event(patience)?.context("no answer")?.kind)
    }

    /// Whether anything has happened.
    pub(crate) fn is_quiet(&self) -> Result<bool> {
        Ok(self.next_event(Timespec { tv_sec: 0, tv_nsec: 0 })?.is_none())
    }
}

fn device(field: &Field) -> Result<()> {
    for (_, request) in crate::messages::requests() {
        if matches!(request, Request::CreateChannel | Request::Hello { .. }) {
            continue;
        }
        dropped(&Process::new(field.socket())?.endpoint, &request)?;
    }
    let (process, events) = (Process::new(field.socket())?, event()?);
    process.endpoint.send(&hello(Mode::Isolated), &[events.as_fd()])?;
    ensure_dropped(&process.endpoint)
}

fn version(field: &Field) -> Result<()> {
    let endpoint = dial(field.socket())?;
    for version in [0, LAYOUT_VERSION + 1, u32::MAX] {
        let (reply, _) = ask(&endpoint, &Request::CmHello { version }, &[])?;
        ensure!(reply == Err(libc::EPROTONOSUPPORT), "version {version}: {reply:?}");
    }
    Ok(())
}

fn wrong_counters(field: &Field) -> Result<()> {
    let process = Process::new(field.socket())?;
    let open = Request::Cm(CmRequest::OpenChannel);
    for file in [OwnedFd::from(std::fs::File::open("/dev/null")?), rustix::pipe::pipe()?.1] {
        let (reply, _) = ask(&process.endpoint, &open, &[file.as_fd()])?;
        ensure!(reply == Err(libc::EBADF), "{reply:?}");
    }
    dropped(&process.endpoint, &open)
}

fn foreign(field: &Field) -> Result<()> {
    let (owner, thief) = (Process::new(field.socket())?, Process::new(field.socket())?);
    let id = owner.listen()?;
    // The thief has no id; numbers of others mean nothing to it.
    for command in [
        Command::DestroyId { id },
        Command::Query { id },
        Command::Listen { id, backlog: 1 },
        Command::Disconnect { id },
        Command::LeaveMulticast { id },
        Command::MigrateId { id, from: owner.channel },
    ] {
        thief.refused(command, libc::ENOENT)?;
    }
    let unknown = thief.ask_on(thief.channel + 1, Command::NextEvent)?;
    ensure!(unknown == Err(libc::EINVAL), "a channel that it has not: {unknown:?}");
    ensure!(field.status()?.listeners.len() == 1, "the listener is gone");
    Ok(())
}

/// Whoever guesses the id of a request that waits for its listener gets nothing, and the listener does.
fn foreign_request(field: &Field) -> Result<()> {
    let (server, client) = (Process::new(field.socket())?, Process::new(field.socket())?);
    let thief = Process::new(field.socket())?;
    server.listen()?;
    client.approach(3)?;
    let id = server.event(EventKind::ConnectRequest)?.id;
    for command in [
        Command::Accept { id, uid: 1, param: None },
        Command::Accept { id, uid: 1, param: Some(ConnParam::default()) },
        Command::Reject { id, reason: 28, private_data: Vec::new() },
        Command::InitQpAttr { id, state: 3 },
        Command::Query { id },
        Command::MigrateId { id, from: server.channel },
        Command::DestroyId { id },
    ] {
        thief.refused(command, libc::ENOENT)?;
    }
    ensure!(client.is_quiet()?, "the client heard of it");
    server.tell(Command::Accept { id, uid: 2, param: Some(ConnParam::default()) })?;
    ensure!(thief.is_quiet()?, "the thief heard of it");
    Ok(())
}

fn mutilated(field: &Field) -> Result<()> {
    let send = |bytes: &[u8]| -> Result<()> {
        let process = Process::new(field.socket())?;
        rustix::net::send(&process.endpoint, bytes, rustix::net::SendFlags::NOSIGNAL)?;
        ensure_dropped(&process.endpoint)
    };
    let param = ConnParam { private_data: vec![7; 20], ..ConnParam::default() };
    for command in commands(1).into_iter().chain([Command::Connect { id: 1, param }]) {
        let request = Request::Cm(CmRequest::Ask { channel: 1, command });
        let mut bytes = postcard::to_stdvec(&request)?;
        (1..bytes.len()).try_for_each(|len| send(&bytes[..len]))?;
        bytes.push(0);
        send(&bytes)?;
    }
    Ok(())
}

fn stale(field: &Field) -> Result<()> {
    let process = Process::new(field.socket())?;
    let id = process.id(TCP)?;
    process.tell(Command::DestroyId { id })?;
    process.refused(Command::Query { id }, libc::ENOENT)?;
    for number in (0..32).flat_map(|bit| [1_u32 << bit, u32::MAX >> bit]) {
        process.refused(Command::DestroyId { id: number }, libc::ENOENT)?;
    }
    let close = Request::Cm(CmRequest::CloseChannel { channel: process.channel });
    ensure!(ask(&process.endpoint, &close, &[])?.0 == Ok(Answer::Done), "a channel cannot be closed");
    process.refused(Command::NextEvent, libc::EINVAL)
}

fn private_data(field: &Field) -> Result<()> {
    let (server, client) = (Process::new(field.socket())?, Process::new(field.socket())?);
    server.listen()?;
    for len in [MAX_PRIVATE_DATA + 1, 4096, 15_000] {
        let id = client.approach(2)?;
        let param = ConnParam { private_data: vec![7; len], ..ConnParam::default() };
        client.refused(Command::Connect { id, param }, libc::EINVAL)?;
        client.tell(Command::DestroyId { id })?;
    }
    ensure!(server.is_quiet()?, "a request came through");
    Ok(())
}

fn ids(field: &Field) -> Result<()> {
    let (process, other) = (Process::new(field.socket())?, Process::new(field.socket())?);
    let mut given = 0_u32;
    while process.create(TCP)?.is_ok() {
        given += 1;
        ensure!(given < 1 << 20, "any number of ids");
    }
    process.refused(Command::CreateId { uid: 0, space: UDP, qp_type: 4 }, libc::ENOMEM)?;
    other.id(TCP)?;
    field.traffic_goes_on()
}

fn channels(field: &Field) -> Result<()> {
    let (process, counter) = (Process::new(field.socket())?, event()?);
    let open = Request::Cm(CmRequest::OpenChannel);
    for given in 0.. {
        match ask(&process.endpoint, &open, &[counter.as_fd()])?.0 {
            Ok(_) => ensure!(given < 100_000, "any number of channels"),
            Err(errno) => {
                ensure!(matches!(errno, libc::EMFILE | libc::ENOMEM), "errno {errno}");
                break;
            }
        }
    }
    Process::new(field.socket()).map(drop)
}

fn backlog(field: &Field) -> Result<()> {
    let (server, client) = (Process::new(field.socket())?, Process::new(field.socket())?);
    server.listen()?;
    let mut connects = 0;
    while connects < 3000 && client.approach(3).is_ok() {
        connects += 1;
    }
    field.traffic_goes_on()?;
    drop(client);
    // The listener serves others still.
    let third = Process::new(field.socket())?;
    third.approach(2).map(drop)
}

fn full_counter(field: &Field) -> Result<()> {
    let process = Process::new(field.socket())?;
    rustix::io::write(&process.counter, &(u64::MAX - 1).to_ne_bytes())?;
    for _ in 0..3 {
        let id = process.id(TCP)?;
        let destination = ip("127.0.0.1:9");
        process.tell(Command::ResolveAddr { id, source: None, destination, timeout_ms: 1 })?;
        field.traffic_goes_on()?;
    }
    Ok(())
}

fn addresses(field: &Field) -> Result<()> {
    let (owner, thief) = (Process::new(field.socket())?, Process::new(field.socket())?);
    owner.listen()?;
    let id = thief.id(TCP)?;
    thief.refused(Command::Bind { id, address: ip(HERE) }, libc::EADDRINUSE)?;
    thief.refused(Command::Bind { id, address: ip("203.0.113.9:7471") }, libc::EADDRNOTAVAIL)?;
    ensure!(owner.is_quiet()?, "the owner noticed");
    Ok(())
}

/// Commands for an id, of all kinds.
fn commands(id: u32) -> Vec<Command> {
    let destination = ip(HERE);
    vec![
        Command::Bind { id, address: ip("127.0.0.1:0") },
        Command::ResolveAddr { id, source: None, destination, timeout_ms: 0 },
        Command::ResolveRoute { id },
        Command::Connect { id, param: ConnParam::default() },
        Command::Listen { id, backlog: u32::MAX },
        Command::Accept { id, uid: 0, param: None },
        Command::Accept { id, uid: 0, param: Some(ConnParam::default()) },
        Command::Reject { id, reason: 255, private_data: Vec::new() },
        Command::Disconnect { id },
        Command::InitQpAttr { id, state: 3 },
        Command::InitQpAttr { id, state: u32::MAX },
        Command::Notify { id, event: u32::MAX },
        Command::Query { id },
        Command::JoinMulticast { id, uid: 0, address: ip("224.0.0.9:0"), send_only: true },
        Command::LeaveMulticast { id },
        Command::MigrateId { id, from: u32::MAX },
    ]
}

fn every_state(field: &Field) -> Result<()> {
    let server = Process::new(field.socket())?;
    server.listen()?;
    for steps in 0..=3 {
        for at in 0..commands(0).len() {
            let client = Process::new(field.socket())?;
            let id = client.approach(steps)?;
            // Twice: what was right the first time may not be the second.
            for _ in 0..2 {
                let command = commands(id).swap_remove(at);
                let _ = client.ask(command)?;
            }
            client.tell(Command::DestroyId { id })?;
        }
    }
    Process::new(field.socket()).map(drop)
}

fn random(field: &Field) -> Result<()> {
    let processes = (0..3).map(|_| Process::new(field.socket())).collect::<Result<Vec<_>>>()?;
    let mut noise = Noise::new(11);
    for _ in 0..6000 {
        let process = &processes[noise.below(3) as usize];
        let id = noise.below(12) as u32;
        let mut all = commands(id);
        all.push(Command::CreateId { uid: 0, space: [TCP, UDP][noise.below(2) as usize], qp_type: 2 });
        all.push(Command::DestroyId { id });
        all.push(Command::NextEvent);
        let command = all.swap_remove(noise.below(all.len() as u64) as usize);
        let _ = process.ask(command)?;
    }
    field.traffic_goes_on()
}

fn closed(field: &Field) -> Result<()> {
    for steps in 0..=3 {
        for server_first in [false, true] {
            let (server, client) = (Process::new(field.socket())?, Process::new(field.socket())?);
            server.listen()?;
            client.approach(steps)?;
            if steps == 3 {
                let request = server.event(EventKind::ConnectRequest)?;
                server.tell(Command::Accept { id: request.id, uid: 2, param: Some(ConnParam::default()) })?;
            }
            if server_first {
                drop(server);
                field.traffic_goes_on()?;
            }
            drop(client);
        }
    }
    eventually("no listener is left", || Ok(field.status()?.listeners.is_empty()))
}
