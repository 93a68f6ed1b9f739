//! Where the command line meets the daemon and its control socket: two functions, no more.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use router::{
    client,
    config::Config,
    daemon::{self, End},
    status::Status,
};

/// Serves `listener` and those of the tenants until the daemon is told to end or has been idle for as long as the configuration says.
pub(crate) fn run_router(
    config: &Config,
    file: Option<PathBuf>,
    listener: OwnedFd,
    tenants: Vec<OwnedFd>,
) -> anyhow::Result<()> {
    if daemon::run(config, file, listener, tenants)? == End::Idle {
        tracing::info!("no client for a while");
    }
    Ok(())
}

/// Asks the router that serves `socket` about itself.
pub(crate) fn status(socket: &Path) -> anyhow::Result<Status> {
    Ok(client::status(socket)?)
}
