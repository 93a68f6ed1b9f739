//! Event channels: what waits to be handed out, and what is taken back.
//!
//! A reader sees that there is an event by a count outside of here, takes the count, and asks for the event. So when an
//! event is taken back, its count is, too; where a reader was faster, the event is kept for that reader, as if it had been
//! asked for before. The kernel's channel does both in one step.

use std::collections::VecDeque;

use verbs_abi::{
    proto::cm::{CmAnswer, Command, Event, EventKind, EventParam, Known},
    verbs::QpState,
};

use crate::{
    CommId, Manager, Refusal,
    client::Queued,
    id::{Id, Phase},
};

/// Events of a channel that are kept for readers at the most: a thread stands behind each.
const MAX_KEPT: usize = 64;

/// Which queued events a command takes back.
#[derive(Clone, Copy, Debug)]
enum Gone {
    Id(CommId),
    Membership(u32),
}

impl Gone {
    fn includes(self, queued: &Queued) -> bool {
        match self {
            Gone::Id(comm) => queued.owner == comm,
            Gone::Membership(number) => queued.membership == Some(number),
        }
    }
}

impl Manager {
    /// How many queued events a command will take back, and from which of the client's channels.
    #[must_use]
    pub fn revocable(&self, client: u32, channel: u32, command: &Command) -> Option<(u32, u32)> {
        let (channel, gone) = self.gone(client, channel, command)?;
        let queue = self.clients.get(&client)?.channels.get(&channel)?;
        let events = queue.iter().filter(|queued| gone.includes(queued)).count();
        (events > 0).then_some((channel, events as u32))
    }

    /// Hands `events` of those out now, to readers who have taken their counts and are about to ask.
    pub fn keep(&mut self, client: u32, channel: u32, command: &Command, events: u32) {
        let Some((channel, gone)) = self.gone(client, channel, command) else { return };
        for _ in 0..events {
            let Some(known) = self.clients.get_mut(&client) else { return };
            let Some(queue) = known.channels.get_mut(&channel) else { return };
            let kept = known.kept.entry(channel).or_default();
            let Some(at) = queue.iter().position(|queued| gone.includes(queued)) else { return };
            let Some(queued) = (kept.len() < MAX_KEPT).then(|| queue.remove(at)).flatten() else { return };
            // What it would tell of the id is not true any more when it is read.
            kept.push_back(queued.event.clone());
            self.count(client, &queued);
        }
    }

    fn gone(&self, client: u32, channel: u32, command: &Command) -> Option<(u32, Gone)> {
        let found = |channel, id| Some((channel, Gone::Id(self.find(client, channel, id).ok()?)));
        match *command {
            Command::DestroyId { id } => found(channel, id),
            Command::MigrateId { id, from } if from != channel => found(from, id),
            Command::LeaveMulticast { id } => Some((channel, Gone::Membership(id))),
            _ => None,
        }
    }

    /// Takes queued events out of an id's channel, and with the events of requests the ids made for them.
    pub(crate) fn purge(&mut self, comm: CommId, gone: impl Fn(&Queued) -> bool) -> u32 {
        let Some(queue) = self.queue(comm) else { return 0 };
        let before = queue.len();
        let mut requests = Vec::new();
        queue.retain(|queued| {
            let gone = gone(queued);
            requests.extend(queued.request.filter(|_| gone));
            !gone
        });
        let revoked = before - queue.len();
        for request in requests {
            self.destroy(request);
        }
        revoked as u32
    }

    fn queue(&mut self, comm: CommId) -> Option<&mut VecDeque<Queued>> {
        let id = self.ids.get(&comm)?;
        self.clients.get_mut(&id.client)?.channels.get_mut(&id.channel)
    }

    /// Queues an event of an id, unless the client has no word for the id yet.
    pub(crate) fn emit(&mut self, comm: CommId, kind: EventKind, status: i32, param: EventParam) {
        let Some(id) = self.ids.get(&comm).filter(|id| id.uid != 0) else { return };
        let event = Event { uid: id.uid, id: id.number, kind, status, param, known: None };
        self.enqueue(comm, Queued { owner: comm, request: None, membership: None, event });
    }

