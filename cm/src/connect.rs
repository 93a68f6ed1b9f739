//! Connections, from either end: the commands, and what the other end's messages do.

use std::{net::SocketAddr, time::Duration};

use verbs_abi::proto::cm::{ConnParam, EventKind, EventParam};

use crate::{
    Body, CommId, Manager, Message, Offer, Refusal, Reply,
    id::{Phase, State},
    manager::PATIENCE,
    private_data, reason,
};

/// How long both QPs of an ended connection may still get late packets: 4.096 us << 19.
const TIME_WAIT: Duration = Duration::from_millis(2147);
/// Retries are three bits.
const MAX_RETRY: u8 = 7;
/// `IB_EVENT_COMM_EST`: the QP received something.
const COMM_EST: u32 = 4;

impl Manager {
    pub(crate) fn connect(&mut self, comm: CommId, param: ConnParam, now: Duration) -> Result<(), Refusal> {
        let id = self.id(comm)?;
        if id.state != State::RouteResolved {
            return Err(Refusal::WrongState);
        }
        if id.is_datagram() {
            self.ask_datagrams(comm, param)?;
        } else {
            self.ask_connection(comm, param)?;
        }
        self.wait(comm, Some(now + PATIENCE));
        Ok(())
    }

    fn ask_connection(&mut self, comm: CommId, param: ConnParam) -> Result<(), Refusal> {
        check(&param.private_data, private_data::REQUEST)?;
        let id = self.id_mut(comm)?;
        id.state = State::Connect;
        id.phase = Phase::ReqSent;
        id.connection.responder_resources = param.responder_resources;
        id.connection.initiator_depth = param.initiator_depth;
        id.connection.retry_count = param.retry_count.min(MAX_RETRY);
        let offer = Offer {
            qpn: param.qpn,
            psn: id.connection.local_psn,
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
            flow_control: param.flow_control,
            retry_count: param.retry_count.min(MAX_RETRY),
            rnr_retry_count: param.rnr_retry_count.min(MAX_RETRY),
            srq: param.srq,
            private_data: param.private_data,
        };
        let space = id.space;
        self.send(comm, Body::ConnectRequest { space, offer });
        Ok(())
    }

    pub(crate) fn accept(
        &mut self,
        comm: CommId,
        uid: u64,
        param: Option<ConnParam>,
        now: Duration,
    ) -> Result<(), Refusal> {
        let id = self.id_mut(comm)?;
        if id.state != State::Connect {
            return Err(Refusal::WrongState);
        }
        match (param, id.phase, id.connection.remote) {
            (None, Phase::RepReceived, Some(to)) => {
                id.phase = Phase::Established;
                self.send(comm, Body::ReadyToUse { to });
                Ok(())
            }
            (Some(param), Phase::SidrReceived, Some(to)) => self.accept_datagrams(comm, to, uid, param),
            (Some(param), Phase::ReqReceived, Some(to)) => {
                self.accept_connection(comm, to, uid, param)?;
                self.wait(comm, Some(now + PATIENCE));
                Ok(())
            }
            _ => Err(Refusal::WrongState),
        }
    }

    fn accept_connection(
        &mut self,
        comm: CommId,
        to: CommId,
        uid: u64,
        param: ConnParam,
    ) -> Result<(), Refusal> {
        check(&param.private_data, private_data::REPLY)?;
        let id = self.id_mut(comm)?;
        id.uid = uid;
        id.phase = Phase::RepSent;
        id.connection.responder_resources = param.responder_resources;
        id.connection.initiator_depth = param.initiator_depth;
        let reply = Reply {
            qpn: param.qpn,
            psn: id.connection.local_psn,
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
            flow_control: param.flow_control,
            rnr_retry_count: param.rnr_retry_count.min(MAX_RETRY),
            srq: param.srq,
            private_data: param.private_data,
        };
        self.send(comm, Body::ConnectReply { to, reply });
        Ok(())
    }

    pub(crate) fn reject(&mut self, comm: CommId, why: u8, private_data: Vec<u8>) -> Result<(), Refusal> {
        let why = if why == 0 { reason::CONSUMER_DEFINED } else { why.into() };
        if !matches!(why, reason::CONSUMER_DEFINED | reason::VENDOR_OPTION_NOT_SUPPORTED) {
            return Err(Refusal::Invalid);
        }
        let id = self.id_mut(comm)?;
        match (id.phase, id.connection.remote) {
            (Phase::SidrReceived, Some(_)) => return self.reject_datagrams(comm, private_data),
            (Phase::ReqSent, _) => self.part(comm),
            (Phase::ReqReceived | Phase::RepSent | Phase::RepReceived, Some(to)) => {
                check(&private_data, private_data::REJECT)?;
                id.phase = Phase::Ended;
                self.wait(comm, None);
                self.send(comm, Body::Reject { to, reason: why, private_data });
            }
            _ => return Err(Refusal::WrongState),
        }
        Ok(())
    }

