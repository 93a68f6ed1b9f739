//! A router for this user, started when one is needed and none runs.
//!
//! Does: start `freeflow router` detached from the caller, once, however many programs start together, and wait until
//! it answers. Leaves to others: ending it (it ends by itself, `--idle-exit`).

use std::{
    fs::{File, OpenOptions},
    io::{self, PipeReader, Read, Seek, SeekFrom},
    os::{
        fd::AsFd,
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
};

use super::{
    probe::{Listener, probe},
    runtime,
};

/// Seconds without a client after which such a router ends.
const IDLE_EXIT: &str = "30";
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A log larger than this is begun anew.
const LOG_LIMIT: u64 = 1 << 20;

/// Sees to it that a router answers on this user's default socket.
pub(crate) fn ensure_router(socket: &Path) -> anyhow::Result<()> {
    if answers(socket)? {
        return Ok(());
    }
    let directory = runtime::create_default_directory()?;
    let deadline = Instant::now() + PATIENCE;
    // Held until the router answers. It is closed by exec and by death, so nobody waits for us for ever.
    let _lock = lock(&directory.join("start.lock"), deadline)?;
    if answers(socket)? {
        return Ok(());
    }
    let log = directory.join("router.log");
    let alive = spawn(socket, &log)?;
    while Instant::now() < deadline {
        if answers(socket)? {
            return Ok(());
        }
        if ended(&alive) {
            bail!(
                "the router that was started for this user ended at once; its log {} ends so:\n{}",
                log.display(),
                tail(&log)
            );
        }
    }
    bail!("the router that was started for this user does not answer; see {}", log.display())
}

fn answers(socket: &Path) -> anyhow::Result<bool> {
    match probe(socket) {
        Listener::Live { .. } => Ok(true),
        Listener::Stale | Listener::Absent => Ok(false),
        Listener::Unreachable(error) => {
            Err(error).with_context(|| format!("cannot reach a router at {}", socket.display()))
        }
    }
}

fn lock(path: &Path, deadline: Instant) -> anyhow::Result<File> {
    let shown = path.display();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path).with_context(|| format!("cannot open the lock file {shown}"))?;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            bail!("another program has been starting a router for too long (it holds {shown})");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(file)
}

/// Starts the router; the pipe tells when it has ended.
fn spawn(socket: &Path, log: &Path) -> anyhow::Result<PipeReader> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let errors = options.open(log).with_context(|| format!("cannot open the log file {}", log.display()))?;
    if errors.metadata().is_ok_and(|data| data.len() > LOG_LIMIT) {
        errors.set_len(0).context("cannot begin the log anew")?;
    }
    let (alive, output) = io::pipe().context("cannot make a pipe")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("freeflow").args(["router", "--idle-exit", IDLE_EXIT, "--socket"]).arg(socket);
    command.stdin(Stdio::null()).stdout(output).stderr(errors).current_dir("/");
    // The router is no RDMA program, and what the user preloads is meant for the user's program.
    for name in ["LD_PRELOAD", "RDMAV_DRIVERS", "SYSFS_PATH", "FREEFLOW_MODE", "FREEFLOW_SOCKET"] {
        command.env_remove(name);
    }
    // SAFETY: this process has one thread, and `detach` makes system calls only.
    unsafe { command.pre_exec(detach) };
    let mut parent = command.spawn().context("cannot start a router")?;
    drop(command); // and with it our copy of the pipe's other end
    parent.wait().context("cannot start a router")?;
    Ok(alive)
}

/// Leaves the caller's session and becomes nobody's child: the program that takes our place does not expect one. Its
/// descriptors stay with it too, or the reader of a pipe would wait for the router.
fn detach() -> io::Result<()> {
    // SAFETY: plain system calls; the parent of the second fork leaves without running anybody's exit handlers.
    unsafe {
        // Kernels before 5.11 refuse this; then the descriptors stay open, which is a nuisance and no more.
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::fork() {
            0 => Ok(()),
            -1 => Err(io::Error::last_os_error()),
            _ => libc::_exit(0),
        }
    }
}

/// Waits a moment; true when nobody holds the other end of the pipe.
fn ended(alive: &PipeReader) -> bool {
    let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    let mut polled = [PollFd::from_borrowed_fd(alive.as_fd(), PollFlags::IN)];
    poll(&mut polled, Some(&moment)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

/// The last lines of the log.
fn tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(1500);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
