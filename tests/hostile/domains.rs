//! XRC domains: who has none of a receiver's domain open cannot open the receiver, and who can opens no more than that.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use tempfile::tempfile;
use verbs_abi::{
    proto::{Answer, CreateQp, Mode, QpAttr, Request},
    verbs::{QpState, QpType},
};

use crate::{
    client::{Client, create_qp, transition},
    field::{Case, Field},
};

/// How often a client opens one receiver.
const OFTEN: usize = 200;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Isolated, Mode::Direct] {
        let name = |what: &str| format!("domain: {what} ({mode:?})");
        cases.push(Case::new(name("another's receiver"), move |field| foreign(field, mode)));
        cases.push(Case::new(name("what is no receiver of the domain"), move |field| others(field, mode)));
        cases.push(Case::new(name("a receiver let go more often than opened"), move |field| {
            often(field, mode)
        }));
    }
    cases.push(Case::new("domain: what is no more", stale));
    cases
}

/// A domain, of a file or of nobody else.
pub(crate) fn domain(client: &Client, file: Option<&File>) -> Result<u32> {
    let request = Request::OpenXrcd { creates: true, exclusive: false };
    let files: Vec<_> = file.into_iter().map(std::os::fd::AsFd::as_fd).collect();
    match crate::client::ask(&client.endpoint, &request, &files)?.0 {
        Ok(Answer::Handle(xrcd)) => Ok(xrcd),
        other => bail!("no XRC domain: {other:?}"),
    }
}

/// A receiver of a domain. Returns its number.
pub(crate) fn receiver(client: &Client, xrcd: u32) -> Result<u32> {
    let create = CreateQp { xrcd: Some(xrcd), ..create_qp(0, 0, QpType::XrcRecv) };
    match client.ask(&Request::CreateQp(create))? {
        Ok(Answer::Qp(new)) => Ok(new.qpn),
        other => bail!("no receiver: {other:?}"),
    }
}

/// Fails if a client can do anything with a QP.
pub(crate) fn ensure_out_of_reach(thief: &Client, qpn: u32) -> Result<()> {
    let attr = QpAttr { qp_state: QpState::Err.value(), ..QpAttr::default() };
    for request in
        [Request::QueryQp { qpn }, Request::ModifyQp { qpn, mask: 1, attr }, Request::DestroyQp { qpn }]
    {
        thief.refused(&request, libc::EINVAL)?;
    }
    thief.refused(&Request::PairQp { qpn }, libc::ENOENT)
}

/// Opens a device, with domains before so that its handles are no numbers of anybody else's.
fn thief(field: &Field, mode: Mode) -> Result<(Client, u32)> {
    let client = Client::open(field.socket(), mode)?;
    let xrcds = (0..8).map(|_| domain(&client, None)).collect::<Result<Vec<_>>>()?;
    let (last, rest) = xrcds.split_last().context("eight domains")?;
    for &xrcd in rest {
        ensure!(client.ask(&Request::CloseXrcd { xrcd })? == Ok(Answer::Done), "a domain of its own");
    }
    Ok((client, *last))
}

fn foreign(field: &Field, mode: Mode) -> Result<()> {
    let owner = Client::open(field.socket(), mode)?;
    let (private, file) = (domain(&owner, None)?, tempfile()?);
    let shared = domain(&owner, Some(&file))?;
    let (thief, own) = thief(field, mode)?;
    let another = domain(&thief, Some(&tempfile()?))?;
    for xrcd in [private, shared] {
        let qpn = receiver(&owner, xrcd)?;
        for of in [own, another, private, shared, 0, u32::MAX] {
            thief.refused(&Request::OpenQp { xrcd: of, qpn }, libc::EINVAL)?;
        }
        ensure_out_of_reach(&thief, qpn)?;
        ensure!(owner.state(qpn)? == QpState::Reset, "its receiver has changed");
    }
    let create = CreateQp { xrcd: Some(private), ..create_qp(0, 0, QpType::XrcRecv) };
    thief.refused(&Request::CreateQp(create), libc::EINVAL)?;
    thief.refused(&Request::CloseXrcd { xrcd: private }, libc::EINVAL)
}

/// A domain that both have open gives nothing but its receivers.
fn others(field: &Field, mode: Mode) -> Result<()> {
    let owner = Client::open(field.socket(), mode)?;
    let file = tempfile()?;
    domain(&owner, Some(&file))?;
    let (pd, cq) = (owner.pd()?, owner.cq(None)?.0);
    let ordinary = [QpType::Rc, QpType::Uc, QpType::Ud]
        .into_iter()
        .map(|qp_type| Ok(owner.qp(pd, cq, qp_type)?.new.qpn))
        .collect::<Result<Vec<_>>>()?;
    let elsewhere = receiver(&owner, domain(&owner, None)?)?;
    let (thief, _) = thief(field, mode)?;
    let xrcd = domain(&thief, Some(&file))?;
    let numbers = (0..32).map(|bit| 1_u32 << bit).chain([0, u32::MAX, field.target().qpn, elsewhere]);
    for qpn in numbers.chain(ordinary) {
        thief.refused(&Request::OpenQp { xrcd, qpn }, libc::EINVAL)?;
    }
    Ok(())
}

fn often(field: &Field, mode: Mode) -> Result<()> {
    let owner = Client::open(field.socket(), mode)?;
    let file = tempfile()?;
    let qpn = receiver(&owner, domain(&owner, Some(&file))?)?;
    let (sharer, _) = thief(field, mode)?;
    let xrcd = domain(&sharer, Some(&file))?;
    for _ in 0..OFTEN {
        let opened = sharer.ask(&Request::OpenQp { xrcd, qpn })?;
        ensure!(matches!(opened, Ok(Answer::Qp(new)) if new.qpn == qpn), "opened: {opened:?}");
    }
    sharer.refused(&Request::CloseXrcd { xrcd }, libc::EBUSY)?;
    for _ in 0..OFTEN {
        ensure!(sharer.ask(&Request::DestroyQp { qpn })? == Ok(Answer::Done), "let go");
    }
    ensure_out_of_reach(&sharer, qpn)?;
    ensure!(sharer.ask(&Request::CloseXrcd { xrcd })? == Ok(Answer::Done), "nobody uses it");
    ensure!(owner.state(qpn)? == QpState::Reset, "the receiver has gone with the sharer");
    ensure!(owner.ask(&Request::DestroyQp { qpn })? == Ok(Answer::Done), "its owner ends it");
    Ok(())
}

fn stale(field: &Field) -> Result<()> {
    let client = field.open()?;
    let (first, second) = (domain(&client, None)?, domain(&client, None)?);
    let [gone, lives] = [first, second].map(|xrcd| receiver(&client, xrcd));
    let (gone, lives) = (gone?, lives?);
    ensure!(client.ask(&Request::DestroyQp { qpn: gone })? == Ok(Answer::Done), "the receiver");
    client.refused(&Request::OpenQp { xrcd: first, qpn: gone }, libc::EINVAL)?;
    ensure!(client.ask(&Request::CloseXrcd { xrcd: first })? == Ok(Answer::Done), "the domain");
    for qpn in [gone, lives] {
        client.refused(&Request::OpenQp { xrcd: first, qpn }, libc::EINVAL)?;
    }
    let (pd, cq) = (client.pd()?, client.cq(None)?.0);
    let mut qp = client.qp(pd, cq, QpType::Rc)?;
    qp.new.qpn = gone;
    let gid = client.gid()?;
    client.refused(&transition(&qp, QpState::Init, (gone, gid), 0), libc::EINVAL)
}
