//! The lane page: what a lane of the router tells every client. Clients map it read-only.

use std::sync::atomic::Ordering;

use super::Window;

/// The page of one lane.
#[derive(Clone, Debug)]
pub struct LanePage(Window);

impl LanePage {
    /// Wraps the page.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self(window)
    }

    /// Whether the lane sleeps, so that a doorbell must be followed by a write to its eventfd (owner, after `Doorbells::ring`).
    #[inline]
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.0.u32(0).load(Ordering::SeqCst) != 0
    }

    /// Says that the lane is about to sleep, or awake again (router). After `true` the lane looks at all doorbells
    /// once more: with the fences in `Doorbells::ring` either it sees the bit or the owner sees the flag.
    pub fn set_asleep(&self, asleep: bool) {
        self.0.u32(0).store(u32::from(asleep), Ordering::SeqCst);
    }
}
