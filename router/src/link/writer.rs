//! The sending side of a connection, shared by the thread of the links and the lane: whoever has something to send
//! writes it, so that nobody need be woken for it.

use std::{io, net::TcpStream, sync::Arc};

use rustix::io::Errno;

/// Writes of one connection before others have their turn.
const ROUNDS: u32 = 8;

/// What is being written to a connection.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: Arc<TcpStream>,
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
    pub(super) fn new(stream: Arc<TcpStream>, output: Vec<u8>) -> Self {
        Self { stream, output, written: 0 }
    }

    /// Writes what the socket takes, with more from `take` whenever all is written; `sent` counts it.
    pub(crate) fn pump(
        &mut self,
        mut take: impl FnMut(&mut Vec<u8>) -> bool,
        sent: &mut u64,
    ) -> io::Result<Progress> {
        for _ in 0..ROUNDS {
            if self.written == self.output.len() {
                self.written = 0;
                self.output.clear();
                if !take(&mut self.output) {
                    return Ok(Progress::Done);
                }
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
}
