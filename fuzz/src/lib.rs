//! What the fuzzer feeds, as plain functions: each takes any bytes and panics when a promise is broken.
//!
//! - [`control`]: any messages, descriptors and doorbells, on a router in this process.
//! - [`queues`]: any words in a client's arena while the router's seat works on it, beside two clients that must not
//!   notice.
//! - [`schedule`]: clients that keep the rules, in every order of posts, seats, time, verbs and deaths.
//!
//! Leaves to others: making up inputs (libFuzzer, through `src/bin`), building and running that (`cargo xtask fuzz`).

#![deny(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "what a target cannot do is a finding")]

pub mod control;
mod copies;
mod input;
mod memory;
pub mod queues;
pub mod schedule;
mod world;

use input::Input;
