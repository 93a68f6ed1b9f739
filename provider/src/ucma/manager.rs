//! The connection to the router's connection manager: one a process, for all its event channels.
//!
//! An event channel is an event counter of the process's own, which the router adds to: so it blocks, polls, sits in
//! epoll sets and takes O_NONBLOCK as any descriptor does. A count leads to an event unless the event was taken back
//! or another thread was faster; then the reader waits for the next count. Where the process has devices of the kernel
//! as well, the channel is an epoll instance over the counter and a channel of the kernel ([`super::beside`]).

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;
use verbs_abi::proto::cm::{Address, CmAnswer, CmRequest, Command, Known};
use verbs_abi::proto::{Answer, Request};
use verbs_abi::shm::LAYOUT_VERSION;

use super::beside::{Book, Done, Hands, Sides};
use super::decode::{self, Shape, What, Written};
use super::encode;
use super::kernel::Kernel;
use super::removal::Ids;
use crate::abi::edge::Errno;
use crate::context::OpenError;
use crate::health::Health;
use crate::hooks::{CommandChannel, event_counter, registry};
use crate::log::{self, Level};
use crate::router_link::{RouterLink, above_stdio};
use crate::watch::{self, Mortal};

/// The connection.
#[derive(Debug)]
pub(crate) struct Manager {
    link: RouterLink,
    health: Arc<Health>,
    guid: [u8; 8],
    channels: Mutex<HashMap<RawFd, Channel>>,
    /// The ids that the kernel has.
    book: Book,
    watched: Mutex<Option<watch::Ticket>>,
    /// What events told of their ids: librdmacm asks for it in many steps. Locked while the router is asked, so
    /// that it changes in the router's order.
    facts: Mutex<Facts>,
}

/// What the process knows of its ids.
#[derive(Debug, Default)]
struct Facts {
    /// By their numbers, with the channels that they are on.
    known: HashMap<u32, (RawFd, Box<Known>)>,
    /// For the router's death.
    ids: Ids,
}

/// An event channel.
#[derive(Debug, Clone)]
struct Channel {
    /// The router's name of it.
    number: u32,
    /// What is behind its descriptor, where that is not its counter.
    sides: Option<Arc<Sides>>,
}

/// The process's connection, made now if there is none. Whoever has it gives it back by [`registry::leave_manager`].
pub(crate) fn adopt() -> Result<Arc<Manager>, Errno> {
    if let Some(manager) = registry::join_manager(None) {
        return Ok(manager);
    }
    let manager = Manager::connect().map_err(|error| {
        log::say(Level::Error, format_args!("cannot use rdma_cm: {error}"));
        error.errno()
    })?;
    // Another thread may have been faster; then its connection is the one.
    registry::join_manager(Some(manager)).ok_or(Errno::NODEV)
}

impl Manager {
    fn connect() -> Result<Arc<Manager>, OpenError> {
        let system = |source| OpenError::System { what: "watch for forks", source };
        let health = Arc::new(Health::new().map_err(system)?);
        let link = RouterLink::connect(Arc::clone(&health))?;
        let (answer, _) = link.hello(&Request::CmHello { version: LAYOUT_VERSION }, &[])?;
        let Answer::CmWelcome { guid } = answer else {
            return Err(OpenError::Version { path: link.path().to_owned() });
        };
        let manager = Arc::new(Manager {
            link,
            health,
            guid,
            channels: Mutex::default(),
            book: Book::default(),
            watched: Mutex::default(),
            facts: Mutex::default(),
        });
        let mortal: Arc<dyn Mortal> = Arc::clone(&manager) as _;
        match watch::add(&mortal, manager.link.fd()) {
            Ok(ticket) => *lock(&manager.watched) = Some(ticket),
            // Everything works but hearing of the router's death while asleep.
            Err(error) => log::say(Level::Warn, format_args!("cannot start a thread: {error}")),
        }
        Ok(manager)
    }

    /// Whether it can still be asked.
    pub(crate) fn is_usable(&self) -> bool {
        !self.health.is_dead() && !self.health.is_child()
    }

    /// A new event channel's descriptor.
    pub(crate) fn open_channel(&self) -> Result<OwnedFd, Errno> {
        let counter = above_stdio(event_counter()?)?;
        let number = self.link.handle(&Request::Cm(CmRequest::OpenChannel), &[counter.as_fd()])?;
        let (descriptor, sides) = match beside_kernel(counter) {
            Ok(counter) => (counter, None),
            Err(sides) => (sides.descriptor().and_then(above_stdio)?, Some(Arc::new(sides))),
        };
        lock(&self.channels).insert(descriptor.as_raw_fd(), Channel { number, sides });
        Ok(descriptor)
    }

