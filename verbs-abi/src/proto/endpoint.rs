//! A framed connection: postcard messages with descriptors over `SOCK_SEQPACKET`.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{MAX_FDS, MAX_MESSAGE};

const SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    /// The other end closed the connection.
    #[error("the other end closed the connection")]
    Closed,
    /// Not a message of this protocol: drop the peer.
    #[error("malformed message of {0} bytes")]
    Malformed(usize),
    /// The message or its descriptors were longer than allowed: drop the peer.
    #[error("oversized message")]
    Oversized,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Endpoint {
    socket: OwnedFd,
}

impl Endpoint {
    /// Wraps a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// [`ProtoError::Oversized`], or [`ProtoError::Io`] as sendmsg(2).
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ProtoError> {
        let bytes = postcard::to_stdvec(message).map_err(|_| ProtoError::Oversized)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ProtoError::Oversized);
        }
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ProtoError::Oversized);
        }
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ProtoError::Closed);
                }
                Err(error) => return Err(ProtoError::Io(error.into())),
            }
        }
    }

    /// Receives a message and its descriptors; blocks if the socket does.
    ///
    /// # Errors
    /// [`ProtoError::Io`] with `WouldBlock` on a non-blocking socket without a message.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ProtoError> {
        let mut bytes = [0u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(ProtoError::Closed),
                Err(error) => return Err(ProtoError::Io(error.into())),
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ProtoError::Oversized);
        }
        if received.bytes == 0 {
            return Err(ProtoError::Closed);
        }
        match postcard::take_from_bytes(&bytes[..received.bytes]) {
            Ok((message, [])) => Ok((message, fds)),
            _ => Err(ProtoError::Malformed(received.bytes)),
        }
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::proto::{Answer, Mode, Reply, Request};

    fn pair() -> (Endpoint, Endpoint) {
        let (a, b) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (Endpoint::new(a), Endpoint::new(b))
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let request = Request::Hello { version: 1, mode: Mode::Direct };
        a.send(&request, &[a.as_fd(), b.as_fd()]).unwrap();
        let (received, fds) = b.recv::<Request>().unwrap();
        assert_eq!(received, request);
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn a_message_of_another_kind_is_malformed() {
        let (a, b) = pair();
        rustix::net::send(&a, &[0xff; 40], SendFlags::empty()).unwrap();
        assert!(matches!(b.recv::<Request>(), Err(ProtoError::Malformed(40))));
        let mut bytes = postcard::to_stdvec(&Request::AllocPd).unwrap();
        bytes.push(0);
        rustix::net::send(&a, &bytes, SendFlags::empty()).unwrap();
        assert!(matches!(b.recv::<Request>(), Err(ProtoError::Malformed(2))), "something behind a message");
        rustix::net::send(&a, &[0; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(matches!(b.recv::<Request>(), Err(ProtoError::Oversized)));
    }

    #[test]
    fn a_closed_connection_says_so() {
        let (a, b) = pair();
        a.send(&Reply::Ok(Answer::Done), &[]).unwrap();
        drop(a);
        assert!(b.recv::<Reply>().is_ok());
        assert!(matches!(b.recv::<Reply>(), Err(ProtoError::Closed)));
    }
}
