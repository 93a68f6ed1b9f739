//! Links to the routers of other hosts: TCP connections, made when something is to be sent, and the thread that serves
//! them.
//!
//! ```text
//!   lane --(packets)--> Caller --> Writer of the link
//!                         | no link, or a full socket: eventfd
//!                         +--------> Worker: epoll over listener and connections
//! ```
//!
//! A link has several streams, a connection each; the engine keeps each QP to one of them. Where both ends make one at
//! once, that of the router whose name comes first stays. One that is lost is made again when something is to be sent,
//! after a pause that grows while nobody answers. Each stream says and proves by itself who is there, and one that
//! leads to another life of a router ends those of the life before.
//! Leaves to others: what travels (the engine's `wire`), which router serves an address (`directory`).

mod connection;
mod hello;
mod scatter;
mod tls;
mod worker;
mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::TcpListener,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use engine::{LinkFigures, Stream};
use parking_lot::{Mutex, RwLock};
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    config::{self, Security},
    directory::{Directory, Peer},
    lane::{Lane, RouterFabric},
    mailbox::Mailbox,
    rnic::Found,
    status,
};
use hello::{Hello, NicWord};
pub(crate) use tls::{Tls, etcd_tls};
use worker::Worker;
use writer::{Progress, Writer};

/// How a lane tells the thread of the links what is to be sent where.
#[derive(Debug)]
pub(crate) struct Caller {
    calls: Mutex<BTreeSet<Stream>>,
    /// Of the streams that are up.
    writers: RwLock<BTreeMap<Stream, Arc<Mutex<Writer>>>>,
    /// By the peers' numbers; of those that have none yet, nothing was carried.
    traffic: RwLock<Vec<Arc<Traffic>>>,
    wake: OwnedFd,
    /// Whether the thread was woken and has not looked yet.
    rung: AtomicBool,
    stopping: AtomicBool,
}

impl Caller {
    fn new() -> io::Result<Self> {
        Ok(Self {
            calls: Mutex::default(),
            writers: RwLock::default(),
            traffic: RwLock::default(),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            rung: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        })
    }

    /// Sends what is to be sent over these streams, as far as that is possible now; the rest is left to the thread.
    pub(crate) fn send(&self, lane: &Lane, mut streams: Vec<Stream>) {
        streams.retain(|stream| {
            let writer = self.writers.read().get(stream).cloned();
            // Whoever writes now may just have looked for the last time.
            let Some(mut writer) = writer.as_ref().and_then(|writer| writer.try_lock()) else { return true };
            let mut sent = 0;
            let progress = writer.pump(&mut Seat::Lane(lane), Some(*stream), &mut sent);
            self.traffic(stream.peer).sent.fetch_add(sent, Ordering::Relaxed);
            !matches!(progress, Ok(Progress::Done))
        });
        if !streams.is_empty() {
            self.calls.lock().extend(streams);
            self.ring();
        }
    }

    /// What was carried to and from a router.
    fn traffic(&self, peer: u32) -> Arc<Traffic> {
        let at = peer as usize;
        if let Some(traffic) = self.traffic.read().get(at) {
            return Arc::clone(traffic);
        }
        let mut traffic = self.traffic.write();
        while traffic.len() <= at {
            traffic.push(Arc::default());
        }
        Arc::clone(&traffic[at])
    }

    fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    fn take(&self) -> BTreeSet<Stream> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        self.rung.store(false, Ordering::SeqCst);
        std::mem::take(&mut self.calls.lock())
    }
}

/// Whoever sends, and its way to the fabric.
pub(crate) enum Seat<'a> {
    /// The lane.
    Lane(&'a Lane),
    /// The thread of the links, which is told whom else something is to be sent to.
    Links(&'a Lane, &'a mut Vec<Stream>),
}

