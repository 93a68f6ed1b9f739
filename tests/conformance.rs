//! Promise: rdma-core's own tests come to what the committed tables say.

mod common;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use common::Stage;
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, Mode},
    conformance::{self, Suite, Table},
};

fn main() -> ExitCode {
    common::run("conformance", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let isolated = Stage::new(|| Ok(Bed::on_one_host(common::tree()?)?.in_mode(Mode::Isolated)));
    let direct = Stage::new(|| Ok(Bed::on_one_host(common::tree()?)?.in_mode(Mode::Direct)));
    let mut trials = Vec::new();
    for (stage, mode) in [(isolated, Mode::Isolated), (direct, Mode::Direct)] {
        for suite in Suite::ALL {
            let name = format!("rdma-core's own tests {} ({})", suite.name(), mode.name());
            trials.push(stage.trial(name, move |bed| keep_the_table(bed, suite)));
        }
    }
    trials
}

fn keep_the_table(bed: &Bed, suite: Suite) -> Result<()> {
    let workspace = common::workspace();
    let Some(tests) = common::own_tests(bed, suite)? else { return Ok(()) };
    let path = suite.table(&workspace);
    let table = Table::parse(&std::fs::read_to_string(&path)?).context(path.display().to_string())?;
    let report = conformance::run(bed, &workspace, &tests, &[])?;
    println!("{}", report.line(suite));
    let losses = table.losses(&report.outcomes(), true);
    ensure!(losses.is_empty(), "{}\nlost:\n{}", report.details, losses.join("\n"));
    Ok(())
}
