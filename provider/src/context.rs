//! An opened device: one client of the router, and what all its objects share.
//!
//! Objects of verbs live in their own modules and hold what their data path needs; this is where they find the
//! rest.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode as FileMode, OFlags};
use verbs_abi::ffi_private::{AsyncEventDesc, CompEventDesc};
use verbs_abi::proto::{Answer, Mode, Request, Welcome};
use verbs_abi::shm::doorbell::Doorbells;
use verbs_abi::shm::events::EventReader;
use verbs_abi::shm::lane::{LanePage, WakeWord};
use verbs_abi::shm::{LAYOUT_VERSION, PAGE, Window, arena, barrier};
use verbs_abi::verbs::EventType;

use crate::abi::edge::Errno;
use crate::bell::Bell;
use crate::direct::Peers;
pub(crate) use crate::error::OpenError;
use crate::event::{AsyncEvents, Channels};
use crate::gid::{self, GidTable};
use crate::health::Health;
use crate::hooks::{self, CommandChannel};
use crate::import::Importable;
use crate::log::{self, Level};
use crate::memory::Mover;
use crate::router_link::{RouterLink, above_stdio};
use crate::watch::{self, Mortal};

/// An opened device.
#[derive(Debug)]
pub(crate) struct Context {
    /// The connection to the router.
    pub(crate) link: RouterLink,
    /// What the router said at the start.
    pub(crate) welcome: Welcome,
    /// The client's shared memory: queues, CQs, keys.
    pub(crate) arena: Window,
    /// Moves registered memory to where the router reaches it.
    pub(crate) mover: Mover,
    /// Tells the router of new work.
    pub(crate) bell: Arc<Bell>,
    /// The completion channels.
    pub(crate) channels: Channels,
    /// The async events, and the objects they can be about.
    pub(crate) events: AsyncEvents,
    /// The clients whose QPs this one executes on directly.
    pub(crate) peers: Peers,
    /// Whether the fences of the data path are light ones, as the router makes heavy ones.
    pub(crate) has_light_fences: bool,
    /// Bytes of device memory in use.
    pub(crate) dm_bytes: Arc<AtomicU64>,
    /// The PDs and the device memory, which can be imported.
    pub(crate) importable: Importable,
    /// Contexts that C has of it: the one that was opened, and those that were imported.
    contexts: AtomicU32,
    gids: GidTable,
    watched: Mutex<Option<watch::Ticket>>,
}

/// Opens the device of this name; `events` is its async descriptor, one count an event.
pub(crate) fn open(_name: &str, events: BorrowedFd<'_>) -> Result<Arc<Context>, OpenError> {
    let health = Arc::new(Health::new().map_err(failure("watch for forks"))?);
    let link = RouterLink::connect(Arc::clone(&health))?;
    let (welcome, fds) = greet(&link, events)?;
    let [arena, region, lane, wake] = fds;
    let arena = map(arena, arena::ARENA_LEN, true)?;
    if !arena::is_known(&arena) {
        return Err(OpenError::Version { path: link.path().to_owned() });
    }
    let lane = LanePage::new(map(lane, PAGE, false)?);
    let known = "arena::is_known checks the length";
    let words = WakeWord::all(&map(wake, PAGE, true)?).expect("a page has room for them");
    let doorbells = Doorbells::new(&arena).expect(known);
    let router_events = EventReader::new(&arena).expect(known);
    let counter = events.try_clone_to_owned().map_err(failure("copy the async descriptor"))?;
    let context = Arc::new(Context {
        mover: Mover::new(region).map_err(failure("move memory"))?,
        bell: Arc::new(Bell::new(doorbells, lane, words, welcome.cores, health)),
        channels: Channels::default(),
        events: AsyncEvents::new(counter, router_events),
        peers: Peers::default(),
        has_light_fences: barrier::register() && arena::has_heavy_fences(&arena),
        dm_bytes: Arc::default(),
        importable: Importable::default(),
        contexts: AtomicU32::new(1),
        gids: GidTable::default(),
        watched: Mutex::default(),
        link,
        welcome,
        arena,
    });
    let mortal: Arc<dyn Mortal> = Arc::clone(&context) as _;
    match watch::add(&mortal, context.link.fd()) {
        Ok(ticket) => {
            *context.watched.lock().unwrap_or_else(PoisonError::into_inner) = Some(ticket);
        }
        // Everything works but hearing of the router's death while asleep.
        Err(error) => log::say(Level::Warn, format_args!("cannot start a thread: {error}")),
    }
    Ok(context)
}

