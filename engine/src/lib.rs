//! The virtual RNIC, free of sockets, threads, clocks and mmap.
//!
//! ```text
//!   SQ --> Requester --(request)--> Responder --> memory, RQ, completions of the peer
//!            ^   |                      |
//!            |   +--> own completions   |
//!            +-------- reply -----------+
//! ```
//!
//! The two halves run back to back in one of two seats: the router's, where [`Fabric`] holds every QP of the
//! host, or the application's own thread (direct mode), which holds one [`Requester`] and its peer's
//! [`Responder`]. Time is a number of nanoseconds that the caller passes in; memory is the trait [`Memory`], and what
//! no seat maps is reached by whoever performs an [`Access`].

mod bell;
mod completion;
mod datagram;
pub mod fabric;
mod foreign;
mod inbox;
mod memory;
pub mod nic;
mod pace;
mod place;
mod requester;
mod responder;
mod retry;
mod shadow;
mod srq;
mod stage;
mod transfer;
mod window;
pub mod wire;

pub use bell::Bell;
pub use completion::{CompletionQueue, Completions};
pub use fabric::{
    ATTR_LIMITS, Calls, ClientInit, Control, Controls, Copy, DataPath, Fabric, LinkFigures, MAX_RATE,
    MAX_WORDS, Modified, QpInit, QpSnapshot, Routing, SrqInit, Stream, XrcInit,
};
pub use foreign::{Access, Foreign};
pub use memory::{Fault, KeyedRange, Memory};
pub use requester::{Attempt, Fetch, Requester, Verdict};
pub use responder::Responder;
pub use window::{Bound, CHOSEN_BITS, MemoryWindow};

/// Longest message, bytes; `max_msg_sz` of the port.
pub const MAX_MESSAGE: u64 = 1 << 30;
/// Longest datagram, bytes; the port's MTU.
pub const MAX_DATAGRAM: u64 = 4096;
/// Bytes that a seat may move before it looks around. A fuzzer's messages are short and want to be cut, too.
pub const SLICE: u64 = if cfg!(fuzzing) { 2048 } else { 256 * 1024 };
/// Work requests of one queue that one turn flushes: their owner may post more all the while.
const FLUSH: usize = if cfg!(fuzzing) { 3 } else { 32 };
