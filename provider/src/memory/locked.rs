//! Memory that the program has locked stays locked where its pages go.
//!
//! The kernel tells it in one file that takes milliseconds to read. But there is a hint that it refuses for locked
//! memory alone (of the kinds that are moved) and that changes next to nothing.

use std::ops::Range;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::page_size;
use super::region::pointer;

/// Whether the mapping at `address` is locked into memory. `false` when that cannot be told.
pub(super) fn is_locked(address: usize) -> bool {
    refuses_hint(address) && can_tell()
}

/// Locks what has taken the place of locked memory. Beyond what the process may lock, it stays unlocked.
pub(super) fn lock(range: &Range<usize>) {
    // SAFETY: locking changes no content.
    let _ = unsafe { rustix::mm::mlock(pointer(range.start), range.len()) };
}

fn refuses_hint(address: usize) -> bool {
    let page = address / page_size() * page_size();
    // SAFETY: the hint changes no content: a page may be written to swap earlier than others.
    unsafe { rustix::mm::madvise(pointer(page), page_size(), Advice::LinuxCold) == Err(Errno::INVAL) }
}

/// Whether the hint is known (since Linux 5.4) and new memory is not locked by itself.
fn can_tell() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let (none, flags) = (std::ptr::null_mut(), MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice, which nobody else knows.
        unsafe {
            let Ok(probe) = rustix::mm::mmap_anonymous(none, page_size(), ProtFlags::READ, flags) else {
                return false;
            };
            let answer = !refuses_hint(probe as usize);
            let _ = rustix::mm::munmap(probe, page_size());
            answer
        }
    })
}
