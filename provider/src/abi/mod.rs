//! The private side of libibverbs: what no installed header tells and a provider must know all the same.
//!
//! [`layout`] knows the shape of the ops table and its neighbours in every release from 25 to 65, [`elf`] reads
//! objects that the dynamic linker has loaded, [`library`] finds libibverbs among them and takes its private
//! functions, [`edge`] is what Rust code called from C is wrapped in. Registering the device is
//! [`crate::device`]'s work, rewriting imports [`crate::got`]'s.

pub(crate) mod edge;
pub(crate) mod elf;
pub(crate) mod layout;
pub(crate) mod library;
