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
/// Stands in for the daemon: it accepts connections and hangs up.
pub(crate) fn run_router(config: &Config, listener: OwnedFd) -> anyhow::Result<()> {
    let idle = config.idle_exit().map(|idle| Timespec { tv_sec: idle.as_secs() as i64, tv_nsec: 0 });
    loop {
        let mut polled = [PollFd::new(&listener, PollFlags::IN)];
        match poll(&mut polled, idle.as_ref()) {
            Ok(0) => return Ok(()),
            Ok(_) => drop(accept_with(&listener, SocketFlags::CLOEXEC)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for clients"),
        }
    }
}

/// Asks the router that serves `socket` about itself.
pub(crate) fn status(_socket: &Path) -> anyhow::Result<Status> {
    bail!("this build's router does not tell its status yet")
}
