//! Replies as librdmacm reads them (`rdma_user_cm.h`, `ib_user_sa.h`). Older releases give less room: they get what
//! fits of the same layout.

use std::net::SocketAddr;

use verbs_abi::proto::cm::{
    Address, CmAnswer, ConnParam, Event, EventParam, IbAddress, MAX_PRIVATE_DATA, Route, UdParam,
};
use verbs_abi::proto::{AhAttr, QpAttr};

use super::bytes::Writer;
use super::decode::{AF_IB, SOCKADDR_IN6, STORAGE, Shape};
use crate::abi::edge::Errno;

/// No index: librdmacm finds the device by its GUID.
const NO_DEVICE_INDEX: u32 = u32::MAX;
/// A path for everything: `IB_PATH_GMP | IB_PATH_PRIMARY | IB_PATH_BIDIRECTIONAL`.
const PATH_FLAGS: u32 = 0x2b;
/// "Exactly", before a value of a path record.
const EXACTLY: u8 = 2 << 6;
const DEFAULT_PKEY: u16 = 0xffff;
const HOP_LIMIT: u8 = 64;
/// Private data and what follows it in `struct rdma_ucm_ud_param`, and the room of both kinds of parameters.
const EVENT_PARAM: usize = 304;
/// `struct rdma_ucm_event_resp`, up to the parameters.
const EVENT_HEAD: usize = 20;

/// The bytes of a reply, and the shortest that may be stored of it.
pub(super) fn encode(shape: Shape, answer: &CmAnswer, guid: [u8; 8]) -> Result<(Vec<u8>, usize), Errno> {
    let mut to = Writer::default();
    let least = match (shape, answer) {
        (Shape::None, CmAnswer::Done) => 0,
        (Shape::Number, CmAnswer::Id(number) | CmAnswer::Reported { events: number, .. }) => {
            to.u32(*number).len()
        }
        (Shape::Addresses, CmAnswer::Route(route)) => {
            let [source, destination] = [route.source, route.destination].map(stored);
            query_addr(&mut to, route, guid, &source, &destination)
        }
        (Shape::Gids, CmAnswer::Route(route)) => {
            let [source, destination] = gids(route).map(|gid| stored(Some(Address::Ib(gid))));
            query_addr(&mut to, route, guid, &source, &destination)
        }
        (Shape::Paths, CmAnswer::Route(route)) => paths(&mut to, route),
        (Shape::Route, CmAnswer::Route(route)) => query_route(&mut to, route, guid),
        (Shape::QpAttr, CmAnswer::QpAttr { mask, attr }) => qp_attr(&mut to, *mask, attr),
        (Shape::Event, CmAnswer::Event(Some(event))) => self::event(&mut to, event),
        _ => return Err(Errno::PROTO),
    };
    Ok((to.finish(), least))
}

/// A socket address.
pub(super) fn stored(address: Option<Address>) -> Vec<u8> {
    let mut to = Writer::default();
    match address {
        None => {}
        Some(Address::Ip(SocketAddr::V4(v4))) => {
            to.u16(libc::AF_INET as u16).be16(v4.port()).bytes(&v4.ip().octets()).zeros(8);
        }
        Some(Address::Ip(SocketAddr::V6(v6))) => {
            to.u16(libc::AF_INET6 as u16).be16(v6.port()).be32(v6.flowinfo());
            to.bytes(&v6.ip().octets()).u32(v6.scope_id());
        }
        Some(Address::Ib(ib)) => {
            to.u16(AF_IB).be16(ib.pkey).be32(ib.flow_label).bytes(&ib.gid);
            to.be64(ib.sid).be64(ib.sid_mask).u64(ib.scope_id);
        }
    }
    to.finish()
}

/// Both ends as InfiniBand addresses. What is one already stays.
fn gids(route: &Route) -> [IbAddress; 2] {
    let device = route.device.unwrap_or_default();
    let ends = [(route.source, device[0]), (route.destination, device[1])];
    ends.map(|(address, gid)| match address {
        Some(Address::Ib(address)) => address,
        Some(Address::Ip(address)) => {
            let sid = u64::from(route.space) << 16 | u64::from(address.port());
            IbAddress { gid, sid, ..IbAddress::default() }
        }
        None => IbAddress { gid, ..IbAddress::default() },
    })
}

/// `struct rdma_ucm_query_addr_resp`: 280 bytes, before release 30 without the last 8.
fn query_addr(to: &mut Writer, route: &Route, guid: [u8; 8], source: &[u8], destination: &[u8]) -> usize {
    let known = route.device.is_some();
    to.bytes(&if known { guid } else { [0; 8] }).u8(known.into()).u8(0).u16(0);
    to.u16(source.len() as u16).u16(destination.len() as u16);
    to.bytes(source).pad_to(16 + STORAGE).bytes(destination).pad_to(16 + 2 * STORAGE);
    let least = to.len();
    to.u32(NO_DEVICE_INDEX).u32(0);
    least
}

