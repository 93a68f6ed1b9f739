//! Promise: the figures of stock perftest do not fall far behind the committed ratios.
//!
//! A machine may be busy, so only what no disturbance explains fails here; `cargo xtask perftest-ci` looks closer.

mod common;

use std::process::ExitCode;

use anyhow::{Result, bail};
use common::Stage;
use libtest_mimic::Trial;
use xtask::{
    bed::Bed,
    figures::{Baseline, Case, Change},
    matrix::{Matrix, Run, Tier},
    reference::Reference,
};

/// So many times slower than the baseline is a loss.
const TOLERANCE: f64 = 10.0;
/// What disturbs a run may be gone in the next.
const TRIES: usize = 3;

fn main() -> ExitCode {
    common::run("process_figures", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
    let runs = Matrix::load(&common::workspace()).expect("the matrix can be read").runs(Tier::Figures);
    let trials = runs.into_iter().map(|run| {
        let name = format!("{} is as fast as it was", run.name);
        stage.trial(name, move |bed| keeps_its_ratio(bed, &run))
    });
    trials.collect()
}

fn keeps_its_ratio(bed: &Bed, run: &Run) -> Result<()> {
    let baseline = Baseline::load(&common::workspace())?;
    let mut worst = String::new();
    for _ in 0..TRIES {
        let case = Case::measure(bed, run, &mut Reference::measure());
        match baseline.change(&case, TOLERANCE) {
            Some(Change::New) => bail!("`cargo xtask perftest-ci --write` has not seen it yet"),
            Some(change) if change.is_loss() => {
                worst =
                    format!("{}: {:?}\n{}", change.text(), case.figures, case.failure.unwrap_or_default());
            }
            _ => return Ok(()),
        }
    }
    bail!(worst)
}
