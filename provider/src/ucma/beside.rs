//! Ids of the kernel's devices beside those of `ff0`, in a process that has both.
//!
//! An id that such a program makes is two at first, one here and one in the kernel. What it is bound to, or resolves, tells
//! whose it is: an address of a device of the kernel is the kernel's, and so is a destination that is reached by
//! one; all others are ours. An id that is bound to no address in particular stays two, which both listen. An id that
//! the kernel makes for a request has a number that the router gives to none.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use verbs_abi::proto::cm::{Address, CmAnswer, Command, EventKind};

use super::decode::What;
use super::kernel::Kernel;
use crate::abi::edge::Errno;

/// The numbers of the ids that the kernel made alone. The router's begin at the lowest, and librdmacm has a table of these
/// many (`IDX_MAX_INDEX`).
const NUMBERS: std::ops::Range<u32> = 1 << 15..1 << 16;
/// In the numbers of the kernel's memberships, which are in no table.
const MEMBERSHIP: u32 = 1 << 31;
/// How often a port is looked for that is free on both sides.
const ATTEMPTS: u32 = 16;
/// Offsets in `struct rdma_ucm_event_resp`.
const EVENT_ID: usize = 8;
const EVENT_KIND: usize = 12;

/// What a channel has where the process has devices of the kernel as well.
#[derive(Debug)]
pub(super) struct Sides {
    /// To which the router adds one for each event; it does not block.
    pub(super) counter: OwnedFd,
    pub(super) kernel: Kernel,
    /// Whose event is looked for first, in turn.
    turn: AtomicBool,
}

impl Sides {
    pub(super) fn new(counter: OwnedFd, kernel: Kernel) -> Sides {
        Sides { counter, kernel, turn: AtomicBool::new(false) }
    }

    /// A descriptor that is ready when there may be an event, on either side.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, Errno> {
        use rustix::event::epoll::{CreateFlags, EventData, EventFlags, add, create};
        let both = create(CreateFlags::CLOEXEC)?;
        for side in [self.counter.as_fd(), self.kernel.as_fd()] {
            add(&both, side, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(both)
    }

    /// Whether the kernel is asked first this time.
    pub(super) fn kernel_first(&self) -> bool {
        self.turn.fetch_xor(true, Ordering::Relaxed)
    }
}

/// An id of the kernel's.
#[derive(Debug, Clone)]
struct Twin {
    kernel: u32,
    /// The event channel that it is on.
    channel: RawFd,
    /// Whether the router knows it as well.
    twin: bool,
    /// Whether it is the kernel's alone by now.
    alone: bool,
    /// Whether it is bound, to no address in particular.
    bound: bool,
    uid: u64,
    space: u16,
    qp_type: u8,
    /// Level, name and value of the options that it got.
    options: Vec<(u32, u32, Vec<u8>)>,
}

/// How a command was executed.
#[derive(Debug)]
pub(super) enum Done {
    /// By the kernel, which has stored the reply.
    Stored,
    /// With an answer to store.
    Answered(CmAnswer),
    /// Not yet: it is ours alone.
    Ours(What),
}

/// The ids that the kernel has, by their numbers in the program.
#[derive(Debug, Default)]
pub(super) struct Book(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    twins: HashMap<u32, Twin>,
    /// The numbers in the program, by those of the kernel.
    numbers: HashMap<u32, u32>,
    /// The number that an id of the kernel's own got last.
    last: u32,
}

/// The two sides of the command that is executed.
pub(super) struct Hands<'a> {
    /// The channel that it was written to.
    pub(super) channel: RawFd,
    pub(super) kernel: &'a Kernel,
    /// Executes it as if there were no kernel.
    pub(super) ours: &'a dyn Fn(What) -> Result<CmAnswer, Errno>,
}

impl Hands<'_> {
    fn ask(&self, command: Command) -> Result<CmAnswer, Errno> {
        (self.ours)(What::Ask(command))
    }
}

