//! Answers `freeflow status`.

use std::{os::fd::AsFd, time::Instant};

use engine::QpSnapshot;
use rustix::{io::Errno, process::geteuid};
use verbs_abi::proto::Answer;

use super::Daemon;
use crate::{
    link::Links,
    report, segment,
    session::{Parting, Session},
    status::{Listener, Status},
};

/// QPs that are looked at with the lane waiting.
const QPS_AT_ONCE: usize = 256;

impl Daemon {
    /// Answers [`verbs_abi::proto::Request::Status`], or puts the answer off where too many were asked for.
    ///
    /// At a tenant's socket there is that tenant and nobody else. Root and this router's own user see all of its
    /// clients, others their own; at the operator's socket likewise of all tenants.
    pub(super) fn tell(&mut self, id: u32) -> Result<(), Parting> {
        let Some(session) = self.sessions.get(&id) else { return Ok(()) };
        let (tenant, start) = (session.tenant(), Instant::now());
        if !tenant.may_ask(start) {
            self.listen_to(id, false);
            self.asking.push(id);
            return Ok(());
        }
        let status = self.status(session);
        let text = serde_json::to_vec(&status).unwrap_or_default();
        tenant.asked(start.elapsed());
        match segment::holding(c"freeflow-status", &text) {
            Ok(file) => session.send(&Ok(Answer::Done), &[file.as_fd()]),
            Err(error) => {
                session.send(&Err(error.raw_os_error().unwrap_or(Errno::NOMEM.raw_os_error())), &[])
            }
        }
    }

    fn status(&self, asker: &Session) -> Status {
        let (tenant, uid) = (asker.tenant(), asker.peer().uid);
        let trusted = uid == 0 || uid == geteuid().as_raw();
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            socket: tenant.socket.display().to_string(),
            ..Status::default()
        };
        let lane = &self.terms.lane;
        let sleeps = tenant.sees_all.then(|| lane.sleeps());
        let sees = |session: &&Session| {
            (tenant.sees_all || session.tenant().index == tenant.index)
                && (trusted || session.peer().uid == uid)
        };
        report::fill(&mut status, self.sessions.values().filter(sees), &self.snapshot(), sleeps);
        for client in &mut status.clients {
            client.lane_use = lane.with(|fabric| fabric.lane_use(client.id as u32));
        }
        status.listeners = self.listeners(sees);
        if tenant.sees_all && trusted {
            status.links = self.links.as_ref().map(Links::status).unwrap_or_default();
            if let Some((directory, ..)) = &self.directory {
                (status.routes, status.directory) = (directory.routes(), directory.status());
            }
            status.rnic = self.rnic.status();
        }
        status
    }

    /// The listeners of rdma_cm of those whom `sees` allows.
    fn listeners(&self, sees: impl Fn(&&Session) -> bool) -> Vec<Listener> {
        let listeners = self.broker.listeners().filter_map(|listener| {
            let session = self.sessions.get(&listener.client).filter(|session| sees(session))?;
            let (tenant, peer) = (session.tenant().name.clone(), session.peer());
            let (space, address) =
                (report::port_space(listener.space).to_owned(), listener.address.to_string());
            Some(Listener { tenant, pid: peer.pid, uid: peer.uid, space, address })
        });
        let mut listeners: Vec<Listener> = listeners.collect();
        listeners.sort_by(|a, b| (&a.address, a.pid).cmp(&(&b.address, b.pid)));
        listeners
    }

    /// All QPs, looked at bit by bit.
    fn snapshot(&self) -> Vec<QpSnapshot> {
        let parts = (0..).step_by(QPS_AT_ONCE);
        let part = |start| self.terms.lane.with(|fabric| fabric.snapshot_part(start..start + QPS_AT_ONCE));
        parts.map_while(part).flatten().collect()
    }
}
