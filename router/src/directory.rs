//! Which router serves an address: the engine's `Routing` over what the directory says.
//!
//! ```text
//!   file ---------------------> View <--- route --- engine, links
//!   Registry <--> Follower ---> View
//!    (etcd)          ^ +------> news: the daemon looks at addresses and QPs again
//!                    +--- Announcements <--- claims of this host's clients
//! ```
//!
//! Leaves to others: what is known (`view`), the configuration's file (`file`), what this router's clients have
//! (`announcements`), following a registry (`registry`, `follower`, `etcd`), and the links to the routers (`link`).

mod announcements;
mod etcd;
mod file;
mod follower;
mod registry;
mod view;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use engine::Routing;
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::event::{EventfdFlags, eventfd};
use verbs_abi::proto::Gid;

use crate::{addresses, config, status, throttle::Throttle};
use announcements::{Announcements, Settlement, Standing, Verdict};
use follower::Follower;
use registry::{Listing, Registry, Seen, Trouble};
use view::{Change, Full, Key, View};

pub use etcd::{Probe, probe};
pub(crate) use view::Peer;

/// Addresses that the status names.
const SHOWN: usize = 16_384;

/// What the directory says, as this router sees it.
#[derive(Debug)]
pub(crate) struct Directory {
    own: String,
    /// By number.
    tenants: Vec<String>,
    kind: &'static str,
    /// Never held while the fabric's lock is waited for: the engine asks with that lock held.
    view: RwLock<View>,
    /// What a file says of this router's tenants, for the status.
    listed: Vec<status::Route>,
    announcements: Announcements,
    contact: Mutex<Contact>,
    calls: Mutex<Calls>,
    called: Condvar,
    /// Rung when there are [`News`].
    bell: OwnedFd,
    routes_changed: AtomicBool,
    standings_changed: AtomicBool,
    complaints: Throttle,
}

/// What changed since the daemon looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct News {
    /// Addresses are known that were not.
    pub(crate) routes: bool,
    /// Addresses of this host's clients were lost to other hosts, or won.
    pub(crate) standings: bool,
}

/// How the registry is reached.
#[derive(Debug)]
struct Contact {
    place: String,
    revision: u64,
    /// Whether the last attempt went well; none was made before.
    is_up: Option<bool>,
    trouble: String,
    since: Instant,
}

/// What the follower is called for.
#[derive(Debug, Default)]
struct Calls {
    rung: bool,
    stopping: bool,
    /// This router's own entry is gone.
    disenrolled: bool,
    watch_ended: Option<Trouble>,
}

impl Directory {
    fn new(kind: &'static str, view: View, own: &str, tenants: &[String]) -> io::Result<Self> {
        Ok(Self {
            own: own.to_owned(),
            tenants: tenants.to_vec(),
            kind,
            view: RwLock::new(view),
            listed: Vec::new(),
            announcements: Announcements::default(),
            contact: Mutex::new(Contact {
                place: String::new(),
                revision: 0,
                is_up: None,
                trouble: String::new(),
                since: Instant::now(),
            }),
            calls: Mutex::default(),
            called: Condvar::new(),
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            routes_changed: AtomicBool::new(false),
            standings_changed: AtomicBool::new(false),
            complaints: Throttle::new(),
        })
    }

    /// That of the configuration; its registry, if it has one, is not asked before [`Self::start`].
    pub(crate) fn of(
        config: &config::Directory,
        links: &config::Links,
        tenants: &[String],
    ) -> io::Result<Arc<Self>> {
        let own = &links.name;
        let Some(path) = &config.file else {
            return Self::new("etcd", View::new(own), own, tenants).map(Arc::new);
        };
        let file = config::DirectoryFile::load(path, links.security).map_err(io::Error::other)?;
        Self::from_file(&file, own, tenants).map(Arc::new)
    }

    /// Starts to follow the registry, if there is one.
    pub(crate) fn start(
        self: &Arc<Self>,
        config: &config::Directory,
        links: &config::Links,
    ) -> io::Result<Option<JoinHandle<()>>> {
        if !config.is_etcd() {
            return Ok(None);
        }
        let registry = etcd::Etcd::new(config, links, &self.tenants);
        self.follow(Box::new(registry), links.reached_at(), config.lease()).map(Some)
    }

    fn follow(
        self: &Arc<Self>,
        registry: Box<dyn Registry>,
        address: SocketAddr,
        grace: std::time::Duration,
    ) -> io::Result<JoinHandle<()>> {
        self.contact.lock().place = registry.place();
        let follower = Follower::new(registry, Arc::clone(self), address, grace);
        thread::Builder::new().name("directory".to_owned()).spawn(move || follower.run())
    }

    /// Ends the thread soon.
    pub(crate) fn stop(&self) {
        self.calls.lock().stopping = true;
        self.called.notify_all();
    }

    /// A router by its number.
    pub(crate) fn peer(&self, number: u32) -> Option<Peer> {
        self.view.read().peer(number)
    }

