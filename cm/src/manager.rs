//! The manager: who its clients are, which command goes where, what is due when.

use std::{
    collections::{BTreeSet, HashMap, VecDeque, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use verbs_abi::{
    ids,
    proto::cm::{CmAnswer, CmOption, Command, EventKind},
};

use crate::{
    Body, CommId, Message, Place, Refusal,
    client::Client,
    far::Far,
    grace::Graces,
    id::{Id, Phase, State},
    ports::{Ports, Scope},
    space,
};

/// librdmacm's tables of ids end there.
const MAX_IDS: u32 = 1 << 16;
/// `-ETIMEDOUT`, as an event's status.
pub(crate) const TIMED_OUT: i32 = -110;
/// How long the other end may take for each step: Linux waits for 4.3 s sixteen times.
pub(crate) const PATIENCE: Duration = Duration::from_secs(68);
/// `IBV_QPT_RC` and `IBV_QPT_UD`.
const QPT_RC: u8 = 2;
const QPT_UD: u8 = 4;

/// What a manager is told when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Random.
    pub seed: u64,
    /// Ids of one client, memberships in multicast groups counted in.
    pub ids: u32,
    /// The same of one tenant.
    pub tenant_ids: u32,
    /// Event channels of one client.
    pub channels: u32,
    /// The device's `enum ibv_mtu`.
    pub mtu: u8,
}

/// A listening id, for those who ask what goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose it is.
    pub client: u32,
    /// Its port space.
    pub space: u16,
    /// Where it listens.
    pub address: SocketAddr,
}

/// Where listeners are looked for.
pub(crate) type Service = (u32, u16, u16);

/// The connection manager of a host.
#[derive(Debug)]
pub struct Manager {
    pub(crate) settings: Settings,
    random: u64,
    next_serial: u64,
    pub(crate) clients: HashMap<u32, Client>,
    pub(crate) ids: HashMap<CommId, Id>,
    pub(crate) ports: Ports,
    /// Listening ids by tenant, port space and port.
    pub(crate) listeners: HashMap<Service, Vec<CommId>>,
    /// The ends that were made for requests, by the asking end.
    pub(crate) asked: HashMap<CommId, CommId>,
    /// How many clients have an address.
    addresses: HashMap<(u32, IpAddr), u32>,
    pub(crate) graces: Graces,
    pub(crate) far: Far,
    /// The time as it was last told.
    pub(crate) now: Duration,
    /// Ids that look for an address.
    pub(crate) resolving: BTreeSet<CommId>,
    /// How many ids each tenant has.
    ids_of: HashMap<u32, u32>,
    deadlines: BTreeSet<(Duration, CommId)>,
    outgoing: VecDeque<Message>,
    pub(crate) rings: Vec<(u32, u32)>,
}

