//! The moment between two listeners on one port.
//!
//! Some programs (perftest) listen anew for each connection, and their peers ask again at once. On a network the
//! question takes longer than the change; here it would often be faster and find nobody. So for a short time
//! after a listener was ended by its own program, requests wait for the next one.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use crate::{CommId, Manager, Message, manager::Service, reason};

/// How long a port is waited for.
const GRACE: Duration = Duration::from_millis(500);
/// Requests that may wait for one port.
const MAX_WAITING: usize = 1024;

/// Ports whose listener has just ended.
#[derive(Debug, Default)]
pub(crate) struct Graces {
    ports: HashMap<Service, Grace>,
    /// In the order in which they end.
    order: VecDeque<(Duration, Service)>,
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
    pub(crate) fn begin(&mut self, service: Service, now: Duration) {
        let until = now + GRACE;
        self.ports.entry(service).or_insert(Grace { until, waiting: Vec::new() }).until = until;
        self.order.push_back((until, service));
    }

    /// Lets a request wait, or gives it back.
    pub(crate) fn wait(&mut self, service: Service, message: Message) -> Option<Message> {
        match self.ports.get_mut(&service) {
            Some(grace) if grace.waiting.len() < MAX_WAITING => {
                grace.waiting.push(message);
                None
            }
            _ => Some(message),
        }
    }

    /// Somebody does not want any more.
    pub(crate) fn withdraw(&mut self, service: Service, from: CommId) {
        if let Some(grace) = self.ports.get_mut(&service) {
            grace.waiting.retain(|message| message.from != from);
        }
    }

    /// There is a listener again: those who wait.
    pub(crate) fn end(&mut self, service: Service) -> Vec<Message> {
        self.ports.remove(&service).map(|grace| grace.waiting).unwrap_or_default()
    }

    /// Those who have waited in vain.
    fn expire(&mut self, now: Duration) -> Vec<Message> {
        let mut expired = Vec::new();
        while let Some((until, service)) = self.order.front().copied().filter(|(until, _)| *until <= now) {
            self.order.pop_front();
            if self.ports.get(&service).is_some_and(|grace| grace.until == until) {
                expired.extend(self.end(service));
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
