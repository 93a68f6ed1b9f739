//! Promises of following a registry, with one that is made of a table: what etcd would do, without etcd.

use std::{
    collections::{BTreeMap, HashSet},
    sync::mpsc::{self, Receiver, Sender},
    time::Duration,
};

use super::{registry::Lease, *};

const GRACE: Duration = Duration::from_millis(600);
const SOON: Duration = Duration::from_secs(5);

/// A registry as its users see it together.
#[derive(Debug, Default)]
struct Table {
    away: bool,
    revision: u64,
    /// By key: the router (or where it listens), its lease, and since when.
    routers: BTreeMap<String, (SocketAddr, u64)>,
    addresses: BTreeMap<Key, (String, u64, u64)>,
    leases: HashSet<u64>,
    next_lease: u64,
    watches: Vec<Sender<Result<Vec<Seen>, Trouble>>>,
    /// All changes, for watches that begin later.
    history: Vec<Seen>,
}

type World = Arc<Mutex<Table>>;

impl Table {
    fn tell(&mut self, change: Change) {
        self.revision += 1;
        let seen = Seen { change, revision: self.revision };
        self.history.push(seen.clone());
        self.watches.retain(|watch| watch.send(Ok(vec![seen.clone()])).is_ok());
    }

    /// A router's time is over.
    fn end_lease(&mut self, lease: u64) {
        self.leases.remove(&lease);
        let over: Vec<String> =
            self.routers.iter().filter(|(_, (_, of))| *of == lease).map(|(name, _)| name.clone()).collect();
        for name in over {
            self.routers.remove(&name);
            self.tell(Change::NoRouter(name));
        }
        let over: Vec<Key> =
            self.addresses.iter().filter(|(_, (_, of, _))| *of == lease).map(|(key, _)| *key).collect();
        for key in over {
            self.addresses.remove(&key);
            self.tell(Change::NoAddress(key));
        }
    }

    fn end_watches(&mut self, trouble: impl Fn() -> Trouble) {
        self.watches.drain(..).for_each(|watch| drop(watch.send(Err(trouble()))));
    }

    /// The server goes, and may forget everything.
    fn fall(&mut self, forgets: bool) {
        self.away = true;
        if forgets {
            self.routers.clear();
            self.addresses.clear();
            self.leases.clear();
            self.history.clear();
            self.revision = 1;
        }
        self.end_watches(|| Trouble::Away("it fell".to_owned()));
    }
}

#[derive(Debug)]
struct Fake {
    world: World,
    own: String,
    lease: u64,
}

struct FakeWatch(Receiver<Result<Vec<Seen>, Trouble>>);

impl Watch for FakeWatch {
    fn next(&mut self) -> Result<Vec<Seen>, Trouble> {
        self.0.recv().unwrap_or_else(|_| Err(Trouble::Away("over".to_owned())))
    }
}

use super::registry::{Cancel, Watch};

impl Fake {
    fn table(&self) -> Result<parking_lot::MutexGuard<'_, Table>, Trouble> {
        let table = self.world.lock();
        if table.away { Err(Trouble::Away("nobody is there".to_owned())) } else { Ok(table) }
    }
}

impl Registry for Fake {
    fn place(&self) -> String {
        "a table".to_owned()
    }

    fn reconnect(&mut self) -> Result<(), Trouble> {
        self.table().map(|_| ())
    }

    fn list(&mut self) -> Result<Listing, Trouble> {
        let table = self.table()?;
        let routers = table.routers.iter().map(|(name, (at, _))| Change::Router(name.clone(), *at));
        let addresses = table.addresses.iter().map(|(key, (by, ..))| Change::Address(*key, by.clone()));
        let own = table.addresses.iter().filter(|(_, (by, ..))| *by == self.own);
        Ok(Listing {
            revision: table.revision,
            // Addresses first: the order means nothing.
            changes: addresses.chain(routers).collect(),
            own: own.map(|(key, (_, _, since))| (*key, *since)).collect(),
        })
    }

    fn watch(&mut self, after: u64) -> Result<(Box<dyn Watch>, Cancel), Trouble> {
        let (sender, receiver) = mpsc::channel();
        let mut table = self.table()?;
        let missed = table.history.iter().filter(|seen| seen.revision > after).cloned().collect();
        let _ = sender.send(Ok(missed));
        table.watches.push(sender.clone());
        let cancel = move || drop(sender.send(Err(Trouble::Away("cancelled".to_owned()))));
        Ok((Box::new(FakeWatch(receiver)), Box::new(cancel)))
    }