    fn channel(&self, fd: RawFd) -> Result<Channel, Errno> {
        lock(&self.channels).get(&fd).cloned().ok_or(Errno::BADF)
    }

    /// What an event told of an id, if nothing has changed since.
    fn known<T>(&self, fd: RawFd, id: u32, find: impl Fn(&Known) -> Option<T>) -> Option<T> {
        lock(&self.facts)
            .known
            .get(&id)
            .filter(|(channel, _)| *channel == fd)
            .and_then(|(_, known)| find(known))
    }

    /// What is known of an id's route.
    fn route(&self, fd: RawFd, id: u32) -> Result<CmAnswer, Errno> {
        match self.known(fd, id, |known| known.route.clone()) {
            Some(route) => Ok(CmAnswer::Route(route)),
            None => self.send(fd, Command::Query { id }),
        }
    }

    /// The attributes with which the QP of an id goes to a state.
    fn qp_attr(&self, fd: RawFd, id: u32, state: u32) -> Result<CmAnswer, Errno> {
        let told = |known: &Known| known.attrs.iter().find(|(_, attr)| attr.qp_state == state).copied();
        match self.known(fd, id, told) {
            Some((mask, attr)) => Ok(CmAnswer::QpAttr { mask, attr }),
            None => self.send(fd, Command::InitQpAttr { id, state }),
        }
    }

    fn ask(&self, fd: RawFd, command: Command) -> Result<CmAnswer, Errno> {
        let mut facts = lock(&self.facts);
        if self.health.is_dead() {
            return facts.ids.answer(fd, &command);
        }
        let mut answer = self.send(fd, command.clone());
        if let Some(id) = command.id() {
            facts.known.remove(&id);
        }
        if let Ok(CmAnswer::Event(Some(event))) = &mut answer {
            match event.known.take() {
                Some(known) => facts.known.insert(event.id, (fd, known)),
                None => facts.known.remove(&event.id),
            };
        }
        match answer {
            Ok(answer) => {
                facts.ids.note(fd, &command, &answer);
                Ok(answer)
            }
            // It died just now.
            Err(Errno::IO) => {
                self.end(&mut facts);
                facts.ids.answer(fd, &command)
            }
            Err(error) => Err(error),
        }
    }

    /// The router is gone: the ids hear of it, and whoever waits for an event is woken. Asking for one more says so.
    fn end(&self, facts: &mut Facts) {
        if !self.health.mark_dead() {
            return;
        }
        log::say(Level::Error, format_args!("the router at {} is gone", self.link.path().display()));
        let told = facts.ids.remove_device();
        for (fd, channel) in &*lock(&self.channels) {
            let counter = match &channel.sides {
                Some(sides) => sides.counter.as_fd(),
                // SAFETY: a channel is taken out before its descriptor is closed, and the lock is held.
                None => unsafe { BorrowedFd::borrow_raw(*fd) },
            };
            let events = told.iter().filter(|channel| *channel == fd).count() as u64;
            let _ = rustix::io::write(counter, &(events + 1).to_ne_bytes());
        }
    }

    fn send(&self, fd: RawFd, command: Command) -> Result<CmAnswer, Errno> {
        let channel = self.channel(fd)?.number;
        match self.link.ask(&Request::Cm(CmRequest::Ask { channel, command }), &[])? {
            (Answer::Cm(answer), _) => Ok(answer),
            _ => Err(Errno::PROTO),
        }
    }

    /// The next event, which the caller waits for if it `waits` and the descriptor blocks.
    fn next_event(&self, fd: RawFd, waits: bool) -> Result<CmAnswer, Errno> {
        loop {
            self.health.check_owner()?;
            // SAFETY: the caller is using the descriptor, which therefore is open.
            let counter = unsafe { BorrowedFd::borrow_raw(fd) };
            if self.health.is_dead() {
                take_count(counter);
            } else if waits {
                rustix::io::read(counter, &mut [0; 8])?;
            } else if !take_count(counter) {
                return Err(Errno::AGAIN);
            }
            match self.ask(fd, Command::NextEvent)? {
                CmAnswer::Event(None) => {}
                answer => return Ok(answer),
            }
        }
    }

