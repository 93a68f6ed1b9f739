//! Two QPs of two opened devices, each with a buffer, and their way from RESET to RTS.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::Buffer,
    cq::{Channel, Cq, Wc},
    qp::{Qp, QpInit, Send},
    verbs::{ALL_ACCESS, Context, Mr, Pd},
};

/// How long a completion may take that is sure to come.
pub(crate) const SOON: Duration = Duration::from_secs(5);
/// How long nothing has to happen until a test believes that nothing will.
pub(crate) const QUIET: Duration = Duration::from_millis(40);
/// The qkey of all datagram QPs.
pub(crate) const QKEY: u32 = 0x1234_5678;

/// What both ends are made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) qp_type: ibv_qp_type,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) sq_sig_all: bool,
    pub(crate) buffer: usize,
    pub(crate) access: u32,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) min_rnr_timer: u8,
    /// READs and atomics outstanding, as requester and as responder.
    pub(crate) initiator_depth: u8,
    pub(crate) responder_depth: u8,
    pub(crate) gid_index: u8,
    pub(crate) cqe: u32,
}

impl Setup {
    pub(crate) fn new(qp_type: ibv_qp_type) -> Self {
        Self {
            qp_type,
            cap: ibv_qp_cap {
                max_send_wr: 64,
                max_recv_wr: 64,
                max_send_sge: 4,
                max_recv_sge: 4,
                max_inline_data: 256,
            },
            sq_sig_all: false,
            buffer: 1 << 20,
            access: ALL_ACCESS,
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
            min_rnr_timer: 1,
            initiator_depth: 4,
            responder_depth: 4,
            gid_index: 0,
            cqe: 256,
        }
    }
}

/// One QP with all that belongs to it. Fields end in this order.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) qp: Qp,
    pub(crate) mr: Mr,
    pub(crate) buffer: Buffer,
    pub(crate) send_cq: Arc<Cq>,
    pub(crate) recv_cq: Arc<Cq>,
    pub(crate) pd: Arc<Pd>,
    pub(crate) context: Arc<Context>,
    setup: Setup,
}

/// Where a peer is found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) gid: [u8; 16],
    pub(crate) qpn: u32,
}

impl End {
    /// A QP in RESET, on a device opened for it alone.
    pub(crate) fn new(setup: &Setup) -> Result<Self> {
        Self::on(&Context::open()?, setup)
    }

    /// A QP in RESET with a PD, CQs and a buffer of its own.
    pub(crate) fn on(context: &Arc<Context>, setup: &Setup) -> Result<Self> {
        Self::within(context, Pd::new(context)?, setup)
    }

    /// A QP in RESET in a PD that is there.
    pub(crate) fn within(context: &Arc<Context>, pd: Arc<Pd>, setup: &Setup) -> Result<Self> {
        let cq = || anyhow::Ok(Cq::new(context, setup.cqe, Some(&Channel::new(context)?))?);
        let (send_cq, recv_cq) = (cq()?, cq()?);
        let buffer = Buffer::new(setup.buffer)?;
        let mr = Mr::new(&pd, buffer.addr(), buffer.len(), setup.access)?;
        let init = QpInit { qp_type: setup.qp_type, cap: setup.cap, sq_sig_all: setup.sq_sig_all };
        let qp = Qp::new(&pd, &send_cq, &recv_cq, init)?;
        Ok(Self { qp, mr, buffer, send_cq, recv_cq, pd, context: Arc::clone(context), setup: *setup })
    }

    pub(crate) fn address(&self) -> Result<Address> {
        Ok(Address { gid: self.context.gid(self.setup.gid_index.into())?, qpn: self.qp.number() })
    }

