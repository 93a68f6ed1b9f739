//! An opened device: the handles it has given out, and the memory it shares with its process.
//!
//! Every handle is looked up in the client's own tables, so one that belongs to another client is as unknown as
//! one that never was. Leaves to others: MRs (`mr`), CQs and QPs (`queues`), the data path (engine).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use engine::ClientInit;
use rustix::io::Errno;
use verbs_abi::{
    proto::{Answer, Gid, Limits, Mode, Reply, Request, Welcome},
    shm::{LAYOUT_VERSION, doorbell::Doorbells, events::EventWriter, mr_table::MrTable},
};

use super::{Step, keys::Keys, mr::Mr, queues};
use crate::{
    arena::Arena,
    bell::{EventBell, Ringer},
    identity::Peer,
    lane::Lane,
    memory::ClientMemory,
    region::Region,
    throttle::Throttle,
};

/// Completion channels of one client: each is a descriptor here.
const MAX_CHANNELS: usize = 1024;
/// The one trust domain so far.
const TENANT: u32 = 0;

/// What this router offers its clients.
#[derive(Debug)]
pub(crate) struct Terms {
    /// The data path.
    pub(crate) lane: Arc<Lane>,
    /// Rings clients.
    pub(crate) ringer: Arc<Ringer>,
    /// Quotas, as clients see them.
    pub(crate) limits: Limits,
    /// Registered bytes of one client.
    pub(crate) memory: u64,
    /// Whether direct mode is granted.
    pub(crate) direct: bool,
    /// Node GUID.
    pub(crate) guid: [u8; 8],
    /// Cores of this host.
    pub(crate) cores: u32,
}

/// What a client said when it opened, and the id it gets.
#[derive(Debug)]
pub(crate) struct Hello {
    pub(crate) id: u32,
    pub(crate) version: u32,
    pub(crate) mode: Mode,
    pub(crate) fds: Vec<OwnedFd>,
}

/// An opened device.
#[derive(Debug)]
pub(crate) struct Client {
    pub(super) id: u32,
    pub(super) lane: Arc<Lane>,
    ringer: Arc<Ringer>,
    pub(super) limits: Limits,
    pub(super) memory_limit: u64,
    pub(super) arena: Arena,
    pub(super) region: Region,
    command: String,
    mode: Mode,
    /// Whether memory that is not shared can be reached.
    pub(super) reaches_process: bool,
    gids: Vec<Gid>,
    gids_read: Instant,
    /// What uses each PD.
    pub(super) pds: HashMap<u32, u32>,
    pub(super) channels: HashMap<u32, Channel>,
    next_handle: u32,
    pub(super) cqs: HashMap<u32, queues::Cq>,
    pub(super) qps: HashMap<u32, queues::Qp>,
    pub(super) mrs: HashMap<u32, Mr>,
    /// The PD of each memory window, by its key at first without the bits that an application chooses.
    pub(super) mws: HashMap<u32, u32>,
    pub(super) keys: Keys,
    pub(super) mr_bytes: u64,
}

/// A completion channel.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) bell: Arc<EventBell>,
    /// CQs that use it.
    pub(super) users: u32,
}

