//! The host's NIC: registrations of its clients' memory, and what the NIC tells.
//!
//! Memory is registered when a connection first needs it, once for each memory region, and as long as that lives.
//! Leaves to others: the pairs of shadow QPs (`shadows`), the NIC itself ([`Nic`]).

use std::collections::HashMap;

use verbs_abi::{
    shm::mr_table::MrEntry,
    verbs::{AccessFlags, EventType, QpState},
};

use super::Fabric;
use crate::{
    Memory,
    nic::{Event, Nic, NicKey, Order, ShadowId},
    shadow::{Grant, Pool, Reach, Slot, Word},
};

/// Events that are taken at a time.
const EVENTS: usize = 1024;

/// A QP by index, and by number: the index may be another's by now.
pub(super) type User = (usize, u32);

/// The NIC, and what the host has on it.
#[derive(Debug, Default)]
pub(super) struct Nics {
    pub(super) nic: Option<Box<dyn Nic>>,
    /// New connections may use it.
    pub(super) is_usable: bool,
    /// Whether peers have one on a common fabric, by their numbers.
    pub(super) peers: HashMap<u32, bool>,
    pub(super) next: ShadowId,
    pub(super) shadows: HashMap<ShadowId, User>,
    /// Memory of shadows that are ending, and of which tenant.
    pub(super) closing: HashMap<ShadowId, (u32, Vec<Slot>)>,
    pub(super) pools: HashMap<u32, Pool>,
    pub(super) keys: Keys,
}

/// Registrations, by client and key.
#[derive(Debug, Default)]
pub(super) struct Keys {
    all: HashMap<(u32, u32), Registration>,
    /// Not yet given.
    pub(super) orders: Vec<Order>,
}

/// A memory region on the NIC.
#[derive(Debug)]
struct Registration {
    state: State,
    /// QPs that wait until it is there, or gone.
    waiting: Vec<User>,
    /// QPs whose peers' routers have asked for the key.
    asking: Vec<User>,
    /// QPs whose peers' routers know the key.
    granted: Vec<User>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Ready(NicKey),
    Failed,
    Ending,
}

impl Keys {
    /// How the NIC reaches a memory region of a client; registers it if need be, and lets `user` wait.
    pub(super) fn reach(
        &mut self,
        (client, tenant): (u32, u32),
        memory: &impl Memory,
        mr: &MrEntry,
        user: User,
    ) -> Reach {
        let Some(registration) = self.registration((client, tenant), memory, mr) else { return Reach::Never };
        match registration.state {
            State::Ready(key) => Reach::Key(key.lkey),
            State::Failed => Reach::Never,
            State::Pending | State::Ending => {
                if !registration.waiting.contains(&user) {
                    registration.waiting.push(user);
                }
                Reach::Later
            }
        }
    }

    fn registration(
        &mut self,
        (client, tenant): (u32, u32),
        memory: &impl Memory,
        mr: &MrEntry,
    ) -> Option<&mut Registration> {
        let (from, to) = reachable(mr)?;
        let owner = (client, mr.key);
        if !self.all.contains_key(&owner) {
            let whole = memory.shared(mr)?;
            let window = whole.sub(from - mr.shared_start, usize::try_from(to - from).ok()?)?;
            let rights = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_READ;
            let access = mr.access & rights.bits();
            self.orders.push(Order::Register { owner, tenant, window, addr: from, access });
            let registration = Registration {
                state: State::Pending,
                waiting: Vec::new(),
                asking: Vec::new(),
                granted: Vec::new(),
            };
            self.all.insert(owner, registration);
        }
        self.all.get_mut(&owner)
    }
}

/// The part of a memory region that the NIC can reach.
fn reachable(mr: &MrEntry) -> Option<(u64, u64)> {
    let (from, to) = (mr.shared_start.max(mr.addr), mr.shared_end.min(mr.addr.saturating_add(mr.len)));
    (from < to).then_some((from, to))
}

impl<M: Memory> Fabric<M> {
    /// Gives the host a NIC.
    pub fn set_nic(&mut self, nic: Box<dyn Nic>) {
        (self.nics.nic, self.nics.is_usable) = (Some(nic), true);
    }

