//! The directory's thread: follows a registry and tells it what this router serves, for as long as the router runs.
//!
//! ```text
//!   reconnect -> list -> watch (a thread of its own) -> lease, enrol, claim ... repeated at a third of the lease's time
//!       ^                                                     |
//!       +----------- pause, longer each time <-- trouble -----+     meanwhile the last view serves
//! ```
//!
//! Leaves to others: what the registry is (`etcd`), what is done with what it says (the directory).

use std::{
    net::SocketAddr,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use super::{
    Directory,
    announcements::Verdict,
    registry::{Cancel, Registry, Trouble, Watch},
    view::Key,
};

/// The pause after the first failure; it doubles with each until the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Addresses that the registry is asked for at a time.
const AT_ONCE: usize = 32;
/// How often what is in doubt is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The thread's own.
#[derive(Debug)]
pub(crate) struct Follower {
    registry: Box<dyn Registry>,
    directory: Arc<Directory>,
    /// Where other routers reach this one.
    address: SocketAddr,
    /// What was lost is kept for so long when a new listing does not hold it.
    grace: Duration,
    pause: Duration,
    /// Servers that failed one after the other.
    failures: usize,
    /// Whether there was trouble since the last listing.
    was_away: bool,
    /// Whether this router's name is its own.
    enrolled: bool,
    complained: bool,
}

/// A watch's thread, which ends with this.
struct Watcher {
    cancel: Cancel,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(mut watch: Box<dyn Watch>, cancel: Cancel, directory: &Arc<Directory>) -> Result<Self, Trouble> {
        let directory = Arc::clone(directory);
        let follow = move || {
            let trouble = loop {
                match watch.next() {
                    Ok(seen) => directory.see(&seen),
                    Err(trouble) => break trouble,
                }
            };
            directory.watch_ended(trouble);
        };
        let thread = thread::Builder::new().name("watch".to_owned()).spawn(follow);
        let thread = thread.map_err(|error| Trouble::Away(format!("no thread: {error}")))?;
        Ok(Self { cancel, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        (self.cancel)();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the directory's watch panicked");
        }
    }
}

impl Follower {
    /// One that has done nothing yet. `grace`: how long what was known is kept when it is not found any more after trouble.
    pub(crate) fn new(
        registry: Box<dyn Registry>,
        directory: Arc<Directory>,
        address: SocketAddr,
        grace: Duration,
    ) -> Self {
        Self {
            registry,
            directory,
            address,
            grace,
            pause: Duration::ZERO,
            failures: 0,
            was_away: false,
            enrolled: false,
            complained: false,
        }
    }

    /// Follows the registry until told to stop.
    pub(crate) fn run(mut self) {
        while !self.directory.is_stopping() {
            let start = Instant::now();
            let outcome = self.session();
            if start.elapsed() > LONGEST_PAUSE {
                (self.pause, self.failures) = (Duration::ZERO, 0);
            }
            match outcome {
                Ok(()) => break,
                Err(Trouble::Compacted) => {
                    tracing::debug!("the directory's history was compacted; listing anew");
                    self.rest();
                }
                Err(Trouble::NoLease) => {
                    tracing::debug!("the directory's lease has ended; taking another");
                    self.start_over();
                    self.rest();
                }
                Err(trouble) => {
                    self.was_away = true;
                    self.failures += 1;
                    // Another server may answer at once.
                    if self.failures >= self.registry.servers() {
                        self.directory.lost(&self.registry.place(), &trouble);
                        self.rest();
                    }
                }
            }
        }
        self.registry.leave();
    }

    /// Waits before the next try; not all routers at the same moments.
    fn rest(&mut self) {
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        let clock =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.subsec_nanos());
        let pause = self.pause * (768 + clock % 512) / 1024;
        let until = Instant::now() + pause;
        while !self.directory.is_stopping() && Instant::now() < until {
            self.directory.await_call(until);
        }
        self.directory.forget(Instant::now());
    }

    fn start_over(&mut self) {
        self.enrolled = false;
        self.directory.announcements.start_over();
    }

    /// Serves until told to stop, or until something is wrong.
    fn session(&mut self) -> Result<(), Trouble> {
        self.directory.watch_begins();
        self.registry.reconnect()?;
        let listing = self.registry.list()?;
        let forget = self.was_away.then(|| Instant::now() + self.grace);
        self.directory.relist(&listing, forget);
        let (watch, cancel) = self.registry.watch(listing.revision)?;
        let _watcher = Watcher::start(watch, cancel, &self.directory)?;
        let mut leftovers = listing.own;
        let mut keep_at = Instant::now();
        while !self.directory.is_stopping() {
            self.directory.check_watch()?;
            let now = Instant::now();
            if now >= keep_at {
                let lease = self.registry.keep()?;
                if lease.is_new {
                    self.start_over();
                }
                keep_at = now + lease.time / 3;
                self.was_away = false;
                self.enrol()?;
                self.directory.found(&self.registry.place());
            }
            if self.directory.take_disenrolled() {
                self.enrolled = false;
                self.enrol()?;
            }
            if self.enrolled {
                self.sweep(std::mem::take(&mut leftovers))?;
                if self.announce()? {
                    continue;
                }
            }
            self.directory.forget(now);
            self.directory.await_call(keep_at.min(now + LOOK));
        }
        Ok(())
    }

    /// Says where this router listens, unless that is said.
    fn enrol(&mut self) -> Result<(), Trouble> {
        if self.enrolled {
            return Ok(());
        }
        match self.registry.enrol(self.address)? {
            Verdict::Granted(_) => (self.enrolled, self.complained) = (true, false),
            Verdict::Again => {}
            Verdict::Refused(by) => {
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::error!(
                        name = self.directory.own(),
                        other = by,
                        "another router has this one's name in the directory; give each its own"
                    );
                }
            }
        }
        Ok(())
    }

    /// Removes what a former life left and no client has now.
    fn sweep(&mut self, leftovers: Vec<(Key, u64)>) -> Result<(), Trouble> {
        let is_over = |key: &Key| self.directory.announcements.standing(key).is_none();
        let over: Vec<_> = leftovers.into_iter().filter(|(key, _)| is_over(key)).collect();
        for some in over.chunks(AT_ONCE) {
            self.registry.sweep(some)?;
        }
        Ok(())
    }

    /// Tells the registry some of what has changed. True: there may be more.
    fn announce(&mut self) -> Result<bool, Trouble> {
        let all = &self.directory.announcements;
        let leaving = all.leaving(AT_ONCE);
        if !leaving.is_empty() {
            self.registry.release(&leaving)?;
            all.left(&leaving);
        }
        let pending = all.pending(AT_ONCE);
        if !pending.is_empty() {
            let verdicts = self.registry.claim(&pending)?;
            self.directory.settle(&pending, verdicts);
        }
        Ok(leaving.len() == AT_ONCE || pending.len() == AT_ONCE)
    }
}
