//! The `freeflow` program.
//!
//! Does: hand over to the command line. Leaves to others: everything.
mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
