//! Who may use the room of a stream next, where more is to be sent than there is room for.
//!
//! Everybody has a share of [`SHARE`] bytes in each round, and who has used more owes it to the next one (deficit round
//! robin). Who is called has room; who was not called while others wait stands in line: first those that have something
//! left of their share of this round (a QP that asks for little now and then, say), then the others, in the order in
//! which they came. A round is over when all have been called that waited when it began.
//! Leaves to others: how much room there is (`outbox`), turns of those that are called (`fabric`).

use std::collections::{HashMap, HashSet, VecDeque};

use super::{SEGMENT, packet::HEADER};

/// Bytes for each in a round: the longest packet.
pub(crate) const SHARE: usize = HEADER + SEGMENT as usize;

/// QPs, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Those that have something left of their share.
    first: VecDeque<u32>,
    others: VecDeque<u32>,
    /// How many of the others belong to this round.
    left: usize,
    /// All of both.
    waiting: HashSet<u32>,
    /// Those that may use room now.
    called: Vec<u32>,
    /// Bytes of this round's share, and what was used beyond it; nothing where it is absent.
    used: HashMap<u32, usize>,
}

impl Line {
    /// Whether there is nobody.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.called.is_empty()
    }

    fn used(&self, qpn: u32) -> usize {
        self.used.get(&qpn).copied().unwrap_or(0)
    }

    /// Whether a QP may use room that there is: nobody waits, or it was called.
    pub(crate) fn admits(&self, qpn: u32) -> bool {
        self.waiting.is_empty() || self.called.contains(&qpn) && self.used(qpn) < SHARE
    }

    /// A QP has used so many bytes of room. Where nobody wants them nobody counts.
    pub(crate) fn charge(&mut self, qpn: u32, bytes: usize) {
        if !self.is_idle() {
            let used = self.used.entry(qpn).or_default();
            *used = (*used + bytes).min(2 * SHARE);
        }
    }

    /// A QP wants room that there is not. One that was called keeps its place while it has something left.
    pub(crate) fn wait(&mut self, qpn: u32) {
        if !self.waiting.insert(qpn) {
            return;
        }
        let called = self.called.iter().position(|called| *called == qpn);
        let called = called.map(|at| self.called.swap_remove(at));
        match called {
            _ if self.used(qpn) >= SHARE => self.others.push_back(qpn),
            Some(_) => self.first.push_front(qpn),
            None => self.first.push_back(qpn),
        }
    }

    /// Bytes that those who were called may still use.
    pub(crate) fn promised(&self) -> usize {
        self.called.iter().map(|qpn| SHARE.saturating_sub(self.used(*qpn))).sum()
    }

    /// Calls the next one.
    pub(crate) fn call(&mut self) -> Option<u32> {
        let next = self.first.pop_front().or_else(|| self.next_of_others())?;
        self.waiting.remove(&next);
        self.called.push(next);
        Some(next)
    }

    fn next_of_others(&mut self) -> Option<u32> {
        // What is owed is less than two shares.
        for _ in 0..3 * self.others.len() {
            if self.left == 0 {
                self.begin_round();
            }
            let next = self.others.pop_front()?;
            self.left -= 1;
            if self.used(next) < SHARE {
                return Some(next);
            }
            self.others.push_back(next);
        }
        None
    }

    fn begin_round(&mut self) {
        self.left = self.others.len();
        self.used.retain(|_, used| {
            *used = used.saturating_sub(SHARE);
            *used > 0
        });
    }

    /// Forgets those who were called and have no turn any more: they want nothing.
    pub(crate) fn settle(&mut self, mut has_turn: impl FnMut(u32) -> bool) {
        self.called.retain(|qpn| has_turn(*qpn));
        if self.is_idle() {
            self.used.clear();
        }
    }

    /// Whether [`Self::settle`] may have something to do.
    pub(crate) fn has_called(&self) -> bool {
        !self.called.is_empty()
    }

    /// Sends all home.
    pub(crate) fn dissolve(&mut self) -> Vec<u32> {
        let Self { first, others, .. } = std::mem::take(self);
        first.into_iter().chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls so often, and has who is called use `len` bytes at a time until it may not any more; then it waits again.
    /// Says who has used how much.
    fn serve(line: &mut Line, calls: usize, len: impl Fn(u32) -> usize) -> HashMap<u32, usize> {
        let mut had = HashMap::new();
        for _ in 0..calls {
            let qpn = line.call().unwrap();
            while line.admits(qpn) {
                line.charge(qpn, len(qpn));
                *had.entry(qpn).or_default() += len(qpn);
            }
            line.wait(qpn);
        }
        had
    }

    #[test]
    fn all_get_as_many_bytes_whatever_the_size_of_their_packets() {
        let mut line = Line::default();
        (0..50).for_each(|qpn| line.wait(qpn));
        let sizes = [200, 5000, SHARE / 2 + 1, SHARE - 1, SHARE];
        let had = serve(&mut line, 10_000, |qpn| sizes[qpn as usize % sizes.len()]);
        let (least, most) = (had.values().min().unwrap(), had.values().max().unwrap());
        assert!(had.len() == 50 && most - least <= 2 * SHARE, "{least} to {most}");
    }

    #[test]
    fn who_asks_for_little_does_not_wait_for_the_round() {
        let mut line = Line::default();
        (0..1000).for_each(|qpn| line.wait(qpn));
        serve(&mut line, 1000, |_| SHARE);
        for round in 0..2000 {
            serve(&mut line, 7, |_| SHARE);
            assert!(!line.admits(5000));
            line.wait(5000);
            assert_eq!(line.call(), Some(5000), "{round}");
            line.charge(5000, 200);
            line.settle(|_| false);
        }
        let before = 4 * SHARE / 200;
        let own = (0..before).filter(|_| {
            line.wait(5000);
            let is_first = line.call() == Some(5000);
            line.charge(5000, 200);
            line.settle(|_| false);
            is_first
        });
        assert!(own.count() <= SHARE / 200 + 1, "it has its share before others have theirs, and no more");
    }

    #[test]
    fn who_comes_and_goes_gets_no_more_than_those_who_stay() {
        let mut line = Line::default();
        (0..100).for_each(|qpn| line.wait(qpn));
        let mut had = [0; 2];
        for _ in 0..20_000 {
            // The last one leaves whenever it was served, and comes back at once.
            let qpn = line.call().unwrap();
            line.charge(qpn, SHARE);
            if qpn == 99 {
                line.settle(|_| false);
            }
            line.wait(qpn);
            had[0] += usize::from(qpn == 0);
            had[1] += usize::from(qpn == 99);
        }
        assert!(had[0] >= 199 && had[1] <= had[0] + 1, "{had:?}");
    }

    #[test]
    fn nobody_waits_where_nobody_else_wants_room() {
        let mut line = Line::default();
        for _ in 0..10 {
            assert!(line.admits(1));
            line.charge(1, 100 * SHARE);
        }
        line.wait(1);
        assert_eq!(line.call(), Some(1));
        line.charge(1, 100 * SHARE);
        assert!(line.admits(1), "there is still nobody else");
        line.wait(2);
        assert!(!line.admits(1) && !line.admits(2));
        assert_eq!((line.call(), line.call()), (Some(2), None));
        assert_eq!(line.dissolve(), []);
    }
}