    fn migrate(&self, id: u32, from: RawFd, to: RawFd) -> Result<CmAnswer, Errno> {
        // As Linux answers for a descriptor that is none, or is no event channel.
        let other = self.channel(from).map_err(|_| Errno::NOENT)?;
        let (mut told, mut twin) = (0, true);
        if let (Some(to_sides), Some(from_sides)) = (self.channel(to)?.sides, &other.sides) {
            (told, twin) = self.book.migrate(id, to, &to_sides.kernel, &from_sides.kernel)?;
        }
        if !twin {
            return Ok(CmAnswer::Reported { events: told, revoked: 0 });
        }
        let mut answer = self.ask(to, Command::MigrateId { id, from: other.number })?;
        self.take_back(from, &answer);
        if let CmAnswer::Reported { events, .. } = &mut answer {
            *events += told;
        }
        Ok(answer)
    }

    /// Executes what was written.
    ///
    /// # Safety
    /// An option's address must be readable for its length.
    unsafe fn execute(&self, fd: RawFd, what: What) -> Result<CmAnswer, Errno> {
        match what {
            What::NextEvent => self.next_event(fd, true),
            What::Migrate { id, from } => self.migrate(id, from, fd),
            What::SetOption { id, level, name, value, len } => {
                if value == 0 {
                    return Err(Errno::FAULT);
                }
                // SAFETY: the caller's promise.
                let bytes = unsafe { std::slice::from_raw_parts(value as *const u8, len as usize) };
                let option = decode::option(level, name, bytes)?;
                self.ask(fd, Command::SetOption { id, option })
            }
            What::Ask(Command::Bind { address: Address::Ib(_), .. }) if older_dialect() => Err(Errno::INVAL),
            What::Ask(Command::Query { id }) => self.route(fd, id),
            What::Ask(Command::InitQpAttr { id, state }) => self.qp_attr(fd, id, state),
            What::Ask(command) => {
                let answer = self.ask(fd, command)?;
                self.take_back(fd, &answer);
                Ok(answer)
            }
        }
    }

    /// Takes the counts of events back that are no more. Never waits: another reader may have taken them already.
    fn take_back(&self, fd: RawFd, answer: &CmAnswer) {
        let CmAnswer::Reported { revoked: 1.., .. } = answer else { return };
        let Ok(Channel { sides, .. }) = self.channel(fd) else { return };
        match sides {
            Some(sides) => take_counts(sides.counter.as_fd(), answer),
            // SAFETY: the caller is using the descriptor, which therefore is open.
            None => take_counts(unsafe { BorrowedFd::borrow_raw(fd) }, answer),
        }
    }

    /// The next event of either side, which the caller waits for unless the descriptor does not block. The kernel stores
    /// its own; then there is no answer.
    ///
    /// # Safety
    /// `written` must be the command that asks for an event, which goes to `response`.
    unsafe fn next_event_of_both(
        &self,
        fd: RawFd,
        sides: &Sides,
        written: &[u8],
        response: u64,
    ) -> Result<Option<CmAnswer>, Errno> {
        // SAFETY: the caller is using the descriptor, which therefore is open.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
        let of_the_kernel = || {
            // SAFETY: the caller's promise.
            let stored = unsafe { sides.kernel.write(written) };
            // SAFETY: as above, and there is an event now.
            stored.map(|()| unsafe { self.book.name(fd, response) })
        };
        let ours = || match rustix::io::read(&sides.counter, &mut [0; 8]) {
            Ok(_) => match self.ask(fd, Command::NextEvent)? {
                CmAnswer::Event(None) => Err(Errno::AGAIN),
                answer => Ok(answer),
            },
            Err(error) => Err(error),
        };
        loop {
            self.health.check_owner()?;
            let kernel_first = sides.kernel_first();
            for kernel in [kernel_first, !kernel_first] {
                let event = if kernel { of_the_kernel().map(|()| None) } else { ours().map(Some) };
                if event != Err(Errno::AGAIN) {
                    return event;
                }
            }
            let blocks = !rustix::fs::fcntl_getfl(descriptor)?.contains(OFlags::NONBLOCK);
            // What one of the two was counted for may have been taken back; then there is more to wait for.
            let wait = if blocks { None } else { Some(&Timespec { tv_sec: 0, tv_nsec: 0 }) };
            if rustix::event::poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], wait)? == 0 {
                return Err(Errno::AGAIN);
            }
        }
    }

    /// Executes what was written where there may be ids of the kernel: what to answer, if that was not done yet.
    ///
    /// # Safety
    /// As for [`CommandChannel::manage`].
    unsafe fn execute_beside(
        &self,
        fd: RawFd,
        sides: &Sides,
        written: &[u8],
        what: What,
        response: u64,
    ) -> Result<Option<CmAnswer>, Errno> {
        if what == What::NextEvent {
            // SAFETY: the caller's promise.
            return unsafe { self.next_event_of_both(fd, sides, written, response) };
        }
        // SAFETY: the caller's promise.
        let ours = |what| unsafe { self.execute(fd, what) };
        let hands = Hands { channel: fd, kernel: &sides.kernel, ours: &ours };
        // SAFETY: the caller's promise.
        match unsafe { self.book.execute(&hands, written, what, response)? } {
            Done::Stored => Ok(None),
            Done::Answered(answer) => Ok(Some(answer)),
            Done::Ours(what) => ours(what).map(Some),
        }
    }
}

