//! Commands as librdmacm writes them (`rdma_user_cm.h`), in both dialects: the older one has IPv4 and IPv6 addresses
//! only and asks for the whole route at once. Older releases leave the last fields away.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use verbs_abi::proto::cm::{Address, CmOption, Command, ConnParam, IbAddress, MAX_PRIVATE_DATA};

use super::bytes::Reader;
use crate::abi::edge::Errno;

/// The longest option that is looked at.
const MAX_OPTION: u32 = 4096;
/// `AF_IB`.
pub(super) const AF_IB: u16 = 27;
/// `sizeof(struct sockaddr_in6)`, `sizeof(struct sockaddr_storage)`.
pub(super) const SOCKADDR_IN6: usize = 28;
pub(super) const STORAGE: usize = 128;
/// `struct ib_path_rec_data`, and the flags of one that is a path to use.
const PATH_DATA: usize = 72;
const PATH_FLAGS: u32 = 0x2b;

/// What a reply looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    None,
    /// `rdma_ucm_create_id_resp`, `rdma_ucm_destroy_id_resp`, `rdma_ucm_migrate_resp`: one number.
    Number,
    /// `rdma_ucm_query_addr_resp` with addresses, or with GIDs as `sockaddr_ib`.
    Addresses,
    Gids,
    /// `rdma_ucm_query_path_resp`.
    Paths,
    /// `rdma_ucm_query_route_resp`.
    Route,
    /// `ib_uverbs_qp_attr`.
    QpAttr,
    /// `rdma_ucm_event_resp`.
    Event,
}

/// A command, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) what: What,
    pub(super) shape: Shape,
    /// Where the reply goes.
    pub(super) response: u64,
    /// How long it may be.
    pub(super) room: u16,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum What {
    Ask(Command),
    /// The next event, for which the caller may have to wait.
    NextEvent,
    /// To this channel; the other one is named by its descriptor.
    Migrate {
        id: u32,
        from: i32,
    },
    /// The option lies in the program's memory.
    SetOption {
        id: u32,
        level: u32,
        name: u32,
        value: u64,
        len: u32,
    },
}

/// Takes a command apart.
pub(super) fn decode(bytes: &[u8]) -> Result<Written, Errno> {
    let mut header = Reader::new(bytes);
    let (command, len, room) = (header.u32()?, header.u16()?, header.u16()?);
    let mut body = Reader::new(header.bytes(len.into())?);
    let body = &mut body;
    let written = |(what, shape, response)| Written { what, shape, response, room };
    let (command, shape, response) = match command {
        0 => create_id(body)?,
        1 => {
            let (response, id) = (body.u64()?, body.u32()?);
            (Command::DestroyId { id }, Shape::Number, response)
        }
        2 => {
            body.u64()?;
            let address = Reader::new(body.bytes(SOCKADDR_IN6)?);
            (Command::Bind { address: ip(address)?.ok_or(Errno::INVAL)?, id: body.u32()? }, Shape::None, 0)
        }
        3 => resolve_ip(body)?,
        4 => (Command::ResolveRoute { id: body.u32()? }, Shape::None, 0),
        5 => {
            let (response, id) = (body.u64()?, body.u32()?);
            (Command::Query { id }, Shape::Route, response)
        }
        6 => connect(body)?,
        7 => (Command::Listen { id: body.u32()?, backlog: body.u32()? }, Shape::None, 0),
        8 => accept(body)?,
        9 => reject(body)?,
        10 => (Command::Disconnect { id: body.u32()? }, Shape::None, 0),
        11 => {
            let (response, id, state) = (body.u64()?, body.u32()?, body.u32()?);
            (Command::InitQpAttr { id, state }, Shape::QpAttr, response)
        }
        12 => return Ok(written((What::NextEvent, Shape::Event, body.u64()?))),
        14 => return Ok(written((set_option(body)?, Shape::None, 0))),
        15 => (Command::Notify { id: body.u32()?, event: body.u32()? }, Shape::None, 0),
        16 => join_ip(body)?,
        17 => {
            let (response, id) = (body.u64()?, body.u32()?);
            (Command::LeaveMulticast { id }, Shape::Number, response)
        }
        18 => {
            let (response, id, fd) = (body.u64()?, body.u32()?, body.u32()?);
            return Ok(written((What::Migrate { id, from: fd as i32 }, Shape::Number, response)));
        }
        19 => query(body)?,
        20 => bind(body)?,
        21 => resolve_addr(body)?,
        22 => join(body)?,
        13 | 23 | 24 => return Err(Errno::NOSYS),
        _ => return Err(Errno::INVAL),
    };
    Ok(written((What::Ask(command), shape, response)))
}

