//! What travels between two engines: a header of fixed length, then payload.
//!
//! ```text
//!  0 payload length  4 kind | code | flags (16)   8 target QPN    12 source QPN
//! 16 sequence number                             24 remote address
//! 32 rkey           36 immediate data or key     40 message length  44 offset of the payload in the message
//! 48 tenant         52 stream                    56 operand       64 operand
//! 72 source GID                                  88 target GID
//! ```
//!
//! All numbers are little-endian. What a peer sent is copied out of its buffer by [`Header::decode`] and checked
//! there; whether it makes sense for a QP is the receiver's business.

use verbs_abi::verbs::Opcode;

use super::{Path, SEGMENT};
use crate::{MAX_DATAGRAM, MAX_MESSAGE};

/// Version of this format and of the rules around it.
pub const VERSION: u32 = 5;
/// Bytes of a header.
pub const HEADER: usize = 104;
/// Bytes of the longest packet.
pub const LONGEST: usize = HEADER + SEGMENT as usize;

/// The receiver is to be told when this completes.
pub(crate) const SOLICITED: u16 = 1;
/// A part of a request whose other part comes by NIC: the next receive tells of it.
pub(crate) const ANNOUNCES: u16 = 2;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A part of a request; the code is its opcode.
    Request,
    /// A datagram; the code is its opcode.
    Datagram,
    /// Everything below the number was executed.
    Ack,
    /// The same; the number itself failed, with the code as the requester's status.
    Nak,
    /// The same; the number itself found no receive, the code is the RNR timer.
    Rnr,
    /// The same; the number itself is missing.
    Gap,
    /// The receiver of this could not be served before, and can now.
    Ready,
    /// Data of the READ with that number.
    Data,
    /// What the atomic with that number found, as the first operand.
    Found,
    /// Words of the hosts themselves, for no QP.
    Control,
    /// A word about a pair of shadow QPs; the code says which.
    Shadow,
    /// Whether the sender has members in a group.
    Member,
    /// Is anybody there? The first operand is the sender's time, the immediate data the stream's index.
    Ping,
    /// The answer to that, with the same words.
    Pong,
}

const KINDS: [Kind; 14] = [
    Kind::Request,
    Kind::Datagram,
    Kind::Ack,
    Kind::Nak,
    Kind::Rnr,
    Kind::Gap,
    Kind::Ready,
    Kind::Data,
    Kind::Found,
    Kind::Control,
    Kind::Shadow,
    Kind::Member,
    Kind::Ping,
    Kind::Pong,
];

/// A packet that cannot be: its sender speaks another language.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// Longer than any packet.
    #[error("a packet of {0} payload bytes; {SEGMENT} are the most")]
    Length(u32),
    /// A kind that is none.
    #[error("packet kind {0} is none")]
    Kind(u8),
    /// Payload beyond its message, or a message beyond what there may be.
    #[error("{len} bytes at {offset} of a message of {total}")]
    Bounds {
        /// Payload bytes.
        len: u32,
        /// Where they belong.
        offset: u32,
        /// Bytes of the message.
        total: u32,
    },
}

/// A packet but for its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) code: u8,
    pub(crate) flags: u16,
    /// Bytes of payload.
    pub(crate) len: u32,
    pub(crate) path: Path,
    pub(crate) psn: u64,
    /// Which life of the requesting QP this belongs to.
    pub(crate) stream: u32,
    /// Bytes of the message.
    pub(crate) total: u32,
    /// Where in the message the payload belongs.
    pub(crate) offset: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    pub(crate) imm: u32,
    pub(crate) operands: [u64; 2],
}

impl Header {
    /// A packet without payload and operands.
    pub(crate) fn new(kind: Kind, code: u8, path: &Path, stream: u32, psn: u64) -> Self {
        Self {
            kind,
            code,
            flags: 0,
            len: 0,
            path: *path,
            psn,
            stream,
            total: 0,
            offset: 0,
            remote_addr: 0,
            rkey: 0,
            imm: 0,
            operands: [0; 2],
        }
    }

    /// Names the queue that an XRC request goes to: in the word for immediate data, or in an operand where the opcode
    /// needs that word and leaves the operands free.
    pub(crate) fn set_srqn(&mut self, opcode: Opcode, srqn: u32) {
        if uses_imm(opcode) {
            self.operands = [srqn.into(), 0];
        } else {
            self.imm = srqn;
        }
    }

