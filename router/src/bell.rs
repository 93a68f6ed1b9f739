//! Ringing eventfds that clients own.
//!
//! A client can fill the counter of its eventfd, and then write(2) blocks: whoever holds the other end of a
//! descriptor must not be able to stop a lane. Neither a look before the write (the counter can be filled in
//! between) nor O_NONBLOCK (a flag of the shared description, which is the application's) prevents that. The
//! kernel itself adds to an eventfd without ever waiting, when an asynchronous read names it; so a ring is an
//! asynchronous read of nothing.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use engine::Bell;
use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ReadWriteFlags},
};

use crate::descriptor;

/// Rings that may pass before finished reads are taken out of the kernel's list.
const SLOTS: usize = 128;
const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;

/// Rings any number of eventfds, for any thread.
#[derive(Debug)]
pub(crate) struct Ringer {
    /// `None` where the kernel offers no asynchronous reads.
    context: Option<Context>,
}

/// An eventfd of a client, checked to be one.
#[derive(Debug)]
pub(crate) struct EventBell {
    file: OwnedFd,
    ringer: Arc<Ringer>,
}

impl Ringer {
    /// A ringer. Without asynchronous reads it looks before it writes.
    pub(crate) fn new() -> Arc<Self> {
        let context = Context::new();
        if let Err(error) = &context {
            tracing::warn!(%error, "no asynchronous reads; a hostile client may delay others when it is notified");
        }
        Arc::new(Self { context: context.ok() })
    }

    fn ring(&self, file: BorrowedFd<'_>) {
        match &self.context {
            Some(context) => context.ring(file),
            None => ring_after_look(file),
        }
    }
}

impl EventBell {
    /// Takes what a client sent. `None`: not an eventfd.
    pub(crate) fn new(file: OwnedFd, ringer: &Arc<Ringer>) -> Option<Arc<Self>> {
        let known = descriptor::is_eventfd(&file);
        known.then(|| Arc::new(Self { file, ringer: Arc::clone(ringer) }))
    }

    /// Takes up to so many counts of a counter in semaphore mode back, without waiting. How many were there; `None` where
    /// the kernel (before 5.8) cannot do it so.
    pub(crate) fn take_back(&self, counts: u32) -> Option<u32> {
        for taken in 0..counts {
            let mut count = [0; 8];
            let into = &mut [IoSliceMut::new(&mut count)];
            match rustix::io::preadv2(&self.file, into, u64::MAX, ReadWriteFlags::NOWAIT) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Some(taken),
                Err(_) => return None,
            }
        }
        Some(counts)
    }
}

impl Bell for EventBell {
    fn ring(&self) {
        self.ringer.ring(self.file.as_fd());
    }
}

impl AsFd for EventBell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A full counter is a client that does not listen; it loses nothing but the tick.
fn ring_after_look(file: BorrowedFd<'_>) {
    let mut polled = [PollFd::from_borrowed_fd(file, PollFlags::OUT)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::OUT) {
        let _ = rustix::io::write(file, &1u64.to_ne_bytes());
    }
}

/// The kernel's `struct iocb` on little-endian machines.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}
const _: () = assert!(size_of::<Iocb>() == 64 && cfg!(target_endian = "little"));

/// The kernel's `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    words: [u64; 4],
}

/// An asynchronous I/O context and the file of which nothing is read.
#[derive(Debug)]
struct Context {
    id: libc::c_ulong,
    nothing: File,
    /// Held while finished reads are taken out.
    reaper: Mutex<()>,
}

impl Context {
    fn new() -> io::Result<Self> {
        let nothing = File::open("/dev/null")?;
        let mut id: libc::c_ulong = 0;
        // SAFETY: the kernel writes the new context's id into a live local that is zero, as it demands.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, SLOTS, &raw mut id) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let context = Self { id, nothing, reaper: Mutex::new(()) };
        context.prove()?;
        Ok(context)
    }

    /// Rings an eventfd of our own and looks whether it heard.
    fn prove(&self) -> io::Result<()> {
        let own = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
        )?;
        self.ring(own.as_fd());
        let mut count = [0; 8];
        rustix::io::read(&own, &mut count)?;
        Ok(())
    }

    fn ring(&self, file: BorrowedFd<'_>) {
        // The second attempt finds room that the first one lacked.
        for _ in 0..2 {
            if self.submit(file).is_ok() {
                return;
            }
            self.reap();
        }
        ring_after_look(file);
    }

    fn submit(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let mut request = Iocb {
            opcode: IOCB_CMD_PREAD,
            file: self.nothing.as_raw_fd() as u32,
            flags: IOCB_FLAG_RESFD,
            event_file: file.as_raw_fd() as u32,
            ..Iocb::default()
        };
        let mut list = [&raw mut request];
        // SAFETY: the list holds one pointer to a live request, which the kernel copies before it returns; a read
        // of no bytes touches no buffer; both descriptors are open while they are borrowed.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1 as libc::c_long, list.as_mut_ptr()) };
        if submitted == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn reap(&self) {
        let _held = self.reaper.lock();
        let mut events = [IoEvent::default(); SLOTS];
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most `SLOTS` events into a live array of as many; it returns at once.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.id,
                0 as libc::c_long,
                SLOTS as libc::c_long,
                events.as_mut_ptr(),
                &raw const at_once,
            )
        };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: this value made the context and is its only user; reads of nothing are never in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn bell(ringer: &Arc<Ringer>) -> (Arc<EventBell>, OwnedFd) {
        let ours = eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).unwrap();
        let theirs = ours.try_clone().unwrap();
        (EventBell::new(ours, ringer).unwrap(), theirs)
    }

    fn count(file: &OwnedFd) -> u64 {
        let mut counted = 0;
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        while poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&at_once)).unwrap() > 0 {
            rustix::io::read(file, &mut [0; 8]).unwrap();
            counted += 1;
        }
        counted
    }

    #[test]
    fn each_ring_is_one_tick() {
        for ringer in [Ringer::new(), Arc::new(Ringer { context: None })] {
            let (bell, theirs) = bell(&ringer);
            (0..3 * SLOTS).for_each(|_| bell.ring());
            assert_eq!(count(&theirs), 3 * SLOTS as u64);
        }
    }

    #[test]
    fn a_full_counter_stops_nobody() {
        for ringer in [Ringer::new(), Arc::new(Ringer { context: None })] {
            let (bell, theirs) = bell(&ringer);
            rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            (0..10).for_each(|_| bell.ring());
        }
    }

    #[test]
    fn many_threads_ring_at_once() {
        let ringer = Ringer::new();
        let (bell, theirs) = bell(&ringer);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| bell.ring()));
            }
        });
        assert_eq!(count(&theirs), 4000);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let ringer = Ringer::new();
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(EventBell::new(file, &ringer).is_none());
    }
}
