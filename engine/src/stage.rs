//! What accesses to foreign memory have brought so far for one slice of a message.
//!
//! A request whose bytes are not all mapped is attempted more than once: an attempt checks everything, finds that
//! something is missing here, says what it wants and comes to nothing; the access brings it; the next attempt
//! checks everything again and goes on. So nothing that was checked before a wait is believed after it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    foreign::{Access, Batch, Kind, Run, Task},
    place::Atomic,
    transfer::Broken,
};

/// The stage of one half of a QP; empty unless foreign memory is involved.
#[derive(Debug, Default)]
pub(crate) struct Stage(Option<Box<Staged>>);

/// One slice.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    /// Where in the message it lies, and its length.
    slice: (u64, u64),
    /// Its bytes, once they are gathered.
    pub(crate) bytes: Vec<u8>,
    /// Whether the foreign part of the source is in the buffer.
    pub(crate) fetched: bool,
    /// Whether all of the source is in the buffer.
    pub(crate) gathered: bool,
    /// The runs of the target that are written.
    pub(crate) written: Vec<Run>,
    /// What an atomic found.
    found: Option<u64>,
    broken: Option<Broken>,
    wanted: Option<Task>,
    flight: Option<Flight>,
}

/// An access on its way. Dropping it takes back what is not done yet.
#[derive(Debug)]
struct Flight {
    ticket: u64,
    kind: Kind,
    cancelled: Arc<AtomicBool>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }
}

impl Stage {
    /// Whether an access is on its way.
    #[inline]
    pub(crate) fn in_flight(&self) -> bool {
        self.0.as_ref().is_some_and(|staged| staged.flight.is_some())
    }

    /// The length of the slice at `start`, if an access was made for it.
    pub(crate) fn begun(&self, start: u64) -> Option<u64> {
        let (begun, len) = self.0.as_ref()?.slice;
        (begun == start && len > 0).then_some(len)
    }

    /// The slice of `len` bytes at `start`, emptied if it was another.
    pub(crate) fn slice(&mut self, start: u64, len: u64) -> &mut Staged {
        let staged = self.0.get_or_insert_default();
        if staged.slice != (start, len) {
            **staged = Staged { slice: (start, len), found: staged.found, ..Staged::default() };
        }
        staged
    }

    /// What an atomic of this request found earlier.
    #[inline]
    pub(crate) fn found(&self) -> Option<u64> {
        self.0.as_ref().and_then(|staged| staged.found)
    }

    /// Remembers what an atomic found: it must not be executed again when its result cannot be stored yet.
    pub(crate) fn keep_found(&mut self, word: u64) {
        self.0.get_or_insert_default().found = Some(word);
    }

    /// Asks for an atomic on a foreign word.
    ///
    /// # Errors
    /// What the last access came to, if it failed.
    pub(crate) fn want_atomic(&mut self, addr: u64, operation: Atomic) -> Result<(), Broken> {
        let staged = self.0.get_or_insert_default();
        staged.check()?;
        staged.wanted = Some(Task::Atomic { addr, operation, found: 0 });
        Ok(())
    }

    /// What sort of access is wanted or on its way.
    pub(crate) fn kind(&self) -> Option<Kind> {
        let staged = self.0.as_ref()?;
        let wanted = staged.wanted.as_ref().map(Task::kind);
        wanted.or_else(|| staged.flight.as_ref().map(|flight| flight.kind))
    }

    /// Takes what the last attempt wants, to be brought by the access with that ticket.
    pub(crate) fn launch(&mut self, ticket: u64, cancelled: &Arc<AtomicBool>) -> Option<Task> {
        let staged = self.0.as_mut()?;
        let task = staged.wanted.take()?;
        staged.flight = Some(Flight { ticket, kind: task.kind(), cancelled: Arc::clone(cancelled) });
        Some(task)
    }

    /// An access has come back. False: it is not the one that is waited for.
    pub(crate) fn arrive(&mut self, access: Access) -> bool {
        let awaited = self
            .0
            .as_mut()
            .filter(|staged| staged.flight.as_ref().is_some_and(|flight| flight.ticket == access.ticket));
        let Some(staged) = awaited else { return false };
        staged.flight = None;
        match access.task {
            _ if !access.done => {
                let source = matches!(access.task, Task::Read(_));
                staged.broken = Some(if source { Broken::Source } else { Broken::Target });
            }
            Task::Read(Batch { bytes, .. }) => (staged.bytes, staged.fetched) = (bytes, true),
            Task::Write(Batch { runs, bytes }) => (staged.bytes, staged.written) = (bytes, runs),
            Task::Atomic { found, .. } => staged.found = Some(found),
        }
        true
    }

    /// Forgets everything, and takes back what is on its way.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.0 = None;
    }
}

impl Staged {
    /// Whether the last access failed.
    pub(crate) fn check(&mut self) -> Result<(), Broken> {
        self.broken.take().map_or(Ok(()), Err)
    }

    /// Asks for the foreign runs of the source.
    pub(crate) fn want_read(&mut self, runs: Vec<Run>) {
        self.wanted = Some(Task::Read(Batch { runs, bytes: vec![0; self.slice.1 as usize] }));
    }

    /// Asks for the foreign runs of the target to be written.
    pub(crate) fn want_write(&mut self, runs: Vec<Run>) {
        self.wanted = Some(Task::Write(Batch { runs, bytes: std::mem::take(&mut self.bytes) }));
    }
}