    /// Has the host woken when the NIC tells something, for nobody looks until then.
    pub fn arm_nic(&mut self) {
        if let Some(nic) = self.nics.nic.as_mut() {
            nic.arm();
        }
    }

    /// Says whether a peer router has a NIC on a common fabric. To be told before its link is up.
    pub fn set_peer_nic(&mut self, peer: u32, has_nic: bool) {
        self.nics.peers.insert(peer, has_nic);
    }

    /// The memory region of that key ends, or becomes another one: so does its registration.
    pub fn end_registration(&mut self, client: u32, key: u32) {
        let Some(registration) = self.nics.keys.all.get_mut(&(client, key)) else { return };
        let before = std::mem::replace(&mut registration.state, State::Ending);
        let asking = std::mem::take(&mut registration.asking);
        let granted = std::mem::take(&mut registration.granted);
        match before {
            State::Ending => {}
            State::Failed => self.forget_registration((client, key)),
            State::Pending | State::Ready(_) => {
                self.nics.keys.orders.push(Order::Deregister((client, key)));
            }
        }
        self.give_orders();
        asking.into_iter().for_each(|(at, qpn)| self.say_of_key(at, qpn, &Word::Deny(key)));
        granted.into_iter().for_each(|(at, qpn)| self.say_of_key(at, qpn, &Word::Revoke(key)));
    }

    /// Whether the NIC may still reach what the key named before [`Self::end_registration`].
    #[must_use]
    pub fn is_deregistering(&self, client: u32, key: u32) -> bool {
        self.nics.keys.all.get(&(client, key)).is_some_and(|registration| registration.state == State::Ending)
    }

    /// A client is gone, and its memory with it.
    pub(super) fn end_registrations(&mut self, client: u32) {
        let own = self.nics.keys.all.keys().filter(|(owner, _)| *owner == client);
        for (client, key) in own.copied().collect::<Vec<_>>() {
            self.end_registration(client, key);
        }
    }

    fn forget_registration(&mut self, owner: (u32, u32)) {
        let Some(registration) = self.nics.keys.all.remove(&owner) else { return };
        registration.waiting.into_iter().for_each(|user| self.wake_user(user));
    }

    pub(super) fn give_orders(&mut self) {
        if let Some(nic) = self.nics.nic.as_mut() {
            self.nics.keys.orders.drain(..).for_each(|order| nic.order(order));
        }
    }

    pub(super) fn order(&mut self, order: Order) {
        self.nics.keys.orders.push(order);
        self.give_orders();
    }

    fn wake_user(&mut self, (at, qpn): User) {
        if self.qps.get(at).is_some_and(|qp| qp.as_ref().is_some_and(|qp| qp.qpn == qpn)) {
            self.schedule.enqueue(at);
        }
    }

    /// Takes what the NIC tells, some of it at a time. True: there may be more.
    pub(super) fn hear_nic(&mut self) -> bool {
        for _ in 0..EVENTS {
            let Some(event) = self.nics.nic.as_mut().and_then(|nic| nic.next_event()) else { return false };
            self.heed_nic(event);
        }
        true
    }

    fn heed_nic(&mut self, event: Event) {
        match event {
            Event::Registered(owner, key) => self.registered(owner, key),
            Event::Deregistered(owner) => self.forget_registration(owner),
            Event::Usable(is_usable) => self.nics.is_usable = is_usable,
            Event::Lost => self.lose_nic(),
            Event::Closed(id) => self.shadow_closed(id),
            Event::Completion(completion) => {
                if let Some(at) = self.shadowed(completion.shadow) {
                    self.shadow_completed(at, completion);
                }
            }
            Event::Async(id, event) => {
                if let Some(at) = self.shadowed(id) {
                    self.shadow_met(at, event);
                }
            }
            Event::Opened(id, opened) => {
                if let Some(at) = self.shadowed(id) {
                    self.shadow_opened(at, opened);
                }
            }
            Event::Connected(id, well) => {
                if let Some(at) = self.shadowed(id) {
                    self.shadow_connected(at, well);
                }
            }
            Event::Started(id, well) => {
                if let Some(at) = self.shadowed(id) {
                    self.shadow_started(at, well);
                }
            }
        }
    }

