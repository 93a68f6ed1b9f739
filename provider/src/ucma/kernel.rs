//! The kernel's own rdma_cm, for ids of the kernel's devices: its node, opened once for each event channel.
//!
//! Commands are those that librdmacm writes (`rdma_user_cm.h`). Which ids are the kernel's is [`super::beside`]'s
//! business.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use verbs_abi::proto::cm::Address;

use super::bytes::Writer;
use super::decode::STORAGE;
use super::encode::stored;
use crate::abi::edge::Errno;
use crate::router_link::above_stdio;

/// The device that librdmacm opens, in every release.
pub(crate) const NODE: &CStr = c"/dev/infiniband/rdma_cm";

const CREATE_ID: u32 = 0;
const DESTROY_ID: u32 = 1;
const LISTEN: u32 = 7;
const SET_OPTION: u32 = 14;
const MIGRATE_ID: u32 = 18;
const QUERY: u32 = 19;
const BIND: u32 = 20;
/// `struct rdma_ucm_query_addr_resp`, and where the own address lies in it.
const QUERY_ADDR: usize = 280;
const OWN_ADDRESS: usize = 16;

/// An event channel of the kernel. It never blocks.
#[derive(Debug)]
pub(super) struct Kernel(OwnedFd);

impl AsFd for Kernel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Kernel {
    /// A new one, where this kernel has rdma_cm and lets us use it.
    pub(super) fn open() -> Result<Kernel, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(Kernel(above_stdio(rustix::fs::open(NODE, flags, Mode::empty())?)?))
    }

    /// Something else in the kernel's place.
    #[cfg(test)]
    pub(super) fn over(fd: OwnedFd) -> Kernel {
        Kernel(fd)
    }

    /// Gives the kernel a command as librdmacm wrote it.
    ///
    /// # Safety
    /// The addresses in it must be those of its reply and of its option.
    pub(super) unsafe fn write(&self, command: &[u8]) -> Result<(), Errno> {
        // SAFETY: a command to read, whose addresses are the caller's promise.
        let written = unsafe { libc::write(self.0.as_raw_fd(), command.as_ptr().cast(), command.len()) };
        match written {
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
            _ => Ok(()),
        }
    }

    /// The same for another id than the one that it names.
    ///
    /// # Safety
    /// As for [`Kernel::write`].
    pub(super) unsafe fn write_for(&self, id: u32, command: &[u8]) -> Result<(), Errno> {
        let mut command = command.to_vec();
        let at = command.first_chunk().and_then(|number| id_offset(u32::from_ne_bytes(*number)));
        let place = at.and_then(|at| command.get_mut(8 + at..8 + at + 4)).ok_or(Errno::INVAL)?;
        place.copy_from_slice(&id.to_ne_bytes());
        // SAFETY: the caller's promise.
        unsafe { self.write(&command) }
    }

    /// Executes a command of ours, whose body begins with the address of the reply, if it has one.
    fn ask<const N: usize>(&self, number: u32, body: &[u8]) -> Result<[u8; N], Errno> {
        let mut reply = [0; N];
        let mut command = Writer::default();
        let address = if N == 0 { 0 } else { size_of::<u64>() };
        command.u32(number).u16((address + body.len()) as u16).u16(N as u16);
        if N > 0 {
            command.u64(reply.as_mut_ptr().expose_provenance() as u64);
        }
        command.bytes(body);
        // SAFETY: the one address is that of `reply`, which has the room that the command says.
        unsafe { self.write(&command.finish())? };
        Ok(std::hint::black_box(reply))
    }

    /// A new id.
    pub(super) fn create(&self, uid: u64, space: u16, qp_type: u8) -> Result<u32, Errno> {
        let mut reply = [0_u8; 4];
        let mut command = Writer::default();
        command.u32(CREATE_ID).u16(24).u16(4).u64(uid);
        command.u64(reply.as_mut_ptr().expose_provenance() as u64);
        command.u16(space).u8(qp_type).zeros(5);
        // SAFETY: the one address is that of `reply`, which has the room that the command says.
        unsafe { self.write(&command.finish())? };
        Ok(u32::from_ne_bytes(std::hint::black_box(reply)))
    }

    /// Ends an id. How many of its events were handed out.
    pub(super) fn destroy(&self, id: u32) -> Result<u32, Errno> {
        self.ask(DESTROY_ID, &[id.to_ne_bytes(), [0; 4]].concat()).map(u32::from_ne_bytes)
    }

    /// Names an id's own address.
    pub(super) fn bind(&self, id: u32, address: Address) -> Result<(), Errno> {
        let address = stored(Some(address));
        let mut body = Writer::default();
        body.u32(id).u16(address.len() as u16).u16(0).bytes(&address).pad_to(8 + STORAGE);
        self.ask::<0>(BIND, &body.finish()).map(|_| ())
    }

    /// The port that an id is bound to.
    pub(super) fn port(&self, id: u32) -> Result<u16, Errno> {
        let reply: [u8; QUERY_ADDR] = self.ask(QUERY, &[id.to_ne_bytes(), [0; 4]].concat())?;
        Ok(u16::from_be_bytes([reply[OWN_ADDRESS + 2], reply[OWN_ADDRESS + 3]]))
    }

    /// Changes an id.
    pub(super) fn set_option(&self, id: u32, level: u32, name: u32, value: &[u8]) -> Result<(), Errno> {
        let mut command = Writer::default();
        command.u32(SET_OPTION).u16(24).u16(0).u64(value.as_ptr().expose_provenance() as u64);
        command.u32(id).u32(level).u32(name).u32(value.len() as u32);
        // SAFETY: the one address is that of the value, which is as long as the command says.
        unsafe { self.write(&command.finish()) }
    }

    /// Takes requests for connections.
    pub(super) fn listen(&self, id: u32, backlog: u32) -> Result<(), Errno> {
        self.ask::<0>(LISTEN, &[id.to_ne_bytes(), backlog.to_ne_bytes()].concat()).map(|_| ())
    }

    /// Moves an id from another channel to this one. How many of its events were handed out.
    pub(super) fn migrate(&self, id: u32, from: &Kernel) -> Result<u32, Errno> {
        let body = [id.to_ne_bytes(), from.0.as_raw_fd().to_ne_bytes()].concat();
        self.ask(MIGRATE_ID, &body).map(u32::from_ne_bytes)
    }
}

