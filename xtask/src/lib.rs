//! What the developer's front door and the whole-system tests share: the install tree, a router for a while,
//! network namespaces, virtual machines, stock tools run as a server and a client with a time limit, and rdma-core's
//! own tests.
//!
//! Does: start, watch and stop processes, and read what perftest prints. Leaves to others: what is asserted
//! (`tests/`), and what a developer asks for (the `xtask` program).

#![forbid(unsafe_code)]

pub mod bed;
pub mod conformance;
pub mod etcd;
pub mod figures;
pub mod headers;
pub mod hosts;
pub mod huge_pages;
pub mod interrupt;
pub mod matrix;
pub mod netns;
pub mod perftest;
pub mod process;
pub mod reference;
pub mod router;
pub mod tree;
pub mod vm;
pub mod wake;
