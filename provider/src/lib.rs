//! The libibverbs provider: what stock rdma-core loads to have the device `ff0`.
//!
//! libibverbs loads this library, [`device`] registers a driver with it in the private ABI of its release
//! ([`abi`]), and [`hooks`] catches the few calls that libibverbs makes past that driver, by rewriting its imports
//! ([`got`]); a libibverbs that has an op for each of them is left as it is ([`announce`]). The verbs themselves are behind the table in [`ops`], around one [`context`] an opened device. What
//! moves the bytes is the router's and the engine's business.

mod abi;
mod ah;
mod announce;
mod attributes;
mod bell;
mod clock;
mod context;
mod cq;
mod cq_ex;
mod device;
mod direct;
mod dm;
mod dmabuf;
mod ece;
mod error;
mod event;
mod gid;
mod got;
mod health;
mod hooks;
mod import;
mod lock;
mod log;
mod mcast;
pub mod memory;
mod moderation;
mod mr;
mod mw;
mod old_glibc;
mod on_demand;
mod ops;
mod overrun;
mod pd;
mod poll;
mod post;
mod qp;
mod qp_create;
mod router_link;
mod srq;
mod ucma;
mod watch;
mod wr;

#[cfg(test)]
mod testbed;
