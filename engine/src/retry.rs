//! How often and how long a requester tries again: RNR NAKs and silence, as `ibv_modify_qp` set it.
//!
//! Time is passed in. Leaves to the requester: what happens when the retries are used up.

use verbs_abi::{
    timer::{ack_timeout, rnr_timer},
    verbs::WcStatus,
};

/// The `rnr_retry` that means: as often as it takes.
const RNR_FOR_EVER: u8 = 7;
/// How long such a request pauses at least, ns; a short RNR timer would keep a lane busy for nothing.
const LONG_PAUSE: u64 = 10_000_000;
/// How long a peer may take to post a receive where no retry was asked for, ns. Between two machines the message would be
/// under way meanwhile, and programs rest on that: here it comes at once, to a process that must be given a core first.
const GRACE: u64 = 100_000_000;

/// The attributes of a QP.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Retries {
    /// Code of the time that a missing answer is waited for.
    pub(crate) timeout: u8,
    /// Tries after the first one that was not answered.
    pub(crate) retry_cnt: u8,
    /// Tries after the first one that found no receive.
    pub(crate) rnr_retry: u8,
}

/// What is left of them for one work request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Retry {
    limits: Retries,
    timeouts_left: u8,
    rnr_left: u8,
    /// When silence counts as a lost packet.
    deadline: Option<u64>,
    /// When the responder may be asked for a receive again.
    rnr_until: Option<u64>,
    /// RNR NAKs met, of all work requests.
    pub(crate) rnr_naks: u64,
    /// Tries after a timeout, of all work requests.
    pub(crate) timeouts: u64,
}

impl Retry {
    /// Changes the attributes; they hold from the next work request on.
    pub(crate) fn set(&mut self, limits: Retries) {
        self.limits = limits;
    }

    /// A new work request.
    #[inline]
    pub(crate) fn begin(&mut self) {
        (self.timeouts_left, self.rnr_left) = (self.limits.retry_cnt, self.limits.rnr_retry.max(1));
        (self.deadline, self.rnr_until) = (None, None);
    }

    /// The peer answered and took a part.
    pub(crate) fn progress(&mut self) {
        self.deadline = None;
    }

    /// Until when nothing is sent because of an RNR NAK, whatever the requester was woken for.
    pub(crate) fn pause(&self, now: u64) -> Option<u64> {
        self.rnr_until.filter(|until| now < *until)
    }

    /// Until when nothing is sent because of an RNR NAK, past or not.
    pub(crate) fn resumes_at(&self) -> Option<u64> {
        self.rnr_until
    }

    /// A receive is posted: the pause is over.
    pub(crate) fn resume(&mut self) {
        self.rnr_until = None;
    }

    /// When silence counts, if something is waited for.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// The peer has no receive posted, and asks for a pause with this code: until when, unless enough is enough.
    pub(crate) fn no_receive(&mut self, code: u8, now: u64) -> Result<u64, WcStatus> {
        self.rnr_naks += 1;
        let mut pause = rnr_timer(code).as_nanos() as u64;
        if self.limits.rnr_retry == RNR_FOR_EVER {
            // A posted receive ends the wait anyway, and nobody can count the retries.
            pause = pause.max(LONG_PAUSE);
        } else {
            self.rnr_left = self.rnr_left.checked_sub(1).ok_or(WcStatus::RnrRetryExcErr)?;
            if self.limits.rnr_retry == 0 {
                pause = GRACE;
            }
        }
        self.deadline = None;
        let until = now.saturating_add(pause);
        self.rnr_until = Some(until);
        Ok(until)
    }

    /// The peer does not answer, which counts when the timeout is over: when to try again (`None`: when something
    /// changes), unless enough is enough.
    pub(crate) fn silence(&mut self, now: u64) -> Result<Option<u64>, WcStatus> {
        self.slowness(now, 0)
    }

    /// The same where the answer is on its way but takes its time: a timeout is `least` ns long at least.
    pub(crate) fn slowness(&mut self, now: u64, least: u64) -> Result<Option<u64>, WcStatus> {
        self.rnr_until = None;
        let Some(timeout) = ack_timeout(self.limits.timeout) else { return Ok(None) };
        match self.deadline {
            Some(deadline) if now < deadline => return Ok(self.deadline),
            Some(_) => {
                self.timeouts_left = self.timeouts_left.checked_sub(1).ok_or(WcStatus::RetryExcErr)?;
                self.timeouts += 1;
            }
            None => {}
        }
        self.deadline = Some(now.saturating_add((timeout.as_nanos() as u64).max(least)));
        Ok(self.deadline)
    }

    /// Until when something is waited for that must not take longer than `most` ns. `None`: it did.
    pub(crate) fn patience(&mut self, now: u64, most: u64) -> Option<u64> {
        let deadline = *self.deadline.get_or_insert(now.saturating_add(most));
        (now < deadline).then_some(deadline)
    }
}
