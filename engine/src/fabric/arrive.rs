//! Packets that come from other hosts: whose they are, and whether their sender may send them.
//!
//! A peer router is believed what it says of its own side, for the addresses that are routed to it, and nothing else:
//! a packet counts when both QPs name each other, by number, address and tenant.

use verbs_abi::{
    ids::{self, Qpn},
    proto::Gid,
    shm::wqe::Address,
    verbs::{Opcode, QpType, WcStatus},
};

use super::{Fabric, access::Half};
use crate::{
    Memory,
    responder::{Flush, Request},
    stage::Stage,
    transfer::Side,
    wire::{
        Outcome, Place,
        packet::{BadPacket, HEADER, Header, Kind, SOLICITED},
    },
};

impl<M: Memory> Fabric<M> {
    /// Takes one whole packet in that has come from a router. `now` in ns.
    ///
    /// # Errors
    /// [`BadPacket`]: the router speaks another language, and the link had better be given up.
    pub fn receive(&mut self, peer: u32, packet: &[u8], now: u64) -> Result<(), BadPacket> {
        self.now = now;
        let Some((header, payload)) = packet.split_first_chunk::<HEADER>() else {
            return Err(BadPacket::Length(0));
        };
        let mut header = Header::decode(header)?;
        if payload.len() != header.len as usize {
            return Err(BadPacket::Length(header.len));
        }
        let Some(tenant) = self.links.outbox(peer).tenant(header.path.tenant) else { return Ok(()) };
        header.path.tenant = tenant;
        match header.kind {
            Kind::Datagram => self.take_datagram(peer, &header, payload),
            Kind::Control => self.take_control(peer, &header, payload),
            Kind::Member => self.take_member(peer, &header),
            kind => {
                let Some(at) = self.connected(peer, &header) else { return Ok(()) };
                match kind {
                    Kind::Request => self.take_request(at, &mut header, payload),
                    Kind::Shadow => self.take_word(at, &header),
                    _ => self.take_reply(at, &header, payload, now),
                }
            }
        }
        Ok(())
    }

    /// The QP that a packet is for, if its sender is the one it is connected to.
    fn connected(&self, peer: u32, header: &Header) -> Option<usize> {
        let path = &header.path;
        let at = *self.qpn_index.get(&path.target_qpn)?;
        let qp = self.qps[at].as_ref()?;
        let far = qp.far.as_ref()?;
        let named = far.path.target_qpn == path.source_qpn && far.path.dgid == path.sgid;
        let here = self.clients[qp.owner].as_ref()?.gids.contains(&path.dgid);
        (far.peer == peer && qp.tenant == path.tenant && named && here).then_some(at)
    }

