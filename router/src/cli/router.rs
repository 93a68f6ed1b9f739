//! `freeflow router`: the daemon's command line.
//!
//! Does: put configuration and options together, logging, limits, the claim on the socket.
//! Leaves to others: everything that happens while it serves (the daemon).

use std::{
    fs::DirBuilder,
    io::{self, IsTerminal},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use router::config::{Config, Tenant};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

use super::{Failure, claim::Claim, failure, runtime, wire};

/// Read without --config, by root's router alone.
pub(crate) const SYSTEM_CONFIG: &str = "/etc/freeflow/router.toml";

const MORE: &str = "\
Without --socket it listens on /run/freeflow/router.sock (root),
$XDG_RUNTIME_DIR/freeflow/router.sock (a user), or
/tmp/freeflow-UID/router.sock (a user without such a directory). SIGTERM and
SIGINT end it; SIGHUP has it read its configuration again and follow the modes
of the tenants, or ends it where there is no configuration. Options win over variables, variables over the configuration.

Exit codes: 0 ended as it was told to; 1 failed; 2 the command line or the
configuration is wrong; 3 another router serves the socket.";

#[derive(Debug, clap::Args)]
#[command(after_help = MORE)]
pub(crate) struct Args {
    /// Configuration file (TOML); root's router reads /etc/freeflow/router.toml where it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Control socket to serve [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// End after so many seconds without a client
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    idle_exit: Option<u64>,
    /// What to log: error, warn, info, debug, trace, or a list of target=level
    #[arg(long, value_name = "FILTER", env = "FREEFLOW_LOG", hide_env_values = true)]
    log: Option<String>,
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let (config, file) = configuration(args)?;
    start_logging(config.log.as_deref().unwrap_or("info"))?;
    raise_descriptor_limit();
    let socket = config.socket.clone().context("no socket was chosen")?;
    let mut claim = Claim::take(&socket)?;
    let listener = claim.bind(config.socket_mode(), None)?;
    let mut claims = config.tenants.iter().map(tenant_claim).collect::<Result<Vec<_>, _>>()?;
    let listeners = claims.iter_mut().zip(&config.tenants);
    let listeners = listeners.map(|(claim, tenant)| claim.bind(tenant.socket_mode, tenant.socket_owner));
    let listeners = listeners.collect::<Result<Vec<_>, _>>()?;
    tracing::info!(socket = %socket.display(), pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "serving");
    for tenant in &config.tenants {
        tracing::info!(tenant = tenant.name, socket = %tenant.socket.display(), "serving a tenant");
    }
    wire::run_router(&config, file, listener, listeners)?;
    tracing::info!("ended");
    Ok(ExitCode::SUCCESS)
}

/// A tenant's socket. Its directory, which the tenant's containers get, is made where it is missing.
fn tenant_claim(tenant: &Tenant) -> Result<Claim, Failure> {
    let directory = tenant.socket.parent().context("a socket lies in a directory")?;
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            let shown = directory.display();
            let context = format!("cannot make {shown} for the socket of the tenant {}", tenant.name);
            Err(anyhow::Error::from(error).context(context).into())
        }
        _ => Claim::take(&tenant.socket),
    }
}

/// The file's words, overridden by variables and options, and the file; `socket` is always set.
fn configuration(args: Args) -> Result<(Config, Option<PathBuf>), Failure> {
    let system = PathBuf::from(SYSTEM_CONFIG);
    let file = args.config.or_else(|| (geteuid().is_root() && system.exists()).then_some(system));
    let mut config = match &file {
        Some(file) => Config::load(file).map_err(|error| Failure::new(failure::USAGE, error))?,
        None => Config::default(),
    };
    config.log = args.log.or(config.log);
    config.idle_exit = args.idle_exit.or(config.idle_exit);
    let chosen = runtime::Socket::choose(args.socket.as_deref())?;
    if chosen.named {
        config.socket = Some(chosen.path);
    } else if config.socket.is_none() {
        runtime::create_default_directory()?;
        config.socket = Some(chosen.path);
    }
    Ok((config, file))
}

/// Logs to standard error, which a service manager keeps.
fn start_logging(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::new(
            failure::USAGE,
            anyhow!("{filter:?} is no log filter ({error}); write for example `info`"),
        )
    })?;
    let colours = io::stderr().is_terminal();
    // A full disk must not end the router: what cannot be logged is not complained about either, on the same disk.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    log.with_writer(io::stderr).with_ansi(colours).init();
    Ok(())
}

/// A client costs a handful of descriptors, and the usual soft limit of 1024 is there for select(2) alone.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "cannot raise the limit of open files; many clients may not be served");
    }
}
