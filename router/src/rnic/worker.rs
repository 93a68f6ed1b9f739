//! The thread of the NIC: performs orders, hears completion channel and async events, looks after the device.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use engine::nic::{Bounce, Endpoint, Event, NicKey, Order, Rights, ShadowId, ShadowInit};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    rand::{GetRandomFlags, getrandom},
};
use verbs_abi::{
    ffi::{
        IBV_EVENT_DEVICE_FATAL, IBV_EVENT_PORT_ACTIVE, IBV_EVENT_PORT_ERR, IBV_QP_ACCESS_FLAGS, IBV_QP_AV,
        IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER,
        IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN,
        IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC,
        ibv_ah_attr, ibv_gid, ibv_global_route, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr,
    },
    shm::Window,
    verbs::{AccessFlags, EventType},
};

use super::{
    Shared, State,
    device::Device,
    handle::{Command, Told},
    verbs::{Channel, Cq, Mr, Pd, Qp},
};
use crate::{config, lane::Lane, throttle::Throttle};

/// Bytes that one tenant's payload may bounce through.
const BOUNCE: usize = 8 << 20;
/// Entries of a CQ, where the device takes as many.
const ENTRIES: u32 = 16 * 1024;
/// How often it is looked whether the device is still there.
const LOOK: Duration = Duration::from_millis(500);
/// Such looks for each one at its port, whose changes are told by events.
const PORT_LOOKS: u32 = 20;
/// What [`Rights`] are to `ibv_modify_qp`.
const RIGHTS: u32 = IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER;
/// Orders between two looks at the rest.
const ORDERS: usize = 64;

/// A tenant's part of the device.
#[derive(Debug)]
struct Domain {
    pd: Arc<Pd>,
    bounce: Bounce,
    _region: Mr,
}

/// A CQ and what is left of it.
#[derive(Debug)]
struct Room {
    cq: Arc<Cq>,
    left: u32,
}

/// A shadow QP.
#[derive(Debug)]
struct Pair {
    qp: Arc<Qp>,
    /// Which CQ it uses, and how many entries of it.
    room: usize,
    entries: u32,
}

/// What there is on a device.
#[derive(Debug)]
struct Holdings {
    device: Device,
    channel: Arc<Channel>,
    domains: HashMap<u32, Domain>,
    rooms: Vec<Room>,
    pairs: HashMap<ShadowId, Pair>,
    regions: HashMap<(u32, u32), (Mr, u64)>,
}

/// The thread's own.
#[derive(Debug)]
pub(super) struct Worker {
    device: Option<Device>,
    config: config::Rnic,
    orders: Receiver<Command>,
    answers: Sender<Told>,
    shared: Arc<Shared>,
    lane: Arc<Lane>,
    /// Devices that were there before this one.
    generation: u32,
    complaints: Throttle,
}

impl Worker {
    pub(super) fn new(
        device: Device,
        config: config::Rnic,
        orders: Receiver<Command>,
        answers: Sender<Told>,
        shared: Arc<Shared>,
        lane: Arc<Lane>,
    ) -> Self {
        let complaints = Throttle::new();
        Self { device: Some(device), config, orders, answers, shared, lane, generation: 0, complaints }
    }

    pub(super) fn serve(mut self) {
        let mut holdings = self.device.take().and_then(|device| self.take_over(device));
        let mut gone = false;
        let (mut looked, mut looks) = (Instant::now(), 0_u32);
        while !self.shared.stopping.load(Ordering::SeqCst) {
            self.wait(holdings.as_ref());
            let mut told = false;
            for _ in 0..ORDERS {
                let Ok(command) = self.orders.try_recv() else { break };
                told = true;
                match command {
                    Command::Order(order) => self.perform(holdings.as_mut(), order),
                    Command::Released => {
                        holdings = None;
                        self.count(None);
                    }
                }
            }
            if let Some(holdings) = holdings.as_ref().filter(|_| !gone) {
                told |= self.hear_channel(holdings);
                gone = self.hear_device(holdings);
            }
            if looked.elapsed() >= LOOK {
                (looked, looks) = (Instant::now(), looks.wrapping_add(1));
                match &holdings {
                    Some(holdings) if !gone => gone = self.look(holdings, looks % PORT_LOOKS == 0),
                    None => {
                        gone = false;
                        holdings = self.find_again();
                    }
                    Some(_) => {}
                }
            }
            if gone && holdings.is_some() {
                told |= self.give_up(holdings.as_ref());
            }
            if told {
                self.lane.ring();
            }
        }
    }

