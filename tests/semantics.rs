//! Promise: to a verbs program the device behaves as the InfiniBand specification and the man pages say, whoever
//! executes its work requests.
//!
//! The checks are the probe's (`tests/probe/checks`), two opened devices in one process.

mod common;

use std::process::ExitCode;

use common::{Stage, probe};
use xtask::bed::Bed;

fn main() -> ExitCode {
    common::run("semantics", common::no_tree(), || {
        let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
        probe::checks(&stage, |check| !check.starts_with("memory ") && !check.starts_with("rdma_cm "))
    })
}
