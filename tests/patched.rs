//! Promise: on an rdma-core with the patches of `rdma-core-patches/`, programs work as on a stock one, and none of the
//! ways around it is used: no fake sysfs tree, no device node, no shim, no rewritten import.

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use common::{SHORT, Stage, probe};
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, free_port},
    conformance::{
        self, Suite, Table,
        patched::{self, BARE},
    },
    process::{Job, Outcome, command},
};

/// What a program may take.
const LIMIT: Duration = Duration::from_secs(120);
/// Modules of rdma-core's own tests about what the patches change; `cargo xtask conformance --patched` runs all.
const MODULES: [&str; 8] = [
    "test_addr.",
    "test_cq.",
    "test_cq_events.",
    "test_device.",
    "test_fork.",
    "test_pd.",
    "test_rdmacm.",
    "test_shared_pd.",
];

fn main() -> ExitCode {
    common::run("patched", common::no_tree().or_else(no_libraries), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
    let mut trials = vec![
        stage.trial("ff0 is found where nothing is set but the driver and the socket", finds_the_device),
        stage.trial(
            "no import is rewritten where the library is patched, and some are where it is not",
            imports,
        ),
        stage.trial("rping over the patched libraries", rping),
        stage.trial("rdma-core's own tests of events, GIDs, imports and rdma_cm (release 44)", |bed| {
            own_tests(bed, Suite::V44, &MODULES.map(str::to_owned))
        }),
        stage
            .trial("rdma-core's own tests of release 55, all of them", |bed| own_tests(bed, Suite::V55, &[])),
    ];
    let list = Command::new(probe::path()).arg("list").output().expect("the probe lists its checks").stdout;
    let list = String::from_utf8(list).expect("names are text");
    let about = ["rdma_cm ", "GID", "event", "imported", "forked child", "channel"];
    for check in list.lines().filter(|check| about.iter().any(|word| check.contains(word))) {
        let (name, check) = (check.to_owned(), check.to_owned());
        trials.push(stage.trial(name.clone(), move |bed| {
            let outcome = run(bed, &[probe::path(), "check", &check])?;
            probe::verdict(&name, &outcome)
        }));
    }
    trials
}

/// Where the patched libraries are; built once.
fn libraries() -> &'static Result<PathBuf> {
    static LIBRARIES: OnceLock<Result<PathBuf>> = OnceLock::new();
    LIBRARIES.get_or_init(|| {
        let tree = common::tree()?;
        let cache = tree.prefix().parent().context("the tree lies nowhere")?;
        patched::libraries(&common::workspace(), cache)
    })
}

/// That what they are built of cannot be had is one; that they do not build is a failure of all that needs them.
fn no_libraries() -> Option<String> {
    let tree = common::tree().ok()?;
    let fetched = patched::fetch(&common::workspace(), tree.prefix().parent()?);
    fetched.err().map(|error| format!("{error:#}"))
}

fn folder() -> Result<&'static Path> {
    libraries().as_deref().map_err(|error| anyhow::anyhow!("{error:#}"))
}

/// A program over the patched libraries.
fn client(bed: &Bed, words: &[&str]) -> Result<Command> {
    let words: Vec<String> = BARE.iter().chain(words).map(|&word| word.to_owned()).collect();
    let mut command = bed.command(&bed.client, &words);
    command.env("LD_LIBRARY_PATH", folder()?);
    Ok(command)
}

fn run(bed: &Bed, words: &[&str]) -> Result<Outcome> {
    Job::spawn(client(bed, words)?, LIMIT)?.wait()
}

fn finds_the_device(bed: &Bed) -> Result<()> {
    // Not even `freeflow run`, which sees to the device node.
    let mut devinfo = command(["ibv_devinfo", "-v"]);
    let driver = bed.tree.provider(34);
    let driver = driver.to_str().and_then(|name| name.strip_suffix("-rdmav34.so")).context("no driver")?;
    devinfo.env("LD_LIBRARY_PATH", folder()?).env("RDMAV_DRIVERS", driver).env("FREEFLOW_LOG", "info");
    devinfo.env("FREEFLOW_SOCKET", bed.router.socket());
    let outcome = Job::spawn(devinfo, SHORT)?.wait()?;
    outcome.success()?;
    ensure!(outcome.stdout.contains("hca_id:\tff0"), "{}", outcome.report());
    ensure!(outcome.stderr.contains("no import is rewritten"), "no line says so: {}", outcome.report());
    let stock = bed.run(&bed.client, &["ibv_devinfo", "-v"], SHORT)?;
    let told = |outcome: &Outcome| {
        let about = ["node_guid", "sys_image_guid", "GID[", "state:", "phys_port_cnt"];
        let lines = outcome.stdout.lines().filter(|line| about.iter().any(|word| line.contains(word)));
        lines.map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    ensure!(
        told(&outcome).len() > 4 && told(&outcome) == told(&stock),
        "{}{}",
        outcome.report(),
        stock.report()
    );
    Ok(())
}

fn imports(bed: &Bed) -> Result<()> {
    let counts = |outcome: Outcome| -> Result<Vec<u32>> {
        outcome.success()?;
        let words = outcome.stdout.lines().filter(|line| line.starts_with("lib"));
        let counts = words.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse()?));
        counts.collect::<Result<_>>().with_context(|| outcome.report())
    };
    let stock = counts(bed.run(&bed.client, &[probe::path(), "imports"], SHORT)?)?;
    ensure!(stock.len() == 2 && stock.iter().all(|&count| count >= 4), "not seen: {stock:?}");
    let patched = counts(run(bed, &[probe::path(), "imports"])?)?;
    ensure!(patched == [0, 0], "rewritten: {patched:?}");
    Ok(())
}

fn rping(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let text = port.to_string();
    let words: Vec<String> = BARE.map(str::to_owned).into();
    let server = ["rping", "-s", "-p", &text, "-C", "20", "-V"].map(str::to_owned);
    // One end of each kind: what they speak to the router is the same.
    let server = bed.start_cm_server(&server, port, LIMIT)?;
    let mut client = bed.command(
        &bed.client,
        &[words, ["rping", "-c", "-a", "127.0.0.1", "-p", &text, "-C", "20", "-V"].map(str::to_owned).into()]
            .concat(),
    );
    client.env("LD_LIBRARY_PATH", folder()?);
    let client = Job::spawn(client, LIMIT)?.wait()?;
    client.success()?;
    server.wait()?.success()
}

/// Those of a release whose names contain one of the words.
fn own_tests(bed: &Bed, suite: Suite, only: &[String]) -> Result<()> {
    let Some(tests) = common::own_tests(bed, suite)? else { return Ok(()) };
    let tests = tests.on_patched(folder()?.to_owned());
    let table = Table::parse(&std::fs::read_to_string(suite.table(&common::workspace()))?)?;
    let report = conformance::run(bed, &common::workspace(), &tests, only)?;
    println!("{}", report.line(suite));
    ensure!(report.results.len() > 20, "there were no tests: {}", report.line(suite));
    let losses = table.losses(&report.outcomes(), only.is_empty());
    ensure!(losses.is_empty(), "{}\nlost:\n{}", report.details, losses.join("\n"));
    Ok(())
}