/// `struct rdma_ucm_query_path_resp` with at most one path.
fn paths(to: &mut Writer, route: &Route) -> usize {
    to.u32(route.path.is_some().into()).u32(0);
    let least = to.len();
    let (Some(path), Some([sgid, dgid])) = (route.path, route.device) else { return least };
    to.u32(PATH_FLAGS).u32(0);
    // A PathRecord as the subnet administrator packs it.
    to.be64(path.sid).bytes(&dgid).bytes(&sgid).u32(0);
    to.be32(HOP_LIMIT.into()).u8(path.traffic_class).u8(0x80).be16(DEFAULT_PKEY);
    to.u16(0).u8(EXACTLY | path.mtu).u8(EXACTLY).u8(EXACTLY | path.life_time).u8(0).zeros(6);
    least
}

/// `struct rdma_ucm_query_route_resp`: 208 bytes, before release 30 without the last 8.
fn query_route(to: &mut Writer, route: &Route, guid: [u8; 8]) -> usize {
    const PATH: usize = 64;
    let known = route.device.is_some();
    to.bytes(&if known { guid } else { [0; 8] });
    if let Some([sgid, dgid]) = route.device {
        to.bytes(&dgid).bytes(&sgid).zeros(8);
        match route.path {
            None => to.zeros(12).be16(DEFAULT_PKEY),
            Some(path) => to.u32(0).u32(1).u32(path.mtu.into()).be16(DEFAULT_PKEY),
        };
        if let Some(path) = route.path {
            let exactly = EXACTLY >> 6;
            to.u8(HOP_LIMIT).u8(path.traffic_class).u8(0).u8(0).u8(exactly).u8(exactly);
            to.u8(0).u8(exactly).u8(path.life_time).u8(0);
        }
    }
    to.pad_to(8 + 2 * PATH);
    for address in [route.source, route.destination] {
        let end = to.len() + SOCKADDR_IN6;
        // InfiniBand addresses have no room here.
        let address = stored(address.filter(|address| matches!(address, Address::Ip(_))));
        to.bytes(&address).pad_to(end);
    }
    to.u32(route.path.is_some().into()).u8(known.into()).zeros(3);
    let least = to.len();
    to.u32(NO_DEVICE_INDEX).u32(0);
    least
}

/// `struct ib_uverbs_ah_attr`.
fn ah_attr(to: &mut Writer, ah: &AhAttr) {
    to.bytes(&ah.dgid).u32(ah.flow_label).u8(ah.sgid_index).u8(ah.hop_limit).u8(ah.traffic_class).u8(0);
    to.u16(ah.dlid).u8(ah.sl).u8(ah.src_path_bits).u8(ah.static_rate).u8(ah.is_global).u8(ah.port_num).u8(0);
}

/// `struct ib_uverbs_qp_attr`.
fn qp_attr(to: &mut Writer, mask: u32, attr: &QpAttr) -> usize {
    to.u32(mask).u32(attr.qp_state).u32(attr.cur_qp_state).u32(attr.path_mtu).u32(attr.path_mig_state);
    to.u32(attr.qkey).u32(attr.rq_psn).u32(attr.sq_psn).u32(attr.dest_qp_num).u32(attr.qp_access_flags);
    ah_attr(to, &attr.ah_attr);
    ah_attr(to, &attr.alt_ah_attr);
    // Capacities are not among what a connection says.
    to.zeros(20).u16(attr.pkey_index).u16(attr.alt_pkey_index);
    to.u8(attr.en_sqd_async_notify).u8(attr.sq_draining).u8(attr.max_rd_atomic).u8(attr.max_dest_rd_atomic);
    to.u8(attr.min_rnr_timer).u8(attr.port_num).u8(attr.timeout).u8(attr.retry_cnt).u8(attr.rnr_retry);
    to.u8(attr.alt_port_num).u8(attr.alt_timeout).zeros(5).len()
}

/// `struct rdma_ucm_event_resp`: 336 bytes, before release 31 without the last 8.
fn event(to: &mut Writer, event: &Event) -> usize {
    to.u64(event.uid).u32(event.id).u32(event.kind as u32).u32(event.status as u32);
    match &event.param {
        EventParam::Conn(param) => conn_param(to, param),
        EventParam::Ud(param) => ud_param(to, param),
    }
    let least = to.pad_to(EVENT_HEAD + EVENT_PARAM).u32(0).len();
    to.u64(0);
    least
}

fn conn_param(to: &mut Writer, param: &ConnParam) {
    to.u32(param.qpn).u32(param.qkey);
    let len = private_data(to, &param.private_data);
    to.u8(len).u8(param.srq).u8(param.responder_resources).u8(param.initiator_depth);
    to.u8(param.flow_control).u8(param.retry_count).u8(param.rnr_retry_count).u8(0);
}

fn ud_param(to: &mut Writer, param: &UdParam) {
    to.u32(param.qpn).u32(param.qkey);
    ah_attr(to, &param.ah);
    let len = private_data(to, &param.private_data);
    to.u8(len).zeros(7);
}

/// The room for private data, filled. How much it is: no message has more than 255 bytes of it.
fn private_data(to: &mut Writer, data: &[u8]) -> u8 {
    let data = &data[..data.len().min(u8::MAX.into())];
    let end = to.len() + MAX_PRIVATE_DATA;
    to.bytes(data).pad_to(end);
    data.len() as u8
}
