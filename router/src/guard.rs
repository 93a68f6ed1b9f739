//! Memory shared with clients whose faults end the client, not the router.
//!
//! The size of what is shared is sealed, so nobody can cut it short; but a page may still be one that the kernel cannot
//! give when it is touched (what may be committed is used up; a client chooses the moment by punching holes) or cannot
//! give back (its swap, or the memory itself, is broken). Whoever touches it gets SIGBUS.
//!
//! ```text
//!   lane --touches--> window of client A --SIGBUS--> handler: A is spoilt, zeros in the window's place --> daemon
//!     |                                                                                                      |
//!     +-- goes on, finds A spoilt, ends the request with an error             A is dropped <-----------------+
//! ```
//!
//! A fault anywhere else ends the process, as ever.

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence},
    },
};

use parking_lot::Mutex;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use verbs_abi::shm::Window;

/// Places for windows that are allocated at a time.
const PLACES: usize = 256;

/// Whether memory that a client shares with the router still holds what was put into it.
#[derive(Debug, Default)]
pub(crate) struct Health {
    spoilt: AtomicBool,
    /// Counts up when it is spoilt.
    bell: Option<Arc<OwnedFd>>,
}

impl Health {
    /// Good health; the eventfd hears of its end.
    pub(crate) fn new(bell: &Arc<OwnedFd>) -> Self {
        Self { spoilt: AtomicBool::new(false), bell: Some(Arc::clone(bell)) }
    }

    /// Whether some of the memory is gone. Ask after reading it, and throw away what was read.
    #[inline]
    pub(crate) fn is_spoilt(&self) -> bool {
        // The handler runs in the middle of a copy, of this thread or another: the question must stay behind it.
        fence(Ordering::Acquire);
        self.spoilt.load(Ordering::Acquire)
    }

    /// Called by the handler: nothing but atomics and one system call.
    fn spoil(&self) {
        if !self.spoilt.swap(true, Ordering::SeqCst)
            && let Some(bell) = &self.bell
        {
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }
}

/// Where a guarded window is noted. Written by who has it from [`FREE`], read by the handler.
#[derive(Debug)]
struct Place {
    /// First address; 0 when nobody uses the place.
    start: AtomicUsize,
    len: AtomicUsize,
    health: AtomicPtr<Health>,
}

impl Place {
    const fn new() -> Self {
        Self { start: AtomicUsize::new(0), len: AtomicUsize::new(0), health: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Start and length, if the address lies in this window. While a thread faults in a window, its place stays
    /// as it is; others may change, which the second look finds.
    fn covers(&self, address: usize) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::SeqCst);
        let len = self.len.load(Ordering::SeqCst);
        let is_whole = start != 0 && self.start.load(Ordering::SeqCst) == start;
        (is_whole && address.checked_sub(start)? < len).then_some((start, len))
    }
}

/// Places, and where there are more: never freed, since a handler may be looking.
#[derive(Debug)]
struct Block {
    places: [Place; PLACES],
    next: OnceLock<Box<Block>>,
}

impl Block {
    const fn new() -> Self {
        Self { places: [const { Place::new() }; PLACES], next: OnceLock::new() }
    }
}

static FIRST: Block = Block::new();
/// Places that nobody uses; none were ever asked for at first.
static FREE: Mutex<Option<Vec<&'static Place>>> = Mutex::new(None);

/// A guarded window's note, which goes before its memory does.
#[derive(Debug)]
struct Note {
    place: &'static Place,
    _health: Arc<Health>,
}

impl Drop for Note {
    fn drop(&mut self) {
        self.place.start.store(0, Ordering::SeqCst);
        FREE.lock().get_or_insert_default().push(self.place);
    }
}

/// The same window; a fault in it spoils `health` and finds zeros.
pub(crate) fn guarded(window: Window, health: &Arc<Health>) -> Window {
    let place = free_place();
    place.len.store(window.len(), Ordering::SeqCst);
    place.health.store(Arc::as_ptr(health).cast_mut(), Ordering::SeqCst);
    place.start.store(window.as_ptr().addr(), Ordering::SeqCst);
    window.attended(Box::new(Note { place, _health: Arc::clone(health) }))
}

fn free_place() -> &'static Place {
    let mut free = FREE.lock();
    let is_first = free.is_none();
    let free = free.get_or_insert_default();
    if let Some(place) = free.pop() {
        return place;
    }
    let mut block = &FIRST;
    if !is_first {
        while let Some(next) = block.next.get() {
            block = next;
        }
        // Nobody else adds one meanwhile: the lock is held.
        block = block.next.get_or_init(|| Box::new(Block::new()));
    }
    let [first, others @ ..] = &block.places;
    free.extend(others);
    first
}

/// Takes SIGBUS from now on.
pub(crate) fn install() {
    act(on_fault as *const () as usize);
}

