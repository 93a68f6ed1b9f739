//! What a router tells about itself.
//!
//! Does: the words of `freeflow status`, as they cross the control socket and as `--json` prints them.
//! Leaves to others: collecting them (daemon), asking for them and showing them as tables (command line).
//!
//! It travels as JSON in a file, so program and router may be of different versions: what one does not say is zero or
//! empty, what the other does not know is passed over. Counters count since the client or the router started.

use serde::{Deserialize, Serialize};

/// A snapshot of one router.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Version of the router program, as `freeflow --version` prints it.
    pub version: String,
    /// Process id in the router's own PID namespace.
    pub pid: u32,
    /// Seconds since the router started.
    pub uptime_seconds: u64,
    /// Path of the control socket.
    pub socket: String,
    /// Data-path threads.
    pub lanes: Vec<Lane>,
    /// Opened devices, oldest first.
    pub clients: Vec<Client>,
    /// Queue pairs of all clients, by number.
    pub qps: Vec<Qp>,
    /// Who listens by rdma_cm, by address.
    pub listeners: Vec<Listener>,
    /// Routers of other hosts.
    pub links: Vec<Link>,
    /// What the directory says; of a large one not all.
    pub routes: Vec<Route>,
    /// The directory itself.
    pub directory: Directory,
    /// The real NIC.
    pub rnic: Rnic,
}

/// Where it is written which router serves an address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Directory {
    /// `file` or `etcd`; nothing where this host is alone.
    pub kind: String,
    /// This router's name in it.
    pub name: String,
    /// The server in use.
    pub place: String,
    /// `read` (a file), `starting`, `up` or `lost`.
    pub state: String,
    /// Why it was lost.
    pub trouble: String,
    /// How long it has been in that state.
    pub since_seconds: u64,
    /// How far its changes are known.
    pub revision: u64,
    /// Other routers that are known.
    pub routers: u64,
    /// Single addresses that are known.
    pub addresses: u64,
    /// Addresses of this router's clients that other hosts are told of.
    pub own: Vec<Announcement>,
}

/// An address of this router's clients that other hosts are told of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Announcement {
    /// Trust domain.
    pub tenant: String,
    /// The address.
    pub address: String,
    /// `pending`, `published`, `refused` (another host has it) or `leaving`.
    pub state: String,
    /// The router that has it, where it was refused.
    pub router: String,
}

/// The real NIC that carries what goes to other hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rnic {
    /// `up`; `down` or `gone`: new connections go over TCP; `none`.
    pub state: String,
    /// Its name.
    pub device: String,
    /// The port in use.
    pub port: u8,
    /// The GID in use, as an address.
    pub gid: String,
    /// Its index.
    pub gid_index: u8,
    /// Why this one, or why none.
    pub why: String,
    /// Shadow queue pairs.
    pub qps: u64,
    /// Registrations of clients' memory.
    pub mrs: u64,
    /// Their bytes.
    pub mr_bytes: u64,
}

/// Addresses that one router serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Route {
    /// Trust domain.
    pub tenant: String,
    /// The addresses.
    pub prefix: String,
    /// The router's name, this one's own included.
    pub router: String,
}

/// The link to a router of another host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Link {
    /// The router's name.
    pub router: String,
    /// Where it listens.
    pub address: String,
    /// `up`, or `down`: it is made when something is to be sent.
    pub state: String,
    /// Streams that are there now.
    pub streams: u32,
    /// From here to that router and back through all queues, when last looked, microseconds.
    pub round_trip_us: Option<f64>,
    /// Bytes sent, headers included.
    pub tx_bytes: u64,
    /// Bytes received, headers included.
    pub rx_bytes: u64,
    /// Packets sent again: after a lost stream, a time-out, or a receiver that was not ready.
    pub retransmissions: u64,
    /// How often a stream was made, by either end.
    pub connections: u64,
    /// Whether both ends have a NIC on a common fabric.
    pub rnic: bool,
}

/// A listening id of rdma_cm.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Listener {
    /// Trust domain.
    pub tenant: String,
    /// Process id in the router's PID namespace; 0 where the router cannot see the process.
    pub pid: u32,
    /// User id of the process.
    pub uid: u32,
    /// Port space: `tcp`, `udp`, `ipoib` or `ib`.
    pub space: String,
    /// Address and port; the wildcard stands for all addresses of the process's network namespace.
    pub address: String,
}

/// One data-path thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lane {
    /// Index of the lane.
    pub id: u32,
    /// Work requests executed in the router's seat.
    pub work_requests: u64,
    /// Times the lane went to sleep because there was nothing to do.
    pub sleeps: u64,
}

/// One opened device of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Client {
    /// The router's number for it; never used twice in a router's life.
    pub id: u64,
    /// Process id in the router's PID namespace; 0 where the router cannot see the process.
    pub pid: u32,
    /// User id of the process.
    pub uid: u32,
    /// The process's command name.
    pub comm: String,
    /// Trust domain.
    pub tenant: String,
    /// Who executes its work requests: `isolated` or `direct`.
    pub mode: String,
    /// GIDs, by index, as addresses.
    pub addresses: Vec<String>,
    /// Number of queue pairs.
    pub qps: u32,
    /// Number of completion queues.
    pub cqs: u32,
    /// Number of memory regions.
    pub mrs: u32,
    /// Bytes of registered memory, each region at its full length.
    pub mr_bytes: u64,
    /// Number of protection domains.
    pub pds: u32,
    /// Number of completion channels.
    pub channels: u32,
    /// Bytes of its queues.
    pub queue_bytes: u64,
    /// What it may have of each.
    pub quotas: Quotas,
    /// What it has used of the router's lanes, in bytes; a work request counts 4096 beside its own.
    pub lane_use: u64,
    /// Traffic of all its queue pairs.
    pub counters: Counters,
}

/// What one client may have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quotas {
    /// Queue pairs.
    pub qps: u32,
    /// Completion queues.
    pub cqs: u32,
    /// Memory regions and windows.
    pub mrs: u32,
    /// Registered bytes.
    pub mr_bytes: u64,
    /// Protection domains.
    pub pds: u32,
    /// Completion channels.
    pub channels: u32,
    /// Bytes of queues.
    pub queue_bytes: u64,
}

/// Traffic, as a port or a queue pair counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Messages sent as requester.
    pub tx_messages: u64,
    /// Bytes sent as requester; for RDMA READ the bytes are counted as received.
    pub tx_bytes: u64,
    /// Messages received as responder.
    pub rx_messages: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Receiver-not-ready answers sent.
    pub rnr_naks: u64,
    /// Requests sent again, after a time-out or a receiver-not-ready answer.
    pub retries: u64,
    /// Work requests that completed in error, flushes left out.
    pub errors: u64,
}

/// One queue pair.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Qp {
    /// Number, unique on this host.
    pub qpn: u32,
    /// The client it belongs to.
    pub client: u64,
    /// Transport: `RC`, `UC` or `UD`.
    pub transport: String,
    /// State: `RESET`, `INIT`, `RTR`, `RTS`, `SQD`, `SQE` or `ERR`.
    pub state: String,
    /// GID of the peer, where one is set.
    pub peer_gid: Option<String>,
    /// Number of the peer's queue pair, where one is set.
    pub peer_qpn: Option<u32>,
    /// Who executes its send queue now: `isolated` (the router) or `direct` (its owner).
    pub mode: String,
    /// What its messages travel by: `shm` on one host, `rnic` or `tcp` to another; empty until that is decided.
    pub path: String,
    /// Traffic of this queue pair.
    pub counters: Counters,
}
