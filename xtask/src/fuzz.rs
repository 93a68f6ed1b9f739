//! `cargo xtask fuzz`: builds the fuzz targets with libFuzzer and runs them for a while.
//!
//! What makes an input interesting is which code it reaches, so everything is compiled with the compiler's own
//! coverage counters; a stable toolchain has them. What the fuzzer learns is kept in the target directory, and each
//! run begins with it; `fuzz/corpus` holds the inputs that once found something.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{build::cargo, workspace};

/// The targets, as `fuzz/src` names them.
pub(crate) const TARGETS: [&str; 3] = ["control", "queues", "schedule"];
/// How the crates are compiled: counters at each edge, comparisons told to the fuzzer, no check left out.
const COMPILER_OPTIONS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];
/// Longest input, bytes.
const LONGEST: u32 = 2048;
/// An input that takes longer, s, is a finding. By the clock on the wall: a busy machine may let a process wait for long.
const SLOWEST: u32 = 60;
/// Memory beyond which an input is a finding, MiB.
const LARGEST: u32 = 2048;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The targets to run; all of them, one after the other, when none is named
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run a target once with this input instead, and show what it panics with
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    if let Some(reason) = obstacle() {
        bail!("{reason}");
    }
    let all: Vec<String> = TARGETS.map(str::to_owned).into();
    let targets = if options.targets.is_empty() { &all } else { &options.targets };
    let programs = Programs::build()?;
    for target in targets {
        match &options.input {
            Some(input) => programs.replay(target, input)?,
            None => programs.run(target, options.seconds)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Why nothing can be fuzzed here, if nothing can.
pub(crate) fn obstacle() -> Option<String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let works = Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
    (!works).then(|| {
        format!("libFuzzer is compiled by a C++ compiler, and there is no `{compiler}`; install g++")
    })
}

/// The targets' programs.
#[derive(Debug)]
pub(crate) struct Programs {
    directory: PathBuf,
    /// What the fuzzer learns, and what it finds.
    state: PathBuf,
}

impl Programs {
    /// Builds them. Apart from everything else, since all crates are compiled in a way of their own.
    pub(crate) fn build() -> Result<Self> {
        let machine = host()?;
        let target = target_directory()?.join("fuzz");
        let mut command = cargo();
        command.args(["build", "--release", "--package", "fuzz", "--features", "fuzz/libfuzzer", "--bins"]);
        // With a target named, build scripts and macros are compiled as ever.
        command.args(["--target", &machine]).arg("--target-dir").arg(&target);
        command.env("RUSTFLAGS", COMPILER_OPTIONS.join(" "));
        ensure!(command.status().context("could not start cargo")?.success(), "cargo build failed");
        Ok(Self { directory: target.join(machine).join("release"), state: target })
    }

    /// Runs a target for so long. Fails with what the fuzzer says when it finds something.
    pub(crate) fn run(&self, target: &str, seconds: u64) -> Result<()> {
        let learnt = self.state.join("corpus").join(target);
        let found = self.state.join("findings").join(target);
        for directory in [&learnt, &found] {
            fs::create_dir_all(directory)?;
        }
        println!("== fuzz {target}: {seconds} s ==");
        let mut command = self.command(target);
        command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={LONGEST}"));
        // Inputs are rows of steps: long ones from the start.
        command
            .arg("-len_control=0")
            .arg(format!("-timeout={SLOWEST}"))
            .arg(format!("-rss_limit_mb={LARGEST}"));
        command.arg(format!("-artifact_prefix={}/", found.display())).arg("-print_final_stats=1");
        command.arg(&learnt);
        let kept = workspace().join("fuzz/corpus").join(target);
        if kept.is_dir() {
            command.arg(kept);
        }
        let again = format!("cargo xtask fuzz {target} --input FILE");
        ensure!(
            command.status()?.success(),
            "{target}: a finding, in {}; `{again}` shows it",
            found.display()
        );
        Ok(())
    }

    fn replay(&self, target: &str, input: &Path) -> Result<()> {
        ensure!(
            self.command(target).arg(input).status()?.success(),
            "{target}: {} is a finding",
            input.display()
        );
        println!("{target}: {} is no finding", input.display());
        Ok(())
    }

    fn command(&self, target: &str) -> Command {
        Command::new(self.directory.join(format!("fuzz-{target}")))
    }
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let output = cargo().args(["metadata", "--no-deps", "--format-version=1"]).output()?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(metadata["target_directory"].as_str().context("cargo names no target directory")?.into())
}

/// What `rustc -vV` calls this machine.
pub(crate) fn host() -> Result<String> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = Command::new(rustc).arg("-vV").output().context("could not start rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say for which machine it compiles")?.to_owned())
}
