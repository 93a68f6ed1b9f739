//! Handles of others, and handles that are no more: as unknown as those that never were.

use anyhow::{Result, bail, ensure};
use verbs_abi::{
    proto::{Answer, CreateQp, Mode, QpAttr, Request},
    verbs::{QpState, QpType},
};

use crate::{
    client::{Client, RIGHTS, create_qp, event, reg_mr, transition},
    field::{Case, Field},
};

/// A client with one of everything.
struct Owner {
    client: Client,
    pd: u32,
    channel: u32,
    cq: u32,
    key: u32,
    window: u32,
    qpn: u32,
}

impl Owner {
    fn new(field: &Field, mode: Mode) -> Result<Self> {
        let client = Client::open(field.socket(), mode)?;
        let pd = client.pd()?;
        let Ok(Answer::Handle(channel)) = client.channel(event()?)? else { bail!("no channel") };
        let cq = client.cq(Some(channel))?.0;
        let key = client.mr(pd, 0, 4096, RIGHTS)?;
        let Ok(Answer::Mr { key: window }) = client.ask(&Request::AllocMw { pd, is_type_2: true })? else {
            bail!("no window")
        };
        let qp = client.qp(pd, cq, QpType::Rc)?;
        client.connect(&qp, (qp.new.qpn, client.gid()?))?;
        Ok(Self { pd, channel, cq, key, window, qpn: qp.new.qpn, client })
    }

    fn state(&self, to: QpState) -> Request {
        let attr = QpAttr { qp_state: to.value(), ..QpAttr::default() };
        Request::ModifyQp { qpn: self.qpn, mask: 1, attr }
    }

    /// Requests that name what is the owner's. The thief has a PD and a CQ of its own.
    fn requests(&self, pd: u32, cq: u32) -> Vec<(&'static str, Request)> {
        let create = create_qp(pd, cq, QpType::Rc);
        vec![
            ("DeallocPd", Request::DeallocPd { pd: self.pd }),
            ("RegMr in its PD", Request::RegMr(reg_mr(self.pd, 0, 4096, RIGHTS))),
            ("DeregMr", Request::DeregMr { key: self.key }),
            ("ReregMr", Request::ReregMr { key: self.key, reg: reg_mr(pd, 0, 4096, RIGHTS) }),
            ("AllocMw in its PD", Request::AllocMw { pd: self.pd, is_type_2: true }),
            ("DeallocMw", Request::DeallocMw { key: self.window }),
            ("DestroyChannel", Request::DestroyChannel { channel: self.channel }),
            ("CreateCq on its channel", Request::CreateCq { cqe: 1, channel: Some(self.channel) }),
            ("DestroyCq", Request::DestroyCq { cq: self.cq }),
            ("CreateQp in its PD", Request::CreateQp(CreateQp { pd: self.pd, ..create })),
            ("CreateQp that sends to its CQ", Request::CreateQp(CreateQp { send_cq: self.cq, ..create })),
            ("CreateQp that receives to its CQ", Request::CreateQp(CreateQp { recv_cq: self.cq, ..create })),
            ("QueryQp", Request::QueryQp { qpn: self.qpn }),
            ("ModifyQp to ERR", self.state(QpState::Err)),
            ("ModifyQp to RESET", self.state(QpState::Reset)),
            ("DestroyQp", Request::DestroyQp { qpn: self.qpn }),
        ]
    }
}

/// How many requests [`Owner::requests`] makes.
const REQUESTS: usize = 16;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for at in 0..REQUESTS {
        for mode in [Mode::Isolated, Mode::Direct] {
            let name = format!("handle: another's, request {at} of {REQUESTS} ({mode:?})");
            cases.push(Case::new(name, move |field| foreign(field, mode, at)));
        }
    }
    cases.push(Case::new("handle: each that is no more", stale));
    cases.push(Case::new("handle: every number for which there is nothing", every_number));
    cases.push(Case::new("handle: a bystander's QP, PD, CQ and key", bystanders));
    cases.push(Case::new("handle: what is in use destroyed", in_use));
    cases
}

