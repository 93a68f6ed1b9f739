//! Whose turn it is, who waits for the clock, who waits for a peer.

use std::collections::{BTreeSet, HashMap, VecDeque};

/// Turns and waits of QPs, by index.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    turns: VecDeque<usize>,
    queued: Vec<bool>,
    timers: BTreeSet<(u64, usize)>,
    /// Waiting QPs by the QP number they wait for.
    parked: HashMap<u32, Vec<usize>>,
}

impl Schedule {
    /// Gives a QP a turn, once.
    pub(super) fn enqueue(&mut self, at: usize) {
        if self.queued.len() <= at {
            self.queued.resize(at + 1, false);
        }
        if !self.queued[at] {
            self.queued[at] = true;
            self.turns.push_back(at);
        }
    }

    /// The next QP.
    pub(super) fn next(&mut self) -> Option<usize> {
        let at = self.turns.pop_front()?;
        self.queued[at] = false;
        Some(at)
    }

    /// QPs that have a turn.
    pub(super) fn len(&self) -> usize {
        self.turns.len()
    }

    /// Wakes a QP at a time.
    pub(super) fn set_timer(&mut self, when: u64, at: usize) {
        self.timers.insert((when, at));
    }

    /// Takes a timer back.
    pub(super) fn cancel(&mut self, when: u64, at: usize) {
        self.timers.remove(&(when, at));
    }

    /// The earliest timer.
    pub(super) fn next_timer(&self) -> Option<u64> {
        self.timers.first().map(|(when, _)| *when)
    }

    /// Takes a timer that is due.
    pub(super) fn expire(&mut self, now: u64) -> Option<(u64, usize)> {
        let first = *self.timers.first()?;
        (first.0 <= now).then(|| {
            self.timers.remove(&first);
            first
        })
    }

    /// Lets a QP wait for the QP with number `qpn`.
    pub(super) fn park(&mut self, at: usize, qpn: u32) {
        let waiting = self.parked.entry(qpn).or_default();
        if !waiting.contains(&at) {
            waiting.push(at);
        }
    }

    /// The QPs that waited for `qpn`.
    pub(super) fn unpark(&mut self, qpn: u32) -> Vec<usize> {
        self.parked.remove(&qpn).unwrap_or_default()
    }

    /// Forgets a QP that has no timer. A turn that it has left finds nothing.
    pub(super) fn forget(&mut self, at: usize, peer_qpn: u32) {
        if let Some(waiting) = self.parked.get_mut(&peer_qpn) {
            waiting.retain(|other| *other != at);
            if waiting.is_empty() {
                self.parked.remove(&peer_qpn);
            }
        }
    }
}
