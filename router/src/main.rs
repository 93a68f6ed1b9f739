//! The `freeflow` program.
fn main() {}
