//! Huge pages for tests that ask for some, set aside while they run.

use std::{
    fs::{self, File},
    io,
};

use rustix::fs::{FlockOperation, flock};

/// Pages of 2 MiB that the kernel keeps for whoever asks for huge ones.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages that were added to the kernel's pool, and are taken out again at the end.
#[derive(Debug)]
pub struct HugePages(u64);

impl HugePages {
    /// Adds `pages` of 2 MiB, as many as the kernel has. `None` where it has none, or this user may not.
    pub fn set_aside(pages: u64) -> Option<Self> {
        let (before, after) = change(|pool| pool + pages).ok()?;
        let added = after.saturating_sub(before);
        (added > 0).then_some(Self(added))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = change(|pool| pool.saturating_sub(self.0));
    }
}

/// Changes the size of the pool, one process at a time: what others have added stays. Its size before and after.
fn change(new: impl Fn(u64) -> u64) -> io::Result<(u64, u64)> {
    let lock = File::open(POOL)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let before = size()?;
    fs::write(POOL, new(before).to_string())?;
    Ok((before, size()?))
}

fn size() -> io::Result<u64> {
    fs::read_to_string(POOL)?.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn many_at_once_take_out_no_more_than_they_have_added() {
        let Some(first) = HugePages::set_aside(1) else {
            println!(
                "SKIP many_at_once_take_out_no_more_than_they_have_added: no huge pages can be set aside here"
            );
            return;
        };
        thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| (0..10).for_each(|_| drop(HugePages::set_aside(2))))));
        });
        assert!(size().unwrap() >= first.0, "the first one's were taken out by others");
    }
}
