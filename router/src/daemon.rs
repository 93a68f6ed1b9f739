//! The router: one thread that answers every client's requests, one lane that moves the data.
//!
//! ```text
//!   listeners, signals, sockets, pidfds -> epoll --> Daemon --> Session --> Client --+
//!                                                                                    |  lock
//!   doorbells, timer ---------------------> epoll --> Lane ---------------------> Fabric
//! ```
//!
//! A client ends when its process does or its connection closes, whichever is first.

mod addresses;
mod doors;
mod faults;
mod hosts;
mod manage;
mod policy;
mod status;
mod step;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, Timespec, epoll, eventfd},
    io::Errno,
    process::{DumpableBehavior, Resource, getrlimit, set_dumpable_behavior},
};
use verbs_abi::{
    proto::{Answer, DirectPeer, Request},
    verbs::{QpAttrMask, QpState},
};

use self::policy::Policy;
use crate::{
    account::Resource as Held,
    bell::Ringer,
    broker::Broker,
    claims::Claims,
    config::{self, Choice, Config},
    directory::Directory,
    error::DaemonError,
    guard, guid,
    lane::Lane,
    link::Links,
    rnic::{Found, Rnic},
    session::{Hello, Parting, Session, Step, Terms},
    signals::{Signals, Wish},
    tenant::Tenant,
    throttle::Throttle,
};

/// How long no connection is taken when there are no descriptors left.
const RESPITE: Duration = Duration::from_millis(100);
/// How long a router that ends may take to say so to the directory.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often an answer about the status that was put off is looked at.
const SOON: Duration = Duration::from_millis(1);
/// Addresses older than this are read again when a connection is made.
const ADDRESS_AGE: Duration = Duration::from_secs(1);

const FAULTS: u64 = 0;
const SIGNALS: u64 = 1;
const STOP: u64 = 2;
const LANE_ENDED: u64 = 3;
const DIRECTORY: u64 = 4;
const MAIL: u64 = 5;
/// Tokens from here on are connections: socket `2 * id`, process `2 * id + 1`.
const FIRST_SESSION: u32 = 3;
/// Tokens from here on are listeners.
const DOORS: u64 = 1 << 40;

/// Why the daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a signal or a [`Stopper`].
    Told,
    /// Nobody has used it for as long as the configuration says.
    Idle,
}

/// Serves `listener`, a non-blocking `SOCK_SEQPACKET` socket, and one of each tenant in the configuration's order,
/// until told to end or idle for too long.
///
/// The whole process is the router from here on: memory of clients passes through it, so it leaves no core
/// dumps and cannot be traced by its user's other processes. SIGHUP has it read `file` again, where the
/// configuration came from, and ends it where it came from none.
///
/// # Errors
/// [`DaemonError`]; clients cannot cause one.
pub fn run(
    config: &Config,
    file: Option<PathBuf>,
    listener: OwnedFd,
    tenants: Vec<OwnedFd>,
) -> Result<End, DaemonError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| DaemonError::SetUp { what: "privacy", source: error.into() })?;
    guard::install();
    let mut daemon = Daemon::with_tenants(config, listener, tenants)?;
    daemon.policy = file.map(|file| Policy { file, config: config.clone() });
    daemon.run()
}

/// Ends a daemon from another thread.
#[derive(Debug)]
pub struct Stopper(OwnedFd);

