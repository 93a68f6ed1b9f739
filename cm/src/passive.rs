//! Listening: finding who is asked, and making ends for requests.

use std::net::SocketAddr;

use verbs_abi::proto::cm::{Address, ConnParam, Event, EventKind, EventParam, UdParam};

use crate::{
    Body, CommId, Manager, Message, Refusal,
    client::Queued,
    connect::padded,
    id::{Backlog, Id, Phase, State},
    ports::Scope,
    private_data, reason, sidr,
};

/// Backlog of listeners that ask for none or too much, as Linux has it.
const MAX_BACKLOG: u32 = 1024;
/// Requests that may come before there is room in the backlog.
const MAX_PARKED: usize = 1024;

impl Manager {
    pub(crate) fn listen(&mut self, comm: CommId, backlog: u32) -> Result<(), Refusal> {
        if self.id(comm)?.state == State::Idle {
            self.bind(comm, Address::Ip(SocketAddr::from(([0, 0, 0, 0], 0))))?;
        }
        let id = self.id(comm)?;
        if id.state != State::Bound {
            return Err(Refusal::WrongState);
        }
        let address = id.source_ip().ok_or(Refusal::Family)?;
        let place = self.place(id)?;
        let service = (place.tenant, id.space, address.port());
        if id.reuse_addr {
            // The option lets several bind, but only one of them listen.
            self.ports.check(Scope::of(place, id.space), id, address, false, &self.ids, comm)?;
        }
        let limit = if backlog == 0 || backlog > MAX_BACKLOG { MAX_BACKLOG } else { backlog };
        let id = self.id_mut(comm)?;
        id.state = State::Listen;
        id.backlog = Backlog { limit, ..Backlog::default() };
        self.listeners.entry(service).or_default().push(comm);
        for message in self.graces.end((service.0, service.2)) {
            self.asked(message);
        }
        Ok(())
    }

    /// The program ends an id itself: if that listens, another may follow.
    pub(crate) fn begin_grace(&mut self, comm: CommId) {
        let Some(id) = self.ids.get(&comm).filter(|id| id.state == State::Listen) else { return };
        if let (Ok(place), Some(address)) = (self.place(id), id.source_ip()) {
            let port = (place.tenant, address.port());
            self.graces.begin(port, self.now);
        }
    }

    /// Listens no more; whoever still waits is told that nobody does.
    pub(crate) fn close_listener(&mut self, comm: CommId) {
        let Some(id) = self.ids.get_mut(&comm).filter(|id| id.state == State::Listen) else { return };
        id.state = State::Bound;
        let parked = std::mem::take(&mut id.backlog.parked);
        let (client, space, address) = (id.client, id.space, id.source_ip());
        let tenant = self.clients.get(&client).map(|client| client.place.tenant);
        if let (Some(tenant), Some(address)) = (tenant, address) {
            let service = (tenant, space, address.port());
            if let Some(listeners) = self.listeners.get_mut(&service) {
                listeners.retain(|listener| *listener != comm);
                if listeners.is_empty() {
                    self.listeners.remove(&service);
                }
            }
        }
        parked.iter().for_each(|message| self.refuse(message, reason::INVALID_SERVICE_ID));
    }

    /// Somebody asks for a connection or for datagrams.
    pub(crate) fn asked(&mut self, message: Message) {
        let Some(space) = space_of(&message.body) else { return };
        if let Some(listener) = self.listener_for(&message, space) {
            return self.offer(listener, message);
        }
        let port = (message.tenant, message.destination.port());
        if !self.graces.has(port) && self.is_about_to_listen(&message, space) {
            self.graces.begin(port, self.now);
        }
        if let Some(message) = self.graces.wait(port, message) {
            self.refuse(&message, reason::INVALID_SERVICE_ID);
        }
    }

    /// Who listens on the address that a message goes to.
    fn listener_for(&self, message: &Message, space: u16) -> Option<CommId> {
        let to = message.destination;
        let listeners = self.listeners.get(&(message.tenant, space, to.port()))?;
        let listens = |comm: &&CommId| self.ids.get(comm).is_some_and(|id| self.is_for(message, id));
        // One that names the address goes before one that takes all.
        let exact = |comm: &&CommId| self.ids[*comm].source_ip().is_some_and(|at| at.ip() == to.ip());
        let mut found = listeners.iter().filter(listens);
        let first = found.clone().find(exact);
        first.or_else(|| found.next()).copied()
    }

    /// Whether an id has the address that a message goes to.
    fn is_for(&self, message: &Message, id: &Id) -> bool {
        let (Some(at), Ok(place)) = (id.source_ip(), self.place(id)) else { return false };
        let to = message.destination;
        // Every namespace has its own loopback addresses.
        let reaches = !to.ip().is_loopback() || message.namespace == Some(place.namespace);
        let all = at.ip().is_unspecified() && (!id.af_only || at.is_ipv4() == to.is_ipv4());
        reaches && (at.ip() == to.ip() || (all && place.owns(to.ip())))
    }

    /// Whether somebody has taken the port and not said yet what for.
    fn is_about_to_listen(&self, message: &Message, space: u16) -> bool {
        let holders = self.ports.holders(message.tenant, space, message.destination.port());
        let mut ids = holders.filter_map(|comm| self.ids.get(&comm));
        ids.any(|id| id.state == State::Bound && self.is_for(message, id))
    }

