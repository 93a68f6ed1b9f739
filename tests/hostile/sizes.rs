//! Numbers in requests, at and beyond what there is.

use anyhow::{Result, ensure};
use verbs_abi::{
    proto::{CreateQp, Mode, QpAttr, QpCap, RegMr, Request},
    shm::{
        PAGE,
        arena::REGION_LEN,
        wqe::{MAX_INLINE, MAX_SGE, MAX_WR},
    },
    verbs::{QpAttrMask as A, QpState, QpType},
};

use crate::{
    client::{BASE, Client, LEN, RIGHTS, create_qp, reg_mr, transition},
    field::{Case, Field},
};

pub(crate) fn cases() -> Vec<Case> {
    [queues(), regions(), attributes(), quotas()].into_iter().flatten().collect()
}

/// A client with a PD and a CQ.
fn ready(field: &Field) -> Result<(Client, u32, u32)> {
    let client = field.open()?;
    let (pd, cq) = (client.pd()?, client.cq(None)?.0);
    Ok((client, pd, cq))
}

type Bend = fn(&mut QpCap, u32);

fn queues() -> Vec<Case> {
    let rows: [(&str, u32, Bend); 5] = [
        ("send WRs", MAX_WR, |cap, n| cap.max_send_wr = n),
        ("receive WRs", MAX_WR, |cap, n| cap.max_recv_wr = n),
        ("send SGEs", MAX_SGE as u32, |cap, n| cap.max_send_sge = n),
        ("receive SGEs", MAX_SGE as u32, |cap, n| cap.max_recv_sge = n),
        ("inline bytes", MAX_INLINE as u32, |cap, n| cap.max_inline_data = n),
    ];
    let case = |(name, most, bend): (&str, u32, Bend)| {
        Case::new(format!("size: a QP of too many {name}"), move |field| {
            let (client, pd, cq) = ready(field)?;
            let ask = |number| {
                let mut create = create_qp(pd, cq, QpType::Rc);
                bend(&mut create.cap, number);
                client.ask(&Request::CreateQp(create))
            };
            ensure!(ask(0)?.is_ok() && ask(most)?.is_ok(), "what there is, is refused");
            for number in [most + 1, most * 2, 1 << 31, u32::MAX] {
                let reply = ask(number)?;
                ensure!(reply == Err(libc::EINVAL), "{number} of them: {reply:?}");
            }
            Ok(())
        })
    };
    let mut cases: Vec<Case> = rows.into_iter().map(case).collect();
    cases.push(Case::new("size: a QP of a type that is none", |field| {
        let (client, pd, cq) = ready(field)?;
        for qp_type in [0, 1, 5, 6, 7, 8, 9, 10, 255, 256, u32::MAX] {
            let create = CreateQp { qp_type, ..create_qp(pd, cq, QpType::Rc) };
            let reply = client.ask(&Request::CreateQp(create))?;
            ensure!(matches!(reply, Err(libc::EINVAL | libc::EOPNOTSUPP)), "type {qp_type}: {reply:?}");
        }
        Ok(())
    }));
    cases.push(Case::new("size: a CQ of nothing, and one too long", |field| {
        let client = field.open()?;
        for cqe in [0, client.welcome.limits.max_cqe + 1, 1 << 31, u32::MAX] {
            client.refused(&Request::CreateCq { cqe, channel: None }, libc::EINVAL)?;
        }
        Ok(())
    }));
    cases
}

