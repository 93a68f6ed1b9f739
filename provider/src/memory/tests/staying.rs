//! Pages that a router reaches where they lie are not moved under its hands, and moved ones not sent home.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::forking::in_child;
use super::*;
use crate::memory::world;

#[test]
fn a_page_that_stays_for_one_registration_is_not_moved_for_another() {
    let (sut, router) = mover();
    let (memory, page) = (Memory::pages(6), page_size());
    memory.fill(3);
    let small = sut.register(memory.start() + page + 10, 20, true).unwrap();
    let large = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert_eq!(large.shared(), memory.start() + 2 * page..memory.0.end);
    sut.deregister(small);
    let again = sut.register(memory.start(), 2 * page, true).unwrap();
    assert!(again.shared().is_empty(), "both stay for the large one");
    sut.deregister(large);
    sut.deregister(again);
    let whole = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert_eq!(whole.shared(), memory.0, "nobody is left for whom a page stays");
    sut.deregister(whole);
    assert!(all(&memory.0, 3));
    assert_eq!(used(&router), 0);
}

#[test]
fn a_few_bytes_on_moved_pages_are_reached_there_and_keep_them() {
    let (sut, router) = mover();
    let (memory, page) = (Memory::pages(4), page_size());
    memory.fill(4);
    let large = sut.register(memory.start(), memory.0.len(), true).unwrap();
    let small = sut.register(memory.start() + 2 * page - 8, 16, true).unwrap();
    assert_eq!(small.shared(), memory.start() + page..memory.start() + 3 * page);
    sut.deregister(large);
    router_writes(&router, memory.start() + 2 * page - 8, 5);
    assert_eq!(byte(memory.start() + 2 * page - 8), 5);
    assert!(drops_to_zero(memory.start()), "this page is the program's own again");
    sut.deregister(small);
    assert_eq!(byte(memory.start() + 2 * page - 8), 5);
    assert!(drops_to_zero(memory.start() + page));
    assert_eq!(used(&router), 0);
}

#[test]
fn pages_stay_moved_while_another_device_reaches_them_in_place() {
    let ((one, router), (two, _)) = (mover(), mover());
    let memory = Memory::pages(4);
    memory.fill(13);
    let first = one.register(memory.start(), memory.0.len(), true).unwrap();
    let second = two.register(memory.start(), memory.0.len(), true).unwrap();
    one.deregister(first);
    assert_eq!(seen(&router, memory.start()), 13, "the other's router may be writing");
    two.deregister(second);
    assert_eq!(used(&router), 0);
    assert!(all(&memory.0, 13));
    assert!(drops_to_zero(memory.start()));
}

#[test]
fn pages_that_are_kept_as_they_are_do_not_move() {
    let (sut, router) = mover();
    let memory = Memory::pages(4);
    memory.fill(8);
    let kept = sut.keep(memory.start() + 5, 3 * page_size());
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert!(mr.shared().is_empty());
    sut.deregister(mr);
    sut.deregister(kept);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    let kept = sut.keep(memory.start(), memory.0.len());
    sut.deregister(mr);
    assert_eq!(seen(&router, memory.start()), 8, "somebody may be writing there");
    sut.deregister(kept);
    assert_eq!(used(&router), 0);
    assert!(all(&memory.0, 8));
}

/// In a child, for its world alone: another thread that cannot be stopped, then one that can.
#[test]
fn without_peace_nothing_moves_and_all_is_made_up_for_later() {
    assert!(in_child(|| {
        let (sut, router) = mover();
        let (memory, other) = (Memory::pages(4), Memory::pages(4));
        memory.fill(1);
        let early = sut.register(memory.start(), memory.0.len(), true).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let never = Instant::now() + Duration::from_secs(3600);
            world::lock().books.peace.not_before = Some(never);
            let late = sut.register(other.start(), other.0.len(), true).unwrap();
            let stays = late.shared().is_empty() && early.shared() == memory.0;
            sut.deregister(early);
            let kept = all(&memory.0, 1) && seen(&router, memory.start()) == 1;
            world::lock().books.peace.not_before = None;
            sut.deregister(late);
            over.store(true, Ordering::Relaxed);
            stays && kept && used(&router) == 0 && all(&memory.0, 1) && drops_to_zero(memory.start())
        })
    }));
}
