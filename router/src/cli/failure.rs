//! A failure and the exit code it ends the program with.

/// Anything that has no code of its own.
pub(crate) const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
pub(crate) const USAGE: u8 = 2;
/// `router`: another router serves this socket.
pub(crate) const ROUTER_LIVES: u8 = 3;
/// `run`: its program was not started, as of env(1).
pub(crate) const RUN_FAILED: u8 = 125;
/// `run`: the program was found but cannot be executed.
pub(crate) const RUN_NOT_EXECUTABLE: u8 = 126;
/// `run`: there is no such program.
pub(crate) const RUN_NOT_FOUND: u8 = 127;

/// Why the program ends, and with which exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(code: u8, error: impl Into<anyhow::Error>) -> Self {
        Self { code, error: error.into() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { code: FAILED, error }
    }
}
