//! As much of HTTP/1.1 as etcd's JSON gateway needs: POST over one connection that stays, answers of known length or in chunks,
//! and one that never ends.
//!
//! Written by hand, since a watch must wait for ever for its next line and yet end when another thread says so, and all else
//! must end in time. Leaves to others: what is said (`words`).

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::net::sockopt;
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

use crate::config::Endpoint;

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How long what was sent may stay unacknowledged.
const SILENCE: Duration = Duration::from_secs(10);
const LONGEST_HEAD: usize = 16 * 1024;
/// A line that tells the length of a chunk, or a trailer.
const LONGEST_LINE: usize = 4096;

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection to a server.
pub(super) struct Connection {
    socket: TcpStream,
    stream: Box<dyn Stream>,
    authority: String,
    /// Read and not consumed.
    input: Vec<u8>,
    /// Whether the server has the next request as well.
    pub(super) is_open: bool,
}

/// How much of an answer is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Bytes(u64),
    /// Bytes of this chunk.
    Chunk(u64),
    /// The line end behind a chunk, then the length of the next one.
    NextChunk,
    ToTheEnd,
    Nothing,
}

/// The beginning of an answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    left: Left,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Connection").field("authority", &self.authority).finish_non_exhaustive()
    }
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// The addresses of a server.
pub(super) fn resolve(endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
    Ok((endpoint.host.as_str(), endpoint.port).to_socket_addrs()?.collect())
}

impl Connection {
    /// Connects to a server at one of its addresses.
    pub(super) fn open(
        endpoint: &Endpoint,
        address: SocketAddr,
        tls: Option<&Arc<ClientConfig>>,
    ) -> io::Result<Self> {
        let socket = TcpStream::connect_timeout(&address, CONNECT)?;
        socket.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, SILENCE / 2)?;
        sockopt::set_tcp_keepintvl(&socket, SILENCE / 10)?;
        sockopt::set_tcp_keepcnt(&socket, 5)?;
        sockopt::set_tcp_user_timeout(&socket, SILENCE.as_millis() as u32)?;
        socket.set_write_timeout(Some(SILENCE))?;
        let plain = socket.try_clone()?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(plain),
            Some(config) => {
                let name = ServerName::try_from(endpoint.host.clone()).map_err(io::Error::other)?;
                let tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(tls, plain))
            }
        };
        Ok(Self { socket, stream, authority: endpoint.authority(), input: Vec::new(), is_open: true })
    }

    /// A handle by which another thread ends whatever this one waits for.
    pub(super) fn canceller(&self) -> io::Result<impl Fn() + Send + use<>> {
        let socket = self.socket.try_clone()?;
        Ok(move || drop(socket.shutdown(Shutdown::Both)))
    }

    /// Sends a request and reads the beginning of the answer.
    pub(super) fn post(
        &mut self,
        path: &str,
        token: Option<&str>,
        body: &[u8],
        until: Instant,
    ) -> io::Result<Answer> {
        let authorization = token.map_or(String::new(), |token| format!("Authorization: {token}\r\n"));
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{authorization}\r\n",
            self.authority,
            body.len()
        );
        self.stream.write_all(&[head.as_bytes(), body].concat())?;
        self.stream.flush()?;
        let end = loop {
            if let Some(at) = self.input.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if self.input.len() > LONGEST_HEAD {
                return Err(nonsense("an answer without an end of its head"));
            }
            if self.fill(Some(until))? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head: Vec<u8> = self.input.drain(..end).collect();
        let (answer, stays) = parse_head(&head)?;
        self.is_open = stays && answer.left != Left::ToTheEnd;
        Ok(answer)
    }

    /// Reads more, for as long as it takes unless there is a limit. 0: there is no more.
    fn fill(&mut self, until: Option<Instant>) -> io::Result<usize> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(left)?;
        let mut bytes = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(count) => {
                    self.input.extend_from_slice(&bytes[..count]);
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads some of an answer, for as long as it takes unless there is a limit. False: that was all.
    pub(super) fn read(
        &mut self,
        answer: &mut Answer,
        into: &mut Vec<u8>,
        until: Option<Instant>,
    ) -> io::Result<bool> {
        loop {
            match answer.left {
                Left::Nothing => return Ok(false),
                Left::NextChunk => {
                    let Some(line) = self.line(until)? else {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    };
                    // What ends the chunk before.
                    if line.is_empty() {
                        continue;
                    }
                    answer.left = match chunk_length(&line)? {
                        0 => {
                            // Trailers, until an empty line.
                            while self.line(until)?.is_some_and(|line| !line.is_empty()) {}
                            Left::Nothing
                        }
                        length => Left::Chunk(length),
                    };
                }
                Left::Bytes(_) | Left::Chunk(_) | Left::ToTheEnd => {
                    if self.input.is_empty() && self.fill(until)? == 0 {
                        if answer.left == Left::ToTheEnd {
                            answer.left = Left::Nothing;
                            return Ok(false);
                        }
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let here = self.input.len() as u64;
                    let (count, left) = match answer.left {
                        Left::Bytes(left) if left > here => (here, Left::Bytes(left - here)),
                        Left::Bytes(left) => (left, Left::Nothing),
                        Left::Chunk(left) if left > here => (here, Left::Chunk(left - here)),
                        Left::Chunk(left) => (left, Left::NextChunk),
                        other => (here, other),
                    };
                    into.extend(self.input.drain(..count as usize));
                    answer.left = left;
                    return Ok(true);
                }
            }
        }
    }

    /// A line without its end. `None`: there is no more.
    fn line(&mut self, until: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(at) = self.input.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.input.drain(..=at).collect();
                line.pop();
                line.pop_if(|byte| *byte == b'\r');
                return Ok(Some(line));
            }
            if self.input.len() > LONGEST_LINE {
                return Err(nonsense("a line without an end"));
            }
            if self.fill(until)? == 0 {
                return Ok(None);
            }
        }
    }
}

