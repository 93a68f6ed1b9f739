//! The daemon's part in the connection manager: who asks, and whose event counters to ring.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use verbs_abi::{
    proto::{
        Answer, Reply,
        cm::{CmAnswer, CmRequest, Command},
    },
    shm::LAYOUT_VERSION,
};

use super::{ADDRESS_AGE, Daemon, addresses::REFRESHED};
use crate::session::Parting;

/// Readers of one channel who have taken counts of a listener that ends, one after the other.
const REQUESTS_IN_TURN: u32 = 8;

impl Daemon {
    /// Opens the connection manager for a process.
    pub(super) fn open_manager(&mut self, id: u32, version: u32) -> Result<(), Parting> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let refusal = if !session.tenant().opens_devices {
            Some((Errno::ACCESS, "this socket is the operator's; tenants have sockets of their own"))
        } else if version != LAYOUT_VERSION {
            Some((Errno::PROTONOSUPPORT, "its provider is of another version"))
        } else if !session.peer().is_alive() {
            // Who inherited a connection is not whom the kernel named.
            Some((Errno::SRCH, "the process is gone"))
        } else {
            None
        };
        let opened = match refusal {
            Some((errno, why)) => {
                session.tenant().complain("rdma_cm was refused", session.peer().pid, &why);
                Err(errno.raw_os_error())
            }
            None => session.open_manager(&self.terms, id),
        };
        let reply = opened.map(|place| {
            self.broker.open(id, place);
            Answer::CmWelcome { guid: self.terms.guid }
        });
        tracing::debug!(client = id, pid = session.peer().pid, ok = reply.is_ok(), "opened rdma_cm");
        session.send(&reply, &[])
    }

    /// Asks the connection manager.
    pub(super) fn manage(&mut self, id: u32, request: CmRequest, fds: Vec<OwnedFd>) -> Result<(), Parting> {
        let reply = match request {
            CmRequest::OpenChannel => self.open_channel(id, fds),
            CmRequest::CloseChannel { channel } => {
                self.broker.close_channel(id, channel);
                if let Some(manager) = self.sessions.get_mut(&id).and_then(|session| session.manager_mut()) {
                    manager.remove(channel);
                }
                Ok(Answer::Done)
            }
            CmRequest::Ask { channel, command } => {
                if depends_on_addresses(&command) {
                    self.refresh_places(id);
                }
                let taken = self.take_back(id, channel, &command);
                let answer = self.broker.ask(id, channel, command);
                answer.map(|answer| Answer::Cm(without(taken, answer)))
            }
        };
        self.settle_managers();
        self.sessions.get(&id).map_or(Ok(()), |session| session.send(&reply, &[]))
    }

    /// Takes the counts of the events back that a command revokes, so that nobody sees a count whose event is gone. A
    /// reader who has taken one already gets the event. Returns how many counts were there.
    fn take_back(&mut self, id: u32, channel: u32, command: &Command) -> u32 {
        let mut taken = 0;
        // Handing a request out may make room for the next one, whose event is revoked as well.
        for _ in 0..REQUESTS_IN_TURN {
            // Then there is a count for each event, or a reader who has it.
            self.settle_managers();
            let Some((from, all)) = self.broker.revocable(id, channel, command) else { break };
            let events = all.saturating_sub(taken);
            let manager = self.sessions.get(&id).and_then(|session| session.manager());
            let Some(counts) = manager.and_then(|manager| manager.take_back(from, events)) else { break };
            taken += counts;
            if counts == events {
                break;
            }
            self.broker.keep(id, channel, command, events - counts);
        }
        taken
    }

    fn open_channel(&mut self, id: u32, fds: Vec<OwnedFd>) -> Reply {
        let manager = self.sessions.get_mut(&id).and_then(|session| session.manager_mut());
        let manager = manager.ok_or(Errno::INVAL.raw_os_error())?;
        let channel = manager.add(fds)?;
        self.broker.open_channel(id, channel).inspect_err(|_| manager.remove(channel))?;
        Ok(Answer::Handle(channel))
    }

    /// Reads the addresses again that were not read for a while: of a client, and of some others of its tenant, of
    /// whom one may have the address that it asks for.
    fn refresh_places(&mut self, id: u32) {
        let Some(tenant) = self.sessions.get(&id).map(|session| session.tenant().index) else { return };
        self.refresh_stale(tenant);
        self.refresh_place(id);
    }

    /// The same of some clients of a tenant.
    pub(super) fn refresh_stale(&mut self, tenant: u32) {
        let stale = self.sessions.iter().filter(|(_, session)| {
            session.tenant().index == tenant && session.manager().is_some_and(|m| m.age() >= ADDRESS_AGE)
        });
        let stale: Vec<u32> = stale.map(|(id, _)| *id).take(REFRESHED).collect();
        stale.into_iter().for_each(|id| self.refresh_place(id));
    }

    fn refresh_place(&mut self, id: u32) {
        if let Some(place) = self.sessions.get_mut(&id).and_then(|session| session.moved(ADDRESS_AGE)) {
            self.broker.open(id, place);
        }
    }

    /// Does what is due.
    pub(super) fn tick_manager(&mut self) {
        if self.broker.idle().is_some_and(|idle| idle.is_zero()) {
            self.broker.tick();
            self.settle_managers();
        }
    }

    /// A process with the connection manager is gone.
    pub(super) fn close_manager(&mut self, id: u32) {
        self.broker.close(id);
        self.settle_managers();
    }

    /// Adds one to an event counter for each queued event, and says to other hosts what is to be said.
    pub(super) fn settle_managers(&mut self) {
        let outgoing = self.broker.take_outgoing();
        if !outgoing.is_empty() {
            self.terms.lane.with(|fabric| {
                for control in &outgoing {
                    // What is lost here is said again.
                    let _ = fabric.send_control(control);
                }
            });
        }
        for (id, channel) in self.broker.take_rings() {
            if let Some(manager) = self.sessions.get(&id).and_then(|session| session.manager()) {
                manager.ring(channel);
            }
        }
    }
}

/// The answer, where some counts of the events that are gone are taken back already: the client takes the others.
fn without(taken: u32, answer: CmAnswer) -> CmAnswer {
    match answer {
        CmAnswer::Reported { events, revoked } => {
            CmAnswer::Reported { events, revoked: revoked.saturating_sub(taken) }
        }
        other => other,
    }
}

fn depends_on_addresses(command: &Command) -> bool {
    matches!(command, Command::Bind { .. } | Command::ResolveAddr { .. } | Command::JoinMulticast { .. })
}