impl Stopper {
    /// Ends it soon.
    pub fn stop(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Tells the daemon that a thread of the lane ended, even by a panic.
struct LaneEnded(OwnedFd);

impl Drop for LaneEnded {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// The router.
#[derive(Debug)]
pub struct Daemon {
    /// Listeners, and whose they are.
    doors: Vec<(OwnedFd, Arc<Tenant>)>,
    epoll: OwnedFd,
    stop: OwnedFd,
    lane_ended: OwnedFd,
    links: Option<Links>,
    /// The directory, and where it comes from.
    directory: Option<Told>,
    rnic: Rnic,
    terms: Terms,
    sessions: BTreeMap<u32, Session>,
    next_session: u32,
    clients: usize,
    max_clients: usize,
    broker: Broker,
    /// Connections with a reply that was put off.
    waiting: Vec<u32>,
    /// Connections that have asked for the status too often.
    asking: Vec<u32>,
    /// No connection is taken before this.
    respite: Option<Instant>,
    idle_exit: Option<Duration>,
    idle_since: Instant,
    started: Instant,
    /// What can be read again.
    policy: Option<Policy>,
}

impl Daemon {
    /// Sets everything up; nothing is served before [`Self::run`].
    ///
    /// # Errors
    /// [`DaemonError::SetUp`].
    pub fn new(config: &Config, listener: OwnedFd) -> Result<Self, DaemonError> {
        Self::with_tenants(config, listener, Vec::new())
    }

    /// The same with a listener for each tenant of the configuration, in its order; `listener` is the operator's.
    ///
    /// # Errors
    /// [`DaemonError::SetUp`].
    pub fn with_tenants(
        config: &Config,
        listener: OwnedFd,
        tenants: Vec<OwnedFd>,
    ) -> Result<Self, DaemonError> {
        let set_up = |what| move |source: io::Error| DaemonError::SetUp { what, source };
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(io::Error::from);
        let known = Tenant::all(config, descriptors());
        let lane = Lane::new(known.len()).map_err(set_up("the data path"))?;
        // Without tenants, the one there is has the control socket.
        let operator = (!config.tenants.is_empty()).then(|| Tenant::operator(config));
        let names: Vec<String> = known.iter().map(|tenant| tenant.name.clone()).collect();
        let directory = directory(config, &names)?;
        let rnic = Rnic::find(&wanted_nic(config), &lane).map_err(set_up("the NIC"))?;
        let links = links(config, directory.as_ref(), &names, &lane, rnic.found())?;
        let listeners = std::iter::once(listener).chain(tenants);
        let doors: Vec<_> = listeners.zip(operator.into_iter().chain(known)).collect();
        let make = || -> io::Result<_> {
            Ok((epoll::create(epoll::CreateFlags::CLOEXEC)?, event()?, event()?, event()?))
        };
        let (epoll, stop, lane_ended, faults) = make().map_err(set_up("event handling"))?;
        let watch = |file: &OwnedFd, token| watch(&epoll, file, token, epoll::EventFlags::IN);
        let doors_watched = (DOORS..).zip(&doors).try_for_each(|(token, door)| watch(&door.0, token));
        doors_watched
            .and_then(|()| watch(&stop, STOP))
            .and_then(|()| watch(&lane_ended, LANE_ENDED))
            .and_then(|()| watch(&faults, FAULTS))
            .and_then(|()| match &directory {
                Some((directory, ..)) => self::watch(&epoll, directory, DIRECTORY, epoll::EventFlags::IN),
                None => Ok(()),
            })
            .and_then(|()| links.as_ref().map_or(Ok(()), |links| watch_mail(&epoll, links)))
            .map_err(set_up("event handling"))?;
        let now = Instant::now();
        let broker = Broker::new(config.limits.cm_ids, links.as_ref().map(Links::directory));
        Ok(Self {
            doors,
            epoll,
            stop,
            lane_ended,
            links,
            terms: terms(lane, faults, directory.as_ref().map(|(directory, ..)| Arc::clone(directory))),
            directory,
            rnic,
            sessions: BTreeMap::new(),
            next_session: FIRST_SESSION,
            clients: 0,
            max_clients: config.limits.clients as usize,
            broker,
            waiting: Vec::new(),
            asking: Vec::new(),
            respite: None,
            idle_exit: config.idle_exit(),
            idle_since: now,
            started: now,
            policy: None,
        })
    }

    /// Something with which another thread ends [`Self::run`].
    ///
    /// # Errors
    /// [`DaemonError::SetUp`] without a free descriptor.
    pub fn stopper(&self) -> Result<Stopper, DaemonError> {
        let stop = self.stop.try_clone();
        Ok(Stopper(stop.map_err(|source| DaemonError::SetUp { what: "event handling", source })?))
    }

    /// Serves until told to end or idle for too long.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn run(mut self) -> Result<End, DaemonError> {
        let set_up = |what| move |source: io::Error| DaemonError::SetUp { what, source };
        let signals = Signals::block().map_err(set_up("signals"))?;
        watch(&self.epoll, &signals, SIGNALS, epoll::EventFlags::IN).map_err(set_up("signals"))?;
        let ended = || self.lane_ended.try_clone().map(LaneEnded);
        let threads = self.terms.lane.start(ended).map_err(set_up("the data path"))?;
        let links = self.links.as_mut().map_or(Ok(None), Links::start).map_err(set_up("links"))?;
        let directory = match &self.directory {
            Some((directory, links, config)) => {
                directory.start(config, links).map_err(set_up("the directory"))?
            }
            None => None,
        };
        let rnic = self.rnic.start().map_err(set_up("the NIC"))?;
        let result = self.serve(&signals);
        if let (Some(of), Some(thread)) = (&self.links, links) {
            of.stop();
            if thread.join().is_err() {
                tracing::error!("the thread of the links panicked");
            }
        }
        self.sessions.clear();
        if let (Some((of, ..)), Some(thread)) = (&self.directory, directory) {
            of.stop();
            // It says good-bye; a registry that does not answer is not waited for.
            let end = Instant::now() + FAREWELL;
            while !thread.is_finished() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() && thread.join().is_err() {
                tracing::error!("the thread of the directory panicked");
            }
        }
        self.finish(threads);
        self.rnic.stop();
        if rnic.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the NIC panicked");
        }
        result
    }

    fn finish(&self, threads: Vec<JoinHandle<()>>) {
        self.terms.lane.stop();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("the lane panicked");
            }
        }
    }

    fn serve(&mut self, signals: &Signals) -> Result<End, DaemonError> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        loop {
            let timeout = self.timeout();
            let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok(count) => count,
                Err(Errno::INTR) => 0,
                Err(error) => return Err(DaemonError::Wait(error.into())),
            };
            for event in &events[..count] {
                match event.data.u64() {
                    SIGNALS => match signals.take() {
                        None => {}
                        Some(Wish::Reload) if self.policy.is_some() => self.reload(),
                        Some(_) => return Ok(End::Told),
                    },
                    STOP => return Ok(End::Told),
                    FAULTS => self.drop_spoilt(),
                    DIRECTORY => self.hear_directory(),
                    MAIL => self.hear_hosts(),
                    LANE_ENDED => return Err(DaemonError::LaneEnded),
                    door @ DOORS.. => self.accept((door - DOORS) as usize),
                    token => self.attend(token, event.flags),
                }
            }
            self.resume();
            self.recover();
            self.tick_manager();
            if self.idle_left() == Some(Duration::ZERO) {
                return Ok(End::Idle);
            }
        }
    }

    /// How long nothing has to be done by itself.
    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let until = |moment: Instant| moment.saturating_duration_since(now);
        let looks = self.waiting.iter().filter_map(|id| self.sessions.get(id)?.next_look());
        let asked = (!self.asking.is_empty()).then_some(SOON);
        let due =
            [looks.min().map(until), asked, self.respite.map(until), self.idle_left(), self.broker.idle()];
        let earliest = due.into_iter().flatten().min()?;
        // Rounded up to what epoll can wait, lest it be asked again and again for the last microseconds.
        let earliest = earliest + Duration::from_millis(1);
        Some(Timespec { tv_sec: earliest.as_secs() as i64, tv_nsec: i64::from(earliest.subsec_nanos()) })
    }

    /// How long this router may stay without a connection.
    fn idle_left(&self) -> Option<Duration> {
        let limit = self.idle_exit.filter(|_| self.sessions.is_empty())?;
        Some(limit.saturating_sub(self.idle_since.elapsed()))
    }

    /// Something happened at a connection or to its process.
    fn attend(&mut self, token: u64, flags: epoll::EventFlags) {
        let id = (token / 2) as u32;
        let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        let outcome = if token % 2 == 1 {
            self.bury(id)
        } else if flags.intersects(gone) {
            Err(Parting::Left)
        } else {
            self.converse(id)
        };
        if let Err(parting) = outcome {
            self.part(id, &parting);
        }
    }

    /// The process at the other end is dead. A device ends with it; a silent connection may have been inherited.
    fn bury(&self, id: u32) -> Result<(), Parting> {
        let Some(session) = self.sessions.get(&id) else { return Ok(()) };
        if session.is_open() {
            return Err(Parting::Died);
        }
        if let Some(process) = session.peer().pidfd() {
            let _ = epoll::delete(&self.epoll, process);
        }
        Ok(())
    }

    /// One request of a connection.
    fn converse(&mut self, id: u32) -> Result<(), Parting> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let Some((request, fds)) = session.receive()? else { return Ok(()) };
        match request {
            Request::Status => self.tell(id),
            Request::CmHello { version } => self.open_manager(id, version),
            Request::Cm(request) => self.manage(id, request, fds),
            Request::Hello { version, mode } => self.open(id, Hello { id, version, mode, fds }),
            request => {
                if let Some(peer_qpn) = connects(&request) {
                    self.refresh_gids(id, peer_qpn);
                }
                let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
                let step = session.handle(request, fds)?;
                self.conclude(id, step, true)
            }
        }
    }

    fn open(&mut self, id: u32, hello: Hello) -> Result<(), Parting> {
        // A helper that is stuck in the memory of a client that is gone counts as a client.
        let full = self.clients + self.terms.lane.way_back().abandoned() >= self.max_clients;
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let refusal = match session.tenant().opens_devices {
            false => {
                Some((Errno::ACCESS, "this socket is the operator's; tenants have sockets of their own"))
            }
            true if full => Some((Errno::USERS, "too many clients; raise limits.clients")),
            true => None,
        };
        if let Some((errno, why)) = refusal {
            session.tenant().complain("a device was not opened", session.peer().pid, &why);
            return session.send(&Err(errno.raw_os_error()), &[]);
        }
        let step = session.hello(&self.terms, hello);
        if let Some(client) = session.client() {
            self.clients += 1;
            tracing::debug!(
                tenant = session.tenant().name,
                client = client.id(),
                pid = session.peer().pid,
                uid = session.peer().uid,
                "opened"
            );
        }
        self.conclude(id, step, true)
    }

    /// Acts on how far a request has come. `first`: it was not put off yet.
    fn conclude(&mut self, id: u32, step: Step, first: bool) -> Result<(), Parting> {
        match step {
            Step::Later if first => {
                self.waiting.push(id);
                self.listen_to(id, false);
                Ok(())
            }
            Step::Later => Ok(()),
            Step::Welcome(welcome) => {
                self.sessions.get(&id).map_or(Ok(()), |session| session.welcome(welcome))
            }
            Step::Done(reply) => self.sessions.get(&id).map_or(Ok(()), |session| session.send(&reply, &[])),
            Step::Direct(peer, recv_cq) => self.introduce(id, peer, recv_cq),
        }
    }

    /// Gives a client what it needs to reach its direct peer.
    fn introduce(&self, id: u32, peer: DirectPeer, recv_cq: u32) -> Result<(), Parting> {
        let Some(session) = self.sessions.get(&id) else { return Ok(()) };
        let other = self.sessions.get(&peer.client).and_then(Session::client);
        // Ended in this very moment: an unanswered peer, as on a wire.
        let Some(other) = other else { return session.send(&Ok(Answer::Done), &[]) };
        session.send(&Ok(Answer::Direct(peer)), &other.direct_files(recv_cq))
    }

    /// Takes requests from a connection, or leaves them in its socket.
    fn listen_to(&self, id: u32, on: bool) {
        let Some(session) = self.sessions.get(&id) else { return };
        let input = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        let data = epoll::EventData::new_u64(u64::from(id) * 2);
        if let Err(error) = epoll::modify(&self.epoll, session, data, input | epoll::EventFlags::RDHUP) {
            tracing::error!(%error, "cannot change what is waited for");
        }
    }

    /// Looks at the replies that were put off.
    fn resume(&mut self) {
        for id in std::mem::take(&mut self.asking) {
            self.listen_to(id, true);
            if let Err(parting) = self.tell(id) {
                self.part(id, &parting);
            }
        }
        for id in std::mem::take(&mut self.waiting) {
            let Some(mut session) = self.sessions.remove(&id) else { continue };
            let at_work = |client: u32| {
                client == id || self.sessions.get(&client).is_some_and(|other| other.peer().is_at_work())
            };
            let step = session.resume(at_work);
            self.sessions.insert(id, session);
            match step {
                None => {}
                Some(Step::Later) => self.waiting.push(id),
                Some(step) => {
                    self.listen_to(id, true);
                    if let Err(parting) = self.conclude(id, step, false) {
                        self.part(id, &parting);
                    }
                }
            }
        }
    }

    /// Ends a connection and the device it opened.
    fn part(&mut self, id: u32, parting: &Parting) {
        let Some(session) = self.sessions.remove(&id) else { return };
        let pid = session.peer().pid;
        self.idle_since = Instant::now();
        session.tenant().total.lock().give(Held::Connections, 1);
        if parting.is_fault() {
            session.tenant().complain("a client was dropped", pid, parting);
        }
        if let Some(client) = session.client() {
            self.clients -= 1;
            tracing::debug!(client = client.id(), pid, %parting, "ended");
        }
        if session.manager().is_some() {
            self.close_manager(id);
        }
        // A copy of the descriptors may live in another process, and then closing ours would not end the watch.
        let _ = epoll::delete(&self.epoll, &session);
        if let Some(process) = session.peer().pidfd() {
            let _ = epoll::delete(&self.epoll, process);
        }
    }
}

