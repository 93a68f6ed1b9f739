//! Shared receive queues and XRC domains: their places in the arena, their users, and what the fabric carries out.

use std::os::fd::OwnedFd;

use engine::{SrqInit, XrcInit};
use rustix::{
    fs::{AtFlags, StatxFlags, statx},
    io::Errno,
};
use verbs_abi::{
    proto::{Answer, CreateQp, CreateSrq, Reply},
    shm::{
        cqe::CQE_LEN,
        srq::{SrqArea, SrqGeometry},
    },
    verbs::QpType,
};

use super::client::Client;
use crate::{account::Resource, arena::Place};

const EINVAL: i32 = libc::EINVAL;

/// An SRQ.
#[derive(Debug)]
pub(super) struct Srq {
    place: Place,
    pd: u32,
    xrcd: Option<u32>,
}

/// An XRC domain that the client has open.
#[derive(Debug)]
pub(super) struct Xrcd {
    /// Its number on this host.
    pub(super) domain: u32,
    /// QPs and SRQs of the client in it.
    users: u32,
}

impl Client {
    pub(super) fn create_srq(&mut self, create: &CreateSrq) -> Reply {
        let geometry = SrqGeometry::new(create.max_wr, create.max_sge).ok_or(EINVAL)?;
        let domain = match create.xrc {
            None => None,
            Some((xrcd, cq)) => Some((self.xrcds.get(&xrcd).ok_or(EINVAL)?.domain, cq)),
        };
        if !self.pds.contains_key(&create.pd) {
            return Err(EINVAL);
        }
        // The ring of an XRC queue lies behind it. Each takes a doorbell as a QP does, and counts as one.
        let ring_len = if domain.is_some() { geometry.entries as usize * CQE_LEN } else { 0 };
        let (place, window) = self.place(Resource::Qps, geometry.len() + ring_len)?;
        let parts = SrqArea::new(&window, 0, geometry).zip(window.sub(geometry.len() as u64, ring_len));
        let made = parts.ok_or(Errno::NOMEM.raw_os_error()).and_then(|(area, ring)| {
            let ring_offset = place.offset + geometry.len() as u64;
            let xrc = domain.map(|(domain, cq)| XrcInit { domain, cq, ring, ring_offset });
            let init = SrqInit { pd: create.pd, area, offset: place.offset, xrc };
            self.lane.with(|fabric| fabric.create_srq(self.id, init))
        });
        let srq = match made {
            Ok(srq) => srq,
            Err(errno) => {
                self.release(Resource::Qps, place);
                return Err(errno);
            }
        };
        self.use_pd(create.pd, true);
        let xrcd = create.xrc.map(|(xrcd, _)| xrcd);
        self.use_xrcd(xrcd, true);
        self.srqs.insert(srq.number, Srq { place, pd: create.pd, xrcd });
        Ok(Answer::Srq(srq))
    }

    pub(super) fn limit_srq(&self, srqn: u32, limit: u32) -> Reply {
        self.lane.with(|fabric| fabric.limit_srq(self.id, srqn, limit))?;
        Ok(Answer::Done)
    }

    pub(super) fn query_srq(&self, srqn: u32) -> Reply {
        self.lane.with(|fabric| fabric.srq_limit(self.id, srqn)).map(Answer::Handle)
    }

    /// Only the lane looks into it, so nobody does any more when it is gone.
    pub(super) fn destroy_srq(&mut self, srqn: u32) -> Reply {
        if !self.srqs.contains_key(&srqn) {
            return Err(EINVAL);
        }
        self.lane.with(|fabric| fabric.destroy_srq(self.id, srqn))?;
        if let Some(srq) = self.srqs.remove(&srqn) {
            self.release(Resource::Qps, srq.place);
            self.use_pd(srq.pd, false);
            self.use_xrcd(srq.xrcd, false);
        }
        Ok(Answer::Done)
    }

    pub(super) fn open_xrcd(&mut self, creates: bool, exclusive: bool, fds: Vec<OwnedFd>) -> Reply {
        let file = fds.into_iter().next().map(|file| identity(&file)).transpose()?;
        let handle = self.handle()?;
        // As a protection domain does, it costs a little of the router's memory.
        if !self.account.take(Resource::Pds, 1) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let opened = self.lane.with(|fabric| match file {
            Some(file) if creates && exclusive && fabric.has_xrcd(self.id, file) => {
                Err(Errno::EXIST.raw_os_error())
            }
            _ => fabric.open_xrcd(self.id, file, creates),
        });
        let domain = opened.inspect_err(|_| self.account.give(Resource::Pds, 1))?;
        self.xrcds.insert(handle, Xrcd { domain, users: 0 });
        Ok(Answer::Handle(handle))
    }

    pub(super) fn close_xrcd(&mut self, handle: u32) -> Reply {
        match self.xrcds.get(&handle) {
            None => Err(EINVAL),
            Some(xrcd) if xrcd.users > 0 => Err(Errno::BUSY.raw_os_error()),
            Some(xrcd) => {
                let domain = xrcd.domain;
                self.xrcds.remove(&handle);
                self.lane.with(|fabric| fabric.close_xrcd(domain));
                self.account.give(Resource::Pds, 1);
                Ok(Answer::Done)
            }
        }
    }

    /// One more (`true`) or one less user of an XRC domain that is open.
    pub(super) fn use_xrcd(&mut self, handle: Option<u32>, more: bool) {
        if let Some(xrcd) = handle.and_then(|handle| self.xrcds.get_mut(&handle)) {
            xrcd.users = if more { xrcd.users + 1 } else { xrcd.users - 1 };
        }
    }

    /// The QP that is asked for as the fabric knows its parts, if they are the client's own and belong together; and
    /// how many completions of shared receives it must have room for.
    pub(super) fn check_qp(&self, create: &CreateQp) -> Result<(CreateQp, Option<u32>), i32> {
        let qp_type = QpType::try_from(create.qp_type).map_err(|_| EINVAL)?;
        let (sends, receives) = (qp_type != QpType::XrcRecv, !is_xrc(qp_type));
        let known = self.pds.contains_key(&create.pd) == sends
            && self.cqs.contains_key(&create.send_cq) == sends
            && self.cqs.contains_key(&create.recv_cq) == receives
            && (create.srq.is_none() || receives)
            && create.xrcd.is_some() != sends;
        if !known {
            return Err(EINVAL);
        }
        let xrcd = match create.xrcd {
            None => None,
            Some(handle) => Some(self.xrcds.get(&handle).ok_or(EINVAL)?.domain),
        };
        let entries = match create.srq {
            None => None,
            Some(srq) if self.srqs.contains_key(&srq) => {
                Some(self.lane.with(|fabric| fabric.srq_entries(self.id, srq))?)
            }
            Some(_) => return Err(EINVAL),
        };
        Ok((CreateQp { xrcd, ..*create }, entries))
    }
}

fn is_xrc(qp_type: QpType) -> bool {
    matches!(qp_type, QpType::XrcSend | QpType::XrcRecv)
}

/// Which file it is: device and inode. Never asks a server for it, which may be the client's own.
fn identity(file: &OwnedFd) -> Result<(u64, u64), i32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(file, c"", flags, StatxFlags::INO).map_err(Errno::raw_os_error)?;
    Ok((u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor), stat.stx_ino))
}
