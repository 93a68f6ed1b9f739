//! Promise: Debian's stock verbs tools run unmodified between two processes of one host, in isolated mode.

mod common;

use std::{fs, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use common::{Stage, device::Device, pingpong};
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, Mode, Pair, Tool},
    matrix::Tier,
    perftest, process,
};

const PAIRS: usize = 16;

fn main() -> ExitCode {
    common::run("process_tools", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let stage = Stage::new(|| Ok(Bed::on_one_host(common::tree()?)?.in_mode(Mode::Isolated)));
    let mut trials = vec![
        stage.trial("ibv_devices lists ff0", lists_the_device),
        stage.trial("ibv_devinfo shows sane attributes", |bed| Device::query(bed, &bed.client)?.check()),
        stage.trial("ibv_rc_pingpong by the new post-send interface", |bed| {
            pingpong::play(bed, "ibv_rc_pingpong", &["-N", "-c"])
        }),
        stage.trial("ibv_rc_pingpong of 1 MiB", |bed| {
            pingpong::play(bed, "ibv_rc_pingpong", &["-s", "1048576", "-c"])
        }),
        stage.trial("16 pairs at once", sixteen_pairs),
        stage.trial("a libibverbs of an unknown layout is refused with one line", refuses_unknown_layout),
    ];
    trials.extend(pingpong::trials(&stage));
    trials.extend(pingpong::other_trials(&stage));
    trials.extend(stage.matrix(Tier::Process));
    trials
}

fn lists_the_device(bed: &Bed) -> Result<()> {
    let outcome = bed.run(&bed.client, &["ibv_devices"], common::SHORT)?;
    outcome.success()?;
    let row = outcome.stdout.lines().find(|line| line.split_whitespace().next() == Some("ff0"));
    let guid = row.and_then(|row| row.split_whitespace().nth(1)).unwrap_or_default();
    ensure!(
        guid.len() == 16 && guid.bytes().any(|digit| digit != b'0'),
        "no ff0 with a GUID:\n{}",
        outcome.stdout
    );
    Ok(())
}

/// A copy of the installed library that claims a private ABI of the future: the program runs on without the device.
fn refuses_unknown_layout(bed: &Bed) -> Result<()> {
    const NODE: &[u8] = b"\0IBVERBS_PRIVATE_";
    let ask = ["sh", "-c", "ldd $(command -v ibv_devices) | awk '/libibverbs.so.1/ { print $3 }'"];
    let library = process::run(bed.client.plain_command(&common::words(&ask)), common::SHORT)?.stdout;
    let mut bytes = fs::read(library.trim())?;
    let place = bytes.windows(NODE.len()).position(|window| window == NODE).context("no private ABI")?;
    bytes[place + NODE.len()..][..2].copy_from_slice(b"99");
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("libibverbs.so.1"), bytes)?;

    let mut command = bed.command(&bed.client, &common::words(&["ibv_devices"]));
    command.env("LD_LIBRARY_PATH", folder.path());
    let outcome = process::run(command, common::SHORT)?;
    ensure!(!outcome.stdout.contains("ff0"), "it is offered all the same:\n{}", outcome.report());
    let lines: Vec<&str> = outcome.stderr.lines().filter(|line| line.contains("private ABI 99")).collect();
    ensure!(lines.len() == 1 && lines[0].contains("does not know"), "no line says so:\n{}", outcome.report());
    Ok(())
}

fn sixteen_pairs(bed: &Bed) -> Result<()> {
    let limit = Duration::from_secs(120);
    let tool = Tool::new("ib_write_bw", &["-s", "4096", "-n", "1000"]);
    let pairs = (0..PAIRS).map(|_| bed.start_pair(&tool, limit)).collect::<Result<Vec<Pair>>>()?;
    for pair in pairs {
        let outcome = pair.wait()?;
        outcome.success()?;
        let row = perftest::single_row(&outcome.client.stdout)?;
        ensure!((row.bytes, row.iterations) == (4096, 1000), "{row:?}\n{}", outcome.report());
    }
    Ok(())
}