    /// The number of a router that is in the directory.
    pub(crate) fn number(&self, name: &str) -> Option<u32> {
        self.view.read().number(name)
    }

    /// Whether other hosts find this one by an address of a tenant.
    pub(crate) fn is_own(&self, tenant: u32, gid: &Gid) -> bool {
        self.view.read().is_own(tenant, gid)
    }

    /// All routers that were ever heard of, by number.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        self.view.read().peers().collect()
    }
}

/// For the clients of this host.
impl Directory {
    /// A client has an address that other hosts are to be told of.
    pub(crate) fn claim(&self, tenant: u32, gid: &Gid) {
        let key = (tenant, *gid);
        let is_wanted = {
            let view = self.view.read();
            self.announcements.claim(key, view.holder(&key))
        };
        if is_wanted {
            self.ring();
        }
    }

    /// No client has it any more.
    pub(crate) fn release(&self, tenant: u32, gid: &Gid) {
        if self.announcements.release((tenant, *gid)) {
            self.ring();
        }
    }

    /// The other router that has an address of a client of this one.
    pub(crate) fn refused_by(&self, tenant: u32, gid: &Gid) -> Option<String> {
        match self.announcements.standing(&(tenant, *gid)) {
            Some(Standing::Refused(by) | Standing::Contested(by)) => Some(by),
            _ => None,
        }
    }

    /// Whether it is worth while to wait for an address to become this router's.
    pub(crate) fn is_unsettled(&self, tenant: u32, gid: &Gid) -> bool {
        let standing = self.announcements.standing(&(tenant, *gid));
        !matches!(standing, None | Some(Standing::Held(_) | Standing::Leaving))
            && self.contact.lock().is_up == Some(true)
    }

    /// What changed since this was asked.
    pub(crate) fn take_news(&self) -> News {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        News {
            routes: self.routes_changed.swap(false, Ordering::SeqCst),
            standings: self.standings_changed.swap(false, Ordering::SeqCst),
        }
    }

