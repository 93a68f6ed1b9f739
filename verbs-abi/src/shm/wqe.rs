//! Work requests as they lie in the queues, in 64-byte blocks.
//!
//! ```text
//! send, first block
//!  0 wr_id                     8 opcode | flags | blocks | num_sge | imm or invalidated key
//! 16 remote address           24 rkey | inline length (10 bits) | SRQ number (22 bits, XRC)
//! 32 first SGE (address, length | lkey), or up to 16 inline bytes
//! 48 compare/add, swap; UD: remote QPN | Q_Key
//! UD only: an address block: dgid (16), sgid index | hop limit | traffic class | flow label
//! then: further SGEs, four a block; or longer inline data
//!
//! receive: 0 wr_id  8 num_sge  16 three SGEs; then four SGEs a block
//! ```
//!
//! Encoding is the provider's, decoding the seat's. Decoding trusts nothing: the block is already a private copy.

use super::BLOCK;

/// SGEs in one WR.
pub const MAX_SGE: usize = 32;
/// Inline bytes in one WR.
pub const MAX_INLINE: usize = 512;
/// WRs in one queue.
pub const MAX_WR: u32 = 16_384;

/// Bits of an SRQ's number.
pub const SRQN_BITS: u32 = 22;

const INLINE_IN_FIRST: usize = 16;
const INLINE_BITS: u32 = 32 - SRQN_BITS;
const _: () = assert!(MAX_INLINE < 1 << INLINE_BITS);

/// One scatter/gather element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sge {
    /// Address, as the MR's users name it.
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// Local key.
    pub lkey: u32,
}

impl Sge {
    #[inline]
    fn words(self) -> [u64; 2] {
        [self.addr, u64::from(self.lkey) << 32 | u64::from(self.length)]
    }

    #[inline]
    fn from_words(words: [u64; 2]) -> Self {
        Self { addr: words[0], length: words[1] as u32, lkey: (words[1] >> 32) as u32 }
    }
}

/// Flags of a send WQE. The low four are `enum ibv_send_flags`.
pub mod flag {
    /// Order after earlier reads and atomics.
    pub const FENCE: u8 = 1;
    /// Write a completion.
    pub const SIGNALED: u8 = 2;
    /// Raise a solicited event at the peer.
    pub const SOLICITED: u8 = 4;
    /// Payload lies in the WQE.
    pub const INLINE: u8 = 8;
    /// An address block follows (UD).
    pub const ADDRESS: u8 = 1 << 7;
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// Destination GID.
    pub dgid: [u8; 16],
    /// Index of the source GID.
    pub sgid_index: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Destination QP number.
    pub qpn: u32,
    /// Q_Key to put on the datagram.
    pub qkey: u32,
}

/// A send work request, copied out of the queue.
#[derive(Clone)]
pub struct SendWqe {
    /// The application's id.
    pub wr_id: u64,
    /// `enum ibv_wr_opcode`, unchecked.
    pub opcode: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Blocks it occupies.
    pub blocks: u8,
    /// Immediate data as the wire carries it, or the key to invalidate.
    pub imm: u32,
    /// Remote address of RDMA and atomics.
    pub remote_addr: u64,
    /// Remote key of RDMA and atomics.
    pub rkey: u32,
    /// The receiver's SRQ (XRC).
    pub srqn: u32,
    /// Compare or add operand.
    pub compare_add: u64,
    /// Swap operand.
    pub swap: u64,
    /// Datagram destination, when [`flag::ADDRESS`] is set.
    pub address: Address,
    num_sge: u8,
    inline_len: u16,
    sges: [Sge; MAX_SGE],
    inline: [u8; MAX_INLINE],
}

impl std::fmt::Debug for SendWqe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendWqe")
            .field("wr_id", &self.wr_id)
            .field("opcode", &self.opcode)
            .field("flags", &self.flags)
            .field("sges", &self.sges())
            .field("inline_len", &self.inline_len)
            .finish_non_exhaustive()
    }
}

/// A receive work request, copied out of the queue.
#[derive(Clone, Debug)]
pub struct RecvWqe {
    /// The application's id.
    pub wr_id: u64,
    num_sge: u8,
    sges: [Sge; MAX_SGE],
}

