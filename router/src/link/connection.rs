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

use engine::{
    Stream,
    wire::{
        Piece, TAIL,
        packet::{self, BadPacket, HEADER},
    },
};

use super::{scatter, writer::Writer};
use crate::lane::{self, RouterFabric};

/// Bytes that are read at a time.
const INPUT: usize = 256 * 1024;
/// Reads with the fabric locked, before others have it.
const ROUNDS: u32 = 8;
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
    /// The router there and which stream of the link this is, once it is known.
    pub(super) peer: Option<Stream>,
    /// Whether this router made it.
    pub(super) dialed: bool,
    pub(super) since: Instant,
    input: Vec<u8>,
    filled: usize,
    /// The packet whose payload is being read to where it belongs.
    placing: Option<Placing>,
    /// Whether that is done at all: not once memory could not be had.
    places: bool,
    /// The packet before was one whose payload was read in place: the next one may be, too.
    expects_long: bool,
    /// Whether it is waited for that it takes more.
    pub(super) waits_for_room: bool,
}

/// A packet whose payload is being read to where it belongs.
#[derive(Debug)]
struct Placing {
    header: [u8; HEADER],
    /// Bytes of payload in front of the tail.
    body: usize,
    /// Where they belong, as was told when the header had come. Empty: nowhere any more, and the packet is lost.
    places: Vec<(usize, usize)>,
    /// Bytes of payload that have come, the tail included.
    done: usize,
    tail: [u8; TAIL],
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
        peer: Stream,
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
            placing: None,
            places: !is_secure,
            expects_long: false,
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

    /// Reads what has come, to be looked at: greetings, and all that goes through TLS.
    pub(super) fn read(&mut self) -> io::Result<Read> {
        if self.is_secure {
            let read = self.writer.lock().read_tls(&mut self.input[self.filled..])?;
            self.filled += read.unwrap_or(0);
            return Ok(if read.is_some() { Read::More } else { Read::Dry });
        }
        let room = self.input.len() - self.filled;
        let count = received(rustix::io::read(&self.stream, &mut self.input[self.filled..]))?;
        self.filled += count;
        Ok(if count == room { Read::More } else { Read::Dry })
    }

    /// Gives the packets that have come to the fabric, and reads more of them, long payload straight to where the fabric
    /// says that it belongs. `received` counts the bytes of whole packets.
    pub(super) fn take_in(
        &mut self,
        fabric: &mut RouterFabric,
        peer: u32,
        received: &mut u64,
    ) -> Result<Read, Trouble> {
        let (mut pieces, mut is_dry) = (Vec::new(), false);
        for _ in 0..=ROUNDS {
            if self.placing.is_none() {
                *received += self.give_packets(fabric, peer)? as u64;
                self.begin_placing(fabric, peer, &mut pieces);
            }
            if is_dry {
                return Ok(Read::Dry);
            }
            let read = match self.placing {
                Some(_) => self.read_placed(fabric, peer, &mut pieces, received)?,
                None if self.is_secure => return Ok(Read::Dry),
                None => self.read_more()?,
            };
            // What a read to the end of the socket has brought is still to be given.
            is_dry = read == Read::Dry;
        }
        Ok(Read::More)
    }

    /// Hands whole packets to the fabric; says how many bytes they were.
    fn give_packets(&mut self, fabric: &mut RouterFabric, peer: u32) -> Result<usize, BadPacket> {
        let (mut at, now) = (0, lane::now());
        while let Some(length) = packet::length(&self.input[at..self.filled]) {
            if length > packet::LONGEST {
                return Err(BadPacket::Length((length - HEADER) as u32));
            }
            let Some(packet) = self.input[at..self.filled].get(..length) else { break };
            fabric.receive(peer, packet, now)?;
            self.expects_long = false;
            at += length;
        }
        self.consume(at);
        Ok(at)
    }

