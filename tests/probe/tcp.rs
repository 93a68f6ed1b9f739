//! A plain TCP program, for rsocket's preload library to take over: it calls what a C program calls, and asks for
//! nothing that old releases of that library pass by (flags in the type of a socket, short time-outs, epoll).

use std::{
    ffi::{c_int, c_void},
    io,
    net::SocketAddrV4,
};

use anyhow::{Context as _, Result, ensure};

const BYTES: usize = 20_000_000;
const CHUNK: usize = 50_000;

/// Takes one connection and sends what comes back.
pub(crate) fn echo(port: u16) -> Result<()> {
    let listener = Socket::new()?;
    let mut address = sockaddr("0.0.0.0:0".parse::<SocketAddrV4>()?);
    address.sin_port = port.to_be();
    let len = size_of::<libc::sockaddr_in>() as u32;
    // SAFETY: a live descriptor and a live address.
    check("bind", unsafe { libc::bind(listener.0, (&raw const address).cast(), len) })?;
    // SAFETY: a live descriptor.
    check("listen", unsafe { libc::listen(listener.0, 4) })?;
    // SAFETY: a live descriptor; no address is wanted.
    let raw = unsafe { libc::accept(listener.0, std::ptr::null_mut(), std::ptr::null_mut()) };
    check("accept", raw)?;
    let peer = Socket(raw);
    let mut chunk = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let taken = peer.recv(&mut chunk)?;
        if taken == 0 {
            break;
        }
        peer.send_all(&chunk[..taken])?;
        total += taken;
    }
    ensure!(total == BYTES, "{total} bytes came");
    Ok(())
}

/// Sends much and expects it back.
pub(crate) fn exchange(to: SocketAddrV4) -> Result<()> {
    let socket = Socket::new()?;
    let address = sockaddr(to);
    let len = size_of::<libc::sockaddr_in>() as u32;
    // SAFETY: a live descriptor and a live address.
    check("connect", unsafe { libc::connect(socket.0, (&raw const address).cast(), len) })?;
    let mut came = vec![0; CHUNK];
    for start in (0..BYTES).step_by(CHUNK) {
        let sent: Vec<u8> =
            (start..start + CHUNK).map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_ne_bytes()[2]).collect();
        socket.send_all(&sent)?;
        let mut filled = 0;
        while filled < CHUNK {
            let taken = socket.recv(&mut came[filled..])?;
            ensure!(taken > 0, "the other end hung up");
            filled += taken;
        }
        ensure!(came == sent, "what came back is not what was sent");
    }
    // SAFETY: a live descriptor.
    check("shutdown", unsafe { libc::shutdown(socket.0, libc::SHUT_RDWR) })
}

struct Socket(c_int);

impl Socket {
    fn new() -> Result<Socket> {
        // SAFETY: makes a descriptor.
        let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        check("socket", raw)?;
        Ok(Socket(raw))
    }

    fn recv(&self, into: &mut [u8]) -> Result<usize> {
        // SAFETY: a live descriptor and as many writable bytes as are said.
        let taken = unsafe { libc::recv(self.0, into.as_mut_ptr().cast::<c_void>(), into.len(), 0) };
        usize::try_from(taken).map_err(|_| io::Error::last_os_error()).context("recv")
    }

    fn send_all(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            // SAFETY: a live descriptor and as many readable bytes as are said.
            let sent = unsafe { libc::send(self.0, bytes.as_ptr().cast::<c_void>(), bytes.len(), 0) };
            let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error()).context("send")?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's.
        unsafe { libc::close(self.0) };
    }
}

fn check(what: &'static str, result: c_int) -> Result<()> {
    if result < 0 { Err(io::Error::last_os_error()).context(what) } else { Ok(()) }
}

/// An address as C has it.
pub(crate) fn sockaddr(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}
