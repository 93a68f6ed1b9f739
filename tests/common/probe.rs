//! Our own verbs program, run as a client of a router.

use std::{path::Path, process::Command, thread, time::Duration};

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use xtask::{
    bed::Bed,
    interrupt,
    process::{Job, Outcome, command, run},
    tree::Tree,
};

use super::Stage;

/// Who executes a client's work requests.
pub(crate) const MODES: [&str; 2] = ["isolated", "direct"];
/// A check's limit; the probe ends itself before that.
const LIMIT: Duration = Duration::from_secs(220);

/// The program that cargo built for this test.
pub(crate) fn path() -> &'static str {
    env!("CARGO_BIN_EXE_freeflow-probe")
}

/// The probe as a client of the router at `socket`, in a mode or, told `default`, in that of who says nothing.
pub(crate) fn client(tree: &Tree, socket: &Path, mode: &str, words: &[&str]) -> Command {
    let mut command = command([tree.program()]);
    command.args(["run", "--socket"]).arg(socket);
    if mode != "default" {
        command.args(["--mode", mode]);
    }
    command.args(["--", path()]).args(words);
    command
}

/// Starts a probe and waits until it says READY.
pub(crate) fn start(tree: &Tree, socket: &Path, mode: &str, words: &[&str]) -> Result<Job> {
    let mut job = Job::spawn(client(tree, socket, mode, words), LIMIT)?;
    while !job.stdout().contains("READY\n") {
        interrupt::check()?;
        if job.has_ended()? {
            let outcome = job.wait()?;
            bail!("it was never ready: {}", outcome.report());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(job)
}

/// A test for each mode of each of the probe's checks that is wanted.
pub(crate) fn checks(stage: &Stage, wanted: fn(&str) -> bool) -> Vec<Trial> {
    let list = run(command([path(), "list"]), LIMIT).expect("the probe lists its checks").stdout;
    let mut trials = Vec::new();
    for check in list.lines().filter(|check| wanted(check)) {
        for mode in MODES {
            let (name, check) = (format!("{check} ({mode})"), check.to_owned());
            trials.push(stage.trial(name.clone(), move |bed| perform(bed, mode, &name, &check)));
        }
    }
    assert!(!trials.is_empty(), "the probe has no such checks");
    trials
}

fn perform(bed: &Bed, mode: &str, name: &str, check: &str) -> Result<()> {
    let command = client(&bed.tree, bed.router.socket(), mode, &["check", check]);
    verdict(name, &Job::spawn(command, LIMIT)?.wait()?)
}

/// What a probe found.
pub(crate) fn verdict(name: &str, outcome: &Outcome) -> Result<()> {
    outcome.success()?;
    if let Some(reason) = outcome.stdout.lines().find_map(|line| line.strip_prefix("SKIP ")) {
        super::skip(name, reason);
        return Ok(());
    }
    ensure!(outcome.stdout.lines().last() == Some("OK"), "{}", outcome.report());
    Ok(())
}
