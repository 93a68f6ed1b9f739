//! Promise: what one connection asks for, however much and often, keeps no other waiting for long.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

mod bed;

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use bed::{event, hello, unconnected};
use router::{config::Config, daemon::Daemon};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv,
    socket_with,
};
use verbs_abi::proto::{Endpoint, Mode, Request};

/// A router that does nothing by itself.
struct Rig {
    daemon: Daemon,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("router.sock");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 128).unwrap();
        Self { daemon: Daemon::new(&Config::default(), listener).unwrap(), path, _directory: directory }
    }

    fn open(&mut self) -> Endpoint {
        let socket = unconnected();
        connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        let endpoint = Endpoint::new(socket);
        let events = event();
        endpoint.send(&hello(Mode::Isolated), &[events.as_fd()]).unwrap();
        let answered = (0..100).any(|_| {
            self.daemon.step().unwrap();
            replies(&endpoint) > 0
        });
        assert!(answered);
        endpoint
    }
}

/// Takes the replies that are there.
fn replies(endpoint: &Endpoint) -> usize {
    let mut byte = [0; 1];
    (0..100_000).take_while(|_| recv(endpoint, &mut byte, RecvFlags::DONTWAIT).is_ok()).count()
}

/// Sends as many requests as the socket takes.
fn flood(endpoint: &Endpoint, request: &Request) -> usize {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    fcntl_setfl(endpoint, fcntl_getfl(endpoint).unwrap() | OFlags::NONBLOCK).unwrap();
    (0..1000).take_while(|_| endpoint.send(request, &[]).is_ok()).count()
}

#[test]
fn a_request_is_answered_after_one_of_each_flooding_connection() {
    for request in [Request::Gids, Request::AllocPd, Request::Status] {
        let mut rig = Rig::new();
        let flooders: Vec<_> = (0..10).map(|_| rig.open()).collect();
        let victim = rig.open();
        let sent: usize = flooders.iter().map(|flooder| flood(flooder, &request)).sum();
        assert!(sent > 100, "{sent}");
        for round in 0..5 {
            victim.send(&Request::AllocPd, &[]).unwrap();
            rig.daemon.step().unwrap();
            assert_eq!(replies(&victim), 1, "round {round} of {request:?}");
        }
        let answered: usize = flooders.iter().map(replies).sum();
        assert!(answered <= 60, "one each and no more: {answered} of {sent}");
    }
}

#[test]
fn questions_for_the_status_are_answered_at_a_bounded_rate_and_all_at_last() {
    let mut rig = Rig::new();
    let curious = rig.open();
    let sent = flood(&curious, &Request::Status).min(100);
    let start = std::time::Instant::now();
    let mut answered = 0;
    for _ in 0..100_000 {
        rig.daemon.step().unwrap();
        answered += replies(&curious);
        // 32 at once and 50 a second, unless the machine is slow.
        let most = 33 + start.elapsed().as_millis() / 20;
        assert!(answered as u128 <= most, "{answered} of at most {most}");
        if answered >= sent {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("{answered} of {sent}");
}
