//! A hostile client that is connected with a peer, beside a victim of whom it knows all numbers.

use std::{os::fd::OwnedFd, sync::atomic::Ordering};

use anyhow::{Result, bail, ensure};
use verbs_abi::{
    proto::{Answer, DirectPeer, Gid, Mode, Request},
    shm::wqe::{SendWqe, Sge, flag},
    verbs::{Opcode, QpState, QpType, WcStatus},
};

use crate::{
    client::{BASE, Client, LEN, Qp, RIGHTS, eventually},
    field::Field,
};

/// Where keys with fewer rights begin, and how long each is.
pub(crate) const PART: u64 = 4096;
/// What a victim's memory holds.
const SENTINEL: u64 = 0x5afe_5afe_5afe_5afe;

/// Two clients of which one, or both, are hostile, and a third that must not notice.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) hostile: Client,
    pub(crate) qp: Qp,
    pub(crate) keys: Keys,
    pub(crate) pd: u32,
    pub(crate) peer: Client,
    pub(crate) peer_qp: Qp,
    pub(crate) peer_keys: Keys,
    pub(crate) peer_pd: u32,
    pub(crate) victim: Client,
    pub(crate) victim_qp: Qp,
    pub(crate) victim_key: u32,
    /// The address of all three.
    pub(crate) gid: Gid,
    /// In direct mode: where the peer lies, with its arena and region.
    pub(crate) offer: Option<(DirectPeer, Vec<OwnedFd>)>,
}

/// What one client has registered. Each covers [`PART`] bytes at its number times that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    /// All rights, from address [`BASE`].
    pub(crate) full: u32,
    /// Reading by the owner alone.
    pub(crate) read_only: u32,
    /// Writing by the owner alone.
    pub(crate) private: u32,
    /// All rights, in another PD.
    pub(crate) other_pd: u32,
    /// Deregistered.
    pub(crate) dead: u32,
}

impl Rig {
    pub(crate) fn new(field: &Field, mode: Mode, qp_type: QpType) -> Result<Self> {
        let (hostile, qp, keys, pd) = Self::open(field, mode, qp_type)?;
        let (peer, peer_qp, peer_keys, peer_pd) = Self::open(field, mode, qp_type)?;
        let (victim, victim_qp, victim_keys, _) = Self::open(field, mode, QpType::Rc)?;
        for at in (0..LEN).step_by(8) {
            victim.memory.u64(at).store(SENTINEL, Ordering::Relaxed);
        }
        let gid = hostile.gid()?;
        let offer = match hostile.connect(&qp, (peer_qp.new.qpn, gid))? {
            (Answer::Direct(offer), files) => Some((offer, files)),
            _ => None,
        };
        peer.connect(&peer_qp, (qp.new.qpn, gid))?;
        victim.connect(&victim_qp, (victim_qp.new.qpn, gid))?;
        let victim_key = victim_keys.full;
        Ok(Self {
            hostile,
            qp,
            keys,
            pd,
            peer,
            peer_qp,
            peer_keys,
            peer_pd,
            victim,
            victim_qp,
            victim_key,
            gid,
            offer,
        })
    }

    fn open(field: &Field, mode: Mode, qp_type: QpType) -> Result<(Client, Qp, Keys, u32)> {
        let client = Client::open(field.socket(), mode)?;
        let (pd, other, (cq, _)) = (client.pd()?, client.pd()?, client.cq(None)?);
        let keys = Keys {
            full: client.mr(pd, 0, PART, RIGHTS)?,
            read_only: client.mr(pd, PART, PART, 0)?,
            private: client.mr(pd, 2 * PART, PART, 1)?,
            other_pd: client.mr(other, 3 * PART, PART, RIGHTS)?,
            dead: client.mr(pd, 4 * PART, PART, RIGHTS)?,
        };
        let gone = client.ask(&Request::DeregMr { key: keys.dead })?;
        ensure!(gone == Ok(Answer::Done), "a region cannot be deregistered: {gone:?}");
        let qp = client.qp(pd, cq, qp_type)?;
        Ok((client, qp, keys, pd))
    }

    /// Eight bytes of the hostile client's own.
    pub(crate) fn own(&self) -> Sge {
        Sge { addr: BASE, length: 8, lkey: self.keys.full }
    }

    /// A request for eight bytes that would be right on a connected QP.
    pub(crate) fn good(&self, opcode: Opcode) -> SendWqe {
        let mut wqe = SendWqe::default();
        (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, opcode.value() as u8);
        (wqe.remote_addr, wqe.rkey) = (BASE, self.peer_keys.full);
        assert!(wqe.push_sge(self.own()), "no room for an SGE");
        wqe
    }

    /// Fails unless the next completion has this status, and the QP is in the state that follows.
    pub(crate) fn ends_with(&mut self, status: WcStatus) -> Result<()> {
        let done = self.qp.completion()?;
        ensure!(
            (done.wr_id, u32::from(done.status)) == (7, status.value()),
            "it ended with status {} and not {status:?}",
            done.status
        );
        let state = match (status, self.qp.qp_type) {
            (WcStatus::Success, _) => QpState::Rts,
            (_, QpType::Rc) => QpState::Err,
            _ => QpState::Sqe,
        };
        eventually("the state that follows", || Ok(self.hostile.state(self.qp.new.qpn)? == state))?;
        self.victim_is_whole()
    }

    /// Fails unless the QP comes to ERR without any completion that went well.
    pub(crate) fn is_fatal(&mut self) -> Result<()> {
        eventually("the QP is in error", || Ok(self.hostile.state(self.qp.new.qpn)? == QpState::Err))?;
        if let Some(done) = self.qp.sends.pop().filter(|done| done.status == 0) {
            bail!("it went well: {done:?}");
        }
        self.victim_is_whole()
    }

    /// Fails if the victim noticed anything.
    pub(crate) fn victim_is_whole(&self) -> Result<()> {
        let changed =
            (0..LEN).step_by(8).find(|at| self.victim.memory.u64(*at).load(Ordering::Relaxed) != SENTINEL);
        ensure!(changed.is_none(), "the victim's memory changed at {changed:?}");
        let state = self.victim.state(self.victim_qp.new.qpn)?;
        ensure!(state == QpState::Rts, "the victim's QP is in {state:?}");
        let header = &self.victim_qp.area.header;
        let counts = [header.sq_head(), header.sq_done(), header.rq_done()];
        let counts = counts.map(|word| word.load(Ordering::Relaxed));
        ensure!(counts == [0; 3], "the victim's queues moved: {counts:?}");
        Ok(())
    }

    /// Fails unless none of the hostile client's bytes came to the peer's memory but where they may.
    pub(crate) fn peer_is_whole_outside(&self, len: usize) -> Result<()> {
        let changed = (len..LEN).step_by(8).find(|at| self.peer.memory.u64(*at).load(Ordering::Relaxed) != 0);
        ensure!(changed.is_none(), "the peer's memory changed at {changed:?}");
        Ok(())
    }
}
