//! The signals that the daemon obeys, as a descriptor.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// SIGTERM or SIGINT: the end.
    End,
    /// SIGHUP: a look at the configuration.
    Reload,
}

/// SIGTERM, SIGINT and SIGHUP, kept from this thread and the threads it starts from now on.
#[derive(Debug)]
pub(crate) struct Signals {
    file: OwnedFd,
    previous: libc::sigset_t,
}

impl Signals {
    /// Blocks the signals; the descriptor becomes readable when one comes.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        let mut previous = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the pointers are to live locals, the set is initialised by sigemptyset before any other use, and
        // `previous` is written by pthread_sigmask, which cannot fail with a valid `how`.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGHUP);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), previous.as_mut_ptr());
        }
        // SAFETY: `set` is initialised above.
        let file = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd made this descriptor for us just now; `previous` is initialised above.
        Ok(unsafe { Self { file: OwnedFd::from_raw_fd(file), previous: previous.assume_init() } })
    }

    /// Takes a signal, so that it does not strike when the mask is put back. `None`: there is none.
    pub(crate) fn take(&self) -> Option<Wish> {
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        let len = rustix::io::read(&self.file, &mut record).ok()?;
        // Its number comes first.
        let number = record[..len].first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))?;
        Some(if number == libc::SIGHUP as u32 { Wish::Reload } else { Wish::End })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `previous` is the mask that pthread_sigmask gave out.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.previous, std::ptr::null_mut()) };
    }
}
