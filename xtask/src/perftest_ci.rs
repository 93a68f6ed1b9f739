//! `cargo xtask perftest-ci`: the whole matrix for its figures, compared with the committed baseline.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Args;
use xtask::{
    bed::Bed,
    figures::{Baseline, Case, markdown, plots},
    interrupt,
    matrix::{Matrix, Run, Tier},
    reference::Reference,
};

use crate::{build, packages, workspace};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Run only the cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Run only the short subset that every change is compared by
    #[arg(long)]
    short: bool,
    /// How many times slower a case may be than its baseline
    #[arg(long, default_value_t = 2.0)]
    tolerance: f64,
    /// Take the ratios over into the baseline
    #[arg(long)]
    write: bool,
    /// An install tree to use instead of building one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    packages::require(&packages::TOOLS)?;
    let mut baseline = Baseline::load(&workspace())?;
    let tree = build::tree(options.tree.as_deref())?;
    let folder = tree.prefix().parent().unwrap_or(Path::new("/")).join("perftest-ci");
    let bed = Bed::on_one_host(tree)?;
    let mut reference = Reference::measure();
    let mut cases = Vec::new();
    let runs = runs(options)?;
    for (index, run) in runs.iter().enumerate() {
        interrupt::check()?;
        let case = measure(&bed, run, &mut reference, &baseline, options.tolerance);
        println!("[{:>3}/{}] {}", index + 1, runs.len(), line(&case, &baseline, options.tolerance));
        cases.push(case);
    }
    write(&folder, &cases, &baseline, options.tolerance, &reference)?;
    let losses = cases
        .iter()
        .filter(|case| baseline.change(case, options.tolerance).is_some_and(|change| change.is_loss()));
    let losses = losses.count();
    let works = cases.iter().filter(|case| case.failure.is_none()).count();
    println!("{works} of {} cases work, {losses} are worse than the baseline", cases.len());
    if options.write {
        baseline.update(&cases);
        fs::write(Baseline::path(&workspace()), baseline.text()?)?;
        println!("wrote {}", Baseline::path(&workspace()).display());
        return Ok(ExitCode::SUCCESS);
    }
    let good = losses == 0 && works == cases.len();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn runs(options: &Options) -> Result<Vec<Run>> {
    let tier = if options.short { Tier::Figures } else { Tier::Process };
    let mut runs = Matrix::load(&workspace())?.runs(tier);
    let wanted = |run: &Run| options.filter.iter().any(|text| run.name.contains(text.as_str()));
    runs.retain(|run| options.filter.is_empty() || wanted(run));
    Ok(runs)
}

/// A case that looks worse than it was is run once more: what disturbed it may be gone.
fn measure(bed: &Bed, run: &Run, reference: &mut Reference, baseline: &Baseline, tolerance: f64) -> Case {
    let case = Case::measure(bed, run, reference);
    if baseline.change(&case, tolerance).is_some_and(|change| change.is_loss()) {
        return case.better(Case::measure(bed, run, reference));
    }
    case
}

/// What a developer sees of a case.
fn line(case: &Case, baseline: &Baseline, tolerance: f64) -> String {
    let figure = match (&case.failure, case.figures.last(), case.ratio()) {
        (Some(_), ..) => "FAILS".to_owned(),
        (None, Some(last), Some((ratio, _))) => {
            format!("{:.2} {}, ratio {ratio:.3}", last.value, last.unit.name())
        }
        _ => "works".to_owned(),
    };
    let change = baseline.change(case, tolerance).map(|change| format!(" ({})", change.text()));
    format!("{:<50} {figure}{}", case.name, change.unwrap_or_default())
}

/// The results for programs and for people.
fn write(
    folder: &Path,
    cases: &[Case],
    baseline: &Baseline,
    tolerance: f64,
    reference: &Reference,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let plots = plots(cases, reference, folder)?;
    let results = serde_json::json!({
        "wake_us": reference.wake_us(),
        "memcpy_bytes_a_second": reference.copied(),
        "cases": cases,
    });
    fs::write(folder.join("results.json"), serde_json::to_string_pretty(&results)? + "\n")?;
    let page = folder.join("report.md");
    fs::write(&page, markdown(cases, baseline, tolerance, reference, &plots))?;
    println!("the report is {}", page.display());
    Ok(())
}
