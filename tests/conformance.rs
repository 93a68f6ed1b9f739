//! Promise: rdma-core's own tests come to what the committed tables say.

mod common;

use std::{path::Path, process::ExitCode};

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
    // v55 takes minutes to build: `cargo xtask conformance` runs it.
    let trials = [(isolated, Mode::Isolated), (direct, Mode::Direct)].map(|(stage, mode)| {
        let name = format!("rdma-core's own tests of release 44 ({})", mode.name());
        stage.trial(name, |bed| keep_the_table(bed, Suite::V44))
    });
    trials.into()
}

fn keep_the_table(bed: &Bed, suite: Suite) -> Result<()> {
    let workspace = common::workspace();
    let cache = bed.tree.prefix().parent().unwrap_or(Path::new("/")).to_owned();
    let tests = match suite.prepare(&cache) {
        Ok(tests) => tests,
        Err(error) => {
            common::skip("rdma-core's own tests", &format!("{error:#}"));
            return Ok(());
        }
    };
    let path = suite.table(&workspace);
    let table = Table::parse(&std::fs::read_to_string(&path)?).context(path.display().to_string())?;
    let report = conformance::run(bed, &workspace, &tests, &[])?;
    println!("{}", report.line(suite));
    let losses = table.losses(&report.outcomes(), true);
    ensure!(losses.is_empty(), "{}\nlost:\n{}", report.details, losses.join("\n"));
    Ok(())
}
