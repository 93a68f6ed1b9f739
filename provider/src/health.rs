//! Whether an opened device can still be used: its router may have died, or this process be a fork of its owner.

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::abi::edge::Errno;
use crate::memory;

/// How many forks lie between this process and the one that loaded the provider.
static FORKS: AtomicU32 = AtomicU32::new(0);

fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// The health of one opened device.
#[derive(Debug)]
pub(crate) struct Health {
    dead: AtomicBool,
    forks: u32,
}

impl Health {
    pub(crate) fn new() -> io::Result<Health> {
        static ONCE: Once = Once::new();
        let mut result = Ok(());
        ONCE.call_once(|| result = memory::on_fork_child(forked));
        result?;
        Ok(Health { dead: AtomicBool::new(false), forks: FORKS.load(Ordering::Relaxed) })
    }

    /// Whether the router is gone. What was posted is then flushed by the provider itself.
    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Whether this process inherited the device: it is the parent's.
    #[inline]
    pub(crate) fn is_child(&self) -> bool {
        self.forks != FORKS.load(Ordering::Relaxed)
    }

    /// Notes the router's death; true the first time.
    pub(crate) fn mark_dead(&self) -> bool {
        !self.dead.swap(true, Ordering::SeqCst)
    }

    /// Refuses what only the process that opened the device may do.
    #[inline]
    pub(crate) fn check_owner(&self) -> Result<(), Errno> {
        if self.is_child() { Err(Errno::NODEV) } else { Ok(()) }
    }
}
