//! The tier for kernels that have RDMA: hosts whose kernel enumerates real devices beside `ff0`.

mod common;

use std::process::ExitCode;

fn main() -> ExitCode {
    common::run("vm", Some("no test of this tier yet".to_owned()), Vec::new)
}
