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
        LATE, Outcome, Piece, Place, TAIL,
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
        if matches!(header.kind, Kind::Ping | Kind::Pong) {
            self.take_ping(peer, &header);
            return Ok(());
        }
        let Some(tenant) = self.links.tenant(peer, header.path.tenant) else { return Ok(()) };
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

    /// Says where the payload of a packet belongs, of which no more than the header has come, all but its last
    /// [`TAIL`] bytes. It may be put there until something changes this fabric, and is then given to
    /// [`Self::receive_placed`]. False: the whole packet must be waited for.
    pub fn aim(&mut self, peer: u32, header: &[u8; HEADER], tell: &mut dyn FnMut(Piece)) -> bool {
        self.find_place(peer, header, tell).is_some()
    }

    fn find_place(
        &mut self,
        peer: u32,
        header: &[u8; HEADER],
        tell: &mut dyn FnMut(Piece),
    ) -> Option<(usize, Header)> {
        let mut header = Header::decode(header).ok().filter(|header| u64::from(header.len) >= LATE)?;
        header.path.tenant = self.links.tenant(peer, header.path.tenant)?;
        let is_request = header.kind == Kind::Request;
        if !is_request && header.kind != Kind::Data {
            return None;
        }
        let at = self.connected(peer, &header)?;
        let qp = self.qps[at].as_mut().filter(|qp| qp.requester.qp_type() == QpType::Rc)?;
        let memory = &self.clients[qp.owner].as_ref()?.memory;
        // Where a NIC carries the others, what is to be told beside may depend on the whole packet.
        let far = qp.far.as_mut().filter(|far| far.shadow.is_none())?;
        let found = if is_request {
            far.target.expects(&header) && far.target.locate(&mut qp.responder, memory, &header, tell)
        } else {
            far.initiator.locate_answer(&mut qp.requester, memory, &header, tell)
        };
        found.then_some((at, header))
    }

    /// Takes in a packet whose payload was put where [`Self::aim`] said, but for the tail. `places` are the addresses
    /// and lengths that it told: if it would tell others now, the packet is lost.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_placed(
        &mut self,
        peer: u32,
        header: &[u8; HEADER],
        places: &[(usize, usize)],
        tail: &[u8; TAIL],
        now: u64,
    ) -> Result<(), BadPacket> {
        self.now = now;
        let mut again = Vec::new();
        let found = self.find_place(peer, header, &mut |piece| again.push(piece.place()));
        let Some((at, mut header)) = found.filter(|_| again == places) else {
            return self.miss(peer, header);
        };
        // As if the beginning had been a packet of its own.
        let before = header.len - TAIL as u32;
        header.offset += before;
        header.len = TAIL as u32;
        if header.kind == Kind::Request {
            self.take_request(at, &mut header, tail);
        } else {
            if let Some(far) = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut()) {
                far.initiator.skip(&header, before);
            }
            self.take_reply(at, &header, tail, now);
        }
        Ok(())
    }

    /// A packet came whose payload was read to nowhere: it has to come again.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn miss(&mut self, peer: u32, header: &[u8; HEADER]) -> Result<(), BadPacket> {
        let mut header = Header::decode(header)?;
        let Some(tenant) = self.links.tenant(peer, header.path.tenant) else { return Ok(()) };
        header.path.tenant = tenant;
        let Some(at) = self.connected(peer, &header) else { return Ok(()) };
        let Some(far) = self.qps[at].as_mut().and_then(|qp| qp.far.as_mut()) else { return Ok(()) };
        match header.kind {
            Kind::Request => far.target.miss(&header),
            _ => far.initiator.rewind(),
        }
        self.owe(at);
        self.schedule.enqueue(at);
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
            if outcome == Outcome::Over && self.put_off_ack(at, header) {
                return;
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
        let stream = far.stream(&mut self.links);
        let outbox = self.links.outbox(stream);
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
            self.links.call(stream);
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
            Kind::Request
            | Kind::Datagram
            | Kind::Control
            | Kind::Member
            | Kind::Shadow
            | Kind::Ping
            | Kind::Pong => {}
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
