//! A router in this process on a socket of its own, and clients that speak the protocol without a provider.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use router::{
    config::Config,
    daemon::{Daemon, End, Stopper},
    error::DaemonError,
};
use rustix::{
    event::{EventfdFlags, eventfd},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use verbs_abi::{
    proto::{
        AhAttr, Answer, CreateQp, Endpoint, Mode, NewQp, ProtoError, QpAttr, QpCap, RegMr, Reply, Request,
        Welcome,
    },
    shm::{
        LAYOUT_VERSION, Window, arena,
        cqe::{CompletionReader, Cqe},
        doorbell::Doorbells,
        lane::LanePage,
        queue::QueueArea,
        wqe::{SendWqe, Sge, flag},
    },
    verbs::{QpAttrMask as A, QpState, QpType},
};

/// A running router.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) path: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<End, DaemonError>>>,
    _dir: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 128).unwrap();
        let daemon = Daemon::new(&config, listener).unwrap();
        let stopper = daemon.stopper().unwrap();
        let thread = Some(std::thread::spawn(move || daemon.run()));
        Self { path, stopper, thread, _dir: dir }
    }

    /// A connection that has said nothing yet.
    pub(crate) fn dial(&self) -> Endpoint {
        let socket = unconnected();
        connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        Endpoint::new(socket)
    }

    /// An opened device in isolated mode.
    pub(crate) fn open(&self) -> Client {
        Client::new(self.dial(), Mode::Isolated)
    }

    /// Waits until the router ends by itself.
    pub(crate) fn join(mut self) -> End {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    /// Whether a router still answers.
    pub(crate) fn serves(&self) -> bool {
        router::client::status(&self.path).is_ok()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                assert_eq!(ended.unwrap().unwrap(), End::Told);
            }
        }
    }
}

/// A socket that waits at most five seconds for anything.
pub(crate) fn unconnected() -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(Duration::from_secs(5))).unwrap();
    }
    socket
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).unwrap()
}

pub(crate) fn ask(endpoint: &Endpoint, request: &Request, fds: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
    endpoint.send(request, fds).unwrap();
    endpoint.recv().unwrap()
}

/// What a Hello says.
pub(crate) fn hello(mode: Mode) -> Request {
    Request::Hello { version: LAYOUT_VERSION, mode }
}

/// Whether the router has hung up, replies that were on their way left out.
pub(crate) fn is_dropped(endpoint: &Endpoint) -> bool {
    (0..100_000).any(|_| match endpoint.recv::<Reply>() {
        Ok(_) => false,
        Err(ProtoError::Closed) => true,
        Err(error) => panic!("{error}"),
    })
}

/// Waits up to five seconds for something to become true.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < Duration::from_secs(5), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// An opened device.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) endpoint: Endpoint,
    pub(crate) welcome: Welcome,
    pub(crate) arena: Window,
    pub(crate) lane: LanePage,
    /// Arena, region, lane page, doorbell.
    pub(crate) files: Vec<OwnedFd>,
    pub(crate) events: OwnedFd,
}

/// A QP with its queues, and the numbers that a provider would keep.
#[derive(Debug)]
pub(crate) struct Qp {
    pub(crate) new: NewQp,
    pub(crate) area: QueueArea,
    pub(crate) sends: CompletionReader,
    tail: u64,
}

impl Client {
    pub(crate) fn new(endpoint: Endpoint, mode: Mode) -> Self {
        let events = event();
        let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
        let (reply, files) = ask(&endpoint, &hello(mode), &[events.as_fd(), memory.as_fd()]);
        let Answer::Hello(welcome) = reply.unwrap() else { panic!("no welcome") };
        let arena = Window::map(&files[0], 0, arena::ARENA_LEN, true).unwrap();
        let lane = LanePage::new(Window::map(&files[2], 0, 4096, false).unwrap());
        Self { endpoint, welcome, arena, lane, files, events }
    }

    pub(crate) fn ask(&self, request: &Request) -> Reply {
        ask(&self.endpoint, request, &[]).0
    }

