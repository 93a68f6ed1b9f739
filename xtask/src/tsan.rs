//! `cargo xtask tsan`: tests in which threads meet, under ThreadSanitizer, and the router under other tests' traffic.
//!
//! The stable compiler has the sanitizer behind a switch for unstable options. The standard library is compiled with it,
//! too: what it orders would not be seen otherwise. `tsan.supp` says what is none of a race. A crate's tests run one at a time, so
//! that what is found belongs to the test that is named last. Of the whole system the program `freeflow` alone is compiled so: its
//! clients are stock programs, into which a sanitized provider could not be loaded.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use xtask::{interrupt, process::has_program};

use crate::{
    build::{self, cargo},
    fuzz::{host, target_directory},
    workspace,
};

/// Where threads meet: the crate, words of which a test's name contains one, and of which none.
const TESTS: [(&str, &[&str], &[&str]); 4] = [
    ("verbs-abi", &["shm::"], &[]),
    ("engine", &["place::"], &[]),
    ("provider", &["lock::", "hooks::", "poll::", "post::"], &[]),
    // A signal that a program is to die of is taken and kept by the sanitizer.
    ("router", &[], &["a_fault_elsewhere_and_a_signal_that_was_sent"]),
];
/// The whole system, by this name among the crates.
const SYSTEM: &str = "system";
/// What makes its router's threads meet: the test program, and the words of a test's name; all tests for none.
const SYSTEM_TESTS: [(&str, &str); 10] = [
    // The lanes, with one QP and with several.
    ("process_tools", "ib_write_bw"),
    ("process_tools", "ib_send_lat"),
    // Tenants, and clients that ask for much.
    ("isolation", ""),
    // Modes that change under traffic.
    ("policy", ""),
    ("rdma_cm", ""),
    // Links, their cuts, and routers that die.
    ("hosts_links", "link"),
    ("hosts_links", "pingpong"),
    ("hosts_trouble", ""),
    ("lifecycle", ""),
    // Clients that are killed.
    ("death", ""),
];
/// How many of them: the sanitizer makes everything slow.
const KILLS: &str = "1000";

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The crates, or `system` for the router under traffic; all where threads meet when none is named
    #[arg(value_parser = [TESTS[0].0, TESTS[1].0, TESTS[2].0, TESTS[3].0, SYSTEM])]
    crates: Vec<String>,
    /// Run the tests whose name contains this, in place of those where threads meet
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let sanitizer = Sanitizer::prepare()?;
    let wanted = |name: &str| options.crates.is_empty() || options.crates.iter().any(|other| other == name);
    for (name, words, without) in TESTS.into_iter().filter(|(name, ..)| wanted(name)) {
        let filter = options.filter.as_deref();
        sanitizer.test(name, filter.as_ref().map_or(words, std::slice::from_ref), without)?;
    }
    if wanted(SYSTEM) {
        sanitizer.test_system(options.filter.as_deref())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How things are compiled with the sanitizer, and run.
struct Sanitizer {
    machine: String,
    target: PathBuf,
}

impl Sanitizer {
    /// The standard library's source is a part of the toolchain that is not always there.
    fn prepare() -> Result<Self> {
        if !has_library_source()? {
            println!("Missing: the source of the standard library, to compile it with the sanitizer.");
            let how = ["component", "add", "rust-src"];
            ensure!(
                has_program("rustup"),
                "there is no rustup: install the toolchain's rust-src by your own means"
            );
            println!("Installing it with rustup {} ...", how.join(" "));
            let status = Command::new("rustup").args(how).current_dir(workspace()).status()?;
            ensure!(status.success() && has_library_source()?, "rustup {} failed", how.join(" "));
        }
        Ok(Self { machine: host()?, target: target_directory()?.join("tsan") })
    }

    /// Runs the tests of a crate. What the sanitizer finds ends the program with its own exit code.
    fn test(&self, package: &str, words: &[&str], without: &[&str]) -> Result<()> {
        println!("== tsan {package} ==");
        let mut command = self.cargo("test");
        command.args(["--package", package, "--lib", "--", "--test-threads=1"]).args(words);
        command.args(without.iter().flat_map(|word| ["--skip", word]));
        command.env("TSAN_OPTIONS", options(None));
        ensure!(command.status().context("could not start cargo")?.success(), "{package}: see above");
        Ok(())
    }

    /// Runs tests of the whole system with a router that is compiled with the sanitizer.
    fn test_system(&self, filter: Option<&str>) -> Result<()> {
        println!("== tsan {SYSTEM} ==");
        let mut command = self.cargo("build");
        // Optimised: what waits for the router waits no longer than ever.
        command.args(["--package", "router", "--bin", "freeflow", "--release"]);
        ensure!(command.status().context("could not start cargo")?.success(), "cargo build failed");
        let program = self.target.join(&self.machine).join("release/freeflow");
        let tree = build::tree_with_program(&program, &self.target.join("freeflow"))?;
        let reports = self.target.join("reports");
        if reports.exists() {
            fs::remove_dir_all(&reports)?;
        }
        fs::create_dir_all(&reports)?;
        let mut failed = Vec::new();
        for (test, words) in SYSTEM_TESTS {
            interrupt::check()?;
            let mut command = cargo();
            command.args(["test", "--package", "freeflow", "--test", test, "--", "--test-threads=1"]);
            command
                .arg(filter.unwrap_or(words))
                .env("FREEFLOW_TREE", tree.prefix())
                .env("FREEFLOW_KILLS", KILLS);
            command.env("TSAN_OPTIONS", options(Some(&reports.join("router"))));
            if !command.status().context("could not start cargo")?.success() {
                failed.push(test);
            }
        }
        show(&reports)?;
        ensure!(failed.is_empty(), "failed with the sanitizer's router: {}", failed.join(" "));
        Ok(())
    }

    fn cargo(&self, verb: &str) -> Command {
        let mut command = cargo();
        // With a target named, build scripts and macros are compiled as ever.
        command.args([verb, "-Zbuild-std", "--target", &self.machine, "--target-dir"]).arg(&self.target);
        command.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Zsanitizer=thread");
        command
    }
}

/// What the sanitizer is told: among others where its reports go, if not to the standard error output.
fn options(reports: Option<&Path>) -> OsString {
    let suppressions = workspace().join("xtask/src/tsan.supp");
    let mut options = OsString::from("history_size=4:suppressions=");
    options.push(suppressions);
    if let Some(reports) = reports {
        options.push(":log_path=");
        options.push(reports);
    }
    options
}

/// Fails with the reports, where there are any.
fn show(reports: &Path) -> Result<()> {
    let mut found = 0;
    for entry in fs::read_dir(reports)? {
        println!("{}", fs::read_to_string(entry?.path())?);
        found += 1;
    }
    if found > 0 {
        bail!("{found} processes with races, in {}", reports.display());
    }
    println!("no race in any router");
    Ok(())
}

fn has_library_source() -> Result<bool> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let mut command = Command::new(rustc);
    let output = command.args(["--print", "sysroot"]).current_dir(workspace()).output()?;
    let root = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(Path::new(&root).join("lib/rustlib/src/rust/library/Cargo.lock").exists())
}