    fn keep(&mut self) -> Result<Lease, Trouble> {
        let mut table = self.table()?;
        let is_new = !table.leases.contains(&self.lease);
        if is_new {
            table.next_lease += 1;
            let lease = table.next_lease;
            table.leases.insert(lease);
            drop(table);
            self.lease = lease;
        }
        Ok(Lease { time: Duration::from_millis(150), is_new })
    }

    fn enrol(&mut self, address: SocketAddr) -> Result<Verdict, Trouble> {
        let mut table = self.table()?;
        if let Some((other, _)) = table.routers.get(&self.own).filter(|(other, _)| *other != address) {
            return Ok(Verdict::Refused(other.to_string()));
        }
        table.routers.insert(self.own.clone(), (address, self.lease));
        table.tell(Change::Router(self.own.clone(), address));
        Ok(Verdict::Granted(table.revision))
    }

    fn claim(&mut self, keys: &[Key]) -> Result<Vec<Verdict>, Trouble> {
        let mut table = self.table()?;
        if !table.leases.contains(&self.lease) {
            return Err(Trouble::NoLease);
        }
        let mut take = |key: &Key| {
            if let Some((other, ..)) = table.addresses.get(key).filter(|(by, ..)| *by != self.own) {
                return Verdict::Refused(other.clone());
            }
            table.tell(Change::Address(*key, self.own.clone()));
            let revision = table.revision;
            table.addresses.insert(*key, (self.own.clone(), self.lease, revision));
            Verdict::Granted(revision)
        };
        Ok(keys.iter().map(&mut take).collect())
    }

    fn release(&mut self, keys: &[Key]) -> Result<(), Trouble> {
        let mut table = self.table()?;
        for key in keys {
            if table.addresses.get(key).is_some_and(|(_, lease, _)| *lease == self.lease) {
                table.addresses.remove(key);
                table.tell(Change::NoAddress(*key));
            }
        }
        Ok(())
    }

    fn sweep(&mut self, keys: &[(Key, u64)]) -> Result<(), Trouble> {
        let mut table = self.table()?;
        for (key, since) in keys {
            if table.addresses.get(key).is_some_and(|(_, _, now)| now == since) {
                table.addresses.remove(key);
                table.tell(Change::NoAddress(*key));
            }
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Ok(mut table) = self.table() {
            table.end_lease(self.lease);
        }
    }
}

/// A router as far as its directory goes.
struct Router {
    directory: Arc<Directory>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    fn start(world: &World, name: &str, port: u16) -> Self {
        let tenants = ["blue".to_owned(), "red".to_owned()];
        let directory = Arc::new(Directory::new("etcd", View::new(name), name, &tenants).unwrap());
        let registry = Fake { world: Arc::clone(world), own: name.to_owned(), lease: 0 };
        let address = SocketAddr::from(([10, 0, 0, 1], port));
        let thread = directory.follow(Box::new(registry), address, GRACE).unwrap();
        Self { directory, thread: Some(thread) }
    }

    fn route(&self, tenant: u32, gid: &Gid) -> Option<String> {
        let number = self.directory.route(tenant, gid)?;
        Some(self.directory.peer(number).unwrap().name.to_string())
    }

    fn is_published(&self, tenant: u32, gid: &Gid) -> bool {
        matches!(self.directory.announcements.standing(&(tenant, *gid)), Some(Standing::Held(_)))
    }

