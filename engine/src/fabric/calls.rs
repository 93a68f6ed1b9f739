//! Streams over which something is to be sent, each once and in turn: one that has always more does not keep the others
//! waiting.

use std::{
    collections::BTreeSet,
    ops::Bound::{Excluded, Unbounded},
};

use super::Stream;

/// Such streams.
#[derive(Debug, Default)]
pub struct Calls {
    streams: BTreeSet<Stream>,
    last: Option<Stream>,
}

impl Calls {
    /// Adds one.
    pub fn insert(&mut self, stream: Stream) {
        self.streams.insert(stream);
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Takes the one that follows the last that was taken.
    pub fn take_next(&mut self) -> Option<Stream> {
        let follows = self.last.and_then(|last| self.streams.range((Excluded(last), Unbounded)).next());
        let next = follows.or_else(|| self.streams.first()).copied()?;
        self.streams.remove(&next);
        self.last = Some(next);
        Some(next)
    }
}

impl Extend<Stream> for Calls {
    fn extend<I: IntoIterator<Item = Stream>>(&mut self, streams: I) {
        self.streams.extend(streams);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_before_another_has_two() {
        let mut calls = Calls::default();
        let stream = |index| Stream { peer: 3, index };
        calls.extend((0..4).map(stream));
        for round in 0..3 {
            for index in 0..4 {
                assert_eq!(calls.take_next(), Some(stream(index)), "round {round}");
                // It has more at once.
                calls.insert(stream(index));
                calls.insert(stream(index));
            }
        }
        assert_eq!(std::iter::from_fn(|| calls.take_next()).count(), 4);
        assert!(calls.is_empty());
    }
}
