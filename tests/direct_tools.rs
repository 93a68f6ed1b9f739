//! Promise: stock tools work in direct mode as they do in isolated mode; what it does not cover goes through the
//! router unnoticed.

mod common;

use std::{process::ExitCode, time::Duration};

use common::{Stage, pingpong};
use libtest_mimic::Trial;
use xtask::bed::{Bed, Tool};

const LIMIT: Duration = Duration::from_secs(60);

/// Tools with their options: what direct mode executes, and a few that it leaves to the router.
const TOOLS: [(&str, &[&str]); 12] = [
    ("ib_write_bw", &["-n", "1000"]),
    ("ib_write_bw", &["-a", "-n", "200"]),
    ("ib_write_lat", &["-n", "1000"]),
    ("ib_read_bw", &["-n", "500", "-q", "8"]),
    ("ib_read_lat", &["-n", "500"]),
    ("ib_send_bw", &["-n", "1000", "-b"]),
    ("ib_send_bw", &["-n", "1000", "-e", "-l", "8"]),
    ("ib_send_lat", &["-n", "500", "-e"]),
    ("ib_atomic_bw", &["-n", "500"]),
    ("ib_atomic_lat", &["-n", "500"]),
    ("ib_send_bw", &["-n", "500", "-c", "UC"]),
    ("ib_send_bw", &["-n", "500", "-c", "UD"]),
];

fn main() -> ExitCode {
    // SAFETY: this process has one thread so far.
    unsafe { std::env::set_var("FREEFLOW_MODE", "direct") };
    common::run("direct_tools", common::no_tree(), || {
        let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
        let mut trials = pingpong::trials(&stage);
        trials.extend(TOOLS.map(|(program, options)| tool(&stage, program, options)));
        trials
    })
}

fn tool(stage: &Stage, program: &'static str, options: &'static [&str]) -> Trial {
    let name = [&[program], options].concat().join(" ");
    stage.trial(name, move |bed| bed.run_pair(&Tool::new(program, options), LIMIT)?.success())
}