    fn tell(&self, news: News) {
        if news.routes {
            self.routes_changed.store(true, Ordering::SeqCst);
        }
        if news.standings {
            self.standings_changed.store(true, Ordering::SeqCst);
        }
        if news.routes || news.standings {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

/// Readable when there are news.
impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// For the thread that follows the registry.
impl Directory {
    fn own(&self) -> &str {
        &self.own
    }

    fn ring(&self) {
        self.calls.lock().rung = true;
        self.called.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.calls.lock().stopping
    }

    /// Waits until there is something to do, or until then.
    fn await_call(&self, until: Instant) {
        let mut calls = self.calls.lock();
        while !calls.rung && !calls.stopping {
            if self.called.wait_until(&mut calls, until).timed_out() {
                break;
            }
        }
        calls.rung = false;
    }

    fn take_disenrolled(&self) -> bool {
        std::mem::take(&mut self.calls.lock().disenrolled)
    }

    fn watch_begins(&self) {
        self.calls.lock().watch_ended = None;
    }

    fn watch_ended(&self, trouble: Trouble) {
        self.calls.lock().watch_ended = Some(trouble);
        self.ring();
    }

    fn check_watch(&self) -> Result<(), Trouble> {
        self.calls.lock().watch_ended.take().map_or(Ok(()), Err)
    }

    /// Takes a listing in. What it does not hold is forgotten, at once or at a later time.
    fn relist(&self, listing: &Listing, forget: Option<Instant>) {
        let (routes, outcome) = self.view.write().replace(&listing.changes, forget);
        self.grumble(outcome);
        let holders: HashMap<&Key, &str> = listing
            .changes
            .iter()
            .filter_map(|change| match change {
                Change::Address(key, router) => Some((key, &**router)),
                _ => None,
            })
            .collect();
        let holder = |key: &Key| holders.get(key).map(|router| (*router != self.own).then_some(*router));
        let standings = self.announcements.compare(holder, listing.revision);
        self.contact.lock().revision = listing.revision;
        self.tell(News { routes, standings });
    }

    /// Takes changes in.
    fn see(&self, seen: &[Seen]) {
        let mut news = News { routes: false, standings: false };
        for Seen { change, revision } in seen {
            let applied = self.view.write().apply(change);
            news.routes |= applied.is_ok_and(|is_new| is_new);
            self.grumble(applied.map(|_| ()));
            let other = |router| (router != self.own).then_some(router);
            news.standings |= match change {
                Change::Address(key, router) => {
                    self.announcements.saw(key, Some(other(&**router)), *revision)
                }
                Change::NoAddress(key) => self.announcements.saw(key, None, *revision),
                Change::Router(name, _) | Change::NoRouter(name) => {
                    self.calls.lock().disenrolled |= *name == self.own;
                    false
                }
            };
        }
        if let Some(last) = seen.last() {
            self.contact.lock().revision = last.revision;
        }
        self.tell(news);
        self.ring();
    }

    fn grumble(&self, outcome: Result<(), Full>) {
        if let Err(full) = outcome
            && let Some(suppressed) = self.complaints.admit()
        {
            tracing::warn!(suppressed, "{full}");
        }
    }

    /// The registry has answered to claims.
    fn settle(&self, keys: &[Key], verdicts: Vec<Verdict>) {
        let mut standings = false;
        for (key, verdict) in keys.iter().zip(verdicts) {
            let settlement = self.announcements.settle(key, verdict);
            standings |= settlement != Settlement::Quiet;
            if let Settlement::Lost(by) = settlement
                && let Some(suppressed) = self.complaints.admit()
            {
                let (tenant, address) = (self.tenant(key.0), addresses::text(&key.1));
                tracing::warn!(
                    tenant,
                    address,
                    router = by,
                    suppressed,
                    "another host has this address; it is not served here"
                );
            }
        }
        self.tell(News { routes: false, standings });
    }

    /// Forgets what was in doubt for long enough.
    fn forget(&self, now: Instant) {
        self.view.write().forget(now);
    }

    /// The registry cannot be asked.
    fn lost(&self, place: &str, trouble: &Trouble) {
        let mut contact = self.contact.lock();
        let was = contact.is_up.replace(false);
        contact.trouble = trouble.to_string();
        contact.place = place.to_owned();
        if was == Some(false) {
            return tracing::debug!(etcd = place, %trouble, "still no directory");
        }
        contact.since = Instant::now();
        drop(contact);
        if let Some(suppressed) = self.complaints.admit() {
            let what = match was {
                Some(_) => "the directory is lost; what is known goes on, and it is tried again",
                None => "no directory yet; this host is served, and it is tried again",
            };
            tracing::warn!(etcd = place, %trouble, suppressed, "{what}");
        }
    }

    /// The registry answers.
    fn found(&self, place: &str) {
        let mut contact = self.contact.lock();
        contact.place = place.to_owned();
        if contact.is_up.replace(true) == Some(true) {
            return;
        }
        contact.since = Instant::now();
        contact.trouble.clear();
        let (routers, addresses) = self.view.read().counts();
        if let Some(suppressed) = self.complaints.admit() {
            tracing::info!(etcd = place, routers, addresses, suppressed, "the directory is there");
        }
    }
}

/// For the status.
impl Directory {
    /// What it says, as far as it can be shown.
    pub(crate) fn routes(&self) -> Vec<status::Route> {
        let view = self.view.read();
        let shown = view.addresses().take(SHOWN).map(|((tenant, gid), router)| status::Route {
            tenant: self.tenant(tenant),
            prefix: whole(&gid),
            router: router.to_owned(),
        });
        let mut shown: Vec<status::Route> = shown.collect();
        shown.sort_by(|a, b| (&a.tenant, &a.prefix).cmp(&(&b.tenant, &b.prefix)));
        shown.extend(self.listed.iter().cloned());
        shown
    }

    fn tenant(&self, number: u32) -> String {
        self.tenants.get(number as usize).cloned().unwrap_or_default()
    }

    /// What can be told about it.
    pub(crate) fn status(&self) -> status::Directory {
        let contact = self.contact.lock();
        let (routers, addresses) = self.view.read().counts();
        let own = self.announcements.all().into_iter().map(|((tenant, gid), standing)| {
            let (state, router) = match standing {
                Standing::Pending => ("pending", String::new()),
                Standing::Held(_) => ("published", String::new()),
                Standing::Refused(by) | Standing::Contested(by) => ("refused", by),
                Standing::Leaving => ("leaving", String::new()),
            };
            let (tenant, address) = (self.tenant(tenant), addresses::text(&gid));
            status::Announcement { tenant, address, state: state.to_owned(), router }
        });
        status::Directory {
            kind: self.kind.to_owned(),
            name: self.own.clone(),
            place: contact.place.clone(),
            state: match (self.kind, contact.is_up) {
                ("file", _) => "read",
                (_, None) => "starting",
                (_, Some(true)) => "up",
                (_, Some(false)) => "lost",
            }
            .to_owned(),
            trouble: contact.trouble.clone(),
            since_seconds: contact.since.elapsed().as_secs(),
            revision: contact.revision,
            routers: routers as u64,
            addresses: addresses as u64,
            own: own.collect(),
        }
    }
}

/// The prefix of one address.
fn whole(gid: &Gid) -> String {
    let address = addresses::text(gid);
    let bits = if address.contains(':') { 128 } else { 32 };
    format!("{address}/{bits}")
}

impl Routing for Directory {
    fn route(&self, tenant: u32, gid: &Gid) -> Option<u32> {
        self.view.read().route(tenant, gid)
    }

    fn routers(&self, tenant: u32) -> Vec<u32> {
        self.view.read().routers(tenant).into_iter().collect()
    }
}