    /// Looks whether the payload of the packet that has come in part can be read to where it belongs.
    fn begin_placing(&mut self, fabric: &mut RouterFabric, peer: u32, pieces: &mut Vec<Piece>) {
        let arrived = &self.input[..self.filled];
        let Some((header, payload)) = arrived.split_first_chunk::<HEADER>().filter(|_| self.places) else {
            return;
        };
        pieces.clear();
        if !fabric.aim(peer, header, &mut |piece| pieces.push(piece)) {
            return;
        }
        let body = pieces.iter().map(|piece| piece.len).sum();
        let places = pieces.iter().map(Piece::place).collect();
        let mut placing = Placing { header: *header, body, places, done: payload.len(), tail: [0; TAIL] };
        let (begun, tail) = payload.split_at(payload.len().min(body));
        scatter::put(pieces, begun);
        placing.tail[..tail.len()].copy_from_slice(tail);
        (self.filled, self.placing) = (0, Some(placing));
    }

    /// Reads what is missing of the payload, and the header that follows it.
    fn read_placed(
        &mut self,
        fabric: &mut RouterFabric,
        peer: u32,
        pieces: &mut Vec<Piece>,
        received: &mut u64,
    ) -> Result<Read, Trouble> {
        let Some(placing) = &mut self.placing else { return Ok(Read::More) };
        let (next, scratch) = self.input.split_at_mut(HEADER);
        pieces.clear();
        let aims = !placing.places.is_empty()
            && fabric.aim(peer, &placing.header, &mut |piece| pieces.push(piece))
            && pieces.iter().map(Piece::place).eq(placing.places.iter().copied());
        let left = placing.body.saturating_sub(placing.done);
        if aims {
            skip(pieces, placing.done);
        } else {
            // What was told before does not hold any more: the payload goes nowhere.
            placing.places.clear();
            pieces.clear();
            pieces.extend((left > 0).then(|| Piece::of_mut(&mut scratch[..left])));
        }
        let tail_at = placing.done.saturating_sub(placing.body);
        pieces.push(Piece::of_mut(&mut placing.tail[tail_at..]));
        pieces.push(Piece::of_mut(next));
        let whole = placing.body + TAIL;
        let count = match scatter::read(&self.stream, pieces) {
            Err(Errno::FAULT) => {
                // Its owner finds out when the payload is copied there, as all is from now on.
                placing.places.clear();
                self.places = false;
                return Ok(Read::More);
            }
            count => self::received(count)?,
        };
        let payload = count.min(whole - placing.done);
        placing.done += payload;
        if placing.done < whole {
            return Ok(Read::Dry);
        }
        self.filled = count - payload;
        self.expects_long = true;
        *received += (HEADER + whole) as u64;
        if let Some(Placing { header, places, tail, .. }) = self.placing.take() {
            match places.is_empty() {
                true => fabric.miss(peer, &header)?,
                false => fabric.receive_placed(peer, &header, &places, &tail, lane::now())?,
            }
        }
        Ok(if self.filled < HEADER { Read::Dry } else { Read::More })
    }

    /// Reads into the buffer: a header alone, where long payload may follow it.
    fn read_more(&mut self) -> io::Result<Read> {
        let end = if self.expects_long && self.filled < HEADER { HEADER } else { self.input.len() };
        let room = &mut self.input[self.filled..end];
        let wanted = room.len();
        let count = received(rustix::io::read(&self.stream, room))?;
        self.filled += count;
        Ok(if count == wanted { Read::More } else { Read::Dry })
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

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Packet(#[from] BadPacket),
}

/// How much a read brought: nothing, where that is all for now.
fn received(count: Result<usize, Errno>) -> io::Result<usize> {
    match count {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => Ok(count),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Leaves out the first bytes of some pieces.
fn skip(pieces: &mut Vec<Piece>, mut count: usize) {
    for piece in pieces.iter_mut() {
        let here = count.min(piece.len);
        *piece = piece.behind(here);
        count -= here;
    }
    pieces.retain(|piece| piece.len > 0);
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
