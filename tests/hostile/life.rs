//! Clients that end, stop, change into others or hand their connection on, at every point.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use verbs_abi::{
    proto::{Answer, Mode, QpAttr, Request},
    verbs::{QpState, QpType, WcStatus},
};

use crate::{
    client::{BASE, Client, LEN, Qp, RIGHTS, dial, ensure_dropped, eventually},
    field::{Case, Field},
    puppet::{Puppet, STEPS},
};
use verbs_abi::shm::wqe::{SendWqe, Sge, flag};

/// How long a verb may take when a peer is in the middle of something: the router waits ten seconds at most.
const BOUND: Duration = Duration::from_secs(15);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in ["isolated", "direct"] {
        for steps in 0..=STEPS {
            cases.push(Case::new(format!("end: killed after step {steps} ({mode})"), move |field| {
                let mut puppet = device(field, mode, steps)?;
                puppet.kill()
            }));
            cases.push(Case::new(format!("end: closed after step {steps} ({mode})"), move |field| {
                closed(field, if mode == "direct" { Mode::Direct } else { Mode::Isolated }, steps)
            }));
        }
        cases.push(Case::new(format!("end: stopped with everything open ({mode})"), move |field| {
            let puppet = device(field, mode, STEPS)?;
            puppet.signal(Signal::STOP)?;
            (0..5).try_for_each(|_| field.traffic_goes_on())?;
            ensure!(field.status()?.clients.len() == 3, "a stopped client is gone");
            Ok(())
        }));
    }
    cases.extend([
        Case::new("end: stopped in the middle, its direct peer goes on", stopped_peer),
        Case::new("end: another program in its place", exec),
        Case::new("connection: handed on before a word", handed_on),
        Case::new("connection: of a process that is no more", of_the_dead),
        Case::new("connection: shared by two that both speak", shared),
    ]);
    cases
}

fn device(field: &Field, mode: &str, steps: usize) -> Result<Puppet> {
    let socket = field.socket().to_str().context("a path of text")?;
    let puppet = Puppet::start(&["device", socket, mode, &steps.to_string()], None)?;
    puppet.wait_for("READY")?;
    Ok(puppet)
}

/// Closes the connection with a request under way, so that the answer finds nobody.
fn closed(field: &Field, mode: Mode, steps: usize) -> Result<()> {
    let endpoint = dial(field.socket())?;
    if steps == 0 {
        return Ok(());
    }
    let client = Client::on(endpoint, mode)?;
    let mut last = Request::Gids;
    if steps > 1 {
        let (pd, cq) = (client.pd()?, client.cq(None)?.0);
        last = Request::AllocPd;
        if steps > 2 {
            let key = client.mr(pd, 0, LEN as u64, RIGHTS)?;
            last = Request::DeregMr { key };
        }
        if steps > 3 {
            let qp = client.qp(pd, cq, QpType::Rc)?;
            last = Request::DestroyQp { qpn: qp.new.qpn };
            if steps > 4 {
                client.connect(&qp, (qp.new.qpn, client.gid()?))?;
                (0..8).for_each(|_| client.post(&qp, &SendWqe::default()));
            }
            if steps > 5 {
                let attr = QpAttr { qp_state: QpState::Reset.value(), ..QpAttr::default() };
                last = Request::ModifyQp { qpn: qp.new.qpn, mask: 1, attr };
            }
        }
    }
    client.endpoint.send(&last, &[])?;
    Ok(())
}

/// A QP of this process that a puppet's is connected with, in its own seat for good.
fn with_puppet(field: &Field, part: &str, mode: Mode) -> Result<(Client, Qp, u32, Puppet, Vec<u64>)> {
    let client = Client::open(field.socket(), mode)?;
    let (pd, cq) = (client.pd()?, client.cq(None)?.0);
    let key = client.mr(pd, 0, LEN as u64, RIGHTS)?;
    let qp = client.qp(pd, cq, QpType::Rc)?;
    let (socket, qpn) = (field.socket().to_str().context("a path of text")?, qp.new.qpn.to_string());
    let words = match part {
        "exec" => vec!["exec", socket, &qpn],
        _ => vec!["peer", socket, if mode == Mode::Direct { "direct" } else { "isolated" }, &qpn],
    };
    let puppet = Puppet::start(&words, None)?;
    let numbers = puppet.wait_for("READY")?;
    let numbers = numbers.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    ensure!(numbers.len() == 3, "a QP, a key and an address: {numbers:?}");
    client.connect(&qp, (u32::try_from(numbers[0])?, client.gid()?))?;
    Ok((client, qp, key, puppet, numbers))
}

