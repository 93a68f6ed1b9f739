//! Memberships in multicast groups. Joining says where the group's datagrams go; that the QP gets them is asked of
//! the device by the application (`ibv_attach_mcast`).

use verbs_abi::{
    ids::{self, Qpn},
    proto::{
        AhAttr,
        cm::{Address, CmAnswer, Event, EventKind, EventParam, UdParam},
    },
};

use crate::{
    CommId, Manager, Refusal, UDP_QKEY,
    client::{Membership, Queued},
    id::State,
};

impl Manager {
    pub(crate) fn join(&mut self, comm: CommId, uid: u64, address: Address) -> Result<CmAnswer, Refusal> {
        let Address::Ip(group) = address else { return Err(Refusal::Family) };
        let id = self.id(comm)?;
        let ready = matches!(id.state, State::Bound | State::AddrResolved | State::RouteResolved);
        if !ready || !id.on_device || !id.is_datagram() || !group.ip().is_multicast() {
            return Err(Refusal::WrongState);
        }
        let (client, tos) = (id.client, id.tos);
        let source = id.source_ip().ok_or(Refusal::WrongState)?;
        let limit = self.settings.ids;
        let known = self.clients.get_mut(&client).ok_or(Refusal::NoSuchId)?;
        if known.numbers.len() + known.memberships.len() >= limit as usize {
            return Err(Refusal::TooMany);
        }
        let ah = AhAttr {
            dgid: ids::Gid::from(group.ip()).0,
            sgid_index: known.place.gid_index(source.ip()),
            hop_limit: 1,
            traffic_class: tos,
            is_global: 1,
            port_num: 1,
            ..AhAttr::default()
        };
        let number = known.memberships.take(Membership { owner: comm, events_reported: 0 }, limit)?;
        let qpn = Qpn::MULTICAST.value();
        let param = EventParam::Ud(UdParam { qpn, qkey: UDP_QKEY, ah, private_data: Vec::new() });
        let kind = EventKind::MulticastJoin;
        let event = Event { uid, id: number, kind, status: 0, param, known: None };
        self.enqueue(comm, Queued { owner: comm, request: None, membership: Some(number), event });
        Ok(CmAnswer::Id(number))
    }

    pub(crate) fn leave(&mut self, client: u32, channel: u32, number: u32) -> Result<CmAnswer, Refusal> {
        let known = self.clients.get_mut(&client).ok_or(Refusal::NoSuchId)?;
        let owner = known.memberships.look_up(number)?.owner;
        if self.id(owner)?.channel != channel {
            return Err(Refusal::WrongChannel);
        }
        let revoked = self.purge(owner, |queued| queued.membership == Some(number));
        let known = self.clients.get_mut(&client).ok_or(Refusal::NoSuchId)?;
        let membership = known.memberships.put(number).ok_or(Refusal::NoSuchId)?;
        Ok(CmAnswer::Reported { events: membership.events_reported, revoked })
    }
}
