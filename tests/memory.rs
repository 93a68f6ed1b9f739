//! Promise: registered memory stays the program's own, wherever its pages have been moved to.
//!
//! The checks are the probe's (`tests/probe/checks/memory.rs` and its neighbours), one of them under each allocator that
//! is installed; and Python's multiprocessing.

mod common;

use std::{
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::Result;
use common::{Stage, probe};
use xtask::{
    bed::Bed,
    huge_pages::HugePages,
    process::{Job, command, has_program},
};

const LIMIT: Duration = Duration::from_secs(220);

/// Allocators of Debian 12, which give memory back as soon as they can.
const ALLOCATORS: [(&str, &str); 2] = [
    ("jemalloc", "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"),
    ("tcmalloc", "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
];

fn main() -> ExitCode {
    // For two checks at a time.
    let _pages = HugePages::set_aside(8);
    common::run("memory", common::no_tree(), || {
        let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
        let mut trials = probe::checks(&stage, |check| check.starts_with("memory "));
        for (allocator, library) in ALLOCATORS {
            let name = format!("memory of {allocator} is as it expects after deregistration");
            trials.push(stage.trial(name.clone(), move |bed| under(bed, &name, library)));
        }
        trials.push(stage.trial("memory survives Python's multiprocessing", multiprocessing));
        trials
    })
}

/// A program as a client of the bed's router.
fn client(bed: &Bed, words: &[&str]) -> Command {
    let mut client = command([bed.tree.program()]);
    client.args(["run", "--socket"]).arg(bed.router.socket()).arg("--").args(words);
    client
}

fn under(bed: &Bed, name: &str, library: &str) -> Result<()> {
    if !Path::new(library).exists() {
        common::skip(name, &format!("{library} is not installed"));
        return Ok(());
    }
    // What `freeflow run` preloads stays in front.
    let line = r#"LD_PRELOAD="$LD_PRELOAD $0" exec "$@""#;
    let check = "memory of an allocator is as it expects after deregistration";
    let mut client = client(bed, &["sh", "-c", line, library, probe::path(), "check", check]);
    client.env("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0").env("TCMALLOC_RELEASE_RATE", "10");
    probe::verdict(name, &Job::spawn(client, LIMIT)?.wait()?)
}

fn multiprocessing(bed: &Bed) -> Result<()> {
    let name = "memory survives Python's multiprocessing";
    if !has_program("python3") {
        common::skip(name, "python3 is not installed");
        return Ok(());
    }
    let script = common::workspace().join("tests/children.py").display().to_string();
    probe::verdict(name, &Job::spawn(client(bed, &["python3", &script]), LIMIT)?.wait()?)
}
