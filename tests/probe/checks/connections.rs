//! rdma_cm: events, private data, ports, options, threads, forks. No QP takes part: its number is a number here.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, ensure};
use verbs_abi::ffi::{IBV_QPS_RTR, IBV_QPS_RTS};

use crate::{
    cancel,
    cm::{Channel, ConnParam, Event, Id, errno, kind},
};

const AT_ONCE: Duration = Duration::ZERO;
/// `RDMA_OPTION_ID_TOS`, `_REUSEADDR`, `_AFONLY`, `_ACK_TIMEOUT`.
const TOS: i32 = 0;
const REUSE_ADDR: i32 = 1;
const AF_ONLY: i32 = 2;
const ACK_TIMEOUT: i32 = 3;

fn loopback(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

/// A listener at a port that was free.
fn listener(channel: &Channel) -> Result<(Id, SocketAddrV4)> {
    let id = Id::new(channel)?;
    id.bind(loopback(0))?;
    id.listen(8)?;
    let port = id.port()?;
    Ok((id, loopback(port)))
}

/// An id that asks for a connection.
fn asking(channel: &Channel, to: SocketAddrV4, data: &'static [u8]) -> Result<Id> {
    let id = Id::new(channel)?;
    id.resolve(to)?;
    channel.expect(kind::ADDR_RESOLVED)?;
    id.route()?;
    channel.expect(kind::ROUTE_RESOLVED)?;
    id.connect(ConnParam::new(data, 0x77))?;
    Ok(id)
}

pub(crate) fn private_data() -> Result<()> {
    let (server, client) = (Channel::new()?, Channel::new()?);
    let (_listener, address) = listener(&server)?;
    let active = asking(&client, address, b"who are you?")?;
    let request = server.expect(kind::CONNECT_REQUEST)?;
    ensure!(request.data.len() == 56 && request.data.starts_with(b"who are you?\0"), "{:?}", request.data);
    let conn = request.conn;
    let told = (conn.qp_num, conn.responder_resources, conn.initiator_depth, conn.retry_count);
    ensure!(told == (0x77, 2, 3, 7), "{told:?}");
    let passive = request.take_id();
    passive.accept(ConnParam::new(b"a server", 0x99))?;
    let response = client.expect(kind::CONNECT_RESPONSE)?;
    ensure!(response.data.len() == 196 && response.data.starts_with(b"a server\0"), "{:?}", response.data);
    ensure!(response.conn.qp_num == 0x99, "QP number {:#x}", response.conn.qp_num);
    active.establish()?;
    server.expect(kind::ESTABLISHED)?;
    active.disconnect()?;
    server.expect(kind::DISCONNECTED)?;
    passive.disconnect()?;
    client.expect(kind::DISCONNECTED)?;
    passive.destroy()?;
    active.destroy()
}

pub(crate) fn rejections() -> Result<()> {
    let (server, client) = (Channel::new()?, Channel::new()?);
    let (listener, address) = listener(&server)?;
    let first = asking(&client, address, b"")?;
    let request = server.expect(kind::CONNECT_REQUEST)?;
    let passive = request.take_id();
    passive.reject(b"no room")?;
    let rejected = client.expect(kind::REJECTED)?;
    ensure!(rejected.is_of(&first) && rejected.status == 28, "status {}", rejected.status);
    ensure!(rejected.data.len() == 148 && rejected.data.starts_with(b"no room\0"), "{:?}", rejected.data);
    // An end that goes without an answer has refused; a listener that goes is none.
    let second = asking(&client, address, b"")?;
    server.expect(kind::CONNECT_REQUEST)?.take_id().destroy()?;
    ensure!(client.expect(kind::REJECTED)?.is_of(&second), "another id was rejected");
    passive.destroy()?;
    listener.destroy()?;
    let third = asking(&client, address, b"")?;
    let rejected = client.expect(kind::REJECTED)?;
    ensure!(rejected.is_of(&third) && rejected.status == 8, "status {}", rejected.status);
    Ok(())
}

pub(crate) fn descriptors() -> Result<()> {
    let channel = Channel::new()?;
    channel.set_nonblocking()?;
    let refused = channel.event().map(|_| ());
    ensure!(errno(&refused) == Some(libc::EAGAIN), "{refused:?}");
    // SAFETY: makes a descriptor.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    let mut wanted = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
    // SAFETY: live descriptors, a live event.
    let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, channel.fd(), &raw mut wanted) };
    ensure!(added == 0, "an event channel cannot be put into an epoll set");
    let ready = |timeout| {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: a live descriptor, room for one event.
        unsafe { libc::epoll_wait(epoll, &raw mut event, 1, timeout) == 1 }
    };
    ensure!(!ready(0), "a channel without an event is readable");
    let id = Id::new(&channel)?;
    id.resolve(loopback(1))?;
    ensure!(ready(5000), "an event does not wake epoll");
    ensure!(channel.event()?.kind == kind::ADDR_RESOLVED, "another event");
    ensure!(!ready(0), "a channel whose event was taken is readable");
    // SAFETY: the descriptor is this function's.
    unsafe { libc::close(epoll) };
    id.destroy()
}

