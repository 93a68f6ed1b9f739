//! Who is at the other end of a connection, from the kernel: a client proves nothing by what it says.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use verbs_abi::proto::Gid;

use crate::{addresses, descriptor};

/// Socket option that gives a pidfd of the peer (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;

/// Threads of a process that are looked at.
const MAX_THREADS: usize = 4096;

/// A network namespace, as one client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// By the file that stands for it.
    Known {
        /// Device of that file.
        device: u64,
        /// Its number there.
        inode: u64,
    },
    /// It cannot be seen from here, so it counts as the client's own.
    Unknown {
        /// The client.
        client: u32,
    },
}

/// The process at the other end.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Process id as seen from here; 0 when it lives in a PID namespace that cannot be seen from here.
    pub(crate) pid: u32,
    /// Effective user when it connected.
    pub(crate) uid: u32,
    pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Asks the kernel about a connected socket.
    ///
    /// # Errors
    /// `ESRCH` when the process is gone already.
    pub(crate) fn of(socket: &impl AsFd) -> io::Result<Self> {
        let socket = socket.as_fd().as_raw_fd();
        let credentials: libc::ucred =
            option(socket, libc::SO_PEERCRED, libc::ucred { pid: 0, uid: 0, gid: 0 })?;
        let pid = credentials.pid.cast_unsigned();
        let pidfd = match (option(socket, SO_PEERPIDFD, -1), Pid::from_raw(credentials.pid)) {
            // SAFETY: the kernel made this descriptor for us just now and nobody else knows it.
            (Ok(fd), _) => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            (Err(_), Some(pid)) => Some(pidfd_open(pid, PidfdFlags::empty())?),
            (Err(_), None) => None,
        };
        Ok(Self { pid, uid: credentials.uid, pidfd })
    }

    /// Becomes readable when the process ends.
    pub(crate) fn pidfd(&self) -> Option<&OwnedFd> {
        self.pidfd.as_ref()
    }

    /// Whether the process lives, as far as can be told.
    pub(crate) fn is_alive(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&at_once)) {
                Err(Errno::INTR) => {}
                ended => return ended != Ok(1),
            }
        }
    }

    /// Whether some thread of the process runs, waits for a processor or for a page: it makes progress, however
    /// slowly. One that is stopped, frozen or asleep does not. False when it cannot be seen.
    pub(crate) fn is_at_work(&self) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        threads.flatten().take(MAX_THREADS).any(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The name before it may hold anything.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            matches!(state, Some('R' | 'D'))
        })
    }

    /// The process's name; empty when it cannot be seen.
    pub(crate) fn command(&self) -> String {
        let text = fs::read_to_string(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        text.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    }

    /// Its memory: by the descriptor it offered, which proves that it may, else opened here. Held open, so that it
    /// stays this program's memory whatever the process executes next.
    pub(crate) fn memory(&self, offered: Option<OwnedFd>) -> Option<File> {
        offered.and_then(descriptor::process_memory).or_else(|| self.open_memory())
    }

    /// Opens the memory with this router's rights, which may be greater than the peer's. So what was opened must
    /// still be the peer's afterwards: the process may have executed a set-uid program in the meantime (whose
    /// memory belongs to root), or have ended and left its number to another.
    fn open_memory(&self) -> Option<File> {
        if self.pid == 0 || self.pidfd.is_none() {
            return None;
        }
        let path = format!("/proc/{}/mem", self.pid);
        let file = File::options().read(true).write(true).open(&path).ok()?;
        let owner = fs::metadata(&path).ok()?.uid();
        (owner == self.uid && self.is_alive()).then_some(file)
    }

    /// Its addresses now, and the network namespace whose they are. None where it changes its namespace at this
    /// moment, or has ended.
    pub(crate) fn gids(&self, client: u32) -> Option<(Vec<Gid>, Namespace)> {
        let before = self.namespace(client);
        let gids = addresses::of(self.pid);
        (before == self.namespace(client) && self.is_alive()).then_some((gids, before))
    }

    fn namespace(&self, client: u32) -> Namespace {
        match fs::metadata(format!("/proc/{}/ns/net", self.pid)) {
            Ok(file) if self.pid != 0 => Namespace::Known { device: file.dev(), inode: file.ino() },
            _ => Namespace::Unknown { client },
        }
    }
}

/// Reads a socket option of a plain type.
fn option<T: Copy>(socket: libc::c_int, name: libc::c_int, mut value: T) -> io::Result<T> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // Raw, because the typed wrapper has no room for pid 0 ("not visible from here").
    // SAFETY: the kernel writes at most `length` bytes, the size of the live local; any bytes are a valid `T`
    // for the two plain C types that the callers in this file use.
    let result =
        unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn the_peer_is_who_the_kernel_says() {
        let (ours, _theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(peer.is_alive());
        assert!(!peer.command().is_empty());
        assert!(peer.memory(None).is_some());
        let (gids, namespace) = peer.gids(1).unwrap();
        assert!(!gids.is_empty() && matches!(namespace, Namespace::Known { .. }));
        assert_eq!(peer.gids(2).unwrap().1, namespace);
    }

    #[test]
    fn a_stopped_process_is_not_at_work() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let peer = Peer { pid: child.id(), uid: 0, pidfd: None };
        let reaches = |expected: bool| {
            (0..500).any(|_| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                peer.is_at_work() == expected
            })
        };
        assert!(reaches(true));
        rustix::process::kill_process(Pid::from_child(&child), rustix::process::Signal::STOP).unwrap();
        assert!(reaches(false));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!peer.is_at_work());
    }

    #[test]
    fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let peer = Peer { pid: child.id(), uid: 0, pidfd: Some(pidfd) };
        child.wait().unwrap();
        assert!(!peer.is_alive());
        assert!(peer.gids(1).is_none());
        assert!(peer.memory(None).is_none());
    }
}
