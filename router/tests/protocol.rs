//! Promises of the router to its clients, and against them: the protocol spoken directly.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

mod bed;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
    time::Duration,
};

use bed::{
    Bed, Client, ask, create_qp, event, eventually, hello, is_dropped, reg_mr, state, unconnected, write,
};
use router::{client, config::Config, daemon::End};
use rustix::net::{SendFlags, SocketAddrUnix, connect};
use verbs_abi::{
    proto::{Answer, Endpoint, MAX_FDS, MAX_MESSAGE, Mode, QpCap, RegMr, Request},
    shm::{Window, arena, wqe::Sge},
    verbs::{QpAttrMask, QpState, WcStatus},
};

const EINVAL: i32 = libc::EINVAL;
const EBUSY: i32 = libc::EBUSY;

/// A connection that is another process's, which does nothing.
fn sleeper(bed: &Bed) -> (Child, Endpoint) {
    let socket = unconnected();
    let address = SocketAddrUnix::new(&bed.path).unwrap();
    let raw = socket.as_raw_fd();
    let mut command = Command::new("sleep");
    command.arg("60");
    // SAFETY: the closure makes one system call on a descriptor that the child has inherited.
    unsafe {
        command.pre_exec(move || {
            let socket = std::os::fd::BorrowedFd::borrow_raw(raw);
            connect(socket, &address).map_err(io::Error::from)
        });
    }
    (command.spawn().unwrap(), Endpoint::new(socket))
}

fn modify(qpn: u32, to: QpState) -> Request {
    Request::ModifyQp { qpn, mask: QpAttrMask::STATE.bits(), attr: state(to) }
}

#[test]
fn hello_gives_a_known_arena_and_files_of_fixed_size() {
    let bed = Bed::new();
    let client = bed.open();
    assert!(arena::is_known(&client.arena));
    assert_eq!(client.files.len(), 4);
    for (file, len) in client.files.iter().zip([arena::ARENA_LEN as u64, arena::REGION_LEN, 4096]) {
        assert_eq!(rustix::fs::fstat(file).unwrap().st_size as u64, len);
        assert!(rustix::fs::ftruncate(file, 0).is_err() && rustix::fs::ftruncate(file, len + 4096).is_err());
    }
    assert!(
        Window::map(&client.files[2], 0, 4096, true).is_err(),
        "the lane page is not the client's to write"
    );
    assert!(client.welcome.limits.max_qp > 0 && client.welcome.cores > 0);
    assert_eq!(client.welcome.mode, Mode::Isolated);
}

#[test]
fn objects_are_made_used_and_destroyed_in_order_only() {
    let bed = Bed::new();
    let client = bed.open();
    let pd = client.pd();
    let cq = client.cq(None);
    let qp = client.qp(pd, cq).new.qpn;
    let key = client.mr(pd, 0x10_000, 100);
    assert_eq!(client.ask(&Request::DeallocPd { pd }), Err(EBUSY));
    assert_eq!(client.ask(&Request::DestroyCq { cq }), Err(EBUSY));
    assert!(
        matches!(client.ask(&Request::QueryQp { qpn: qp }), Ok(Answer::Attr(attr)) if attr.qp_state == 0)
    );
    assert_eq!(client.ask(&modify(qp, QpState::Rts)), Err(EINVAL));
    assert_eq!(client.ask(&modify(qp, QpState::Err)), Ok(Answer::Done));
    assert_eq!(client.ask(&modify(qp, QpState::Reset)), Ok(Answer::Done));
    for request in [
        Request::DestroyQp { qpn: qp },
        Request::DeregMr { key },
        Request::DestroyCq { cq },
        Request::DeallocPd { pd },
    ] {
        assert_eq!(client.ask(&request), Ok(Answer::Done), "{request:?}");
        assert_eq!(client.ask(&request), Err(EINVAL), "a second time: {request:?}");
    }
}

#[test]
fn a_channel_stays_while_a_cq_uses_it() {
    let bed = Bed::new();
    let client = bed.open();
    let Ok(Answer::Handle(channel)) = client.channel(&event()) else { panic!() };
    let cq = client.cq(Some(channel));
    assert_eq!(client.ask(&Request::DestroyChannel { channel }), Err(EBUSY));
    assert_eq!(client.ask(&Request::DestroyCq { cq }), Ok(Answer::Done));
    assert_eq!(client.ask(&Request::DestroyChannel { channel }), Ok(Answer::Done));
    assert_eq!(client.ask(&Request::DestroyChannel { channel }), Err(EINVAL));
    assert_eq!(client.ask(&Request::CreateCq { cqe: 1, channel: Some(channel) }), Err(EINVAL));
}

