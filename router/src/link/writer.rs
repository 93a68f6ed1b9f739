//! The sending side of a connection, shared by the thread of the links and the lane: whoever has something to send
//! writes it, so that nobody need be woken for it.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
};

use rustix::io::Errno;

/// Writes of one connection before others have their turn.
const ROUNDS: u32 = 8;

/// What is being written to a connection.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: Arc<TcpStream>,
    output: Vec<u8>,
    written: usize,
    tls: Option<Box<rustls::Connection>>,
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
        Self { stream, output, written: 0, tls: tls.map(Box::new) }
    }

    /// The TLS connection, if there is one.
    pub(super) fn tls(&self) -> Option<&rustls::Connection> {
        self.tls.as_deref()
    }

    /// Reads what was sent through TLS. `None`: nothing more for now.
    pub(super) fn read_tls(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(tls) = &mut self.tls else { return Ok(None) };
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

    /// Writes what the socket takes, with more from `take` whenever all is written; `sent` counts it.
    pub(crate) fn pump(
        &mut self,
        mut take: impl FnMut(&mut Vec<u8>) -> bool,
        sent: &mut u64,
    ) -> io::Result<Progress> {
        for _ in 0..ROUNDS {
            if let Some(blocked) = self.flush_tls()? {
                return Ok(blocked);
            }
            if self.written == self.output.len() {
                self.written = 0;
                self.output.clear();
                if !take(&mut self.output) {
                    return Ok(Progress::Done);
                }
            }
            if let Some(tls) = &mut self.tls {
                let count = tls.writer().write(&self.output[self.written..])?;
                self.written += count;
                *sent += count as u64;
                continue;
            }
            match rustix::io::write(&self.stream, &self.output[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    *sent += count as u64;
                }
                Err(Errno::AGAIN) => return Ok(Progress::Blocked),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Progress::More)
    }

    /// Writes what TLS has made. `None`: it can take more.
    fn flush_tls(&mut self) -> io::Result<Option<Progress>> {
        let Some(tls) = &mut self.tls else { return Ok(None) };
        while tls.wants_write() {
            match tls.write_tls(&mut &*self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Some(Progress::Blocked));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tls.is_handshaking().then_some(Progress::Done))
    }
}
