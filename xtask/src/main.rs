//! `cargo xtask`: the developer's front door.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod conform;
mod demo;
mod fuzz;
mod packages;
mod perftest_ci;
mod table;
mod tcp;
mod test;
mod tsan;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The developer's front door.
#[derive(Parser)]
#[command(name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the relocatable install tree in target/freeflow
    Build(build::Options),
    /// Run stock perftest between two network namespaces, beside kernel TCP
    Demo(demo::Options),
    /// Run the tests: all, or the named tiers
    Test(test::Options),
    /// Run rdma-core's own tests and compare with the committed tables
    Conformance(conform::Options),
    /// Run the matrix of perftest cases for its figures and compare with the committed baseline
    PerftestCi(perftest_ci::Options),
    /// Run the fuzz targets, with libFuzzer
    Fuzz(fuzz::Options),
    /// Run tests of the crates whose threads share memory, and the router under traffic, under ThreadSanitizer
    Tsan(tsan::Options),
    /// Run the benchmarks: those of the crates, then the whole system's ratios
    Bench(bench::Options),
    /// Answer TCP pings (the demo runs this in a network namespace)
    #[command(hide = true)]
    TcpServe { port: u16 },
    /// Measure a TCP ping-pong (the demo runs this in a network namespace)
    #[command(hide = true)]
    TcpPing { address: IpAddr, port: u16 },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    xtask::interrupt::watch()?;
    match command {
        Command::Build(options) => build::main(&options),
        Command::Demo(options) => demo::main(&options),
        Command::Test(options) => test::main(&options),
        Command::Conformance(options) => conform::main(&options),
        Command::PerftestCi(options) => perftest_ci::main(&options),
        Command::Fuzz(options) => fuzz::main(&options),
        Command::Tsan(options) => tsan::main(&options),
        Command::Bench(options) => bench::main(&options),
        Command::TcpServe { port } => tcp::serve(port).map(|()| ExitCode::SUCCESS),
        Command::TcpPing { address, port } => tcp::ping(address, port).map(|()| ExitCode::SUCCESS),
    }
}

/// The root of this workspace.
fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
