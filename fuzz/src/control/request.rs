//! Requests made of an input, with handles that somebody was given.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use verbs_abi::{
    proto::{
        AhAttr, Answer, CreateQp, CreateSrq, Gid, Mode, QpAttr, QpCap, RegMr, Request,
        cm::{Address, CmAnswer, CmOption, CmRequest, Command, ConnParam, IbAddress},
    },
    qp_state,
    shm::LAYOUT_VERSION,
    verbs::{QpAttrMask, QpState, QpType},
};

use crate::Input;

/// Those that programs make.
const TRANSITIONS: [(QpState, QpState); 8] = [
    (QpState::Reset, QpState::Init),
    (QpState::Init, QpState::Rtr),
    (QpState::Rtr, QpState::Rts),
    (QpState::Rts, QpState::Sqd),
    (QpState::Sqd, QpState::Rts),
    (QpState::Rts, QpState::Err),
    (QpState::Err, QpState::Reset),
    (QpState::Rts, QpState::Rts),
];

/// What any client was given. All may be tried by all.
#[derive(Debug, Default)]
pub(super) struct Handles {
    /// PDs, channels and CQs, which clients number for themselves.
    small: Vec<u32>,
    keys: Vec<u32>,
    qps: Vec<u32>,
    srqs: Vec<u32>,
    /// Of the connection manager.
    ids: Vec<u32>,
    gid: Gid,
}

impl Handles {
    pub(super) fn learn(&mut self, answer: &Answer) {
        match answer {
            Answer::Handle(handle) => self.small.push(*handle),
            Answer::Cq { cq, .. } => self.small.push(*cq),
            Answer::Mr { key } => self.keys.push(*key),
            Answer::Qp(new) => self.qps.push(new.qpn),
            Answer::Srq(new) => self.srqs.push(new.number),
            Answer::Cm(CmAnswer::Id(id)) => self.ids.push(*id),
            Answer::Cm(CmAnswer::Event(Some(event))) => self.ids.push(event.id),
            Answer::Gids(gids) => self.gid = gids.first().copied().unwrap_or_default(),
            _ => {}
        }
    }

    pub(super) fn request(&self, input: &mut Input<'_>) -> Request {
        match input.u8() % 42 {
            0 => Request::Hello { version: LAYOUT_VERSION + u32::from(input.u8() == 0), mode: Mode::Direct },
            1 => Request::Gids,
            2 => Request::AllocPd,
            3 => Request::DeallocPd { pd: one_of(&self.small, input) },
            4 | 5 => Request::RegMr(self.reg_mr(input)),
            6 => Request::DeregMr { key: one_of(&self.keys, input) },
            7 => Request::CreateChannel,
            8 => Request::DestroyChannel { channel: one_of(&self.small, input) },
            9 | 10 => {
                let channel = (input.u8() & 1 == 0).then(|| one_of(&self.small, input));
                Request::CreateCq { cqe: input.odd_number() as u32, channel }
            }
            11 => Request::DestroyCq { cq: one_of(&self.small, input) },
            12 | 13 => Request::CreateQp(self.create_qp(input)),
            14..=16 => self.modify_qp(input),
            20 => Request::AllocMw { pd: one_of(&self.small, input), is_type_2: input.u8() & 1 == 1 },
            21 => Request::DeallocMw { key: one_of(&self.keys, input) },
            22 => Request::CmHello { version: LAYOUT_VERSION + u32::from(input.u8() == 0) },
            23 => Request::Cm(CmRequest::OpenChannel),
            24 => Request::Cm(CmRequest::CloseChannel { channel: one_of(&self.small, input) }),
            25..=30 => {
                let (channel, command) = (one_of(&self.small, input), self.command(input));
                Request::Cm(CmRequest::Ask { channel, command })
            }
            17 => Request::QueryQp { qpn: one_of(&self.qps, input) },
            18 => Request::DestroyQp { qpn: one_of(&self.qps, input) },
            31 | 32 => Request::CreateSrq(self.create_srq(input)),
            33 => Request::LimitSrq { srqn: one_of(&self.srqs, input), limit: input.odd_number() as u32 },
            34 => Request::QuerySrq { srqn: one_of(&self.srqs, input) },
            35 => Request::DestroySrq { srqn: one_of(&self.srqs, input) },
            36 => Request::OpenXrcd { creates: input.u8() & 1 == 0, exclusive: input.u8() & 1 == 0 },
            37 => Request::CloseXrcd { xrcd: one_of(&self.small, input) },
            41 => Request::OpenQp { xrcd: one_of(&self.small, input), qpn: one_of(&self.qps, input) },
            38 => Request::AllocNullMr { pd: one_of(&self.small, input) },
            39 => Request::AttachMcast { qpn: one_of(&self.qps, input), group: group(input) },
            40 => Request::DetachMcast { qpn: one_of(&self.qps, input), group: group(input) },
            19 => Request::ReregMr { key: one_of(&self.keys, input), reg: self.reg_mr(input) },
            _ => Request::Status,
        }
    }

