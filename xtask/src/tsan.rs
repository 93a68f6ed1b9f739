//! `cargo xtask tsan`: tests in which threads meet, under ThreadSanitizer.
//!
//! The stable compiler has the sanitizer behind a switch for unstable options. Only our code and that of our
//! dependencies is compiled with it: the standard library stays as it is shipped, which `tsan.supp` allows for. The
//! tests run one at a time, so that what is found belongs to the test that is named last. A thread is joined, also within
//! a scope, whose own end the sanitizer does not see.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    build::cargo,
    fuzz::{host, target_directory},
    workspace,
};

/// Where threads meet: the crate, and words of which a test's name contains one.
const TESTS: [(&str, &[&str]); 3] = [
    ("verbs-abi", &["shm::"]),
    ("engine", &["place::"]),
    ("provider", &["lock::", "hooks::", "poll::", "post::"]),
];
const COMPILER_OPTIONS: [&str; 2] = ["-Zsanitizer=thread", "-Cunsafe-allow-abi-mismatch=sanitizer"];

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The crates; all where threads meet when none is named
    #[arg(value_parser = TESTS.map(|(name, _)| name))]
    crates: Vec<String>,
    /// Run the tests whose name contains this, in place of those where threads meet
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let wanted = |name: &str| options.crates.is_empty() || options.crates.iter().any(|other| other == name);
    for (name, words) in TESTS.into_iter().filter(|(name, _)| wanted(name)) {
        let filter = options.filter.as_deref();
        run(name, filter.as_ref().map_or(words, std::slice::from_ref))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the tests of a crate. What the sanitizer finds ends the program with its own exit code.
fn run(package: &str, words: &[&str]) -> Result<()> {
    println!("== tsan {package} ==");
    let suppressions = workspace().join("xtask/src/tsan.supp");
    let mut command = cargo();
    command.args(["test", "--package", package, "--lib"]);
    // With a target named, build scripts and macros are compiled as ever.
    command.args(["--target", &host()?]).arg("--target-dir").arg(target_directory()?.join("tsan"));
    command.args(["--", "--test-threads=1"]).args(words);
    command.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", COMPILER_OPTIONS.join(" "));
    command.env("TSAN_OPTIONS", format!("suppressions={} history_size=4", suppressions.display()));
    ensure!(command.status().context("could not start cargo")?.success(), "{package}: see above");
    Ok(())
}