    fn take_request(&mut self, at: usize, header: &mut Header, payload: &[u8]) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let Some(far) = qp.far.as_mut() else { return };
        if !qp.responder.state().may_respond() {
            return;
        }
        let admitted = far.target.admit(header, qp.responder.qp_type().is_reliable());
        if admitted && far.target.has_waiting() {
            far.target.wait(header, payload);
        } else if admitted {
            let outcome = self.perform(at, header, payload);
            let waits = matches!(outcome, Outcome::Foreign | Outcome::NoRoom | Outcome::Partly(_));
            if waits && let Some(far) = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut()) {
                far.target.wait(header, payload);
            }
            if self.follow(at, outcome) && waits {
                self.schedule.enqueue(at);
            }
        }
        self.owe(at);
    }

    /// Executes a packet whose turn it is, and does to its QP what follows from it.
    pub(super) fn perform(&mut self, at: usize, header: &mut Header, payload: &[u8]) -> Outcome {
        let srq_owner = self.select_srq_for(at, header);
        let Some(qp) = self.qps[at].as_mut() else { return Outcome::Over };
        let client = self.clients[srq_owner.unwrap_or(qp.owner)].as_ref();
        let Some(client) = client else { return Outcome::Over };
        let Some(far) = qp.far.as_mut() else { return Outcome::Over };
        let outbox = self.links.outbox(far.peer);
        let packet = (&mut *header, payload);
        let mut outcome = far.target.execute(&mut qp.responder, &client.memory, packet, &far.path, outbox);
        if !qp.responder.qp_type().is_reliable() && outcome != Outcome::Foreign {
            // Nobody answers: what was refused is lost.
            far.target.pass(header.psn);
            outcome = Outcome::Over;
        }
        if outcome == Outcome::NoReceive {
            qp.responder.set_ring_me(true);
            if qp.responder.has_receive() {
                far.target.welcome();
            }
        }
        if outbox.has_bytes() {
            self.links.call(far.peer);
        }
        self.heed(Some(at));
        if let Outcome::Refused(event) = outcome {
            self.owe(at);
            self.fail_responder(at, event);
        }
        outcome
    }

    /// What the peer says about what was sent to it.
    fn take_reply(&mut self, at: usize, header: &Header, payload: &[u8], now: u64) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let Some(client) = self.clients[qp.owner].as_ref() else { return };
        let Some(far) = qp.far.as_mut() else { return };
        let (initiator, requester) = (&mut far.initiator, &mut qp.requester);
        // Who has not been heard of yet is welcomed all the same.
        let is_stranger = header.kind == Kind::Ready && header.stream == 0;
        if header.stream != initiator.stream() && !is_stranger {
            return;
        }
        let next = header.psn;
        match header.kind {
            Kind::Ack => drop(initiator.acknowledge(requester, next)),
            Kind::Rnr => initiator.no_receive(requester, next, header.code, now),
            Kind::Gap => initiator.missing(requester, next, now),
            Kind::Nak => initiator.refused(requester, next, nak_status(header.code)),
            Kind::Ready => initiator.ready(requester),
            Kind::Data | Kind::Found => {
                if initiator.answer(requester, &client.memory, header, payload) == Place::Foreign {
                    self.launch(at, Half::Reply);
                }
            }
            Kind::Request | Kind::Datagram | Kind::Control | Kind::Member | Kind::Shadow => {}
        }
        if self.reap(at) {
            self.schedule.enqueue(at);
        }
    }

    fn take_datagram(&mut self, peer: u32, header: &Header, payload: &[u8]) {
        let path = &header.path;
        if self.route(path.tenant, &path.sgid) != Some(peer) || header.len != header.total {
            return;
        }
        if path.target_qpn == Qpn::MULTICAST.value() && ids::Gid(path.dgid).is_multicast() {
            return self.take_group_datagram(header, payload);
        }
        let Some(&at) = self.qpn_index.get(&path.target_qpn) else { return };
        let Some(qp) = self.qps[at].as_ref() else { return };
        let Some(client) = self.clients[qp.owner].as_ref() else { return };
        if qp.tenant == path.tenant && client.gids.contains(&path.dgid) {
            self.hand_datagram(at, header, payload);
        }
    }

    /// Hands a datagram to a QP that may have it.
    pub(super) fn hand_datagram(&mut self, at: usize, header: &Header, payload: &[u8]) {
        let Some(qp) = self.qps[at].as_mut() else { return };
        let Some(client) = self.clients[qp.owner].as_ref() else { return };
        let opcode = Opcode::try_from(u32::from(header.code)).ok();
        let Some(opcode) = opcode.filter(|opcode| opcode.allowed_on(QpType::Ud)) else { return };
        if qp.responder.qp_type() != QpType::Ud {
            return;
        }
        let (request, address) = (datagram(header, opcode, payload), address(header));
        let sgid: &Gid = &header.path.sgid;
        let _ = qp.responder.datagram(&client.memory, &request, sgid, &address, &mut Stage::default());
        self.heed(Some(at));
        if self.qps[at].as_ref().is_some_and(|qp| qp.responder.has_parcels()) {
            self.schedule.enqueue(at);
        }
    }
}

/// The status that a refusal brings; a peer cannot make one up that no refusal brings.
fn nak_status(code: u8) -> WcStatus {
    match WcStatus::try_from(u32::from(code)) {
        Ok(status @ (WcStatus::RemInvReqErr | WcStatus::RemAccessErr | WcStatus::RemOpErr)) => status,
        _ => WcStatus::RemOpErr,
    }
}

fn datagram<'a, M>(header: &Header, opcode: Opcode, payload: &'a [u8]) -> Request<'a, M> {
    Request {
        opcode,
        source_qpn: header.path.source_qpn,
        remote_addr: 0,
        rkey: 0,
        len: payload.len() as u64,
        imm: header.imm,
        solicited: header.flags & SOLICITED != 0,
        placed: 0,
        payload_at: 0,
        budget: u64::MAX,
        payload: Side::Bytes(payload),
        flush: Flush::of(0, 0),
    }
}

/// Where a datagram was sent.
fn address(header: &Header) -> Address {
    let [flow_label, route] = header.operands;
    Address {
        dgid: header.path.dgid,
        sgid_index: 0,
        hop_limit: route as u8,
        traffic_class: (route >> 8) as u8,
        flow_label: flow_label as u32,
        qpn: header.path.target_qpn,
        qkey: header.rkey,
    }
}