/// Where a command names its id, in the body.
fn id_offset(command: u32) -> Option<usize> {
    match command {
        4 | 7 | 9 | 10 | 15 | 20 | 21 => Some(0),
        1 | 5 | 11 | 14 | 17 | 18 | 19 => Some(8),
        22 => Some(16),
        2 => Some(36),
        16 => Some(44),
        3 => Some(56),
        6 => Some(272),
        8 => Some(280),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucma::decode::{What, decode};

    #[test]
    fn an_id_lies_where_the_commands_are_read() {
        // Number and length of each command that names an id. Those with an address get one of IPv4, with its length
        // where there is a place for that.
        let lengths = [
            (1, 16),
            (2, 40),
            (4, 8),
            (5, 16),
            (6, 288),
            (7, 8),
            (8, 296),
            (9, 264),
            (10, 4),
            (11, 16),
            (14, 24),
        ];
        let more =
            [(15, 8), (16, 48), (17, 16), (18, 16), (19, 16), (20, 136), (3, 64), (21, 272), (22, 152)];
        for (number, len) in lengths.into_iter().chain(more) {
            let mut body = vec![0; len];
            // The addresses of the commands, and the lengths of those that tell them; 279: parameters that count.
            for (command, at, value) in [
                (2, 8, 2),
                (3, 28, 2),
                (16, 16, 2),
                (20, 4, 16),
                (20, 8, 2),
                (21, 8, 16),
                (21, 10, 16),
                (21, 16, 2),
                (21, 144, 2),
                (22, 20, 16),
                (22, 24, 2),
                (6, 271, 1),
            ] {
                if command == number {
                    body[at] = value;
                }
            }
            let at = id_offset(number).unwrap();
            body[at..at + 4].copy_from_slice(&77_u32.to_ne_bytes());
            let header =
                [&number.to_ne_bytes()[..], &(len as u16).to_ne_bytes(), &400_u16.to_ne_bytes()].concat();
            let found = match decode(&[header, body].concat()).unwrap().what {
                What::Ask(verbs_abi::proto::cm::Command::LeaveMulticast { id })
                | What::Migrate { id, .. }
                | What::SetOption { id, .. } => Some(id),
                What::Ask(command) => command.id(),
                What::NextEvent => None,
            };
            assert_eq!(found, Some(77), "command {number}");
        }
    }
}
