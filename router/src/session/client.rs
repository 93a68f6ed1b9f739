//! An opened device: the handles it has given out, and the memory it shares with its process.
//!
//! Every handle is looked up in the client's own tables, so one that belongs to another client is as unknown as
//! one that never was. Leaves to others: MRs (`mr`), CQs and QPs (`queues`), the data path (engine).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use engine::ClientInit;
use rustix::io::Errno;
use verbs_abi::{
    proto::{Answer, Limits, Mode, Reply, Request, Welcome},
    shm::{LAYOUT_VERSION, doorbell::Doorbells, events::EventWriter, mr_table::MrTable},
};

use super::{Step, gids::Gids, keys::Keys, mr::Mr, queues, srq};
use crate::{
    account::{Account, Resource},
    arena::Arena,
    bell::{EventBell, Ringer},
    claims::Claims,
    guard::Health,
    helper::{Helper, ProcessMemory},
    identity::Peer,
    lane::Lane,
    memory::ClientMemory,
    region::Region,
    tenant::Tenant,
    throttle::Throttle,
};

/// Descriptors of the router for each client: connection, process, memory, arena, region, async events.
const DESCRIPTORS: u64 = 6;
/// QPs of a client that is gone that are ended at a time, with the lane waiting.
const ENDED_AT_ONCE: usize = 64;

/// What this router offers its clients.
#[derive(Debug)]
pub(crate) struct Terms {
    /// The data path.
    pub(crate) lane: Arc<Lane>,
    /// Rings clients.
    pub(crate) ringer: Arc<Ringer>,
    /// Which addresses are in use.
    pub(crate) claims: Arc<Claims>,
    /// Node GUID.
    pub(crate) guid: [u8; 8],
    /// An eventfd that counts up when the memory of a client fails.
    pub(crate) faults: Arc<OwnedFd>,
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
    tenant: Arc<Tenant>,
    /// What it holds.
    pub(super) account: Account,
    /// Of arena and region.
    health: Arc<Health>,
    pub(super) arena: Arena,
    pub(super) region: Region,
    command: String,
    /// What it asked for, and what it has.
    wanted: Mode,
    mode: Mode,
    /// The memory of its process, by which what is not shared is reached, and whether a helper does so already.
    process: Option<(Arc<ProcessMemory>, bool)>,
    gids: Gids,
    /// What uses each PD.
    pub(super) pds: HashMap<u32, u32>,
    pub(super) channels: HashMap<u32, Channel>,
    next_handle: u32,
    pub(super) cqs: HashMap<u32, queues::Cq>,
    /// A QP's entries are as many as it has been opened; all but one at the most by `ibv_open_qp`.
    pub(super) qps: HashMap<u32, Vec<queues::Qp>>,
    pub(super) srqs: HashMap<u32, srq::Srq>,
    /// XRC domains that are open, by handle.
    pub(super) xrcds: HashMap<u32, srq::Xrcd>,
    pub(super) mrs: HashMap<u32, Mr>,
    /// The PD of each memory window, by its key at first without the bits that an application chooses.
    pub(super) mws: HashMap<u32, u32>,
    pub(super) keys: Keys,
}