#[test]
fn handles_of_another_client_are_unknown() {
    let bed = Bed::new();
    let (owner, thief) = (bed.open(), bed.open());
    let pd = owner.pd();
    let Ok(Answer::Handle(channel)) = owner.channel(&event()) else { panic!() };
    let cq = owner.cq(Some(channel));
    let qpn = owner.qp(pd, cq).new.qpn;
    let key = owner.mr(pd, 0x10_000, 100);
    for request in [
        Request::DeallocPd { pd },
        Request::DestroyChannel { channel },
        Request::DestroyCq { cq },
        Request::CreateCq { cqe: 1, channel: Some(channel) },
        Request::DeregMr { key },
        Request::RegMr(reg_mr(pd, 0x10_000, 100)),
        create_qp(pd, cq),
        Request::QueryQp { qpn },
        modify(qpn, QpState::Err),
        Request::DestroyQp { qpn },
    ] {
        assert_eq!(thief.ask(&request), Err(EINVAL), "{request:?}");
    }
    assert!(owner.ask(&Request::QueryQp { qpn }).is_ok());
}

#[test]
fn wrong_values_are_refused() {
    let bed = Bed::new();
    let client = bed.open();
    let (pd, cq) = (client.pd(), client.cq(None));
    assert_eq!(client.ask(&Request::CreateCq { cqe: 0, channel: None }), Err(EINVAL));
    assert_eq!(client.ask(&Request::CreateCq { cqe: u32::MAX, channel: None }), Err(EINVAL));
    let Request::CreateQp(create) = create_qp(pd, cq) else { panic!() };
    let huge = QpCap { max_send_wr: u32::MAX, ..create.cap };
    for create in [
        verbs_abi::proto::CreateQp { cap: huge, ..create },
        verbs_abi::proto::CreateQp { qp_type: 77, ..create },
        verbs_abi::proto::CreateQp { recv_cq: 999, ..create },
    ] {
        assert_eq!(client.ask(&Request::CreateQp(create)), Err(EINVAL));
    }
    for reg in [
        RegMr { len: u64::MAX, ..reg_mr(pd, 4096, 1) },
        RegMr { shared_end: arena::REGION_LEN, ..reg_mr(pd, 4096, 1) },
        RegMr { access: 2, ..reg_mr(pd, 4096, 1) },
    ] {
        assert_eq!(client.ask(&Request::RegMr(reg)), Err(EINVAL));
    }
}

#[test]
fn quotas_hold_and_what_is_given_back_counts_no_more() {
    let mut config = Config::default();
    config.limits.qps = 2;
    config.limits.cqs = 2;
    config.limits.mrs = 2;
    config.limits.memory = 10_000;
    let bed = Bed::with(config);
    let client = bed.open();
    let pd = client.pd();
    let (cq, _) = (client.cq(None), client.cq(None));
    let full = Err(libc::ENOMEM);
    assert_eq!(client.ask(&Request::CreateCq { cqe: 1, channel: None }), full);
    let qpn = client.qp(pd, cq).new.qpn;
    client.qp(pd, cq);
    assert_eq!(client.ask(&create_qp(pd, cq)), full);
    assert_eq!(client.ask(&Request::DestroyQp { qpn }), Ok(Answer::Done));
    client.qp(pd, cq);
    let key = client.mr(pd, 4096, 9_000);
    assert_eq!(client.ask(&Request::RegMr(reg_mr(pd, 4096, 2_000))), full);
    client.mr(pd, 4096, 1_000);
    assert_eq!(client.ask(&Request::DeregMr { key }), Ok(Answer::Done));
    client.mr(pd, 4096, 9_000);
    assert_eq!(client.ask(&Request::RegMr(reg_mr(pd, 4096, 0))), Err(EINVAL));
    assert_eq!(client.ask(&Request::RegMr(reg_mr(pd, 4096, 1))), full);
}

#[test]
fn a_router_serves_no_more_clients_than_it_was_told_to() {
    let mut config = Config::default();
    config.limits.clients = 1;
    let bed = Bed::with(config);
    let first = bed.open();
    let second = bed.dial();
    let events = event();
    assert_eq!(ask(&second, &hello(Mode::Isolated), &[events.as_fd()]).0, Err(libc::EUSERS));
    drop(first);
    eventually("the place is free", || ask(&second, &hello(Mode::Isolated), &[events.as_fd()]).0.is_ok());
}

