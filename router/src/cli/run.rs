//! `freeflow run`: a program with the virtual RNIC.
//!
//! Does: see to a router, the device node and the environment, then become the program (exec), so that signals, exit
//! code, terminal and parent are the program's own. Leaves to others: each of the three (autostart, namespace,
//! variables).

use std::{
    env,
    ffi::OsString,
    io,
    os::{fd::IntoRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, anyhow, bail};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use super::{
    Failure, autostart, beside,
    failure::{RUN_FAILED, RUN_NOT_EXECUTABLE, RUN_NOT_FOUND},
    install::Tree,
    namespace,
    node::{self, MEND, Node},
    probe::{Listener, dial, probe},
    runtime::Socket,
    variables::{Mode, Variables, variables},
};

/// The held connection's descriptor, or the next free one: out of the way of scripts that use small numbers.
const HELD_DESCRIPTOR: i32 = 100;

const MORE: &str = "\
The program keeps user, groups, directory, network and terminal. Where
/dev/infiniband/uverbs_ff0 does not exist, it gets a mount namespace in which it
does; for an ordinary user that takes a user namespace too, in which set-uid
programs such as sudo gain nothing.

Without --socket (and FREEFLOW_SOCKET) this user's router is used; where none
runs, one is started, which ends by itself half a minute after the last program
that uses it.

A program sees ff0 and no device of the kernel; with --kernel-devices it sees
both, and by rdma_cm it meets through a device of the kernel who is reached by
one, and through ff0 everybody else.

Exit codes: the program's own; 125 freeflow could not start it; 126 it cannot be
executed; 127 it was not found.

Examples:
  freeflow run -- ibv_devinfo -v
  freeflow run --mode direct -- ib_write_bw 10.0.0.2
  freeflow run -- bash      (for everything started from this shell)";

#[derive(Debug, clap::Args)]
#[command(after_help = MORE)]
pub(crate) struct Args {
    /// The router's control socket [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Who executes the program's work requests, direct if nothing else is said [env: FREEFLOW_MODE]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Show the kernel's RDMA devices, too, beside ff0
    #[arg(long)]
    kernel_devices: bool,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let prepared = prepare(args.socket.as_deref(), args.mode, args.kernel_devices);
    let variables = prepared.map_err(|error| Failure::new(RUN_FAILED, error))?;
    let (program, arguments) = args.command.split_first().context("no program was named")?;
    let error = Command::new(program).args(arguments).envs(variables).exec();
    let code = match error.kind() {
        io::ErrorKind::NotFound => RUN_NOT_FOUND,
        _ => RUN_NOT_EXECUTABLE,
    };
    Err(Failure::new(code, anyhow!("{}: {error}", program.display())))
}

/// Everything the program needs; what is left is to execute it.
fn prepare(socket: Option<&Path>, mode: Option<Mode>, kernel_devices: bool) -> anyhow::Result<Variables> {
    let tree = Tree::find_complete()?;
    let sysfs = if kernel_devices { Some(beside::tree_for_here(&tree)?) } else { None };
    let socket = Socket::choose(socket)?;
    if socket.named {
        check_named(&socket.path)?;
    } else {
        // Before any namespace is entered: the router must not live in the program's.
        autostart::ensure_router(&socket.path)?;
        hold(&socket.path);
    }
    if node::look() != Node::Usable {
        namespace::enter().with_context(|| {
            format!(
                "{} is missing and cannot be made for this program alone; as root run `{MEND}`, in a container \
                 add `--device /dev/null:{}`",
                node::NODE,
                node::NODE
            )
        })?;
        if let Node::Wrong(fault) = node::look() {
            bail!("{}: {fault}", node::NODE);
        }
    }
    let sysfs = sysfs.unwrap_or_else(|| tree.sysfs());
    Ok(variables(&tree, &sysfs, &socket.path, mode, |name| env::var_os(name)))
}

/// Keeps a connection for as long as the program or a child of it lives, so that the router does not count itself idle
/// while, say, an interactive shell has opened no device yet. Without it the router still serves.
fn hold(path: &Path) {
    let Ok(connection) = dial(path) else { return };
    let Ok(kept) = fcntl_dupfd_cloexec(&connection, HELD_DESCRIPTOR) else { return };
    if fcntl_setfd(&kept, FdFlags::empty()).is_ok() {
        // Not closed here, and not at exec either: that is its purpose.
        let _ = kept.into_raw_fd();
    }
}

/// A router the user named is the user's to start.
fn check_named(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    match probe(path) {
        Listener::Live { .. } => Ok(()),
        Listener::Absent | Listener::Stale => {
            bail!(
                "no router serves {shown}; start one with `freeflow router --socket {shown}`, or leave --socket away"
            )
        }
        Listener::Unreachable(error) => {
            Err(error).with_context(|| format!("cannot reach a router at {shown}"))
        }
    }
}
