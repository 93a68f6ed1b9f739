//! The socket protocol between a client and its router.
//!
//! One `SOCK_SEQPACKET` connection for each opened device. The client sends a [`Request`], the router answers
//! with one [`Reply`]; nothing else travels. Messages are postcard, at most [`MAX_MESSAGE`] bytes, with at most
//! [`MAX_FDS`] descriptors. The first request is [`Request::Hello`] (or, from the command line,
//! [`Request::Status`]). Closing the connection ends the client and frees all it had.

pub mod cm;
pub mod endpoint;
pub mod message;

pub use endpoint::{Endpoint, ProtoError};
pub use message::*;

/// Bytes of the longest message.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Descriptors with one message.
pub const MAX_FDS: usize = 8;
