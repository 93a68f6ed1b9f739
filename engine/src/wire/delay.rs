//! Acknowledgements that wait for a request that goes the same way, as TCP's delayed ones do.
//!
//! Only where that can be expected: the last messages of the peer were all answered by requests of this end, and soon.
//! One that has waited in vain is sent by itself, and so are those of the next messages.
//! Leaves to others: which messages are small enough, who looks at the clock (`fabric`).

/// How long one waits, ns.
const PATIENCE: u64 = 100_000;
/// Messages in a row that must have been answered soon.
const PROVEN: u32 = 8;

/// What one end knows of how soon it answers.
#[derive(Debug, Default)]
pub(crate) struct Delay {
    /// When the peer's last message was executed, as long as it was not answered.
    executed: Option<u64>,
    /// Messages in a row that were answered soon.
    answered: u32,
    /// Until when an acknowledgement waits.
    due: Option<u64>,
}

impl Delay {
    /// A message of the peer has been executed. `may_wait`: its acknowledgement is all that is owed. Says until when
    /// that waits; one that waits already does so no longer.
    pub(crate) fn put_off(&mut self, may_wait: bool, now: u64) -> Option<u64> {
        let waited = self.due.take().is_some();
        self.executed = Some(now);
        if may_wait && !waited && self.answered >= PROVEN {
            self.due = Some(now + PATIENCE);
        }
        self.due
    }

    /// This end has sent a request.
    pub(crate) fn answer(&mut self, now: u64) {
        if let Some(executed) = self.executed.take() {
            let soon = now.saturating_sub(executed) <= PATIENCE;
            self.answered = if soon { self.answered.saturating_add(1) } else { 0 };
        }
    }

    /// Until when an acknowledgement waits.
    pub(crate) fn due(&self) -> Option<u64> {
        self.due
    }

    /// It is sent. `in_vain`: by itself, as no request came.
    pub(crate) fn end(&mut self, in_vain: bool) {
        self.due = None;
        if in_vain {
            self.answered = 0;
        }
    }
}
