//! rdma_cm: what librdmacm writes to its device, answered by the router's connection manager.
//!
//! librdmacm talks to the kernel by `write` alone: a command, in which a pointer says where the reply goes. [`decode`]
//! turns a command of either dialect into one for the router, [`encode`] the answer into the reply; [`manager`] is
//! the connection that carries both, one a process. Where the process has devices of the kernel as well, [`beside`]
//! tells whose an id is and [`kernel`] passes what is the kernel's. Leaves to others: whose calls come here (`hooks::rdmacm`), and
//! everything that a command means (the router).

mod beside;
mod bytes;
mod decode;
mod encode;
mod kernel;
mod manager;
mod removal;

pub(crate) use kernel::NODE;
pub(crate) use manager::{Manager, adopt};

#[cfg(test)]
mod tests;