    /// Queues an event that carries nothing.
    pub(crate) fn emit_plain(&mut self, comm: CommId, kind: EventKind, status: i32) {
        if let Some(param) = self.ids.get(&comm).map(Id::no_param) {
            self.emit(comm, kind, status, param);
        }
    }

    /// Puts an event into the channel of `comm`.
    pub(crate) fn enqueue(&mut self, comm: CommId, queued: Queued) {
        let Some((client, channel)) = self.ids.get(&comm).map(|id| (id.client, id.channel)) else { return };
        if let Some(queue) = self.queue(comm) {
            queue.push_back(queued);
            self.rings.push((client, channel));
        }
    }

    /// Hands the next event out.
    pub(crate) fn next_event(&mut self, client: u32, channel: u32) -> Option<Event> {
        let known = self.clients.get_mut(&client)?;
        if let Some(event) = known.kept.get_mut(&channel).and_then(VecDeque::pop_front) {
            return Some(event);
        }
        let queued = known.channels.get_mut(&channel)?.pop_front()?;
        self.count(client, &queued);
        let Queued { owner, request, event, .. } = queued;
        let known = self.known(event.kind, request.unwrap_or(owner));
        Some(Event { known, ..event })
    }

    /// What librdmacm asks after an event of this kind.
    fn known(&self, kind: EventKind, comm: CommId) -> Option<Box<Known>> {
        use EventKind::{AddrResolved, ConnectRequest, ConnectResponse, RouteResolved};
        if !matches!(kind, AddrResolved | RouteResolved | ConnectRequest | ConnectResponse) {
            return None;
        }
        let connects = self.id(comm).is_ok_and(|id| id.phase != Phase::None && !id.is_datagram());
        let later: &[QpState] = if connects { &[QpState::Rtr, QpState::Rts] } else { &[] };
        let states = [QpState::Init].iter().chain(later);
        let attr = |state: &QpState| match self.init_qp_attr(comm, state.value()) {
            Ok(CmAnswer::QpAttr { mask, attr }) => Some((mask, attr)),
            _ => None,
        };
        Some(Box::new(Known { route: self.route(comm).ok(), attrs: states.filter_map(attr).collect() }))
    }

    /// Counts an event that is handed out.
    fn count(&mut self, client: u32, queued: &Queued) {
        if let Some(number) = queued.membership
            && let Some(known) = self.clients.get_mut(&client)
            && let Some(membership) = known.memberships.look_up_mut(number)
        {
            membership.events_reported += 1;
        }
        if let Some(owner) = self.ids.get_mut(&queued.owner) {
            owner.events_reported += 1;
        }
        if queued.request.is_some() {
            self.make_room(queued.owner);
        }
    }

    /// Moves an id and its queued events to another channel of its client.
    pub(crate) fn migrate(&mut self, comm: CommId, channel: u32) -> Result<CmAnswer, Refusal> {
        let id = self.id(comm)?;
        let (client, events) = (id.client, id.events_reported);
        let from = id.channel;
        let mut moved = VecDeque::new();
        if from != channel
            && let Some(queue) = self.queue(comm)
        {
            let (gone, stay) = queue.drain(..).partition(|queued: &Queued| queued.owner == comm);
            (moved, *queue) = (gone, stay);
        }
        let id = self.id_mut(comm)?;
        id.channel = channel;
        // The ids of requests that wait follow their listener.
        let requests: Vec<CommId> = moved.iter().filter_map(|queued| queued.request).collect();
        for request in requests {
            if let Some(id) = self.ids.get_mut(&request) {
                id.channel = channel;
            }
        }
        let revoked = moved.len() as u32;
        if let Some(queue) = self.queue(comm) {
            queue.extend(moved);
        }
        self.rings.extend((0..revoked).map(|_| (client, channel)));
        Ok(CmAnswer::Reported { events, revoked })
    }

    /// The channels that have got an event since the last time, once an event: client, channel.
    pub fn take_rings(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.rings)
    }
}
