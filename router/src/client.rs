//! Asking a running router from the command line.

use std::{io, os::fd::OwnedFd, path::Path, time::Duration};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use verbs_abi::proto::{Answer, Endpoint, ProtoError, Reply, Request};

use crate::status::Status;

/// How long a router may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer that is believed.
const MAX_ANSWER: u64 = 256 << 20;

/// Why a router's answer is not there.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The socket cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The router does not answer.
    #[error("no answer within {} s; it hangs, or is stopped", TIMEOUT.as_secs())]
    Silent,
    /// The question or answer did not come through.
    #[error("no answer: {0}")]
    Exchange(#[source] ProtoError),
    /// The router refused.
    #[error("the router refused: {0}")]
    Refused(#[source] io::Error),
    /// The answer is not what was asked for.
    #[error("the router's answer is not understood; are router and command of one version?")]
    Answer,
    /// The answer cannot be read.
    #[error("cannot read the answer: {0}")]
    Read(#[source] io::Error),
    /// The answer is not the JSON expected.
    #[error("the answer is not understood; are router and command of one version? ({0})")]
    Json(#[from] serde_json::Error),
}

/// Asks the router that serves `socket` about itself.
///
/// # Errors
/// See [`QueryError`]; a router that does not answer in five seconds counts as none.
pub fn status(socket: &Path) -> Result<Status, QueryError> {
    let connection = dial(socket).map_err(|error| QueryError::Connect(error.into()))?;
    let endpoint = Endpoint::new(connection);
    let exchange = || {
        endpoint.send(&Request::Status, &[])?;
        endpoint.recv::<Reply>()
    };
    let (reply, fds) = exchange().map_err(|error| match error {
        ProtoError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => QueryError::Silent,
        error => QueryError::Exchange(error),
    })?;
    match (reply, fds.into_iter().next()) {
        (Err(errno), _) => Err(QueryError::Refused(io::Error::from_raw_os_error(errno))),
        (Ok(Answer::Done), Some(file)) => {
            let text = read(&file).map_err(QueryError::Read)?;
            Ok(serde_json::from_slice(&text)?)
        }
        _ => Err(QueryError::Answer),
    }
}

fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
    // A full queue of new connections makes connect(2) wait as long as a send may.
    set_socket_timeout(&socket, Timeout::Send, Some(TIMEOUT))?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// The whole file, from its start wherever its offset is.
fn read(file: &OwnedFd) -> io::Result<Vec<u8>> {
    let len = rustix::fs::fstat(file)?.st_size.cast_unsigned();
    if len > MAX_ANSWER {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; len as usize];
    let mut read = 0;
    while read < bytes.len() {
        match rustix::io::pread(file, &mut bytes[read..], read as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => read += more,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{accept, bind, listen, socket};

    use super::*;
    use crate::segment;

    /// Answers one status request.
    fn serve(listener: &OwnedFd, reply: Reply, text: &str) {
        let endpoint = Endpoint::new(accept(listener).unwrap());
        assert_eq!(endpoint.recv::<Request>().unwrap().0, Request::Status);
        let file = segment::holding(c"status", text.as_bytes()).unwrap();
        endpoint.send(&reply, &[file.as_fd()]).unwrap();
    }

    #[test]
    fn a_status_crosses_the_socket_and_a_refusal_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let sent = Status { version: "1.2.3".into(), pid: 7, ..Status::default() };
        let text = serde_json::to_string(&sent).unwrap();
        let router = std::thread::spawn(move || {
            serve(&listener, Ok(Answer::Done), &text);
            serve(&listener, Ok(Answer::Done), "{ \"version\": \"9\", \"a word of the future\": 1 }");
            serve(&listener, Ok(Answer::Done), "no JSON");
            serve(&listener, Err(libc::EACCES), "");
        });
        assert_eq!(status(&path).unwrap(), sent);
        assert_eq!(status(&path).unwrap().version, "9", "another version's status can be read");
        assert!(status(&path).unwrap_err().to_string().contains("not understood"));
        assert!(status(&path).unwrap_err().to_string().contains("refused: Permission denied"));
        router.join().unwrap();
    }
}
