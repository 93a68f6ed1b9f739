//! The right to serve a control socket.
//!
//! Does: one router a socket. A lock file beside the socket decides between routers that start together; what a dead
//! router left behind is replaced, a live one is not. Leaves to others: accepting (the daemon).

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, anyhow};
use router::config::Owner;
use rustix::{
    fs::{FlockOperation, flock},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{
    Failure,
    failure::ROUTER_LIVES,
    probe::{Listener, probe},
};

/// New connections that may wait. Hundreds of ranks of an MPI job open their device in the same moment.
const BACKLOG: i32 = 1024;

/// Held as long as this process serves the socket. The kernel gives the lock back however the process ends.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    bound: bool,
    _lock: File,
}

impl Claim {
    /// Claims `path`, or says which router has it.
    pub(crate) fn take(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let lock = lock_beside(path)?;
        match probe(path) {
            Listener::Absent => {}
            Listener::Stale => {
                fs::remove_file(path).with_context(|| format!("cannot remove the dead router's {shown}"))?;
            }
            Listener::Live { pid } => return Err(taken(path, pid)),
            Listener::Unreachable(error) => {
                let context =
                    format!("cannot serve {shown}; remove what is there, or choose another --socket");
                return Err(anyhow::Error::from(error).context(context).into());
            }
        }
        Ok(Self { path: path.to_owned(), bound: false, _lock: lock })
    }

    /// Listens on the claimed path. The file's permission bits become `mode`, and it becomes the `owner`'s.
    pub(crate) fn bind(&mut self, mode: u32, owner: Option<Owner>) -> anyhow::Result<OwnedFd> {
        let shown = self.path.display();
        let address =
            SocketAddrUnix::new(&self.path).with_context(|| format!("{shown} is no usable path"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .context("cannot make a unix socket")?;
        bind(&listener, &address).with_context(|| format!("cannot make {shown}"))?;
        self.bound = true;
        fs::set_permissions(&self.path, Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the permissions of {shown}"))?;
        if let Some(Owner { uid, gid }) = owner {
            chown(&self.path, Some(uid), Some(gid))
                .with_context(|| format!("cannot give {shown} to user {uid} and group {gid}"))?;
        }
        listen(&listener, BACKLOG).with_context(|| format!("cannot listen on {shown}"))?;
        Ok(listener)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.bound {
            // Still under the lock, so the file is ours. That it is gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The lock file `SOCKET.lock`, locked, with our process id in it. It stays when the router ends: removing a lock
/// file lets two processes hold "the" lock.
fn lock_beside(path: &Path) -> Result<File, Failure> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let shown = name.display();
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&name);
    let mut file = open.with_context(|| format!("cannot open the lock file {shown} beside the socket"))?;
    // A router that is just ending still has it; give that a moment.
    for _ in 0..40 {
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).ok();
            return Ok(file);
        }
        if let Listener::Live { pid } = probe(path) {
            return Err(taken(path, pid.or_else(|| holder(&mut file))));
        }
        sleep(Duration::from_millis(50));
    }
    Err(taken(path, holder(&mut file)))
}

/// The process id in the lock file.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).ok()?;
    text.trim().parse().ok()
}

fn taken(path: &Path, pid: Option<u32>) -> Failure {
    let who = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
    let path = path.display();
    Failure::new(
        ROUTER_LIVES,
        anyhow!("a router{who} serves {path} already; end it, or choose another --socket"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_claim_is_refused_by_pid_and_a_dead_routers_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        let mut first = Claim::take(&path).unwrap();
        let listener = first.bind(0o640, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);

        let refused = Claim::take(&path).unwrap_err();
        assert_eq!(refused.code, ROUTER_LIVES);
        assert!(refused.error.to_string().contains(&format!("pid {}", std::process::id())), "{refused:?}");

        drop(listener);
        first.bound = false; // as if it was killed: the file stays
        drop(first);
        assert!(path.exists());
        let mut second = Claim::take(&path).unwrap();
        drop(second.bind(0o666, None).unwrap());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        let refused = Claim::take(&path).unwrap_err();
        assert!(refused.error.to_string().contains("precious"), "{refused:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}