#[test]
fn whoever_breaks_the_protocol_is_dropped_and_nobody_else() {
    let bed = Bed::new();
    let bystander = bed.open();
    let file = event();
    let send = |request: &Request, count: usize| {
        let endpoint = bed.dial();
        endpoint.send(request, &vec![file.as_fd(); count]).unwrap();
        is_dropped(&endpoint)
    };
    assert!(send(&Request::AllocPd, 0), "a request before Hello");
    assert!(send(&hello(Mode::Isolated), 0), "no descriptor");
    assert!(send(&hello(Mode::Isolated), 3), "a descriptor too many");
    assert!(send(&Request::Status, MAX_FDS), "descriptors with a request that has none");
    for bytes in [vec![0xff; 40], vec![0; MAX_MESSAGE + 1], vec![7; MAX_MESSAGE]] {
        let endpoint = bed.dial();
        rustix::net::send(&endpoint, &bytes, SendFlags::empty()).unwrap();
        assert!(is_dropped(&endpoint), "{} bytes of nonsense", bytes.len());
    }
    let twice = bed.open();
    twice.endpoint.send(&hello(Mode::Isolated), &[file.as_fd()]).unwrap();
    assert!(is_dropped(&twice.endpoint), "a second Hello");
    assert!(bystander.ask(&Request::AllocPd).is_ok());
}

#[test]
fn descriptors_must_be_what_they_are_said_to_be() {
    let bed = Bed::new();
    let null = OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    let endpoint = bed.dial();
    for wrong in [&null, &pipe] {
        assert_eq!(ask(&endpoint, &hello(Mode::Isolated), &[wrong.as_fd()]).0, Err(libc::EBADF));
    }
    let events = event();
    // What is no process's memory is not used; the rest works.
    let (reply, _) = ask(&endpoint, &hello(Mode::Isolated), &[events.as_fd(), null.as_fd()]);
    assert!(matches!(reply, Ok(Answer::Hello(_))));
    assert_eq!(ask(&endpoint, &Request::CreateChannel, &[pipe.as_fd()]).0, Err(libc::EBADF));
    assert!(matches!(ask(&endpoint, &Request::CreateChannel, &[events.as_fd()]).0, Ok(Answer::Handle(_))));
}

#[test]
fn another_version_is_told_so() {
    let bed = Bed::new();
    let endpoint = bed.dial();
    let events = event();
    let request = Request::Hello { version: 999, mode: Mode::Isolated };
    assert_eq!(ask(&endpoint, &request, &[events.as_fd()]).0, Err(libc::EPROTONOSUPPORT));
}

#[test]
fn a_client_may_close_at_any_point() {
    let bed = Bed::new();
    for steps in 0..8 {
        let endpoint = bed.dial();
        if steps == 0 {
            continue;
        }
        if steps == 1 {
            // Gone before the answer.
            let events = event();
            endpoint.send(&hello(Mode::Isolated), &[events.as_fd()]).unwrap();
            continue;
        }
        let client = Client::new(endpoint, Mode::Isolated);
        let pd = if steps > 2 { client.pd() } else { 0 };
        let cq = if steps > 3 { client.cq(None) } else { 0 };
        let qp = (steps > 4).then(|| client.qp(pd, cq));
        if let (Some(qp), true) = (&qp, steps > 5) {
            client.connect(qp.new.qpn, qp.new.qpn, client.gid());
        }
        if steps > 6 {
            client.endpoint.send(&Request::DestroyQp { qpn: qp.unwrap().new.qpn }, &[]).unwrap();
        }
    }
    eventually("all are gone", || client::status(&bed.path).unwrap().clients.is_empty());
}

#[test]
fn a_client_that_reads_no_replies_is_dropped() {
    let bed = Bed::new();
    let deaf = bed.open();
    // Send until the router has hung up: its replies have nowhere to go.
    let hung_up = (0..200_000).any(|_| deaf.endpoint.send(&Request::Gids, &[]).is_err());
    assert!(hung_up);
    assert!(bed.serves());
}

#[test]
fn bytes_written_by_one_client_arrive_at_the_other() {
    let bed = Bed::new();
    let (a, b) = (bed.open(), bed.open());
    let (pd_a, pd_b) = (a.pd(), b.pd());
    let channel = event();
    let Ok(Answer::Handle(id)) = a.channel(&channel) else { panic!() };
    let mut qp_a = a.qp(pd_a, a.cq(Some(id)));
    let qp_b = b.qp(pd_b, b.cq(None));
    a.connect(qp_a.new.qpn, qp_b.new.qpn, b.gid());
    b.connect(qp_b.new.qpn, qp_a.new.qpn, a.gid());
    let source = vec![7u8; 100_000];
    let target = vec![0u8; 100_000];
    let (from, to) = (source.as_ptr().addr() as u64, target.as_ptr().addr() as u64);
    let (lkey, rkey) = (a.mr(pd_a, from, 100_000), b.mr(pd_b, to, 100_000));
    let sge = Sge { addr: from, length: 100_000, lkey };
    a.post(&mut qp_a, &write(42, sge, to, rkey));
    let done = qp_a.completion();
    assert_eq!((done.wr_id, done.status), (42, 0));
    // Volatile, for another thread wrote it by way of the kernel.
    // SAFETY: the vector lives until after this loop.
    assert!((0..target.len()).all(|i| unsafe { target.as_ptr().add(i).read_volatile() } == 7));

    assert_eq!(b.ask(&Request::DeregMr { key: rkey }), Ok(Answer::Done));
    a.post(&mut qp_a, &write(43, sge, to, rkey));
    let refused = qp_a.completion();
    assert_eq!((refused.wr_id, u32::from(refused.status)), (43, WcStatus::RemAccessErr.value()));
    let (status, numbers) = (client::status(&bed.path).unwrap(), [qp_a.new.qpn, qp_b.new.qpn]);
    assert_eq!(status.qps.iter().map(|qp| qp.qpn).collect::<Vec<_>>(), numbers);
    assert_eq!((status.qps[0].state.as_str(), status.qps[0].peer_qpn), ("ERR", Some(numbers[1])));
    assert_eq!(status.clients[0].counters.tx_bytes, 100_000);
    assert_eq!((status.clients[0].pid, status.clients[0].mrs), (std::process::id(), 1));
}

