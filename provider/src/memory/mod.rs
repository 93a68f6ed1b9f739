//! Makes registered application memory reachable for the router, at the address the application knows.
//!
//! Whole pages of private anonymous memory that a memory region owns are *moved*: their content goes into the
//! client's region memfd at *file offset = virtual address*, and that part of the file is mapped back in their
//! place. Partly owned first and last pages, and memory of any other kind, stay as they are; the router reaches
//! those through `/proc/PID/mem`.
//!
//! ```text
//!   application   | private |======= MR =======| private |
//!                      [page][page][page][page]
//!                       stays  moved moved stays
//!   region memfd  .............|----|----|................   offset == address, holes elsewhere
//! ```
//!
//! This module leaves to others: keys and access checks, telling the router about the range, and making sure that
//! nobody works on the memory any more before [`Mover::deregister`] is called.
//!
//! What is promised:
//! - overlapping and repeated registrations share pages; the last deregistration makes them private again;
//! - the books are never believed: what is mapped now is looked up at each registration and deregistration;
//! - a child of `fork` gets private copies of moved pages and never writes into its parent's;
//! - memory that was never touched costs nothing, before and after;
//! - nothing that a thread, or the kernel for it, writes while pages change their place is lost;
//! - where the kernel has pinned pages of the process for long (io_uring's registered buffers, another RDMA device),
//!   pages with content stay where they are, private or moved, until it has not.
//!
//! What is not: NUMA and huge-page hints of moved pages are dropped, and a read by O_DIRECT that no thread waits for
//! (io_submit, io_uring without registered buffers) and that is under way while its very pages are registered or given
//! back is lost.
//!
//! All changes to the address space are raw system calls: programs such as UCX patch libc's `mmap` family and
//! would otherwise see their own buffers come and go.

mod extents;
mod fork;
mod holding;
mod locked;
mod maps;
mod mover;
mod pagemap;
mod peace;
mod pinned;
mod region;
mod stack;
mod stop;
mod views;
mod world;

#[cfg(test)]
mod tests;

pub use fork::on_fork_child;
pub use mover::{Mover, RegisterError, Registration};
pub(crate) use peace::rest;
pub(crate) use views::View;

use std::ops::Range;
use std::sync::OnceLock;

/// Size of a page of this machine.
fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    // SAFETY: sysconf has no preconditions.
    *SIZE.get_or_init(|| usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096))
}

/// The part that two ranges share; empty when there is none.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