/// The counter, or both sides where this process has devices of the kernel as well.
fn beside_kernel(counter: OwnedFd) -> Result<OwnedFd, Sides> {
    if !registry::has_other_devices() {
        return Ok(counter);
    }
    let Ok(kernel) = Kernel::open() else { return Ok(counter) };
    match rustix::io::ioctl_fionbio(&counter, true) {
        Ok(()) => Err(Sides::new(counter, kernel)),
        Err(_) => Ok(counter),
    }
}

/// Whether librdmacm shall use the older dialect of the two that it has: it asks, by binding to an InfiniBand address,
/// and a refusal means yes.
fn older_dialect() -> bool {
    std::env::var_os("FREEFLOW_CM_DIALECT").is_some_and(|word| word == "ip")
}

fn take_counts(counter: BorrowedFd<'_>, answer: &CmAnswer) {
    let CmAnswer::Reported { revoked, .. } = answer else { return };
    for _ in 0..*revoked {
        if !take_count(counter) {
            break;
        }
    }
}

/// Takes a count if there is one.
fn take_count(counter: BorrowedFd<'_>) -> bool {
    let mut count = [0; 8];
    let into = &mut [IoSliceMut::new(&mut count)];
    rustix::io::preadv2(counter, into, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}

/// Stores a reply at an address with so much room.
///
/// # Safety
/// The address must be that of the command's reply.
unsafe fn store(reply: (Vec<u8>, usize), response: u64, room: u16) -> Result<(), Errno> {
    let (reply, least) = reply;
    if usize::from(room) < least {
        return Err(Errno::NOSPC);
    }
    if response == 0 {
        return Err(Errno::FAULT);
    }
    let len = reply.len().min(room.into());
    // SAFETY: the caller's promise, and no more than the command has room for.
    unsafe { std::ptr::copy_nonoverlapping(reply.as_ptr(), response as *mut u8, len) };
    Ok(())
}

impl CommandChannel for Manager {
    unsafe fn manage(&self, fd: RawFd, command: &[u8]) -> Result<(), Errno> {
        self.health.check_owner()?;
        let Written { what, shape, response, room } = decode::decode(command)?;
        let answer = match self.channel(fd)?.sides {
            // SAFETY: the caller's promise.
            None => unsafe { self.execute(fd, what)? },
            // SAFETY: the caller's promise.
            Some(sides) => match unsafe { self.execute_beside(fd, &sides, command, what, response)? } {
                Some(answer) => answer,
                None => return Ok(()),
            },
        };
        let reply = encode::encode(shape, &answer, self.guid)?;
        if shape == Shape::None {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { store(reply, response, room) }
    }

    unsafe fn event_at_once(&self, fd: RawFd, command: &[u8]) -> Result<(), Errno> {
        self.health.check_owner()?;
        let Written { what, shape, response, room } = decode::decode(command)?;
        if what != What::NextEvent || self.channel(fd)?.sides.is_some() {
            return Err(Errno::AGAIN);
        }
        let answer = self.next_event(fd, false)?;
        // SAFETY: the caller's promise.
        unsafe { store(encode::encode(shape, &answer, self.guid)?, response, room) }
    }

    fn event_channel_closed(&self, fd: RawFd) {
        let channel = lock(&self.channels).remove(&fd);
        {
            let mut facts = lock(&self.facts);
            facts.known.retain(|_, (on, _)| *on != fd);
            facts.ids.close_channel(fd);
        }
        self.book.forget(fd);
        if let Some(Channel { number, .. }) = channel.filter(|_| self.is_usable()) {
            let _ = self.link.release(&Request::Cm(CmRequest::CloseChannel { channel: number }));
        }
        registry::leave_manager(self);
    }
}

impl Mortal for Manager {
    fn router_died(&self) {
        self.end(&mut lock(&self.facts));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if self.health.is_child() {
            return;
        }
        if let Some(ticket) = lock(&self.watched).take() {
            watch::remove(ticket);
        }
        self.link.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
