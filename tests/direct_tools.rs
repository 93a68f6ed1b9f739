//! Promise: stock tools work in direct mode as they do in isolated mode; what it does not cover goes through the
//! router unnoticed.

mod common;

use std::{process::ExitCode, time::Duration};

use common::{Stage, pingpong};
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, Mode, Tool},
    matrix::Tier,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Tools with their options that direct mode leaves to the router.
const TOOLS: [(&str, &[&str]); 1] = [("ib_send_bw", &["-n", "500", "-c", "UD"])];

fn main() -> ExitCode {
    common::run("direct_tools", common::no_tree(), || {
        let stage = Stage::new(|| Ok(Bed::on_one_host(common::tree()?)?.in_mode(Mode::Direct)));
        let mut trials = pingpong::trials(&stage);
        trials.extend(TOOLS.map(|(program, options)| tool(&stage, program, options)));
        trials.extend(stage.direct_matrix(Tier::Process));
        trials
    })
}

fn tool(stage: &Stage, program: &'static str, options: &'static [&str]) -> Trial {
    let name = [&[program], options].concat().join(" ");
    stage.trial(name, move |bed| bed.run_pair(&Tool::new(program, options), LIMIT)?.success())
}
