//! Where the command line meets the daemon and its control socket: two functions, no more.

use std::{os::fd::OwnedFd, path::Path};

use anyhow::{Context, bail};
use router::{config::Config, status::Status};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SocketFlags, accept_with},
};

/// Serves `listener` until the daemon is told to end or has been idle for as long as the configuration says.
///
/// Stands in for the daemon: it accepts connections and waits until they hang up.
pub(crate) fn run_router(config: &Config, listener: OwnedFd) -> anyhow::Result<()> {
    let idle = config.idle_exit().map(|idle| Timespec { tv_sec: idle.as_secs() as i64, tv_nsec: 0 });
    let mut clients: Vec<OwnedFd> = Vec::new();
    loop {
        let fds = std::iter::once(&listener).chain(&clients);
        let mut polled: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let ready = poll(&mut polled, idle.as_ref().filter(|_| clients.is_empty()));
        let events: Vec<_> = polled.iter().map(PollFd::revents).collect();
        match ready {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for clients"),
        }
        let mut gone = events[1..].iter().map(|events| events.contains(PollFlags::HUP));
        clients.retain(|_| !gone.next().unwrap_or(false));
        if !events[0].is_empty() {
            clients.extend(accept_with(&listener, SocketFlags::CLOEXEC));
        }
    }
}

/// Asks the router that serves `socket` about itself.
pub(crate) fn status(_socket: &Path) -> anyhow::Result<Status> {
    bail!("this build's router does not tell its status yet")
}
