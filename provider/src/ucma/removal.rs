//! What the process knows of its ids by itself, for the moment when the router dies.
//!
//! A device that goes away is told to each id that is bound to it, by DEVICE_REMOVAL; the program then ends its ids as
//! always. So the commands that end an id, and the one that asks for an event, are answered here when nobody else
//! can. Leaves to others: asking the router while it lives ([`super::manager`]).

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;

use verbs_abi::proto::cm::{Address, CmAnswer, Command, ConnParam, Event, EventKind, EventParam};

use crate::abi::edge::Errno;

/// An id of librdmacm's.
#[derive(Debug)]
struct Own {
    /// The program's word for it; 0 until a request is accepted.
    uid: u64,
    channel: RawFd,
    is_bound: bool,
    events_reported: u32,
}

/// A membership of a multicast group.
#[derive(Debug)]
struct Membership {
    id: u32,
    events_reported: u32,
}

/// The ids and memberships of a process, by the router's numbers.
#[derive(Debug, Default)]
pub(crate) struct Ids {
    ids: HashMap<u32, Own>,
    memberships: HashMap<u32, Membership>,
    /// Ids that have not heard yet of the device's removal.
    removals: VecDeque<u32>,
}

impl Ids {
    /// Takes into account what the router has done for a channel.
    pub(crate) fn note(&mut self, channel: RawFd, command: &Command, answer: &CmAnswer) {
        match (command, answer) {
            (&Command::CreateId { uid, .. }, &CmAnswer::Id(id)) => self.add(id, uid, channel, false),
            (Command::DestroyId { id }, _) => self.forget(*id),
            (Command::Bind { id, address }, _) => {
                if let Some(own) = self.ids.get_mut(id) {
                    own.is_bound |= is_one_address(address);
                }
            }
            (Command::Accept { id, uid, param: Some(_) }, _) => {
                if let Some(own) = self.ids.get_mut(id) {
                    own.uid = *uid;
                }
            }
            (Command::MigrateId { id, .. }, _) => {
                if let Some(own) = self.ids.get_mut(id) {
                    own.channel = channel;
                }
            }
            (&Command::JoinMulticast { id, .. }, &CmAnswer::Id(number)) => {
                self.memberships.insert(number, Membership { id, events_reported: 0 });
            }
            (Command::LeaveMulticast { id }, _) => drop(self.memberships.remove(id)),
            (Command::NextEvent, CmAnswer::Event(Some(event))) => self.note_event(channel, event),
            _ => {}
        }
    }

    /// An event was handed out: it counts for the id that it is an event of.
    fn note_event(&mut self, channel: RawFd, event: &Event) {
        let owner = match event.kind {
            EventKind::ConnectRequest => {
                self.add(event.id, 0, channel, true);
                let listener = self.ids.iter().find(|(_, own)| own.uid == event.uid && own.uid != 0);
                listener.map(|(&number, _)| number)
            }
            EventKind::MulticastJoin | EventKind::MulticastError => {
                let membership = self.memberships.get_mut(&event.id);
                membership.map(|membership| {
                    membership.events_reported += 1;
                    membership.id
                })
            }
            _ => Some(event.id),
        };
        if let Some(own) = owner.and_then(|owner| self.ids.get_mut(&owner)) {
            own.events_reported += 1;
            own.is_bound |= event.kind == EventKind::AddrResolved;
        }
    }

    fn add(&mut self, id: u32, uid: u64, channel: RawFd, is_bound: bool) {
        self.ids.insert(id, Own { uid, channel, is_bound, events_reported: 0 });
    }

    fn forget(&mut self, id: u32) {
        self.ids.remove(&id);
        self.memberships.retain(|_, membership| membership.id != id);
    }

    /// A channel is closed, and all ids on it with it.
    pub(crate) fn close_channel(&mut self, channel: RawFd) {
        let gone: Vec<u32> =
            self.ids.iter().filter(|(_, own)| own.channel == channel).map(|(&id, _)| id).collect();
        gone.into_iter().for_each(|id| self.forget(id));
        self.removals.retain(|id| self.ids.contains_key(id));
    }

    /// The router has died: each bound id is to hear that its device is gone. Returns the channels, once an event.
    pub(crate) fn remove_device(&mut self) -> Vec<RawFd> {
        let mut told: Vec<u32> =
            self.ids.iter().filter(|(_, o)| o.is_bound && o.uid != 0).map(|(&id, _)| id).collect();
        // In the order in which they were made.
        told.sort_unstable();
        let channels = told.iter().filter_map(|id| Some(self.ids.get(id)?.channel)).collect();
        self.removals = told.into();
        channels
    }

    /// Answers a command in the place of the router that has died.
    pub(crate) fn answer(&mut self, channel: RawFd, command: &Command) -> Result<CmAnswer, Errno> {
        match *command {
            Command::NextEvent => self.next_removal(channel).ok_or(Errno::IO),
            Command::DestroyId { id } => {
                let events = self.ids.get(&id).ok_or(Errno::NOENT)?.events_reported;
                let before = self.removals.len();
                self.removals.retain(|&waiting| waiting != id);
                self.forget(id);
                Ok(CmAnswer::Reported { events, revoked: (before - self.removals.len()) as u32 })
            }
            Command::LeaveMulticast { id } => {
                let gone = self.memberships.remove(&id).ok_or(Errno::NOENT)?;
                Ok(CmAnswer::Reported { events: gone.events_reported, revoked: 0 })
            }
            _ => Err(Errno::IO),
        }
    }

