//! Waking somebody who sleeps.

use std::fmt::Debug;

/// Something that can be rung: an eventfd in both seats, a counter in tests.
pub trait Bell: Send + Sync + Debug {
    /// Rings. Never blocks; a bell that cannot be rung is its owner's loss.
    fn ring(&self);
}