/// Introduces this process to the router.
fn greet(link: &RouterLink, events: BorrowedFd<'_>) -> Result<(Welcome, [OwnedFd; 4]), OpenError> {
    let hello = Request::Hello { version: LAYOUT_VERSION, mode: wanted_mode() };
    // The router can open it where it may trace us; where not, it needs ours.
    let memory = rustix::fs::open(c"/proc/self/mem", OFlags::RDWR | OFlags::CLOEXEC, FileMode::empty());
    let fds: Vec<_> = [Some(events), memory.as_ref().ok().map(AsFd::as_fd)].into_iter().flatten().collect();
    let (answer, fds) = link.hello(&hello, &fds)?;
    let fds: Result<Vec<_>, _> = fds.into_iter().map(above_stdio).collect();
    let fds = fds.map_err(io::Error::from).map_err(failure("keep the router's descriptors"))?;
    match (answer, <[OwnedFd; 4]>::try_from(fds)) {
        (Answer::Hello(welcome), Ok(fds)) => Ok((welcome, fds)),
        _ => Err(OpenError::Version { path: link.path().to_owned() }),
    }
}

/// The mode that the user allows: direct, unless told otherwise. An unknown word is said, and the stricter one counts.
fn wanted_mode() -> Mode {
    match env::var("FREEFLOW_MODE").as_deref() {
        Ok("direct" | "") | Err(env::VarError::NotPresent) => Mode::Direct,
        Ok("isolated") => Mode::Isolated,
        word => {
            let word = word.unwrap_or("not a text");
            log::say(Level::Warn, format_args!("FREEFLOW_MODE is {word:?}; use `isolated` or `direct`"));
            Mode::Isolated
        }
    }
}

fn map(fd: OwnedFd, len: usize, writable: bool) -> Result<Window, OpenError> {
    Window::map(fd, 0, len, writable).map_err(failure("map the router's memory"))
}

fn failure(what: &'static str) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::System { what, source }
}

/// What a sysfs file of the device says while no device is open; `None` to let the file itself answer.
///
/// Only the GUID matters then, and must be the one that the device says when it is open.
pub(crate) fn sysfs_before_open(file: &str) -> Option<String> {
    if !gid::is_guid(file) {
        return None;
    }
    guid_before_open().map(|guid| gid::guid_text(&guid))
}

/// The device's GUID while no device is open; `None` where no router answers.
pub(crate) fn guid_before_open() -> Option<[u8; 8]> {
    static GUID: OnceLock<Option<[u8; 8]>> = OnceLock::new();
    *GUID.get_or_init(|| {
        let events = hooks::event_counter().ok()?;
        open("ff0", events.as_fd()).ok().map(|context| context.welcome.guid)
    })
}

impl Context {
    /// `ibv_context.num_comp_vectors`.
    pub(crate) fn num_comp_vectors(&self) -> i32 {
        1
    }

    /// An entry of the GID table and the number of its interface.
    pub(crate) fn gid(&self, index: usize) -> Option<([u8; 16], u32)> {
        self.gids.query(&self.link, index)
    }

    /// The device's health.
    pub(crate) fn health(&self) -> &Health {
        self.bell.health()
    }

    /// C has one more context of it.
    pub(crate) fn join(&self) {
        self.contexts.fetch_add(1, Ordering::SeqCst);
    }

    /// C has one context less of it: ends the client with the last one.
    pub(crate) fn leave(&self) {
        if self.contexts.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.end();
        }
    }

    /// Ends the client, although a completion channel that was not destroyed may keep this value alive.
    fn end(&self) {
        if self.health().is_child() {
            return;
        }
        let ticket = self.watched.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ticket) = ticket {
            watch::remove(ticket);
        }
        self.link.end();
    }
}

impl Mortal for Context {
    /// The router is gone: says so to whoever waits. What is outstanding is flushed when it is polled for.
    fn router_died(&self) {
        if !self.health().mark_dead() {
            return;
        }
        log::say(Level::Error, format_args!("the router at {} is gone", self.link.path().display()));
        for qp in self.events.elements().qps() {
            qp.fail();
        }
        self.events.raise(EventType::DeviceFatal, 0);
        self.channels.wake_all();
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.end();
        // A QP that was never destroyed and its CQs refer to each other.
        let abandoned = std::mem::take(&mut *self.events.elements());
        for qp in abandoned.qps() {
            qp.detach();
        }
    }
}

impl CommandChannel for Context {
    fn comp_channel_created(&self, fd: RawFd) -> Result<(), Errno> {
        self.health().check_owner()?;
        self.channels.add(fd);
        Ok(())
    }

    fn comp_channel_closed(&self, fd: RawFd) {
        self.channels.remove(&self.link, fd);
    }

    fn next_comp_event(&self, fd: RawFd) -> Result<Option<CompEventDesc>, Errno> {
        let channel = self.channels.find(fd).ok_or(Errno::BADF)?;
        Ok(channel.next())
    }

    fn next_async_event(&self) -> Result<Option<AsyncEventDesc>, Errno> {
        Ok(self.events.next())
    }

    fn async_descriptor(&self) -> Result<OwnedFd, Errno> {
        self.health().check_owner()?;
        self.events.descriptor()
    }

    fn opened_device(self: Arc<Self>) -> Option<Arc<Context>> {
        Some(self)
    }

    fn sysfs(&self, file: &str) -> Option<String> {
        self.gids.sysfs(&self.link, self.welcome.guid, file)
    }
}