    /// The queue that an XRC request goes to.
    pub(crate) fn srqn(&self, opcode: Opcode) -> u32 {
        // A number that is too large names nothing, and shall not come to name something.
        if uses_imm(opcode) { u32::try_from(self.operands[0]).unwrap_or(0) } else { self.imm }
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let kind = KINDS.iter().position(|kind| *kind == self.kind).unwrap_or(0) as u8;
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.len.to_le_bytes());
        put(4, &[kind, self.code]);
        put(6, &self.flags.to_le_bytes());
        put(8, &self.path.target_qpn.to_le_bytes());
        put(12, &self.path.source_qpn.to_le_bytes());
        put(16, &self.psn.to_le_bytes());
        put(24, &self.remote_addr.to_le_bytes());
        put(32, &self.rkey.to_le_bytes());
        put(36, &self.imm.to_le_bytes());
        put(40, &self.total.to_le_bytes());
        put(44, &self.offset.to_le_bytes());
        put(48, &self.path.tenant.to_le_bytes());
        put(52, &self.stream.to_le_bytes());
        put(56, &self.operands[0].to_le_bytes());
        put(64, &self.operands[1].to_le_bytes());
        put(72, &self.path.sgid);
        put(88, &self.path.dgid);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Self, BadPacket> {
        let header = Self {
            kind: *KINDS.get(usize::from(bytes[4])).ok_or(BadPacket::Kind(bytes[4]))?,
            code: bytes[5],
            flags: u16::from_le_bytes([bytes[6], bytes[7]]),
            len: word(bytes, 0),
            path: Path {
                tenant: word(bytes, 48),
                source_qpn: word(bytes, 12),
                target_qpn: word(bytes, 8),
                sgid: std::array::from_fn(|i| bytes[72 + i]),
                dgid: std::array::from_fn(|i| bytes[88 + i]),
            },
            psn: long(bytes, 16),
            stream: word(bytes, 52),
            total: word(bytes, 40),
            offset: word(bytes, 44),
            remote_addr: long(bytes, 24),
            rkey: word(bytes, 32),
            imm: word(bytes, 36),
            operands: [long(bytes, 56), long(bytes, 64)],
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), BadPacket> {
        let Self { len, offset, total, .. } = *self;
        if u64::from(len) > SEGMENT {
            return Err(BadPacket::Length(len));
        }
        let longest = if self.kind == Kind::Datagram { MAX_DATAGRAM } else { MAX_MESSAGE };
        let inside = u64::from(offset) + u64::from(len) <= u64::from(total);
        if !inside || u64::from(total) > longest {
            return Err(BadPacket::Bounds { len, offset, total });
        }
        Ok(())
    }
}

/// Whether the word for immediate data says something, if only which key ends.
fn uses_imm(opcode: Opcode) -> bool {
    opcode.has_imm() || opcode == Opcode::SendWithInv
}

fn word(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn long(bytes: &[u8; HEADER], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// Bytes of the packet that begins here, once its length has come. What is too long is found out by [`Header::decode`].
#[must_use]
pub fn length(bytes: &[u8]) -> Option<usize> {
    let len = bytes.first_chunk::<4>().map(|len| u32::from_le_bytes(*len))?;
    Some(HEADER.saturating_add(len as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let path = Path { tenant: 3, source_qpn: 0x100, target_qpn: 0x200, sgid: [1; 16], dgid: [2; 16] };
        Header {
            flags: SOLICITED,
            len: 5,
            total: 100,
            offset: 95,
            remote_addr: 1 << 40,
            rkey: 9,
            imm: 8,
            operands: [7, u64::MAX],
            ..Header::new(Kind::Request, 2, &path, 77, 1 << 33)
        }
    }

    #[test]
    fn a_header_comes_back_as_it_was_sent() {
        for kind in KINDS {
            let header = Header { kind, ..header() };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
        assert_eq!(length(&header().encode()), Some(HEADER + 5));
        assert_eq!(length(&[1, 2, 3]), None);
    }

    #[test]
    fn the_queue_of_an_xrc_request_travels_beside_all_that_its_opcode_says() {
        for opcode in Opcode::ALL.iter().copied() {
            let mut header = Header { code: opcode.value() as u8, ..header() };
            let before = header;
            header.set_srqn(opcode, (1 << 22) - 1);
            let read = Header::decode(&header.encode()).unwrap();
            assert_eq!(read.srqn(opcode), (1 << 22) - 1, "{opcode}");
            if opcode.has_imm() || opcode == Opcode::SendWithInv {
                assert_eq!(read.imm, before.imm, "{opcode}");
            } else {
                assert_eq!(read.operands, before.operands, "{opcode}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let decode = |header: Header| Header::decode(&header.encode());
        let long = Header { len: SEGMENT as u32 + 1, total: 1 << 20, offset: 0, ..header() };
        assert_eq!(decode(long), Err(BadPacket::Length(SEGMENT as u32 + 1)));
        let beyond = Header { offset: 96, ..header() };
        assert_eq!(decode(beyond), Err(BadPacket::Bounds { len: 5, offset: 96, total: 100 }));
        let wraps = Header { offset: u32::MAX, ..header() };
        assert!(decode(wraps).is_err());
        let huge = Header { total: MAX_MESSAGE as u32 + 1, ..header() };
        assert!(decode(huge).is_err());
        let datagram = Header { kind: Kind::Datagram, total: MAX_DATAGRAM as u32 + 1, ..header() };
        assert!(decode(datagram).is_err());
        let mut unknown = header().encode();
        unknown[4] = KINDS.len() as u8;
        assert_eq!(Header::decode(&unknown), Err(BadPacket::Kind(KINDS.len() as u8)));
    }
}
