//! The per-host router.
//!
//! ```text
//! daemon     accepts, waits, ends          session   one connection: order of requests, then their meaning
//! lane       the data path's thread        identity  who a client is        addresses  its GIDs
//! tenant, account, claims                   trust domains, quotas, addresses
//! guard      faults in what is shared with clients
//! arena, region, memory                    what a client shares, and how the engine reaches it
//! helper     reaches what a client does not share
//! bell       rings clients                 client    asks a running router (command line)
//! broker     rdma_cm: the `cm` crate with a clock
//! link       to the routers of other hosts  directory  which of them serves an address
//! rnic       the real NIC
//! ```

mod account;
mod addresses;
mod arena;
mod bell;
mod broker;
mod claims;
pub mod client;
pub mod config;
pub mod daemon;
mod descriptor;
pub mod directory;
pub mod error;
mod guard;
mod guid;
mod heap;
mod helper;
mod identity;
mod lane;
mod link;
mod mailbox;
mod memory;
pub mod pki;
mod region;
mod report;
pub mod rnic;
mod segment;
mod session;
mod signals;
pub mod status;
mod tenant;
mod throttle;
