//! Who listens on a control socket.
//!
//! Does: tell a live router from a file that a dead one left behind, without a word of the protocol.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

/// What was found at a path.
#[derive(Debug)]
pub(crate) enum Listener {
    /// A router; its process id where it can be seen from here.
    Live { pid: Option<u32> },
    /// A socket without anybody behind it.
    Stale,
    /// Nothing.
    Absent,
    /// Something that cannot be asked: no permission, not a socket, a path that is too long.
    Unreachable(io::Error),
}

/// Looks who listens at `path`.
pub(crate) fn probe(path: &Path) -> Listener {
    match dial(path) {
        Ok(socket) => Listener::Live { pid: listener_pid(&socket) },
        Err(Errno::CONNREFUSED) if is_socket(path) => Listener::Stale,
        Err(Errno::NOENT | Errno::NOTDIR) => Listener::Absent,
        // The queue of new connections is full: somebody is there and busy.
        Err(Errno::AGAIN) => Listener::Live { pid: None },
        Err(error) => Listener::Unreachable(error.into()),
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
}

/// Connects, and says nothing.
pub(crate) fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// The process id of who called listen(2); none where it lives in a PID namespace that cannot be seen from this one.
fn listener_pid(socket: &OwnedFd) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // Raw, because a pid of 0 ("not visible from here") does not fit the typed wrapper.
    // SAFETY: both pointers are to live locals, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    u32::try_from(credentials.pid).ok().filter(|pid| result == 0 && *pid > 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::net::{bind, listen, socket};

    use super::*;

    #[test]
    fn a_listener_is_told_from_a_left_over_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        assert!(matches!(probe(&path), Listener::Absent));
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        assert!(matches!(probe(&path), Listener::Live { pid } if pid == Some(std::process::id())));
        drop(listener);
        assert!(matches!(probe(&path), Listener::Stale));
    }

    #[test]
    fn a_full_queue_is_a_live_router() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        for _ in 0..3 {
            assert!(matches!(probe(&path), Listener::Live { .. }));
        }
    }

    #[test]
    fn a_plain_file_or_a_long_path_is_no_router() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(probe(&file), Listener::Unreachable(_)));
        assert!(matches!(probe(&dir.path().join("x".repeat(200))), Listener::Unreachable(_)));
    }
}