/// A send work request whose payload is one piece, as most are: all that executing it takes, without the lists.
#[derive(Clone, Copy, Debug)]
pub struct Single<'a> {
    /// The application's id.
    pub wr_id: u64,
    /// `enum ibv_wr_opcode`, unchecked.
    pub opcode: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Immediate data as the wire carries it.
    pub imm: u32,
    /// Remote address.
    pub remote_addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// What it moves.
    pub payload: Payload<'a>,
}

/// The one piece of payload.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// Carried by the work request.
    Inline(&'a [u8]),
    /// Memory of the application.
    Memory(Sge),
}

impl Payload<'_> {
    /// Bytes of it.
    #[inline]
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Memory(sge) => sge.length.into(),
        }
    }

    /// Whether there is none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Room for the inline bytes of a [`Single`] that is read from a block.
pub type InlineRoom = [u8; INLINE_IN_FIRST];

impl<'a> Single<'a> {
    /// The work request of a block that is a private copy, if it is whole and has one piece of payload.
    #[inline]
    #[must_use]
    pub fn of_block(block: &[u64; 8], room: &'a mut InlineRoom) -> Option<Self> {
        const SHAPE: u64 = 0xffff_0000 | (flag::ADDRESS as u64) << 8;
        let (num_sge, blocks) = (1 << 24, 1 << 16);
        let (inline, srqn) = (block[3] >> 32 & ((1 << INLINE_BITS) - 1), block[3] >> (32 + INLINE_BITS));
        let is_inline = block[1] >> 8 & u64::from(flag::INLINE) != 0;
        let payload = match block[1] & SHAPE {
            shape if shape == blocks && is_inline && inline <= INLINE_IN_FIRST as u64 => {
                room[..8].copy_from_slice(&block[4].to_le_bytes());
                room[8..].copy_from_slice(&block[5].to_le_bytes());
                Payload::Inline(&room[..inline as usize])
            }
            shape if shape == blocks | num_sge && !is_inline => {
                Payload::Memory(Sge::from_words([block[4], block[5]]))
            }
            _ => return None,
        };
        (srqn == 0).then_some(Self {
            wr_id: block[0],
            opcode: block[1] as u8,
            flags: (block[1] >> 8) as u8,
            imm: (block[1] >> 32) as u32,
            remote_addr: block[2],
            rkey: block[3] as u32,
            payload,
        })
    }
}

/// What an owner published is not a WQE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadWqe {
    /// More published than the queue holds.
    #[error("queue tail is {ahead} ahead of a queue of {capacity}")]
    Tail {
        /// Distance from head to tail.
        ahead: u64,
        /// What the queue holds.
        capacity: u32,
    },
    /// Block count, SGE count or inline length cannot be.
    #[error("work request with {blocks} blocks, {num_sge} SGEs, {inline} inline bytes is malformed")]
    Shape {
        /// Blocks claimed.
        blocks: u8,
        /// SGEs claimed.
        num_sge: u8,
        /// Inline bytes claimed.
        inline: u32,
    },
}

/// Blocks of a send WQE with up to `num_sge` SGEs or `inline` bytes, address block included.
#[must_use]
pub fn send_blocks(num_sge: usize, inline: usize) -> usize {
    2 + body_blocks(num_sge, 0).max(body_blocks(0, inline))
}

/// Blocks of a receive entry with up to `num_sge` SGEs.
#[must_use]
pub fn recv_blocks(num_sge: usize) -> usize {
    1 + num_sge.saturating_sub(3).div_ceil(4)
}

#[inline]
fn body_blocks(num_sge: usize, inline: usize) -> usize {
    let inline = if inline > INLINE_IN_FIRST { inline.div_ceil(BLOCK) } else { 0 };
    num_sge.saturating_sub(1).div_ceil(4).max(inline)
}

impl Default for SendWqe {
    fn default() -> Self {
        Self {
            wr_id: 0,
            opcode: 0,
            flags: 0,
            blocks: 0,
            imm: 0,
            remote_addr: 0,
            rkey: 0,
            srqn: 0,
            compare_add: 0,
            swap: 0,
            address: Address::default(),
            num_sge: 0,
            inline_len: 0,
            sges: [Sge::default(); MAX_SGE],
            inline: [0; MAX_INLINE],
        }
    }
}

impl SendWqe {
    /// The gather list (empty for inline payload).
    #[inline]
    #[must_use]
    pub fn sges(&self) -> &[Sge] {
        &self.sges[..self.num_sge as usize]
    }