    /// Waits for something to do, or to be looked after.
    fn wait(&self, holdings: Option<&Holdings>) {
        let wake: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(&self.shared.wake);
        let mut fds = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        if let Some(holdings) = holdings {
            fds.push(PollFd::from_borrowed_fd(holdings.channel.descriptor(), PollFlags::IN));
            fds.push(PollFd::from_borrowed_fd(holdings.device.context.descriptor(), PollFlags::IN));
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
        let _ = poll(&mut fds, Some(&timeout));
        let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
    }

    fn tell(&self, event: Event) {
        let _ = self.answers.send(Told::Event(event));
    }

    fn take_over(&self, device: Device) -> Option<Holdings> {
        let ready = || -> io::Result<Arc<Channel>> {
            let channel = Channel::new(&device.context)?;
            for descriptor in [channel.descriptor(), device.context.descriptor()] {
                fcntl_setfl(descriptor, fcntl_getfl(descriptor)? | OFlags::NONBLOCK)?;
            }
            Ok(channel)
        };
        match ready() {
            Ok(channel) => Some(Holdings {
                device,
                channel,
                domains: HashMap::new(),
                rooms: Vec::new(),
                pairs: HashMap::new(),
                regions: HashMap::new(),
            }),
            Err(error) => {
                tracing::error!(%error, device = device.found.name, "the NIC cannot be used");
                None
            }
        }
    }

    fn hear_channel(&self, holdings: &Holdings) -> bool {
        let mut heard = false;
        while holdings.channel.take() {
            heard = true;
        }
        if heard {
            self.shared.is_armed.store(false, Ordering::SeqCst);
        }
        heard
    }

    /// True: the device is gone.
    fn hear_device(&self, holdings: &Holdings) -> bool {
        while let Some((kind, element)) = holdings.device.context.event() {
            match kind {
                IBV_EVENT_DEVICE_FATAL => return true,
                IBV_EVENT_PORT_ERR | IBV_EVENT_PORT_ACTIVE => {
                    self.port_is(holdings, kind == IBV_EVENT_PORT_ACTIVE)
                }
                kind => {
                    let Ok(event) = EventType::try_from(kind) else { continue };
                    let concerned = holdings.pairs.iter().find(|(_, pair)| pair.qp.is(element));
                    if let Some((shadow, _)) = concerned {
                        self.tell(Event::Async(*shadow, event));
                        self.lane.ring();
                    }
                }
            }
        }
        false
    }

    /// True: the device is gone.
    fn look(&self, holdings: &Holdings, at_port: bool) -> bool {
        if !holdings.device.is_there() {
            return true;
        }
        if at_port {
            self.port_is(holdings, holdings.device.works());
        }
        false
    }

    fn port_is(&self, holdings: &Holdings, works: bool) {
        let mut state = self.shared.state.lock();
        if works == matches!(*state, State::Up(_)) {
            return;
        }
        let found = holdings.device.found.clone();
        tracing::warn!(device = found.name, works, "the port of the NIC");
        *state = if works { State::Up(found) } else { State::Down(found) };
        drop(state);
        self.tell(Event::Usable(works));
        self.lane.ring();
    }

    /// Tells that the device is gone, once; its holdings end when the lane has let go of them.
    fn give_up(&self, holdings: Option<&Holdings>) -> bool {
        let mut state = self.shared.state.lock();
        let Some(holdings) = holdings.filter(|_| !matches!(*state, State::Gone(_))) else { return false };
        let found = holdings.device.found.clone();
        tracing::error!(device = found.name, "the NIC is gone; its connections end, new ones go over TCP");
        *state = State::Gone(found);
        let _ = self.answers.send(Told::Gone);
        true
    }

    fn find_again(&mut self) -> Option<Holdings> {
        let device = Device::find(&self.config).ok()?;
        let (limits, found) = (device.limits, device.found.clone());
        let holdings = self.take_over(device)?;
        self.generation += 1;
        tracing::info!(device = found.name, "there is a NIC again");
        *self.shared.state.lock() = State::Up(found);
        let _ = self.answers.send(Told::Back(limits));
        Some(holdings)
    }

    fn perform(&self, holdings: Option<&mut Holdings>, order: Order) {
        match (order, holdings) {
            (Order::Open(shadow, init), holdings) => {
                let opened = holdings.map(|holdings| self.open(holdings, shadow, &init));
                let opened = opened.unwrap_or_else(|| Err(io::Error::other("the device is gone")));
                let opened = opened.map_err(|error| self.complain("no shadow QP", &error));
                self.tell(Event::Opened(shadow, opened));
            }
            (Order::Connect { shadow, remote, mtu, min_rnr_timer, dest_rd_atomic }, holdings) => {
                let mut attr = ibv_qp_attr {
                    qp_state: IBV_QPS_RTR,
                    path_mtu: mtu.into(),
                    dest_qp_num: remote.qpn,
                    rq_psn: remote.psn,
                    max_dest_rd_atomic: dest_rd_atomic,
                    min_rnr_timer,
                    ..ibv_qp_attr::default()
                };
                let mask = IBV_QP_STATE
                    | IBV_QP_AV
                    | IBV_QP_PATH_MTU
                    | IBV_QP_DEST_QPN
                    | IBV_QP_RQ_PSN
                    | IBV_QP_MAX_DEST_RD_ATOMIC
                    | IBV_QP_MIN_RNR_TIMER;
                let done = self.modify(holdings, shadow, mask, &mut attr, |attr, device| {
                    attr.ah_attr = route(device, &remote);
                });
                self.tell(Event::Connected(shadow, done));
            }
            (Order::Start { shadow, psn, timeout, retry_cnt, rnr_retry, rd_atomic, rights }, holdings) => {
                let mut attr = ibv_qp_attr {
                    qp_state: IBV_QPS_RTS,
                    sq_psn: psn,
                    timeout,
                    retry_cnt,
                    rnr_retry,
                    max_rd_atomic: rd_atomic,
                    ..granting(rights)
                };
                let mask = IBV_QP_STATE
                    | IBV_QP_SQ_PSN
                    | IBV_QP_TIMEOUT
                    | IBV_QP_RETRY_CNT
                    | IBV_QP_RNR_RETRY
                    | IBV_QP_MAX_QP_RD_ATOMIC
                    | RIGHTS;
                let done = self.modify(holdings, shadow, mask, &mut attr, |_, _| {});
                self.tell(Event::Started(shadow, done));
            }
            (Order::Change(shadow, rights), holdings) => {
                let mut attr = ibv_qp_attr { qp_state: IBV_QPS_RTS, ..granting(rights) };
                let mask = IBV_QP_STATE | RIGHTS;
                if !self.modify(holdings, shadow, mask, &mut attr, |_, _| {}) {
                    self.tell(Event::Started(shadow, false));
                }
            }
            (Order::Close(shadow), holdings) => {
                if let Some(holdings) = holdings {
                    if let Some(pair) = holdings.pairs.remove(&shadow) {
                        holdings.rooms[pair.room].left += pair.entries;
                    }
                    self.count(Some(holdings));
                }
                self.tell(Event::Closed(shadow));
            }
            (Order::Register { owner, tenant, window, addr, access }, holdings) => {
                let made =
                    holdings.map(|holdings| self.register(holdings, owner, tenant, (window, addr, access)));
                let key = match made {
                    Some(Ok(key)) => Some(key),
                    Some(Err(error)) => {
                        self.complain(
                            "memory is not registered, and reached by the link or through copies",
                            &error,
                        );
                        None
                    }
                    None => None,
                };
                self.tell(Event::Registered(owner, key));
            }
            (Order::Deregister(owner), holdings) => {
                if let Some(holdings) = holdings {
                    holdings.regions.remove(&owner);
                    self.count(Some(holdings));
                }
                self.tell(Event::Deregistered(owner));
            }
        }
    }

    fn complain(&self, what: &'static str, error: &io::Error) {
        if let Some(suppressed) = self.complaints.admit() {
            let hint = if error.raw_os_error() == Some(libc::ENOMEM) {
                "raise LimitMEMLOCK of the router"
            } else {
                ""
            };
            tracing::warn!(%error, hint, suppressed, "NIC: {what}");
        }
    }

    fn count(&self, holdings: Option<&Holdings>) {
        let (qps, regions, bytes) = holdings.map_or((0, 0, 0), |holdings| {
            let bytes = holdings.regions.values().map(|(_, bytes)| bytes).sum();
            (holdings.pairs.len() as u64, holdings.regions.len() as u64, bytes)
        });
        self.shared.qps.store(qps, Ordering::Relaxed);
        self.shared.regions.store(regions, Ordering::Relaxed);
        self.shared.region_bytes.store(bytes, Ordering::Relaxed);
    }

    fn open(
        &self,
        holdings: &mut Holdings,
        shadow: ShadowId,
        init: &ShadowInit,
    ) -> io::Result<(Endpoint, Bounce)> {
        let entries = init.send_wr + init.recv_wr;
        let room = self.room(holdings, entries)?;
        let generation = self.generation;
        let Holdings { device, domains, rooms, .. } = &mut *holdings;
        let domain = domain(device, domains, init.tenant, generation)?;
        let limits = device.limits;
        let cap = ibv_qp_cap {
            max_send_wr: init.send_wr.min(limits.wr),
            max_recv_wr: init.recv_wr.min(limits.wr),
            max_send_sge: limits.sge,
            max_recv_sge: limits.sge,
            max_inline_data: 0,
        };
        let made = ibv_qp_init_attr { cap, qp_type: IBV_QPT_RC, ..ibv_qp_init_attr::default() };
        let qp = Qp::new(&domain.pd, &rooms[room].cq, made)?;
        let mut attr = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            port_num: device.found.port,
            qp_access_flags: of_nic(init.access),
            ..ibv_qp_attr::default()
        };
        qp.modify(&mut attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)?;
        let mut random = [0; 4];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let psn = u32::from_ne_bytes(random) & 0xff_ffff;
        let opened = (Endpoint { qpn: qp.number(), psn, port: limits.port }, domain.bounce.clone());
        let _ = self.answers.send(Told::Qp(shadow, Arc::downgrade(&qp)));
        rooms[room].left -= entries;
        holdings.pairs.insert(shadow, Pair { qp, room, entries });
        self.count(Some(holdings));
        Ok(opened)
    }