/// The length of a chunk, which extensions may follow.
fn chunk_length(line: &[u8]) -> io::Result<u64> {
    let text = std::str::from_utf8(line).unwrap_or_default();
    let digits = text.split(';').next().unwrap_or_default().trim();
    let is_number = (1..=15).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let length = is_number.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    length.ok_or_else(|| nonsense("a chunk without a length"))
}

/// What the head of an answer says, and whether the connection stays.
fn parse_head(head: &[u8]) -> io::Result<(Answer, bool)> {
    let text = std::str::from_utf8(head).map_err(|_| nonsense("the head of an answer is no text"))?;
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status: u16 = status.ok_or_else(|| nonsense("it does not speak HTTP"))?;
    let (mut left, mut stays) = (Left::ToTheEnd, first.starts_with("HTTP/1.1"));
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or_else(|| nonsense("a header without a colon"))?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") => left = Left::NextChunk,
            "transfer-encoding" => return Err(nonsense("an unknown transfer encoding")),
            "content-length" if left == Left::ToTheEnd => {
                let length = value.parse().map_err(|_| nonsense("a length that is no number"))?;
                left = if length == 0 { Left::Nothing } else { Left::Bytes(length) };
            }
            "connection" if value.eq_ignore_ascii_case("close") => stays = false,
            _ => {}
        }
    }
    Ok((Answer { status, left }, stays))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// What is read from a server that says this, byte by byte or at once.
    fn read(said: &'static [u8], piece: usize) -> io::Result<(u16, Vec<u8>, bool)> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.set_nodelay(true).unwrap();
            let mut request = [0; 4096];
            let mut asked = Vec::new();
            while !asked.ends_with(b"{}") {
                let count = socket.read(&mut request).unwrap();
                asked.extend_from_slice(&request[..count]);
            }
            said.chunks(piece).for_each(|piece| socket.write_all(piece).unwrap());
            String::from_utf8(asked).unwrap()
        });
        let endpoint: Endpoint = format!("http://{address}").parse().unwrap();
        let mut connection = Connection::open(&endpoint, address, None)?;
        let until = Instant::now() + Duration::from_secs(5);
        let outcome = (|| {
            let mut answer = connection.post("/v3/x", Some("secret"), b"{}", until)?;
            let mut body = Vec::new();
            while connection.read(&mut answer, &mut body, Some(until))? {}
            Ok((answer.status, body, connection.is_open))
        })();
        let asked = server.join().unwrap();
        assert!(
            asked.starts_with("POST /v3/x HTTP/1.1\r\n") && asked.contains("\r\nAuthorization: secret\r\n")
        );
        outcome
    }

    #[test]
    fn every_form_of_an_answer_is_read_to_its_end_and_no_further() {
        let answers: [(&[u8], u16, &[u8], bool); 6] = [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello", true),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b"", true),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n",
                200,
                b"hello",
                true,
            ),
            (
                b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n1\r\nx\r\n0\r\nT: a\r\n\r\n",
                404,
                b"x",
                true,
            ),
            (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", 200, b"x", false),
            (b"HTTP/1.0 200 OK\r\n\r\nto the end", 200, b"to the end", false),
        ];
        for (said, status, body, stays) in answers {
            for piece in [1, said.len()] {
                assert_eq!(read(said, piece).unwrap(), (status, body.to_vec(), stays));
            }
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        let wrong: [&[u8]; 8] = [
            b"",
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        ];
        for said in wrong {
            assert!(read(said, said.len().max(1)).is_err(), "{}", String::from_utf8_lossy(said));
        }
    }

    #[test]
    fn an_endless_head_is_given_up() {
        static ENDLESS: [u8; 3 * LONGEST_HEAD] = [b'x'; 3 * LONGEST_HEAD];
        assert!(read(&ENDLESS, ENDLESS.len()).is_err());
    }

    #[test]
    fn a_silent_server_is_given_up_in_time_and_another_thread_can_end_the_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let endpoint: Endpoint = format!("http://{address}").parse().unwrap();
        let mut connection = Connection::open(&endpoint, address, None).unwrap();
        let start = Instant::now();
        let error = connection.post("/", None, b"", start + Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let cancel = connection.canceller().unwrap();
        let waiting = thread::spawn(move || connection.fill(None));
        cancel();
        assert_eq!(waiting.join().unwrap().unwrap(), 0);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