impl Manager {
    /// A manager without clients.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings: Settings { ids: settings.ids.min(MAX_IDS), ..settings },
            random: settings.seed,
            // A manager that follows another one on this host must not take its messages for its own.
            next_serial: 1 + (mix(settings.seed) >> 16),
            clients: HashMap::new(),
            ids: HashMap::new(),
            ports: Ports::default(),
            listeners: HashMap::new(),
            asked: HashMap::new(),
            addresses: HashMap::new(),
            graces: Graces::default(),
            far: Far::default(),
            now: Duration::ZERO,
            resolving: BTreeSet::new(),
            ids_of: HashMap::new(),
            deadlines: BTreeSet::new(),
            outgoing: VecDeque::new(),
            rings: Vec::new(),
        }
    }

    /// Makes a client known, or where it lives now. `client` must never be used again after [`Self::close`].
    pub fn open(&mut self, client: u32, place: Place) {
        let new = keys(&place);
        let old = match self.clients.get_mut(&client) {
            Some(known) if known.place == place => return,
            Some(known) => Some(std::mem::replace(&mut known.place, place)),
            None => {
                self.clients.insert(client, Client::new(place));
                None
            }
        };
        for key in new {
            *self.addresses.entry(key).or_default() += 1;
        }
        old.iter().for_each(|place| self.forget_addresses(place));
        for comm in self.resolving.clone() {
            self.try_resolve(comm);
        }
    }

    /// Ends a client and all it has.
    pub fn close(&mut self, client: u32) {
        let Some(known) = self.clients.get(&client) else { return };
        let channels: Vec<u32> = known.channels.keys().copied().collect();
        for channel in channels {
            self.close_channel(client, channel);
        }
        if let Some(known) = self.clients.remove(&client) {
            self.forget_addresses(&known.place);
        }
    }

    fn forget_addresses(&mut self, place: &Place) {
        for key in keys(place) {
            if let Some(count) = self.addresses.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.addresses.remove(&key);
                }
            }
        }
    }

    /// Whether a client of the tenant has an address.
    pub(crate) fn is_known(&self, tenant: u32, ip: IpAddr) -> bool {
        self.addresses.contains_key(&(tenant, ip))
    }

    /// Makes an event channel.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn open_channel(&mut self, client: u32, channel: u32) -> Result<(), Refusal> {
        let limit = self.settings.channels as usize;
        let known = self.clients.get_mut(&client).ok_or(Refusal::WrongChannel)?;
        if known.channels.len() >= limit {
            return Err(Refusal::TooMany);
        }
        known.channels.entry(channel).or_default();
        Ok(())
    }

    /// Ends a channel and every id on it.
    pub fn close_channel(&mut self, client: u32, channel: u32) {
        let Some(known) = self.clients.get_mut(&client) else { return };
        let on_it = |comm: &&CommId| self.ids.get(comm).is_some_and(|id| id.channel == channel);
        let ids: Vec<CommId> = known.numbers.iter().map(|(_, comm)| comm).filter(on_it).copied().collect();
        for comm in ids {
            self.destroy(comm);
        }
        if let Some(known) = self.clients.get_mut(&client) {
            known.channels.remove(&channel);
            known.kept.remove(&channel);
        }
    }

    /// Executes a command that was written to a channel.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn handle(
        &mut self,
        client: u32,
        channel: u32,
        command: Command,
        now: Duration,
    ) -> Result<CmAnswer, Refusal> {
        self.now = now;
        let known = self.clients.get(&client).ok_or(Refusal::WrongChannel)?;
        if !known.channels.contains_key(&channel) {
            return Err(Refusal::WrongChannel);
        }
        let find = |id| self.find(client, channel, id);
        let done = |()| CmAnswer::Done;
        match command {
            Command::CreateId { uid, space, qp_type } => self.create_id(client, channel, uid, space, qp_type),
            Command::DestroyId { id } => {
                let comm = find(id)?;
                self.begin_grace(comm);
                let (events, revoked) = self.destroy(comm);
                Ok(CmAnswer::Reported { events, revoked })
            }
            Command::Bind { id, address } => self.bind(find(id)?, address).map(done),
            Command::ResolveAddr { id, source, destination, timeout_ms } => {
                let until = now + Duration::from_millis(timeout_ms.into());
                self.resolve_addr(find(id)?, source, destination, until).map(done)
            }
            Command::ResolveRoute { id } => self.resolve_route(find(id)?).map(done),
            Command::Query { id } => self.route(find(id)?).map(CmAnswer::Route),
            Command::Connect { id, param } => self.connect(find(id)?, param, now).map(done),
            Command::Listen { id, backlog } => self.listen(find(id)?, backlog).map(done),
            Command::Accept { id, uid, param } => self.accept(find(id)?, uid, param, now).map(done),
            Command::Reject { id, reason, private_data } => {
                self.reject(find(id)?, reason, private_data).map(done)
            }
            Command::Disconnect { id } => self.disconnect(find(id)?, now).map(done),
            Command::InitQpAttr { id, state } => self.init_qp_attr(find(id)?, state),
            Command::NextEvent => Ok(CmAnswer::Event(self.next_event(client, channel))),
            Command::SetOption { id, option } => self.set_option(find(id)?, option).map(done),
            Command::Notify { id, event } => self.notify(find(id)?, event).map(done),
            Command::JoinMulticast { id, uid, address, .. } => self.join(find(id)?, uid, address),
            Command::LeaveMulticast { id } => self.leave(client, channel, id),
            Command::MigrateId { id, from } => self.migrate(self.find(client, from, id)?, channel),
        }
    }

    pub(crate) fn find(&self, client: u32, channel: u32, number: u32) -> Result<CommId, Refusal> {
        let known = self.clients.get(&client).ok_or(Refusal::NoSuchId)?;
        let comm = *known.numbers.look_up(number)?;
        match self.ids.get(&comm) {
            Some(id) if id.channel == channel => Ok(comm),
            Some(_) => Err(Refusal::WrongChannel),
            None => Err(Refusal::NoSuchId),
        }
    }

    fn create_id(
        &mut self,
        client: u32,
        channel: u32,
        uid: u64,
        space: u16,
        qp_type: u8,
    ) -> Result<CmAnswer, Refusal> {
        let qp_type = match space {
            space::TCP => QPT_RC,
            space::UDP | space::IPOIB => QPT_UD,
            space::IB => qp_type,
            _ => return Err(Refusal::Invalid),
        };
        let comm = self.new_id(client, channel, space, qp_type)?;
        let id = self.id_mut(comm)?;
        id.uid = uid;
        Ok(CmAnswer::Id(id.number))
    }

    pub(crate) fn new_id(
        &mut self,
        client: u32,
        channel: u32,
        space: u16,
        qp_type: u8,
    ) -> Result<CommId, Refusal> {
        let comm = CommId { host: 0, serial: self.next_serial };
        let limit = self.settings.ids;
        let known = self.clients.get_mut(&client).ok_or(Refusal::WrongChannel)?;
        if known.numbers.len() + known.memberships.len() >= limit as usize {
            return Err(Refusal::TooMany);
        }
        let of_tenant = self.ids_of.entry(known.place.tenant).or_default();
        if *of_tenant >= self.settings.tenant_ids {
            return Err(Refusal::TooMany);
        }
        let number = known.numbers.take(comm, limit)?;
        *of_tenant += 1;
        self.next_serial += 1;
        let mut id = Id::new(client, number, channel, space, qp_type);
        // Chosen now: the accepting end's QP is made ready before the application accepts.
        id.connection.local_psn = self.random_24();
        self.ids.insert(comm, id);
        Ok(comm)
    }

    pub(crate) fn id(&self, comm: CommId) -> Result<&Id, Refusal> {
        self.ids.get(&comm).ok_or(Refusal::NoSuchId)
    }

    pub(crate) fn id_mut(&mut self, comm: CommId) -> Result<&mut Id, Refusal> {
        self.ids.get_mut(&comm).ok_or(Refusal::NoSuchId)
    }

    pub(crate) fn place(&self, id: &Id) -> Result<&Place, Refusal> {
        self.clients.get(&id.client).map(|client| &client.place).ok_or(Refusal::NoSuchId)
    }

    /// Ends an id. How many of its events were handed out, and how many queued ones are gone.
    pub(crate) fn destroy(&mut self, comm: CommId) -> (u32, u32) {
        self.part(comm);
        self.wait(comm, None);
        self.resolving.remove(&comm);
        self.close_listener(comm);
        self.release_port(comm);
        let revoked = self.purge(comm, |queued| queued.owner == comm);
        let Some(id) = self.ids.remove(&comm) else { return (0, revoked) };
        self.leave_word(comm);
        if let Some(remote) = id.connection.remote
            && self.asked.remove(&remote).is_some()
        {
            self.far.end(remote, id.told);
        }
        if let Some(client) = self.clients.get_mut(&id.client) {
            if let Entry::Occupied(mut count) = self.ids_of.entry(client.place.tenant) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            client.numbers.put(id.number);
            let gone: Vec<u32> =
                client.memberships.iter().filter(|(_, m)| m.owner == comm).map(|(n, _)| n).collect();
            for number in gone {
                client.memberships.put(number);
            }
        }
        (id.events_reported, revoked)
    }

    pub(crate) fn release_port(&mut self, comm: CommId) {
        let Some(id) = self.ids.get_mut(&comm).filter(|id| id.holds_port) else { return };
        id.holds_port = false;
        let (Some(client), Some(address)) = (self.clients.get(&id.client), id.source_ip()) else { return };
        self.ports.release(Scope::of(&client.place, id.space), address.port(), comm);
    }

    fn set_option(&mut self, comm: CommId, option: CmOption) -> Result<(), Refusal> {
        let id = self.id_mut(comm)?;
        match option {
            CmOption::Tos(tos) => id.tos = tos,
            CmOption::ReuseAddr(reuse) => {
                if id.state != State::Idle && (!reuse || id.state == State::Listen) {
                    return Err(Refusal::WrongState);
                }
                id.reuse_addr = reuse;
            }
            CmOption::AfOnly(only) => {
                if !matches!(id.state, State::Idle | State::Bound) {
                    return Err(Refusal::WrongState);
                }
                id.af_only = only;
            }
            CmOption::AckTimeout(code) => id.ack_timeout = Some(code & 0x1f).filter(|code| *code != 0),
            CmOption::Path => return self.resolve_route(comm),
        }
        Ok(())
    }

    /// Sets or takes back what happens to an id when nothing else does.
    pub(crate) fn wait(&mut self, comm: CommId, until: Option<Duration>) {
        let Some(id) = self.ids.get_mut(&comm) else { return };
        if let Some(old) = std::mem::replace(&mut id.deadline, until) {
            self.deadlines.remove(&(old, comm));
        }
        self.deadlines.extend(until.map(|until| (until, comm)));
    }

    /// When [`Self::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let ids = self.deadlines.first().map(|(until, _)| *until);
        let looks = self.far.next_look().filter(|_| !self.resolving.is_empty());
        [ids, self.graces.deadline(), self.far.deadline(), looks].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Duration) {
        self.now = now;
        self.expire_graces(now);
        self.look_elsewhere(now);
        while let Some((until, comm)) = self.deadlines.first().copied().filter(|(until, _)| *until <= now) {
            self.deadlines.remove(&(until, comm));
            if let Some(id) = self.ids.get_mut(&comm) {
                id.deadline = None;
                self.expire(comm, now);
            }
        }
        self.repeat(now);
    }

    fn expire(&mut self, comm: CommId, now: Duration) {
        let Some(id) = self.ids.get_mut(&comm) else { return };
        match (id.state, id.phase) {
            (State::AddrQuery, _) => {
                id.state = State::Bound;
                self.resolving.remove(&comm);
                self.emit_plain(comm, EventKind::AddrError, TIMED_OUT);
            }
            (_, Phase::ReqSent | Phase::SidrSent | Phase::RepSent) => {
                self.part(comm);
                self.emit_plain(comm, EventKind::Unreachable, TIMED_OUT);
            }
            (_, Phase::DreqSent) => self.end_connection(comm, TIMED_OUT, now),
            (_, Phase::TimeWait) => {
                id.phase = Phase::Ended;
                self.emit_plain(comm, EventKind::TimewaitExit, 0);
            }
            _ => {}
        }
    }

    /// Sends a message of an id that has both addresses.
    pub(crate) fn send(&mut self, comm: CommId, body: Body) {
        let Some(id) = self.ids.get(&comm) else { return };
        let (Some(source), Some(destination)) = (id.source_ip(), id.destination_ip()) else { return };
        let Some(place) = self.clients.get(&id.client).map(|client| &client.place) else { return };
        let (towards, tenant, namespace) = (id.host, place.tenant, Some(place.namespace));
        let message = Message { towards, tenant, from: comm, namespace, source, destination, body };
        if towards != 0 {
            self.remember(comm, &message);
        }
        self.outgoing.push_back(message);
    }

    /// Sends a message as it is.
    pub(crate) fn post(&mut self, message: Message) {
        self.outgoing.push_back(message);
    }

    /// Sends a message that answers another for which there is no id.
    pub(crate) fn answer(&mut self, to: &Message, body: Body) {
        self.outgoing.push_back(Message {
            towards: to.from.host,
            tenant: to.tenant,
            // In the name of the end that was meant, which is no more.
            from: to.body.to().unwrap_or(CommId { host: 0, serial: 0 }),
            namespace: None,
            source: to.destination,
            destination: to.source,
            body,
        });
    }

    /// The next message to deliver.
    pub fn next_message(&mut self) -> Option<Message> {
        self.outgoing.pop_front()
    }

    /// Everybody who listens.
    pub fn listeners(&self) -> impl Iterator<Item = Listener> + '_ {
        self.listeners.values().flatten().filter_map(|comm| {
            let id = self.ids.get(comm)?;
            Some(Listener { client: id.client, space: id.space, address: id.source_ip()? })
        })
    }

    /// How many ids a client has.
    #[must_use]
    pub fn id_count(&self, client: u32) -> usize {
        self.clients.get(&client).map_or(0, |client| client.numbers.len())
    }

    /// Whether nothing is left of any client.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
            && self.ids.is_empty()
            && self.ids_of.is_empty()
            && self.asked.is_empty()
            && self.listeners.is_empty()
            && self.addresses.is_empty()
            && self.resolving.is_empty()
            && self.ports.is_empty()
            && self.graces.is_empty()
            && self.far.is_silent()
    }

    /// 24 random bits; good for PSNs and ports, not for secrets.
    pub(crate) fn random_24(&mut self) -> u32 {
        (self.random_64() >> 40) as u32
    }

    pub(crate) fn random_64(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.random)
    }
}

/// Makes all bits depend on all bits.
fn mix(word: u64) -> u64 {
    let mixed = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The addresses of a place that others can reach.
fn keys(place: &Place) -> Vec<(u32, IpAddr)> {
    let ips = place.gids.iter().map(|gid| ids::Gid(*gid).ip());
    ips.filter(|ip| !ip.is_loopback()).map(|ip| (place.tenant, ip)).collect()
}
