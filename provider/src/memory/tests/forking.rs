//! What a forked child sees, and what it cannot do to its parent.
//!
//! Children answer with their exit status and call nothing that could wait for a thread they do not have.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::memory::on_fork_child;
use crate::memory::region::copy_data;

/// Runs `work` in a forked child, which has no other threads; its answer, which is no where it panics.
pub(in crate::memory) fn in_child(work: impl FnOnce() -> bool) -> bool {
    // Without the handlers another test may hold the world's lock for ever, as the child sees it.
    crate::memory::fork::install().unwrap();
    // SAFETY: the child runs only `work` and leaves by _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let status = if answer.unwrap_or(false) { 0 } else { 1 };
        // SAFETY: ends the child without running the test harness' own exit.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status), "the child was killed by signal {}", libc::WTERMSIG(status));
    libc::WEXITSTATUS(status) == 0
}

#[test]
fn a_child_sees_the_memory_and_writes_only_into_its_own() {
    let (sut, router) = mover();
    let memory = Memory::pages(5);
    memory.fill(20);
    let inner = memory.start() + 1..memory.0.end - 1;
    let mr = sut.register(inner.start, inner.len(), true).unwrap();
    assert_eq!(mr.shared().len(), 3 * page_size());
    assert!(in_child(|| {
        let saw = all(&memory.0, 20);
        memory.fill(99);
        saw && all(&memory.0, 99)
    }));
    assert!(all(&memory.0, 20));
    assert_eq!(seen(&router, mr.shared().start), 20);
    sut.deregister(mr);
    assert!(all(&memory.0, 20));
}

#[test]
fn what_was_advised_for_fork_changes_nothing() {
    let (sut, _router) = mover();
    let (memory, page) = (Memory::pages(5), page_size());
    memory.fill(21);
    let mr = sut.register(memory.start() + 8, memory.0.len() - 16, true).unwrap();
    let advise = |range: Range<usize>, advice| {
        // SAFETY: the test's own mapping; the advice changes only what a child gets.
        unsafe { rustix::mm::madvise(pointer(range.start), range.len(), advice) }.unwrap();
    };
    // The first is what libibverbs says of registered memory after `ibv_fork_init`, the second what it says when it
    // is not registered any more.
    advise(memory.0.clone(), Advice::LinuxDontFork);
    advise(memory.start() + 2 * page..memory.start() + 3 * page, Advice::LinuxDoFork);
    assert!(in_child(|| {
        let saw = all(&memory.0, 21);
        memory.fill(99);
        saw && all(&memory.0, 99)
    }));
    assert!(all(&memory.0, 21));
    sut.deregister(mr);
}

#[test]
fn a_child_sees_the_moment_of_the_fork() {
    let (sut, _router) = mover();
    let memory = Memory::new(8 << 20);
    memory.fill(1);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    // SAFETY: the child only looks at memory and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: see above.
        unsafe { libc::_exit(if all(&memory.0, 1) { 0 } else { 1 }) };
    }
    memory.fill(2);
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
    sut.deregister(mr);
    assert!(all(&memory.0, 2));
}

#[test]
fn a_child_keeps_protection_and_untouched_pages() {
    let (sut, _router) = mover();
    let (memory, large) = (Memory::pages(2), Memory::new(3 << 30));
    memory.fill(30);
    set(large.start() + (2 << 30), 31);
    memory.protect(MprotectFlags::READ);
    let small = sut.register(memory.start(), memory.0.len(), false).unwrap();
    let sparse = sut.register(large.start(), large.0.len(), true).unwrap();
    assert!(in_child(|| {
        let there = byte(large.start() + (2 << 30)) == 31 && byte(large.start()) == 0;
        set(large.start() + 1, 32);
        let mapping = crate::memory::maps::select(&memory.0, |_| true).unwrap().remove(0);
        there && all(&memory.0, 30) && mapping.prot == ProtFlags::READ && mapping.is_private_anonymous()
    }));
    assert_eq!(byte(large.start() + 1), 0);
    sut.deregister(small);
    sut.deregister(sparse);
}

#[test]
fn a_copy_ends_where_its_budget_ends() {
    let (sut, router) = mover();
    let (memory, copy, page) = (Memory::pages(8), Memory::pages(8), page_size());
    let touched = memory.start() + 2 * page..memory.start() + 6 * page;
    fill(&touched, 35);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    let copied = copy_data(router.as_fd(), memory.start(), &copy.0, 3 * page);
    assert_eq!(copied, Ok((3 * page, Some(copy.start() + 5 * page))));
    assert!(all(&(copy.start() + 2 * page..copy.start() + 5 * page), 35));
    let copied = copy_data(router.as_fd(), memory.start(), &copy.0, 4 * page);
    assert_eq!(copied, Ok((4 * page, None)));
    sut.deregister(mr);
}

#[test]
fn a_mover_is_dead_in_a_child_which_may_make_its_own() {
    static CALLED: AtomicU32 = AtomicU32::new(0);
    on_fork_child(|| {
        CALLED.fetch_add(1, Ordering::Relaxed);
    })
    .unwrap();
    let (sut, _router) = mover();
    let memory = Memory::pages(2);
    memory.fill(40);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert!(!sut.is_child());
    assert!(in_child(|| {
        let dead = sut.is_child() && CALLED.load(Ordering::Relaxed) == 1;
        let refused = sut.register(memory.start(), memory.0.len(), true) == Err(RegisterError::Forked);
        let (own, router) = mover();
        let own_mr = own.register(memory.start(), memory.0.len(), true).unwrap();
        let shared = own_mr.shared() == memory.0 && seen(&router, memory.start()) == 40;
        let grandchild = in_child(|| own.is_child() && all(&memory.0, 40));
        own.deregister(own_mr);
        dead && refused && shared && grandchild && all(&memory.0, 40)
    }));
    assert_eq!(CALLED.load(Ordering::Relaxed), 0);
    sut.deregister(mr);
    assert!(all(&memory.0, 40));
}

#[test]
fn threads_fork_and_register_at_the_same_time() {
    let (sut, router) = mover();
    let steady = Memory::pages(16);
    steady.fill(50);
    let mr = sut.register(steady.start(), steady.0.len(), true).unwrap();
    std::thread::scope(|scope| {
        for value in 0..2u8 {
            let sut = &sut;
            scope.spawn(move || {
                let memory = Memory::pages(64);
                for _ in 0..100 {
                    memory.fill(value);
                    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
                    assert!(all(&memory.0, value));
                    sut.deregister(mr);
                    assert!(all(&memory.0, value));
                }
            });
        }
        for _ in 0..30 {
            assert!(in_child(|| all(&steady.0, 50)));
        }
    });
    sut.deregister(mr);
    assert_eq!(used(&router), 0);
}

#[test]
fn a_program_started_by_posix_spawn_leaves_moved_memory_alone() {
    let (sut, _router) = mover();
    let memory = Memory::pages(4);
    memory.fill(60);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert!(std::process::Command::new("true").status().unwrap().success());
    assert!(all(&memory.0, 60));
    sut.deregister(mr);
}
