//! `cargo xtask conformance`: rdma-core's own tests, compared with the committed tables.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use xtask::{
    bed::{Bed, Mode},
    conformance::{self, Suite, Table, patched},
    tree::Tree,
};

use crate::{build, workspace};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The release of the tests; both when none is named
    #[arg(long)]
    suite: Vec<Name>,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Who executes the work requests; the default of a client where it is not given
    #[arg(long)]
    mode: Option<Seat>,
    /// An install tree to use instead of building one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// On rdma-core 55 with the patches of rdma-core-patches/, and without the fake sysfs tree and the shim
    #[arg(long)]
    patched: bool,
    /// Take the results over into the table
    #[arg(long)]
    write: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Seat {
    /// The router
    Isolated,
    /// The tests' own threads
    Direct,
}

impl Seat {
    fn mode(self) -> Mode {
        match self {
            Self::Isolated => Mode::Isolated,
            Self::Direct => Mode::Direct,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// Debian 12's pyverbs
    V44,
    /// pyverbs built from rdma-core 55
    V55,
}

impl Name {
    fn suite(self) -> Suite {
        match self {
            Self::V44 => Suite::V44,
            Self::V55 => Suite::V55,
        }
    }
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let suites: Vec<Suite> = options.suite.iter().map(|name| name.suite()).collect();
    let suites = if suites.is_empty() { Suite::ALL.to_vec() } else { suites };
    let tree = build::tree(options.tree.as_deref())?;
    let mut lines = Vec::new();
    let mut is_good = true;
    for suite in suites {
        let (line, good) = run(suite, &tree, options)?;
        lines.push(line);
        is_good &= good;
    }
    println!();
    lines.iter().for_each(|line| println!("{line}"));
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The line that a suite comes to, and whether the table holds.
fn run(suite: Suite, tree: &Tree, options: &Options) -> Result<(String, bool)> {
    let mut tests = suite.prepare(&cache(tree))?;
    if options.patched {
        tests = tests.on_patched(patched::libraries(&workspace(), &cache(tree))?);
    }
    let path = suite.table(&workspace());
    let mut table = read(&path)?;
    let mut bed = Bed::on_one_host(tree.clone())?;
    if let Some(seat) = options.mode {
        bed = bed.in_mode(seat.mode());
    }
    let report = conformance::run(&bed, &workspace(), &tests, &options.filter)?;
    print!("{}", report.details);
    let outcomes = report.outcomes();
    if options.write {
        table.update(&outcomes, |test| report.reason(test));
        std::fs::write(&path, table.text())?;
        println!("wrote {}", path.display());
    }
    let losses = table.losses(&outcomes, options.filter.is_empty());
    losses.iter().for_each(|loss| println!("lost: {loss}"));
    for gain in table.gains(&outcomes) {
        println!("gained: {gain} (`cargo xtask conformance --write` takes it over)");
    }
    let libraries = if options.patched { ", on the patched libraries" } else { "" };
    Ok((format!("{}{libraries}", report.line(suite)), losses.is_empty()))
}

fn read(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Table::parse(&text).with_context(|| path.display().to_string())
}

/// Beside the tree: the target directory.
fn cache(tree: &Tree) -> PathBuf {
    tree.prefix().parent().map_or_else(|| workspace().join("target"), Path::to_path_buf)
}