impl Client {
    /// Opens a device for `peer`.
    ///
    /// # Errors
    /// The errno that the client gets.
    pub(crate) fn open(terms: &Terms, peer: &Peer, hello: Hello) -> Result<(Self, Welcome), i32> {
        if hello.version != LAYOUT_VERSION {
            version_differs(peer, hello.version);
            return Err(Errno::PROTONOSUPPORT.raw_os_error());
        }
        // Who inherited a connection is not whom the kernel named.
        if !peer.is_alive() {
            return Err(Errno::SRCH.raw_os_error());
        }
        let mut fds = hello.fds.into_iter();
        let bell = fds.next().and_then(|file| EventBell::new(file, &terms.ringer));
        let bell = bell.ok_or(Errno::BADF.raw_os_error())?;
        let process = peer.memory(fds.next());
        let reaches_process = process.is_some();
        let mode = if terms.direct { hello.mode } else { Mode::Isolated };
        let made = || -> io::Result<_> { Ok((Arena::new()?, Region::new()?)) };
        let (arena, region) = made().map_err(|error| errno(&error))?;
        let gids = peer.gids();
        let fixed = arena.fixed();
        let parts = || Some((Doorbells::new(fixed)?, EventWriter::new(fixed)?, MrTable::new(fixed)?));
        let (doorbells, events, table) = parts().ok_or(Errno::NOMEM.raw_os_error())?;
        let memory = ClientMemory::new(table, process);
        let init = ClientInit {
            tenant: TENANT,
            mode,
            doorbells,
            events,
            event_bell: bell,
            memory,
            gids: gids.clone(),
        };
        terms.lane.with(|fabric| fabric.open(hello.id, init));
        let client = Self {
            id: hello.id,
            lane: Arc::clone(&terms.lane),
            ringer: Arc::clone(&terms.ringer),
            limits: terms.limits,
            memory_limit: terms.memory,
            arena,
            region,
            command: peer.command(),
            mode,
            reaches_process,
            gids,
            gids_read: Instant::now(),
            pds: HashMap::new(),
            channels: HashMap::new(),
            next_handle: 1,
            cqs: HashMap::new(),
            qps: HashMap::new(),
            mrs: HashMap::new(),
            mws: HashMap::new(),
            keys: Keys::default(),
            mr_bytes: 0,
        };
        let welcome =
            Welcome { client: hello.id, guid: terms.guid, limits: terms.limits, mode, cores: terms.cores };
        Ok((client, welcome))
    }

    /// The descriptors of the welcome, in the protocol's order.
    pub(crate) fn welcome_files(&self) -> [BorrowedFd<'_>; 4] {
        [self.arena.as_fd(), self.region.as_fd(), self.lane.page_file(), self.lane.wake_file()]
    }

