//! A client of one tenant against a client of another on the same router, whatever both agree on.

use std::{fs, path::PathBuf, sync::atomic::Ordering};

use anyhow::{Context, Result, ensure};
use tempfile::{TempDir, tempfile};
use verbs_abi::{
    proto::{Answer, Gid, Mode, QpAttr, Request, cm::EventKind},
    shm::wqe::{Address, SendWqe, Sge, flag},
    verbs::{Opcode, QpState, QpType, WcStatus},
};

use crate::{
    client::{BASE, Client, LEN, Qp, RIGHTS, ask, create_qp, dial, event, eventually, hello, reg_mr},
    common::{self, daemon::Daemon},
    domains,
    field::Case,
    manager::Process,
};

/// What the red client's memory holds.
const SENTINEL: u64 = 0x7ed0_7ed0_7ed0_7ed0;

pub(crate) fn cases() -> Vec<Case> {
    type Attack = fn(&mut Border) -> Result<()>;
    let rows: Vec<(&str, Attack)> = vec![
        ("writes over a connection that both want", |border| written(border, Opcode::Write)),
        ("reads over a connection that both want", |border| written(border, Opcode::Read)),
        ("adds over a connection that both want", |border| written(border, Opcode::FetchAndAdd)),
        ("sends over a connection that both want", |border| written(border, Opcode::Send)),
        ("writes without a reliable connection", unreliable),
        ("sends a datagram with the right Q_Key", datagram),
        ("wants to execute on the other's queues", direct),
        ("uses the other's keys at home", keys),
        ("names the other's objects", handles),
        ("opens the other's receiver by a domain of the same file", receivers),
        ("asks who the other's clients are", strangers),
        ("connects to the other's listener", listener),
        ("takes the word that the other's lane sleeps on", wake_words),
        ("opens more devices than its tenant may have", devices),
        ("registers more than its tenant may have", memory),
        ("opens a device on the operator's socket", operator),
        ("asks for a mode that its tenant has not", loose_mode),
    ];
    let case = |(name, attack): (&str, Attack)| {
        Case::new(format!("tenant: {name}"), move |_| {
            let mut border = Border::new()?;
            attack(&mut border)?;
            border.check()
        })
    };
    rows.into_iter().map(case).collect()
}

/// A router with two tenants, and a client of each.
struct Border {
    red: Side,
    blue: Side,
    gid: Gid,
    daemon: Daemon,
    directory: TempDir,
}

struct Side {
    client: Client,
    socket: PathBuf,
    pd: u32,
    cq: u32,
    key: u32,
}

impl Side {
    fn open(socket: PathBuf) -> Result<Self> {
        let client = Client::open(&socket, Mode::Direct)?;
        let (pd, cq) = (client.pd()?, client.cq(None)?.0);
        let key = client.mr(pd, 0, LEN as u64, RIGHTS)?;
        Ok(Self { client, socket, pd, cq, key })
    }

    fn qp(&self, qp_type: QpType) -> Result<Qp> {
        self.client.qp(self.pd, self.cq, qp_type)
    }
}

impl Border {
    fn new() -> Result<Self> {
        let directory = TempDir::with_prefix("freeflow-")?;
        let socket = |name: &str| directory.path().join(name);
        // Prefixes that no machine has addresses of: each client has its loopback address, which means the same to
        // both, so that nothing but the tenant keeps them apart.
        let config = format!(
            "[[tenant]]\nname = \"red\"\nsocket = {:?}\nprefixes = [\"198.18.0.0/16\"]\n\
             [[tenant]]\nname = \"blue\"\nsocket = {:?}\nprefixes = [\"198.19.0.0/16\"]\n\
             [tenant.total]\nclients = 3\nmemory = 1000000\n\
             [[tenant]]\nname = \"strict\"\nsocket = {:?}\nprefixes = [\"198.51.100.0/24\"]\nmode = \"isolated\"\n",
            socket("red.sock"),
            socket("blue.sock"),
            socket("strict.sock")
        );
        let file = socket("router.toml");
        fs::write(&file, config)?;
        let words = ["--config", file.to_str().context("a path of text")?];
        let daemon = Daemon::start_with(&common::tree()?, &socket("router.sock"), &words)?;
        let (red, blue) = (Side::open(socket("red.sock"))?, Side::open(socket("blue.sock"))?);
        for at in (0..LEN).step_by(8) {
            red.client.memory.u64(at).store(SENTINEL, Ordering::Relaxed);
        }
        let gid = red.client.gid()?;
        ensure!(gid == blue.client.gid()?, "they have different addresses");
        Ok(Self { red, blue, gid, daemon, directory })
    }

