//! A process's side of the connection manager: where it lives, and the event counters of its channels.
//!
//! Leaves to others: what happens on the channels (the `cm` crate, by way of [`crate::broker`]).

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use cm::Place;
use engine::Bell;
use rustix::io::Errno;

use super::{client::Terms, gids::Gids};
use crate::{
    account::{Account, Resource},
    bell::{EventBell, Ringer},
    identity::{Namespace, Peer},
    tenant::Tenant,
};

/// Descriptors of the router for each process: connection, process.
const DESCRIPTORS: u64 = 2;
/// What each channel takes: of its process's quota, so that no process has all the descriptors of its tenant.
const CHANNEL: [(Resource, u64); 2] = [(Resource::Channels, 1), (Resource::Descriptors, 1)];
/// The bit of a namespace's number that no inode has: it cannot be seen, and its one client stands for it.
const UNSEEN: u64 = 1 << 63;

/// The event channels of a process.
#[derive(Debug)]
pub(crate) struct CmClient {
    tenant: u32,
    gids: Gids,
    account: Account,
    ringer: Arc<Ringer>,
    bells: HashMap<u32, Arc<EventBell>>,
    next: u32,
}

impl CmClient {
    /// A process without channels.
    pub(super) fn new(terms: &Terms, tenant: &Arc<Tenant>, peer: &Peer, id: u32) -> Result<Self, i32> {
        let mut account = tenant.account();
        if !account.take(Resource::Descriptors, DESCRIPTORS) {
            return Err(Errno::USERS.raw_os_error());
        }
        Ok(Self {
            tenant: tenant.index,
            gids: Gids::new(id, tenant, &terms.claims, peer),
            account,
            ringer: Arc::clone(&terms.ringer),
            bells: HashMap::new(),
            next: 0,
        })
    }

    /// Where it lives.
    pub(super) fn place(&self) -> Place {
        let namespace = match self.gids.namespace() {
            Namespace::Known { inode, .. } => inode,
            Namespace::Unknown { client } => UNSEEN | u64::from(client),
        };
        Place { tenant: self.tenant, namespace, gids: self.gids.table().to_vec() }
    }

    /// How long ago that was read.
    pub(crate) fn age(&self) -> Duration {
        self.gids.age()
    }

    /// Where it lives, if that was read longer ago than `age` and is elsewhere now.
    pub(super) fn moved(&mut self, peer: &Peer, age: Duration) -> Option<Place> {
        self.gids.refresh(peer, age).then(|| self.place())
    }

    /// Where it lives, if other hosts have given some of its addresses back, or got some.
    pub(super) fn resettled(&mut self, peer: &Peer) -> Option<Place> {
        self.gids.resettle(peer).then(|| self.place())
    }

    /// A new channel, whose event counter came with the request.
    ///
    /// # Errors
    /// The errno that the client gets.
    pub(crate) fn add(&mut self, fds: Vec<OwnedFd>) -> Result<u32, i32> {
        let bell = fds.into_iter().next().and_then(|file| EventBell::new(file, &self.ringer));
        let bell = bell.ok_or(Errno::BADF.raw_os_error())?;
        let next = self.next.checked_add(1).ok_or(Errno::NFILE.raw_os_error())?;
        if !self.account.take_all(&CHANNEL) {
            return Err(Errno::MFILE.raw_os_error());
        }
        self.next = next;
        self.bells.insert(next, bell);
        Ok(next)
    }

    /// Forgets a channel.
    pub(crate) fn remove(&mut self, channel: u32) {
        if self.bells.remove(&channel).is_some() {
            self.account.give_all(&CHANNEL);
        }
    }

    /// Adds one to a channel's counter.
    pub(crate) fn ring(&self, channel: u32) {
        if let Some(bell) = self.bells.get(&channel) {
            bell.ring();
        }
    }

    /// Takes up to so many counts back from a channel's counter. How many were there; `None` where that cannot be done.
    pub(crate) fn take_back(&self, channel: u32, counts: u32) -> Option<u32> {
        self.bells.get(&channel)?.take_back(counts)
    }
}
