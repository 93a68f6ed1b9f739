//! Commands and replies against the sizes and offsets of `rdma_user_cm.h`.

use std::net::SocketAddr;

use verbs_abi::proto::cm::{
    Address, CmAnswer, CmOption, Command, ConnParam, Event, EventKind, EventParam, IbAddress, Path, Route,
    UdParam,
};
use verbs_abi::proto::{AhAttr, QpAttr};

use super::decode::{self, Shape, What, Written, decode};
use super::encode::encode;
use crate::abi::edge::Errno;

const GUID: [u8; 8] = [2, 0, 0, 0, 0, 0, 0, 7];

/// A command with a body of this length, in which these bytes lie at these offsets.
fn command(number: u32, len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut body = vec![0; len];
    for (at, bytes) in fields {
        body[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    let header = [&number.to_ne_bytes()[..], &(len as u16).to_ne_bytes(), &400_u16.to_ne_bytes()].concat();
    [header, body].concat()
}

fn asked(number: u32, len: usize, fields: &[(usize, &[u8])]) -> Command {
    match decode(&command(number, len, fields)).unwrap().what {
        What::Ask(command) => command,
        other => panic!("{other:?}"),
    }
}

fn ip(text: &str) -> Address {
    Address::Ip(text.parse::<SocketAddr>().unwrap())
}

const ID: [u8; 4] = 77_u32.to_ne_bytes();
/// 10.1.2.3:7000 and [fd00::1]:7000.
const V4: [u8; 8] = [2, 0, 0x1b, 0x58, 10, 1, 2, 3];
const V6: [u8; 24] = [10, 0, 0x1b, 0x58, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

#[test]
fn every_command_is_taken_at_its_length_and_not_below() {
    // Number, length, and how much of it older releases leave away.
    let lengths = [
        (0, 24, 5),
        (1, 16, 4),
        (4, 8, 4),
        (5, 16, 8 - 4),
        (7, 8, 0),
        (8, 296, 12),
        (10, 4, 0),
        (11, 16, 0),
        (12, 8, 0),
        (14, 24, 0),
        (15, 8, 0),
        (17, 16, 4),
        (18, 16, 0),
        (19, 16, 0),
    ];
    for (number, len, spare) in lengths {
        assert!(decode(&command(number, len, &[])).is_ok(), "command {number}");
        assert!(decode(&command(number, len - spare, &[])).is_ok(), "command {number} of an older release");
        assert_eq!(decode(&command(number, len - spare - 1, &[])), Err(Errno::INVAL), "command {number}");
    }
    assert_eq!(decode(&[0; 7]), Err(Errno::INVAL));
    let mut cut = command(19, 16, &[]);
    cut.pop();
    assert_eq!(decode(&cut), Err(Errno::INVAL), "less was written than the header says");
    assert_eq!(decode(&command(13, 24, &[])), Err(Errno::NOSYS));
    assert_eq!(decode(&command(99, 24, &[])), Err(Errno::INVAL));
}

#[test]
fn both_dialects_say_the_same() {
    let bind = Command::Bind { id: 77, address: ip("10.1.2.3:7000") };
    assert_eq!(asked(2, 40, &[(8, &V4), (36, &ID)]), bind);
    assert_eq!(asked(20, 136, &[(0, &ID), (4, &[16]), (8, &V4)]), bind);
    let (source, destination) = (Some(ip("10.1.2.3:7000")), ip("[fd00::1]:7000"));
    let resolve = Command::ResolveAddr { id: 77, source, destination, timeout_ms: 9 };
    assert_eq!(asked(3, 64, &[(0, &V4), (28, &V6), (56, &ID), (60, &[9])]), resolve);
    let sizes: [u8; 4] = [16, 0, 28, 0];
    let fields: [(usize, &[u8]); 5] = [(0, &ID), (4, &[9]), (8, &sizes), (16, &V4), (144, &V6)];
    assert_eq!(asked(21, 272, &fields), resolve);
    let join = Command::JoinMulticast { id: 77, uid: 5, address: ip("10.1.2.3:7000"), send_only: false };
    assert_eq!(asked(16, 48, &[(8, &[5]), (16, &V4), (44, &ID)]), join);
    assert_eq!(asked(22, 152, &[(8, &[5]), (16, &ID), (20, &[16]), (24, &V4)]), join);
}

#[test]
fn an_address_has_the_length_of_its_family() {
    for len in [0_u8, 15, 17, 28] {
        assert_eq!(decode(&command(20, 136, &[(4, &[len]), (8, &V4)])), Err(Errno::INVAL));
    }
    let strange = [1, 0, 0, 0];
    assert_eq!(decode(&command(20, 136, &[(4, &[16]), (8, &strange)])), Err(Errno::INVAL));
    let sid = 0x0106_0000_u64.to_be_bytes();
    let address = Address::Ib(IbAddress { sid: 0x0106_0000, ..IbAddress::default() });
    assert_eq!(
        asked(20, 136, &[(4, &[48]), (8, &[27, 0]), (8 + 24, &sid)]),
        Command::Bind { id: 0, address }
    );
}

#[test]
fn connection_parameters_are_read_field_by_field() {
    let tail: [u8; 8] = [3, 1, 4, 5, 1, 6, 7, 1];
    let fields: [(usize, &[u8]); 5] = [(0, &[0x11]), (4, &[0x22]), (8, b"abcdef"), (264, &tail), (272, &ID)];
    let param = ConnParam {
        qpn: 0x11,
        qkey: 0x22,
        private_data: b"abc".to_vec(),
        srq: 1,
        responder_resources: 4,
        initiator_depth: 5,
        flow_control: 1,
        retry_count: 6,
        rnr_retry_count: 7,
    };
    for len in [280, 288] {
        assert_eq!(asked(6, len, &fields), Command::Connect { id: 77, param: param.clone() });
    }
    assert_eq!(decode(&command(6, 288, &fields[..3])), Err(Errno::INVAL), "the parameters do not count");
    let later: Vec<(usize, &[u8])> = fields.iter().map(|(at, bytes)| (at + 8, *bytes)).collect();
    let accept = [&[(0, &[9_u8][..])], &later[..]].concat();
    assert_eq!(asked(8, 296, &accept), Command::Accept { id: 77, uid: 9, param: Some(param) });
    assert_eq!(asked(8, 288, &accept[..4]), Command::Accept { id: 0, uid: 9, param: None });
    let reject = asked(9, 264, &[(0, &ID), (4, &[2, 28]), (8, b"no!")]);
    assert_eq!(reject, Command::Reject { id: 77, reason: 28, private_data: b"no".to_vec() });
}

#[test]
fn options_are_taken_with_their_own_length() {
    let one = 1_i32.to_ne_bytes();
    assert_eq!(decode::option(0, 0, &[5]), Ok(CmOption::Tos(5)));
    assert_eq!(decode::option(0, 0, &one), Err(Errno::INVAL));
    assert_eq!(decode::option(0, 1, &one), Ok(CmOption::ReuseAddr(true)));
    assert_eq!(decode::option(0, 2, &[1]), Err(Errno::INVAL));
    assert_eq!(decode::option(0, 3, &[19]), Ok(CmOption::AckTimeout(19)));
    let mut path = vec![0; 144];
    assert_eq!(decode::option(1, 1, &path), Err(Errno::INVAL), "no path to use");
    path[72] = 0x2b;
    assert_eq!(decode::option(1, 1, &path), Ok(CmOption::Path));
    assert_eq!(decode::option(1, 1, &path[..100]), Err(Errno::INVAL));
    assert_eq!(decode::option(7, 7, &one), Err(Errno::NOSYS));
    let fields: [(usize, &[u8]); 5] = [(0, &[1, 2]), (8, &ID), (12, &[0]), (16, &[1]), (20, &[4])];
    let what = What::SetOption { id: 77, level: 0, name: 1, value: 0x201, len: 4 };
    let written = Written { what, shape: Shape::None, response: 0, room: 400 };
    assert_eq!(decode(&command(14, 24, &fields)), Ok(written));
}

fn route() -> Route {
    let gid = |last| {
        let mut gid = [0; 16];
        gid[15] = last;
        gid
    };
    Route {
        space: 0x0106,
        source: Some(ip("10.1.2.3:7000")),
        destination: Some(ip("[fd00::1]:7001")),
        device: Some([gid(1), gid(2)]),
        path: Some(Path { sid: 0x0106_1b58, mtu: 3, traffic_class: 9, life_time: 18 }),
    }
}

fn bytes(shape: Shape, answer: &CmAnswer) -> (Vec<u8>, usize) {
    encode(shape, answer, GUID).unwrap()
}

#[test]
fn addresses_lie_where_the_header_says() {
    let (reply, least) = bytes(Shape::Addresses, &CmAnswer::Route(route()));
    assert_eq!((reply.len(), least), (280, 272));
    assert_eq!((&reply[..8], reply[8]), (&GUID[..], 1));
    assert_eq!((&reply[12..16], &reply[16..24]), (&[16, 0, 28, 0][..], &V4[..]));
    assert_eq!((&reply[144..148], &reply[272..276]), (&[10, 0, 0x1b, 0x59][..], &[0xff; 4][..]));
    let unbound = Route { device: None, path: None, ..route() };
    let (reply, _) = bytes(Shape::Addresses, &CmAnswer::Route(unbound.clone()));
    assert_eq!(reply[..12], [0; 12]);
    assert_eq!(bytes(Shape::Paths, &CmAnswer::Route(unbound)).0, [0; 8]);
}

#[test]
fn gids_are_told_as_infiniband_addresses() {
    let (reply, _) = bytes(Shape::Gids, &CmAnswer::Route(route()));
    assert_eq!((reply.len(), &reply[12..16]), (280, &[48, 0, 48, 0][..]));
    let source = &reply[16..64];
    assert_eq!((&source[..2], source[8 + 15]), (&[27, 0][..], 1));
    assert_eq!(source[24..32], [0, 0, 0, 0, 1, 6, 0x1b, 0x58]);
    assert_eq!(reply[144 + 8 + 15], 2);
}

#[test]
fn paths_are_packed_as_the_subnet_administrator_does() {
    let (reply, least) = bytes(Shape::Paths, &CmAnswer::Route(route()));
    assert_eq!((reply.len(), least, reply[0], reply[8]), (80, 8, 1, 0x2b));
    let record = &reply[16..];
    assert_eq!(record[..8], 0x0106_1b58_u64.to_be_bytes());
    assert_eq!((record[8 + 15], record[24 + 15]), (2, 1), "where to comes before where from");
    // Hop limit, traffic class, reversible, P_Key; MTU, rate and life time with their selectors.
    assert_eq!(record[44..52], [0, 0, 0, 64, 9, 0x80, 0xff, 0xff]);
    assert_eq!(record[54..57], [0x83, 0x80, 0x92]);
}

#[test]
fn the_whole_route_is_told_in_the_older_dialect() {
    let (reply, least) = bytes(Shape::Route, &CmAnswer::Route(route()));
    assert_eq!((reply.len(), least), (208, 200));
    assert_eq!((&reply[..8], reply[8 + 15], reply[24 + 15]), (&GUID[..], 2, 1));
    let path = &reply[8..72];
    assert_eq!(path[48..52], 3_u32.to_ne_bytes());
    assert_eq!((&path[52..54], path[54], path[55]), (&[0xff, 0xff][..], 64, 9));
    assert_eq!((path[58], path[59], path[61], path[62]), (2, 2, 2, 18));
    assert_eq!((&reply[136..144], &reply[164..168]), (&V4[..], &[10, 0, 0x1b, 0x59][..]));
    assert_eq!((reply[192], reply[196], &reply[200..204]), (1, 1, &[0xff; 4][..]));
}

#[test]
fn qp_attributes_lie_where_the_header_says() {
    let attr = QpAttr {
        qp_state: 2,
        path_mtu: 3,
        dest_qp_num: 0x12,
        ah_attr: AhAttr {
            dgid: [7; 16],
            sgid_index: 5,
            hop_limit: 64,
            is_global: 1,
            port_num: 1,
            ..AhAttr::default()
        },
        max_rd_atomic: 8,
        timeout: 19,
        rnr_retry: 7,
        ..QpAttr::default()
    };
    let (reply, least) = bytes(Shape::QpAttr, &CmAnswer::QpAttr { mask: 0x12_9181, attr });
    assert_eq!((reply.len(), least), (144, 144));
    assert_eq!((&reply[..4], reply[4], reply[12], reply[32]), (&0x12_9181_u32.to_ne_bytes()[..], 2, 3, 0x12));
    assert_eq!((&reply[40..56], reply[60], reply[61]), (&[7; 16][..], 5, 64));
    assert_eq!((reply[69], reply[70]), (1, 1));
    assert_eq!((reply[130], reply[134], reply[136]), (8, 19, 7));
}

#[test]
fn events_lie_where_the_header_says() {
    let param =
        ConnParam { qpn: 0x12, private_data: vec![9; 196], responder_resources: 4, ..ConnParam::default() };
    let kind = EventKind::ConnectResponse;
    let param = EventParam::Conn(param);
    let event = Event { uid: 0x55, id: 3, kind, status: -110, param, known: None };
    let (reply, least) = bytes(Shape::Event, &CmAnswer::Event(Some(event.clone())));
    assert_eq!((reply.len(), least), (336, 328));
    assert_eq!((reply[0], reply[8], reply[12]), (0x55, 3, 5));
    assert_eq!((&reply[16..20], reply[20], reply[28]), (&(-110_i32).to_ne_bytes()[..], 0x12, 9));
    assert_eq!((reply[284], reply[286]), (196, 4));
    let ah = AhAttr { dgid: [8; 16], is_global: 1, ..AhAttr::default() };
    let param = EventParam::Ud(UdParam { qpn: 0x13, qkey: 0x44, ah, private_data: vec![6; 136] });
    let (reply, _) = bytes(Shape::Event, &CmAnswer::Event(Some(Event { param, ..event })));
    assert_eq!((reply[20], reply[24], reply[28], reply[57]), (0x13, 0x44, 8, 1));
    assert_eq!((reply[60], reply[60 + 256]), (6, 136));
}

#[test]
fn an_answer_to_something_else_is_no_reply() {
    assert_eq!(encode(Shape::Route, &CmAnswer::Done, GUID), Err(Errno::PROTO));
    assert_eq!(bytes(Shape::Number, &CmAnswer::Id(7)), (7_u32.to_ne_bytes().to_vec(), 4));
    let reported = CmAnswer::Reported { events: 3, revoked: 1 };
    assert_eq!(bytes(Shape::Number, &reported).0, 3_u32.to_ne_bytes());
}
