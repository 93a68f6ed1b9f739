//! The host's real NIC: the vendor's provider through stock libibverbs, whatever NIC it is.
//!
//! ```text
//!   lane --(posts, polls)----------------------------> NIC
//!     |                                                 ^
//!     +--(orders)--> Worker --(kernel driver)-----------+
//!     ^                |
//!     +--(events)------+<-- completion channel, async events
//! ```
//!
//! The lane posts and polls by itself; what makes system calls that may take long is ordered from a thread of its own,
//! which also wakes the lane when a completion comes that the lane sleeps for.
//! Leaves to others: which QPs have shadows and what travels by them (the engine), whether a peer has a NIC (`link`).

mod device;
mod handle;
mod verbs;
mod worker;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use parking_lot::Mutex;
use rustix::{
    event::{EventfdFlags, eventfd},
    process::{Resource, getrlimit},
};

use crate::{config, lane::Lane, status};
pub(crate) use device::{Device, Found};
use handle::Handle;
use worker::Worker;

/// What lane, worker and status share.
#[derive(Debug)]
struct Shared {
    /// Wakes the worker.
    wake: OwnedFd,
    stopping: AtomicBool,
    /// Completions will be told.
    is_armed: AtomicBool,
    state: Mutex<State>,
    qps: AtomicU64,
    regions: AtomicU64,
    region_bytes: AtomicU64,
}

impl Shared {
    fn ring(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// How the NIC is.
#[derive(Clone, Debug)]
enum State {
    Up(Found),
    Down(Found),
    Gone(Found),
}

/// What a router with this configuration would use, in words: the device, and why.
///
/// # Errors
/// Why there is none.
pub fn examine(config: &config::Rnic) -> Result<String, String> {
    let Found { name, port, gid_index, gid, why, .. } = Device::find(config)?.found;
    let gid = std::net::Ipv6Addr::from(gid);
    Ok(format!("{name} port {port}, GID {gid_index} {gid} ({why})"))
}

/// Bytes that this process may have registered on NICs, where that is limited.
#[must_use]
pub fn memory_limit() -> Option<u64> {
    const IPC_LOCK: u32 = 14;
    let limit = getrlimit(Resource::Memlock).current?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let rights = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    (rights >> IPC_LOCK & 1 == 0).then_some(limit)
}

/// The NIC of a router.
#[derive(Debug)]
pub(crate) struct Rnic {
    shared: Option<Arc<Shared>>,
    worker: Option<Worker>,
    found: Option<Found>,
    /// Why there is none.
    why_not: String,
}

impl Rnic {
    /// Looks for the NIC that the configuration wants, and gives it to the lane's fabric.
    pub(crate) fn find(config: &config::Rnic, lane: &Arc<Lane>) -> io::Result<Self> {
        let mut device = match Device::find(config) {
            Ok(device) => device,
            Err(why_not) => {
                tracing::debug!(why_not, "no NIC");
                return Ok(Self { shared: None, worker: None, found: None, why_not });
            }
        };
        if let Some(limit) = memory_limit() {
            tracing::warn!(limit, "clients' memory beyond this limit is not registered; raise LimitMEMLOCK");
            device.found.why += &format!("; at most {limit} bytes can be registered: raise LimitMEMLOCK");
        }
        let found = device.found.clone();
        tracing::info!(
            device = found.name,
            port = found.port,
            gid_index = found.gid_index,
            why = found.why,
            "NIC"
        );
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            stopping: AtomicBool::new(false),
            is_armed: AtomicBool::new(false),
            state: Mutex::new(State::Up(found.clone())),
            qps: AtomicU64::new(0),
            regions: AtomicU64::new(0),
            region_bytes: AtomicU64::new(0),
        });
        let ((orders, to_do), (answers, told)) = (mpsc::channel(), mpsc::channel());
        let handle = Handle::new(device.limits, orders, told, Arc::clone(&shared));
        let worker =
            Worker::new(device, config.clone(), to_do, answers, Arc::clone(&shared), Arc::clone(lane));
        lane.set_nic(Box::new(handle));
        Ok(Self { shared: Some(shared), worker: Some(worker), found: Some(found), why_not: String::new() })
    }

    /// What other routers are told.
    pub(crate) fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    /// Starts the thread, if there is a NIC.
    pub(crate) fn start(&mut self) -> io::Result<Option<JoinHandle<()>>> {
        let Some(worker) = self.worker.take() else { return Ok(None) };
        thread::Builder::new().name("rnic".to_owned()).spawn(move || worker.serve()).map(Some)
    }

    /// Ends the thread soon.
    pub(crate) fn stop(&self) {
        if let Some(shared) = &self.shared {
            shared.stopping.store(true, Ordering::SeqCst);
            shared.ring();
        }
    }

    /// For `freeflow status`.
    pub(crate) fn status(&self) -> status::Rnic {
        let Some(shared) = &self.shared else {
            return status::Rnic {
                state: "none".to_owned(),
                why: self.why_not.clone(),
                ..status::Rnic::default()
            };
        };
        let (state, found, why) = match shared.state.lock().clone() {
            State::Up(found) => ("up", found, String::new()),
            State::Down(found) => {
                ("down", found, "its port is down; new connections go over TCP; ".to_owned())
            }
            State::Gone(found) => ("gone", found, "it is gone; new connections go over TCP; ".to_owned()),
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        status::Rnic {
            state: state.to_owned(),
            device: found.name,
            port: found.port,
            gid: std::net::Ipv6Addr::from(found.gid).to_string(),
            gid_index: found.gid_index,
            why: why + &found.why,
            qps: count(&shared.qps),
            mrs: count(&shared.regions),
            mr_bytes: count(&shared.region_bytes),
        }
    }
}
