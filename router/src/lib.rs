//! The per-host router.

pub mod config;
pub mod status;
