//! Everything two programs must agree on: the C ABI of verbs, the socket protocol, the layout of shared memory.

pub mod ffi;
pub mod proto;
pub mod shm;
pub mod ffi_private;
pub mod verbs;
mod words;
