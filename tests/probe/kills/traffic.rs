//! The layout of both ends' buffers, and the stream of requests that a victim sends.
//!
//! Message n is preceded by a FETCH_AND_ADD on the receiver's counter when n is a multiple of [`ADD_EVERY`]; then it
//! goes as one of three kinds by turns. It carries its number, and payload with a checksum: nothing may arrive twice,
//! half, or out of order.

use crate::buffer::Buffer;

/// A FETCH_AND_ADD goes before every so many messages.
pub(crate) const ADD_EVERY: u64 = 4;
/// Receives posted; so many messages can be under way.
pub(crate) const RECEIVES: u64 = 24;
/// Places that WRITEs go to; more than can be under way.
pub(crate) const SLOTS: u64 = 64;
/// Bytes of a slot.
pub(crate) const SLOT: usize = 2048;

/// The receiver's counter.
pub(crate) const COUNTER: usize = 0;
/// The receiver's word for CMP_AND_SWP.
pub(crate) const LATCH: usize = 64;
/// Where own atomics and READs put what they found.
pub(crate) const FOUND: usize = 4096;
/// What peers READ: a payload that never changes.
pub(crate) const TEXT: usize = 8192;
/// Where receives go.
pub(crate) const RECEIVE_AREA: usize = 64 << 10;
/// Where WRITEs of the peer go.
pub(crate) const WRITE_AREA: usize = 256 << 10;
/// What own messages are made of.
pub(crate) const SEND_AREA: usize = 448 << 10;
/// Bytes of a buffer.
pub(crate) const LEN: usize = 704 << 10;

/// How a message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// SEND of the payload.
    Send,
    /// WRITE_WITH_IMM of the payload into its slot.
    WriteWithImm,
    /// WRITE into its slot, unsignaled, and an empty SEND_WITH_IMM after it.
    WriteThenSend,
}

pub(crate) fn kind(number: u64) -> Kind {
    match number % 3 {
        0 => Kind::Send,
        1 => Kind::WriteWithImm,
        _ => Kind::WriteThenSend,
    }
}

/// The place of message n in an area of slots.
pub(crate) fn slot(area: usize, number: u64) -> usize {
    area + (number % SLOTS) as usize * SLOT
}

/// The length of message n: 24 bytes to a slot, unaligned ones among them.
pub(crate) fn length(number: u64) -> usize {
    24 + (number.wrapping_mul(2_654_435_761) % (SLOT as u64 - 23)) as usize
}

/// Writes message n: its number, a checksum, and bytes that both follow from it.
pub(crate) fn compose(buffer: &Buffer, at: usize, number: u64) {
    let len = length(number);
    let mut bytes = vec![0; len];
    fill(&mut bytes[16..], number);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    let sum = checksum(&bytes[16..]);
    bytes[8..16].copy_from_slice(&sum.to_le_bytes());
    buffer.write(at, &bytes);
}

/// The number of the message at a place; `None` where it is not whole.
pub(crate) fn recognise(buffer: &Buffer, at: usize, len: usize) -> Option<u64> {
    let bytes = buffer.read(at, len);
    let (number, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, payload) = rest.split_first_chunk::<8>()?;
    let number = u64::from_le_bytes(*number);
    let whole = length(number) == len && checksum(payload) == u64::from_le_bytes(*sum);
    whole.then_some(number)
}

fn fill(bytes: &mut [u8], number: u64) {
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (number as usize).wrapping_mul(31).wrapping_add(at.wrapping_mul(7)) as u8;
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// FETCH_AND_ADDs that go before or with message n.
pub(crate) fn adds_up_to(number: u64) -> u64 {
    number / ADD_EVERY + 1
}