    /// The inline payload, if the WQE carries one.
    #[inline]
    #[must_use]
    pub fn inline(&self) -> Option<&[u8]> {
        (self.flags & flag::INLINE != 0).then(|| &self.inline[..self.inline_len as usize])
    }

    /// The same work request, if its payload is one piece.
    #[inline]
    #[must_use]
    pub fn single(&self) -> Option<Single<'_>> {
        let payload = match self.inline() {
            Some(bytes) => Payload::Inline(bytes),
            None if self.num_sge == 1 => Payload::Memory(self.sges[0]),
            None => return None,
        };
        (self.flags & flag::ADDRESS == 0 && self.srqn == 0).then_some(Single {
            wr_id: self.wr_id,
            opcode: self.opcode,
            flags: self.flags,
            imm: self.imm,
            remote_addr: self.remote_addr,
            rkey: self.rkey,
            payload,
        })
    }

    /// Bytes of payload.
    #[inline]
    #[must_use]
    pub fn length(&self) -> u64 {
        match self.inline() {
            Some(data) => data.len() as u64,
            None => self.sges().iter().map(|sge| u64::from(sge.length)).sum(),
        }
    }

    /// Adds an SGE. False: too many.
    #[inline]
    pub fn push_sge(&mut self, sge: Sge) -> bool {
        let fits = (self.num_sge as usize) < MAX_SGE;
        if fits {
            self.sges[self.num_sge as usize] = sge;
            self.num_sge += 1;
        }
        fits
    }

    /// Room for `len` inline bytes, or `None` when that is more than [`MAX_INLINE`]. Sets the flag.
    #[inline]
    pub fn inline_mut(&mut self, len: usize) -> Option<&mut [u8]> {
        let room = self.inline.get_mut(..len)?;
        self.flags |= flag::INLINE;
        self.inline_len = len as u16;
        Some(room)
    }

    /// Makes an empty WQE of this value without touching its arrays.
    #[inline]
    pub fn reset(&mut self) {
        self.flags = 0;
        self.srqn = 0;
        self.num_sge = 0;
        self.inline_len = 0;
    }

    /// Writes the blocks through `write` and returns how many there are.
    #[inline]
    pub fn encode(&self, mut write: impl FnMut(u64, &[u64; 8])) -> u64 {
        if self.num_sge == 1 && self.flags & (flag::INLINE | flag::ADDRESS) == 0 {
            write(0, &self.first_block(1 | 1 << 8, 0, self.sges[0].words(), [self.compare_add, self.swap]));
            return 1;
        }
        let inline = self.inline();
        let has_address = self.flags & flag::ADDRESS != 0;
        let num_sge = if inline.is_some() { 0 } else { self.num_sge as usize };
        let inline_len = inline.map_or(0, <[u8]>::len);
        let blocks = 1 + u64::from(has_address) + body_blocks(num_sge, inline_len) as u64;
        let operands = if has_address {
            [u64::from(self.address.qkey) << 32 | u64::from(self.address.qpn), 0]
        } else {
            [self.compare_add, self.swap]
        };
        let payload = match inline {
            Some(data) if data.len() <= INLINE_IN_FIRST => inline_words(data),
            Some(_) => [0; 2],
            None if num_sge > 0 => self.sges[0].words(),
            None => [0; 2],
        };
        let shape = blocks | (num_sge as u64) << 8;
        write(0, &self.first_block(shape, inline_len as u64, payload, operands));
        let mut at = 1;
        if has_address {
            write(at, &self.address_block());
            at += 1;
        }
        if inline_len > INLINE_IN_FIRST {
            for chunk in self.inline[..inline_len].chunks(BLOCK) {
                write(at, &byte_block(chunk));
                at += 1;
            }
        }
        for chunk in self.sges[..num_sge].get(1..).unwrap_or(&[]).chunks(4) {
            write(at, &sge_block(chunk, 0));
            at += 1;
        }
        debug_assert_eq!(at, blocks);
        blocks
    }

    /// The first block of a WQE whose shape is its blocks, and SGEs above.
    #[inline]
    fn first_block(&self, shape: u64, inline_len: u64, payload: [u64; 2], operands: [u64; 2]) -> [u64; 8] {
        let shape = u64::from(self.opcode) | u64::from(self.flags) << 8 | shape << 16;
        [
            self.wr_id,
            shape | u64::from(self.imm) << 32,
            self.remote_addr,
            u64::from(self.rkey) | (inline_len | u64::from(self.srqn) << INLINE_BITS) << 32,
            payload[0],
            payload[1],
            operands[0],
            operands[1],
        ]
    }

    /// Reads a WQE of at most `available` blocks through `read`; a private copy from then on.
    ///
    /// # Errors
    /// [`BadWqe::Shape`].
    #[inline]
    pub fn decode(&mut self, available: u64, read: impl Fn(u64) -> [u64; 8]) -> Result<(), BadWqe> {
        let first = read(0);
        self.wr_id = first[0];
        self.opcode = first[1] as u8;
        self.flags = (first[1] >> 8) as u8;
        self.blocks = (first[1] >> 16) as u8;
        self.imm = (first[1] >> 32) as u32;
        self.remote_addr = first[2];
        self.rkey = first[3] as u32;
        let num_sge = (first[1] >> 24) as u8;
        let inline = (first[3] >> 32) as u32 & ((1 << INLINE_BITS) - 1);
        self.srqn = (first[3] >> (32 + INLINE_BITS)) as u32;
        let is_inline = self.flags & flag::INLINE != 0;
        let has_address = self.flags & flag::ADDRESS != 0;
        let bad = BadWqe::Shape { blocks: self.blocks, num_sge, inline };
        if num_sge as usize > MAX_SGE || inline as usize > MAX_INLINE || is_inline && num_sge != 0 {
            return Err(bad);
        }
        let body = body_blocks(num_sge as usize, if is_inline { inline as usize } else { 0 });
        let expected = 1 + u64::from(has_address) + body as u64;
        if u64::from(self.blocks) != expected || expected > available {
            return Err(bad);
        }
        self.num_sge = num_sge;
        self.inline_len = if is_inline { inline as u16 } else { 0 };
        (self.compare_add, self.swap) = (first[6], first[7]);
        if has_address {
            self.read_address(&first, &read(1));
        }
        let body_at = 1 + u64::from(has_address);
        if is_inline {
            self.read_inline(&first, |i| read(body_at + i));
        } else if num_sge > 0 {
            self.sges[0] = Sge::from_words([first[4], first[5]]);
            for i in 1..num_sge as usize {
                if (i - 1) % 4 == 0 {
                    let block = read(body_at + (i as u64 - 1) / 4);
                    read_sges(&block, 0, &mut self.sges[i..(i + 4).min(num_sge as usize)]);
                }
            }
        }
        Ok(())
    }

    fn address_block(&self) -> [u64; 8] {
        let gid = self.address.dgid;
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| gid[at + i]));
        let route = u64::from(self.address.sgid_index)
            | u64::from(self.address.hop_limit) << 8
            | u64::from(self.address.traffic_class) << 16
            | u64::from(self.address.flow_label) << 32;
        [half(0), half(8), route, 0, 0, 0, 0, 0]
    }

    fn read_address(&mut self, first: &[u64; 8], block: &[u64; 8]) {
        let mut dgid = [0; 16];
        dgid[..8].copy_from_slice(&block[0].to_le_bytes());
        dgid[8..].copy_from_slice(&block[1].to_le_bytes());
        self.address = Address {
            dgid,
            sgid_index: block[2] as u8,
            hop_limit: (block[2] >> 8) as u8,
            traffic_class: (block[2] >> 16) as u8,
            flow_label: (block[2] >> 32) as u32,
            qpn: first[6] as u32,
            qkey: (first[6] >> 32) as u32,
        };
    }

    fn read_inline(&mut self, first: &[u64; 8], read: impl Fn(u64) -> [u64; 8]) {
        let len = self.inline_len as usize;
        if len <= INLINE_IN_FIRST {
            self.inline[..8].copy_from_slice(&first[4].to_le_bytes());
            self.inline[8..16].copy_from_slice(&first[5].to_le_bytes());
            return;
        }
        for (i, chunk) in self.inline[..len].chunks_mut(BLOCK).enumerate() {
            let block = read(i as u64);
            for (word, bytes) in block.iter().zip(chunk.chunks_mut(8)) {
                bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            }
        }
    }
}

