//! The libibverbs provider: what stock rdma-core loads to have the device `ff0`.
//!
//! libibverbs loads this library, [`device`] registers a driver with it in the private ABI of its release
//! ([`abi`]), and [`hooks`] catches the few calls that libibverbs makes past that driver, by rewriting its imports
//! ([`got`]). The verbs themselves are behind the table in [`ops`], around one [`context`] an opened device. What
//! moves the bytes is the router's and the engine's business.

mod abi;
mod context;
mod device;
mod got;
mod hooks;
mod log;
pub mod memory;
mod ops;
