//! A client that speaks the protocol and writes its arena without a provider, and so can do what no provider would.
//!
//! Its memory lies in its region alone, at addresses where this process has nothing: nobody can mean anything else.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{EventfdFlags, eventfd},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use verbs_abi::{
    proto::{
        AhAttr, Answer, CreateQp, Endpoint, Gid, Mode, NewQp, ProtoError, QpAttr, QpCap, RegMr, Reply,
        Request, Welcome,
    },
    shm::{
        LAYOUT_VERSION, PAGE, Window, arena,
        cqe::{CompletionReader, Cqe},
        doorbell::Doorbells,
        lane::WakeWord,
        queue::QueueArea,
        wqe::{RecvWqe, SendWqe, Sge},
    },
    verbs::{QpAttrMask as A, QpState, QpType},
};

/// How long anything may take that the router does at once.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// First address of a client's memory.
pub(crate) const BASE: u64 = 0x7000_0000_0000;
/// Bytes of it.
pub(crate) const LEN: usize = 64 * 1024;
/// Rights of an ordinary region and of an ordinary QP.
pub(crate) const RIGHTS: u32 = 0xf;

/// An opened device.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) endpoint: Endpoint,
    pub(crate) welcome: Welcome,
    pub(crate) arena: Window,
    /// Arena, region, lane page, wake page.
    pub(crate) files: Vec<OwnedFd>,
    pub(crate) memory: Window,
    doorbells: Doorbells,
    wake: WakeWord,
}

/// A QP, with the numbers that a provider would keep.
#[derive(Debug)]
pub(crate) struct Qp {
    pub(crate) new: NewQp,
    pub(crate) qp_type: QpType,
    pub(crate) area: QueueArea,
    pub(crate) sends: CompletionReader,
    pub(crate) receives: CompletionReader,
}

/// A connection that has said nothing yet, and waits at most [`LIMIT`] for anything.
pub(crate) fn dial(path: &Path) -> Result<Endpoint> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(LIMIT))?;
    }
    connect(&socket, &SocketAddrUnix::new(path)?).context("the router takes no connection")?;
    Ok(Endpoint::new(socket))
}

pub(crate) fn event() -> Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC)?)
}

/// What a Hello says.
pub(crate) fn hello(mode: Mode) -> Request {
    Request::Hello { version: LAYOUT_VERSION, mode }
}

pub(crate) fn ask(
    endpoint: &Endpoint,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Reply, Vec<OwnedFd>)> {
    endpoint.send(request, fds)?;
    Ok(endpoint.recv()?)
}

/// Fails unless the router hangs up, replies that were on their way left out.
pub(crate) fn ensure_dropped(endpoint: &Endpoint) -> Result<()> {
    for _ in 0..100_000 {
        match endpoint.recv::<Reply>() {
            Ok(_) => {}
            Err(ProtoError::Closed) => return Ok(()),
            Err(error) => bail!("the router did not hang up: {error}"),
        }
    }
    bail!("the router answers for ever")
}

