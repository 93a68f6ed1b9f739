//! Fences of which the rare side pays for both.
//!
//! Two that each write a word and then read the other's need a full fence between the two, or both may read what was
//! there before. Where one of them does it for each work request and the other hardly ever, the first does without
//! ([`light`]) and the second has the kernel put a fence into every thread that runs just then ([`heavy`], membarrier(2)):
//! either it sees the word, or whoever wrote it has not read the other one yet.
//!
//! It holds for processes that are registered; in others the light fence is a full one.

use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

use rustix::thread::{MembarrierCommand, membarrier};

static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Registers this process, if the kernel lets it and does such fences for it. Once is enough; quick while the process
/// has one thread, some milliseconds later.
pub fn register() -> bool {
    let done = membarrier(MembarrierCommand::RegisterGlobalExpedited).is_ok() && heavy();
    REGISTERED.store(done, Ordering::SeqCst);
    done
}

/// Whether light fences are light in this process.
#[inline]
#[must_use]
pub fn is_registered() -> bool {
    REGISTERED.load(Ordering::Relaxed)
}

/// The fence of the frequent side. `light` tells whether the other side makes heavy ones.
#[inline]
pub fn light(light: bool) {
    if light { compiler_fence(Ordering::SeqCst) } else { fence(Ordering::SeqCst) }
}

/// The fence of the rare side. False: the kernel does not do it, and only this thread has made one.
#[cold]
pub fn heavy() -> bool {
    fence(Ordering::SeqCst);
    membarrier(MembarrierCommand::GlobalExpedited).is_ok()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicU32,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn one_of_two_sees_the_other_though_only_the_rare_one_pays() {
        if !register() {
            return println!("SKIP light fences: this kernel has no expedited membarrier");
        }
        let (frequent, rare, round) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let blind = thread::scope(|scope| {
            let missed = scope.spawn(|| {
                let mut missed = Vec::new();
                for now in 1.. {
                    while round.load(Ordering::Acquire) < now {
                        std::hint::spin_loop();
                    }
                    if now == u32::MAX || round.load(Ordering::Relaxed) == u32::MAX {
                        return missed;
                    }
                    frequent.store(now, Ordering::Relaxed);
                    light(true);
                    // It may be the next round's by now.
                    missed.push(rare.load(Ordering::Relaxed) < now);
                }
                missed
            });
            let limit = Instant::now() + Duration::from_millis(300);
            let mut unseen = Vec::new();
            for now in (1..20_000).take_while(|_| Instant::now() < limit) {
                round.store(now, Ordering::Release);
                rare.store(now, Ordering::Relaxed);
                assert!(heavy());
                unseen.push(frequent.load(Ordering::Relaxed) != now);
                let patience = Instant::now() + Duration::from_secs(30);
                while frequent.load(Ordering::Acquire) != now && Instant::now() < patience {
                    thread::yield_now();
                }
            }
            round.store(u32::MAX, Ordering::Release);
            let missed = missed.join().unwrap();
            unseen.iter().zip(&missed).filter(|(unseen, missed)| **unseen && **missed).count()
        });
        assert_eq!(blind, 0, "both missed the other's word");
    }
}
