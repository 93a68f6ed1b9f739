//! The moment between two listeners on one port.
//!
//! Some programs (perftest) listen anew for each connection, and their peers ask again at once; others (qperf) tell their peer
//! the port that they have bound before they listen on it. On a network the question takes longer than the change; here it
//! would often be faster and find nobody. So for a short time after a listener was ended by its own program, requests wait for
//! the next one, and so they do at a port that is bound.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use crate::{CommId, Manager, Message, reason};

/// How long a port is waited for.
const GRACE: Duration = Duration::from_secs(2);
/// Requests that may wait for one port.
const MAX_WAITING: usize = 1024;

/// A port of a tenant, in whatever port space: perftest listens for a connection first, then for datagrams.
pub(crate) type Port = (u32, u16);

/// Ports whose listener has just ended.
#[derive(Debug, Default)]
pub(crate) struct Graces {
    ports: HashMap<Port, Grace>,
    /// In the order in which they end.
    order: VecDeque<(Duration, Port)>,
}

#[derive(Debug)]
struct Grace {
    until: Duration,
    waiting: Vec<Message>,
}

impl Graces {
    /// When the first one ends.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.order.front().map(|(until, _)| *until)
    }

    /// A listener has ended.
    pub(crate) fn begin(&mut self, port: Port, now: Duration) {
        let until = now + GRACE;
        self.ports.entry(port).or_insert(Grace { until, waiting: Vec::new() }).until = until;
        self.order.push_back((until, port));
    }

    /// Whether requests wait for that port.
    pub(crate) fn has(&self, port: Port) -> bool {
        self.ports.contains_key(&port)
    }

    /// Lets a request wait, or gives it back.
    pub(crate) fn wait(&mut self, port: Port, message: Message) -> Option<Message> {
        let is_there = |waiting: &Message| message.from.host != 0 && waiting.from == message.from;
        match self.ports.get_mut(&port) {
            Some(grace) if grace.waiting.iter().any(is_there) => None,
            Some(grace) if grace.waiting.len() < MAX_WAITING => {
                grace.waiting.push(message);
                None
            }
            _ => Some(message),
        }
    }

    /// Somebody does not want any more.
    pub(crate) fn withdraw(&mut self, port: Port, from: CommId) {
        if let Some(grace) = self.ports.get_mut(&port) {
            grace.waiting.retain(|message| message.from != from);
        }
    }

    /// There is a listener again: those who wait.
    pub(crate) fn end(&mut self, port: Port) -> Vec<Message> {
        self.ports.remove(&port).map(|grace| grace.waiting).unwrap_or_default()
    }

    /// Those who have waited in vain.
    fn expire(&mut self, now: Duration) -> Vec<Message> {
        let mut expired = Vec::new();
        while let Some((until, port)) = self.order.front().copied().filter(|(until, _)| *until <= now) {
            self.order.pop_front();
            if self.ports.get(&port).is_some_and(|grace| grace.until == until) {
                expired.extend(self.end(port));
            }
        }
        expired
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }
}

impl Manager {
    pub(crate) fn expire_graces(&mut self, now: Duration) {
        for message in self.graces.expire(now) {
            self.refuse(&message, reason::INVALID_SERVICE_ID);
        }
    }
}
