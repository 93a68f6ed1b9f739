//! Requests between QPs of two hosts, free of I/O: what travels, in which order, and what is done when it does not
//! arrive.
//!
//! ```text
//!   SQ --> Initiator --(requests)--> Outbox ==link==> Target --> Responder
//!             ^                                         |
//!             +--------(acks, data, results)--- Outbox -+
//! ```
//!
//! Each packet of a QP has a sequence number. The target executes them in that order, each exactly once, and says up
//! to where it has come; what it did not say is sent again when the link was lost or the time is up. A link delivers
//! in order or is lost, so numbers are missing only where a target had to drop something. Nothing is kept for being
//! sent again: payload is read from registered memory anew, and results of atomics are remembered.
//! Leaves to others: bytes on a socket and who the peers are (the host), turns and timers (`fabric`).

mod delay;
mod initiator;
mod line;
mod load;
mod outbox;
pub mod packet;
mod target;

pub(crate) use delay::Delay;
pub(crate) use initiator::{Emit, Initiator, Located, Place, Reaped};
pub(crate) use load::Late;
pub use load::{Load, Piece, Pieces};
pub(crate) use outbox::{Condition, Outbox};
pub(crate) use target::{Outcome, Target};

/// Payload of one packet, bytes: what one turn moves.
pub const SEGMENT: u64 = if cfg!(fuzzing) { 512 } else { 32 * 1024 };
/// Payload of at least so many bytes is not copied on its way: it stays where it is until the socket takes it, and is
/// read from the socket to where it belongs. Less is as quickly copied.
pub const LATE: u64 = if cfg!(fuzzing) { 64 } else { 4096 };
/// The last bytes of payload that is read to where it belongs: programs look at them to see that all is there, so they
/// come last, when all has been checked.
pub const TAIL: usize = 8;
/// Packets of a QP that may be unacknowledged.
const WINDOW: u64 = 64;

/// The two ends of a connection, as every packet names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    /// The sender's tenant, as the sender numbers it.
    pub(crate) tenant: u32,
    pub(crate) source_qpn: u32,
    pub(crate) target_qpn: u32,
    pub(crate) sgid: [u8; 16],
    pub(crate) dgid: [u8; 16],
}
