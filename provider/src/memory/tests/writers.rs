//! Whoever writes into memory while it is registered and given back loses nothing.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::*;

/// How long each of these tests lets writers and registrations race.
const RACE: Duration = Duration::from_secs(2);

fn word(address: usize) -> *mut u64 {
    pointer(address).cast()
}

/// Counts in one word of each of `pages` pages by plain loads and stores, from its own books, until it is over or a
/// word is not what was written last. Returns how often it counted.
fn count_in(memory: &Range<usize>, place: usize, over: &AtomicBool) -> u64 {
    let mut round = 0;
    while !over.load(Ordering::Relaxed) {
        for page in memory.clone().step_by(page_size()) {
            // SAFETY: an aligned word of the test's own memory that no other thread writes.
            unsafe {
                let found = word(page + place).read_volatile();
                assert_eq!(found, round, "a write to {:#x} is lost", page + place);
                word(page + place).write_volatile(round + 1);
            }
        }
        round += 1;
    }
    round
}

/// Registers and gives back over and over, until the time is over.
fn register_for_a_while(sut: &Mover, memory: &Range<usize>) -> usize {
    let began = Instant::now();
    let mut cycles = 0;
    while began.elapsed() < RACE {
        let mr = sut.register(memory.start, memory.len(), true).unwrap();
        assert_eq!(mr.shared(), *memory);
        sut.deregister(mr);
        cycles += 1;
    }
    cycles
}

/// Ends a race however a test ends, so that its threads do.
pub(in crate::memory) struct Ends<'a>(pub(in crate::memory) &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn threads_that_count_in_the_memory_lose_no_count() {
    let (sut, _router) = mover();
    let (memory, over) = (Memory::pages(32), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let counters = [0, 8, page_size() - 8].map(|place| {
            let (range, over) = (memory.0.clone(), &over);
            scope.spawn(move || count_in(&range, place, over))
        });
        let cycles = {
            let _ends = Ends(&over);
            register_for_a_while(&sut, &memory.0)
        };
        let rounds = counters.map(|counter| counter.join().unwrap());
        println!("{cycles} registrations while three threads counted to {rounds:?}");
        assert!(rounds.iter().all(|&round| round > 0));
    });
}

#[test]
fn what_the_kernel_reads_into_the_memory_arrives() {
    let (sut, _router) = mover();
    let (memory, over) = (Memory::pages(8), AtomicBool::new(false));
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut reader, mut writer) = (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)));
    std::thread::scope(|scope| {
        let (range, over) = (memory.0.clone(), &over);
        scope.spawn(move || {
            for round in 1..=u64::MAX {
                writer.write_all(&round.to_ne_bytes()).unwrap();
                if over.load(Ordering::Relaxed) {
                    return;
                }
                // Now and then the reader is left asleep in the kernel for a while.
                if round % 16 == 0 {
                    std::thread::sleep(Duration::from_micros(300));
                }
            }
        });
        let received = scope.spawn(move || {
            let slots = (range.start + 16..range.end).step_by(page_size() / 2);
            for (round, slot) in (1..).zip(slots.cycle()) {
                // SAFETY: eight bytes of the test's own memory, which nobody else writes.
                let room = unsafe { std::slice::from_raw_parts_mut(pointer(slot).cast::<u8>(), 8) };
                if reader.read(room).unwrap() == 0 {
                    return round;
                }
                // SAFETY: the same bytes; volatile, because their pages may have changed.
                let got = unsafe { word(slot).read_volatile() };
                assert_eq!(got, round, "what was read into {slot:#x} is not there");
            }
            0
        });
        let cycles = {
            let _ends = Ends(over);
            register_for_a_while(&sut, &memory.0)
        };
        println!("{cycles} registrations while {} words were read", received.join().unwrap());
    });
}

#[test]
fn the_first_write_to_a_page_is_not_lost() {
    let (sut, _router) = mover();
    let (place, written, over) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let memory = Memory::pages(64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let start = place.swap(0, Ordering::AcqRel);
                if start == 0 {
                    std::hint::spin_loop();
                    continue;
                }
                (0..64).for_each(|page| set(start + page * page_size() + 5, 77));
                written.fetch_add(1, Ordering::Release);
            }
        });
        let _ends = Ends(&over);
        let began = Instant::now();
        let mut rounds = 0;
        while began.elapsed() < RACE {
            memory.map_anew();
            place.store(memory.start(), Ordering::Release);
            let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
            sut.deregister(mr);
            rounds += 1;
            while written.load(Ordering::Acquire) < rounds {
                assert!(began.elapsed() < 10 * RACE, "the writer does not go on");
                std::thread::yield_now();
            }
            for page in memory.0.clone().step_by(page_size()) {
                assert_eq!(byte(page + 5), 77, "the first write to {page:#x} is lost, in round {rounds}");
            }
        }
        println!("{rounds} rounds");
    });
}