pub(crate) fn revoked() -> Result<()> {
    let channel = Channel::new()?;
    let (first, second) = (Id::new(&channel)?, Id::new(&channel)?);
    first.resolve(loopback(1))?;
    second.resolve(loopback(1))?;
    // Its event was not taken, so there is nothing to wait for and nothing to read any more.
    first.destroy()?;
    ensure!(channel.expect(kind::ADDR_RESOLVED)?.is_of(&second), "the event is another id's");
    ensure!(!channel.is_readable(AT_ONCE), "the event of a destroyed id is still there");
    // Requests that nobody took go with their listener.
    let (listener, address) = listener(&channel)?;
    let client = Channel::new()?;
    let asking: Vec<Id> = (0..3).map(|_| asking(&client, address, b"")).collect::<Result<_>>()?;
    ensure!(channel.is_readable(Duration::from_secs(5)), "no request came");
    listener.destroy()?;
    ensure!(!channel.is_readable(AT_ONCE), "a request outlived its listener");
    for _ in &asking {
        client.expect(kind::REJECTED)?;
    }
    second.destroy()
}

pub(crate) fn acknowledged() -> Result<()> {
    let channel = Channel::new()?;
    let id = Id::new(&channel)?;
    id.resolve(loopback(1))?;
    let event = channel.unacknowledged()?;
    let destroyed = AtomicUsize::new(0);
    thread::scope(|scope| {
        let destroyer = scope.spawn(|| {
            let result = id.destroy();
            destroyed.store(1, Ordering::SeqCst);
            result
        });
        thread::sleep(Duration::from_millis(100));
        ensure!(destroyed.load(Ordering::SeqCst) == 0, "an id went before its event was acknowledged");
        event.acknowledge()?;
        destroyer.join().unwrap_or_else(|_| Err(anyhow!("the thread panicked")))
    })
}

pub(crate) fn migration() -> Result<()> {
    let (old, new) = (Channel::new()?, Channel::new()?);
    let id = Id::new(&old)?;
    id.resolve(loopback(1))?;
    id.migrate(&new)?;
    ensure!(!old.is_readable(AT_ONCE), "the old channel has the event still");
    ensure!(new.expect(kind::ADDR_RESOLVED)?.is_of(&id), "another id's event");
    id.route()?;
    new.expect(kind::ROUTE_RESOLVED)?;
    drop(old);
    id.destroy()
}

pub(crate) fn ports() -> Result<()> {
    let channel = Channel::new()?;
    let ids: Vec<Id> = (0..4).map(|_| Id::new(&channel)).collect::<Result<_>>()?;
    let [a, b, c, d] = &ids[..] else { return Err(anyhow!("four ids")) };
    a.bind(loopback(0))?;
    let port = a.port()?;
    ensure!(port >= 32_768, "the ephemeral port {port}");
    ensure!(errno(&b.bind(loopback(port))) == Some(libc::EADDRINUSE), "a port was given twice");
    let wildcard = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    ensure!(errno(&b.bind(wildcard)) == Some(libc::EADDRNOTAVAIL), "the wildcard took a port in use");
    let foreign = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 0);
    ensure!(errno(&b.bind(foreign)) == Some(libc::EADDRNOTAVAIL), "a foreign address was bound");
    b.bind(loopback(0))?;
    ensure!(b.port()? != port, "one ephemeral port for two");
    for id in [c, d] {
        id.set_option(REUSE_ADDR, 1_i32)?;
    }
    c.bind(loopback(0))?;
    d.bind(loopback(c.port()?))?;
    ensure!(errno(&c.listen(1)) == Some(libc::EADDRINUSE), "one of two who share a port listens");
    Ok(())
}