impl Book {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: u32) -> Option<Twin> {
        self.lock().twins.get(&id).cloned()
    }

    fn enter(&self, id: u32, twin: Twin) {
        let mut entries = self.lock();
        entries.numbers.insert(twin.kernel, id);
        entries.twins.insert(id, twin);
    }

    /// Enters an id that has no number yet.
    fn enter_new(&self, twin: Twin) -> u32 {
        let mut entries = self.lock();
        let Entries { twins, numbers, last } = &mut *entries;
        let next = |number: u32| if number + 1 < NUMBERS.end { number + 1 } else { NUMBERS.start };
        *last = next((*last).max(NUMBERS.start));
        // librdmacm itself has no place for more.
        for _ in NUMBERS {
            if !twins.contains_key(last) {
                break;
            }
            *last = next(*last);
        }
        numbers.insert(twin.kernel, *last);
        twins.insert(*last, twin);
        *last
    }

    fn update(&self, id: u32, change: impl FnOnce(&mut Twin)) {
        self.lock().twins.get_mut(&id).map(change);
    }

    /// Ends the kernel's part of an id. Forgotten first: the kernel may use its number again at once.
    fn end(&self, kernel: &Kernel, id: u32) -> Result<u32, Errno> {
        let ended = {
            let mut entries = self.lock();
            let twin = entries.twins.remove(&id);
            twin.inspect(|twin| {
                entries.numbers.remove(&twin.kernel);
            })
        };
        ended.map_or(Ok(0), |twin| kernel.destroy(twin.kernel))
    }

    /// Forgets the ids on a channel that is about to be closed; the kernel ends them with its own channel.
    pub(super) fn forget(&self, channel: RawFd) {
        let Entries { twins, numbers, .. } = &mut *self.lock();
        twins.retain(|_, twin| twin.channel != channel);
        numbers.retain(|_, id| twins.contains_key(id));
    }

    /// Executes a command, given as it was written, too.
    ///
    /// # Safety
    /// The addresses in it must be those of its reply and of its option, and `response` that of its reply.
    pub(super) unsafe fn execute(
        &self,
        hands: &Hands<'_>,
        written: &[u8],
        what: What,
        response: u64,
    ) -> Result<Done, Errno> {
        let id = match &what {
            What::Ask(Command::CreateId { uid, space, qp_type }) => {
                let (uid, space, qp_type) = (*uid, *space, *qp_type);
                return self.create(hands, what, uid, space, qp_type).map(Done::Answered);
            }
            What::Ask(Command::LeaveMulticast { id }) if id & MEMBERSHIP != 0 => {
                // SAFETY: the caller's promise.
                unsafe { hands.kernel.write_for(id & !MEMBERSHIP, written)? };
                return Ok(Done::Stored);
            }
            What::SetOption { id, .. } => Some(*id),
            What::Ask(command) => command.id(),
            _ => None,
        };
        let Some((id, twin)) = id.and_then(|id| Some((id, self.find(id)?))) else {
            return Ok(Done::Ours(what));
        };
        match what {
            What::Ask(Command::DestroyId { id }) => self.destroy(hands, id, twin.twin).map(Done::Answered),
            // SAFETY: the caller's promise.
            _ if twin.alone => unsafe { kernels(hands.kernel, &twin, written, &what, response) },
            What::Ask(Command::Bind { address, .. }) => self.bind(hands, id, &twin, address),
            What::Ask(Command::ResolveAddr { source, destination, .. }) => {
                if !is_of_the_kernel(hands.kernel, &twin, source, destination) {
                    let answer = (hands.ours)(what)?;
                    // What the kernel says of an id that it was never told about does not matter.
                    let _ = self.end(hands.kernel, id);
                    return Ok(Done::Answered(answer));
                }
                // SAFETY: the caller's promise.
                unsafe { hands.kernel.write_for(twin.kernel, written)? };
                self.update(id, |twin| twin.alone = true);
                Ok(Done::Stored)
            }
            What::Ask(Command::Listen { backlog, .. }) => {
                if !twin.bound {
                    self.bind_to_any(hands, id, (Ipv4Addr::UNSPECIFIED, 0).into())?;
                }
                let kernel = self.find(id).map(|twin| hands.kernel.listen(twin.kernel, backlog));
                kernel.transpose()?;
                hands.ask(Command::Listen { id, backlog }).map(Done::Answered)
            }
            What::SetOption { level, name, value, len, .. } => {
                let answer = (hands.ours)(what)?;
                // SAFETY: the caller's promise; our side has just read it.
                let bytes = unsafe { std::slice::from_raw_parts(value as *const u8, len as usize) };
                self.update(id, |twin| twin.options.push((level, name, bytes.to_vec())));
                // SAFETY: as above. An option that the kernel lacks is no reason to refuse it.
                let _ = unsafe { hands.kernel.write_for(twin.kernel, written) };
                Ok(Done::Answered(answer))
            }
            what => Ok(Done::Ours(what)),
        }
    }

    fn create(
        &self,
        hands: &Hands<'_>,
        what: What,
        uid: u64,
        space: u16,
        qp_type: u8,
    ) -> Result<CmAnswer, Errno> {
        let answer = (hands.ours)(what)?;
        if let CmAnswer::Id(id) = answer
            // A port space that the kernel does not know has no ids there.
            && let Ok(kernel) = hands.kernel.create(uid, space, qp_type)
        {
            let channel = hands.channel;
            let options = Vec::new();
            self.enter(
                id,
                Twin {
                    kernel,
                    channel,
                    twin: true,
                    alone: false,
                    bound: false,
                    uid,
                    space,
                    qp_type,
                    options,
                },
            );
        }
        Ok(answer)
    }

    fn destroy(&self, hands: &Hands<'_>, id: u32, twin: bool) -> Result<CmAnswer, Errno> {
        let events = self.end(hands.kernel, id)?;
        if !twin {
            return Ok(CmAnswer::Reported { events, revoked: 0 });
        }
        match hands.ask(Command::DestroyId { id })? {
            CmAnswer::Reported { events: ours, revoked } => {
                Ok(CmAnswer::Reported { events: events + ours, revoked })
            }
            answer => Ok(answer),
        }
    }

    fn bind(&self, hands: &Hands<'_>, id: u32, twin: &Twin, address: Address) -> Result<Done, Errno> {
        match address {
            Address::Ip(ip) if ip.ip().is_unspecified() => {
                self.bind_to_any(hands, id, ip)?;
                return Ok(Done::Answered(CmAnswer::Done));
            }
            Address::Ib(ib) if ib.gid == [0; 16] => {
                hands.kernel.bind(twin.kernel, address)?;
                self.update(id, |twin| twin.bound = true);
                return hands.ask(Command::Bind { id, address }).map(Done::Answered);
            }
            _ => {}
        }
        match hands.kernel.bind(twin.kernel, address) {
            Ok(()) => {
                self.update(id, |twin| twin.alone = true);
                Ok(Done::Answered(CmAnswer::Done))
            }
            Err(Errno::NODEV | Errno::ADDRNOTAVAIL) => {
                let answer = hands.ask(Command::Bind { id, address })?;
                let _ = self.end(hands.kernel, id);
                Ok(Done::Answered(answer))
            }
            Err(error) => Err(error),
        }
    }

    /// Binds both to all addresses, with one port.
    fn bind_to_any(&self, hands: &Hands<'_>, id: u32, address: SocketAddr) -> Result<(), Errno> {
        for _ in 0..ATTEMPTS {
            let twin = self.find(id).ok_or(Errno::INVAL)?;
            hands.kernel.bind(twin.kernel, Address::Ip(address))?;
            let mut whole = address;
            if whole.port() == 0 {
                whole.set_port(hands.kernel.port(twin.kernel)?);
            }
            match hands.ask(Command::Bind { id, address: Address::Ip(whole) }) {
                Ok(_) => {
                    self.update(id, |twin| twin.bound = true);
                    return Ok(());
                }
                Err(error) => {
                    self.renew(hands.kernel, id, twin)?;
                    if error != Errno::ADDRINUSE || address.port() != 0 {
                        return Err(error);
                    }
                }
            }
        }
        Err(Errno::ADDRINUSE)
    }

    /// Puts a new id in the place of one that is bound to what it cannot keep.
    fn renew(&self, kernel: &Kernel, id: u32, mut twin: Twin) -> Result<(), Errno> {
        self.end(kernel, id)?;
        twin.kernel = kernel.create(twin.uid, twin.space, twin.qp_type)?;
        for (level, name, value) in &twin.options {
            // As it was set before: what the kernel does not know does not matter.
            let _ = kernel.set_option(twin.kernel, *level, *name, value);
        }
        self.enter(id, twin);
        Ok(())
    }

    /// Moves the kernel's part of an id to a channel from another. How many of its events were handed out, and whether
    /// the router knows it as well.
    pub(super) fn migrate(
        &self,
        id: u32,
        channel: RawFd,
        to: &Kernel,
        from: &Kernel,
    ) -> Result<(u32, bool), Errno> {
        let Some(twin) = self.find(id) else { return Ok((0, true)) };
        let events = to.migrate(twin.kernel, from)?;
        self.update(id, |twin| twin.channel = channel);
        Ok((events, twin.twin))
    }

    /// Gives an event that the kernel has stored the number that its id has in the program.
    ///
    /// # Safety
    /// `response` must be the address of the event.
    pub(super) unsafe fn name(&self, channel: RawFd, response: u64) {
        let at = |offset: usize| (response as *mut u8).wrapping_add(offset).cast::<u32>();
        // SAFETY: the caller's promise.
        let (id, kind) = unsafe { (at(EVENT_ID).read_unaligned(), at(EVENT_KIND).read_unaligned()) };
        if kind == EventKind::MulticastJoin as u32 || kind == EventKind::MulticastError as u32 {
            // The number of a membership.
            // SAFETY: the caller's promise.
            unsafe { at(EVENT_ID).write_unaligned(id | MEMBERSHIP) };
            return;
        }
        let known = self.lock().numbers.get(&id).copied();
        let number = known.unwrap_or_else(|| {
            // A request for a connection: the kernel has made an id.
            let twin = Twin {
                kernel: id,
                channel,
                twin: false,
                alone: true,
                bound: true,
                uid: 0,
                space: 0,
                qp_type: 0,
                options: Vec::new(),
            };
            self.enter_new(twin)
        });
        // SAFETY: the caller's promise.
        unsafe { at(EVENT_ID).write_unaligned(number) };
    }
}