type Decoded = Result<(Command, Shape, u64), Errno>;

fn create_id(body: &mut Reader<'_>) -> Decoded {
    let (uid, response) = (body.u64()?, body.u64()?);
    let command = Command::CreateId { uid, space: body.u16()?, qp_type: body.u8()? };
    Ok((command, Shape::Number, response))
}

fn resolve_ip(body: &mut Reader<'_>) -> Decoded {
    let source = ip(Reader::new(body.bytes(SOCKADDR_IN6)?))?;
    let destination = ip(Reader::new(body.bytes(SOCKADDR_IN6)?))?.ok_or(Errno::INVAL)?;
    let (id, timeout_ms) = (body.u32()?, body.u32()?);
    Ok((Command::ResolveAddr { id, source, destination, timeout_ms }, Shape::None, 0))
}

fn resolve_addr(body: &mut Reader<'_>) -> Decoded {
    let (id, timeout_ms) = (body.u32()?, body.u32()?);
    let (source_len, destination_len, reserved) = (body.u16()?, body.u16()?, body.u32()?);
    let source = address(body, source_len)?;
    let destination = address(body, destination_len)?.ok_or(Errno::INVAL)?;
    if reserved != 0 {
        return Err(Errno::INVAL);
    }
    Ok((Command::ResolveAddr { id, source, destination, timeout_ms }, Shape::None, 0))
}

fn bind(body: &mut Reader<'_>) -> Decoded {
    let (id, len, reserved) = (body.u32()?, body.u16()?, body.u16()?);
    let address = address(body, len)?.filter(|_| reserved == 0).ok_or(Errno::INVAL)?;
    Ok((Command::Bind { id, address }, Shape::None, 0))
}

fn query(body: &mut Reader<'_>) -> Decoded {
    let (response, id) = (body.u64()?, body.u32()?);
    let shape = match body.u32()? {
        0 => Shape::Addresses,
        1 => Shape::Paths,
        2 => Shape::Gids,
        _ => return Err(Errno::NOSYS),
    };
    Ok((Command::Query { id }, shape, response))
}

fn connect(body: &mut Reader<'_>) -> Decoded {
    let (param, valid) = conn_param(body)?;
    let id = body.u32()?;
    if valid { Ok((Command::Connect { id, param }, Shape::None, 0)) } else { Err(Errno::INVAL) }
}

fn accept(body: &mut Reader<'_>) -> Decoded {
    let uid = body.u64()?;
    let (param, valid) = conn_param(body)?;
    Ok((Command::Accept { id: body.u32()?, uid, param: valid.then_some(param) }, Shape::None, 0))
}

fn reject(body: &mut Reader<'_>) -> Decoded {
    let (id, len, reason) = (body.u32()?, body.u8()?, body.u8()?);
    body.u16()?;
    let private_data = body.bytes(len.into())?.to_vec();
    Ok((Command::Reject { id, reason, private_data }, Shape::None, 0))
}

fn join_ip(body: &mut Reader<'_>) -> Decoded {
    let (response, uid) = (body.u64()?, body.u64()?);
    let address = ip(Reader::new(body.bytes(SOCKADDR_IN6)?))?.ok_or(Errno::INVAL)?;
    let command = Command::JoinMulticast { id: body.u32()?, uid, address, send_only: false };
    Ok((command, Shape::Number, response))
}

fn join(body: &mut Reader<'_>) -> Decoded {
    let (response, uid, id) = (body.u64()?, body.u64()?, body.u32()?);
    let (len, flags) = (body.u16()?, body.u16()?);
    let address = address(body, len)?.ok_or(Errno::INVAL)?;
    if flags > 1 {
        return Err(Errno::INVAL);
    }
    Ok((Command::JoinMulticast { id, uid, address, send_only: flags == 1 }, Shape::Number, response))
}

