//! Promise: what stock perftest measures here still works, and is set beside the committed ratios.
//!
//! A test machine may be busy with other things, so that a figure far behind is said and fails nothing;
//! `cargo xtask perftest-ci`, on a quiet machine, fails for it.

mod common;

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use common::Stage;
use libtest_mimic::Trial;
use xtask::{
    bed::Bed,
    figures::{Baseline, Case, Change},
    matrix::{Matrix, Run, Tier},
    reference::Reference,
};

/// So many times slower than the baseline is worth a line.
const TOLERANCE: f64 = 3.0;

fn main() -> ExitCode {
    common::run("process_figures", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
    let runs = Matrix::load(&common::workspace()).expect("the matrix can be read").runs(Tier::Figures);
    let trials = runs.into_iter().map(|run| {
        let name = format!("{} has its figure", run.name);
        stage.trial(name, move |bed| compare(bed, &run))
    });
    trials.collect()
}

fn compare(bed: &Bed, run: &Run) -> Result<()> {
    let baseline = Baseline::load(&common::workspace())?;
    let case = Case::measure(bed, run, &mut Reference::measure());
    if let Some(reason) = &case.failure {
        bail!("{reason}");
    }
    ensure!(case.ratio().is_some(), "perftest's table has no figure");
    match baseline.change(&case, TOLERANCE) {
        Some(Change::New) => bail!("`cargo xtask perftest-ci --short --write` has not seen it yet"),
        Some(change) => println!("{}: {} than the baseline: {:?}", case.name, change.text(), case.figures),
        None => {}
    }
    Ok(())
}
