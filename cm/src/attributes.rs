//! What an id says of its route, and the attributes with which its QP follows the connection.

use verbs_abi::{
    ids,
    proto::{
        AhAttr, Gid, QpAttr,
        cm::{Address, CmAnswer, Path, Route},
    },
    verbs::{AccessFlags, QpAttrMask, QpState},
};

use crate::{CommId, Manager, Refusal, UDP_QKEY, id::Id, id::Phase, id::State, place::Place};

/// Packet life time code of RoCE paths, `CMA_IBOE_PACKET_LIFETIME`.
const LIFE_TIME: u8 = 18;
/// Hop limit of routed paths.
const HOP_LIMIT: u8 = 64;
/// `IBV_QPT_UC`, `IBV_QPT_XRC_SEND`, `IBV_QPT_XRC_RECV`.
const QPT_UC: u8 = 3;
const QPT_XRC_SEND: u8 = 9;
const QPT_XRC_RECV: u8 = 10;

impl Manager {
    pub(crate) fn route(&self, comm: CommId) -> Result<Route, Refusal> {
        let id = self.id(comm)?;
        let place = self.place(id)?;
        let routed = matches!(id.state, State::RouteResolved | State::Connect | State::Disconnect);
        // The accepting end of datagrams has no path: who asked did not tell.
        let path = routed && !(id.is_datagram() && id.asked_sid != 0);
        Ok(Route {
            space: id.space,
            source: id.source,
            destination: id.destination,
            device: gids(id, place),
            path: path.then_some(Path {
                sid: id.asked_sid,
                mtu: self.settings.mtu,
                traffic_class: id.tos,
                life_time: LIFE_TIME,
            }),
        })
    }

    pub(crate) fn init_qp_attr(&self, comm: CommId, state: u32) -> Result<CmAnswer, Refusal> {
        let id = self.id(comm)?;
        if !id.on_device {
            return Err(Refusal::WrongState);
        }
        let wanted = QpState::try_from(state).map_err(|_| Refusal::Invalid)?;
        let (mask, attr) = match wanted {
            _ if id.is_datagram() => (init_mask(QpAttrMask::QKEY), QpAttr { qkey: UDP_QKEY, ..init(0) }),
            _ if id.phase == Phase::None => (init_mask(QpAttrMask::ACCESS_FLAGS), init(0)),
            QpState::Init => (init_mask(QpAttrMask::ACCESS_FLAGS), init(access(id))),
            QpState::Rtr => self.rtr(id)?,
            QpState::Rts => rts(id),
            _ => return Err(Refusal::Invalid),
        };
        Ok(CmAnswer::QpAttr { mask: mask.bits(), attr: QpAttr { qp_state: state, ..attr } })
    }

    fn rtr(&self, id: &Id) -> Result<(QpAttrMask, QpAttr), Refusal> {
        let connection = &id.connection;
        let mut mask = QpAttrMask::STATE
            | QpAttrMask::AV
            | QpAttrMask::PATH_MTU
            | QpAttrMask::DEST_QPN
            | QpAttrMask::RQ_PSN;
        let mut attr = QpAttr {
            path_mtu: self.settings.mtu.into(),
            dest_qp_num: connection.remote_qpn,
            rq_psn: connection.remote_psn,
            ah_attr: self.ah(id)?,
            ..QpAttr::default()
        };
        if !matches!(id.qp_type, QPT_UC | QPT_XRC_SEND) {
            mask |= QpAttrMask::MAX_DEST_RD_ATOMIC | QpAttrMask::MIN_RNR_TIMER;
            attr.max_dest_rd_atomic = connection.responder_resources;
        }
        Ok((mask, attr))
    }

    /// The way to the other end.
    pub(crate) fn ah(&self, id: &Id) -> Result<AhAttr, Refusal> {
        let place = self.place(id)?;
        let [_, dgid] = gids(id, place).ok_or(Refusal::WrongState)?;
        let source = id.source_ip().ok_or(Refusal::WrongState)?;
        Ok(AhAttr {
            dgid,
            sgid_index: place.gid_index(source.ip()),
            hop_limit: HOP_LIMIT,
            traffic_class: id.tos,
            is_global: 1,
            port_num: 1,
            ..AhAttr::default()
        })
    }
}

/// The GIDs of both ends, once the id is bound to the device.
fn gids(id: &Id, place: &Place) -> Option<[Gid; 2]> {
    let gid = |address: Option<Address>| match address {
        Some(Address::Ip(address)) if address.ip().is_unspecified() => ids::Gid::from(address.ip()).0,
        Some(Address::Ip(address)) => place.gid(address.ip()),
        Some(Address::Ib(address)) => address.gid,
        None => Gid::default(),
    };
    id.on_device.then(|| [gid(id.source), gid(id.destination)])
}

fn init_mask(last: QpAttrMask) -> QpAttrMask {
    QpAttrMask::STATE | QpAttrMask::PKEY_INDEX | QpAttrMask::PORT | last
}

fn init(access: u32) -> QpAttr {
    QpAttr { port_num: 1, qp_access_flags: access, ..QpAttr::default() }
}

/// What the other end may do: reads and atomics only where some are answered.
fn access(id: &Id) -> u32 {
    let write = AccessFlags::REMOTE_WRITE;
    let all = write | AccessFlags::REMOTE_READ | AccessFlags::REMOTE_ATOMIC;
    if id.connection.responder_resources > 0 { all.bits() } else { write.bits() }
}

fn rts(id: &Id) -> (QpAttrMask, QpAttr) {
    let connection = &id.connection;
    let mut mask = QpAttrMask::STATE | QpAttrMask::SQ_PSN;
    let mut attr = QpAttr { sq_psn: connection.local_psn, ..QpAttr::default() };
    if id.qp_type != QPT_UC {
        mask |= QpAttrMask::TIMEOUT;
        // One more than the path's life time: there and back.
        attr.timeout = id.ack_timeout.unwrap_or(LIFE_TIME + 1);
    }
    // A receiver of XRC asks for nothing.
    if !matches!(id.qp_type, QPT_UC | QPT_XRC_RECV) {
        mask |= QpAttrMask::RETRY_CNT | QpAttrMask::RNR_RETRY | QpAttrMask::MAX_QP_RD_ATOMIC;
        attr.retry_cnt = connection.retry_count;
        attr.rnr_retry = connection.rnr_retry_count;
        attr.max_rd_atomic = connection.initiator_depth;
    }
    (mask, attr)
}