/// Waits for something to become true.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !is_true()? {
        ensure!(began.elapsed() < LIMIT, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl Client {
    pub(crate) fn open(path: &Path, mode: Mode) -> Result<Self> {
        Self::on(dial(path)?, mode)
    }

    /// Opens the device of a connection.
    pub(crate) fn on(endpoint: Endpoint, mode: Mode) -> Result<Self> {
        let (events, memory) = (event()?, File::options().read(true).write(true).open("/proc/self/mem")?);
        let (reply, files) = ask(&endpoint, &hello(mode), &[events.as_fd(), memory.as_fd()])?;
        let Ok(Answer::Hello(welcome)) = reply else { bail!("no welcome: {reply:?}") };
        let arena = Window::map(&files[0], 0, arena::ARENA_LEN, true)?;
        let memory = Window::map(&files[1], BASE, LEN, true)?;
        let doorbells = Doorbells::new(&arena).context("an arena without doorbells")?;
        let [wake, ..] = WakeWord::all(&Window::map(&files[3], 0, PAGE, true)?).context("no wake words")?;
        Ok(Self { endpoint, welcome, arena, files, memory, doorbells, wake })
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<Reply> {
        Ok(ask(&self.endpoint, request, &[])?.0)
    }

    /// Fails unless the request is refused with this errno.
    pub(crate) fn refused(&self, request: &Request, errno: i32) -> Result<()> {
        let reply = self.ask(request)?;
        ensure!(reply == Err(errno), "{request:?} is answered {reply:?}, not errno {errno}");
        Ok(())
    }

    pub(crate) fn pd(&self) -> Result<u32> {
        match self.ask(&Request::AllocPd)? {
            Ok(Answer::Handle(pd)) => Ok(pd),
            other => bail!("no PD: {other:?}"),
        }
    }

    pub(crate) fn channel(&self, file: impl AsFd) -> Result<Reply> {
        Ok(ask(&self.endpoint, &Request::CreateChannel, &[file.as_fd()])?.0)
    }

    /// A CQ, and where it lies.
    pub(crate) fn cq(&self, channel: Option<u32>) -> Result<(u32, u64)> {
        match self.ask(&Request::CreateCq { cqe: 100, channel })? {
            Ok(Answer::Cq { cq, offset, .. }) => Ok((cq, offset)),
            other => bail!("no CQ: {other:?}"),
        }
    }

    pub(crate) fn qp(&self, pd: u32, cq: u32, qp_type: QpType) -> Result<Qp> {
        let Ok(Answer::Qp(new)) = self.ask(&Request::CreateQp(create_qp(pd, cq, qp_type)))? else {
            bail!("no QP")
        };
        let area = QueueArea::new(&self.arena, new.offset, new.geometry).context("a QP outside the arena")?;
        let sends = CompletionReader::new(area.sq_cqes.clone(), 0);
        let receives = CompletionReader::new(area.rq_cqes.clone(), 0);
        Ok(Qp { new, qp_type, area, sends, receives })
    }

    /// Registers part of its memory, with rights.
    pub(crate) fn mr(&self, pd: u32, offset: u64, len: u64, access: u32) -> Result<u32> {
        match self.ask(&Request::RegMr(reg_mr(pd, offset, len, access)))? {
            Ok(Answer::Mr { key }) => Ok(key),
            other => bail!("no MR: {other:?}"),
        }
    }

    pub(crate) fn gid(&self) -> Result<Gid> {
        match self.ask(&Request::Gids)? {
            Ok(Answer::Gids(gids)) => gids.first().copied().context("no address"),
            other => bail!("no GIDs: {other:?}"),
        }
    }

    pub(crate) fn modify(&self, qpn: u32, mask: A, attr: QpAttr) -> Result<Reply> {
        self.ask(&Request::ModifyQp { qpn, mask: mask.bits(), attr })
    }

    pub(crate) fn state(&self, qpn: u32) -> Result<QpState> {
        match self.ask(&Request::QueryQp { qpn })? {
            Ok(Answer::Attr(attr)) => Ok(QpState::try_from(attr.qp_state)?),
            other => bail!("no state: {other:?}"),
        }
    }

    /// Brings a QP to RTS. Says what RTR answered, and with which descriptors.
    pub(crate) fn connect(&self, qp: &Qp, peer: (u32, Gid)) -> Result<(Answer, Vec<OwnedFd>)> {
        let mut found = None;
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let request = transition(qp, state, peer, RIGHTS);
            let (reply, files) = ask(&self.endpoint, &request, &[])?;
            let answer = reply.map_err(|errno| anyhow::anyhow!("{state:?} is refused: errno {errno}"))?;
            if state == QpState::Rtr {
                found = Some((answer, files));
            }
        }
        found.context("RTR is one of the three")
    }

    /// Says that there is something new, as a provider does.
    pub(crate) fn ring(&self, slot: u32) {
        self.doorbells.ring(slot);
        // Whether the lane sleeps is nothing to rely on here.
        self.wake.wake();
    }

    /// Posts a work request and rings.
    pub(crate) fn post(&self, qp: &Qp, wqe: &SendWqe) {
        let mut blocks = Vec::new();
        wqe.encode(|_, block| blocks.push(*block));
        self.post_blocks(qp, &blocks);
    }

    /// Posts blocks, whatever they are, and rings.
    pub(crate) fn post_blocks(&self, qp: &Qp, blocks: &[[u64; 8]]) {
        let tail = qp.area.header.sq_tail().load(Ordering::Relaxed);
        for (i, block) in blocks.iter().enumerate() {
            qp.area.write_sq_block(tail.wrapping_add(i as u64), block);
        }
        qp.area.header.sq_tail().store(tail.wrapping_add(blocks.len() as u64), Ordering::Release);
        self.ring(qp.new.slot);
    }

    pub(crate) fn post_recv(&self, qp: &Qp, wr_id: u64, sges: &[Sge]) {
        let tail = qp.area.header.rq_tail().load(Ordering::Relaxed);
        RecvWqe::encode(wr_id, sges, |part, block| qp.area.write_rq_block(tail, part, block));
        qp.area.header.rq_tail().store(tail.wrapping_add(1), Ordering::SeqCst);
        self.ring(qp.new.slot);
    }
}

impl Qp {
    /// The next completion of the send queue.
    pub(crate) fn completion(&mut self) -> Result<Cqe> {
        let mut found = None;
        eventually("a completion", || {
            found = self.sends.pop();
            Ok(found.is_some())
        })?;
        found.context("it was found")
    }
}

pub(crate) fn create_qp(pd: u32, cq: u32, qp_type: QpType) -> CreateQp {
    let cap =
        QpCap { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 4, max_recv_sge: 4, max_inline_data: 64 };
    CreateQp { pd, send_cq: cq, recv_cq: cq, qp_type: qp_type.value(), cap, ..CreateQp::default() }
}

/// A region in the client's own memory.
pub(crate) fn reg_mr(pd: u32, offset: u64, len: u64, access: u32) -> RegMr {
    let addr = BASE + offset;
    let page = PAGE as u64;
    let (shared_start, shared_end) = (addr / page * page, (addr + len).next_multiple_of(page));
    RegMr { pd, addr, len, iova: addr, access, shared_start, shared_end }
}

/// The request that brings a QP to a state, with everything that it needs.
pub(crate) fn transition(qp: &Qp, to: QpState, (dest_qp_num, dgid): (u32, Gid), rights: u32) -> Request {
    let attr = QpAttr {
        qp_state: to.value(),
        qp_access_flags: rights,
        path_mtu: 5,
        port_num: 1,
        qkey: 0x11,
        dest_qp_num,
        ah_attr: AhAttr { dgid, is_global: 1, port_num: 1, ..AhAttr::default() },
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        min_rnr_timer: 1,
        timeout: 8,
        retry_cnt: 1,
        rnr_retry: 1,
        ..QpAttr::default()
    };
    let from = match to {
        QpState::Rtr => QpState::Init,
        QpState::Rts => QpState::Rtr,
        _ => QpState::Reset,
    };
    let required = verbs_abi::qp_state::rule(qp.qp_type, from, to).map(|rule| rule.required);
    let mask = required.unwrap_or_default().union(A::STATE).bits();
    Request::ModifyQp { qpn: qp.new.qpn, mask, attr }
}
