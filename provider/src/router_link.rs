//! The connection to the router: finding it, and asking it one thing at a time.
//!
//! A router that answers nothing for [`PATIENCE`] is taken for dead: the connection is shut down, which
//! [`crate::watch`] sees. What is asked for is the callers' business.

use std::env;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use verbs_abi::proto::{Answer, Endpoint, ProtoError, Reply, Request};

use crate::abi::edge::Errno;
use crate::error::{self, OpenError};
use crate::health::Health;
use crate::log::{self, Level};

/// How long a router may take to answer the first request: a program is waiting to hear whether there is one.
const GREETING: Duration = Duration::from_secs(4);
/// How long it may take to answer later.
const PATIENCE: Duration = Duration::from_secs(10);
/// Replies that may wait in the socket for the next request: fewer than the router would take amiss.
const MAX_UNREAD: u32 = 8;

/// The socket, and what was asked on it and not waited for.
#[derive(Debug)]
struct Line {
    endpoint: Endpoint,
    unread: u32,
}

impl Line {
    /// The reply to what was asked last. Replies come in the order of the requests.
    fn reply(&mut self) -> Result<(Reply, Vec<OwnedFd>), ProtoError> {
        while self.unread > 0 {
            let (reply, _) = self.endpoint.recv::<Reply>()?;
            self.unread -= 1;
            if let Err(errno) = reply {
                log::say(
                    Level::Debug,
                    format_args!("the router refused what was taken for granted: {errno}"),
                );
            }
        }
        self.endpoint.recv()
    }
}

/// A connection to the router.
#[derive(Debug)]
pub(crate) struct RouterLink {
    line: Mutex<Line>,
    fd: RawFd,
    path: PathBuf,
    health: Arc<Health>,
}

impl RouterLink {
    /// Connects to the router that this process is meant to use.
    pub(crate) fn connect(health: Arc<Health>) -> Result<RouterLink, OpenError> {
        let mut failure = None;
        for path in candidates() {
            match connect(&path) {
                Ok(socket) => {
                    let fd = socket.as_raw_fd();
                    let line = Mutex::new(Line { endpoint: Endpoint::new(socket), unread: 0 });
                    return Ok(RouterLink { line, fd, path, health });
                }
                Err(errno) => {
                    failure.get_or_insert(OpenError::NoRouter { path, errno });
                }
            }
        }
        Err(failure.unwrap_or(OpenError::NoRouter { path: PathBuf::new(), errno: Errno::NOENT }))
    }

    /// Where the router listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The socket, for polling; open as long as this value lives.
    pub(crate) fn fd(&self) -> RawFd {
        self.fd
    }

    /// The first request.
    pub(crate) fn hello(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
        let Line { endpoint, .. } = &*self.line();
        let path = || self.path.clone();
        let reply = endpoint.send(request, fds).and_then(|()| endpoint.recv::<Reply>());
        match reply {
            Ok((Ok(answer), fds)) => {
                // Where it cannot be set, the shorter time stays.
                let _ = set_socket_timeout(endpoint, Timeout::Recv, Some(PATIENCE));
                Ok((answer, fds))
            }
            Ok((Err(errno), _)) if errno == libc::EPROTONOSUPPORT => Err(OpenError::Version { path: path() }),
            Ok((Err(errno), _)) => Err(OpenError::Refused { path: path(), errno: error::from_router(errno) }),
            Err(source) => Err(OpenError::Silent { path: path(), source }),
        }
    }

    /// Asks the router. ENODEV in a child of fork, EIO when the router is dead or dies now.
    pub(crate) fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), Errno> {
        self.health.check_owner()?;
        let mut line = self.line();
        if self.health.is_dead() {
            return Err(Errno::IO);
        }
        match line.endpoint.send(request, fds).and_then(|()| line.reply()) {
            Ok((Ok(answer), fds)) => Ok((answer, fds)),
            Ok((Err(errno), _)) => Err(error::from_router(errno)),
            Err(_) => {
                // A late reply would be taken for the next one: nothing more is asked on this connection.
                let _ = rustix::net::shutdown(&line.endpoint, Shutdown::Both);
                Err(Errno::IO)
            }
        }
    }

    /// Says what the router cannot refuse, without waiting for its reply. False: it must be asked.
    pub(crate) fn mention(&self, request: &Request) -> bool {
        let mut line = self.line();
        let said =
            !self.health.is_dead() && line.unread < MAX_UNREAD && line.endpoint.send(request, &[]).is_ok();
        line.unread += u32::from(said);
        said
    }

    /// Asks for something that needs no more than "done".
    pub(crate) fn tell(&self, request: &Request) -> Result<(), Errno> {
        match self.ask(request, &[])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(Errno::PROTO),
        }
    }

    /// Asks for something new that is named by a number.
    pub(crate) fn handle(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<u32, Errno> {
        match self.ask(request, fds)? {
            (Answer::Handle(handle), _) => Ok(handle),
            _ => Err(Errno::PROTO),
        }
    }

    /// Asks the router to let something go. A dead router has let go of everything.
    pub(crate) fn release(&self, request: &Request) -> Result<(), Errno> {
        match self.tell(request) {
            Err(Errno::IO) => Ok(()),
            result => result,
        }
    }

    /// Ends the connection. A forked child may still have the descriptor: closing ours alone would end nothing.
    pub(crate) fn end(&self) {
        self.health.mark_dead();
        let _ = rustix::net::shutdown(&self.line().endpoint, Shutdown::Both);
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a router may listen, in the order of preference.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = env::var_os("FREEFLOW_SOCKET").filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let system = PathBuf::from("/run/freeflow/router.sock");
    let user = rustix::process::geteuid();
    if user.is_root() {
        return vec![system];
    }
    let runtime = env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
    let own = runtime.map(|path| PathBuf::from(path).join("freeflow/router.sock"));
    let temporary = PathBuf::from(format!("/tmp/freeflow-{}", user.as_raw()));
    // Anybody can make a directory of that name: only one of our own is believed.
    let is_ours = rustix::fs::lstat(&temporary).is_ok_and(|stat| stat.st_uid == user.as_raw());
    let temporary = is_ours.then(|| temporary.join("router.sock"));
    own.into_iter().chain(temporary).chain([system]).collect()
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let socket = above_stdio(socket)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(GREETING))?;
    // It bounds the wait for a place in the router's queue, too.
    set_socket_timeout(&socket, Timeout::Send, Some(GREETING))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Keeps our descriptors away from the numbers of stdin, stdout and stderr, which a program that closed them takes
/// for its own.
pub(crate) fn above_stdio(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    if fd.as_raw_fd() > 2 { Ok(fd) } else { rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3) }
}