impl Seat<'_> {
    fn with<R>(&mut self, act: impl FnOnce(&mut RouterFabric) -> R) -> R {
        match self {
            Self::Lane(lane) => lane.with_own(act),
            Self::Links(lane, calls) => lane.serve_link(calls, act),
        }
    }
}

/// What a link has carried.
#[derive(Debug, Default)]
struct Traffic {
    /// Streams that are up.
    streams: AtomicU32,
    /// Whether both ends have a NIC on a common fabric.
    has_nic: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    /// Connections made, either way.
    made: AtomicU64,
}

/// The links of a router.
#[derive(Debug)]
pub(crate) struct Links {
    lane: Arc<Lane>,
    caller: Arc<Caller>,
    directory: Arc<Directory>,
    mailbox: Arc<Mailbox>,
    hello: Hello,
    /// Without it, links are plain.
    tls: Option<Tls>,
    listener: Option<TcpListener>,
}

impl Links {
    /// Listens; nothing is served before [`Self::start`]. `tenants` are their names, by number.
    pub(crate) fn new(
        config: &config::Links,
        directory: Arc<Directory>,
        tenants: &[String],
        lane: &Arc<Lane>,
        nic: Option<&Found>,
    ) -> io::Result<Self> {
        let tls = match config.security {
            Security::Tls => Some(Tls::load(config).map_err(io::Error::other)?),
            Security::Plain => None,
        };
        let listener = TcpListener::bind(config.listen)?;
        listener.set_nonblocking(true)?;
        let caller = Arc::new(Caller::new()?);
        lane.set_caller(Arc::clone(&caller));
        let mailbox = Arc::new(Mailbox::new()?);
        lane.with(|fabric| {
            fabric.set_streams(config.streams);
            fabric.set_routing(Arc::clone(&directory) as Arc<_>);
            fabric.set_controls(Arc::clone(&mailbox) as Arc<_>);
        });
        Ok(Self {
            lane: Arc::clone(lane),
            caller,
            hello: Hello { nic: nic.map(NicWord::of), ..Hello::new(&config.name, tenants, config.streams) },
            tls,
            directory,
            mailbox,
            listener: Some(listener),
        })
    }

    /// Starts the thread.
    pub(crate) fn start(&mut self) -> io::Result<Option<JoinHandle<()>>> {
        let Some(listener) = self.listener.take() else { return Ok(None) };
        let worker = Worker::new(self, listener)?;
        thread::Builder::new().name("links".to_owned()).spawn(move || worker.serve()).map(Some)
    }

    /// Ends the thread soon.
    pub(crate) fn stop(&self) {
        self.caller.stopping.store(true, Ordering::SeqCst);
        self.caller.ring();
    }

    /// What other hosts say to this one.
    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// The directory.
    pub(crate) fn directory(&self) -> Arc<Directory> {
        Arc::clone(&self.directory)
    }

    /// The other routers, and what the links to them carry.
    pub(crate) fn status(&self) -> Vec<status::Link> {
        let link = |(peer, number): (Peer, u32)| {
            let traffic = self.caller.traffic(number);
            let streams = traffic.streams.load(Ordering::Relaxed);
            let LinkFigures { repeated, round_trip } = self.lane.with(|fabric| fabric.link_figures(number));
            (streams > 0 || peer.address.is_some()).then(|| status::Link {
                router: peer.name.to_string(),
                address: peer.address.map_or(String::new(), |address| address.to_string()),
                state: if streams > 0 { "up" } else { "down" }.to_owned(),
                streams,
                round_trip_us: round_trip.filter(|_| streams > 0).map(|ns| ns as f64 / 1e3),
                tx_bytes: traffic.sent.load(Ordering::Relaxed),
                rx_bytes: traffic.received.load(Ordering::Relaxed),
                retransmissions: repeated,
                connections: traffic.made.load(Ordering::Relaxed),
                rnic: traffic.has_nic.load(Ordering::Relaxed),
            })
        };
        self.directory.peers().into_iter().zip(0..).filter_map(link).collect()
    }
}
