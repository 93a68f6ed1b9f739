//! The same tools on the bare RNICs of two hosts and, beside it, between containers of theirs.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use xtask::{perftest, process::Outcome};

use super::common::{guest_hosts::Hosts, guests::GuestStage};

/// Ping-pong programs and what they are told.
const PINGPONGS: [&str; 5] = [
    "ibv_rc_pingpong -n 200",
    "ibv_rc_pingpong -n 100 -c -e",
    "ibv_uc_pingpong -n 100",
    "ibv_ud_pingpong -n 100 -e",
    "ibv_srq_pingpong -n 200",
];

/// A part of the matrix of perftest.
const PERFTEST: [&str; 12] = [
    "ib_write_bw -s 65536 -n 100",
    "ib_write_bw -c UC -s 65536 -n 100",
    "ib_write_bw -q 4 -s 4096 -n 100",
    "ib_write_lat -s 2 -n 200",
    "ib_read_bw -s 65536 -n 50",
    "ib_read_lat -s 2 -n 100",
    "ib_send_bw -s 65536 -n 100",
    "ib_send_bw -c UC -s 4096 -n 100",
    "ib_send_bw -c UD -s 1024 -n 100",
    "ib_send_lat -s 64 -n 200",
    "ib_atomic_bw -n 100",
    "ib_atomic_lat -n 100",
];

pub(super) fn trials(stage: &GuestStage<Hosts>) -> Vec<Trial> {
    let pingpongs = PINGPONGS.map(|tool| {
        stage.trial(format!("{tool}, bare and between containers"), move |hosts| pingpong(hosts, tool))
    });
    let perftest = PERFTEST.map(|tool| {
        stage.trial(format!("{tool}, bare and between containers"), move |hosts| measured(hosts, tool))
    });
    pingpongs.into_iter().chain(perftest).collect()
}

fn pingpong(hosts: &Hosts, tool: &str) -> Result<()> {
    for ends in
        [hosts.bare(&format!("{tool} -d rxe0 -g 1"))?, hosts.contained(&format!("{tool} -d ff0 -g 0"))?]
    {
        for end in ends {
            ensure!(
                end.stdout.contains("iters in") && !end.stdout.contains("invalid data"),
                "{}",
                end.report()
            );
        }
    }
    Ok(())
}

/// Shows both figures. They are of one moment on emulated hosts, whose clocks perftest may misjudge so far that it says 0;
/// so nothing is asked of them but to be there.
fn measured(hosts: &Hosts, tool: &str) -> Result<()> {
    let [_, contained] = hosts.contained(&format!("{tool} -d ff0 -x 0 -F"))?;
    let figure = |end: Outcome| -> Result<f64> {
        let row = perftest::single_row(&end.stdout)?;
        row.bandwidth().or(row.latency()).with_context(|| end.report())
    };
    let contained = figure(contained)?;
    // What Soft-RoCE makes of it under emulation is no promise of ours.
    let bare = match hosts.bare(&format!("{tool} -d rxe0 -x 1 -F")) {
        Ok([_, bare]) => figure(bare)?,
        Err(error) => {
            println!("FIGURE {tool}: {contained:.2} between containers; bare Soft-RoCE failed: {error:#}");
            return Ok(());
        }
    };
    println!(
        "FIGURE {tool}: {bare:.2} bare, {contained:.2} between containers, ratio {:.2}",
        contained / bare
    );
    Ok(())
}