    fn next_removal(&mut self, channel: RawFd) -> Option<CmAnswer> {
        let on_channel = |id: &u32| self.ids.get(id).is_some_and(|own| own.channel == channel);
        let id = self.removals.remove(self.removals.iter().position(on_channel)?)?;
        let own = self.ids.get_mut(&id)?;
        own.events_reported += 1;
        let param = EventParam::Conn(ConnParam::default());
        let kind = EventKind::DeviceRemoval;
        Some(CmAnswer::Event(Some(Event { uid: own.uid, id, kind, status: 0, param, known: None })))
    }
}

/// Whether binding to an address binds to the device: a wildcard does not.
fn is_one_address(address: &Address) -> bool {
    match address {
        Address::Ip(address) => !address.ip().is_unspecified(),
        Address::Ib(address) => address.gid != [0; 16],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNEL: RawFd = 7;
    const LISTENER: u32 = 1;

    fn done(ids: &mut Ids, command: Command, answer: CmAnswer) {
        ids.note(CHANNEL, &command, &answer);
    }

    fn create(ids: &mut Ids, id: u32, uid: u64) {
        done(ids, Command::CreateId { uid, space: 0x0106, qp_type: 0 }, CmAnswer::Id(id));
    }

    fn bind(ids: &mut Ids, id: u32, address: &str) {
        let address = Address::Ip(address.parse().unwrap());
        done(ids, Command::Bind { id, address }, CmAnswer::Done);
    }

    fn event(ids: &mut Ids, id: u32, uid: u64, kind: EventKind) {
        let param = EventParam::Conn(ConnParam::default());
        let event = Event { uid, id, kind, status: 0, param, known: None };
        done(ids, Command::NextEvent, CmAnswer::Event(Some(event)));
    }

    /// A listener on one address, an accepted and an unanswered request, a bound id, one on a wildcard.
    fn some() -> Ids {
        let mut ids = Ids::default();
        create(&mut ids, LISTENER, 100);
        bind(&mut ids, LISTENER, "10.0.0.1:80");
        for request in [2, 3] {
            event(&mut ids, request, 100, EventKind::ConnectRequest);
        }
        done(
            &mut ids,
            Command::Accept { id: 2, uid: 200, param: Some(ConnParam::default()) },
            CmAnswer::Done,
        );
        create(&mut ids, 4, 400);
        event(&mut ids, 4, 400, EventKind::AddrResolved);
        create(&mut ids, 5, 500);
        bind(&mut ids, 5, "0.0.0.0:0");
        ids
    }

    fn told(ids: &mut Ids) -> Vec<(u32, u64)> {
        std::iter::from_fn(|| match ids.answer(CHANNEL, &Command::NextEvent) {
            Ok(CmAnswer::Event(Some(event))) if event.kind == EventKind::DeviceRemoval => {
                Some((event.id, event.uid))
            }
            Err(Errno::IO) => None,
            other => panic!("{other:?}"),
        })
        .collect()
    }

    #[test]
    fn each_bound_id_that_the_program_knows_hears_once_of_the_removal() {
        let mut ids = some();
        assert_eq!(ids.remove_device(), [CHANNEL; 3]);
        assert_eq!(told(&mut ids), [(LISTENER, 100), (2, 200), (4, 400)]);
        assert_eq!(told(&mut ids), []);
    }

    #[test]
    fn ids_end_with_the_number_of_their_events() {
        let mut ids = some();
        ids.remove_device();
        let first = ids.answer(CHANNEL, &Command::NextEvent);
        assert!(matches!(first, Ok(CmAnswer::Event(Some(ref event))) if event.id == LISTENER), "{first:?}");
        let mut end = |id| ids.answer(CHANNEL, &Command::DestroyId { id });
        // Two requests and the removal; the removal that nobody has read is taken back.
        assert_eq!(end(LISTENER), Ok(CmAnswer::Reported { events: 3, revoked: 0 }));
        assert_eq!(end(4), Ok(CmAnswer::Reported { events: 1, revoked: 1 }));
        assert_eq!(end(5), Ok(CmAnswer::Reported { events: 0, revoked: 0 }));
        assert_eq!(end(5), Err(Errno::NOENT));
        assert_eq!(told(&mut ids), [(2, 200)]);
    }

    #[test]
    fn what_was_ended_before_hears_nothing() {
        let mut ids = some();
        done(&mut ids, Command::DestroyId { id: 2 }, CmAnswer::Reported { events: 0, revoked: 0 });
        ids.remove_device();
        ids.close_channel(CHANNEL + 1);
        assert_eq!(told(&mut ids), [(LISTENER, 100), (4, 400)]);
        ids = some();
        ids.remove_device();
        ids.close_channel(CHANNEL);
        assert_eq!(told(&mut ids), []);
    }

    #[test]
    fn a_membership_counts_its_events_and_those_of_its_id() {
        let mut ids = some();
        let address = Address::Ip("239.0.0.1:0".parse().unwrap());
        let join = Command::JoinMulticast { id: 4, uid: 900, address, send_only: false };
        done(&mut ids, join, CmAnswer::Id(9));
        event(&mut ids, 9, 900, EventKind::MulticastJoin);
        ids.remove_device();
        let left = ids.answer(CHANNEL, &Command::LeaveMulticast { id: 9 });
        assert_eq!(left, Ok(CmAnswer::Reported { events: 1, revoked: 0 }));
        let ended = ids.answer(CHANNEL, &Command::DestroyId { id: 4 });
        assert_eq!(ended, Ok(CmAnswer::Reported { events: 2, revoked: 1 }));
    }
}