    /// Gives a request to its listener, now or when there is room.
    fn offer(&mut self, listener: CommId, message: Message) {
        let Some(id) = self.ids.get_mut(&listener) else { return };
        if message.from.host != 0 && id.backlog.parked.iter().any(|parked| parked.from == message.from) {
            return;
        }
        if id.backlog.queued < id.backlog.limit && id.backlog.parked.is_empty() {
            self.deliver(listener, message);
        } else if id.backlog.parked.len() < MAX_PARKED {
            id.backlog.parked.push_back(message);
        } else {
            self.refuse(&message, reason::NO_RESOURCES);
        }
    }

    /// One of a listener's requests was taken: the next may come.
    pub(crate) fn make_room(&mut self, listener: CommId) {
        let Some(id) = self.ids.get_mut(&listener) else { return };
        id.backlog.queued = id.backlog.queued.saturating_sub(1);
        if let Some(message) = id.backlog.parked.pop_front() {
            self.deliver(listener, message);
        }
    }

    /// Makes an end for a request and tells the listener.
    fn deliver(&mut self, listener: CommId, message: Message) {
        let Some(id) = self.ids.get(&listener) else { return };
        let (uid, client, channel, space) = (id.uid, id.client, id.channel, id.space);
        let (qp_type, tos) = (id.qp_type, id.tos);
        let Ok(comm) = self.new_id(client, channel, space, qp_type) else {
            return self.refuse(&message, reason::NO_RESOURCES);
        };
        let Some(end) = self.ids.get_mut(&comm) else { return };
        end.state = State::Connect;
        end.source = Some(Address::Ip(message.destination));
        end.destination = Some(Address::Ip(message.source));
        end.on_device = true;
        end.tos = tos;
        end.asked_sid = u64::from(space) << 16 | u64::from(message.destination.port());
        end.host = message.from.host;
        end.connection.remote = Some(message.from);
        let number = end.number;
        let param = match message.body {
            Body::ConnectRequest { offer, .. } => {
                end.phase = Phase::ReqReceived;
                end.connection.remote_qpn = offer.qpn;
                end.connection.remote_psn = offer.psn;
                // What the other end asks is what this one answers.
                end.connection.responder_resources = offer.initiator_depth;
                end.connection.initiator_depth = offer.responder_resources;
                end.connection.retry_count = offer.retry_count;
                end.connection.rnr_retry_count = offer.rnr_retry_count;
                EventParam::Conn(ConnParam {
                    qpn: offer.qpn,
                    qkey: 0,
                    responder_resources: offer.initiator_depth,
                    initiator_depth: offer.responder_resources,
                    flow_control: offer.flow_control,
                    retry_count: offer.retry_count,
                    rnr_retry_count: offer.rnr_retry_count,
                    srq: offer.srq,
                    private_data: padded(offer.private_data, private_data::REQUEST),
                })
            }
            Body::DatagramRequest { private_data, .. } => {
                end.phase = Phase::SidrReceived;
                let private_data = padded(private_data, private_data::DATAGRAM_REQUEST);
                EventParam::Ud(UdParam { private_data, ..UdParam::default() })
            }
            _ => return,
        };
        self.asked.insert(message.from, comm);
        if let Some(id) = self.ids.get_mut(&listener) {
            id.backlog.queued += 1;
        }
        let kind = EventKind::ConnectRequest;
        let event = Event { uid, id: number, kind, status: 0, param, known: None };
        self.enqueue(listener, Queued { owner: listener, request: Some(comm), membership: None, event });
    }

    /// Tells whoever asked that it will not be.
    pub(crate) fn refuse(&mut self, message: &Message, reason: u16) {
        let to = message.from;
        let body = match message.body {
            Body::DatagramRequest { .. } => crate::datagram::refusal(to, sidr::UNSUPPORTED),
            _ => Body::Reject { to, reason, private_data: Vec::new() },
        };
        self.answer(message, body);
    }

    /// Whoever asked does not want any more.
    pub(crate) fn withdrawn(&mut self, message: &Message, space: u16) {
        let from = message.from;
        if let Some(comm) = self.asked.get(&from).copied() {
            if !self.is_from_peer(comm, message) {
                return;
            }
            self.wait(comm, None);
            if let Ok(id) = self.id_mut(comm)
                && matches!(id.phase, Phase::ReqReceived | Phase::RepSent | Phase::SidrReceived)
            {
                id.phase = Phase::Ended;
                if !id.is_datagram() {
                    let private_data = padded(Vec::new(), private_data::REJECT);
                    let param = EventParam::Conn(ConnParam { private_data, ..ConnParam::default() });
                    self.emit(comm, EventKind::Rejected, reason::TIMEOUT.into(), param);
                }
            }
            return;
        }
        let service = (message.tenant, space, message.destination.port());
        self.graces.withdraw((service.0, service.2), from);
        for comm in self.listeners.get(&service).into_iter().flatten() {
            if let Some(id) = self.ids.get_mut(comm) {
                id.backlog.parked.retain(|parked| parked.from != from);
            }
        }
        // Should the request still come, it comes too late.
        self.far.end(from, None);
    }
}

fn space_of(body: &Body) -> Option<u16> {
    match body {
        Body::ConnectRequest { space, .. } | Body::DatagramRequest { space, .. } => Some(*space),
        _ => None,
    }
}
