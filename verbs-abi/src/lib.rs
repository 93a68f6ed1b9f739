//! Everything two programs must agree on: the C ABI of verbs, the socket protocol, the layout of shared memory.

pub mod ffi;
#[cfg(test)]
mod ffi_layout;
pub mod ffi_private;
pub mod ids;
pub mod proto;
pub mod qp_attr;
pub mod qp_state;
pub mod shm;
pub mod timer;
pub mod verbs;
mod words;