/// Executes a command about an id that is the kernel's alone.
///
/// # Safety
/// As for [`Book::execute`].
unsafe fn kernels(
    kernel: &Kernel,
    twin: &Twin,
    written: &[u8],
    what: &What,
    response: u64,
) -> Result<Done, Errno> {
    // SAFETY: the caller's promise.
    unsafe { kernel.write_for(twin.kernel, written)? };
    if let What::Ask(Command::JoinMulticast { .. }) = what {
        let number = response as *mut u32;
        // SAFETY: the caller's promise; the kernel has just stored it.
        unsafe { number.write_unaligned(number.read_unaligned() | MEMBERSHIP) };
    }
    Ok(Done::Stored)
}

/// Whether a destination is reached by a device of the kernel: by its own address, since that is whose it is.
fn is_of_the_kernel(kernel: &Kernel, twin: &Twin, source: Option<Address>, destination: Address) -> bool {
    let named = source.filter(|source| match source {
        Address::Ip(ip) => !ip.ip().is_unspecified(),
        Address::Ib(ib) => ib.gid != [0; 16],
    });
    let own = match (named, destination) {
        (Some(own), _) => own,
        (None, Address::Ip(destination)) => match own_address(destination) {
            Some(own) => Address::Ip(own),
            None => return false,
        },
        (None, Address::Ib(_)) => return true,
    };
    let own = match own {
        Address::Ip(mut own) => {
            own.set_port(0);
            Address::Ip(own)
        }
        own => own,
    };
    // The kernel binds an id to an address of its devices alone.
    let Ok(id) = kernel.create(0, twin.space, twin.qp_type) else { return false };
    let bound = kernel.bind(id, own).is_ok();
    let _ = kernel.destroy(id);
    bound
}