fn regions() -> Vec<Case> {
    let good = |pd| reg_mr(pd, PAGE as u64, 4 * PAGE as u64, RIGHTS);
    type Change = fn(&mut RegMr);
    let rows: Vec<(&str, Change)> = vec![
        ("no bytes", |reg| reg.len = 0),
        ("all bytes there are", |reg| reg.len = u64::MAX),
        ("an end behind the last address", |reg| reg.addr = u64::MAX - 5),
        ("a start behind what a program can have", |reg| reg.addr = REGION_LEN),
        ("an end behind what a program can have", |reg| reg.len = REGION_LEN),
        ("remote addresses that wrap", |reg| reg.iova = u64::MAX - 5),
        ("a moved part before its start", |reg| reg.shared_start -= PAGE as u64),
        ("a moved part behind its end", |reg| reg.shared_end += PAGE as u64),
        ("a moved part from the middle of a page", |reg| reg.shared_start += 8),
        ("a moved part to the middle of a page", |reg| reg.shared_end -= 8),
        ("a moved part that ends before it starts", |reg| {
            (reg.shared_start, reg.shared_end) = (reg.shared_end, reg.shared_start);
        }),
        ("a moved part of all there is", |reg| (reg.shared_start, reg.shared_end) = (0, REGION_LEN)),
        ("a moved part at the last address", |reg| reg.shared_end = u64::MAX),
        ("remote writes without local ones", |reg| reg.access = 2),
        ("remote atomics without local writes", |reg| reg.access = 8),
        ("another's PD", |reg| reg.pd = 0),
    ];
    let case = move |(name, bend): (&str, Change)| {
        Case::new(format!("region: {name}"), move |field| {
            let client = field.open()?;
            let mut reg = good(client.pd()?);
            ensure!(client.ask(&Request::RegMr(reg))?.is_ok(), "a right one is refused");
            bend(&mut reg);
            client.refused(&Request::RegMr(reg), libc::EINVAL)
        })
    };
    let mut cases: Vec<Case> = rows.into_iter().map(case).collect();
    cases.push(Case::new("region: rights that there are none of", |field| {
        let client = field.open()?;
        let pd = client.pd()?;
        // Those from 20 to 29 are hints, which a device may ignore.
        for bit in (10..32).filter(|bit| !(20..30).contains(bit)) {
            let reg = RegMr { access: 1 | 1 << bit, ..reg_mr(pd, 4096, 4096, 1) };
            let reply = client.ask(&Request::RegMr(reg))?;
            ensure!(matches!(reply, Err(libc::EINVAL | libc::EOPNOTSUPP)), "bit {bit}: {reply:?}");
        }
        Ok(())
    }));
    cases.push(Case::new("region: the largest that can be asked for", |field| {
        let client = field.open()?;
        let pd = client.pd()?;
        for reg in [
            RegMr {
                addr: 0,
                len: REGION_LEN,
                iova: 0,
                shared_start: 0,
                shared_end: REGION_LEN,
                ..reg_mr(pd, 0, 1, 1)
            },
            RegMr { addr: BASE, len: 1 << 44, shared_end: BASE + (1 << 44), ..reg_mr(pd, 0, LEN as u64, 1) },
        ] {
            // Granted or not: it is one client's own address space, and one mapping here.
            let _ = client.ask(&Request::RegMr(reg))?;
        }
        field.traffic_goes_on()
    }));
    cases
}

type Spoil = fn(&mut QpAttr);

/// A transition with one attribute that cannot be.
fn attributes() -> Vec<Case> {
    let rows: [(&str, QpState, Spoil); 17] = [
        ("a port that there is not", QpState::Init, |attr| attr.port_num = 2),
        ("port 0", QpState::Init, |attr| attr.port_num = 0),
        ("a P_Key that there is not", QpState::Init, |attr| attr.pkey_index = 1),
        ("the last P_Key", QpState::Init, |attr| attr.pkey_index = u16::MAX),
        ("rights that there are none of", QpState::Init, |attr| attr.qp_access_flags = u32::MAX),
        ("an MTU of 0", QpState::Rtr, |attr| attr.path_mtu = 0),
        ("an MTU beyond the greatest", QpState::Rtr, |attr| attr.path_mtu = 6),
        ("an MTU that is none", QpState::Rtr, |attr| attr.path_mtu = u32::MAX),
        ("too many reads at a time, as responder", QpState::Rtr, |attr| attr.max_dest_rd_atomic = 255),
        ("an RNR timer that is none", QpState::Rtr, |attr| attr.min_rnr_timer = 32),
        ("a path from another port", QpState::Rtr, |attr| attr.ah_attr.port_num = 7),
        ("a path from an address that there is not", QpState::Rtr, |attr| attr.ah_attr.sgid_index = 255),
        ("a path without a global header", QpState::Rtr, |attr| attr.ah_attr.is_global = 0),
        ("a QP number of 25 bits", QpState::Rtr, |attr| attr.dest_qp_num = 1 << 24),
        ("too many reads at a time, as initiator", QpState::Rts, |attr| attr.max_rd_atomic = 255),
        ("a timeout that is none", QpState::Rts, |attr| attr.timeout = 32),
        ("retries beyond seven", QpState::Rts, |attr| attr.retry_cnt = 8),
    ];
    let case = |(name, at, spoil): (&str, QpState, Spoil)| {
        Case::new(format!("attribute: {name}"), move |field| {
            let (client, pd, cq) = ready(field)?;
            let qp = client.qp(pd, cq, QpType::Rc)?;
            let peer = (qp.new.qpn, client.gid()?);
            for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
                let mut request = transition(&qp, state, peer, RIGHTS);
                if state == at {
                    let mut spoilt = request.clone();
                    if let Request::ModifyQp { attr, .. } = &mut spoilt {
                        spoil(attr);
                    }
                    return client.refused(&spoilt, libc::EINVAL);
                }
                if let Request::ModifyQp { attr, .. } = &mut request {
                    attr.cur_qp_state = u32::MAX;
                }
                ensure!(client.ask(&request)?.is_ok(), "{state:?} is refused");
            }
            Ok(())
        })
    };
    let mut cases: Vec<Case> = rows.into_iter().map(case).collect();
    cases.push(Case::new("attribute: every bit of the mask, in every state", every_mask));
    cases
}