    pub(crate) fn disconnect(&mut self, comm: CommId, now: Duration) -> Result<(), Refusal> {
        let id = self.id_mut(comm)?;
        match (id.phase, id.connection.remote) {
            (Phase::None, _) => return Err(Refusal::WrongState),
            (Phase::Established, Some(to)) => {
                id.phase = Phase::DreqSent;
                self.send(comm, Body::DisconnectRequest { to });
                self.wait(comm, Some(now + PATIENCE));
            }
            (Phase::DreqReceived, Some(to)) => {
                id.phase = Phase::TimeWait;
                self.send(comm, Body::DisconnectReply { to });
                self.wait(comm, Some(now + TIME_WAIT));
            }
            // Linux takes it at any time after a connection was asked for.
            _ => {}
        }
        Ok(())
    }

    /// The QP received something before the other end's confirmation came.
    pub(crate) fn notify(&mut self, comm: CommId, event: u32) -> Result<(), Refusal> {
        match (event, self.id(comm)?.phase) {
            (COMM_EST, Phase::RepSent) => {
                self.establish(comm);
                Ok(())
            }
            (COMM_EST, Phase::Established) => Err(Refusal::Connected),
            _ => Err(Refusal::WrongState),
        }
    }

    fn establish(&mut self, comm: CommId) {
        self.wait(comm, None);
        if let Ok(id) = self.id_mut(comm) {
            id.phase = Phase::Established;
        }
        self.emit_plain(comm, EventKind::Established, 0);
    }

    /// Tells the other end that this one is no more.
    pub(crate) fn part(&mut self, comm: CommId) {
        let Some(id) = self.ids.get_mut(&comm) else { return };
        let phase = std::mem::replace(&mut id.phase, Phase::Ended);
        let body = match (phase, id.connection.remote) {
            (Phase::ReqSent | Phase::SidrSent, _) => Body::Withdraw { space: id.space },
            (Phase::ReqReceived | Phase::RepSent | Phase::RepReceived, Some(to)) => {
                Body::Reject { to, reason: reason::CONSUMER_DEFINED, private_data: Vec::new() }
            }
            (Phase::Established, Some(to)) => Body::DisconnectRequest { to },
            (Phase::DreqReceived, Some(to)) => Body::DisconnectReply { to },
            (Phase::SidrReceived, Some(to)) => crate::datagram::refusal(to, crate::sidr::REJECT),
            // As it was: there is nobody to tell.
            _ => {
                id.phase = phase;
                return;
            }
        };
        self.send(comm, body);
    }

    /// The connection is over at both ends.
    pub(crate) fn end_connection(&mut self, comm: CommId, status: i32, now: Duration) {
        if let Ok(id) = self.id_mut(comm) {
            id.phase = Phase::TimeWait;
            self.wait(comm, Some(now + TIME_WAIT));
            self.disconnected(comm, status);
        }
    }

    fn disconnected(&mut self, comm: CommId, status: i32) {
        let Ok(id) = self.id_mut(comm) else { return };
        if id.state == State::Connect {
            id.state = State::Disconnect;
            self.emit_plain(comm, EventKind::Disconnected, status);
        }
    }

    /// Takes a message in.
    pub fn receive(&mut self, message: Message, now: Duration) {
        self.now = now;
        if message.from.host != 0 && self.is_repeated(&message) {
            return;
        }
        match &message.body {
            Body::ConnectRequest { .. } | Body::DatagramRequest { .. } => self.asked(message),
            Body::Withdraw { space } => self.withdrawn(&message, *space),
            Body::ConnectReply { to, .. }
            | Body::ReadyToUse { to }
            | Body::Reject { to, .. }
            | Body::DisconnectRequest { to }
            | Body::DisconnectReply { to }
            | Body::DatagramReply { to, .. } => {
                let to = *to;
                if self.is_from_peer(to, &message) {
                    self.told(to, message, now);
                } else if matches!(message.body, Body::DisconnectRequest { .. }) {
                    // Whoever asks for the end of what has ended shall hear so.
                    let to = message.from;
                    self.answer(&message, Body::DisconnectReply { to });
                } else if matches!(message.body, Body::ConnectReply { .. }) {
                    let to = message.from;
                    let reason = reason::TIMEOUT;
                    self.answer(&message, Body::Reject { to, reason, private_data: Vec::new() });
                }
            }
        }
    }

