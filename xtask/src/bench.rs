//! `cargo xtask bench`: the benchmarks of the crates, then the ratios that the whole system promises.

mod connections;
mod direct;
mod handover;
mod links;
mod peers;
mod ratios;
mod registration;
mod rsocket;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use xtask::{bed::Bed, interrupt};

use crate::{build, packages, table::Table, workspace};
use ratios::{RATIOS, Ratio};

/// Crates whose `benches/` are run, where there are any.
const CRATES: [&str; 4] = ["verbs-abi", "engine", "provider", "router"];

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Run only the benchmarks whose name contains this
    filter: Option<String>,
    /// Leave out the benchmarks of the crates
    #[arg(long)]
    system: bool,
    /// An install tree to use instead of building one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let filter = options.filter.as_deref().unwrap_or("");
    if !options.system {
        bench_crates(filter)?;
    }
    let all = RATIOS.iter().chain(&direct::RATIOS).chain(&links::RATIOS).chain(&rsocket::RATIOS);
    let ratios: Vec<&Ratio> = all.filter(|ratio| ratio.name.contains(filter)).collect();
    if ratios.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    packages::require(&packages::TOOLS)?;
    let bed = Bed::on_one_host(build::tree(options.tree.as_deref())?)?;
    measure(bed, &ratios)
}

fn bench_crates(filter: &str) -> Result<()> {
    for krate in CRATES.iter().filter(|krate| workspace().join(krate).join("benches").is_dir()) {
        let mut command = build::cargo();
        command.args(["bench", "--package", krate, "--bench", "*", "--", filter]);
        if !command.status().context("could not start cargo bench")?.success() {
            bail!("the benchmarks of {krate} failed");
        }
        interrupt::check()?;
    }
    Ok(())
}

/// Measures each ratio, even where one before it failed.
fn measure(mut bed: Bed, ratios: &[&Ratio]) -> Result<ExitCode> {
    let mut table = Table::new(&["ratio", "measured", "target", "verdict", "from"]);
    let mut kept = true;
    for ratio in ratios {
        eprintln!("measuring {} ...", ratio.name);
        bed = bed.in_mode(ratio.mode);
        let (measured, verdict, from) = match (ratio.measure)(&bed) {
            Ok(measurement) => {
                let verdict = ratio.target.verdict(measurement.figure);
                kept &= verdict != "MISSED";
                (format!("{:.2} {}", measurement.figure, ratio.unit), verdict, measurement.from)
            }
            Err(error) => {
                interrupt::check()?;
                kept = false;
                eprintln!("{}: {error:#}", ratio.name);
                ("-".to_owned(), "FAILED", "see above".to_owned())
            }
        };
        let target = format!("{} {}", ratio.target, ratio.unit);
        table.row(vec![ratio.name.to_owned(), measured, target, verdict.to_owned(), from]);
    }
    println!("\n{table}");
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
