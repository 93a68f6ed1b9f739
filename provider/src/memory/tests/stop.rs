//! Threads stop, whatever they do, and go on as if nothing had been.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::memory::tests::forking::in_child;
use crate::memory::tests::writers::Ends;
use crate::memory::world;

/// Runs `others` in threads while `work` runs; they end when the flag says so.
fn beside(others: &[&(dyn Fn(&AtomicBool) + Sync)], work: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for other in others {
            scope.spawn(|| other(&over));
        }
        let _ends = Ends(&over);
        work();
    });
}

fn spin(over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// Peace, under the lock that all who make it hold.
fn peace() -> impl Sized {
    let mut world = world::lock();
    let peace = world.books.peace.make().unwrap();
    // In this order: whoever waits for the lock must be able to run when it is free.
    (peace, world)
}

#[test]
fn running_threads_stand_still_and_go_on() {
    let counters = [const { AtomicU64::new(0) }; 3];
    let count = |counter: &AtomicU64, over: &AtomicBool| {
        while !over.load(Ordering::Relaxed) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    };
    let now = || counters.each_ref().map(|counter| counter.load(Ordering::Relaxed));
    let threads = counters.each_ref().map(|counter| move |over: &AtomicBool| count(counter, over));
    beside(&[&threads[0], &threads[1], &threads[2]], || {
        for _ in 0..50 {
            let stopped = peace();
            let before = now();
            for _ in 0..50 {
                rustix::thread::sched_yield();
            }
            assert_eq!(now(), before);
            drop(stopped);
            let began = Instant::now();
            while now().iter().zip(before).any(|(now, before)| *now == before) {
                assert!(began.elapsed() < Duration::from_secs(20), "a thread does not go on");
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn blocking_calls_go_on_where_they_were() {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let asleep = |_: &AtomicBool| {
        let nap = libc::timespec { tv_sec: 0, tv_nsec: 300_000_000 };
        let began = Instant::now();
        // SAFETY: a live time, and nowhere to say what is left.
        assert_eq!(unsafe { libc::nanosleep(&nap, ptr::null_mut()) }, 0, "interrupted");
        assert!(began.elapsed() >= Duration::from_millis(300));
    };
    let polling = |_: &AtomicBool| {
        // SAFETY: no descriptors.
        assert_eq!(unsafe { libc::poll(ptr::null_mut(), 0, 300) }, 0, "interrupted");
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut word = [0];
            // SAFETY: one byte of room. The raw call, because the library's would try again.
            let got = unsafe { libc::read(reader.as_raw_fd(), word.as_mut_ptr().cast(), 1) };
            assert_eq!((got, word[0]), (1, 7), "interrupted");
            assert_eq!(reader.read(&mut word).unwrap(), 0);
        });
        beside(&[&asleep, &polling], || {
            for _ in 0..50 {
                drop(peace());
                std::thread::sleep(Duration::from_millis(2));
            }
            writer.write_all(&[7]).unwrap();
            drop(writer);
        });
    });
}

#[test]
fn threads_that_come_and_go_are_no_trouble() {
    static RUNNING: AtomicU64 = AtomicU64::new(0);
    let breed = |over: &AtomicBool| {
        while !over.load(Ordering::Relaxed) {
            let busy = || {
                (0..1000).for_each(|_| {
                    RUNNING.fetch_add(1, Ordering::Relaxed);
                })
            };
            std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(busy))));
        }
    };
    beside(&[&breed, &breed], || {
        for _ in 0..60 {
            let stopped = peace();
            let before = RUNNING.load(Ordering::Relaxed);
            for _ in 0..20 {
                rustix::thread::sched_yield();
            }
            assert_eq!(RUNNING.load(Ordering::Relaxed), before);
            drop(stopped);
        }
    });
}

#[test]
fn signals_that_come_meanwhile_come_later() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: c_int) {
        SEEN.fetch_add(1, Ordering::Relaxed);
    }
    let signal = libc::SIGRTMIN() + 7;
    // SAFETY: a handler that adds to an atomic, for a signal that nobody else uses.
    unsafe { libc::signal(signal, handler as extern "C" fn(c_int) as libc::sighandler_t) };
    let number = AtomicI32::new(0);
    let target = |over: &AtomicBool| {
        number.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
        while !over.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    };
    beside(&[&target], || {
        while number.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
        let send = || {
            // SAFETY: a signal with a handler, for a thread of this process.
            let sent = unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), number.load(Ordering::Relaxed), signal)
            };
            assert_eq!(sent, 0);
        };
        for _ in 0..60 {
            send();
            let stopped = peace();
            send();
            drop(stopped);
        }
        let began = Instant::now();
        while SEEN.load(Ordering::Relaxed) < 120 {
            assert!(began.elapsed() < Duration::from_secs(20), "{SEEN:?} of 120 signals came");
            std::thread::yield_now();
        }
    });
}

#[test]
fn nothing_is_left_of_a_stop() {
    let mappings = || crate::memory::maps::count().unwrap();
    let children = || {
        // SAFETY: no status is wanted, and nobody is waited for.
        unsafe { libc::syscall(libc::SYS_wait4, -1, ptr::null_mut::<c_int>(), libc::WNOHANG, 0) }
    };
    assert!(in_child(|| {
        let mut left = false;
        beside(&[&spin], || {
            drop(peace());
            let before = mappings();
            for _ in 0..50 {
                drop(peace());
            }
            // Neighbours merge and part by themselves; what leaks, leaks with each stop.
            left = mappings() > before + 10 || children() != -1;
        });
        !left
    }));
}

#[test]
fn numbers_of_threads_are_read_and_other_names_are_not() {
    assert_eq!(number(b"1234"), Some(1234));
    for name in [&b""[..], b".", b"..", b"12a", b"99999999999"] {
        assert_eq!(number(name), None);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let tasks = rustix::fs::open(c"/proc/self/task", flags, Mode::empty()).unwrap();
    use std::os::fd::AsFd;
    assert!(!is_dead(tasks.as_fd(), rustix::thread::gettid().as_raw_nonzero().get()));
    assert!(is_dead(tasks.as_fd(), c_int::MAX));
}

#[test]
fn no_privilege_is_needed() {
    // SAFETY: the child's user becomes nobody's, for whom it is made dumpable again, as any program of a user is.
    let nobody = || unsafe {
        libc::syscall(libc::SYS_setresgid, 65534, 65534, 65534) == 0
            && libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) == 0
            && libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    };
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP no_privilege_is_needed: this user has none that could be dropped");
    }
    assert!(in_child(|| {
        let mut made = nobody();
        beside(&[&spin], || {
            made &= world::lock().books.peace.make().is_ok();
        });
        made
    }));
}

/// No promise, a measurement: read it with `--nocapture`, in a release build, with nothing else running.
#[test]
fn stopping_is_measured() {
    for count in [1, 8, 64] {
        let sleeper = |over: &AtomicBool| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let threads: Vec<&(dyn Fn(&AtomicBool) + Sync)> = vec![&sleeper; count];
        beside(&threads, || {
            let began = Instant::now();
            for _ in 0..20 {
                drop(peace());
            }
            println!("{count} more threads asleep: {:?} for a stop", began.elapsed() / 20);
        });
    }
}
