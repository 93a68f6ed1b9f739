//! Binding an id to its address, finding the way to another.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use verbs_abi::proto::cm::{Address, EventKind, IbAddress};

use crate::{CommId, Manager, Refusal, id::State, ports::Scope, space};

impl Manager {
    pub(crate) fn bind(&mut self, comm: CommId, address: Address) -> Result<(), Refusal> {
        if self.id(comm)?.state != State::Idle {
            return Err(Refusal::WrongState);
        }
        match address {
            Address::Ip(address) => self.bind_ip(comm, address),
            Address::Ib(address) => self.bind_ib(comm, address),
        }
    }

    fn bind_ip(&mut self, comm: CommId, address: SocketAddr) -> Result<(), Refusal> {
        let id = self.id(comm)?;
        let place = self.place(id)?;
        let wildcard = address.ip().is_unspecified();
        if !wildcard && !place.owns(address.ip()) {
            return Err(Refusal::AddressNotAvailable);
        }
        let scope = Scope::of(place, id.space);
        let mut address = address;
        if address.port() == 0 {
            let random = self.random_64();
            address.set_port(self.ports.free(scope, random)?);
        } else {
            self.ports.check(scope, id, address, id.reuse_addr, &self.ids, comm)?;
        }
        self.ports.hold(scope, address.port(), comm);
        let id = self.id_mut(comm)?;
        id.holds_port = true;
        id.source = Some(Address::Ip(address));
        id.destination = Some(Address::Ip(SocketAddr::new(unspecified_like(address.ip()), 0)));
        id.on_device = !wildcard;
        id.state = State::Bound;
        Ok(())
    }

    /// InfiniBand addresses are taken as far as librdmacm asks for them to learn whether they are served: to bind
    /// to all of them.
    fn bind_ib(&mut self, comm: CommId, address: IbAddress) -> Result<(), Refusal> {
        if self.id(comm)?.space != space::IB {
            return Err(Refusal::Invalid);
        }
        if address.gid != [0; 16] {
            return Err(Refusal::AddressNotAvailable);
        }
        let port = u64::from(self.random_24() >> 9 | 0x8000);
        let sid = if address.sid & 0xffff == 0 { address.sid | port } else { address.sid };
        let id = self.id_mut(comm)?;
        id.source = Some(Address::Ib(IbAddress { sid, ..address }));
        id.destination = Some(Address::Ib(IbAddress::default()));
        id.state = State::Bound;
        Ok(())
    }

    pub(crate) fn resolve_addr(
        &mut self,
        comm: CommId,
        source: Option<Address>,
        destination: Address,
        until: Duration,
    ) -> Result<(), Refusal> {
        let Address::Ip(destination) = destination else { return Err(Refusal::Family) };
        if self.id(comm)?.state == State::Idle {
            let any = Address::Ip(SocketAddr::new(unspecified_like(destination.ip()), 0));
            self.bind(comm, source.unwrap_or(any))?;
        }
        let id = self.id_mut(comm)?;
        if id.state != State::Bound {
            return Err(Refusal::WrongState);
        }
        if id.source_ip().is_none_or(|source| source.is_ipv4() != destination.is_ipv4()) {
            return Err(Refusal::Invalid);
        }
        id.destination = Some(Address::Ip(destination));
        id.state = State::AddrQuery;
        self.resolving.insert(comm);
        self.wait(comm, Some(until));
        self.try_resolve(comm);
        Ok(())
    }

    /// Goes on with an id whose destination somebody has by now.
    pub(crate) fn try_resolve(&mut self, comm: CommId) {
        let Some((source, destination, host)) = self.resolved(comm) else { return };
        self.resolving.remove(&comm);
        self.wait(comm, None);
        if let Some(id) = self.ids.get_mut(&comm) {
            id.source = Some(Address::Ip(source));
            id.destination = Some(Address::Ip(destination));
            id.host = host;
            id.on_device = true;
            id.state = State::AddrResolved;
            self.emit_plain(comm, EventKind::AddrResolved, 0);
        }
    }

    /// Both addresses of an id that looks for its destination, and the host where that lives, if it is found.
    fn resolved(&self, comm: CommId) -> Option<(SocketAddr, SocketAddr, u32)> {
        let id = self.ids.get(&comm)?;
        let place = self.place(id).ok()?;
        let (mut source, mut destination) = (id.source_ip()?, id.destination_ip()?);
        let ip = destination.ip();
        let is_here =
            ip.is_unspecified() || ip.is_multicast() || place.owns(ip) || self.is_known(place.tenant, ip);
        let host = if is_here { 0 } else { self.far.host(place.tenant, ip)? };
        if source.ip().is_unspecified() {
            let is_better = |own| host != 0 && self.far.is_published(place.tenant, own);
            source.set_ip(place.source_for(ip, is_better)?);
        }
        if host != 0 && source.ip().is_loopback() {
            return None;
        }
        // To everybody is to oneself, as on Linux.
        if ip.is_unspecified() {
            destination.set_ip(source.ip());
        }
        Some((source, destination, host))
    }

    pub(crate) fn resolve_route(&mut self, comm: CommId) -> Result<(), Refusal> {
        let id = self.id_mut(comm)?;
        if id.state != State::AddrResolved {
            return Err(Refusal::WrongState);
        }
        id.state = State::RouteResolved;
        self.emit_plain(comm, EventKind::RouteResolved, 0);
        Ok(())
    }
}

/// The wildcard of an address's family.
pub(crate) fn unspecified_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
