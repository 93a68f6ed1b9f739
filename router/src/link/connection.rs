//! One TCP connection to a router of another host: bytes in, bytes out, never waiting.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt},
};

use super::writer::Writer;

/// Bytes that are read at a time.
const INPUT: usize = 256 * 1024;
/// How long what was sent may stay unacknowledged by the peer's kernel before the peer counts as gone.
const SILENCE: Duration = Duration::from_secs(10);

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The kernel connects.
    Connecting,
    /// The peer has not said who it is.
    Greeting,
    /// Packets travel.
    Up,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Arc<TcpStream>,
    pub(super) writer: Arc<Mutex<Writer>>,
    /// Whether TLS says who is at the other end.
    pub(super) is_secure: bool,
    pub(super) stage: Stage,
    /// The peer, once it is known.
    pub(super) peer: Option<u32>,
    /// Whether this router made it.
    pub(super) dialed: bool,
    pub(super) since: Instant,
    input: Vec<u8>,
    filled: usize,
    /// Whether it is waited for that it takes more.
    pub(super) waits_for_room: bool,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// Something, and there may be more.
    More,
    /// Nothing more for now.
    Dry,
}

impl Connection {
    /// Begins to connect.
    pub(super) fn dial(
        peer: u32,
        address: SocketAddr,
        hello: Vec<u8>,
        tls: Option<rustls::Connection>,
    ) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let mut connection = Self::new(TcpStream::from(socket), Stage::Connecting, hello, tls)?;
        (connection.peer, connection.dialed) = (Some(peer), true);
        Ok(connection)
    }

    /// One that was accepted.
    pub(super) fn accepted(
        stream: TcpStream,
        hello: Vec<u8>,
        tls: Option<rustls::Connection>,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Self::new(stream, Stage::Greeting, hello, tls)
    }

    fn new(
        stream: TcpStream,
        stage: Stage,
        hello: Vec<u8>,
        tls: Option<rustls::Connection>,
    ) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, SILENCE / 2)?;
        sockopt::set_tcp_keepintvl(&stream, SILENCE / 10)?;
        sockopt::set_tcp_keepcnt(&stream, 5)?;
        sockopt::set_tcp_user_timeout(&stream, SILENCE.as_millis() as u32)?;
        let stream = Arc::new(stream);
        let is_secure = tls.is_some();
        Ok(Self {
            is_secure,
            writer: Arc::new(Mutex::new(Writer::new(Arc::clone(&stream), hello, tls))),
            stream,
            stage,
            peer: None,
            dialed: false,
            since: Instant::now(),
            input: vec![0; INPUT],
            filled: 0,
            waits_for_room: false,
        })
    }

    /// Whether the kernel could connect, once it says that it is done.
    pub(super) fn connected(&self) -> io::Result<()> {
        match self.stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub(super) fn remote(&self) -> Option<SocketAddr> {
        self.stream.peer_addr().ok()
    }

    /// Reads what has come.
    pub(super) fn read(&mut self) -> io::Result<Read> {
        if self.is_secure {
            let read = self.writer.lock().read_tls(&mut self.input[self.filled..])?;
            self.filled += read.unwrap_or(0);
            return Ok(if read.is_some() { Read::More } else { Read::Dry });
        }
        let room = self.input.len() - self.filled;
        match rustix::io::read(&self.stream, &mut self.input[self.filled..]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.filled += count;
                Ok(if count == room { Read::More } else { Read::Dry })
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Read::Dry),
            Err(error) => Err(error.into()),
        }
    }

    /// What was read and not consumed.
    pub(super) fn arrived(&self) -> &[u8] {
        &self.input[..self.filled]
    }

    /// Forgets the first bytes of it.
    pub(super) fn consume(&mut self, count: usize) {
        self.input.copy_within(count..self.filled, 0);
        self.filled -= count;
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
