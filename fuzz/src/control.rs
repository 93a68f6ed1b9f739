//! Any messages with any descriptors, over real sockets, to a router without threads. Whatever they are, it answers
//! or hangs up, lets nobody at another's QP, and serves a bystander as ever.

mod request;

use std::{
    cell::RefCell,
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use router::{config::Config, daemon::Daemon};
use rustix::{
    event::{EventfdFlags, eventfd},
    net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, send,
        socket_with,
    },
    pipe::pipe,
};
use verbs_abi::{
    proto::{Answer, Endpoint, MAX_FDS, MAX_MESSAGE, Mode, ProtoError, Reply, Request, cm::CmRequest},
    shm::LAYOUT_VERSION,
};

use crate::Input;
use request::Handles;

/// Connections at a time.
const CONNECTIONS: usize = 4;
/// Steps of one input; what lies behind them is not read.
const STEPS: usize = 100;
/// Looks after which the router must have done whatever it does at once. A reply that waits for a direct peer, which
/// is never at work here, needs none more.
const LOOKS: usize = 20;

thread_local! {
    /// Made once: what the kernel takes for a router's start would take most of the time.
    static RIG: RefCell<Rig> = RefCell::new(Rig::new());
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    RIG.with_borrow_mut(|rig| rig.run(&mut Input::new(bytes)));
}

/// A router, and files that clients send.
struct Rig {
    daemon: Daemon,
    path: std::path::PathBuf,
    files: Vec<OwnedFd>,
    _directory: tempfile::TempDir,
}

/// A client's end.
struct Connection {
    endpoint: Endpoint,
    /// Requests that were sent whole and not answered; nobody knows any more once something else was sent.
    unanswered: Option<Vec<Request>>,
    /// QP numbers that are its own.
    qps: Vec<u32>,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("router.sock");
        let listener = plain_socket();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 128).unwrap();
        let mut config = Config::default();
        // Small enough for a fuzzer to meet them.
        (config.limits.qps, config.limits.cqs, config.limits.mrs) = (4, 4, 4);
        let daemon = Daemon::new(&config, listener).unwrap();
        let (read, write) = pipe().unwrap();
        let mut files = vec![event(), File::open("/dev/null").unwrap().into(), read, write, plain_socket()];
        files.push(tempfile::tempfile().unwrap().into());
        Self { daemon, path, files, _directory: directory }
    }

    fn run(&mut self, input: &mut Input<'_>) {
        let mut handles = Handles::default();
        let mut bystander = self.dial();
        self.greet(&mut bystander, &mut handles);
        let mut others: [Option<Connection>; CONNECTIONS] = Default::default();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let at = input.below(CONNECTIONS);
            self.step(&mut others[at], &mut handles, input);
        }
        self.look();
        let sent = bystander.send(&Request::AllocPd, &[]);
        assert!(sent, "a bystander was dropped");
        self.look();
        assert!(
            bystander.take(&mut handles, false) && bystander.unanswered == Some(Vec::new()),
            "a bystander is not served"
        );
        drop((bystander, others));
        let left = (0..LOOKS).map(|_| self.daemon.step().unwrap()).last();
        assert_eq!(left, Some(0), "connections that are closed");
    }

    fn step(&mut self, slot: &mut Option<Connection>, handles: &mut Handles, input: &mut Input<'_>) {
        let Some(connection) = slot else {
            let mut connection = self.dial();
            match input.u8() {
                0..=119 => self.greet(&mut connection, handles),
                120..=219 => self.greet_manager(&mut connection, handles),
                _ => {}
            }
            *slot = Some(connection);
            return;
        };
        let alive = match input.u8() % 16 {
            0 => false,
            1 => {
                self.raw(connection, input);
                true
            }
            2 => {
                self.bent(connection, handles, input);
                true
            }
            3 => connection.take(handles, true),
            4 => {
                self.daemon.step().unwrap();
                true
            }
            _ => self.ask(connection, handles, input),
        };
        if !alive {
            *slot = None;
        }
    }

    /// A whole request, with the descriptors that it should have, or others.
    fn ask(&mut self, connection: &mut Connection, handles: &mut Handles, input: &mut Input<'_>) -> bool {
        let request = handles.request(input);
        let fds = match (input.u8(), &request) {
            (
                0..=239,
                Request::Hello { .. } | Request::CreateChannel | Request::Cm(CmRequest::OpenChannel),
            ) => vec![self.files[0].as_fd()],
            (0..=239, _) => Vec::new(),
            _ => self.some_files(input),
        };
        let sent = connection.send(&request, &fds);
        self.look();
        sent && connection.take(handles, true)
    }

    /// Bytes as they come.
    fn raw(&mut self, connection: &mut Connection, input: &mut Input<'_>) {
        let len = usize::from(input.u8()) * usize::from(input.u8() % 4 + 1);
        let mut bytes = input.bytes(len).to_vec();
        if input.u8() == 0 {
            bytes.resize(MAX_MESSAGE + usize::from(input.u8() & 1), input.u8());
        }
        let _ = send(&connection.endpoint, &bytes, SendFlags::NOSIGNAL);
        connection.unanswered = None;
        self.look();
    }

    /// A request with some bytes changed, taken away or added.
    fn bent(&mut self, connection: &mut Connection, handles: &Handles, input: &mut Input<'_>) {
        let mut bytes = request::encoded(&handles.request(input));
        for _ in 0..input.below(4) {
            let at = input.below(bytes.len());
            bytes[at] ^= input.u8();
        }
        match input.u8() & 3 {
            0 => bytes.truncate(input.below(bytes.len() + 1)),
            1 => bytes.push(input.u8()),
            _ => {}
        }
        let _ = send(&connection.endpoint, &bytes, SendFlags::NOSIGNAL);
        connection.unanswered = None;
        self.look();
    }

    fn some_files(&self, input: &mut Input<'_>) -> Vec<std::os::fd::BorrowedFd<'_>> {
        let count = input.below(MAX_FDS + 1);
        (0..count).map(|_| self.files[input.below(self.files.len())].as_fd()).collect()
    }

    fn greet(&mut self, connection: &mut Connection, handles: &mut Handles) {
        let hello = Request::Hello { version: LAYOUT_VERSION, mode: Mode::Direct };
        assert!(connection.send(&hello, &[self.files[0].as_fd()]));
        self.look();
        assert!(connection.take(handles, false), "a client that keeps the rules was dropped");
    }

    fn greet_manager(&mut self, connection: &mut Connection, handles: &mut Handles) {
        let (hello, open) =
            (Request::CmHello { version: LAYOUT_VERSION }, Request::Cm(CmRequest::OpenChannel));
        assert!(connection.send(&hello, &[]));
        self.look();
        assert!(connection.send(&open, &[self.files[0].as_fd()]));
        self.look();
        assert!(connection.take(handles, false), "a client that keeps the rules was dropped");
    }

    fn dial(&mut self) -> Connection {
        let socket = plain_socket();
        connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        self.look();
        Connection { endpoint: Endpoint::new(socket), unanswered: Some(Vec::new()), qps: Vec::new() }
    }

    fn look(&mut self) {
        for _ in 0..3 {
            self.daemon.step().unwrap();
        }
    }
}