/// What a completion channel takes.
const CHANNEL: [(Resource, u64); 2] = [(Resource::Channels, 1), (Resource::Descriptors, 1)];

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
    pub(crate) fn open(
        terms: &Terms,
        tenant: &Arc<Tenant>,
        peer: &Peer,
        hello: Hello,
    ) -> Result<(Self, Welcome), i32> {
        if hello.version != LAYOUT_VERSION {
            version_differs(peer, hello.version);
            return Err(Errno::PROTONOSUPPORT.raw_os_error());
        }
        // Who inherited a connection is not whom the kernel named.
        if !peer.is_alive() {
            return Err(Errno::SRCH.raw_os_error());
        }
        let mut account = tenant.account();
        if !account.take_all(&[(Resource::Clients, 1), (Resource::Descriptors, DESCRIPTORS)]) {
            return Err(Errno::USERS.raw_os_error());
        }
        let mut fds = hello.fds.into_iter();
        let bell = fds.next().and_then(|file| EventBell::new(file, &terms.ringer));
        let bell = bell.ok_or(Errno::BADF.raw_os_error())?;
        let process = peer.memory(fds.next()).map(|file| (Arc::new(ProcessMemory::new(file)), false));
        let mode = tenant.mode(hello.mode);
        let health = Arc::new(Health::new(&terms.faults));
        let made = || -> io::Result<_> { Ok((Arena::new(&health)?, Region::new(&health)?)) };
        let (arena, region) = made().map_err(|error| errno(&error))?;
        let gids = Gids::new(hello.id, tenant, &terms.claims, peer);
        let fixed = arena.fixed();
        let parts = || Some((Doorbells::new(fixed)?, EventWriter::new(fixed)?, MrTable::new(fixed)?));
        let (doorbells, events, table) = parts().ok_or(Errno::NOMEM.raw_os_error())?;
        let memory = ClientMemory::new(table, Arc::clone(&health));
        let init = ClientInit {
            tenant: tenant.index,
            mode,
            doorbells,
            events,
            event_bell: bell,
            memory,
            gids: gids.table().to_vec(),
        };
        terms.lane.with(|fabric| {
            fabric.open(hello.id, init);
            fabric.set_weight(hello.id, tenant.weight);
        });
        let limits = tenant.limits();
        let client = Self {
            id: hello.id,
            lane: Arc::clone(&terms.lane),
            ringer: Arc::clone(&terms.ringer),
            limits,
            tenant: Arc::clone(tenant),
            account,
            health,
            arena,
            region,
            command: peer.command(),
            wanted: hello.mode,
            mode,
            process,
            gids,
            pds: HashMap::new(),
            channels: HashMap::new(),
            next_handle: 1,
            cqs: HashMap::new(),
            qps: HashMap::new(),
            srqs: HashMap::new(),
            xrcds: HashMap::new(),
            mrs: HashMap::new(),
            mws: HashMap::new(),
            keys: Keys::default(),
        };
        let welcome = Welcome { client: hello.id, guid: terms.guid, limits, mode, cores: terms.cores };
        Ok((client, welcome))
    }

    /// The descriptors of the welcome, in the protocol's order.
    pub(crate) fn welcome_files(&self) -> [BorrowedFd<'_>; 4] {
        [
            self.arena.as_fd(),
            self.region.as_fd(),
            self.lane.page_file(),
            self.lane.wake_file(self.tenant.index),
        ]
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
                Ok(Answer::Gids(self.gids.table().to_vec()))
            }
            Request::AllocPd => self.alloc_pd(),
            Request::DeallocPd { pd } => self.dealloc_pd(*pd),
            Request::RegMr(reg) => self.reg_mr(reg),
            Request::DeregMr { key } => return self.dereg_mr(*key, last),
            Request::ReregMr { key, reg } => return self.rereg_mr(*key, reg, last),
            Request::AllocNullMr { pd } => self.alloc_null_mr(*pd),
            Request::AllocMw { pd, is_type_2 } => self.alloc_mw(*pd, *is_type_2),
            Request::DeallocMw { key } => self.dealloc_mw(*key),
            Request::CreateChannel => self.create_channel(fds),
            Request::DestroyChannel { channel } => self.destroy_channel(*channel),
            Request::CreateCq { cqe, channel } => self.create_cq(*cqe, *channel),
            Request::DestroyCq { cq } => self.destroy_cq(*cq),
            Request::CreateSrq(create) => self.create_srq(create),
            Request::LimitSrq { srqn, limit } => self.limit_srq(*srqn, *limit),
            Request::QuerySrq { srqn } => self.query_srq(*srqn),
            Request::DestroySrq { srqn } => self.destroy_srq(*srqn),
            Request::OpenXrcd { creates, exclusive } => self.open_xrcd(*creates, *exclusive, fds),
            Request::CloseXrcd { xrcd } => self.close_xrcd(*xrcd),
            Request::OpenQp { xrcd, qpn } => self.open_qp(*xrcd, *qpn),
            Request::CreateQp(create) => self.create_qp(create),
            Request::ModifyQp { qpn, mask, attr } => return self.modify_qp(*qpn, *mask, attr, last),
            Request::QueryQp { qpn } => self.query_qp(*qpn),
            Request::PairQp { qpn } => return self.pair_qp(*qpn),
            Request::AttachMcast { qpn, group } => self.attach_mcast(*qpn, group),
            Request::DetachMcast { qpn, group } => self.detach_mcast(*qpn, group),
            Request::DestroyQp { qpn } => return self.destroy_qp(*qpn, last),
            // The session and the daemon answer these themselves.
            Request::Hello { .. } | Request::Status | Request::CmHello { .. } | Request::Cm(_) => {
                Err(Errno::INVAL.raw_os_error())
            }
        };
        Step::Done(reply)
    }

    /// How long ago the addresses were read.
    pub(super) fn gids_age(&self) -> Duration {
        self.gids.age()
    }

    /// Reads the addresses again if they are older than `age`.
    pub(super) fn refresh_gids(&mut self, peer: &Peer, age: Duration) {
        if self.gids.refresh(peer, age) {
            let table = self.gids.table().to_vec();
            self.lane.with(|fabric| fabric.set_gids(self.id, table));
        }
    }

    /// Asks for its addresses again, since other hosts have given some back, or got some.
    pub(super) fn resettle(&mut self, peer: &Peer) {
        if self.gids.resettle(peer) {
            let table = self.gids.table().to_vec();
            self.lane.with(|fabric| fabric.set_gids(self.id, table));
        }
    }

    /// Whether the directory has not said yet whether its addresses are this host's.
    pub(super) fn is_unsettled(&self) -> bool {
        self.gids.are_unsettled()
    }

    /// Whether memory that is not shared can be reached.
    pub(super) fn reaches_process(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the helper, unless there is one or it would reach nothing.
    pub(super) fn need_helper(&mut self) -> Result<(), i32> {
        if let Some((memory, started @ false)) = &mut self.process {
            let helper = Helper::start(Arc::clone(memory), self.lane.way_back().clone());
            let helper = helper.map_err(|_| Errno::NOMEM.raw_os_error())?;
            *started = true;
            self.lane.with(|fabric| {
                if let Some(memory) = fabric.memory_mut(self.id) {
                    memory.set_helper(helper);
                }
            });
        }
        Ok(())
    }

    fn alloc_pd(&mut self) -> Reply {
        if !self.account.take(Resource::Pds, 1) {
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
                self.account.give(Resource::Pds, 1);
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
        let bell = fds.into_iter().next().and_then(|file| EventBell::new(file, &self.ringer));
        let bell = bell.ok_or(Errno::BADF.raw_os_error())?;
        if !self.account.take_all(&CHANNEL) {
            return Err(Errno::MFILE.raw_os_error());
        }
        let channel = self.handle()?;
        self.channels.insert(channel, Channel { bell, users: 0 });
        Ok(Answer::Handle(channel))
    }

    fn destroy_channel(&mut self, channel: u32) -> Reply {
        match self.channels.get(&channel) {
            None => Err(Errno::INVAL.raw_os_error()),
            Some(Channel { users: 0, .. }) => {
                self.channels.remove(&channel);
                self.account.give_all(&CHANNEL);
                Ok(Answer::Done)
            }
            Some(_) => Err(Errno::BUSY.raw_os_error()),
        }
    }

    /// A handle that was never used: a stale one stays unknown.
    pub(super) fn handle(&mut self) -> Result<u32, i32> {
        let handle = self.next_handle;
        self.next_handle = handle.checked_add(1).ok_or(Errno::NOMEM.raw_os_error())?;
        Ok(handle)
    }

    /// The clients that execute on its QPs or memory at this moment.
    pub(super) fn held_up_by(&self) -> Vec<u32> {
        self.lane.with(|fabric| fabric.executing_on(self.id))
    }

    /// Follows its tenant's policy, which may have changed.
    pub(crate) fn follow_policy(&mut self) {
        let mode = self.tenant.mode(self.wanted);
        if std::mem::replace(&mut self.mode, mode) != mode {
            self.lane.with(|fabric| fabric.set_mode(self.id, mode));
        }
    }

    /// Whether memory that it shares is gone.
    pub(crate) fn is_spoilt(&self) -> bool {
        self.health.is_spoilt()
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
            tenant: self.tenant.name.clone(),
            mode: mode_name(self.mode).to_owned(),
            addresses: self.gids.table().iter().map(crate::addresses::text).collect(),
            qps: count(self.account.used(Resource::Qps)),
            cqs: count(self.account.used(Resource::Cqs)),
            mrs: count(self.account.used(Resource::Mrs)),
            mr_bytes: self.account.used(Resource::Memory),
            pds: count(self.account.used(Resource::Pds)),
            channels: count(self.account.used(Resource::Channels)),
            queue_bytes: self.account.used(Resource::Queues),
            quotas: self.quotas(),
            ..Default::default()
        }
    }
}

impl Client {
    fn quotas(&self) -> crate::status::Quotas {
        let quota = |resource| self.account.quota(resource);
        crate::status::Quotas {
            qps: count(quota(Resource::Qps)),
            cqs: count(quota(Resource::Cqs)),
            mrs: count(quota(Resource::Mrs)),
            mr_bytes: quota(Resource::Memory),
            pds: count(quota(Resource::Pds)),
            channels: count(quota(Resource::Channels)),
            queue_bytes: quota(Resource::Queues),
        }
    }
}

fn count(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Drop for Client {
    fn drop(&mut self) {
        // Bit by bit: the lane serves others in between.
        while self.lane.with(|fabric| fabric.close_some(self.id, ENDED_AT_ONCE)) {}
        self.lane.with(|fabric| self.xrcds.values().for_each(|xrcd| fabric.close_xrcd(xrcd.domain)));
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
