//! What a client holds, beside what it may hold: its quotas, and its tenant's.
//!
//! Leaves to others: what the quotas are (configuration), and which errno a client gets beyond them.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::config;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Connections, whatever they are used for.
    Connections,
    /// Opened devices.
    Clients,
    /// Descriptors of the router.
    Descriptors,
    Pds,
    Channels,
    Cqs,
    Qps,
    Mrs,
    /// Registered bytes.
    Memory,
    /// Bytes of queues.
    Queues,
    /// Attachments to multicast groups.
    Multicast,
}

const KINDS: usize = Resource::Multicast as usize + 1;

/// What somebody holds. What is left when this ends is the tenant's again.
#[derive(Debug)]
pub(crate) struct Account {
    used: [u64; KINDS],
    limits: [u64; KINDS],
    /// The tenant's, in which all of this counts, too.
    total: Option<Arc<Mutex<Account>>>,
}

impl Account {
    /// An account with these quotas; what they do not mention is not limited.
    pub(crate) fn new(limits: &config::Limits) -> Self {
        let mut account = Self::unlimited();
        for (resource, limit) in [
            (Resource::Pds, u64::from(limits.pds)),
            (Resource::Channels, u64::from(limits.channels)),
            (Resource::Cqs, u64::from(limits.cqs)),
            (Resource::Qps, u64::from(limits.qps)),
            (Resource::Mrs, u64::from(limits.mrs)),
            (Resource::Memory, limits.memory),
            (Resource::Queues, limits.queues),
            (Resource::Multicast, u64::from(limits.multicast)),
        ] {
            account.limit(resource, limit);
        }
        account
    }

    /// An account without quotas.
    pub(crate) fn unlimited() -> Self {
        Self { used: [0; KINDS], limits: [u64::MAX; KINDS], total: None }
    }

    /// The same as a part of a tenant's.
    pub(crate) fn within(mut self, total: &Arc<Mutex<Self>>) -> Self {
        self.total = Some(Arc::clone(total));
        self
    }

    /// Sets a quota.
    pub(crate) fn limit(&mut self, resource: Resource, limit: u64) {
        self.limits[resource as usize] = limit;
    }

    /// What is held now.
    pub(crate) fn used(&self, resource: Resource) -> u64 {
        self.used[resource as usize]
    }

    /// The quota.
    pub(crate) fn quota(&self, resource: Resource) -> u64 {
        self.limits[resource as usize]
    }

    /// Takes so much more. False, and nothing is taken, where that would be too much.
    pub(crate) fn take(&mut self, resource: Resource, amount: u64) -> bool {
        let used = self.used(resource).checked_add(amount).filter(|used| *used <= self.quota(resource));
        let Some(used) = used else { return false };
        if let Some(total) = &self.total
            && !total.lock().take(resource, amount)
        {
            return false;
        }
        self.used[resource as usize] = used;
        true
    }

    /// Takes of several, all or nothing.
    pub(crate) fn take_all(&mut self, wanted: &[(Resource, u64)]) -> bool {
        for (i, (resource, amount)) in wanted.iter().enumerate() {
            if !self.take(*resource, *amount) {
                self.give_all(&wanted[..i]);
                return false;
            }
        }
        true
    }

    /// Gives so much back.
    pub(crate) fn give(&mut self, resource: Resource, amount: u64) {
        let used = &mut self.used[resource as usize];
        *used = used.saturating_sub(amount);
        if let Some(total) = &self.total {
            total.lock().give(resource, amount);
        }
    }

    /// Gives of several back.
    pub(crate) fn give_all(&mut self, held: &[(Resource, u64)]) {
        held.iter().for_each(|(resource, amount)| self.give(*resource, *amount));
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let Some(total) = &self.total else { return };
        let mut total = total.lock();
        for (used, held) in total.used.iter_mut().zip(self.used) {
            *used = used.saturating_sub(held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_stays_within_its_quota_and_all_within_the_tenants() {
        let mut total = Account::unlimited();
        total.limit(Resource::Qps, 5);
        let total = Arc::new(Mutex::new(total));
        let client = || Account::new(&config::Limits { qps: 3, ..Default::default() }).within(&total);
        let (mut a, mut b) = (client(), client());
        assert!(a.take(Resource::Qps, 3) && !a.take(Resource::Qps, 1));
        assert!(b.take(Resource::Qps, 2) && !b.take(Resource::Qps, 1), "its own third is one too many");
        a.give(Resource::Qps, 1);
        assert!(b.take(Resource::Qps, 1));
        assert!(!a.take(Resource::Qps, u64::MAX));
        assert_eq!(
            (a.used(Resource::Qps), b.used(Resource::Qps), total.lock().used(Resource::Qps)),
            (2, 3, 5)
        );
    }

    #[test]
    fn all_or_nothing_is_taken_and_what_is_left_at_the_end_comes_back() {
        let total = Arc::new(Mutex::new(Account::unlimited()));
        let limits = config::Limits { queues: 100, ..Default::default() };
        let mut client = Account::new(&limits).within(&total);
        assert!(!client.take_all(&[(Resource::Qps, 1), (Resource::Queues, 101)]));
        let used = |resource| total.lock().used(resource);
        assert_eq!((client.used(Resource::Qps), used(Resource::Qps)), (0, 0));
        assert!(client.take_all(&[(Resource::Qps, 1), (Resource::Queues, 100)]));
        assert_eq!(used(Resource::Queues), 100);
        drop(client);
        assert_eq!((used(Resource::Qps), used(Resource::Queues)), (0, 0));
    }
}
