//! The sending side of a connection, shared by the thread of the links and the lane: whoever has something to send
//! writes it, so that nobody need be woken for it.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
};

use engine::{
    Stream,
    wire::{Load, Pieces},
};
use rustix::io::Errno;

use super::{Seat, scatter};

/// Writes of one connection before others have their turn.
const ROUNDS: u32 = 8;

/// What is being written to a connection.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: Arc<TcpStream>,
    /// What goes to the socket from where it lies.
    load: Load,
    secure: Option<Secure>,
}

/// What goes through TLS.
#[derive(Debug)]
struct Secure {
    tls: Box<rustls::Connection>,
    output: Vec<u8>,
    written: usize,
}

/// How far a writer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There was nothing left to be written.
    Done,
    /// The socket takes no more.
    Blocked,
    /// There may be more.
    More,
}

impl Writer {
    /// One that begins with `output`.
    pub(super) fn new(stream: Arc<TcpStream>, output: Vec<u8>, tls: Option<rustls::Connection>) -> Self {
        match tls {
            None => Self { stream, load: Load::beginning_with(output), secure: None },
            Some(tls) => {
                let secure = Secure { tls: Box::new(tls), output, written: 0 };
                Self { stream, load: Load::default(), secure: Some(secure) }
            }
        }
    }

    /// The TLS connection, if there is one.
    pub(super) fn tls(&self) -> Option<&rustls::Connection> {
        self.secure.as_ref().map(|secure| &*secure.tls)
    }

    /// Reads what was sent through TLS. `None`: nothing more for now.
    pub(super) fn read_tls(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(Secure { tls, .. }) = &mut self.secure else { return Ok(None) };
        loop {
            match tls.reader().read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            match tls.read_tls(&mut &*self.stream) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    tls.process_new_packets().map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes what the socket takes, with more from the packets of `number` (none before it is known who is there)
    /// whenever all is written; `sent` counts it.
    pub(crate) fn pump(
        &mut self,
        seat: &mut Seat<'_>,
        number: Option<Stream>,
        sent: &mut u64,
    ) -> io::Result<Progress> {
        for _ in 0..ROUNDS {
            let progress = match &mut self.secure {
                Some(secure) => secure.write(&self.stream, seat, number, sent)?,
                None => write(&self.stream, &mut self.load, seat, number, sent)?,
            };
            if progress != Progress::More {
                return Ok(progress);
            }
        }
        Ok(Progress::More)
    }
}

/// Writes packets from where their bytes lie, with the fabric locked meanwhile: what is written then is what was
/// checked.
fn write(
    stream: &TcpStream,
    load: &mut Load,
    seat: &mut Seat<'_>,
    number: Option<Stream>,
    sent: &mut u64,
) -> io::Result<Progress> {
    seat.with(|fabric| {
        let mut pieces = Pieces::default();
        if number.is_some_and(|number| !fabric.load_packets(number, load)) {
            return Ok(Progress::Done);
        }
        fabric.list(load, &mut pieces);
        if pieces.as_slice().is_empty() {
            return Ok(if number.is_some() { Progress::More } else { Progress::Done });
        }
        let written = scatter::write(stream, pieces.as_slice());
        if written == Err(Errno::FAULT) {
            // Whose memory it is finds out when it is touched.
            pieces.copy(&mut Vec::new());
        }
        if !fabric.advance(load, &pieces, *written.as_ref().unwrap_or(&0)) {
            return Err(Errno::FAULT.into());
        }
        match written {
            Ok(count) => {
                *sent += count as u64;
                Ok(Progress::More)
            }
            Err(Errno::AGAIN) => Ok(Progress::Blocked),
            Err(Errno::INTR) => Ok(Progress::More),
            Err(error) => Err(error.into()),
        }
    })
}

impl Secure {
    fn write(
        &mut self,
        stream: &TcpStream,
        seat: &mut Seat<'_>,
        number: Option<Stream>,
        sent: &mut u64,
    ) -> io::Result<Progress> {
        if let Some(blocked) = self.flush(stream)? {
            return Ok(blocked);
        }
        if self.written == self.output.len() {
            self.written = 0;
            self.output.clear();
            let output = &mut self.output;
            if !number.is_some_and(|number| seat.with(|fabric| fabric.take_packets(number, output))) {
                return Ok(Progress::Done);
            }
        }
        let count = self.tls.writer().write(&self.output[self.written..])?;
        self.written += count;
        *sent += count as u64;
        Ok(Progress::More)
    }

    /// Writes what TLS has made. `None`: it can take more.
    fn flush(&mut self, mut stream: &TcpStream) -> io::Result<Option<Progress>> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Some(Progress::Blocked));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.tls.is_handshaking().then_some(Progress::Done))
    }
}