    /// A command of the connection manager.
    fn command(&self, input: &mut Input<'_>) -> Command {
        let (kind, id) = (input.u8() % 20, one_of(&self.ids, input));
        match kind {
            0 | 1 => {
                let space = input.pick(&[0x106, 0x111, 0x13f, 0x2, 0]);
                Command::CreateId { uid: input.u64(), space, qp_type: input.u8() % 10 }
            }
            2 => Command::DestroyId { id },
            3 => Command::Bind { id, address: address(input) },
            4 | 5 => Command::ResolveAddr {
                id,
                source: (input.u8() & 1 == 0).then(|| address(input)),
                destination: address(input),
                timeout_ms: input.odd_number() as u32,
            },
            6 => Command::ResolveRoute { id },
            7 => Command::Query { id },
            8 => Command::Connect { id, param: self.conn_param(input) },
            9 => Command::Listen { id, backlog: input.odd_number() as u32 },
            10 => {
                let param = (input.u8() & 3 != 0).then(|| self.conn_param(input));
                Command::Accept { id, uid: input.u64(), param }
            }
            11 => Command::Reject { id, reason: input.u8(), private_data: private_data(input) },
            12 => Command::Disconnect { id },
            13 => Command::InitQpAttr { id, state: u32::from(input.u8() % 8) },
            14 | 15 => Command::NextEvent,
            16 => Command::SetOption { id, option: option(input) },
            17 => Command::Notify { id, event: u32::from(input.u8() % 20) },
            18 => Command::JoinMulticast { id, uid: input.u64(), address: address(input), send_only: false },
            _ if input.u8() & 1 == 0 => Command::LeaveMulticast { id },
            _ => Command::MigrateId { id, from: one_of(&self.small, input) },
        }
    }

    fn conn_param(&self, input: &mut Input<'_>) -> ConnParam {
        ConnParam {
            qpn: one_of(&self.qps, input),
            qkey: input.u32(),
            private_data: private_data(input),
            srq: input.u8() & 1,
            responder_resources: input.u8(),
            initiator_depth: input.u8(),
            flow_control: input.u8() & 1,
            retry_count: input.u8(),
            rnr_retry_count: input.u8(),
        }
    }

    fn reg_mr(&self, input: &mut Input<'_>) -> RegMr {
        let (addr, len) = (input.odd_number(), input.odd_number());
        let pages = |at: u64| if at & 1 == 0 { at & !4095 } else { at };
        RegMr {
            pd: one_of(&self.small, input),
            addr,
            len,
            iova: if input.u8() & 1 == 0 { addr } else { input.odd_number() },
            access: input.u8().into(),
            shared_start: pages(addr.wrapping_add(input.odd_number())),
            shared_end: pages(addr.wrapping_add(input.odd_number())),
        }
    }

    fn create_srq(&self, input: &mut Input<'_>) -> CreateSrq {
        let xrc = (one_of(&self.small, input), one_of(&self.small, input));
        CreateSrq {
            pd: one_of(&self.small, input),
            max_wr: if input.u8() < 200 { u32::from(input.u8() % 9) } else { input.odd_number() as u32 },
            max_sge: if input.u8() < 200 { u32::from(input.u8() % 9) } else { input.odd_number() as u32 },
            xrc: (input.u8() < 80).then_some(xrc),
        }
    }

