//! What the machine itself takes to hand a word from one spinning thread to another through a third that sleeps:
//! the floor below which no isolated latency can be where there are fewer cores than the three.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::thread::{futex, sched_yield};

const ROUNDS: u32 = 20_000;
/// On a busy machine fewer rounds must do.
const LIMIT: Duration = Duration::from_secs(2);

/// Two mailboxes and a sleeper that carries between them.
#[derive(Debug, Default)]
struct Post {
    posted: [AtomicU32; 2],
    delivered: [AtomicU32; 2],
    asleep: AtomicBool,
    word: AtomicU32,
    ended: AtomicBool,
}

/// Half of the typical round trip.
pub fn one_way() -> Duration {
    let post = Post::default();
    thread::scope(|scope| {
        scope.spawn(|| post.carry());
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                post.await_delivery(1, round);
                post.send(1, round);
            }
        });
        let began = Instant::now();
        let mut trips: Vec<_> = (1..=ROUNDS)
            .take_while(|_| began.elapsed() < LIMIT)
            .map(|round| {
                let start = Instant::now();
                post.send(0, round);
                post.await_delivery(0, round);
                start.elapsed()
            })
            .collect();
        post.ended.store(true, Ordering::SeqCst);
        post.wake();
        trips.sort_unstable();
        trips[trips.len() / 2] / 2
    })
}

impl Post {
    fn send(&self, from: usize, round: u32) {
        self.posted[from].store(round, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
            sched_yield();
        }
    }

    fn wake(&self) {
        self.word.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&self.word, futex::Flags::PRIVATE, 1);
    }

    fn await_delivery(&self, to: usize, round: u32) {
        while self.delivered[to].load(Ordering::SeqCst) != round && !self.ended.load(Ordering::SeqCst) {
            spin_loop();
        }
    }

    /// The sleeper.
    fn carry(&self) {
        while !self.ended.load(Ordering::SeqCst) {
            if self.deliver() {
                continue;
            }
            let seen = self.word.load(Ordering::SeqCst);
            self.asleep.store(true, Ordering::SeqCst);
            if !self.deliver() && !self.ended.load(Ordering::SeqCst) {
                let _ = futex::wait(&self.word, futex::Flags::PRIVATE, seen, None);
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }

    fn deliver(&self) -> bool {
        let mut any = false;
        for from in 0..2 {
            let round = self.posted[from].load(Ordering::SeqCst);
            any |= self.delivered[1 - from].swap(round, Ordering::SeqCst) != round;
        }
        any
    }
}
