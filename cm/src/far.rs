//! Ends on other hosts: where addresses live, what is said again, what was heard before.
//!
//! A link delivers in order, but what was on its way when it broke is lost, and some of that is said again although it
//! was heard. So whatever waits for an answer is said again until that comes, after a pause that grows and at once when
//! a link is new, as long as its sender waits; and a request is known by the end that asks, also when the end that
//! answered is no more. Leaves to others: how long each step may take (`connect`), links and the directory (the
//! router).

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt::Debug,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use crate::{
    Body, CommId, Manager, Message,
    id::{Id, Phase},
    manager::PATIENCE,
};

/// The pause before something is said again; it doubles until the longest, which is Linux's only one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(4295);
/// How often unknown addresses are asked for again, and how many at a time.
const LOOK: Duration = Duration::from_millis(250);
const LOOKS: usize = 1024;
/// Requests of one host that are remembered after their end.
const REMEMBERED: usize = 8192;

/// Who knows where addresses live.
pub trait Routes: Debug + Send + Sync {
    /// The host behind which an address of a tenant lives, counted from 1; `None` for this one, and for addresses that
    /// nobody knows. Must not wait.
    fn host(&self, tenant: u32, ip: IpAddr) -> Option<u32>;

    /// Whether other hosts find this one by an address of the tenant.
    fn is_published(&self, tenant: u32, ip: IpAddr) -> bool;
}

/// What a manager knows of other hosts.
#[derive(Debug, Default)]
pub(crate) struct Far {
    routes: Option<Arc<dyn Routes>>,
    /// What is said again, by the end that says it. Some of these ends are no more.
    unanswered: HashMap<CommId, Unanswered>,
    due: BTreeSet<(Duration, CommId)>,
    /// How many of these ends are no more, by tenant.
    orphans: HashMap<u32, u32>,
    /// By host.
    ended: HashMap<u32, Ended>,
    next_look: Duration,
    /// Where to go on looking.
    looked: Option<CommId>,
}

/// Something that waits for an answer.
#[derive(Debug)]
struct Unanswered {
    message: Message,
    at: Duration,
    pause: Duration,
    /// For ends that are no more: how long.
    orphan_until: Option<Duration>,
}

/// Requests of a host that have ended, and what it was told then.
#[derive(Debug, Default)]
struct Ended {
    answers: HashMap<CommId, Option<Box<Message>>>,
    order: VecDeque<CommId>,
}

impl Far {
    pub(crate) fn host(&self, tenant: u32, ip: IpAddr) -> Option<u32> {
        self.routes.as_ref()?.host(tenant, ip)
    }

    pub(crate) fn is_published(&self, tenant: u32, ip: IpAddr) -> bool {
        self.routes.as_ref().is_some_and(|routes| routes.is_published(tenant, ip))
    }

    /// When something is to be said again.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.due.first().map(|(at, _)| *at)
    }

    /// When unknown addresses are to be asked for again.
    pub(crate) fn next_look(&self) -> Option<Duration> {
        self.routes.as_ref().map(|_| self.next_look)
    }

    /// Whether nothing waits for an answer.
    pub(crate) fn is_silent(&self) -> bool {
        self.unanswered.is_empty() && self.due.is_empty() && self.orphans.is_empty()
    }

    /// A request has ended, with this as the last word.
    pub(crate) fn end(&mut self, from: CommId, answer: Option<Box<Message>>) {
        if from.host == 0 {
            return;
        }
        let ended = self.ended.entry(from.host).or_default();
        let answer = answer.filter(|answer| is_refusal(&answer.body));
        if ended.answers.insert(from, answer).is_none() {
            ended.order.push_back(from);
        }
        if ended.order.len() > REMEMBERED
            && let Some(oldest) = ended.order.pop_front()
        {
            ended.answers.remove(&oldest);
        }
    }

    fn expect(&mut self, comm: CommId, message: Message, now: Duration) {
        self.forget(comm);
        let at = now + FIRST_PAUSE;
        self.due.insert((at, comm));
        let unanswered = Unanswered { message, at, pause: FIRST_PAUSE, orphan_until: None };
        self.unanswered.insert(comm, unanswered);
    }

    fn forget(&mut self, comm: CommId) {
        let Some(known) = self.unanswered.remove(&comm) else { return };
        self.due.remove(&(known.at, comm));
        let tenant = known.message.tenant;
        if known.orphan_until.is_some()
            && let Some(count) = self.orphans.get_mut(&tenant)
        {
            *count -= 1;
            if *count == 0 {
                self.orphans.remove(&tenant);
            }
        }
    }

    /// Says it again later.
    fn put_off(&mut self, comm: CommId, now: Duration) -> Option<Message> {
        let known = self.unanswered.get_mut(&comm)?;
        self.due.remove(&(known.at, comm));
        known.pause = (known.pause * 2).min(LONGEST_PAUSE);
        known.at = now + known.pause;
        self.due.insert((known.at, comm));
        Some(known.message.clone())
    }
}

impl Manager {
    /// Sets who knows where addresses live.
    pub fn set_routes(&mut self, routes: Arc<dyn Routes>) {
        self.far.routes = Some(routes);
    }

    /// A link to a host is new: what was on its way may be lost.
    pub fn link_up(&mut self, host: u32, now: Duration) {
        self.now = now;
        let towards = |(_, known): &(&CommId, &Unanswered)| known.message.towards == host;
        let mut again: Vec<CommId> =
            self.far.unanswered.iter().filter(towards).map(|(comm, _)| *comm).collect();
        // In the order in which they were said first, as far as that is known.
        again.sort();
        again.into_iter().for_each(|comm| self.say_again(comm));
    }

