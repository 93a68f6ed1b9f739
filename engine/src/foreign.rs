//! Application memory that no seat maps, and what is to be done to it by a thread that may wait.
//!
//! Such memory is reached by system calls, and these take as long as the application's page faults take: for ever
//! if it wants. So no seat makes them. An [`Access`] says what is to be read or written; the fabric's host has it
//! performed where only that application's own requests wait, and brings it back.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{memory::Fault, place::Atomic};

/// One application's memory, as system calls reach it.
pub trait Foreign {
    /// Fills `into` from `addr` on.
    ///
    /// # Errors
    /// [`Fault`] when it cannot be read whole.
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault>;

    /// Writes `from` to `addr` on.
    ///
    /// # Errors
    /// [`Fault`] when it cannot be written whole.
    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault>;
}

/// A run of foreign bytes, and where in the buffer they belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) addr: u64,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// Runs and their buffer.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) runs: Vec<Run>,
    pub(crate) bytes: Vec<u8>,
}

/// What is to be done, checked already.
#[derive(Debug)]
pub(crate) enum Task {
    /// Fill the buffer.
    Read(Batch),
    /// Write the buffer out, first run first.
    Write(Batch),
    /// Change an aligned word. Atomic against all others of this memory, for one thread performs them.
    Atomic { addr: u64, operation: Atomic, found: u64 },
}

/// What sort of task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Atomic,
}

impl Task {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Read(_) => Kind::Read,
            Self::Write(_) => Kind::Write,
            Self::Atomic { .. } => Kind::Atomic,
        }
    }
}

/// An access to one client's memory. All of a client's must be performed one after the other, in the order in
/// which they were given out, and brought back in that order ([`crate::Fabric::finish`]).
#[derive(Debug)]
pub struct Access {
    pub(crate) ticket: u64,
    pub(crate) client: u32,
    pub(crate) task: Task,
    /// Nobody waits for it any more.
    pub(crate) cancelled: Arc<AtomicBool>,
    /// Whether all of it was done.
    pub(crate) done: bool,
}

impl Access {
    /// Whose memory it is.
    #[must_use]
    pub fn client(&self) -> u32 {
        self.client
    }

    /// Whether it was performed in vain, or not at all.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        !self.done
    }

    /// Does it. One that is not performed counts as failed.
    pub fn perform(&mut self, memory: &impl Foreign) {
        self.done = self.try_perform(memory).is_ok();
    }

    fn try_perform(&mut self, memory: &impl Foreign) -> Result<(), Fault> {
        let cancelled = &self.cancelled;
        let go_on = || if cancelled.load(Ordering::SeqCst) { Err(Fault) } else { Ok(()) };
        match &mut self.task {
            Task::Read(Batch { runs, bytes }) => runs.iter().try_for_each(|run| {
                go_on()?;
                memory.read(run.addr, bytes.get_mut(run.at..run.at + run.len).ok_or(Fault)?)
            }),
            Task::Write(Batch { runs, bytes }) => runs.iter().try_for_each(|run| {
                go_on()?;
                memory.write(run.addr, bytes.get(run.at..run.at + run.len).ok_or(Fault)?)
            }),
            Task::Atomic { addr, operation, found } => {
                go_on()?;
                let mut word = [0; 8];
                memory.read(*addr, &mut word)?;
                *found = u64::from_ne_bytes(word);
                memory.write(*addr, &operation.apply(*found).to_ne_bytes())
            }
        }
    }
}
