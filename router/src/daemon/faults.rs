//! Clients whose memory the kernel could not give or keep.

use super::Daemon;
use crate::session::{Client, Parting, Session};

impl Daemon {
    /// Ends the clients whose memory has failed.
    pub(super) fn drop_spoilt(&mut self) {
        let _ = rustix::io::read(&self.terms.faults, &mut [0; 8]);
        let spoilt = |session: &Session| session.client().is_some_and(Client::is_spoilt);
        let spoilt: Vec<_> =
            self.sessions.iter().filter(|(_, session)| spoilt(session)).map(|(id, _)| *id).collect();
        spoilt.into_iter().for_each(|id| self.part(id, &Parting::Spoilt));
    }
}
