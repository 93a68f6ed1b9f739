//! Writing completions: the ring of one QP and direction, the CQ it belongs to, the bell of its channel.

use std::sync::Arc;

use verbs_abi::shm::{
    cq::CqArea,
    cqe::{CompletionWriter, Cqe},
};

use crate::Bell;

/// A CQ as a seat sees it.
#[derive(Debug)]
pub struct CompletionQueue {
    area: CqArea,
    bell: Option<Arc<dyn Bell>>,
    /// Told when it overruns.
    alarm: Option<Arc<dyn Bell>>,
    /// Whether a CQ that is quiet is believed.
    light: bool,
}

impl CompletionQueue {
    /// The CQ at `area`, whose completion channel (if any) is woken by `bell`.
    #[must_use]
    pub fn new(area: CqArea, bell: Option<Arc<dyn Bell>>) -> Self {
        Self { area, bell, alarm: None, light: false }
    }

    /// The same, with somebody who is told when it overruns.
    #[must_use]
    pub fn with_alarm(mut self, alarm: Arc<dyn Bell>) -> Self {
        self.alarm = Some(alarm);
        self
    }

    /// The same in a process that is registered for light fences: it tells nobody of completions while nobody asks.
    #[must_use]
    pub fn with_light_fences(self, light: bool) -> Self {
        Self { light, ..self }
    }

    #[inline]
    fn publish(&self, slot: u32, solicited: bool) {
        if !(self.light && self.area.is_quiet()) {
            self.tell(slot, solicited);
        }
        if self.area.is_counted() {
            self.count();
        }
    }

    fn tell(&self, slot: u32, solicited: bool) {
        if self.area.publish(slot, solicited)
            && let Some(bell) = &self.bell
        {
            bell.ring();
        }
    }

    #[cold]
    fn count(&self) {
        if self.area.count()
            && let Some(alarm) = &self.alarm
        {
            alarm.ring();
        }
    }
}

/// The completions of one QP and direction.
#[derive(Debug)]
pub struct Completions {
    writer: CompletionWriter,
    cq: Arc<CompletionQueue>,
    slot: u32,
}

impl Completions {
    /// Completions that go to ring `slot` of `cq`.
    #[must_use]
    pub fn new(writer: CompletionWriter, cq: Arc<CompletionQueue>, slot: u32) -> Self {
        Self { writer, cq, slot }
    }

    /// Publishes a completion and wakes whoever asked for it.
    #[inline]
    pub(crate) fn push(&mut self, cqe: &Cqe, solicited: bool) {
        self.writer.push(cqe);
        self.cq.publish(self.slot, solicited || cqe.status != 0);
    }

    /// Completions written so far.
    #[inline]
    pub(crate) fn count(&self) -> u64 {
        self.writer.tail()
    }

    /// Continues where another seat stopped.
    #[inline]
    pub(crate) fn seek(&mut self, count: u64) {
        if count != self.writer.tail() {
            self.writer.seek(count);
        }
    }

    /// Whether the CQ has overrun.
    pub(crate) fn is_overrun(&self) -> bool {
        self.cq.area.is_overrun()
    }

    /// The ring is being emptied, of which its owner says that it polled so many.
    pub(crate) fn forget(&self, polled: u64) {
        self.cq.area.forget(self.writer.tail().wrapping_sub(polled).min(self.writer.entries()));
    }

    /// Takes over from a seat that died: whatever it published counts, `most` entries from `count` on, and is
    /// announced again.
    pub(crate) fn roll_forward(&mut self, count: u64, most: u64) {
        self.writer.seek(count);
        for _ in 0..most {
            if !self.writer.tail_is_published() {
                break;
            }
            self.writer.seek(self.writer.tail().wrapping_add(1));
        }
        self.cq.publish(self.slot, true);
    }
}