    /// A QP of each, connected with the other's by number and address.
    fn connected(&self, qp_type: QpType) -> Result<(Qp, Qp)> {
        let (red, blue) = (self.red.qp(qp_type)?, self.blue.qp(qp_type)?);
        let (answer, files) = self.blue.client.connect(&blue, (red.new.qpn, self.gid))?;
        ensure!(answer == Answer::Done && files.is_empty(), "introduced: {answer:?}");
        let (answer, files) = self.red.client.connect(&red, (blue.new.qpn, self.gid))?;
        ensure!(answer == Answer::Done && files.is_empty(), "introduced: {answer:?}");
        Ok((red, blue))
    }

    fn sge(&self) -> Sge {
        Sge { addr: BASE, length: 8, lkey: self.blue.key }
    }

    /// A request of the blue client's for the red client's memory.
    fn request(&self, opcode: Opcode) -> SendWqe {
        let mut wqe = SendWqe::default();
        (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, opcode.value() as u8);
        (wqe.remote_addr, wqe.rkey) = (BASE, self.red.key);
        assert!(wqe.push_sge(self.sge()), "no room for an SGE");
        wqe
    }

    /// Fails unless the request ends with this status and the red client notices nothing.
    fn ends_with(&self, (red, blue): (&mut Qp, &mut Qp), wqe: &SendWqe, status: WcStatus) -> Result<()> {
        self.red.client.post_recv(red, 1, &[Sge { addr: BASE, length: 64, lkey: self.red.key }]);
        self.blue.client.post(blue, wqe);
        let done = blue.completion()?;
        ensure!(u32::from(done.status) == status.value(), "it ended so: {done:?}");
        ensure!(red.receives.pop().is_none(), "the other tenant received something");
        let state = self.red.client.state(red.new.qpn)?;
        ensure!(state == QpState::Rts, "the other tenant's QP is in {state:?}");
        let own = (0..LEN).step_by(8).all(|at| self.blue.client.memory.u64(at).load(Ordering::Relaxed) == 0);
        ensure!(own, "something of the other tenant was read");
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let changed = (0..LEN)
            .step_by(8)
            .find(|at| self.red.client.memory.u64(*at).load(Ordering::Relaxed) != SENTINEL);
        ensure!(changed.is_none(), "the other tenant's memory changed at {changed:?}");
        ensure!(self.red.client.ask(&Request::AllocPd)?.is_ok(), "the other tenant is not served");
        let log = self.daemon.log();
        ensure!(!log.contains("panicked") && !log.contains("ERROR"), "the router's log:\n{log}");
        Ok(())
    }
}

fn written(border: &mut Border, opcode: Opcode) -> Result<()> {
    let (mut red, mut blue) = border.connected(QpType::Rc)?;
    border.ends_with((&mut red, &mut blue), &border.request(opcode), WcStatus::RetryExcErr)
}

fn unreliable(border: &mut Border) -> Result<()> {
    let (mut red, mut blue) = border.connected(QpType::Uc)?;
    border.ends_with((&mut red, &mut blue), &border.request(Opcode::Write), WcStatus::Success)
}

fn datagram(border: &mut Border) -> Result<()> {
    let (mut red, mut blue) = border.connected(QpType::Ud)?;
    let mut wqe = border.request(Opcode::Send);
    wqe.flags |= flag::ADDRESS;
    wqe.address = Address { dgid: border.gid, qpn: red.new.qpn, qkey: 0x11, ..Address::default() };
    border.ends_with((&mut red, &mut blue), &wqe, WcStatus::Success)
}

/// [`Border::connected`] looks at what the router answers.
fn direct(border: &mut Border) -> Result<()> {
    let modes = [&border.red, &border.blue].map(|side| side.client.welcome.mode);
    ensure!(modes == [Mode::Direct; 2], "nothing to refuse: {modes:?}");
    border.connected(QpType::Rc).map(drop)
}

fn keys(border: &mut Border) -> Result<()> {
    for (remote, status) in [(false, WcStatus::LocProtErr), (true, WcStatus::RemAccessErr)] {
        let mut qp = border.blue.qp(QpType::Rc)?;
        border.blue.client.connect(&qp, (qp.new.qpn, border.gid))?;
        let mut wqe = border.request(Opcode::Write);
        if !remote {
            wqe.reset();
            ensure!(wqe.push_sge(Sge { lkey: border.red.key, ..border.sge() }), "no room for an SGE");
        }
        border.blue.client.post(&qp, &wqe);
        let done = qp.completion()?;
        ensure!(u32::from(done.status) == status.value(), "it ended so: {done:?}");
    }
    Ok(())
}

fn handles(border: &mut Border) -> Result<()> {
    let red = border.red.qp(QpType::Rc)?;
    let attr = QpAttr { qp_state: QpState::Err.value(), ..QpAttr::default() };
    // A client that has nothing, so that no number means something of its own.
    let thief = Client::open(&border.blue.socket, Mode::Isolated)?;
    for request in [
        Request::QueryQp { qpn: red.new.qpn },
        Request::DestroyQp { qpn: red.new.qpn },
        Request::ModifyQp { qpn: red.new.qpn, mask: 1, attr },
        Request::DeregMr { key: border.red.key },
        Request::DeallocPd { pd: border.red.pd },
        Request::DestroyCq { cq: border.red.cq },
        Request::RegMr(reg_mr(border.red.pd, 0, 4096, RIGHTS)),
        Request::CreateQp(create_qp(border.red.pd, border.red.cq, QpType::Rc)),
    ] {
        thief.refused(&request, libc::EINVAL)?;
    }
    Ok(())
}

