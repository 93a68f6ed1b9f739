//! What two routers say to each other about a pair of shadow QPs, in the header of a packet.
//!
//! Each shadow has a number of its router's, by which the two ends know that they speak of the same ones.

use super::Grant;
use crate::{
    nic::{Endpoint, Port},
    wire::{
        Path,
        packet::{Header, Kind},
    },
};

/// The sender has the receiver's offer.
const SEEN: u16 = 1;

/// A word about a pair of shadow QPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// There is a shadow, at this end. `seen`: and the receiver's offer is known.
    Offer { seen: bool, end: Endpoint },
    /// The receiver's shadow is heard.
    Heard,
    /// There will be none.
    Decline,
    /// What is this remote key to the NIC?
    Ask(u32),
    /// It is this.
    Grant(u32, Grant),
    /// Nothing.
    Deny(u32),
    /// Nothing any more.
    Revoke(u32),
}

impl Word {
    /// The packet of a word from the sender's shadow `from` to the receiver's `to` (0: any).
    pub(crate) fn encode(&self, path: &Path, from: u32, to: u32) -> Header {
        let code = match self {
            Self::Offer { .. } => 0,
            Self::Heard => 1,
            Self::Decline => 2,
            Self::Ask(_) => 3,
            Self::Grant(..) => 4,
            Self::Deny(_) => 5,
            Self::Revoke(_) => 6,
        };
        let mut header = Header::new(Kind::Shadow, code, path, from, u64::from(to));
        match *self {
            Self::Offer { seen, end: Endpoint { qpn, psn, port } } => {
                header.flags = if seen { SEEN } else { 0 };
                (header.imm, header.rkey) = (qpn, psn);
                header.remote_addr =
                    u64::from(port.lid) | u64::from(port.mtu) << 16 | u64::from(port.dest_rd_atomic) << 24;
                let [low, high] =
                    [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| port.gid[at + i])));
                header.operands = [low, high];
            }
            Self::Ask(rkey) | Self::Deny(rkey) | Self::Revoke(rkey) => header.rkey = rkey,
            Self::Grant(rkey, grant) => {
                (header.rkey, header.imm, header.flags) = (rkey, grant.rkey, grant.access as u16);
                (header.remote_addr, header.operands) = (grant.start, [grant.base, grant.len]);
            }
            Self::Heard | Self::Decline => {}
        }
        header
    }

    /// The word, from which shadow of the sender's and to which of the receiver's. `None`: there is no such word.
    pub(crate) fn decode(header: &Header) -> Option<(Self, u32, u32)> {
        let word = match header.code {
            0 => {
                let mut gid = [0; 16];
                gid[..8].copy_from_slice(&header.operands[0].to_le_bytes());
                gid[8..].copy_from_slice(&header.operands[1].to_le_bytes());
                let port = Port {
                    gid,
                    lid: header.remote_addr as u16,
                    mtu: (header.remote_addr >> 16) as u8,
                    dest_rd_atomic: (header.remote_addr >> 24) as u8,
                };
                let end = Endpoint { qpn: header.imm, psn: header.rkey, port };
                Self::Offer { seen: header.flags & SEEN != 0, end }
            }
            1 => Self::Heard,
            2 => Self::Decline,
            3 => Self::Ask(header.rkey),
            4 => {
                let [base, len] = header.operands;
                let access = header.flags.into();
                Self::Grant(
                    header.rkey,
                    Grant { rkey: header.imm, access, start: header.remote_addr, len, base },
                )
            }
            5 => Self::Deny(header.rkey),
            6 => Self::Revoke(header.rkey),
            _ => return None,
        };
        Some((word, header.stream, header.psn as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::packet::HEADER;

    #[test]
    fn a_word_is_understood_as_it_was_said() {
        let path = Path { tenant: 1, source_qpn: 2, target_qpn: 3, sgid: [4; 16], dgid: [5; 16] };
        let port =
            Port { gid: std::array::from_fn(|i| i as u8 + 1), lid: 0xabcd, mtu: 5, dest_rd_atomic: 16 };
        let end = Endpoint { qpn: 0x11, psn: 0xff_ffff, port };
        let grant = Grant { rkey: 7, access: 7, start: 1 << 50, len: 1 << 33, base: u64::MAX - 5 };
        for word in [
            Word::Offer { seen: false, end },
            Word::Offer { seen: true, end },
            Word::Heard,
            Word::Decline,
            Word::Ask(9),
            Word::Grant(9, grant),
            Word::Deny(9),
            Word::Revoke(9),
        ] {
            let bytes: [u8; HEADER] = word.encode(&path, 0x1234_5678, 0x9abc_def0).encode();
            let header = Header::decode(&bytes).unwrap();
            assert_eq!(Word::decode(&header), Some((word, 0x1234_5678, 0x9abc_def0)));
        }
        let mut other = Word::Heard.encode(&path, 1, 2);
        other.code = 7;
        assert_eq!(Word::decode(&other), None);
    }
}