pub(crate) fn options() -> Result<()> {
    let channel = Channel::new()?;
    let id = Id::new(&channel)?;
    id.set_option(TOS, 32_u8)?;
    id.set_option(AF_ONLY, 1_i32)?;
    id.set_option(ACK_TIMEOUT, 20_u8)?;
    ensure!(errno(&id.set_option(TOS, 32_u32)) == Some(libc::EINVAL), "a TOS of four bytes");
    ensure!(errno(&id.set_option(99, 1_i32)) == Some(libc::ENOSYS), "an option that is none");
    late_options()
}

/// What an event told of an id is no longer true after an option was set.
fn late_options() -> Result<()> {
    let (server, client) = (Channel::new()?, Channel::new()?);
    let (_listener, address) = listener(&server)?;
    let active = asking(&client, address, b"")?;
    let passive = server.expect(kind::CONNECT_REQUEST)?.take_id();
    passive.accept(ConnParam::new(b"", 0x99))?;
    client.expect(kind::CONNECT_RESPONSE)?;
    for (end, timeout, peer) in [(&active, 21_u8, 0x99), (&passive, 22, 0x77)] {
        ensure!(end.qp_attr(IBV_QPS_RTR)?.dest_qp_num == peer, "another peer than {peer:#x}");
        end.qp_attr(IBV_QPS_RTS)?;
        end.set_option(ACK_TIMEOUT, timeout)?;
        let told = end.qp_attr(IBV_QPS_RTS)?.timeout;
        ensure!(told == timeout, "the ACK timeout is {told} instead of {timeout}");
    }
    Ok(())
}

/// The channel goes on: another thread gets the next event.
pub(crate) fn cancelled() -> Result<()> {
    let channel = Channel::new()?;
    cancel::while_it_waits(&channel.wait()?)?;
    let id = Id::new(&channel)?;
    id.resolve(loopback(1))?;
    channel.expect(kind::ADDR_RESOLVED)?;
    id.destroy()
}

pub(crate) fn forked_child() -> Result<()> {
    let channel = Channel::new()?;
    let id = Id::new(&channel)?;
    id.resolve(loopback(1))?;
    // SAFETY: the child makes calls that must fail, and exits.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let dead = errno(&id.listen(1)) == Some(libc::ENODEV)
            && errno(&channel.event().map(|_| ())) == Some(libc::ENODEV)
            && errno(&Id::new(&channel).map(std::mem::forget)) == Some(libc::ENODEV);
        // Closing the copy must not close the parent's.
        drop(channel);
        // A channel of its own works.
        let own = Channel::new().and_then(|channel| {
            let id = Id::new(&channel)?;
            id.resolve(loopback(1))?;
            channel.expect(kind::ADDR_RESOLVED).map(|_| ())
        });
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(if dead { i32::from(own.is_err()) * 4 } else { 3 }) };
    }
    let mut status = 0;
    // SAFETY: the child is ours and was not waited for.
    ensure!(unsafe { libc::waitpid(child, &mut status, 0) } == child, "waitpid");
    ensure!(
        status == 0,
        "the child used its parent's channel, or had none of its own: wait status {status:#x}"
    );
    channel.expect(kind::ADDR_RESOLVED)?;
    id.route()?;
    channel.expect(kind::ROUTE_RESOLVED)?;
    id.destroy()
}

pub(crate) fn threads() -> Result<()> {
    const THREADS: usize = 4;
    const ROUNDS: usize = 50;
    let (server, client) = (Channel::new()?, Channel::new()?);
    let (listener, address) = listener(&server)?;
    server.set_nonblocking()?;
    let rejected = AtomicUsize::new(0);
    let total = THREADS * ROUNDS;
    thread::scope(|scope| {
        let mut threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while rejected.load(Ordering::SeqCst) < total {
                        match server.event() {
                            Ok(request) => answer(&request, &rejected)?,
                            refused => {
                                ensure!(errno(&refused) == Some(libc::EAGAIN), "no event came");
                                server.is_readable(Duration::from_millis(20));
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        threads.push(scope.spawn(|| {
            for _ in 0..total {
                let id = asking(&client, address, b"")?;
                client.expect(kind::REJECTED)?;
                id.destroy()?;
            }
            Ok(())
        }));
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
    })?;
    listener.destroy()
}

fn answer(request: &Event, count: &AtomicUsize) -> Result<()> {
    ensure!(request.kind == kind::CONNECT_REQUEST, "event {}", request.kind);
    let id = request.take_id();
    id.reject(b"")?;
    count.fetch_add(1, Ordering::SeqCst);
    id.destroy()
}