/// The QP's new peer, if a request makes a connection: the addresses of both ends must be those of now.
fn connects(request: &Request) -> Option<u32> {
    match request {
        Request::ModifyQp { mask, attr, .. }
            if mask & QpAttrMask::STATE.bits() != 0 && attr.qp_state == QpState::Rtr.value() =>
        {
            Some(if mask & QpAttrMask::DEST_QPN.bits() == 0 { 0 } else { attr.dest_qp_num })
        }
        _ => None,
    }
}

fn watch(epoll: &OwnedFd, file: impl AsFd, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
    Ok(epoll::add(epoll, file, epoll::EventData::new_u64(token), flags)?)
}

/// The NIC that the configuration wants. Without links to other hosts there is nothing for it to do.
fn wanted_nic(config: &Config) -> config::Rnic {
    match config.links {
        Some(_) => config.rnic.clone(),
        None => config::Rnic { device: Choice::Off, ..config.rnic.clone() },
    }
}

/// The directory, and where it comes from.
type Told = (Arc<Directory>, config::Links, config::Directory);

/// Which router serves an address, if there are other hosts.
fn directory(config: &Config, tenants: &[String]) -> Result<Option<Told>, DaemonError> {
    let (Some(links), Some(told)) = (&config.links, &config.directory) else { return Ok(None) };
    let directory = Directory::of(told, links, tenants)
        .map_err(|source| DaemonError::SetUp { what: "the directory", source })?;
    Ok(Some((directory, links.clone(), told.clone())))
}

