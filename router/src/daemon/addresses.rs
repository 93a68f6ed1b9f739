//! Addresses of clients that are read again before somebody relies on them.

use super::{ADDRESS_AGE, Daemon};
use crate::session::Session;

/// Other clients of a tenant whose addresses are read again when one of them gets a UD QP ready.
pub(super) const REFRESHED: usize = 64;

impl Daemon {
    /// Does what follows from what the directory has learnt.
    pub(super) fn hear_directory(&mut self) {
        let Some((directory, ..)) = &self.directory else { return };
        let news = directory.take_news();
        if news.routes {
            self.terms.lane.with(engine::Fabric::reroute);
        }
        if !news.standings {
            return;
        }
        let moved = |(id, session): (&u32, &mut Session)| Some((*id, session.resettle()?));
        let moved: Vec<_> = self.sessions.iter_mut().filter_map(moved).collect();
        for (id, place) in moved {
            self.broker.open(id, place);
        }
    }

    /// Reads the addresses of a client and of its new peer again that were not read for a while. Where there is no
    /// peer, a datagram may go to anybody of the tenant: some of those are read whose turn it is.
    pub(super) fn refresh_gids(&mut self, id: u32, peer_qpn: u32) {
        let Some(tenant) = self.sessions.get(&id).map(|session| session.tenant().index) else { return };
        let peer = self.terms.lane.with(|fabric| fabric.owner_of(peer_qpn));
        let of_tenant = |session: &&mut Session| session.tenant().index == tenant;
        if peer_qpn == 0 {
            let sessions = self.sessions.values_mut().filter(of_tenant);
            let stale = sessions.filter(|session| session.gids_age() >= ADDRESS_AGE);
            stale.take(REFRESHED).for_each(|session| session.refresh_gids(ADDRESS_AGE));
        }
        for id in [Some(id), peer].into_iter().flatten() {
            if let Some(session) = self.sessions.get_mut(&id).filter(|session| of_tenant(session)) {
                session.refresh_gids(ADDRESS_AGE);
            }
        }
    }
}