    fn state(&self) -> String {
        self.directory.status().state
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.directory.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn gid(last: u8) -> Gid {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 0, last]
}

fn b() -> Option<String> {
    Some("b".to_owned())
}

#[test]
fn what_a_router_serves_is_known_to_the_others_by_tenant_until_it_ends() {
    let world = World::default();
    let (a, other) = (Router::start(&world, "a", 1), Router::start(&world, "b", 2));
    other.directory.claim(0, &gid(1));
    eventually("a knows", || a.route(0, &gid(1)) == b());
    assert_eq!((a.route(1, &gid(1)), a.route(0, &gid(2)), other.route(0, &gid(1))), (None, None, None));
    eventually("the daemon is told", || a.directory.take_news().routes);
    other.directory.claim(1, &gid(2));
    eventually("a knows the other tenant's, too", || a.route(1, &gid(2)) == b());
    other.directory.release(0, &gid(1));
    eventually("a forgets", || a.route(0, &gid(1)).is_none());
    drop(other);
    eventually("b is gone", || a.route(1, &gid(2)).is_none() && a.directory.number("b").is_none());
}

#[test]
fn a_router_whose_lease_ends_is_gone_and_comes_back_by_itself() {
    let world = World::default();
    let (a, other) = (Router::start(&world, "a", 1), Router::start(&world, "b", 2));
    other.directory.claim(0, &gid(1));
    eventually("a knows", || a.route(0, &gid(1)) == b());
    let lease = world.lock().routers["b"].1;
    world.lock().end_lease(lease);
    eventually("b says it again under another lease", || {
        let world = world.lock();
        world.addresses.get(&(0, gid(1))).is_some_and(|(by, of, _)| by == "b" && *of != lease)
    });
    eventually("a knows again", || a.route(0, &gid(1)) == b());
}

#[test]
fn a_second_claimant_is_refused_and_takes_over_when_the_first_ends() {
    let world = World::default();
    let (a, other) = (Router::start(&world, "a", 1), Router::start(&world, "b", 2));
    other.directory.claim(0, &gid(1));
    eventually("b has it", || other.is_published(0, &gid(1)));
    a.directory.claim(0, &gid(1));
    eventually("a is refused", || a.directory.refused_by(0, &gid(1)) == b());
    assert!(a.directory.is_unsettled(0, &gid(1)), "it may be given back soon");
    assert!(other.is_published(0, &gid(1)));
    other.directory.release(0, &gid(1));
    eventually("a takes over", || a.is_published(0, &gid(1)));
    eventually("the daemon is told", || a.directory.take_news().standings);
    eventually("b knows", || other.route(0, &gid(1)) == Some("a".to_owned()));
}

#[test]
fn of_two_that_ask_at_once_one_gets_it() {
    let world = World::default();
    let routers: Vec<Router> =
        ["a", "b", "c"].iter().zip(1..).map(|(n, p)| Router::start(&world, n, p)).collect();
    routers.iter().for_each(|router| router.directory.claim(0, &gid(1)));
    eventually("one has it, the others are refused", || {
        let has = |router: &&Router| router.is_published(0, &gid(1));
        let refused = |router: &&Router| router.directory.refused_by(0, &gid(1)).is_some();
        routers.iter().filter(has).count() == 1 && routers.iter().filter(refused).count() == 2
    });
}

#[test]
fn a_registry_that_falls_changes_nothing_and_what_it_has_forgotten_is_said_again() {
    for forgets in [false, true] {
        let world = World::default();
        let (a, other) = (Router::start(&world, "a", 1), Router::start(&world, "b", 2));
        a.directory.claim(0, &gid(9));
        other.directory.claim(0, &gid(1));
        eventually("both know", || a.route(0, &gid(1)) == b() && other.route(0, &gid(9)).is_some());
        world.lock().fall(forgets);
        eventually("it is noticed", || a.state() == "lost" && other.state() == "lost");
        other.directory.claim(0, &gid(2));
        let start = Instant::now();
        while start.elapsed() < GRACE {
            assert_eq!(a.route(0, &gid(1)), b(), "what is known is kept");
            thread::sleep(Duration::from_millis(20));
        }
        world.lock().away = false;
        eventually("a knows what happened meanwhile", || {
            assert!(!forgets || a.route(0, &gid(1)) == b(), "not for a moment was it forgotten");
            a.route(0, &gid(2)) == b()
        });
        eventually("it is said", || a.state() == "up" && other.state() == "up");
        thread::sleep(2 * GRACE);
        assert_eq!(a.route(0, &gid(1)), b(), "{forgets}");
        assert!(a.is_published(0, &gid(9)) && other.is_published(0, &gid(1)));
    }
}

#[test]
fn what_ended_while_the_registry_was_away_is_forgotten_in_the_end() {
    let world = World::default();
    let a = Router::start(&world, "a", 1);
    let other = Router::start(&world, "b", 2);
    other.directory.claim(0, &gid(1));
    eventually("a knows", || a.route(0, &gid(1)) == b());
    world.lock().fall(true);
    eventually("it is noticed", || a.state() == "lost");
    drop(other);
    world.lock().away = false;
    eventually("it is back", || a.state() == "up");
    a.directory.claim(0, &gid(1));
    eventually("what is in doubt keeps nobody from it", || a.is_published(0, &gid(1)));
    eventually("b is forgotten", || a.directory.number("b").is_none());
}

#[test]
fn a_router_starts_while_the_registry_is_away() {
    let world = World::default();
    world.lock().away = true;
    let a = Router::start(&world, "a", 1);
    a.directory.claim(0, &gid(1));
    eventually("it is noticed", || a.state() == "lost");
    assert!(a.directory.refused_by(0, &gid(1)).is_none() && !a.directory.is_unsettled(0, &gid(1)));
    world.lock().away = false;
    eventually("it is told", || a.is_published(0, &gid(1)));
}

#[test]
fn a_compacted_history_is_no_trouble() {
    let world = World::default();
    let (a, other) = (Router::start(&world, "a", 1), Router::start(&world, "b", 2));
    other.directory.claim(0, &gid(1));
    eventually("a knows", || a.route(0, &gid(1)) == b());
    // Nobody is told of what happens now.
    let watches = std::mem::take(&mut world.lock().watches);
    other.directory.claim(0, &gid(2));
    other.directory.release(0, &gid(1));
    eventually("it has happened", || {
        let table = world.lock();
        table.addresses.contains_key(&(0, gid(2))) && !table.addresses.contains_key(&(0, gid(1)))
    });
    assert_eq!(a.route(0, &gid(1)), b());
    watches.iter().for_each(|watch| drop(watch.send(Err(Trouble::Compacted))));
    eventually("a knows what it missed", || a.route(0, &gid(2)) == b() && a.route(0, &gid(1)).is_none());
}

#[test]
fn what_somebody_deletes_is_said_again() {
    let world = World::default();
    let a = Router::start(&world, "a", 1);
    a.directory.claim(0, &gid(1));
    eventually("it is said", || a.is_published(0, &gid(1)));
    let mut table = world.lock();
    table.addresses.clear();
    table.routers.clear();
    table.tell(Change::NoAddress((0, gid(1))));
    table.tell(Change::NoRouter("a".to_owned()));
    drop(table);
    eventually("all of it is back", || {
        let table = world.lock();
        table.addresses.contains_key(&(0, gid(1))) && table.routers.contains_key("a")
    });
}

#[test]
fn a_router_that_was_killed_finds_its_own_entries_and_removes_what_is_over() {
    let world = World::default();
    let address = SocketAddr::from(([10, 0, 0, 1], 1));
    let mut table = world.lock();
    table.routers.insert("a".to_owned(), (address, 77));
    for last in 1..=2 {
        table.addresses.insert((0, gid(last)), ("a".to_owned(), 77, 3));
    }
    table.revision = 5;
    drop(table);
    let a = Router::start(&world, "a", 1);
    a.directory.claim(0, &gid(1));
    eventually("it is its own", || a.is_published(0, &gid(1)));
    eventually("what no client has is gone", || !world.lock().addresses.contains_key(&(0, gid(2))));
    assert_ne!(world.lock().addresses[&(0, gid(1))].1, 77);
}

#[test]
fn a_name_that_another_router_has_is_not_taken() {
    let world = World::default();
    let first = Router::start(&world, "a", 1);
    eventually("the first is there", || world.lock().routers.contains_key("a"));
    let second = Router::start(&world, "a", 2);
    second.directory.claim(0, &gid(1));
    eventually("the second follows", || second.state() == "up");
    thread::sleep(Duration::from_millis(400));
    assert!(!second.is_published(0, &gid(1)), "its addresses would lead to the first");
    assert_eq!(world.lock().routers["a"].0.port(), 1);
    drop(first);
    eventually("the name is free", || second.is_published(0, &gid(1)));
}

#[test]
fn an_address_may_be_heard_of_before_its_router() {
    let mut view = View::new("a");
    let key = (0, gid(1));
    assert_eq!(view.apply(&Change::Address(key, "b".to_owned())), Ok(true));
    assert_eq!(view.route(0, &gid(1)), None);
    let at = SocketAddr::from(([10, 0, 0, 2], 1));
    assert_eq!(view.apply(&Change::Router("b".to_owned(), at)), Ok(true));
    let number = view.route(0, &gid(1)).unwrap();
    view.apply(&Change::NoRouter("b".to_owned())).unwrap();
    assert_eq!((view.route(0, &gid(1)), view.number("b")), (None, None));
    view.apply(&Change::Router("c".to_owned(), at)).unwrap();
    view.apply(&Change::Router("b".to_owned(), at)).unwrap();
    assert_eq!(view.route(0, &gid(1)), Some(number), "a number means one router for ever");
}

#[test]
fn a_flood_of_names_or_addresses_ends_at_the_tables() {
    let mut view = View::new("a");
    let at = SocketAddr::from(([10, 0, 0, 2], 1));
    let mut refused = 0;
    for i in 0..view::MAX_ROUTERS + 10 {
        let name = format!("r{i}");
        refused += usize::from(view.apply(&Change::Router(name.clone(), at)).is_err());
        view.apply(&Change::NoRouter(name)).unwrap();
    }
    assert_eq!((refused, view.peers().count()), (10, view::MAX_ROUTERS));
    let mut refused = 0;
    for i in 0..view::MAX_ADDRESSES as u128 + 10 {
        let key = (0, (0xfd00_u128 << 112 | i).to_be_bytes());
        refused += usize::from(view.apply(&Change::Address(key, "r0".to_owned())).is_err());
    }
    assert_eq!((refused, view.counts().1), (10, view::MAX_ADDRESSES));
    let known = (0, (0xfd00_u128 << 112).to_be_bytes());
    assert_eq!(view.apply(&Change::Address(known, "r1".to_owned())), Ok(true), "what is known can change");
}
