//! One system call for many pieces of memory, some of them memory of clients.
//!
//! Leaves to others: which pieces, and that they are there (the engine, while its fabric is locked).

use std::{net::TcpStream, os::fd::AsRawFd};

use engine::wire::Piece;
use rustix::io::Errno;

/// As `UIO_MAXIOV` of Linux.
const MOST: usize = 1024;

/// Writes the pieces; says how many bytes were taken. Never waits on a socket that does not.
pub(super) fn write(stream: &TcpStream, pieces: &[Piece]) -> Result<usize, Errno> {
    let vectors = vectors(pieces);
    let mut message = message(&vectors);
    message.msg_iov = vectors.as_ptr().cast_mut();
    // SAFETY: the pieces are valid for reads as the engine says, for the fabric is locked by whoever calls this; the
    // kernel only reads them, and gives EFAULT, no signal, where memory cannot be had. Other processes may write to
    // them at the same time, which the kernel does not mind.
    let count = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(count).map_err(|_| last_error())
}

/// Reads into the pieces; says how many bytes came, 0 at the end. Never waits on a socket that does not.
pub(super) fn read(stream: &TcpStream, pieces: &[Piece]) -> Result<usize, Errno> {
    let vectors = vectors(pieces);
    let mut message = message(&vectors);
    message.msg_iov = vectors.as_ptr().cast_mut();
    // SAFETY: as above, for writes.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, 0) };
    usize::try_from(count).map_err(|_| last_error())
}

/// Copies bytes to the beginning of the pieces.
pub(super) fn put(pieces: &[Piece], mut bytes: &[u8]) {
    for piece in pieces {
        let (here, rest) = bytes.split_at(bytes.len().min(piece.len));
        // SAFETY: the piece is valid for writes of its length as the engine says, for the fabric is locked by whoever
        // calls this; the bytes are this process's own, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), piece.start.as_ptr(), here.len()) };
        bytes = rest;
    }
}

fn vectors(pieces: &[Piece]) -> Vec<libc::iovec> {
    let vector = |piece: &Piece| libc::iovec { iov_base: piece.start.as_ptr().cast(), iov_len: piece.len };
    pieces.iter().take(MOST).map(vector).collect()
}

fn message(vectors: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a message without address, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iovlen = vectors.len();
    message
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