    /// The QP of a shadow.
    fn shadowed(&self, id: ShadowId) -> Option<usize> {
        let (at, qpn) = *self.nics.shadows.get(&id)?;
        let shadow = self.qps.get(at)?.as_ref().filter(|qp| qp.qpn == qpn)?.far.as_ref()?.shadow.as_ref()?;
        (shadow.id == id).then_some(at)
    }

    fn registered(&mut self, owner: (u32, u32), key: Option<NicKey>) {
        let Some(registration) = self.nics.keys.all.get_mut(&owner) else { return };
        if registration.state != State::Pending {
            return;
        }
        registration.state = key.map_or(State::Failed, State::Ready);
        let waiting = std::mem::take(&mut registration.waiting);
        let asking = std::mem::take(&mut registration.asking);
        waiting.into_iter().for_each(|user| self.wake_user(user));
        for (at, qpn) in asking {
            if self.qps[at].as_ref().is_some_and(|qp| qp.qpn == qpn) {
                self.tell_key(at, owner.1);
            }
        }
    }

    /// Tells a QP's peer what a key of the QP's client is to the NIC, now or when it is known.
    pub(super) fn tell_key(&mut self, at: usize, key: u32) {
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(client) = self.clients[qp.owner].as_ref() else { return };
        let (user, memory) = ((at, qp.qpn), &client.memory);
        let entry = memory.lookup(key).filter(|entry| entry.pd == qp.create.pd);
        let found = entry.and_then(|entry| {
            let whose = (client.id, client.tenant);
            Some((entry, self.nics.keys.registration(whose, memory, &entry)?))
        });
        let word = match found {
            Some((entry, registration)) => match registration.state {
                State::Ready(nic_key) => {
                    if !registration.granted.contains(&user) {
                        registration.granted.push(user);
                    }
                    grant_of(&entry, nic_key.rkey).map_or(Word::Deny(key), |grant| Word::Grant(key, grant))
                }
                State::Pending => {
                    if !registration.asking.contains(&user) {
                        registration.asking.push(user);
                    }
                    return self.give_orders();
                }
                State::Failed | State::Ending => Word::Deny(key),
            },
            None => Word::Deny(key),
        };
        self.say(at, &word);
    }

    fn say_of_key(&mut self, at: usize, qpn: u32, word: &Word) {
        if self.qps.get(at).is_some_and(|qp| qp.as_ref().is_some_and(|qp| qp.qpn == qpn)) {
            self.say(at, word);
        }
    }

    /// The NIC is gone: what is posted is not answered any more, and new connections go another way.
    fn lose_nic(&mut self) {
        self.nics.is_usable = false;
        let users: Vec<User> = self.nics.shadows.values().copied().collect();
        for (at, qpn) in users {
            let qp = self.qps.get_mut(at).and_then(Option::as_mut).filter(|qp| qp.qpn == qpn);
            let Some(shadow) = qp.and_then(|qp| qp.far.as_mut()?.shadow.as_mut()) else { continue };
            shadow.is_lost = true;
            shadow.sender.lose();
            if shadow.is_unused() {
                self.decline(at);
            }
            self.schedule.enqueue(at);
        }
        let owners: Vec<(u32, u32)> = self.nics.keys.all.keys().copied().collect();
        owners.into_iter().for_each(|(client, key)| self.end_registration(client, key));
    }

    /// What the NIC raises for a shadow QP concerns the virtual one.
    fn shadow_met(&mut self, at: usize, event: EventType) {
        let Some(state) = self.qps[at].as_ref().map(|qp| qp.state) else { return };
        match event {
            EventType::CommEst if state == QpState::Rtr => self.raise(at, event),
            EventType::QpFatal | EventType::QpReqErr | EventType::QpAccessErr if state != QpState::Err => {
                self.fail_responder(at, Some(event));
            }
            _ => {}
        }
    }
}

/// What a peer's router may know of a memory region.
fn grant_of(mr: &MrEntry, rkey: u32) -> Option<Grant> {
    let (from, to) = reachable(mr)?;
    let start = from.wrapping_sub(mr.addr).wrapping_add(mr.iova);
    Some(Grant { rkey, access: mr.access & 0xffff, start, len: to - from, base: from })
}