fn stopped_peer(field: &Field) -> Result<()> {
    let (client, qp, key, puppet, _) = with_puppet(field, "peer", Mode::Direct)?;
    puppet.signal(Signal::STOP)?;
    let state = |to: QpState| {
        let attr = QpAttr { qp_state: to.value(), ..QpAttr::default() };
        Request::ModifyQp { qpn: qp.new.qpn, mask: 1, attr }
    };
    for request in [
        Request::DeregMr { key },
        state(QpState::Err),
        state(QpState::Reset),
        Request::DestroyQp { qpn: qp.new.qpn },
    ] {
        let began = Instant::now();
        let reply = client.ask(&request)?;
        ensure!(reply == Ok(Answer::Done), "{request:?}: {reply:?}");
        ensure!(began.elapsed() < BOUND, "{request:?} took {:?}", began.elapsed());
        field.traffic_goes_on()?;
    }
    Ok(())
}

/// The process lives, its device is open still, but its memory is another program's, which nobody may reach.
fn exec(field: &Field) -> Result<()> {
    let (client, mut qp, key, mut puppet, numbers) = with_puppet(field, "exec", Mode::Isolated)?;
    let link = format!("/proc/{}/exe", puppet.pid());
    eventually("another program runs", || Ok(std::fs::read_link(&link)?.ends_with("sleep")))?;
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags) = (7, flag::SIGNALED);
    (wqe.remote_addr, wqe.rkey) = (numbers[2], u32::try_from(numbers[1])?);
    ensure!(wqe.push_sge(Sge { addr: BASE, length: 8, lkey: key }), "no room for an SGE");
    client.post(&qp, &wqe);
    let done = qp.completion()?;
    ensure!(
        u32::from(done.status) == WcStatus::RetryExcErr.value(),
        "a program that is no more answered: {done:?}"
    );
    puppet.kill()
}

/// Who opens the device is who connected, whoever says so.
fn handed_on(field: &Field) -> Result<()> {
    let endpoint = dial(field.socket())?;
    let mut puppet = Puppet::start(&["speak"], Some(endpoint.as_fd().try_clone_to_owned()?))?;
    drop(endpoint);
    puppet.wait_for("OPENED")?;
    let status = field.status()?;
    let opened = status.clients.last().context("no client")?;
    ensure!(opened.pid == std::process::id(), "the device belongs to process {}", opened.pid);
    puppet.kill()
}

fn of_the_dead(field: &Field) -> Result<()> {
    let socket = field.socket().to_str().context("a path of text")?;
    let mut puppet = Puppet::start(&["leave", socket], None)?;
    puppet.wait()?;
    let errno = puppet.wait_for("REFUSED")?;
    ensure!(errno == libc::ESRCH.to_string(), "errno {errno}");
    Ok(())
}

/// Two processes with one connection can take each other's answers, and nothing else.
fn shared(field: &Field) -> Result<()> {
    let endpoint = dial(field.socket())?;
    let mut puppet = Puppet::start(&["speak"], Some(endpoint.as_fd().try_clone_to_owned()?))?;
    puppet.wait_for("OPENED")?;
    for request in crate::messages::requests() {
        if !matches!(request.1, Request::Hello { .. } | Request::CreateChannel) {
            let _ = endpoint.send(&request.1, &[]);
        }
    }
    field.traffic_goes_on()?;
    puppet.kill()?;
    // It was this process that connected, so the device is still there.
    let alive = endpoint.send(&Request::Hello { version: 1, mode: Mode::Isolated }, &[]);
    ensure!(alive.is_ok(), "the device ended with one that only spoke");
    ensure_dropped(&endpoint)
}