    pub(crate) fn pd(&self) -> u32 {
        match self.ask(&Request::AllocPd).unwrap() {
            Answer::Handle(pd) => pd,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn channel(&self, file: &OwnedFd) -> Reply {
        ask(&self.endpoint, &Request::CreateChannel, &[file.as_fd()]).0
    }

    pub(crate) fn cq(&self, channel: Option<u32>) -> u32 {
        match self.ask(&Request::CreateCq { cqe: 100, channel }).unwrap() {
            Answer::Cq { cq, cqe: 100, .. } => cq,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn qp(&self, pd: u32, cq: u32) -> Qp {
        match self.ask(&create_qp(pd, cq)).unwrap() {
            Answer::Qp(new) => {
                let area = QueueArea::new(&self.arena, new.offset, new.geometry).unwrap();
                let sends = CompletionReader::new(area.sq_cqes.clone(), 0);
                Qp { new, area, sends, tail: 0 }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Registers memory that was not moved.
    pub(crate) fn mr(&self, pd: u32, addr: u64, len: u64) -> u32 {
        match self.ask(&Request::RegMr(reg_mr(pd, addr, len))).unwrap() {
            Answer::Mr { key } => key,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn gid(&self) -> [u8; 16] {
        match self.ask(&Request::Gids).unwrap() {
            Answer::Gids(gids) => gids[0],
            other => panic!("{other:?}"),
        }
    }

    /// Brings a QP to RTS. Says what RTR answered.
    pub(crate) fn connect(&self, qpn: u32, peer_qpn: u32, dgid: [u8; 16]) -> Answer {
        let modify = |mask: A, attr| self.ask(&Request::ModifyQp { qpn, mask: mask.bits(), attr });
        let attr = QpAttr { qp_access_flags: 15, port_num: 1, ..state(QpState::Init) };
        modify(A::STATE | A::PKEY_INDEX | A::PORT | A::ACCESS_FLAGS, attr).unwrap();
        let ah_attr = AhAttr { dgid, is_global: 1, port_num: 1, ..AhAttr::default() };
        let attr = QpAttr {
            ah_attr,
            path_mtu: 5,
            dest_qp_num: peer_qpn,
            max_dest_rd_atomic: 1,
            ..state(QpState::Rtr)
        };
        let rtr = A::AV | A::PATH_MTU | A::DEST_QPN | A::RQ_PSN | A::MAX_DEST_RD_ATOMIC | A::MIN_RNR_TIMER;
        let answer = modify(A::STATE | rtr, attr).unwrap();
        let attr =
            QpAttr { timeout: 14, retry_cnt: 7, rnr_retry: 7, max_rd_atomic: 1, ..state(QpState::Rts) };
        let rts = A::TIMEOUT | A::RETRY_CNT | A::RNR_RETRY | A::SQ_PSN | A::MAX_QP_RD_ATOMIC;
        modify(A::STATE | rts, attr).unwrap();
        answer
    }

    /// Posts a work request and rings, as a provider does.
    pub(crate) fn post(&self, qp: &mut Qp, wqe: &SendWqe) {
        let blocks = wqe.encode(|i, block| qp.area.write_sq_block(qp.tail + i, block));
        qp.tail += blocks;
        qp.area.header.sq_tail().store(qp.tail, std::sync::atomic::Ordering::Release);
        Doorbells::new(&self.arena).unwrap().ring(qp.new.slot);
        if self.lane.is_asleep() {
            rustix::io::write(&self.files[3], &1u64.to_ne_bytes()).unwrap();
        }
    }
}

impl Qp {
    /// The next completion of the send queue.
    pub(crate) fn completion(&mut self) -> Cqe {
        let mut found = None;
        eventually("a completion", || {
            found = self.sends.pop();
            found.is_some()
        });
        found.unwrap()
    }
}

pub(crate) fn state(state: QpState) -> QpAttr {
    QpAttr { qp_state: state.value(), ..QpAttr::default() }
}

pub(crate) fn create_qp(pd: u32, cq: u32) -> Request {
    let cap =
        QpCap { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 2, max_recv_sge: 2, max_inline_data: 64 };
    let qp_type = QpType::Rc.value();
    Request::CreateQp(CreateQp {
        pd,
        send_cq: cq,
        recv_cq: cq,
        qp_type,
        cap,
        sq_sig_all: false,
        ..CreateQp::default()
    })
}

pub(crate) fn reg_mr(pd: u32, addr: u64, len: u64) -> RegMr {
    RegMr { pd, addr, len, iova: addr, access: 15, shared_start: 0, shared_end: 0 }
}

/// A signaled RDMA WRITE.
pub(crate) fn write(wr_id: u64, local: Sge, remote_addr: u64, rkey: u32) -> SendWqe {
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags) = (wr_id, flag::SIGNALED);
    (wqe.remote_addr, wqe.rkey) = (remote_addr, rkey);
    assert!(wqe.push_sge(local));
    wqe
}