impl Default for RecvWqe {
    fn default() -> Self {
        Self { wr_id: 0, num_sge: 0, sges: [Sge::default(); MAX_SGE] }
    }
}

impl RecvWqe {
    /// The scatter list.
    #[inline]
    #[must_use]
    pub fn sges(&self) -> &[Sge] {
        &self.sges[..self.num_sge as usize]
    }

    /// The id and the SGE of a receive whose first block this is, if it has one SGE.
    #[inline]
    pub(super) fn single(first: &[u64; 8]) -> Option<(u64, Sge)> {
        (first[1] == 1).then(|| (first[0], Sge::from_words([first[2], first[3]])))
    }

    /// Writes a receive WQE through `write`; `sges` fit the entry (the caller checked `max_recv_sge`).
    pub fn encode(wr_id: u64, sges: &[Sge], mut write: impl FnMut(usize, &[u64; 8])) {
        let mut first = sge_block(&sges[..sges.len().min(3)], 1);
        first[0] = wr_id;
        first[1] = sges.len() as u64;
        write(0, &first);
        for (i, chunk) in sges.get(3..).unwrap_or(&[]).chunks(4).enumerate() {
            write(1 + i, &sge_block(chunk, 0));
        }
    }

    /// Reads a receive WQE of `stride` blocks through `read`.
    ///
    /// # Errors
    /// [`BadWqe::Shape`].
    #[inline]
    pub fn decode(&mut self, stride: usize, read: impl Fn(usize) -> [u64; 8]) -> Result<(), BadWqe> {
        let first = read(0);
        let num_sge = first[1] as usize;
        if num_sge > MAX_SGE || recv_blocks(num_sge) > stride {
            return Err(BadWqe::Shape { blocks: stride as u8, num_sge: first[1] as u8, inline: 0 });
        }
        self.wr_id = first[0];
        self.num_sge = num_sge as u8;
        read_sges(&first, 1, &mut self.sges[..num_sge.min(3)]);
        for from in (3..num_sge).step_by(4) {
            read_sges(&read(1 + (from - 3) / 4), 0, &mut self.sges[from..num_sge.min(from + 4)]);
        }
        Ok(())
    }
}