fn every_mask(field: &Field) -> Result<()> {
    let (client, pd, cq) = ready(field)?;
    let qp = client.qp(pd, cq, QpType::Rc)?;
    for to in 0..=8 {
        for bit in 0..32 {
            for mask in [1 << bit, 1 | 1 << bit, u32::MAX ^ 1 << bit] {
                let attr = QpAttr { qp_state: to, cur_qp_state: to, ..QpAttr::default() };
                let _ = client.ask(&Request::ModifyQp { qpn: qp.new.qpn, mask, attr })?;
            }
        }
    }
    // Only RESET and ERR need nothing else, so these are where it can be.
    let state = client.state(qp.new.qpn)?;
    ensure!(matches!(state, QpState::Reset | QpState::Err), "it is in {state:?}");
    let reply = client.modify(qp.new.qpn, A::empty(), QpAttr::default())?;
    ensure!(reply.is_ok() || reply == Err(libc::EINVAL), "{reply:?}");
    Ok(())
}

/// As much as there can be of everything, and one more.
fn quotas() -> Vec<Case> {
    vec![
        Case::new("quota: PDs without end", |field| {
            let client = field.open()?;
            until_full(client.welcome.limits.max_pd, || client.ask(&Request::AllocPd))
        }),
        Case::new("quota: QPs of the greatest size without end", |field| {
            let (client, pd, cq) = ready(field)?;
            let cap = QpCap {
                max_send_wr: MAX_WR,
                max_recv_wr: MAX_WR,
                max_send_sge: MAX_SGE as u32,
                max_recv_sge: MAX_SGE as u32,
                max_inline_data: MAX_INLINE as u32,
            };
            let create = Request::CreateQp(CreateQp { cap, ..create_qp(pd, cq, QpType::Rc) });
            until_full(client.welcome.limits.max_qp, || client.ask(&create))
        }),
        Case::new("quota: CQs without end", |field| {
            let client = field.open()?;
            let request = Request::CreateCq { cqe: 1, channel: None };
            until_full(client.welcome.limits.max_cq, || client.ask(&request))
        }),
        Case::new("quota: as many devices as can be opened", |field| {
            let mut clients = Vec::new();
            for _ in 0..300 {
                clients.extend(Client::open(field.socket(), Mode::Isolated));
            }
            field.traffic_goes_on()
        }),
    ]
}

/// Asks again and again: refused for want of room at the limit at the latest.
fn until_full(limit: u32, ask: impl Fn() -> Result<verbs_abi::proto::Reply>) -> Result<()> {
    for given in 0..=limit {
        match ask()? {
            Ok(_) => ensure!(given < limit, "more than the limit of {limit}"),
            Err(errno) => {
                ensure!(errno == libc::ENOMEM, "errno {errno}");
                return Ok(());
            }
        }
    }
    Ok(())
}
