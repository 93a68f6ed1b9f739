//! A bad cable between two network namespaces: packets of two TUN devices are carried from the one to the other, late,
//! out of order, or not at all, as a file says.
//!
//! The kernel's own `netem` does the same, where the kernel has it.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

/// The device's name at each end.
const NAME: &[u8] = b"wire0";
/// `TUNSETIFF` of `linux/if_tun.h`, and its flags.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TUN: i16 = 1;
const IFF_NO_PI: i16 = 0x1000;
/// How often the file is read.
const LOOK: Duration = Duration::from_millis(20);
/// Packets on their way.
const MOST: usize = 20_000;

/// What the cable does to packets.
#[derive(Clone, Copy, Debug, Default)]
struct Conditions {
    delay_us: u64,
    jitter_us: u64,
    /// Of a thousand packets so many are lost.
    lost: u64,
    /// Of a thousand so many overtake those before them.
    early: u64,
    /// Of a thousand so many come twice.
    twice: u64,
}

impl Conditions {
    /// Five numbers; what the file does not say is nothing.
    fn read(path: &str) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or(0)).chain([0; 5]);
        let mut next = || numbers.next().unwrap_or(0);
        Self { delay_us: next(), jitter_us: next(), lost: next(), early: next(), twice: next() }
    }
}

/// Carries packets for so long, or until it is killed.
pub(crate) fn run(left: &str, right: &str, conditions: &str, life: Duration) -> Result<()> {
    let mut ends = [end(left)?, end(right)?];
    println!("READY");
    std::io::stdout().flush()?;
    let (start, mut looked) = (Instant::now(), Instant::now());
    let mut on_way = BinaryHeap::<Reverse<(Instant, u64, usize, Vec<u8>)>>::new();
    let (mut count, mut dice) = (0, Dice(0x9e37_79b9_7f4a_7c15));
    let mut now_so = Conditions::read(conditions);
    let mut packet = vec![0; 70_000];
    while start.elapsed() < life {
        if looked.elapsed() > LOOK {
            (looked, now_so) = (Instant::now(), Conditions::read(conditions));
        }
        wait(&ends, on_way.peek().map(|Reverse((due, ..))| *due))?;
        for (from, end) in ends.iter_mut().enumerate() {
            while let Ok(len) = end.read(&mut packet) {
                let copies = 1 + u64::from(dice.falls(now_so.twice));
                for _ in 0..copies {
                    if dice.falls(now_so.lost) || on_way.len() >= MOST {
                        continue;
                    }
                    let jitter = dice.next() % (now_so.jitter_us + 1);
                    let delay = if dice.falls(now_so.early) { 0 } else { now_so.delay_us + jitter };
                    count += 1;
                    let due = Instant::now() + Duration::from_micros(delay);
                    on_way.push(Reverse((due, count, 1 - from, packet[..len].to_vec())));
                }
            }
        }
        while on_way.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Some(Reverse((_, _, to, bytes))) = on_way.pop() else { break };
            // A device that is down, or full, loses it.
            let _ = ends[to].write(&bytes);
        }
    }
    bail!("nobody ended this cable")
}

/// A TUN device in a network namespace, which does not block.
fn end(namespace: &str) -> Result<File> {
    let namespace = File::open(Path::new(namespace)).with_context(|| format!("no namespace {namespace}"))?;
    // SAFETY: changes the network namespace of this thread, the only one; the descriptor is live.
    let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    ensure!(entered == 0, "cannot enter: {}", std::io::Error::last_os_error());
    let tun = File::options().read(true).write(true).open("/dev/net/tun").context("no TUN devices")?;
    // SAFETY: all zeros is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
    // SAFETY: a live descriptor and a request that lives for the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    ensure!(made == 0, "cannot make a TUN device: {}", std::io::Error::last_os_error());
    // SAFETY: a live descriptor.
    let flags = unsafe { libc::fcntl(tun.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    ensure!(flags == 0, "fcntl: {}", std::io::Error::last_os_error());
    Ok(tun)
}

/// Waits for a packet, or until one is due, or until it is time to look at the file.
fn wait(ends: &[File; 2], due: Option<Instant>) -> Result<()> {
    let left = due.map_or(LOOK, |due| due.saturating_duration_since(Instant::now()).min(LOOK));
    let mut fds =
        ends.each_ref().map(|end| libc::pollfd { fd: end.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    let timeout = libc::timespec { tv_sec: 0, tv_nsec: left.as_nanos() as libc::c_long };
    // SAFETY: two live descriptors in an array that lives for the call, and a live timeout.
    let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), 2, &raw const timeout, std::ptr::null()) };
    ensure!(ready >= 0, "ppoll: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Xorshift: the same falls in each run.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Whether one of so many in a thousand.
    fn falls(&mut self, of_thousand: u64) -> bool {
        self.next() % 1000 < of_thousand
    }
}
