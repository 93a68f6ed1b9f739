//! The thread of the links: waits for sockets and for calls, moves bytes between sockets and the fabric.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::TcpListener,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use engine::{Calls, Stream};
use rustix::event::{Timespec, epoll};

use super::{
    Caller, Links, Seat, Tls,
    connection::{Connection, Read, Stage, Trouble},
    hello::Hello,
    tls,
    writer::Progress,
};
use crate::{
    directory::Directory,
    lane::{self, Lane},
    throttle::Throttle,
};

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// How long a connection may take until packets travel.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after the first failure; it doubles with each until the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A link this young is not given up for another one: both were made at once.
const YOUNG: Duration = Duration::from_secs(2);
/// Reads of one connection before others have their turn.
const ROUNDS: u32 = 8;
/// Connections that have not said who they are.
const STRANGERS: usize = 64;

/// How often a stream is asked for a sign of life, which tells the round-trip time.
const PING: Duration = Duration::from_secs(2);

/// What the thread knows of one stream to a router.
#[derive(Debug, Default)]
struct Peer {
    /// The connection over which packets travel.
    link: Option<u64>,
    /// The connection that this router makes.
    dialing: Option<u64>,
    /// Something is to be sent to it, and there is no link.
    wanted: bool,
    pause: Duration,
    /// It is not called before this.
    retry: Option<Instant>,
}

/// The thread's own.
pub(super) struct Worker {
    lane: Arc<Lane>,
    caller: Arc<Caller>,
    directory: Arc<Directory>,
    hello: Hello,
    tls: Option<Tls>,
    epoll: OwnedFd,
    listener: TcpListener,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    peers: BTreeMap<Stream, Peer>,
    /// In which life each router was seen last.
    instances: BTreeMap<u32, u64>,
    /// Streams over which something is to be sent.
    calls: Calls,
    called: Vec<Stream>,
    next_ping: Instant,
    /// Connections that may have more to be read.
    unread: BTreeSet<u64>,
    complaints: Throttle,
}

