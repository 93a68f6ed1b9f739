//! A trust domain as the router keeps it: which addresses, which mode, which quotas, and how much it has logged.

use std::{
    fmt,
    net::Ipv6Addr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use verbs_abi::{
    proto::{self, Gid, Mode},
    shm::arena::{MAX_MR, MAX_QP},
};

use crate::{
    account::{Account, Resource},
    addresses,
    config::{self, Config, Prefix},
    throttle::Throttle,
};

/// Entries of a CQ.
const MAX_CQE: u32 = 1 << 20;
/// Connections beyond twice the clients: those that ask for the status, or have not said what they want.
/// (`freeflow run` keeps a silent one, so that this router stays while the program has opened no device yet.)
const STRANGERS: u64 = 256;
/// Descriptors that are nobody's: listeners, pages, memory files on their way.
const OWN_DESCRIPTORS: u64 = 64;
/// Questions for the status that are answered at once; each is the work of many messages.
const QUESTIONS: u32 = 32;
/// How soon after those another one is, at least, and in what it took to answer the last one.
const PAUSE: Duration = Duration::from_millis(20);
const SHARE: u32 = 10;

/// A tenant.
#[derive(Debug)]
pub(crate) struct Tenant {
    /// Never used twice in a router's life.
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Path of its socket.
    pub(crate) socket: PathBuf,
    /// Whether it is one: at the operator's socket there are only questions.
    pub(crate) opens_devices: bool,
    /// Who asks there may see every tenant.
    pub(crate) sees_all: bool,
    /// The share of a lane of each client.
    pub(crate) weight: u32,
    /// Whether the loosest mode is direct.
    is_direct: AtomicBool,
    prefixes: Vec<Prefix>,
    /// The addresses that the directory is told of.
    announce: Vec<Prefix>,
    /// Quotas of one client.
    limits: config::Limits,
    /// What all its clients hold.
    pub(crate) total: Arc<Mutex<Account>>,
    complaints: Throttle,
    questions: Mutex<Questions>,
}

/// Questions for the status that may be asked now.
#[derive(Debug)]
struct Questions {
    left: u32,
    /// What earns one.
    pause: Duration,
    /// Since when the next one is being earned.
    since: Instant,
}

impl Tenant {
    /// The tenants of a router with this configuration, in its order; `descriptors` are what the router may open.
    /// Where the configuration has none, there is one that may have any address.
    pub(crate) fn all(config: &Config, descriptors: u64) -> Vec<Arc<Self>> {
        let share = descriptors.saturating_sub(OWN_DESCRIPTORS) / config.tenants.len().max(1) as u64;
        if config.tenants.is_empty() {
            let mut tenant =
                Self::new(0, "default", config, &config.limits, &config::Overrides::default(), share);
            tenant.sees_all = true;
            tenant.announce =
                config.directory.iter().flat_map(|directory| directory.announce.clone()).collect();
            return vec![Arc::new(tenant)];
        }
        let made = config.tenants.iter().zip(0..).map(|(told, index)| {
            let limits = told.limits.over(&config.limits);
            let mut tenant = Self::new(index, &told.name, config, &limits, &told.total, share);
            tenant.socket.clone_from(&told.socket);
            tenant.prefixes.clone_from(&told.prefixes);
            tenant.announce.clone_from(&told.announce);
            tenant.weight = told.weight;
            tenant.is_direct = AtomicBool::new(told.is_direct(config));
            Arc::new(tenant)
        });
        made.collect()
    }

    /// Whoever asks at the operator's socket, where the tenants have sockets of their own.
    pub(crate) fn operator(config: &Config) -> Arc<Self> {
        let overrides = config::Overrides { clients: Some(1), ..Default::default() };
        let mut tenant = Self::new(u32::MAX, "operator", config, &config.limits, &overrides, u64::MAX);
        (tenant.opens_devices, tenant.sees_all) = (false, true);
        Arc::new(tenant)
    }

    fn new(
        index: u32,
        name: &str,
        config: &Config,
        limits: &config::Limits,
        total: &config::Overrides,
        descriptors: u64,
    ) -> Self {
        let clients = u64::from(total.clients.unwrap_or(u32::MAX).min(limits.clients));
        let mut account = Account::unlimited();
        let count = |limit: Option<u32>| limit.map_or(u64::MAX, u64::from);
        for (resource, limit) in [
            (Resource::Connections, clients.saturating_mul(2).saturating_add(STRANGERS)),
            (Resource::Clients, clients),
            (Resource::Descriptors, descriptors),
            (Resource::Pds, count(total.pds)),
            (Resource::Channels, count(total.channels)),
            (Resource::Cqs, count(total.cqs)),
            (Resource::Qps, count(total.qps)),
            (Resource::Mrs, count(total.mrs)),
            (Resource::Memory, total.memory.unwrap_or(u64::MAX)),
            (Resource::Queues, total.queues.unwrap_or(u64::MAX)),
        ] {
            account.limit(resource, limit);
        }
        Self {
            index,
            name: name.to_owned(),
            socket: config.socket.clone().unwrap_or_default(),
            opens_devices: true,
            sees_all: false,
            weight: 1,
            is_direct: AtomicBool::new(config.direct),
            prefixes: Vec::new(),
            announce: Vec::new(),
            limits: limits.clone(),
            total: Arc::new(Mutex::new(account)),
            complaints: Throttle::new(),
            questions: Mutex::new(Questions { left: QUESTIONS, pause: PAUSE, since: Instant::now() }),
        }
    }

    /// The mode of a client that asks for one: never a looser one than the tenant's.
    pub(crate) fn mode(&self, wanted: Mode) -> Mode {
        if self.is_direct.load(Ordering::Relaxed) { wanted } else { Mode::Isolated }
    }

    /// Takes the mode over from a configuration that was read again. What it is now, if it changed.
    pub(crate) fn follow(&self, config: &Config) -> Option<&'static str> {
        let told = config.tenants.iter().find(|told| told.name == self.name);
        let is_direct = told.map_or(config.direct, |told| told.is_direct(config));
        let changed = self.is_direct.swap(is_direct, Ordering::Relaxed) != is_direct;
        changed.then_some(if is_direct { "direct" } else { "isolated" })
    }

    /// The quotas of one client, as it is told them.
    pub(crate) fn limits(&self) -> proto::Limits {
        proto::Limits {
            max_qp: self.limits.qps.min(MAX_QP),
            max_cq: self.limits.cqs,
            max_mr: self.limits.mrs.min(MAX_MR - 1),
            max_mr_size: self.limits.memory,
            max_pd: self.limits.pds,
            max_cqe: MAX_CQE,
            max_mcast: self.limits.multicast,
        }
    }

    /// What a new client holds: nothing so far.
    pub(crate) fn account(&self) -> Account {
        let told = self.limits();
        let limits = config::Limits { qps: told.max_qp, mrs: told.max_mr, ..self.limits.clone() };
        Account::new(&limits).within(&self.total)
    }

    /// Whether its clients' addresses are looked at: where all are allowed and none is told to other hosts, nobody can
    /// take another's.
    pub(crate) fn has_prefixes(&self) -> bool {
        !self.prefixes.is_empty() || !self.announce.is_empty()
    }

    /// Whether an address is one namespace's alone.
    pub(crate) fn guards(&self, gid: &Gid) -> bool {
        !addresses::is_local(gid) && (!self.prefixes.is_empty() || self.announces(gid))
    }

    /// Whether other hosts are told of an address.
    pub(crate) fn announces(&self, gid: &Gid) -> bool {
        self.announce.iter().any(|prefix| prefix.contains(gid))
            && config::is_for_hosts(Ipv6Addr::from(*gid).into())
    }

    /// Whether a client may have an address.
    pub(crate) fn allows(&self, gid: &Gid) -> bool {
        self.prefixes.is_empty() || self.prefixes.iter().any(|prefix| prefix.contains(gid))
    }

    /// A line that one of its clients has caused, if there were not too many.
    pub(crate) fn complain(&self, what: &'static str, pid: u32, why: &impl fmt::Display) {
        if let Some(suppressed) = self.complaints.admit() {
            tracing::warn!(tenant = self.name, pid, %why, suppressed, "{what}");
        }
    }

    /// Whether a question for the status is answered now; if not, it is soon.
    pub(crate) fn may_ask(&self, now: Instant) -> bool {
        let mut questions = self.questions.lock();
        let earned = now.saturating_duration_since(questions.since).as_nanos() / questions.pause.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(QUESTIONS).min(QUESTIONS);
        if earned > 0 {
            questions.left = (questions.left + earned).min(QUESTIONS);
            questions.since = now;
        }
        questions.left.checked_sub(1).map(|left| questions.left = left).is_some()
    }

    /// A question took so long to answer.
    pub(crate) fn asked(&self, took: Duration) {
        self.questions.lock().pause = PAUSE.max(took * SHARE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenants(text: &str) -> Vec<Arc<Tenant>> {
        Tenant::all(&toml::from_str(text).unwrap(), 1064)
    }

    #[test]
    fn without_a_configuration_there_is_one_tenant_that_may_do_anything() {
        let [only] = &tenants("")[..] else { panic!() };
        assert!(only.opens_devices && only.sees_all && !only.has_prefixes());
        assert!(only.allows(&[7; 16]));
        assert_eq!((only.mode(Mode::Direct), only.mode(Mode::Isolated)), (Mode::Direct, Mode::Isolated));
    }

    #[test]
    fn a_tenant_is_what_was_configured() {
        let text = "[limits]\nqps = 5\n[[tenant]]\nname = 'a'\nsocket = '/a'\nmode = 'isolated'\n\
                    prefixes = ['10.0.0.0/8']\nlimits = { mrs = 4 }\ntotal = { qps = 6 }\n\
                    [[tenant]]\nname = 'b'\nsocket = '/b'\nprefixes = ['fd00::/8']\n";
        let [a, b] = &tenants(text)[..] else { panic!() };
        assert_eq!((a.mode(Mode::Direct), b.mode(Mode::Direct)), (Mode::Isolated, Mode::Direct));
        let gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3];
        assert!(a.allows(&gid) && !b.allows(&gid) && !a.sees_all);
        assert_eq!((a.limits().max_qp, a.limits().max_mr, b.limits().max_mr), (5, 4, 65_536));
        let (mut one, mut other) = (a.account(), a.account());
        assert!(one.take(Resource::Qps, 5) && other.take(Resource::Qps, 1) && !other.take(Resource::Qps, 1));
        // The router's descriptors are shared out.
        assert!(one.take(Resource::Descriptors, 500) && !other.take(Resource::Descriptors, 1));
        assert!(b.account().take(Resource::Descriptors, 500));
    }

    #[test]
    fn only_what_is_to_be_announced_and_means_the_same_on_all_hosts_is() {
        let gid = |text: &str| match text.parse::<std::net::IpAddr>().unwrap() {
            std::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(address) => address.octets(),
        };
        let all = &tenants("[directory]\nannounce = ['10.1.0.0/16', '::/0']\n")[0];
        for (address, expected) in [
            ("10.1.2.3", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("169.254.1.1", false),
            ("fe80::1", false),
        ] {
            assert_eq!(all.announces(&gid(address)), expected, "{address}");
        }
        let some = &tenants("[directory]\nannounce = ['10.1.0.0/16']\n")[0];
        assert!(some.announces(&gid("10.1.2.3")) && some.guards(&gid("10.1.2.3")) && some.has_prefixes());
        assert!(!some.announces(&gid("172.17.0.2")) && !some.guards(&gid("172.17.0.2")));
        assert!(some.allows(&gid("172.17.0.2")), "but this host has it");
        let none = &tenants("")[0];
        assert!(!none.announces(&gid("10.1.2.3")));
    }

    #[test]
    fn a_flood_of_questions_is_answered_bit_by_bit() {
        let tenant = &tenants("")[0];
        let start = Instant::now();
        let asked = |at: Instant| (0..1000).filter(|_| tenant.may_ask(at)).count();
        assert_eq!(asked(start), QUESTIONS as usize);
        assert_eq!(asked(start + PAUSE), 1);
        assert_eq!(asked(start + 4 * PAUSE), 3);
        assert_eq!(asked(start + Duration::from_secs(3600)), QUESTIONS as usize);
    }
}