    /// What INIT takes, and its mask.
    pub(crate) fn init_attr(&self) -> (ibv_qp_attr, u32) {
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            port_num: 1,
            qkey: QKEY,
            qp_access_flags: self.setup.access,
            ..ibv_qp_attr::default()
        };
        let own = if self.setup.qp_type == IBV_QPT_UD { IBV_QP_QKEY } else { IBV_QP_ACCESS_FLAGS };
        (attr, IBV_QP_STATE | IBV_QP_PORT | IBV_QP_PKEY_INDEX | own)
    }

    /// What RTR takes, and its mask.
    pub(crate) fn rtr_attr(&self, peer: Address) -> (ibv_qp_attr, u32) {
        let mut attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            path_mtu: IBV_MTU_1024,
            dest_qp_num: peer.qpn,
            rq_psn: 77,
            max_dest_rd_atomic: self.setup.responder_depth,
            min_rnr_timer: self.setup.min_rnr_timer,
            ..ibv_qp_attr::default()
        };
        attr.ah_attr = ah_attr(peer.gid, self.setup.gid_index);
        let mask = match self.setup.qp_type {
            IBV_QPT_UD => IBV_QP_STATE,
            IBV_QPT_UC => IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN,
            _ => {
                IBV_QP_STATE
                    | IBV_QP_AV
                    | IBV_QP_PATH_MTU
                    | IBV_QP_DEST_QPN
                    | IBV_QP_RQ_PSN
                    | IBV_QP_MAX_DEST_RD_ATOMIC
                    | IBV_QP_MIN_RNR_TIMER
            }
        };
        (attr, mask)
    }

    /// What RTS takes, and its mask.
    pub(crate) fn rts_attr(&self) -> (ibv_qp_attr, u32) {
        let attr = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: 77,
            timeout: self.setup.timeout,
            retry_cnt: self.setup.retry_cnt,
            rnr_retry: self.setup.rnr_retry,
            max_rd_atomic: self.setup.initiator_depth,
            ..ibv_qp_attr::default()
        };
        let reliable = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
        let own = if self.setup.qp_type == IBV_QPT_RC { reliable } else { 0 };
        (attr, IBV_QP_STATE | IBV_QP_SQ_PSN | own)
    }

    pub(crate) fn to_init(&self) -> Result<()> {
        let (attr, mask) = self.init_attr();
        self.qp.modify(&attr, mask).context("RESET to INIT")
    }

    pub(crate) fn to_rtr(&self, peer: Address) -> Result<()> {
        let (attr, mask) = self.rtr_attr(peer);
        self.qp.modify(&attr, mask).context("INIT to RTR")
    }

    pub(crate) fn to_rts(&self) -> Result<()> {
        let (attr, mask) = self.rts_attr();
        self.qp.modify(&attr, mask).context("RTR to RTS")
    }

    /// From RESET to RTS.
    pub(crate) fn connect(&self, peer: Address) -> Result<()> {
        self.to_init()?;
        self.to_rtr(peer)?;
        self.to_rts()
    }

    /// A part of the buffer.
    pub(crate) fn sge(&self, at: usize, len: usize) -> ibv_sge {
        ibv_sge { addr: (self.buffer.addr() + at) as u64, length: len as u32, lkey: self.mr.lkey() }
    }

    /// A place in the buffer as the peer names it.
    pub(crate) fn remote(&self, at: usize) -> (u64, u32) {
        ((self.buffer.addr() + at) as u64, self.mr.rkey())
    }

    /// Posts one work request, and takes its completion, which must be a success.
    pub(crate) fn execute(&self, work: &Send<'_>) -> Result<Wc> {
        self.qp.send(work)?;
        let wc = self.send_cq.next()?;
        wc.expect(IBV_WC_SUCCESS)?;
        ensure!(wc.wr_id == work.wr_id, "the completion of another work request: {wc:?}");
        Ok(wc)
    }

    /// Takes a receive completion, which must be a success.
    pub(crate) fn received(&self) -> Result<Wc> {
        let wc = self.recv_cq.next()?;
        wc.expect(IBV_WC_SUCCESS)?;
        ensure!(wc.qp_num == self.qp.number(), "the completion of another QP: {wc:?}");
        Ok(wc)
    }
}

/// The way to a GID, from an own one.
pub(crate) fn ah_attr(gid: [u8; 16], sgid_index: u8) -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: gid },
            hop_limit: 64,
            sgid_index,
            ..ibv_global_route::default()
        },
        is_global: 1,
        port_num: 1,
        ..ibv_ah_attr::default()
    }
}

/// Two ends in RTS.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) a: End,
    pub(crate) b: End,
}

impl Pair {
    /// Two connected ends.
    pub(crate) fn new(setup: &Setup) -> Result<Self> {
        let pair = Self::unconnected(setup)?;
        pair.a.connect(pair.b.address()?)?;
        pair.b.connect(pair.a.address()?)?;
        Ok(pair)
    }

    /// Two ends of a type, with all else usual.
    pub(crate) fn of(qp_type: ibv_qp_type) -> Result<Self> {
        Self::new(&Setup::new(qp_type))
    }

    /// Two ends in RESET.
    pub(crate) fn unconnected(setup: &Setup) -> Result<Self> {
        Ok(Self { a: End::new(setup)?, b: End::new(setup)? })
    }
}