    /// A CQ that has so many entries left.
    fn room(&self, holdings: &mut Holdings, entries: u32) -> io::Result<usize> {
        if let Some(at) = holdings.rooms.iter().position(|room| room.left >= entries) {
            return Ok(at);
        }
        let len = ENTRIES.max(entries).min(holdings.device.cqe);
        if len < entries {
            return Err(io::Error::other(format!("{entries} completions do not fit into a queue of {len}")));
        }
        let cq = Cq::new(&holdings.device.context, &holdings.channel, len)?;
        let _ = self.answers.send(Told::Cq(Arc::clone(&cq)));
        holdings.rooms.push(Room { cq, left: len });
        Ok(holdings.rooms.len() - 1)
    }

    fn register(
        &self,
        holdings: &mut Holdings,
        owner: (u32, u32),
        tenant: u32,
        (window, addr, access): (Window, u64, u32),
    ) -> io::Result<NicKey> {
        let bytes = window.len() as u64;
        let domain = domain(&holdings.device, &mut holdings.domains, tenant, self.generation)?;
        let region = Mr::new(&domain.pd, window, addr, access)?;
        let (lkey, rkey) = region.keys();
        holdings.regions.insert(owner, (region, bytes));
        self.count(Some(holdings));
        Ok(NicKey { lkey, rkey })
    }

