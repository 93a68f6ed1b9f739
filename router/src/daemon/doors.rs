//! Taking connections: one listener for the operator, or for everybody, and one for each tenant.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Instant};

use rustix::{
    event::epoll,
    io::Errno,
    net::{SocketFlags, accept_with},
};

use super::{DOORS, Daemon, RESPITE, complain, watch};
use crate::{account::Resource, session::Session, tenant::Tenant};

impl Daemon {
    /// Takes one connection.
    pub(super) fn accept(&mut self, door: usize) {
        let Some((listener, tenant)) = self.doors.get(door) else { return };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                let tenant = Arc::clone(tenant);
                if let Err(error) = self.admit(socket, &tenant) {
                    tenant.complain("a connection was refused", 0, &error);
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                complain("no connection can be taken for a moment; raise the limit of open files", 0, &error);
                self.respite = Some(Instant::now() + RESPITE);
                self.listen(false);
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd, tenant: &Arc<Tenant>) -> io::Result<()> {
        let session = Session::new(socket, tenant)?;
        if !tenant.total.lock().take(Resource::Connections, 1) {
            return Err(io::Error::other("too many connections; raise limits.clients"));
        }
        let admitted = self.enter(session);
        if admitted.is_err() {
            tenant.total.lock().give(Resource::Connections, 1);
        }
        admitted
    }

    fn enter(&mut self, session: Session) -> io::Result<()> {
        let id = self.next_session;
        self.next_session =
            id.checked_add(1).ok_or_else(|| io::Error::other("out of numbers; restart the router"))?;
        let token = u64::from(id) * 2;
        watch(&self.epoll, &session, token, epoll::EventFlags::IN | epoll::EventFlags::RDHUP)?;
        if let Some(process) = session.peer().pidfd() {
            watch(&self.epoll, process, token + 1, epoll::EventFlags::IN)?;
        }
        self.sessions.insert(id, session);
        Ok(())
    }

    /// Whether new connections are taken.
    fn listen(&self, on: bool) {
        let flags = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        for (token, (listener, _)) in (DOORS..).zip(&self.doors) {
            if let Err(error) = epoll::modify(&self.epoll, listener, epoll::EventData::new_u64(token), flags)
            {
                tracing::error!(%error, "cannot change what is waited for");
            }
        }
    }

    /// Takes connections again when some descriptors may be free.
    pub(super) fn recover(&mut self) {
        let now = Instant::now();
        if self.respite.is_some_and(|until| until <= now) {
            self.respite = None;
            self.listen(true);
        }
    }
}
