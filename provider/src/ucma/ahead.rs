//! Events that the router has handed out ahead of their counts.
//!
//! An answer of the router brings events along that wait on the channel: so most of them need no request of their own.
//! To the program they wait until it takes their counts, and can be taken back until then.

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;

use verbs_abi::proto::cm::Event;

/// The events of each channel, in their order.
#[derive(Debug, Default)]
pub(crate) struct Ahead(HashMap<RawFd, VecDeque<Event>>);

impl Ahead {
    /// Keeps events of a channel, behind those that are here.
    pub(crate) fn keep(&mut self, channel: RawFd, events: impl IntoIterator<Item = Event>) {
        self.0.entry(channel).or_default().extend(events);
    }

    /// The channel's next event.
    pub(crate) fn next(&mut self, channel: RawFd) -> Option<Event> {
        self.0.get_mut(&channel)?.pop_front()
    }

    /// A command about an id: what its events tell of it beside what happened may not be so any more.
    pub(crate) fn outdate(&mut self, id: u32) {
        let events = self.0.values_mut().flatten().filter(|event| event.id == id);
        events.for_each(|event| event.known = None);
    }

    /// Takes the events of an id out of its channel.
    pub(crate) fn take(&mut self, channel: RawFd, id: u32) -> Vec<Event> {
        let Some(events) = self.0.get_mut(&channel).filter(|events| !events.is_empty()) else {
            return Vec::new();
        };
        let (taken, left): (Vec<_>, Vec<_>) =
            std::mem::take(events).into_iter().partition(|event| event.id == id);
        *events = left.into();
        taken
    }

    /// A channel is closed.
    pub(crate) fn close_channel(&mut self, channel: RawFd) {
        self.0.remove(&channel);
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::proto::cm::{ConnParam, EventKind, EventParam, Known};

    use super::*;

    fn event(id: u32, kind: EventKind) -> Event {
        let param = EventParam::Conn(ConnParam::default());
        Event { uid: u64::from(id), id, kind, status: 0, param, known: Some(Box::<Known>::default()) }
    }

    fn some() -> Ahead {
        let mut ahead = Ahead::default();
        ahead.keep(7, [event(1, EventKind::AddrResolved), event(2, EventKind::AddrResolved)]);
        ahead.keep(7, [event(1, EventKind::RouteResolved)]);
        ahead.keep(8, [event(1, EventKind::Disconnected)]);
        ahead
    }

    fn rest(ahead: &mut Ahead, channel: RawFd) -> Vec<(u32, EventKind)> {
        std::iter::from_fn(|| ahead.next(channel)).map(|event| (event.id, event.kind)).collect()
    }

    #[test]
    fn events_come_in_their_order_each_from_its_channel() {
        let mut ahead = some();
        let all = [(1, EventKind::AddrResolved), (2, EventKind::AddrResolved), (1, EventKind::RouteResolved)];
        assert_eq!(rest(&mut ahead, 7), all);
        assert_eq!(rest(&mut ahead, 8), [(1, EventKind::Disconnected)]);
        assert_eq!(rest(&mut ahead, 9), []);
    }

    #[test]
    fn those_of_an_id_can_be_taken_out_of_a_channel() {
        let mut ahead = some();
        let taken: Vec<_> = ahead.take(7, 1).iter().map(|event| event.kind).collect();
        assert_eq!(taken, [EventKind::AddrResolved, EventKind::RouteResolved]);
        assert_eq!(rest(&mut ahead, 7), [(2, EventKind::AddrResolved)]);
        assert_eq!(rest(&mut ahead, 8), [(1, EventKind::Disconnected)]);
    }

    #[test]
    fn a_command_about_an_id_outdates_what_its_events_tell_of_it() {
        let mut ahead = some();
        ahead.outdate(1);
        let told = |ahead: &mut Ahead| ahead.next(7).map(|event| event.known.is_some());
        assert_eq!(
            [told(&mut ahead), told(&mut ahead), told(&mut ahead)],
            [Some(false), Some(true), Some(false)]
        );
    }

    #[test]
    fn a_closed_channel_keeps_nothing() {
        let mut ahead = some();
        ahead.close_channel(7);
        assert_eq!(rest(&mut ahead, 7), []);
        assert_eq!(rest(&mut ahead, 8), [(1, EventKind::Disconnected)]);
    }
}