fn watch_mail(epoll: &OwnedFd, links: &Links) -> io::Result<()> {
    watch(epoll, links.mailbox(), MAIL, epoll::EventFlags::IN)
}

/// The links to other hosts, if there are any.
fn links(
    config: &Config,
    directory: Option<&Told>,
    tenants: &[String],
    lane: &Arc<Lane>,
    nic: Option<&Found>,
) -> Result<Option<Links>, DaemonError> {
    let (Some(links), Some((directory, ..))) = (&config.links, directory) else { return Ok(None) };
    let links = Links::new(links, Arc::clone(directory), tenants, lane, nic);
    links.map(Some).map_err(|source| DaemonError::SetUp { what: "links", source })
}

fn terms(lane: Arc<Lane>, faults: OwnedFd, directory: Option<Arc<Directory>>) -> Terms {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Terms {
        lane,
        ringer: Ringer::new(),
        claims: Arc::new(Claims::new(directory)),
        guid: guid::of_this_host(),
        faults: Arc::new(faults),
        cores: u32::try_from(cores).unwrap_or(u32::MAX),
    }
}

/// What this process may open, as far as is known.
fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A line that a client can cause.
fn complain(what: &'static str, pid: u32, why: &impl std::fmt::Display) {
    static COMPLAINTS: Throttle = Throttle::new();
    if let Some(suppressed) = COMPLAINTS.admit() {
        tracing::warn!(pid, %why, suppressed, "{what}");
    }
}