    fn modify(
        &self,
        holdings: Option<&mut Holdings>,
        shadow: ShadowId,
        mask: u32,
        attr: &mut ibv_qp_attr,
        complete: impl FnOnce(&mut ibv_qp_attr, &Device),
    ) -> bool {
        let Some(holdings) = holdings else { return false };
        let Some(pair) = holdings.pairs.get(&shadow) else { return false };
        complete(attr, &holdings.device);
        match pair.qp.modify(attr, mask) {
            Ok(()) => true,
            Err(error) => {
                self.complain("a shadow QP is not connected", &error);
                false
            }
        }
    }
}

/// A tenant's protection domain, and its memory to bounce through.
fn domain<'a>(
    device: &Device,
    domains: &'a mut HashMap<u32, Domain>,
    tenant: u32,
    generation: u32,
) -> io::Result<&'a Domain> {
    if let Entry::Vacant(vacant) = domains.entry(tenant) {
        let pd = Pd::new(&device.context)?;
        let window = Window::heap(BOUNCE);
        let base = window.as_ptr() as u64;
        let region = Mr::new(&pd, window.clone(), base, AccessFlags::LOCAL_WRITE.bits())?;
        let bounce = Bounce { window, base, lkey: region.keys().0, generation };
        vacant.insert(Domain { pd, bounce, _region: region });
    }
    domains.get(&tenant).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Those of a QP's access flags that concern its shadow: atomics never go by NIC.
fn of_nic(access: u32) -> u32 {
    let rights = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_READ;
    access & rights.bits()
}

/// The attributes that say what a peer may do: [`RIGHTS`].
fn granting(rights: Rights) -> ibv_qp_attr {
    ibv_qp_attr {
        qp_access_flags: of_nic(rights.access),
        min_rnr_timer: rights.min_rnr_timer,
        ..ibv_qp_attr::default()
    }
}

/// The way to a peer's port.
fn route(device: &Device, remote: &Endpoint) -> ibv_ah_attr {
    let found = &device.found;
    let is_global = found.is_ethernet || remote.port.gid[..8] != found.gid[..8];
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: remote.port.gid },
            flow_label: 0,
            sgid_index: found.gid_index,
            hop_limit: 64,
            traffic_class: 0,
        },
        dlid: remote.port.lid,
        is_global: is_global.into(),
        port_num: found.port,
        ..ibv_ah_attr::default()
    }
}