    fn create_qp(&self, input: &mut Input<'_>) -> CreateQp {
        let [max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data] =
            std::array::from_fn(|_| {
                if input.u8() < 200 { u32::from(input.u8() % 9) } else { input.odd_number() as u32 }
            });
        let cap = QpCap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data };
        if input.u8() < 40 {
            // A receiver of an XRC domain, which nothing else belongs to.
            let (qp_type, xrcd) = (QpType::XrcRecv.value(), Some(one_of(&self.small, input)));
            return CreateQp { qp_type, xrcd, cap, ..CreateQp::default() };
        }
        CreateQp {
            pd: one_of(&self.small, input),
            send_cq: one_of(&self.small, input),
            recv_cq: one_of(&self.small, input),
            srq: (input.u8() < 60).then(|| one_of(&self.srqs, input)),
            xrcd: (input.u8() < 20).then(|| one_of(&self.small, input)),
            qp_type: if input.u8() < 200 { 2 + u32::from(input.u8() % 3) } else { input.odd_number() as u32 },
            cap,
            block_self_mcast: input.u8() & 1 == 1,
            sq_sig_all: false,
        }
    }

    /// Mostly a transition that could be, with the attributes that it needs.
    fn modify_qp(&self, input: &mut Input<'_>) -> Request {
        let qp_type = input.pick(&[QpType::Rc, QpType::Uc, QpType::Ud, QpType::XrcRecv]);
        let (from, to) = input.pick(&TRANSITIONS);
        let rule = qp_state::rule(qp_type, from, to);
        let mask = match (input.u8(), rule) {
            (0..=219, Some(rule)) => rule.required.union(QpAttrMask::STATE).bits(),
            _ => input.odd_number() as u32,
        };
        let path = AhAttr {
            dgid: if input.u8() < 200 { self.gid } else { std::array::from_fn(|_| input.u8()) },
            is_global: 1,
            port_num: 1,
            sgid_index: input.u8() / 16,
            ..AhAttr::default()
        };
        let attr = QpAttr {
            qp_state: if input.u8() < 240 { to.value() } else { input.u8().into() },
            cur_qp_state: u32::from(input.u8() % 8),
            path_mtu: u32::from(input.u8() % 7),
            qkey: input.u32(),
            dest_qp_num: one_of(&self.qps, input),
            qp_access_flags: input.u8().into(),
            ah_attr: path,
            alt_ah_attr: path,
            pkey_index: u16::from(input.u8() / 128),
            max_rd_atomic: input.u8() / 8,
            max_dest_rd_atomic: input.u8() / 8,
            min_rnr_timer: input.u8() / 4,
            port_num: 1 + input.u8() / 200,
            timeout: input.u8() / 4,
            retry_cnt: input.u8() / 24,
            rnr_retry: input.u8() / 24,
            ..QpAttr::default()
        };
        Request::ModifyQp { qpn: one_of(&self.qps, input), mask, attr }
    }
}

/// One of few addresses, so that ids meet.
fn address(input: &mut Input<'_>) -> Address {
    let (which, port) = (input.u8(), u16::from(input.u8() % 4) * 7000);
    let ip: IpAddr = match which % 6 {
        0 => Ipv4Addr::UNSPECIFIED.into(),
        1 => Ipv6Addr::UNSPECIFIED.into(),
        2 => Ipv6Addr::LOCALHOST.into(),
        3 => Ipv4Addr::new(224, 0, 0, which).into(),
        _ => Ipv4Addr::LOCALHOST.into(),
    };
    match which >> 5 {
        7 => Address::Ib(IbAddress {
            sid: input.odd_number(),
            sid_mask: input.odd_number(),
            ..IbAddress::default()
        }),
        _ => Address::Ip(SocketAddr::new(ip, port)),
    }
}

/// One of few multicast groups, or an address that is none.
fn group(input: &mut Input<'_>) -> Gid {
    let mut group = Gid::default();
    (group[0], group[15]) = (if input.u8() < 200 { 0xff } else { 0 }, input.u8() % 4);
    group
}

fn private_data(input: &mut Input<'_>) -> Vec<u8> {
    vec![input.u8(); usize::from(input.u8()) * 2]
}

fn option(input: &mut Input<'_>) -> CmOption {
    match input.u8() % 5 {
        0 => CmOption::Tos(input.u8()),
        1 => CmOption::ReuseAddr(input.u8() & 1 == 1),
        2 => CmOption::AfOnly(input.u8() & 1 == 1),
        3 => CmOption::AckTimeout(input.u8()),
        _ => CmOption::Path,
    }
}

/// A handle that somebody was given, or any number.
fn one_of(known: &[u32], input: &mut Input<'_>) -> u32 {
    match input.u8() {
        at @ 0..=239 if !known.is_empty() => known[usize::from(at) % known.len()],
        _ => input.odd_number() as u32,
    }
}

/// A request as it travels.
pub(super) fn encoded(request: &Request) -> Vec<u8> {
    postcard::to_stdvec(request).unwrap()
}
