//! The per-host router.