fn set_option(body: &mut Reader<'_>) -> Result<What, Errno> {
    let (value, id) = (body.u64()?, body.u32()?);
    let (level, name, len) = (body.u32()?, body.u32()?, body.u32()?);
    if len > MAX_OPTION {
        return Err(Errno::INVAL);
    }
    Ok(What::SetOption { id, level, name, value, len })
}

/// An option's bytes, by its level and name.
pub(super) fn option(level: u32, name: u32, bytes: &[u8]) -> Result<CmOption, Errno> {
    let byte = || if let [value] = bytes { Ok(*value) } else { Err(Errno::INVAL) };
    let flag = || bytes.try_into().map(|bytes| i32::from_ne_bytes(bytes) != 0).map_err(|_| Errno::INVAL);
    match (level, name) {
        (0, 0) => Ok(CmOption::Tos(byte()?)),
        (0, 1) => Ok(CmOption::ReuseAddr(flag()?)),
        (0, 2) => Ok(CmOption::AfOnly(flag()?)),
        (0, 3) => Ok(CmOption::AckTimeout(byte()?)),
        (1, 1) => {
            let whole = bytes.len().is_multiple_of(PATH_DATA);
            let is_path = |data: &[u8]| data.starts_with(&PATH_FLAGS.to_ne_bytes());
            let usable = whole && bytes.chunks(PATH_DATA).any(is_path);
            if usable { Ok(CmOption::Path) } else { Err(Errno::INVAL) }
        }
        _ => Err(Errno::NOSYS),
    }
}

/// `struct rdma_ucm_conn_param`, and whether it counts.
fn conn_param(body: &mut Reader<'_>) -> Result<(ConnParam, bool), Errno> {
    let (qpn, qkey) = (body.u32()?, body.u32()?);
    let data = body.bytes(MAX_PRIVATE_DATA)?;
    let len = usize::from(body.u8()?);
    let param = ConnParam {
        qpn,
        qkey,
        private_data: data[..len].to_vec(),
        srq: body.u8()?,
        responder_resources: body.u8()?,
        initiator_depth: body.u8()?,
        flow_control: body.u8()?,
        retry_count: body.u8()?,
        rnr_retry_count: body.u8()?,
    };
    Ok((param, body.u8()? != 0))
}

/// An address in a `sockaddr_storage`; its length must be that of its family.
fn address(body: &mut Reader<'_>, len: u16) -> Result<Option<Address>, Errno> {
    let storage = body.bytes(STORAGE)?;
    let family = Reader::new(storage).u16()?;
    let right = match i32::from(family) {
        _ if len == 0 => return Ok(None),
        libc::AF_INET => 16,
        libc::AF_INET6 => 28,
        _ if family == AF_IB => 48,
        _ => return Err(Errno::INVAL),
    };
    match () {
        () if len != right => Err(Errno::INVAL),
        () if family == AF_IB => ib(Reader::new(storage)).map(Some),
        () => ip(Reader::new(storage)),
    }
}

/// `sockaddr_in` or `sockaddr_in6`; `None` where there is no address.
fn ip(mut from: Reader<'_>) -> Result<Option<Address>, Errno> {
    let (family, port) = (from.u16()?, from.be16()?);
    let address: SocketAddr = match i32::from(family) {
        libc::AF_UNSPEC => return Ok(None),
        libc::AF_INET => SocketAddrV4::new(Ipv4Addr::from(from.be32()?), port).into(),
        libc::AF_INET6 => {
            let (flow, ip, scope) = (from.be32()?, from.gid()?, from.u32()?);
            SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into()
        }
        _ => return Err(Errno::AFNOSUPPORT),
    };
    Ok(Some(Address::Ip(address)))
}

/// `sockaddr_ib`.
fn ib(mut from: Reader<'_>) -> Result<Address, Errno> {
    from.u16()?;
    let (pkey, flow_label, gid) = (from.be16()?, from.be32()?, from.gid()?);
    let (sid, sid_mask, scope_id) = (from.be64()?, from.be64()?, from.u64()?);
    Ok(Address::Ib(IbAddress { pkey, flow_label, gid, sid, sid_mask, scope_id }))
}
