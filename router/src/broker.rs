//! The connection manager of this host: the `cm` crate with a clock, and the delivery of its messages.
//!
//! Both ends of every connection are on this host so far, so a message goes back into the manager that it came from.
//! Leaves to others: sockets and event counters (the daemon and its sessions).

use std::time::{Duration, Instant};

use cm::{Listener, Manager, Place, Refusal, Settings};
use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};
use verbs_abi::{
    ffi::IBV_MTU_4096,
    proto::cm::{CmAnswer, Command},
};

/// Event channels of one process. Each is a descriptor here, which counts for the tenant.
const MAX_CHANNELS: u32 = 1 << 16;
/// Processes of one tenant that may have all their ids.
const FULL_CLIENTS: u32 = 16;

/// The connection manager of this host.
#[derive(Debug)]
pub(crate) struct Broker {
    manager: Manager,
    started: Instant,
}

impl Broker {
    /// `ids`: how many one process may have.
    pub(crate) fn new(ids: u32) -> Self {
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
        Self { manager: Manager::new(settings), started: Instant::now() }
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

    fn deliver(&mut self) {
        let now = self.now();
        while let Some(message) = self.manager.next_message() {
            self.manager.receive(message, now);
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