fn act(handler: libc::sighandler_t) {
    // SAFETY: all zeros is a valid action, with nothing blocked. The handler is the default one, or keeps to what a
    // handler may do and gets the record that SA_SIGINFO promises.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
    }
}

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid record, and the address is part of it when the kernel itself sent the signal.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    let is_fault = code > 0;
    if is_fault && absorb(address) {
        return;
    }
    // The access is repeated, and ends the process this time.
    act(libc::SIG_DFL);
    if !is_fault {
        // SAFETY: sends the signal once more; it comes when this handler has returned.
        unsafe { libc::raise(signal) };
    }
}

/// Puts zeros in the place of the guarded window at an address. False: there is none, or no zeros are to be had.
fn absorb(address: usize) -> bool {
    let mut block = Some(&FIRST);
    while let Some(Block { places, next }) = block {
        for place in places {
            if let Some((start, len)) = place.covers(address) {
                // SAFETY: the window is in use by this very thread, so its note lives, and with it its health.
                let health = unsafe { &*place.health.load(Ordering::SeqCst) };
                // First, so that nobody finds the zeros but not this.
                health.spoil();
                return replace(start, len);
            }
        }
        block = next.get().map(|next| &**next);
    }
    false
}

/// All of the window at once: a page at a time would let a client use up the mappings that a process may have.
fn replace(start: usize, len: usize) -> bool {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: exactly the mapping of a live window, which hands out atomics and raw pointers only, so its content may
    // change at any time; it is unmapped as any other when the window goes.
    let mapped = unsafe {
        let place = ptr::with_exposed_provenance_mut(start);
        mmap_anonymous(place, len, ProtFlags::READ | ProtFlags::WRITE, flags)
    };
    mapped.is_ok()
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::{Command, Stdio},
        thread,
    };

    use rustix::{
        event::{EventfdFlags, eventfd},
        fs::{MemfdFlags, ftruncate, memfd_create},
    };

    use super::*;

    const LEN: usize = 1 << 20;

    fn file() -> OwnedFd {
        let file = memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LEN as u64).unwrap();
        file
    }

    fn window(file: &OwnedFd) -> Window {
        Window::map(file, 0, LEN, true).unwrap()
    }

    #[test]
    fn a_file_that_is_cut_short_spoils_its_owner_alone() {
        install();
        let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let (health, other) = (Arc::new(Health::new(&bell)), Arc::new(Health::new(&bell)));
        let (file, whole) = (file(), file());
        let (sut, neighbour) = (guarded(window(&file), &health), guarded(window(&whole), &other));
        sut.u64(8192).store(7, Ordering::Relaxed);
        neighbour.u64(8192).store(8, Ordering::Relaxed);
        ftruncate(&file, 0).unwrap();
        assert!(!health.is_spoilt());
        assert_eq!(sut.u64(8192).load(Ordering::Relaxed), 0);
        assert!(health.is_spoilt());
        // Whatever is done with it from now on.
        sut.clear();
        sut.u64(0).store(5, Ordering::Relaxed);
        assert_eq!(sut.u64(0).load(Ordering::Relaxed), 5);
        assert!(!other.is_spoilt());
        assert_eq!(neighbour.u64(8192).load(Ordering::Relaxed), 8);
        let mut rung = [0; 8];
        assert_eq!(rustix::io::read(&bell, &mut rung), Ok(8));
        assert_eq!(u64::from_ne_bytes(rung), 1);
    }

    #[test]
    fn any_number_of_windows_is_guarded_in_any_number_of_threads() {
        install();
        let fail_all = || {
            let windows: Vec<_> = (0..PLACES * 2)
                .map(|_| (file(), Arc::<Health>::default()))
                .map(|(file, health)| (guarded(window(&file), &health), file, health))
                .collect();
            for (window, file, health) in windows.iter().rev() {
                ftruncate(file, 0).unwrap();
                assert_eq!(window.u64(LEN - 8).load(Ordering::Relaxed), 0);
                assert!(health.is_spoilt());
            }
        };
        thread::scope(|scope| {
            (0..3).for_each(|_| drop(scope.spawn(|| (0..3).for_each(|_| fail_all()))));
        });
    }

    /// What must end a process, tried in one of its own: this test, told so by a variable.
    #[test]
    fn a_fault_elsewhere_and_a_signal_that_was_sent_end_the_process() {
        const VARIABLE: &str = "FREEFLOW_TEST_FAULT";
        const NAME: &str = "guard::tests::a_fault_elsewhere_and_a_signal_that_was_sent_end_the_process";
        if let Ok(how) = std::env::var(VARIABLE) {
            install();
            let (file, health) = (file(), Arc::<Health>::default());
            match how.as_str() {
                "unguarded" => {
                    drop(guarded(window(&file), &health));
                    let window = window(&file);
                    ftruncate(&file, 0).unwrap();
                    window.u64(0).store(1, Ordering::Relaxed);
                }
                // SAFETY: sends a signal to this thread.
                _ => drop(unsafe { libc::raise(libc::SIGBUS) }),
            }
            return;
        }
        for how in ["unguarded", "sent"] {
            let mut again = Command::new(std::env::current_exe().unwrap());
            again.args(["--exact", NAME]).env(VARIABLE, how).stdout(Stdio::null()).stderr(Stdio::null());
            assert_eq!(again.status().unwrap().signal(), Some(libc::SIGBUS), "{how}");
        }
    }
}
