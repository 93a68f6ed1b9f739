//! The ping-pong programs of ibverbs-utils.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use xtask::bed::{Bed, Tool};

use super::Stage;

const LIMIT: Duration = Duration::from_secs(20);

/// All three programs, polling and with events, with and without a check of the data.
pub(crate) fn trials(stage: &Stage) -> Vec<Trial> {
    let mut trials = Vec::new();
    for program in ["ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong"] {
        for options in [&[][..], &["-e"], &["-c"], &["-e", "-c"]] {
            let name = [&[program], options].concat().join(" ");
            trials.push(stage.trial(name, move |bed| play(bed, program, options)));
        }
    }
    for options in [&[][..], &["-e"], &["-q", "1"], &["-e", "-c"]] {
        let name = [&["ibv_srq_pingpong"], options].concat().join(" ");
        trials.push(stage.trial(name, move |bed| {
            // It plays with 16 QPs that share a queue, which it is told to count by the round.
            play(bed, "ibv_srq_pingpong", options)
        }));
    }
    trials
}

/// What else ibverbs-utils' programs can be told: sizes, MTUs, depths, and features that a device may lack (times of
/// completions, on-demand paging, device memory, XRC).
pub(crate) fn other_trials(stage: &Stage) -> Vec<Trial> {
    const OTHERS: [(&str, &[&str]); 16] = [
        ("ibv_rc_pingpong", &["-s", "1", "-c"]),
        ("ibv_rc_pingpong", &["-s", "65536", "-c"]),
        ("ibv_rc_pingpong", &["-m", "256"]),
        ("ibv_rc_pingpong", &["-m", "4096"]),
        ("ibv_rc_pingpong", &["-r", "1"]),
        ("ibv_rc_pingpong", &["-l", "1"]),
        ("ibv_rc_pingpong", &["-t"]),
        ("ibv_rc_pingpong", &["-o", "-c"]),
        ("ibv_rc_pingpong", &["-O", "-c"]),
        ("ibv_rc_pingpong", &["-j", "-c"]),
        ("ibv_uc_pingpong", &["-s", "65536", "-c"]),
        ("ibv_ud_pingpong", &["-s", "512", "-c"]),
        ("ibv_ud_pingpong", &["-s", "1024", "-c"]),
        ("ibv_srq_pingpong", &["-q", "4", "-c"]),
        ("ibv_xsrq_pingpong", &[]),
        ("ibv_xsrq_pingpong", &["-e"]),
    ];
    let trial = |(program, options): (&'static str, &'static [&'static str])| {
        let name = [&[program], options].concat().join(" ");
        stage.trial(name, move |bed| play(bed, program, options))
    };
    OTHERS.map(trial).into()
}

/// Runs one of them between the two places; fails unless both ends count all rounds and find their data.
pub(crate) fn play(bed: &Bed, program: &str, options: &[&str]) -> Result<()> {
    // An Ethernet port is addressed by GID, which these programs must be told.
    let tool = Tool::new(program, &[&["-g", "0", "-n", "500"], options].concat());
    let outcome = bed.run_pair(&tool, LIMIT)?;
    outcome.success()?;
    let played = if program == "ibv_xsrq_pingpong" { "success" } else { "500 iters in" };
    for end in [&outcome.server, &outcome.client] {
        ensure!(end.stdout.contains(played), "not all rounds were played\n{}", outcome.report());
        ensure!(!end.stdout.contains("invalid data"), "the data is not what was sent\n{}", outcome.report());
    }
    Ok(())
}