    /// Says again what is due.
    pub(crate) fn repeat(&mut self, now: Duration) {
        while let Some((at, comm)) = self.far.due.first().copied().filter(|(at, _)| *at <= now) {
            self.say_again(comm);
            // Whatever became of it, it is not due at that time any more.
            self.far.due.remove(&(at, comm));
        }
    }

    fn say_again(&mut self, comm: CommId) {
        if !self.still_waits(comm) {
            return self.far.forget(comm);
        }
        if let Some(message) = self.far.put_off(comm, self.now) {
            self.post(message);
        }
    }

    /// Whether an end, or what is left of it, still wants an answer to what it said.
    fn still_waits(&self, comm: CommId) -> bool {
        let Some(known) = self.far.unanswered.get(&comm) else { return false };
        match (self.ids.get(&comm), known.orphan_until) {
            (Some(id), _) => awaits(id.phase, &known.message.body),
            (None, Some(until)) => self.now < until,
            (None, None) => false,
        }
    }

    /// Keeps what an end says to another host, to say it again.
    pub(crate) fn remember(&mut self, comm: CommId, message: &Message) {
        let waits = matches!(
            message.body,
            Body::ConnectRequest { .. }
                | Body::ConnectReply { .. }
                | Body::DatagramRequest { .. }
                | Body::DisconnectRequest { .. }
        );
        if waits {
            self.far.expect(comm, message.clone(), self.now);
        } else {
            self.far.forget(comm);
        }
        if let Some(id) = self.ids.get_mut(&comm) {
            id.told = Some(Box::new(message.clone()));
        }
    }

    /// The other end has answered what this one said in a phase.
    pub(crate) fn heard(&mut self, comm: CommId, then: Phase) {
        if let Some(known) = self.far.unanswered.get(&comm)
            && awaits(then, &known.message.body)
            && !self.ids.get(&comm).is_some_and(|id| awaits(id.phase, &known.message.body))
        {
            self.far.forget(comm);
        }
    }

    /// An id ends, and what it said last goes on being said: the end of a connection must be heard. Otherwise nothing is
    /// said any more.
    pub(crate) fn leave_word(&mut self, comm: CommId) {
        let Some(known) = self.far.unanswered.get_mut(&comm) else { return };
        let tenant = known.message.tenant;
        let limit = self.settings.tenant_ids;
        let count = self.far.orphans.get(&tenant).copied().unwrap_or(0);
        if !matches!(known.message.body, Body::DisconnectRequest { .. }) || count >= limit {
            return self.far.forget(comm);
        }
        known.orphan_until = Some(self.now + PATIENCE);
        *self.far.orphans.entry(tenant).or_default() += 1;
    }

    /// Whether a message of another host says what was heard before; its sender is answered as it was then.
    pub(crate) fn is_repeated(&mut self, message: &Message) -> bool {
        let from = message.from;
        match &message.body {
            Body::ConnectRequest { .. } | Body::DatagramRequest { .. } => {
                if let Some(comm) = self.asked.get(&from).copied() {
                    let answer = self.ids.get(&comm).and_then(answer_of);
                    answer.into_iter().for_each(|answer| self.post(answer));
                    return true;
                }
                let ended = self.far.ended.get(&from.host).and_then(|ended| ended.answers.get(&from));
                let Some(answer) = ended.cloned() else { return false };
                answer.into_iter().for_each(|answer| self.post(*answer));
                true
            }
            Body::ConnectReply { to, .. } => {
                // The other end has not heard that this one is ready.
                let is_peer = self.is_from_peer(*to, message);
                let told = self.ids.get(to).filter(|id| is_peer && id.phase == Phase::Established);
                let Some(told) = told.and_then(|id| id.told.clone()) else { return false };
                if matches!(told.body, Body::ReadyToUse { .. }) {
                    self.post(*told);
                }
                true
            }
            Body::DisconnectReply { to } | Body::Reject { to, .. } => {
                let known = self.far.unanswered.get(to).filter(|known| known.orphan_until.is_some());
                let is_answer = known.is_some_and(|known| known.message.body.to() == Some(from));
                if is_answer {
                    self.far.forget(*to);
                }
                is_answer
            }
            _ => false,
        }
    }

    /// Looks again for addresses that nobody had.
    pub(crate) fn look_elsewhere(&mut self, now: Duration) {
        if self.resolving.is_empty() || self.far.next_look().is_none_or(|next| now < next) {
            return;
        }
        self.far.next_look = now + LOOK;
        let beyond = |comm: &&CommId| self.far.looked.is_none_or(|looked| **comm > looked);
        let some: Vec<CommId> = self.resolving.iter().filter(beyond).take(LOOKS).copied().collect();
        self.far.looked = some.last().copied().filter(|_| some.len() == LOOKS);
        some.into_iter().for_each(|comm| self.try_resolve(comm));
    }
}

/// Whether an id in a phase waits for an answer to that.
fn awaits(phase: Phase, body: &Body) -> bool {
    match body {
        Body::ConnectRequest { .. } => phase == Phase::ReqSent,
        Body::ConnectReply { .. } => phase == Phase::RepSent,
        Body::DatagramRequest { .. } => phase == Phase::SidrSent,
        Body::DisconnectRequest { .. } => phase == Phase::DreqSent,
        _ => false,
    }
}

/// What the asking end is told again that asks again.
fn answer_of(id: &Id) -> Option<Message> {
    let told = id.told.as_deref()?;
    let answers = match &told.body {
        Body::ConnectReply { .. } => id.phase == Phase::RepSent,
        body => is_refusal(body),
    };
    answers.then(|| told.clone())
}

/// Whether it ends what was asked; that of datagrams may be good news.
fn is_refusal(body: &Body) -> bool {
    matches!(body, Body::Reject { .. } | Body::DatagramReply { .. })
}