impl Worker {
    pub(super) fn new(links: &Links, listener: TcpListener) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let input = epoll::EventFlags::IN;
        epoll::add(&epoll, &links.caller.wake, epoll::EventData::new_u64(WAKE), input)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), input)?;
        Ok(Self {
            lane: Arc::clone(&links.lane),
            caller: Arc::clone(&links.caller),
            directory: Arc::clone(&links.directory),
            hello: links.hello.clone(),
            tls: links.tls.clone(),
            epoll,
            listener,
            connections: BTreeMap::new(),
            next: FIRST_CONNECTION,
            peers: BTreeMap::new(),
            instances: BTreeMap::new(),
            next_ping: Instant::now(),
            calls: Calls::default(),
            called: Vec::new(),
            unread: BTreeSet::new(),
            complaints: Throttle::new(),
        })
    }

    pub(super) fn serve(mut self) {
        let none = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [none; 64];
        lane::raise_priority();
        while !self.caller.stopping.load(Ordering::SeqCst) {
            let timeout = self.timeout();
            let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => 0,
                Err(error) => return tracing::error!(%error, "links are not served any more"),
            };
            for event in &events[..count] {
                match event.data.u64() {
                    WAKE => self.calls.extend(self.caller.take()),
                    LISTENER => self.accept(),
                    token => self.attend(token, event.flags),
                }
            }
            for token in std::mem::take(&mut self.unread) {
                self.read(token);
            }
            self.look_at_clock();
            while let Some(peer) = self.calls.take_next() {
                self.answer(peer);
            }
        }
    }

    /// How long nothing has to be done by itself.
    fn timeout(&self) -> Option<Timespec> {
        if !self.unread.is_empty() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        // Finer than the rest, which may come a little late.
        let ack = self.lane.next_ack().map(|due| Duration::from_nanos(due.saturating_sub(lane::now())));
        let now = Instant::now();
        let young = self.connections.values().filter(|connection| connection.stage != Stage::Up);
        let patience = young.map(|connection| connection.since + PATIENCE);
        let retries = self.peers.values().filter(|peer| peer.wanted).filter_map(|peer| peer.retry);
        let ping = self.peers.values().any(|peer| peer.link.is_some()).then_some(self.next_ping);
        let first = patience.chain(retries).chain(ping).min();
        let left = first.map(|first| first.saturating_duration_since(now) + Duration::from_millis(1));
        let left = left.into_iter().chain(ack).min()?;
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    /// Ends what takes too long, and calls those again that did not answer.
    fn look_at_clock(&mut self) {
        if self.lane.next_ack().is_some_and(|due| due <= lane::now()) {
            self.change(|_| ());
        }
        let now = Instant::now();
        let slow =
            |connection: &Connection| connection.stage != Stage::Up && now > connection.since + PATIENCE;
        let late: Vec<u64> =
            self.connections.iter().filter(|(_, c)| slow(c)).map(|(token, _)| *token).collect();
        for token in late {
            self.lose(token, &"it took too long");
        }
        for (stream, peer) in &mut self.peers {
            if peer.wanted && peer.retry.is_some_and(|retry| now >= retry) {
                (peer.retry, peer.wanted) = (None, false);
                self.calls.insert(*stream);
            }
        }
        if now >= self.next_ping {
            self.next_ping = now + PING;
            let there = self.peers.iter().filter(|(_, peer)| peer.link.is_some());
            let streams: Vec<Stream> = there.map(|(stream, _)| *stream).collect();
            self.change(|fabric| streams.iter().for_each(|stream| fabric.ping(*stream, lane::now())));
        }
    }

    fn accept(&mut self) {
        // Whoever floods this has no more than a share of the thread.
        for _ in 0..STRANGERS {
            let Ok((stream, address)) = self.listener.accept() else { return };
            let mut strangers = self.connections.iter().filter(|(_, connection)| connection.peer.is_none());
            let oldest = strangers.next().map(|(token, _)| *token);
            // A router says who it is at once: who was silent for longest goes, so that a flood cannot shut others out.
            if let Some(oldest) = oldest.filter(|_| strangers.count() + 1 >= STRANGERS) {
                self.lose(oldest, &"too many connections of strangers");
            }
            let tls = self.tls.as_ref().map(Tls::accept).transpose();
            match tls.and_then(|tls| Connection::accepted(stream, self.hello.encode(), tls)) {
                Ok(connection) => drop(self.add(connection)),
                Err(error) => self.complain(&address, &error),
            }
        }
    }

    fn add(&mut self, connection: Connection) -> Option<u64> {
        let token = self.next;
        self.next += 1;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        if let Err(error) = epoll::add(&self.epoll, &connection, epoll::EventData::new_u64(token), flags) {
            tracing::error!(%error, "cannot watch a link");
            return None;
        }
        let mut connection = connection;
        connection.waits_for_room = true;
        self.connections.insert(token, connection);
        Some(token)
    }

    /// Something is to be sent to a router.
    fn answer(&mut self, stream: Stream) {
        let peer = self.peer(stream);
        if let Some(token) = peer.link {
            return self.pump(token);
        }
        peer.wanted = true;
        if peer.dialing.is_some() || peer.retry.is_some() {
            return;
        }
        let Some(router) = self.directory.peer(stream.peer) else { return };
        let Some(address) = router.address else {
            return self.put_off(stream, &"it is not in the directory");
        };
        let (tls, hello) = (self.tls.as_ref().map(|tls| tls.dial(&router.name)).transpose(), &self.hello);
        let hello = hello.on(stream.index).encode();
        match tls.and_then(|tls| Connection::dial(stream, address, hello, tls)) {
            Ok(connection) => {
                let token = self.add(connection);
                self.peer(stream).dialing = token;
            }
            Err(error) => self.put_off(stream, &error),
        }
    }

    /// What is known of a stream.
    fn peer(&mut self, stream: Stream) -> &mut Peer {
        self.peers.entry(stream).or_default()
    }

    /// The name of a router.
    fn name(&self, number: u32) -> Arc<str> {
        self.directory.peer(number).map_or_else(|| "?".into(), |peer| peer.name)
    }

    /// A router does not answer: it is called again after a pause.
    fn put_off(&mut self, stream: Stream, why: &dyn std::fmt::Display) {
        let peer = self.peer(stream);
        peer.pause = (peer.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        peer.retry = Some(Instant::now() + peer.pause);
        self.complain(&self.name(stream.peer), why);
        self.change(|fabric| fabric.link_down(stream, false));
    }

    fn attend(&mut self, token: u64, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.stage == Stage::Connecting {
            if let Err(error) = connection.connected() {
                return self.lose(token, &error);
            }
            connection.stage = Stage::Greeting;
        }
        let gone = epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        if flags.intersects(epoll::EventFlags::OUT) {
            self.pump(token);
        }
        if flags.intersects(epoll::EventFlags::IN | gone) {
            self.read(token);
        }
    }

    /// Reads, and does what the packets say.
    fn read(&mut self, token: u64) {
        for _ in 0..ROUNDS {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let (is_secure, greets) = (connection.is_secure, connection.stage == Stage::Greeting);
            let mut read = Read::More;
            if is_secure || greets {
                read = match connection.read() {
                    Ok(read) => read,
                    Err(error) => return self.lose(token, &error),
                };
            }
            if greets && is_secure {
                self.pump(token);
            }
            if greets && !self.greet(token) {
                if read == Read::More {
                    break;
                }
                return;
            }
            match self.take_in(token) {
                Ok(Read::Dry) if !is_secure || read == Read::Dry => return,
                // The fabric was locked for long enough.
                Ok(Read::More) if !is_secure => break,
                Ok(_) => {}
                Err(error) => return self.lose(token, &error),
            }
        }
        // Others first: there may be more, in the socket or in what TLS has read.
        self.unread.insert(token);
    }

    /// Hands packets to the fabric.
    fn take_in(&mut self, token: u64) -> Result<Read, Trouble> {
        let Some(connection) = self.connections.get_mut(&token) else { return Ok(Read::Dry) };
        let Some(stream) = connection.peer.filter(|_| connection.stage == Stage::Up) else {
            return Ok(Read::Dry);
        };
        let mut received = 0;
        let taken = self
            .lane
            .serve_link(&mut self.called, |fabric| connection.take_in(fabric, stream.peer, &mut received));
        self.caller.traffic(stream.peer).received.fetch_add(received, Ordering::Relaxed);
        self.calls.extend(self.called.drain(..));
        taken
    }

    /// Hears who the peer is. True: packets may follow.
    fn greet(&mut self, token: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&token) else { return false };
        let hello = match Hello::decode(connection.arrived()) {
            Ok(None) => return false,
            Ok(Some((hello, length))) => {
                connection.consume(length);
                hello
            }
            Err(error) => {
                self.lose(token, &error);
                return false;
            }
        };
        let why = match self.recognise(token, &hello) {
            Ok(stream) => {
                let agreed = self.hello.agree(&hello);
                if stream.index < agreed {
                    return self.establish(token, stream, &hello);
                }
                self.change(|fabric| fabric.agree(stream.peer, agreed));
                format!("{} wants {agreed} streams", hello.name)
            }
            Err(why) => why,
        };
        self.lose(token, &why);
        false
    }

    /// The router that says hello, if it may be that, and the stream that this is.
    fn recognise(&self, token: u64, hello: &Hello) -> Result<Stream, String> {
        let Some(connection) = self.connections.get(&token) else { return Err(String::new()) };
        let number = self.directory.number(&hello.name);
        let number = number.ok_or_else(|| format!("{:?} is not in the directory", hello.name))?;
        let stream = match (connection.peer, hello.stream) {
            (Some(expected), None) if expected.peer == number => expected,
            (None, Some(index)) => Stream { peer: number, index },
            (Some(expected), _) if expected.peer != number => {
                return Err(format!("another router answers, {:?}", hello.name));
            }
            _ => return Err(format!("{} does not say which stream this is", hello.name)),
        };
        if connection.is_secure {
            let writer = connection.writer.lock();
            return match writer.tls().is_some_and(|tls| tls::is_named(tls, &hello.name)) {
                true => Ok(stream),
                false => Err(format!("its certificate is not that of {}", hello.name)),
            };
        }
        let expected = self.directory.peer(number).and_then(|peer| peer.address);
        let expected = expected.map(|address| address.ip().to_canonical());
        let remote = connection.remote().map(|remote| remote.ip().to_canonical());
        if remote.is_none() || remote != expected {
            let at = expected.map_or("nowhere".to_owned(), |address| address.to_string());
            return Err(format!("{} does not live there but at {at}", hello.name));
        }
        Ok(stream)
    }

    /// Lets packets travel, unless another connection for the same stream is the better one.
    fn establish(&mut self, token: u64, stream: Stream, hello: &Hello) -> bool {
        let Some(dialed) = self.connections.get(&token).map(|connection| connection.dialed) else {
            return false;
        };
        let (link, dialing) = (self.peer(stream).link, self.peer(stream).dialing);
        let first_name_is_ours = self.hello.name < hello.name;
        let same_life = self.instances.get(&stream.peer) == Some(&hello.instance);
        let old = link.and_then(|link| Some((link, self.connections.get(&link)?)));
        if let Some((_, old)) = &old
            && same_life
            && old.dialed != dialed
            && old.since.elapsed() < YOUNG
            && old.dialed == first_name_is_ours
        {
            self.lose(token, &"there is a link already");
            return false;
        }
        if !dialed && first_name_is_ours && dialing.is_some() {
            self.lose(token, &"this router's own connection is on its way");
            return false;
        }
        let old = old.map(|(old, _)| old);
        let dialing = dialing.filter(|dialing| *dialing != token);
        for other in old.into_iter().chain(dialing) {
            self.drop_connection(other);
        }
        self.begin_life(stream, hello.instance);
        *self.peer(stream) = Peer { link: Some(token), ..Peer::default() };
        if let Some(connection) = self.connections.get_mut(&token) {
            (connection.stage, connection.peer) = (Stage::Up, Some(stream));
            self.caller.writers.write().insert(stream, Arc::clone(&connection.writer));
        }
        let (tenants, agreed) = (self.common_tenants(hello), self.hello.agree(hello));
        let has_nic = self.hello.shares_fabric(hello);
        self.change(|fabric| {
            fabric.set_peer_nic(stream.peer, has_nic);
            fabric.link_up(stream, agreed, tenants);
            fabric.ping(stream, lane::now());
        });
        let traffic = self.caller.traffic(stream.peer);
        traffic.has_nic.store(has_nic, Ordering::Relaxed);
        traffic.made.fetch_add(1, Ordering::Relaxed);
        tracing::info!(router = hello.name, stream = stream.index, dialed, "link up");
        self.count_streams(stream.peer);
        self.calls.insert(stream);
        true
    }

    /// Ends the streams that lead to an earlier life of a router.
    fn begin_life(&mut self, stream: Stream, instance: u64) {
        if self.instances.insert(stream.peer, instance).is_none_or(|before| before == instance) {
            return;
        }
        let all = Stream::first(stream.peer)..=Stream { index: u32::MAX, ..stream };
        let others = self.peers.range(all).filter(|(other, _)| **other != stream);
        let old: Vec<u64> = others.filter_map(|(_, peer)| peer.link).collect();
        old.iter().for_each(|token| self.lose(*token, &"that router was started anew"));
    }

    /// Counts the streams to a router, for the status.
    fn count_streams(&self, number: u32) {
        let there = |(stream, peer): &(&Stream, &Peer)| stream.peer == number && peer.link.is_some();
        let count = self.peers.iter().filter(there).count();
        self.caller.traffic(number).streams.store(count as u32, Ordering::Relaxed);
    }

    /// The peer's number of each tenant that both have, and ours.
    fn common_tenants(&self, hello: &Hello) -> HashMap<u32, u32> {
        let ours = |name: &String| self.hello.tenants.iter().zip(0..).find(|(ours, _)| *ours == name);
        let theirs = hello.tenants.iter().zip(0..);
        theirs.filter_map(|(name, theirs)| Some((theirs, ours(name)?.1))).collect()
    }

    /// Sends what is to be sent, as far as the socket takes it.
    fn pump(&mut self, token: u64) {
        let Some(connection) = self.connections.get(&token) else { return };
        if connection.stage == Stage::Connecting {
            return;
        }
        let stream = connection.peer.filter(|_| connection.stage == Stage::Up);
        let (mut seat, mut sent) = (Seat::Links(&self.lane, &mut self.called), 0);
        let progress = connection.writer.lock().pump(&mut seat, stream, &mut sent);
        if let Some(Stream { peer, .. }) = stream {
            self.caller.traffic(peer).sent.fetch_add(sent, Ordering::Relaxed);
        }
        self.calls.extend(self.called.drain(..));
        match progress {
            Ok(progress) => self.await_room(token, progress != Progress::Done),
            Err(error) => self.lose(token, &error),
        }
    }

    /// Waits for a socket to take more, or no longer.
    fn await_room(&mut self, token: u64, waits: bool) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.waits_for_room != waits {
            connection.waits_for_room = waits;
            let output = if waits { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let data = epoll::EventData::new_u64(token);
            if let Err(error) = epoll::modify(&self.epoll, &*connection, data, epoll::EventFlags::IN | output)
            {
                tracing::error!(%error, "cannot change what is waited for");
            }
        }
    }

    /// A connection is over.
    fn lose(&mut self, token: u64, why: &dyn std::fmt::Display) {
        let Some(connection) = self.connections.get(&token) else { return };
        let remote = connection.remote();
        let Some(stream) = self.drop_connection(token) else {
            if let Some(remote) = remote {
                self.complain(&remote, why);
            }
            return;
        };
        let peer = self.peer(stream);
        if peer.dialing == Some(token) {
            peer.dialing = None;
            if peer.link.is_none() {
                self.put_off(stream, why);
            }
        } else if peer.link == Some(token) {
            peer.link = None;
            self.caller.writers.write().remove(&stream);
            self.count_streams(stream.peer);
            tracing::info!(router = %self.name(stream.peer), stream = stream.index, %why, "link lost");
            self.change(|fabric| fabric.link_down(stream, true));
        }
    }

    /// Closes a connection; says whose it was.
    fn drop_connection(&mut self, token: u64) -> Option<Stream> {
        let connection = self.connections.remove(&token)?;
        let _ = epoll::delete(&self.epoll, &connection);
        connection.peer
    }

    fn change(&mut self, change: impl FnOnce(&mut crate::lane::RouterFabric)) {
        self.lane.serve_link(&mut self.called, change);
        self.calls.extend(self.called.drain(..));
    }

    fn complain(&self, who: &dyn std::fmt::Display, why: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.complaints.admit() {
            tracing::warn!(%who, %why, suppressed, "no link");
        }
    }
}
