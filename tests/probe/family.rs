//! Child processes, and what they say to each other.
//!
//! Only a process with one thread and no opened device may fork such children.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Result, bail, ensure};

use crate::{pair::Address, verbs};

/// How the ends find each other, as it crosses a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Card {
    pub(crate) gid: [u8; 16],
    pub(crate) qpn: u32,
    pub(crate) rkey: u32,
    pub(crate) addr: u64,
}

impl Card {
    pub(crate) fn address(&self) -> Address {
        Address { gid: self.gid, qpn: self.qpn }
    }
}

/// One end of a socket that keeps messages apart.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

pub(crate) fn socket_pair() -> Result<(Socket, Socket)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let code = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    ensure!(code == 0, "socketpair: {}", io::Error::last_os_error());
    // SAFETY: two new descriptors that nobody else owns.
    Ok(unsafe { (Socket(OwnedFd::from_raw_fd(fds[0])), Socket(OwnedFd::from_raw_fd(fds[1]))) })
}

impl Socket {
    pub(crate) fn send<T: Copy>(&self, value: &T) -> Result<()> {
        // SAFETY: the bytes of a value without padding, alive during the call.
        let sent = unsafe {
            let bytes = (&raw const *value).cast();
            libc::send(self.0.as_raw_fd(), bytes, size_of::<T>(), libc::MSG_NOSIGNAL)
        };
        ensure!(sent == size_of::<T>() as isize, "send: {}", io::Error::last_os_error());
        Ok(())
    }

    /// The next message; nothing where none comes in time. The end of the other side is an error.
    pub(crate) fn receive<T: Copy + Default>(&self, patience: Duration) -> Result<Option<T>> {
        if !verbs::readable(self.0.as_raw_fd(), patience) {
            return Ok(None);
        }
        let mut value = T::default();
        // SAFETY: room for the value, whose every bit pattern is valid: all are numbers.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), (&raw mut value).cast(), size_of::<T>(), 0) };
        if got != size_of::<T>() as isize {
            bail!("the other side is gone ({got})");
        }
        Ok(Some(value))
    }
}

/// A child that does this and exits: 0, or 1 after it said what is wrong.
pub(crate) fn fork_into(work: impl FnOnce() -> Result<()>) -> Result<i32> {
    let parent = std::process::id();
    // SAFETY: this process has one thread and no opened device: the child may go on as it likes.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid > 0 {
        return Ok(pid);
    }
    // SAFETY: plain system calls; nobody is left behind when the parent is killed.
    let orphan = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid() as u32 != parent
    };
    let code = match (orphan, work()) {
        (false, Ok(())) => 0,
        (true, _) => 2,
        (false, Err(error)) => {
            eprintln!("freeflow-probe: {error:#}");
            1
        }
    };
    // SAFETY: ends the child without running the parent's destructors.
    unsafe { libc::_exit(code) }
}

pub(crate) fn kill(pid: i32) {
    // SAFETY: a child that was not waited for, so the number is its.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

pub(crate) fn wait(pid: i32) -> Result<i32> {
    let mut status = 0;
    // SAFETY: a child of ours; the result is ours.
    ensure!(unsafe { libc::waitpid(pid, &mut status, 0) } == pid, "waitpid: {}", io::Error::last_os_error());
    Ok(status)
}
