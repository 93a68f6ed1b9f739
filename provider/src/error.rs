//! Why a device cannot be opened, and what errno the router's refusals become.

use std::io;
use std::path::PathBuf;

use verbs_abi::proto::ProtoError;

use crate::abi::edge::Errno;

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Nobody listens where the router should.
    #[error(
        "no router answers at {} ({errno}); start one with `freeflow router` or use `freeflow run`",
        path.display()
    )]
    NoRouter { path: PathBuf, errno: Errno },
    /// Somebody listens, but does not speak as a router does.
    #[error("the router at {} does not answer as it should ({source}); restart it", path.display())]
    Silent { path: PathBuf, source: ProtoError },
    /// The router does not want this client.
    #[error("the router at {} refuses this process ({errno}); its log says why", path.display())]
    Refused { path: PathBuf, errno: Errno },
    /// The router's shared memory is not what this build knows.
    #[error("the router at {} is of another version; install the same freeflow on both sides", path.display())]
    Version { path: PathBuf },
    /// The shared memory cannot be used here.
    #[error("cannot {what}: {source}")]
    System { what: &'static str, source: io::Error },
}

impl OpenError {
    /// What C is told.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            OpenError::NoRouter { .. } => Errno::NODEV,
            OpenError::Silent { .. } => Errno::IO,
            OpenError::Refused { errno, .. } => *errno,
            OpenError::Version { .. } => Errno::PROTONOSUPPORT,
            OpenError::System { source, .. } => from_io(source),
        }
    }
}

/// The errno that the router answered with. A number that is none is the router's fault: EIO.
pub(crate) fn from_router(errno: i32) -> Errno {
    if (1..4096).contains(&errno) { Errno::from_raw_os_error(errno) } else { Errno::IO }
}

/// The errno of an I/O error.
pub(crate) fn from_io(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