/// An XRC domain is its tenant's, whatever file stands for it.
fn receivers(border: &mut Border) -> Result<()> {
    let file = tempfile()?;
    let qpn = domains::receiver(&border.red.client, domains::domain(&border.red.client, Some(&file))?)?;
    let xrcd = domains::domain(&border.blue.client, Some(&file))?;
    border.blue.client.refused(&Request::OpenQp { xrcd, qpn }, libc::EINVAL)?;
    domains::ensure_out_of_reach(&border.blue.client, qpn)?;
    ensure!(border.red.client.state(qpn)? == QpState::Reset, "the receiver has changed");
    Ok(())
}

fn strangers(border: &mut Border) -> Result<()> {
    let (red, _) = border.connected(QpType::Rc)?;
    let status = router::client::status(&border.blue.socket)?;
    let foreign = status.clients.iter().any(|client| client.tenant != "blue");
    ensure!(!foreign && !status.clients.is_empty(), "it sees {:?}", status.clients);
    ensure!(!status.qps.iter().any(|qp| qp.qpn == red.new.qpn), "it sees {:?}", status.qps);
    Ok(())
}

/// Both have the same address, and the connection manager that they share keeps them apart.
fn listener(border: &mut Border) -> Result<()> {
    let (server, client) = (Process::new(&border.red.socket)?, Process::new(&border.blue.socket)?);
    server.listen()?;
    let outcome = client.outcome()?;
    ensure!(outcome == EventKind::Rejected || outcome == EventKind::Unreachable, "{outcome:?}");
    ensure!(server.is_quiet()?, "the other tenant heard of it");
    // Nor is the port taken from it.
    client.listen().map(drop)
}

fn wake_words(border: &mut Border) -> Result<()> {
    let second = Client::open(&border.red.socket, Mode::Isolated)?;
    let page = |client: &Client| anyhow::Ok(rustix::fs::fstat(&client.files[3])?.st_ino);
    let (red, same, blue) = (page(&border.red.client)?, page(&second)?, page(&border.blue.client)?);
    ensure!(red == same && red != blue, "wake pages {red}, {same} and {blue}");
    Ok(())
}

fn devices(border: &mut Border) -> Result<()> {
    let mut held = Vec::new();
    let opened = (0..20).take_while(|_| match Client::open(&border.blue.socket, Mode::Isolated) {
        Ok(client) => {
            held.push(client);
            true
        }
        Err(_) => false,
    });
    let opened = opened.count();
    ensure!(opened == 2, "one and {opened} devices of three");
    let (endpoint, events) = (dial(&border.blue.socket)?, event()?);
    let (reply, _) = ask(&endpoint, &hello(Mode::Isolated), &[std::os::fd::AsFd::as_fd(&events)])?;
    ensure!(reply == Err(libc::EUSERS), "{reply:?}");
    drop(Client::open(&border.red.socket, Mode::Isolated)?);
    drop(held);
    eventually("devices that are closed count no more", || {
        Ok(Client::open(&border.blue.socket, Mode::Isolated).is_ok())
    })
}

fn memory(border: &mut Border) -> Result<()> {
    let second = Client::open(&border.blue.socket, Mode::Isolated)?;
    let pd = second.pd()?;
    // A million bytes for all of the tenant: the first client has some of them.
    second.mr(pd, 0, 900_000, RIGHTS)?;
    second.refused(&Request::RegMr(reg_mr(pd, 0, 900_000, RIGHTS)), libc::ENOMEM)?;
    let (client, pd) = (&border.blue.client, border.blue.pd);
    client.refused(&Request::RegMr(reg_mr(pd, 0, 900_000, RIGHTS)), libc::ENOMEM)?;
    border.red.client.mr(border.red.pd, 0, 900_000, RIGHTS).map(drop)
}

fn operator(border: &mut Border) -> Result<()> {
    let (endpoint, events) = (dial(&border.directory.path().join("router.sock"))?, event()?);
    let (reply, _) = ask(&endpoint, &hello(Mode::Isolated), &[std::os::fd::AsFd::as_fd(&events)])?;
    ensure!(reply.is_err(), "a device on the operator's socket: {reply:?}");
    Ok(())
}

fn loose_mode(border: &mut Border) -> Result<()> {
    let client = Client::open(&border.directory.path().join("strict.sock"), Mode::Direct)?;
    ensure!(client.welcome.mode == Mode::Isolated, "{:?} is granted", client.welcome.mode);
    Ok(())
}