/// The own address by which the way to a destination leads. Nothing is sent.
fn own_address(destination: SocketAddr) -> Option<SocketAddr> {
    let any: SocketAddr = match destination {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(destination).ok()?;
    socket.local_addr().ok()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::ucma::decode::decode;

    /// A command as librdmacm writes it.
    fn written(number: u32, body: &[u8]) -> Vec<u8> {
        let header = [&number.to_ne_bytes()[..], &(body.len() as u16).to_ne_bytes(), &0_u16.to_ne_bytes()];
        [&header.concat(), body].concat()
    }

    /// The numbers of the commands that a file in the place of the kernel has got; it grants everything and says zeros.
    fn told(kernel: &Kernel) -> Vec<u32> {
        let mut bytes = vec![0; 1 << 16];
        let len = rustix::io::pread(kernel, &mut bytes, 0).unwrap();
        let (mut at, mut numbers) = (0, Vec::new());
        while at < len {
            let field = |from: usize, len: usize| bytes[from..from + len].to_vec();
            numbers.push(u32::from_ne_bytes(field(at, 4).try_into().unwrap()));
            at += 8 + usize::from(u16::from_ne_bytes(field(at + 4, 2).try_into().unwrap()));
        }
        numbers
    }

    struct Bench {
        book: Book,
        kernel: Kernel,
        ours: RefCell<Vec<What>>,
    }

    impl Bench {
        /// A program with an id, which is 5 here and 0 in the kernel.
        fn new() -> Bench {
            let file = rustix::fs::memfd_create(c"kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let bench = Bench { book: Book::default(), kernel: Kernel::over(file), ours: RefCell::default() };
            bench.execute(0, &[&[0; 16][..], &0x106_u16.to_ne_bytes(), &[2, 0, 0, 0, 0, 0]].concat());
            bench
        }

        fn execute(&self, number: u32, body: &[u8]) -> Done {
            let command = written(number, body);
            let what = decode(&command).unwrap().what;
            let ours = |what: What| {
                let answer = match what {
                    What::Ask(Command::CreateId { .. }) => CmAnswer::Id(5),
                    What::Ask(Command::DestroyId { .. }) => CmAnswer::Reported { events: 3, revoked: 0 },
                    _ => CmAnswer::Done,
                };
                self.ours.borrow_mut().push(what);
                Ok(answer)
            };
            let hands = Hands { channel: 9, kernel: &self.kernel, ours: &ours };
            // SAFETY: a kernel that is a file stores nothing, and no option is set.
            unsafe { self.book.execute(&hands, &command, what, 0) }.unwrap()
        }

        fn bind(&self, address: [u8; 4], port: u16) -> Done {
            let mut body = vec![0; 136];
            body[..4].copy_from_slice(&5_u32.to_ne_bytes());
            body[4] = 16;
            body[8] = 2;
            body[10..12].copy_from_slice(&port.to_be_bytes());
            body[12..16].copy_from_slice(&address);
            self.execute(20, &body)
        }

        fn listen(&self) -> Done {
            self.execute(7, &[5_u32.to_ne_bytes(), 4_u32.to_ne_bytes()].concat())
        }

        fn destroy(&self) -> Done {
            self.execute(1, &[&[0; 8][..], &5_u32.to_ne_bytes(), &[0; 4]].concat())
        }
    }

    #[test]
    fn who_is_bound_to_no_address_listens_on_both_sides() {
        let bench = Bench::new();
        assert!(matches!(bench.bind([0; 4], 7000), Done::Answered(CmAnswer::Done)));
        assert!(matches!(bench.listen(), Done::Answered(CmAnswer::Done)));
        assert!(matches!(bench.destroy(), Done::Answered(CmAnswer::Reported { events: 3, .. })));
        assert_eq!(told(&bench.kernel), [0, 20, 7, 1]);
        let ours = bench.ours.borrow();
        let any = SocketAddr::from(([0, 0, 0, 0], 7000));
        assert_eq!(ours[1], What::Ask(Command::Bind { id: 5, address: Address::Ip(any) }));
        assert_eq!(ours[2], What::Ask(Command::Listen { id: 5, backlog: 4 }));
        assert_eq!(ours[3], What::Ask(Command::DestroyId { id: 5 }));
    }

    #[test]
    fn who_is_bound_to_an_address_of_a_device_of_the_kernel_is_the_kernels_alone() {
        let bench = Bench::new();
        assert!(matches!(bench.bind([10, 9, 0, 1], 7000), Done::Answered(CmAnswer::Done)));
        assert!(matches!(bench.listen(), Done::Stored));
        assert_eq!(bench.ours.borrow().len(), 1, "more than the id was made here");
        bench.destroy();
        assert_eq!(told(&bench.kernel), [0, 20, 7, 1]);
        // Its number means nothing in the kernel any more.
        assert!(matches!(bench.listen(), Done::Ours(_)));
    }

    #[test]
    fn an_id_that_the_kernel_makes_has_a_number_of_its_own_and_keeps_it() {
        let bench = Bench::new();
        let mut event = [0_u8; 336];
        event[EVENT_ID] = 3;
        let response = event.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the address of an event.
        unsafe { bench.book.name(9, response) };
        let number = u32::from_ne_bytes(event[EVENT_ID..EVENT_ID + 4].try_into().unwrap());
        assert!(NUMBERS.contains(&number), "{number}");
        let listen = [number.to_ne_bytes(), 1_u32.to_ne_bytes()].concat();
        assert!(matches!(bench.execute(7, &listen), Done::Stored));
        // An event of the id that was made twice has the number that the program knows.
        event[EVENT_ID..EVENT_ID + 4].copy_from_slice(&0_u32.to_ne_bytes());
        // SAFETY: as above.
        unsafe { bench.book.name(9, response) };
        assert_eq!(event[EVENT_ID..EVENT_ID + 4], 5_u32.to_ne_bytes());
        bench.book.forget(9);
        assert!(matches!(bench.execute(7, &listen), Done::Ours(_)));
    }
}