/// A block with `sges` from SGE slot `slot` on.
fn sge_block(sges: &[Sge], slot: usize) -> [u64; 8] {
    let mut block = [0; 8];
    for (i, sge) in sges.iter().enumerate() {
        block[(slot + i) * 2..][..2].copy_from_slice(&sge.words());
    }
    block
}

fn read_sges(block: &[u64; 8], slot: usize, into: &mut [Sge]) {
    for (i, sge) in into.iter_mut().enumerate() {
        *sge = Sge::from_words([block[(slot + i) * 2], block[(slot + i) * 2 + 1]]);
    }
}

fn inline_words(data: &[u8]) -> [u64; 2] {
    let mut bytes = [0; INLINE_IN_FIRST];
    bytes[..data.len()].copy_from_slice(data);
    let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    [half(0), half(8)]
}

fn byte_block(chunk: &[u8]) -> [u64; 8] {
    let mut bytes = [0; BLOCK];
    bytes[..chunk.len()].copy_from_slice(chunk);
    std::array::from_fn(|word| u64::from_le_bytes(std::array::from_fn(|i| bytes[word * 8 + i])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(wqe: &SendWqe) -> SendWqe {
        let mut blocks = Vec::new();
        let count = wqe.encode(|i, block| {
            assert_eq!(i as usize, blocks.len());
            blocks.push(*block);
        });
        assert_eq!(count as usize, blocks.len());
        let mut read = SendWqe::default();
        read.decode(count, |i| blocks[i as usize]).unwrap();
        read
    }

    #[test]
    fn a_send_with_every_number_of_sges_survives_the_queue() {
        for count in 0..=MAX_SGE {
            let mut wqe =
                SendWqe { wr_id: 9, opcode: 2, imm: 3, rkey: 4, remote_addr: 5, ..SendWqe::default() };
            for i in 0..count {
                assert!(wqe.push_sge(Sge { addr: i as u64, length: 100 + i as u32, lkey: 7 }));
            }
            let read = round_trip(&wqe);
            assert_eq!(read.sges(), wqe.sges());
            assert_eq!((read.wr_id, read.opcode, read.imm, read.rkey, read.remote_addr), (9, 2, 3, 4, 5));
            assert!(read.blocks as usize <= send_blocks(count, 0));
        }
    }

    #[test]
    fn a_work_request_of_one_piece_is_the_same_without_its_lists() {
        let filled =
            || SendWqe { wr_id: 9, opcode: 2, imm: 3, rkey: 4, remote_addr: 5, ..SendWqe::default() };
        let block_of = |wqe: &SendWqe| {
            let mut first = None;
            wqe.encode(|i, block| first = first.or((i == 0).then_some(*block)));
            first.unwrap()
        };
        let mut inline = filled();
        inline.inline_mut(11).unwrap().copy_from_slice(b"one, inline");
        let mut one = filled();
        one.push_sge(Sge { addr: 6, length: 7, lkey: 8 });
        for wqe in [&inline, &one] {
            let mut room = InlineRoom::default();
            let block = block_of(wqe);
            let (single, read) = (wqe.single().unwrap(), Single::of_block(&block, &mut room).unwrap());
            assert_eq!(format!("{single:?}"), format!("{read:?}"));
            assert_eq!((read.wr_id, read.opcode, read.imm, read.rkey, read.remote_addr), (9, 2, 3, 4, 5));
            assert_eq!(read.payload.len(), wqe.length());
        }
        let mut two = one.clone();
        two.push_sge(Sge::default());
        let mut long = filled();
        long.inline_mut(INLINE_IN_FIRST + 1).unwrap();
        let xrc = SendWqe { srqn: 1, ..one.clone() };
        let datagram = SendWqe { flags: flag::ADDRESS, ..one.clone() };
        for wqe in [&filled(), &two, &long, &xrc, &datagram] {
            let mut room = InlineRoom::default();
            assert!(Single::of_block(&block_of(wqe), &mut room).is_none(), "{wqe:?}");
            assert_eq!(wqe.single().is_some(), wqe.inline().is_some(), "{wqe:?}");
        }
    }

    #[test]
    fn inline_data_of_every_length_survives_the_queue() {
        for len in 0..=MAX_INLINE {
            let mut wqe = SendWqe { srqn: (1 << SRQN_BITS) - 1, rkey: u32::MAX, ..SendWqe::default() };
            for (i, byte) in wqe.inline_mut(len).unwrap().iter_mut().enumerate() {
                *byte = i as u8 ^ 0x5a;
            }
            let read = round_trip(&wqe);
            assert_eq!(read.inline(), wqe.inline());
            assert_eq!((read.srqn, read.rkey), (wqe.srqn, wqe.rkey));
            assert!(read.blocks as usize <= send_blocks(0, len));
        }
        assert!(SendWqe::default().inline_mut(MAX_INLINE + 1).is_none());
    }

    #[test]
    fn a_datagram_keeps_its_address() {
        let address = Address {
            dgid: std::array::from_fn(|i| i as u8),
            sgid_index: 2,
            hop_limit: 64,
            traffic_class: 1,
            flow_label: 0xfffff,
            qpn: 0x123456,
            qkey: 0x1111_1111,
        };
        let mut wqe = SendWqe { flags: flag::ADDRESS, address, ..SendWqe::default() };
        wqe.push_sge(Sge { addr: 1, length: 2, lkey: 3 });
        let read = round_trip(&wqe);
        assert_eq!(read.address, address);
        assert_eq!(read.sges(), wqe.sges());
    }

    #[test]
    fn a_malformed_send_is_refused() {
        let mut wqe = SendWqe::default();
        let refuse = |wqe: &mut SendWqe, word: u64, available| {
            wqe.decode(available, |_| [0, word, 0, 0, 0, 0, 0, 0]).is_err()
        };
        assert!(refuse(&mut wqe, 0, 9), "no blocks");
        assert!(refuse(&mut wqe, 1 << 16 | 33 << 24, 9), "33 SGEs");
        assert!(refuse(&mut wqe, 2 << 16 | 2 << 24, 1), "more blocks than published");
        assert!(refuse(&mut wqe, 1 << 16 | 2 << 24, 9), "fewer blocks than its SGEs need");
        assert!(!refuse(&mut wqe, 1 << 16 | 1 << 24, 1));
    }

    #[test]
    fn a_receive_with_every_number_of_sges_survives_the_queue() {
        for count in 0..=MAX_SGE {
            let sges: Vec<_> = (0..count).map(|i| Sge { addr: i as u64, length: 1, lkey: 2 }).collect();
            let mut blocks = vec![[0; 8]; recv_blocks(count)];
            RecvWqe::encode(77, &sges, |i, block| blocks[i] = *block);
            let mut read = RecvWqe::default();
            read.decode(blocks.len(), |i| blocks[i]).unwrap();
            assert_eq!(read.sges(), sges);
            assert_eq!(read.wr_id, 77);
            if count > 3 {
                assert!(read.decode(1, |i| blocks[i]).is_err());
            }
        }
    }
}