#[test]
fn memory_in_the_region_is_reached_at_its_address() {
    let bed = Bed::new();
    let client = bed.open();
    let pd = client.pd();
    let mut qp = client.qp(pd, client.cq(None));
    client.connect(qp.new.qpn, qp.new.qpn, client.gid());
    // Addresses at which this process has nothing: only the region can be meant.
    let addr = 0x7000_0000_0000u64;
    let region = Window::map(&client.files[1], addr, 1 << 20, true).unwrap();
    region.u64(0).store(0x1234_5678, std::sync::atomic::Ordering::SeqCst);
    let reg = RegMr { shared_start: addr, shared_end: addr + (1 << 20), ..reg_mr(pd, addr, 1 << 20) };
    let Ok(Answer::Mr { key }) = client.ask(&Request::RegMr(reg)) else { panic!() };
    let sge = Sge { addr, length: 8, lkey: key };
    client.post(&mut qp, &write(1, sge, addr + 8192, key));
    assert_eq!(qp.completion().status, 0);
    assert_eq!(region.u64(8192).load(std::sync::atomic::Ordering::SeqCst), 0x1234_5678);
}

#[test]
fn a_direct_pair_is_introduced_and_taken_apart() {
    let bed = Bed::new();
    // A peer that makes progress would be waited for.
    let (mut process, endpoint) = sleeper(&bed);
    let (a, b) = (Client::new(bed.dial(), Mode::Direct), Client::new(endpoint, Mode::Direct));
    let (pd_a, pd_b) = (a.pd(), b.pd());
    let channel = event();
    let Ok(Answer::Handle(id)) = b.channel(&channel) else { panic!() };
    let (qp_a, qp_b) = (a.qp(pd_a, a.cq(None)), b.qp(pd_b, b.cq(Some(id))));
    let Answer::Direct(peer) = a.connect(qp_a.new.qpn, qp_b.new.qpn, b.gid()) else { panic!("not direct") };
    assert_eq!((peer.client, peer.qpn, peer.offset), (b.welcome.client, qp_b.new.qpn, qp_b.new.offset));
    // B stops in the middle of something for good: who waits for it is put off, but not for ever.
    let Answer::Direct(_) = b.connect(qp_b.new.qpn, qp_a.new.qpn, a.gid()) else { panic!("not direct") };
    assert!(qp_b.area.header.seat().enter(false));
    let key = a.mr(pd_a, 4096, 4096);
    for request in [
        Request::DeregMr { key },
        modify(qp_a.new.qpn, QpState::Err),
        Request::DestroyQp { qpn: qp_a.new.qpn },
    ] {
        a.endpoint.send(&request, &[]).unwrap();
        assert!(bed.open().ask(&Request::AllocPd).is_ok(), "others are served meanwhile");
        assert_eq!(a.endpoint.recv::<verbs_abi::proto::Reply>().unwrap().0, Ok(Answer::Done), "{request:?}");
    }
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn the_end_of_a_process_ends_its_device_though_others_hold_the_connection() {
    let bed = Bed::new();
    let (mut process, endpoint) = sleeper(&bed);
    let client = Client::new(endpoint, Mode::Isolated);
    let status = client::status(&bed.path).unwrap();
    assert_eq!((status.clients[0].pid, status.clients[0].comm.as_str()), (process.id(), "sleep"));
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(is_dropped(&client.endpoint));
}

#[test]
fn a_router_without_connections_ends_and_a_silent_connection_keeps_it() {
    let bed = Bed::with(Config { idle_exit: Some(1), ..Config::default() });
    let silent = bed.dial();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(bed.serves());
    drop(silent);
    assert_eq!(bed.join(), End::Idle);
}
