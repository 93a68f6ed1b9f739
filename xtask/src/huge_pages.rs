//! Huge pages for tests that ask for some, set aside while they run.

use std::fs;

/// Pages of 2 MiB that the kernel keeps for whoever asks for huge ones.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages that were added to the kernel's pool, and are taken out again at the end.
#[derive(Debug)]
pub struct HugePages(u64);

impl HugePages {
    /// Adds `pages` of 2 MiB, as many as the kernel has. `None` where it has none, or this user may not.
    pub fn set_aside(pages: u64) -> Option<Self> {
        let before = pool()?;
        fs::write(POOL, (before + pages).to_string()).ok()?;
        let lent = Self(pool()?.saturating_sub(before));
        (lent.0 > 0).then_some(lent)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Others may have added some meanwhile: theirs stay.
        if let Some(now) = pool() {
            let _ = fs::write(POOL, now.saturating_sub(self.0).to_string());
        }
    }
}

fn pool() -> Option<u64> {
    fs::read_to_string(POOL).ok()?.trim().parse().ok()
}