    /// Whether a message comes from the other end of `comm`. An end that asked knows its address and tenant only.
    pub(crate) fn is_from_peer(&self, comm: CommId, message: &Message) -> bool {
        let Some(id) = self.ids.get(&comm) else { return false };
        let tenant = self.place(id).map(|place| place.tenant);
        tenant == Ok(message.tenant)
            && id.destination_ip().is_some_and(|own| is_same(own, message.source))
            && match id.connection.remote {
                Some(remote) => remote == message.from,
                None => message.from.host == id.host && matches!(id.phase, Phase::ReqSent | Phase::SidrSent),
            }
    }

    /// The other end of `comm` says something.
    fn told(&mut self, comm: CommId, message: Message, now: Duration) {
        let Some(phase) = self.ids.get(&comm).map(|id| id.phase) else { return };
        match (message.body, phase) {
            (Body::ConnectReply { reply, .. }, Phase::ReqSent) => {
                self.wait(comm, None);
                self.accepted(comm, message.from, reply);
            }
            (Body::ReadyToUse { .. }, Phase::RepSent) => self.establish(comm),
            (
                Body::Reject { reason, private_data, .. },
                Phase::ReqSent | Phase::ReqReceived | Phase::RepSent | Phase::RepReceived,
            ) => {
                self.wait(comm, None);
                self.rejected(comm, reason, private_data);
            }
            (Body::DisconnectRequest { .. }, Phase::Established | Phase::RepSent | Phase::DreqSent) => {
                self.wait(comm, None);
                if let Ok(id) = self.id_mut(comm) {
                    id.phase = Phase::DreqReceived;
                }
                self.disconnected(comm, 0);
            }
            (Body::DisconnectRequest { .. }, Phase::TimeWait | Phase::Ended) => {
                self.send(comm, Body::DisconnectReply { to: message.from });
            }
            (Body::DisconnectReply { .. }, Phase::DreqSent) => self.end_connection(comm, 0, now),
            (Body::DatagramReply { status, qpn, qkey, private_data, .. }, Phase::SidrSent) => {
                self.wait(comm, None);
                self.datagrams_answered(comm, message.from, status, (qpn, qkey), private_data);
            }
            _ => {}
        }
        if self.ids.get(&comm).is_some_and(|id| id.phase != phase) {
            self.heard(comm, phase);
        }
    }

    fn accepted(&mut self, comm: CommId, from: CommId, reply: Reply) {
        let Ok(id) = self.id_mut(comm) else { return };
        id.phase = Phase::RepReceived;
        let connection = &mut id.connection;
        connection.remote = Some(from);
        connection.remote_qpn = reply.qpn;
        connection.remote_psn = reply.psn;
        // What the other end asks is what this one answers.
        connection.responder_resources = reply.initiator_depth;
        connection.initiator_depth = reply.responder_resources;
        connection.rnr_retry_count = reply.rnr_retry_count;
        let param = ConnParam {
            qpn: reply.qpn,
            responder_resources: reply.initiator_depth,
            initiator_depth: reply.responder_resources,
            flow_control: reply.flow_control,
            rnr_retry_count: reply.rnr_retry_count,
            srq: reply.srq,
            private_data: padded(reply.private_data, private_data::REPLY),
            ..ConnParam::default()
        };
        self.emit(comm, EventKind::ConnectResponse, 0, EventParam::Conn(param));
    }

    fn rejected(&mut self, comm: CommId, reason: u16, private_data: Vec<u8>) {
        if let Ok(id) = self.id_mut(comm) {
            id.phase = Phase::Ended;
        }
        let private_data = padded(private_data, private_data::REJECT);
        let param = EventParam::Conn(ConnParam { private_data, ..ConnParam::default() });
        self.emit(comm, EventKind::Rejected, reason.into(), param);
    }
}

/// Whether two addresses are one: what IPv6 addresses carry beside that stays on their host.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    (one.ip(), one.port()) == (other.ip(), other.port())
}

/// Private data must fit its message.
pub(crate) fn check(data: &[u8], limit: usize) -> Result<(), Refusal> {
    if data.len() > limit { Err(Refusal::Invalid) } else { Ok(()) }
}

/// Private data as it is delivered.
pub(crate) fn padded(mut data: Vec<u8>, len: usize) -> Vec<u8> {
    data.resize(len, 0);
    data
}
