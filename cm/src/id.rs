//! An id: the `rdma_cm_id` of the router's side.

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use verbs_abi::proto::cm::{Address, ConnParam, EventParam, UdParam};

use crate::{
    CommId, Message,
    space::{IPOIB, UDP},
};

/// `IBV_QPT_UD`.
const QPT_UD: u8 = 4;

/// How far an id is, in the words of Linux's `cma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Idle,
    Bound,
    AddrQuery,
    AddrResolved,
    RouteResolved,
    Connect,
    Disconnect,
    Listen,
}

/// How far its connection is, in the words of InfiniBand's connection manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It was never asked for.
    None,
    ReqSent,
    ReqReceived,
    RepSent,
    RepReceived,
    Established,
    DreqSent,
    DreqReceived,
    TimeWait,
    /// Rejected, given up, or out of its time-wait.
    Ended,
    SidrSent,
    SidrReceived,
    /// Datagrams may be sent.
    SidrDone,
}

/// What the ends agree on. `responder_resources` and `initiator_depth` are this end's own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connection {
    pub(crate) remote: Option<CommId>,
    pub(crate) remote_qpn: u32,
    pub(crate) local_psn: u32,
    pub(crate) remote_psn: u32,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
    pub(crate) retry_count: u8,
    pub(crate) rnr_retry_count: u8,
}

/// What a listener holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Backlog {
    /// Requests whose events may wait to be taken.
    pub(crate) limit: u32,
    /// Those that wait.
    pub(crate) queued: u32,
    /// Requests that came when there was no room.
    pub(crate) parked: VecDeque<Message>,
}

/// An id.
#[derive(Clone, Debug)]
pub(crate) struct Id {
    pub(crate) client: u32,
    /// Its number, which the client knows.
    pub(crate) number: u32,
    pub(crate) channel: u32,
    /// The client's word; 0 as long as a request was not accepted, and then no event is told.
    pub(crate) uid: u64,
    pub(crate) space: u16,
    pub(crate) qp_type: u8,
    pub(crate) state: State,
    pub(crate) phase: Phase,
    pub(crate) source: Option<Address>,
    pub(crate) destination: Option<Address>,
    /// Whether the addresses say which device it is on.
    pub(crate) on_device: bool,
    /// Whether it holds a port of its own.
    pub(crate) holds_port: bool,
    pub(crate) reuse_addr: bool,
    pub(crate) af_only: bool,
    pub(crate) tos: u8,
    pub(crate) ack_timeout: Option<u8>,
    /// The service id by which the other end asked.
    pub(crate) asked_sid: u64,
    /// The host of the other end; 0 is this one.
    pub(crate) host: u32,
    pub(crate) connection: Connection,
    /// What the other end on another host was told last, in case it did not hear.
    pub(crate) told: Option<Box<Message>>,
    pub(crate) backlog: Backlog,
    pub(crate) events_reported: u32,
    pub(crate) deadline: Option<Duration>,
}

impl Id {
    pub(crate) fn new(client: u32, number: u32, channel: u32, space: u16, qp_type: u8) -> Self {
        Self {
            client,
            number,
            channel,
            uid: 0,
            space,
            qp_type,
            state: State::Idle,
            phase: Phase::None,
            source: None,
            destination: None,
            on_device: false,
            holds_port: false,
            reuse_addr: false,
            af_only: false,
            tos: 0,
            ack_timeout: None,
            asked_sid: 0,
            host: 0,
            connection: Connection::default(),
            told: None,
            backlog: Backlog::default(),
            events_reported: 0,
            deadline: None,
        }
    }

    /// Whether it is for datagrams.
    pub(crate) fn is_datagram(&self) -> bool {
        matches!(self.space, UDP | IPOIB) || self.qp_type == QPT_UD
    }

    /// Its own address, if that is an IP address.
    pub(crate) fn source_ip(&self) -> Option<SocketAddr> {
        ip(self.source)
    }

    /// The other end's address, if that is an IP address.
    pub(crate) fn destination_ip(&self) -> Option<SocketAddr> {
        ip(self.destination)
    }

    /// What an event carries that has nothing to tell.
    pub(crate) fn no_param(&self) -> EventParam {
        if self.is_datagram() {
            EventParam::Ud(UdParam::default())
        } else {
            EventParam::Conn(ConnParam::default())
        }
    }
}

fn ip(address: Option<Address>) -> Option<SocketAddr> {
    match address {
        Some(Address::Ip(address)) => Some(address),
        _ => None,
    }
}
