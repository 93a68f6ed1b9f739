//! Promise: registered memory stays the program's own, wherever its pages have been moved to.
//!
//! The checks are the probe's (`tests/probe/checks/memory.rs`).

mod common;

use std::process::ExitCode;

use common::{Stage, probe};
use xtask::bed::Bed;

fn main() -> ExitCode {
    common::run("memory", common::no_tree(), || {
        let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
        probe::checks(&stage, |check| check.starts_with("memory "))
    })
}