    /// The descriptors of a direct peer: arena, region, and the channel of one of its CQs, if that has one.
    pub(crate) fn direct_files(&self, recv_cq: u32) -> Vec<BorrowedFd<'_>> {
        let channel = self.cqs.get(&recv_cq).and_then(|cq| self.channels.get(&cq.channel?));
        let bell = channel.map(|channel| channel.bell.as_fd());
        [self.arena.as_fd(), self.region.as_fd()].into_iter().chain(bell).collect()
    }

    /// Takes one request a step further. `last`: a direct peer that is still at work is not waited for any more.
    pub(super) fn answer(&mut self, request: &Request, fds: Vec<OwnedFd>, peer: &Peer, last: bool) -> Step {
        let reply = match request {
            Request::Gids => {
                self.refresh_gids(peer, Duration::ZERO);
                Ok(Answer::Gids(self.gids.clone()))
            }
            Request::AllocPd => self.alloc_pd(),
            Request::DeallocPd { pd } => self.dealloc_pd(*pd),
            Request::RegMr(reg) => self.reg_mr(reg),
            Request::DeregMr { key } => return self.dereg_mr(*key, last),
            Request::ReregMr { key, reg } => return self.rereg_mr(*key, reg, last),
            Request::AllocMw { pd, is_type_2 } => self.alloc_mw(*pd, *is_type_2),
            Request::DeallocMw { key } => self.dealloc_mw(*key),
            Request::CreateChannel => self.create_channel(fds),
            Request::DestroyChannel { channel } => self.destroy_channel(*channel),
            Request::CreateCq { cqe, channel } => self.create_cq(*cqe, *channel),
            Request::DestroyCq { cq } => self.destroy_cq(*cq),
            Request::CreateQp(create) => self.create_qp(create),
            Request::ModifyQp { qpn, mask, attr } => return self.modify_qp(*qpn, *mask, attr, last),
            Request::QueryQp { qpn } => self.query_qp(*qpn),
            Request::DestroyQp { qpn } => return self.destroy_qp(*qpn, last),
            // The session and the daemon answer these themselves.
            Request::Hello { .. } | Request::Status => Err(Errno::INVAL.raw_os_error()),
        };
        Step::Done(reply)
    }

    /// Reads the addresses again if they are older than `age`.
    pub(super) fn refresh_gids(&mut self, peer: &Peer, age: Duration) {
        if self.gids_read.elapsed() < age {
            return;
        }
        let gids = peer.gids();
        self.gids_read = Instant::now();
        if gids != self.gids {
            self.gids.clone_from(&gids);
            self.lane.with(|fabric| fabric.set_gids(self.id, gids));
        }
    }

    fn alloc_pd(&mut self) -> Reply {
        if self.pds.len() >= self.limits.max_pd as usize {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let pd = self.handle()?;
        self.pds.insert(pd, 0);
        Ok(Answer::Handle(pd))
    }

    fn dealloc_pd(&mut self, pd: u32) -> Reply {
        match self.pds.get(&pd) {
            None => Err(Errno::INVAL.raw_os_error()),
            Some(0) => {
                self.pds.remove(&pd);
                Ok(Answer::Done)
            }
            Some(_) => Err(Errno::BUSY.raw_os_error()),
        }
    }

    /// One more (`true`) or one less user of a PD that exists.
    pub(super) fn use_pd(&mut self, pd: u32, more: bool) {
        if let Some(users) = self.pds.get_mut(&pd) {
            *users = if more { *users + 1 } else { *users - 1 };
        }
    }

    fn create_channel(&mut self, fds: Vec<OwnedFd>) -> Reply {
        if self.channels.len() >= MAX_CHANNELS {
            return Err(Errno::MFILE.raw_os_error());
        }
        let bell = fds.into_iter().next().and_then(|file| EventBell::new(file, &self.ringer));
        let bell = bell.ok_or(Errno::BADF.raw_os_error())?;
        let channel = self.handle()?;
        self.channels.insert(channel, Channel { bell, users: 0 });
        Ok(Answer::Handle(channel))
    }

    fn destroy_channel(&mut self, channel: u32) -> Reply {
        match self.channels.get(&channel) {
            None => Err(Errno::INVAL.raw_os_error()),
            Some(Channel { users: 0, .. }) => {
                self.channels.remove(&channel);
                Ok(Answer::Done)
            }
            Some(_) => Err(Errno::BUSY.raw_os_error()),
        }
    }

    /// A handle that was never used: a stale one stays unknown.
    fn handle(&mut self) -> Result<u32, i32> {
        let handle = self.next_handle;
        self.next_handle = handle.checked_add(1).ok_or(Errno::NOMEM.raw_os_error())?;
        Ok(handle)
    }

    /// The clients that execute on its QPs or memory at this moment.
    pub(super) fn held_up_by(&self) -> Vec<u32> {
        self.lane.with(|fabric| fabric.executing_on(self.id))
    }

    /// The router's number for it.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// What `freeflow status` shows of it, traffic and process left out.
    pub(crate) fn status(&self) -> crate::status::Client {
        crate::status::Client {
            id: u64::from(self.id),
            comm: self.command.clone(),
            tenant: "default".to_owned(),
            mode: mode_name(self.mode).to_owned(),
            addresses: self.gids.iter().map(crate::addresses::text).collect(),
            qps: self.qps.len() as u32,
            cqs: self.cqs.len() as u32,
            mrs: self.mrs.len() as u32,
            mr_bytes: self.mr_bytes,
            ..Default::default()
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.lane.with(|fabric| fabric.close(self.id));
        // Mappings and files go after this, without the lock.
    }
}

/// A mode as people write it.
pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Isolated => "isolated",
        Mode::Direct => "direct",
    }
}

/// The errno of a failed system call.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::NOMEM.raw_os_error())
}

fn version_differs(peer: &Peer, version: u32) {
    static VERSIONS: Throttle = Throttle::new();
    if let Some(suppressed) = VERSIONS.admit() {
        tracing::warn!(
            pid = peer.pid,
            version,
            ours = LAYOUT_VERSION,
            suppressed,
            "a client of another version was refused; install provider and router from one build"
        );
    }
}
