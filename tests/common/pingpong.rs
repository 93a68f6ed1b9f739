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

/// Runs one of them between the two places; fails unless both ends count all rounds and find their data.
pub(crate) fn play(bed: &Bed, program: &str, options: &[&str]) -> Result<()> {
    // An Ethernet port is addressed by GID, which these programs must be told.
    let tool = Tool::new(program, &[&["-g", "0", "-n", "500"], options].concat());
    let outcome = bed.run_pair(&tool, LIMIT)?;
    outcome.success()?;
    for end in [&outcome.server, &outcome.client] {
        ensure!(end.stdout.contains("500 iters in"), "not all rounds were played\n{}", outcome.report());
        ensure!(!end.stdout.contains("invalid data"), "the data is not what was sent\n{}", outcome.report());
    }
    Ok(())
}
