//! One connection: who is at its other end, what it asks, when it ends.
//!
//! The order of things is kept here: [`Request::Hello`] first and once, one reply to each request, descriptors
//! only where the protocol has them. Leaves to others: what requests mean (`client` and its siblings), which
//! connections there are (the daemon).

mod client;
mod gids;
mod keys;
mod manager;
mod mr;
mod mw;
mod queues;
mod srq;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use cm::Place;
use verbs_abi::proto::{Answer, Endpoint, ProtoError, Reply, Request, Welcome, cm::CmRequest};

use crate::{identity::Peer, tenant::Tenant};

pub(crate) use client::{Client, Hello, Terms, mode_name};
pub(crate) use manager::CmClient;

/// How long the reply to a request is put off because a direct peer is in the middle of something, and stands still.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long at most, where that peer makes progress on a busy machine.
const MOST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a device is not open because the directory has not said whether its addresses are this host's.
const SETTLEMENT: Duration = Duration::from_secs(1);
/// How often a put-off reply is looked at in that time.
const SOON: Duration = Duration::from_millis(1);
/// How often it is looked at afterwards, when it waits for page faults of the client's own.
const SELDOM: Duration = Duration::from_millis(50);

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Parting {
    /// The client closed it.
    #[error("closed")]
    Left,
    /// The client's process ended.
    #[error("its process ended")]
    Died,
    /// What came is not a message.
    #[error("protocol violation: {0}")]
    Message(ProtoError),
    /// A message that is not allowed here.
    #[error("protocol violation: {0}")]
    Order(&'static str),
    /// A descriptor too many or too few.
    #[error("protocol violation: {0} descriptors with a request")]
    Descriptors(usize),
    /// The kernel could not give, or keep, memory that it shares.
    #[error("memory that it shares is gone; is the host out of memory?")]
    Spoilt,
    /// It does not take its replies.
    #[error("a reply could not be sent: {0}")]
    Unread(ProtoError),
}

impl Parting {
    /// Whether the client is to blame.
    pub(crate) fn is_fault(&self) -> bool {
        !matches!(self, Self::Left | Self::Died)
    }
}

/// How far the answer to a request has come.
#[derive(Debug)]
pub(crate) enum Step {
    /// Here it is.
    Done(Reply),
    /// A direct connection: the peer, and its receive CQ, whose descriptors only the daemon can find.
    Direct(verbs_abi::proto::DirectPeer, u32),
    /// The device is open.
    Welcome(Welcome),
    /// Ask again soon.
    Later,
}

/// A welcome that is put off: the directory was asked for the client's addresses, and a program reads them when its device
/// is open.
#[derive(Debug)]
struct Greeting {
    welcome: Welcome,
    since: Instant,
    /// When to look again.
    next: Instant,
}

/// A request whose reply is put off.
#[derive(Debug)]
struct Pending {
    request: Request,
    since: Instant,
    /// When to look again.
    next: Instant,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Session {
    endpoint: Endpoint,
    peer: Peer,
    /// By whose socket it came.
    tenant: Arc<Tenant>,
    /// The device it opened.
    client: Option<Client>,
    /// The event channels, if it uses the connection manager in place of a device.
    manager: Option<CmClient>,
    /// A request whose reply is put off.
    pending: Option<Pending>,
    /// A welcome that is put off.
    greeting: Option<Greeting>,
}

impl Session {
    /// A fresh connection, whose socket does not block.
    pub(crate) fn new(socket: OwnedFd, tenant: &Arc<Tenant>) -> io::Result<Self> {
        let peer = Peer::of(&socket)?;
        let tenant = Arc::clone(tenant);
        Ok(Self {
            endpoint: Endpoint::new(socket),
            peer,
            tenant,
            client: None,
            manager: None,
            pending: None,
            greeting: None,
        })
    }

    /// By whose socket it came.
    pub(crate) fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// Who is there.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The device it opened.
    pub(crate) fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// Has its client, if it is one, follow its tenant's policy.
    pub(crate) fn follow_policy(&mut self) {
        if let Some(client) = &mut self.client {
            client.follow_policy();
        }
    }

    /// Whether it said Hello.
    pub(crate) fn is_open(&self) -> bool {
        self.client.is_some() || self.manager.is_some()
    }

    /// Its event channels.
    pub(crate) fn manager(&self) -> Option<&CmClient> {
        self.manager.as_ref()
    }

    /// The same, to change them.
    pub(crate) fn manager_mut(&mut self) -> Option<&mut CmClient> {
        self.manager.as_mut()
    }

    /// Lets it use the connection manager. Where it lives; EUSERS beyond its tenant's quotas.
    pub(crate) fn open_manager(&mut self, terms: &Terms, id: u32) -> Result<Place, i32> {
        let manager = CmClient::new(terms, &self.tenant, &self.peer, id)?;
        Ok(self.manager.insert(manager).place())
    }

    /// Where the user of the connection manager lives, if its addresses are older than `age` and others now.
    pub(crate) fn moved(&mut self, age: Duration) -> Option<Place> {
        self.manager.as_mut()?.moved(&self.peer, age)
    }

    /// How long ago the addresses of its device were read; without a device they never are.
    pub(crate) fn gids_age(&self) -> Duration {
        self.client.as_ref().map_or(Duration::ZERO, Client::gids_age)
    }

    /// Reads the addresses of its device again if they are older than `age`.
    pub(crate) fn refresh_gids(&mut self, age: Duration) {
        if let Some(client) = self.client.as_mut() {
            client.refresh_gids(&self.peer, age);
        }
    }

    /// The next request, if one is there, with as many descriptors as it must have.
    pub(crate) fn receive(&self) -> Result<Option<(Request, Vec<OwnedFd>)>, Parting> {
        let (request, fds) = match self.endpoint.recv::<Request>() {
            Ok(received) => received,
            Err(ProtoError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(ProtoError::Closed) => return Err(Parting::Left),
            Err(error) => return Err(Parting::Message(error)),
        };
        let right = match request {
            Request::Hello { .. } => matches!(fds.len(), 1 | 2),
            Request::CreateChannel | Request::Cm(CmRequest::OpenChannel) => fds.len() == 1,
            Request::OpenXrcd { .. } => fds.len() <= 1,
            _ => fds.is_empty(),
        };
        match &request {
            _ if !right => Err(Parting::Descriptors(fds.len())),
            Request::Status => Ok(Some((request, fds))),
            Request::Hello { .. } | Request::CmHello { .. } if self.is_open() => {
                Err(Parting::Order("a second Hello"))
            }
            Request::Hello { .. } | Request::CmHello { .. } => Ok(Some((request, fds))),
            Request::Cm(_) if self.manager.is_some() => Ok(Some((request, fds))),
            Request::Cm(_) => Err(Parting::Order("rdma_cm before its Hello")),
            _ if self.client.is_some() => Ok(Some((request, fds))),
            _ => Err(Parting::Order("a request before Hello")),
        }
    }

    /// Opens the device. [`Step::Later`]: call [`Self::resume`] soon.
    pub(crate) fn hello(&mut self, terms: &Terms, hello: Hello) -> Step {
        let (client, welcome) = match Client::open(terms, &self.tenant, &self.peer, hello) {
            Ok(opened) => opened,
            Err(errno) => return Step::Done(Err(errno)),
        };
        let is_unsettled = client.is_unsettled();
        self.client = Some(client);
        if !is_unsettled {
            return Step::Welcome(welcome);
        }
        let now = Instant::now();
        self.greeting = Some(Greeting { welcome, since: now, next: now + SOON });
        Step::Later
    }

    /// Looks whether a welcome that was put off can be said.
    fn greet(&mut self) -> Option<Step> {
        let mut greeting = self.greeting.take()?;
        let (client, now) = (self.client.as_mut()?, Instant::now());
        if now < greeting.next || client.is_unsettled() && greeting.since.elapsed() < SETTLEMENT {
            greeting.next = greeting.next.max(now + SOON);
            self.greeting = Some(greeting);
            return Some(Step::Later);
        }
        client.resettle(&self.peer);
        Some(Step::Welcome(greeting.welcome))
    }

    /// Says that the device is open.
    pub(crate) fn welcome(&self, welcome: Welcome) -> Result<(), Parting> {
        let Some(client) = &self.client else { return Ok(()) };
        self.send(&Ok(Answer::Hello(welcome)), &client.welcome_files())
    }

    /// Has its addresses asked for again, since other hosts have given some back, or got some. Where the user of the
    /// connection manager lives, if that is elsewhere now.
    pub(crate) fn resettle(&mut self) -> Option<Place> {
        if let Some(client) = &mut self.client {
            client.resettle(&self.peer);
        }
        self.manager.as_mut()?.resettled(&self.peer)
    }

    /// Takes a request of an opened device a step further. [`Step::Later`]: call [`Self::resume`] soon.
    pub(crate) fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Step, Parting> {
        let Some(client) = self.client.as_mut() else {
            return Err(Parting::Order("a request before Hello"));
        };
        let step = client.answer(&request, fds, &self.peer, false);
        if matches!(step, Step::Later) {
            let now = Instant::now();
            self.pending = Some(Pending { request, since: now, next: now + SOON });
        }
        Ok(step)
    }

    /// When to call [`Self::resume`], if a request was put off.
    pub(crate) fn next_look(&self) -> Option<Instant> {
        let greeting = self.greeting.as_ref().map(|greeting| greeting.next);
        greeting.or_else(|| self.pending.as_ref().map(|pending| pending.next))
    }

    /// Tries the request that was put off again, if it is time; others are waited for in bounded time, whatever they
    /// do, and the client's own page faults as long as they take. `is_at_work` tells of a client whether its process
    /// makes progress.
    pub(crate) fn resume(&mut self, is_at_work: impl Fn(u32) -> bool) -> Option<Step> {
        if let Some(step) = self.greet() {
            return Some(step);
        }
        let now = Instant::now();
        let pending = self.pending.take()?;
        if now < pending.next {
            self.pending = Some(pending);
            return Some(Step::Later);
        }
        let client = self.client.as_mut()?;
        let waited = pending.since.elapsed();
        let last =
            waited >= MOST_PATIENCE || waited >= PATIENCE && !client.held_up_by().into_iter().any(is_at_work);
        let step = client.answer(&pending.request, Vec::new(), &self.peer, last);
        if matches!(step, Step::Later) {
            let next = now + if last { SELDOM } else { SOON };
            self.pending = Some(Pending { next, ..pending });
        }
        Some(step)
    }

    /// Sends a reply. A client that lets its replies pile up is not waited for.
    pub(crate) fn send(&self, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Result<(), Parting> {
        match self.endpoint.send(reply, fds) {
            Ok(()) => Ok(()),
            Err(ProtoError::Closed) => Err(Parting::Left),
            Err(error) => Err(Parting::Unread(error)),
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.endpoint.as_fd()
    }
}