impl Connection {
    /// False: the router hung up.
    fn send(&mut self, request: &Request, fds: &[std::os::fd::BorrowedFd<'_>]) -> bool {
        self.unanswered.iter_mut().for_each(|row| row.push(request.clone()));
        self.endpoint.send(request, fds).is_ok()
    }

    /// Takes the replies that are there. False: the router hung up. `foreign`: others' QPs may be known.
    fn take(&mut self, handles: &mut Handles, foreign: bool) -> bool {
        loop {
            match self.endpoint.recv::<Reply>() {
                Ok((reply, _)) => {
                    let row = self.unanswered.as_mut().filter(|row| !row.is_empty());
                    let asked = row.map(|row| row.remove(0));
                    self.heard(asked.as_ref(), &reply, handles, foreign);
                }
                Err(ProtoError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Err(ProtoError::Closed) => return false,
                Err(error) => panic!("what the router sent: {error}"),
            }
        }
    }

    fn heard(&mut self, asked: Option<&Request>, reply: &Reply, handles: &mut Handles, foreign: bool) {
        let Ok(answer) = reply else { return };
        if let Answer::Qp(new) = answer {
            self.qps.push(new.qpn);
        }
        handles.learn(answer);
        let (Request::QueryQp { qpn } | Request::DestroyQp { qpn } | Request::ModifyQp { qpn, .. }) =
            (match asked {
                Some(request) => request,
                None => return,
            })
        else {
            return;
        };
        assert!(!foreign || self.qps.contains(qpn), "another's QP {qpn:#x} answered {answer:?}");
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).unwrap()
}

fn plain_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}
