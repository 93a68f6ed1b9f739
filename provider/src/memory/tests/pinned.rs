//! Pages that the kernel keeps in place for io_uring.

use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::super::pinned::Pinned;
use super::forking::in_child;
use super::{Memory, all, drops_to_zero, fill, mover, seen, used};

/// An io_uring that keeps these pages until it is dropped; `None` where there is none to be had.
fn pin(memory: &Range<usize>) -> Option<OwnedFd> {
    let mut params = [0u32; 30];
    // SAFETY: the kernel fills a structure of that size.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if ring < 0 {
        return None;
    }
    // SAFETY: made just now.
    let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
    let piece = libc::iovec { iov_base: memory.start as *mut _, iov_len: memory.len() };
    // SAFETY: IORING_REGISTER_BUFFERS reads one live vector.
    let done =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), 0, &raw const piece, 1) };
    (done == 0).then_some(ring)
}

/// In a child: the pages of a whole process count.
#[test]
fn nothing_with_content_moves_while_pages_are_pinned() {
    assert!(in_child(|| {
        let (sut, router) = mover();
        let [moved, late, fresh] = [(); 3].map(|()| Memory::pages(6));
        moved.fill(1);
        late.fill(2);
        let early = sut.register(moved.start(), moved.0.len(), true).unwrap();
        let Some(ring) = pin(&moved.0) else {
            eprintln!("SKIP nothing_with_content_moves_while_pages_are_pinned: no io_uring buffers here");
            return true;
        };
        let stays = sut.register(late.start(), late.0.len(), true).unwrap();
        let moves = sut.register(fresh.start(), fresh.0.len(), true).unwrap();
        let as_promised = stays.shared().is_empty() && moves.shared() == fresh.0;
        fill(&fresh.0, 3);
        sut.deregister(early);
        sut.deregister(moves);
        let kept = seen(&router, moved.start()) == 1 && seen(&router, fresh.start()) == 3;
        drop(ring);
        // The ring goes a little later than its descriptor.
        let began = std::time::Instant::now();
        while Pinned::open().any() && began.elapsed() < super::Duration::from_secs(20) {
            std::thread::yield_now();
        }
        sut.deregister(stays);
        let is_whole = all(&moved.0, 1) && all(&late.0, 2) && all(&fresh.0, 3);
        as_promised && kept && is_whole && used(&router) == 0 && drops_to_zero(moved.start())
    }));
}
