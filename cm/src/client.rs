//! A client: its place, its event channels, the numbers by which it knows its ids.

use std::collections::{HashMap, VecDeque};

use verbs_abi::proto::cm::Event;

use crate::{CommId, Place, Refusal};

/// An event that was not handed out yet.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    /// The id that it counts for; the listener's, for a request.
    pub(crate) owner: CommId,
    /// The new id of a request.
    pub(crate) request: Option<CommId>,
    /// The membership it is about.
    pub(crate) membership: Option<u32>,
    pub(crate) event: Event,
}

/// A membership in a multicast group.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    pub(crate) owner: CommId,
    pub(crate) events_reported: u32,
}

/// A client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) place: Place,
    pub(crate) channels: HashMap<u32, VecDeque<Queued>>,
    /// By channel, events that were handed out to readers who have not asked for them yet.
    pub(crate) kept: HashMap<u32, VecDeque<Event>>,
    pub(crate) numbers: Numbers<CommId>,
    pub(crate) memberships: Numbers<Membership>,
}

impl Client {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            channels: HashMap::new(),
            kept: HashMap::new(),
            numbers: Numbers::default(),
            memberships: Numbers::default(),
        }
    }
}

/// Small numbers for things: the lowest free one, as Linux gives them (librdmacm's tables end at 65,535).
#[derive(Debug)]
pub(crate) struct Numbers<T> {
    slots: Vec<Option<T>>,
    /// Free slots, lowest at the end.
    free: std::collections::BTreeSet<u32>,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: std::collections::BTreeSet::new() }
    }
}

impl<T> Numbers<T> {
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn take(&mut self, value: T, limit: u32) -> Result<u32, Refusal> {
        if let Some(number) = self.free.pop_first() {
            self.slots[number as usize] = Some(value);
            return Ok(number);
        }
        let number = u32::try_from(self.slots.len()).ok().filter(|&number| number < limit);
        let number = number.ok_or(Refusal::TooMany)?;
        self.slots.push(Some(value));
        Ok(number)
    }

    pub(crate) fn look_up(&self, number: u32) -> Result<&T, Refusal> {
        self.slots.get(number as usize).and_then(Option::as_ref).ok_or(Refusal::NoSuchId)
    }

    pub(crate) fn look_up_mut(&mut self, number: u32) -> Option<&mut T> {
        self.slots.get_mut(number as usize).and_then(Option::as_mut)
    }

    pub(crate) fn put(&mut self, number: u32) -> Option<T> {
        let value = self.slots.get_mut(number as usize)?.take()?;
        self.free.insert(number);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().zip(0..).filter_map(|(slot, number)| Some((number, slot.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given_and_no_more_than_the_limit() {
        let mut numbers = Numbers::default();
        let taken: Vec<_> = (0..3).map(|n| numbers.take(n, 3)).collect();
        assert_eq!(taken, [Ok(0), Ok(1), Ok(2)]);
        assert_eq!(numbers.take(9, 3), Err(Refusal::TooMany));
        assert_eq!(numbers.put(1), Some(1));
        assert_eq!(numbers.put(1), None);
        assert_eq!(numbers.look_up(1), Err(Refusal::NoSuchId));
        assert_eq!((numbers.take(7, 3), numbers.len()), (Ok(1), 3));
    }
}
