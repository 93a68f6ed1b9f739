//! What lies in memory that two processes share.
//!
//! Per client the router makes one *arena* (a sealed memfd):
//!
//! ```text
//! 0        header        magic, version, heavy fences           router writes
//! 1 page   doorbells     summary + one bit a QP slot            owner sets, router clears
//! 2 pages  async events  ring of 16-byte records                router writes
//! 64 KiB   MR table      64 bytes an entry                      router writes, anyone may invalidate
//! HEAP     QPs and CQs   placed by the router, page granular
//! ```
//!
//! Rules of foreign memory: no references into it except to atomics, an entry is copied out once,
//! then checked, then used. Offsets, never pointers. Every word has one writer at a time.

pub mod arena;
pub mod barrier;
pub mod cq;
pub mod cqe;
pub mod doorbell;
pub mod events;
pub mod lane;
pub mod mr_table;
pub mod queue;
pub mod seat;
pub mod srq;
pub mod window;
pub mod wqe;

pub use window::Window;

/// Bytes of a block, the unit of queue memory and of a cache line.
pub const BLOCK: usize = 64;

/// Bytes of a page; heap objects are placed on page boundaries.
pub const PAGE: usize = 4096;

/// Version of every layout in this module and of the socket protocol.
pub const LAYOUT_VERSION: u32 = 5;
