//! The connection manager of this host: the `cm` crate with a clock, and the delivery of its messages.
//!
//! A message goes back into the manager that it came from, or to that of another host.
//! Leaves to others: sockets and event counters (the daemon and its sessions), links.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use cm::{Listener, Manager, Message, Place, Refusal, Routes, Settings};
use engine::{Control, Routing};
use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};
use verbs_abi::{
    ffi::IBV_MTU_4096,
    ids::Gid,
    proto::cm::{CmAnswer, Command},
};

use crate::directory::Directory;

/// Event channels of one process. Each is a descriptor here, which counts for the tenant.
const MAX_CHANNELS: u32 = 1 << 16;
/// Processes of one tenant that may have all their ids.
const FULL_CLIENTS: u32 = 16;

/// The connection manager of this host.
#[derive(Debug)]
pub(crate) struct Broker {
    manager: Manager,
    started: Instant,
    /// For managers of other hosts.
    outgoing: Vec<Control>,
}

/// What the directory says, as the manager asks it.
#[derive(Debug)]
struct Elsewhere(Arc<Directory>);

impl Routes for Elsewhere {
    fn host(&self, tenant: u32, ip: IpAddr) -> Option<u32> {
        self.0.route(tenant, &Gid::from(ip).0).map(host)
    }

    fn is_published(&self, tenant: u32, ip: IpAddr) -> bool {
        self.0.is_own(tenant, &Gid::from(ip).0)
    }
}

/// A router's name for the manager, to whom 0 is itself.
fn host(peer: u32) -> u32 {
    peer.saturating_add(1)
}

impl Broker {
    /// `ids`: how many one process may have. `directory`: where other hosts' addresses are looked up.
    pub(crate) fn new(ids: u32, directory: Option<Arc<Directory>>) -> Self {
        let mut seed = [0; 8];
        // Without randomness ports and PSNs can be guessed, which is no secret worth stopping for.
        let _ = getrandom(&mut seed, GetRandomFlags::NONBLOCK);
        let settings = Settings {
            seed: u64::from_ne_bytes(seed),
            ids,
            tenant_ids: ids.saturating_mul(FULL_CLIENTS),
            channels: MAX_CHANNELS,
            mtu: IBV_MTU_4096 as u8,
        };
        let mut manager = Manager::new(settings);
        if let Some(directory) = directory {
            manager.set_routes(Arc::new(Elsewhere(directory)));
        }
        Self { manager, started: Instant::now(), outgoing: Vec::new() }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Makes a client known, or where it lives now.
    pub(crate) fn open(&mut self, client: u32, place: Place) {
        self.manager.open(client, place);
    }

    /// Ends a client.
    pub(crate) fn close(&mut self, client: u32) {
        self.manager.close(client);
        self.deliver();
    }

    /// Makes a channel known.
    ///
    /// # Errors
    /// The errno that the client gets.
    pub(crate) fn open_channel(&mut self, client: u32, channel: u32) -> Result<(), i32> {
        self.manager.open_channel(client, channel).map_err(errno)
    }

    /// Ends a channel and its ids.
    pub(crate) fn close_channel(&mut self, client: u32, channel: u32) {
        self.manager.close_channel(client, channel);
        self.deliver();
    }

    /// Executes a command.
    ///
    /// # Errors
    /// The errno that the client gets.
    pub(crate) fn ask(&mut self, client: u32, channel: u32, command: Command) -> Result<CmAnswer, i32> {
        let answer = self.manager.handle(client, channel, command, self.now());
        self.deliver();
        answer.map_err(errno)
    }

    /// How many queued events a command will take back, and from which channel.
    pub(crate) fn revocable(&self, client: u32, channel: u32, command: &Command) -> Option<(u32, u32)> {
        self.manager.revocable(client, channel, command)
    }

    /// Keeps some of them for readers who are about to ask.
    pub(crate) fn keep(&mut self, client: u32, channel: u32, command: &Command, events: u32) {
        self.manager.keep(client, channel, command, events);
        self.deliver();
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self) {
        self.manager.tick(self.now());
        self.deliver();
    }

    /// How long nothing is due.
    pub(crate) fn idle(&self) -> Option<Duration> {
        self.manager.deadline().map(|deadline| deadline.saturating_sub(self.now()))
    }

    /// The channels that have got an event each: client, channel.
    pub(crate) fn take_rings(&mut self) -> Vec<(u32, u32)> {
        self.manager.take_rings()
    }

    /// Everybody who listens.
    pub(crate) fn listeners(&self) -> impl Iterator<Item = Listener> + '_ {
        self.manager.listeners()
    }

    /// Takes in what another host says.
    pub(crate) fn hear(&mut self, control: &Control) {
        let ips = [Gid(control.source).ip(), Gid(control.destination).ip()];
        if let Some(message) = Message::from_words(&control.words, host(control.peer), control.tenant, ips) {
            self.manager.receive(message, self.now());
            self.deliver();
        }
    }

    /// A link to another host is new.
    pub(crate) fn link_up(&mut self, peer: u32) {
        self.manager.link_up(host(peer), self.now());
        self.deliver();
    }

    /// What is to be said to other hosts.
    pub(crate) fn take_outgoing(&mut self) -> Vec<Control> {
        std::mem::take(&mut self.outgoing)
    }

    fn deliver(&mut self) {
        let now = self.now();
        while let Some(message) = self.manager.next_message() {
            match message.towards.checked_sub(1) {
                None => self.manager.receive(message, now),
                Some(peer) => self.outgoing.push(Control {
                    peer,
                    tenant: message.tenant,
                    source: Gid::from(message.source.ip()).0,
                    destination: Gid::from(message.destination.ip()).0,
                    words: message.to_words(),
                }),
            }
        }
    }
}

/// What Linux answers.
fn errno(refusal: Refusal) -> i32 {
    let errno = match refusal {
        Refusal::NoSuchId => Errno::NOENT,
        Refusal::WrongChannel | Refusal::WrongState | Refusal::Invalid => Errno::INVAL,
        Refusal::Family => Errno::AFNOSUPPORT,
        Refusal::AddressInUse => Errno::ADDRINUSE,
        Refusal::AddressNotAvailable => Errno::ADDRNOTAVAIL,
        Refusal::Connected => Errno::ISCONN,
        Refusal::TooMany => Errno::NOMEM,
        Refusal::Unsupported => Errno::NOSYS,
    };
    errno.raw_os_error()
}
