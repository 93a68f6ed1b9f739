//! Why a router cannot serve.

use std::io;

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Something that it needs cannot be made.
    #[error("cannot set up {what}: {source}")]
    SetUp {
        /// What it is.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// Waiting for events failed.
    #[error("cannot wait for clients: {0}")]
    Wait(#[source] io::Error),
    /// The data path ended by itself.
    #[error("the data path stopped working; this is a bug, please report it with the lines above")]
    LaneEnded,
}