fn foreign(field: &Field, mode: Mode, at: usize) -> Result<()> {
    let owner = Owner::new(field, mode)?;
    let thief = Client::open(field.socket(), mode)?;
    // Handles of a client count from one: the thief's own must not be the owner's numbers.
    let pds = (0..8).map(|_| thief.pd()).collect::<Result<Vec<_>>>()?;
    let cqs = (0..8).map(|_| Ok(thief.cq(None)?.0)).collect::<Result<Vec<_>>>()?;
    for pd in &pds[..7] {
        ensure!(thief.ask(&Request::DeallocPd { pd: *pd })? == Ok(Answer::Done), "a PD of its own");
    }
    for cq in &cqs[..7] {
        ensure!(thief.ask(&Request::DestroyCq { cq: *cq })? == Ok(Answer::Done), "a CQ of its own");
    }
    let requests = owner.requests(pds[7], cqs[7]);
    ensure!(requests.len() == REQUESTS, "{} requests", requests.len());
    let (name, request) = &requests[at];
    let reply = thief.ask(request)?;
    ensure!(reply == Err(libc::EINVAL), "{name} of another client is answered {reply:?}");
    ensure!(owner.client.state(owner.qpn)? == QpState::Rts, "{name} of another client changed its QP");
    Ok(())
}

fn stale(field: &Field) -> Result<()> {
    let owner = Owner::new(field, Mode::Isolated)?;
    let ends = [
        Request::DestroyQp { qpn: owner.qpn },
        Request::DeallocMw { key: owner.window },
        Request::DeregMr { key: owner.key },
        Request::DestroyCq { cq: owner.cq },
        Request::DestroyChannel { channel: owner.channel },
        Request::DeallocPd { pd: owner.pd },
    ];
    for request in &ends {
        ensure!(owner.client.ask(request)? == Ok(Answer::Done), "{request:?}");
    }
    let (pd, cq) = (owner.client.pd()?, owner.client.cq(None)?.0);
    for (name, request) in owner.requests(pd, cq) {
        let reply = owner.client.ask(&request)?;
        ensure!(reply == Err(libc::EINVAL), "{name} of what is no more: {reply:?}");
    }
    Ok(())
}

fn every_number(field: &Field) -> Result<()> {
    let client = field.open()?;
    for bit in 0..32 {
        for number in [1_u32 << bit, u32::MAX >> bit, u32::MAX << bit] {
            for request in [
                Request::DeallocPd { pd: number },
                Request::DeregMr { key: number },
                Request::DestroyChannel { channel: number },
                Request::DestroyCq { cq: number },
                Request::QueryQp { qpn: number },
                Request::DestroyQp { qpn: number },
            ] {
                client.refused(&request, libc::EINVAL)?;
            }
        }
    }
    Ok(())
}

fn bystanders(field: &Field) -> Result<()> {
    let (thief, target) = (field.open()?, field.target());
    let gid = thief.gid()?;
    for request in [
        Request::QueryQp { qpn: target.qpn },
        Request::DestroyQp { qpn: target.qpn },
        Request::DeregMr { key: target.key },
        Request::DeallocPd { pd: target.pd },
        Request::DestroyCq { cq: target.cq },
        Request::RegMr(reg_mr(target.pd, 0, 4096, RIGHTS)),
        Request::CreateQp(create_qp(target.pd, target.cq, QpType::Rc)),
    ] {
        thief.refused(&request, libc::EINVAL)?;
    }
    let (pd, cq) = (thief.pd()?, thief.cq(None)?.0);
    let mut qp = thief.qp(pd, cq, QpType::Rc)?;
    qp.new.qpn = target.qpn;
    for state in [QpState::Init, QpState::Rtr, QpState::Rts, QpState::Err, QpState::Reset] {
        thief.refused(&transition(&qp, state, (target.qpn, gid), RIGHTS), libc::EINVAL)?;
    }
    Ok(())
}

fn in_use(field: &Field) -> Result<()> {
    let owner = Owner::new(field, Mode::Isolated)?;
    for request in [
        Request::DeallocPd { pd: owner.pd },
        Request::DestroyCq { cq: owner.cq },
        Request::DestroyChannel { channel: owner.channel },
    ] {
        owner.client.refused(&request, libc::EBUSY)?;
    }
    Ok(())
}
