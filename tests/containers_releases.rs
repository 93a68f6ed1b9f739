//! Promise: one provider file serves the rdma-core of every Debian release from 11 to testing (33 to 65 and newer) with
//! the verbs tools of that release, and the oldest talks to the newest through one router.

mod common;

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use common::{SHORT, Stage, container, device::Device, pingpong, rootfs};
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, Tool},
    perftest,
};

const LIMIT: Duration = Duration::from_secs(60);
/// Releases with their names; tests/containers.rs is about the one that is missing here, 12.
const RELEASES: [(&str, &str); 3] =
    [("bullseye", "Debian 11"), ("trixie", "Debian 13"), ("testing", "Debian testing")];
const OLDEST: &str = "bullseye";
const NEWEST: &str = "testing";
const PINGPONGS: [&str; 4] = ["ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong", "ibv_srq_pingpong"];
/// The perftest of the release: each verb, polling or with events.
const PERFTEST: [(&str, &[&str]); 4] = [
    ("ib_write_bw", &["-s", "65536", "-n", "500"]),
    ("ib_read_lat", &["-n", "500"]),
    ("ib_send_bw", &["-e", "-n", "500"]),
    ("ib_atomic_lat", &["-n", "500"]),
];

fn main() -> ExitCode {
    common::run("containers_releases", common::no_tree().or_else(container::obstacle), || {
        let mut trials: Vec<Trial> =
            RELEASES.iter().flat_map(|(suite, name)| of_release(suite, name)).collect();
        trials.extend(oldest_with_newest());
        trials
    })
}

fn of_release(suite: &'static str, name: &str) -> Vec<Trial> {
    if let Err(error) = rootfs::debian(suite) {
        return vec![skipped(name.to_owned(), format!("{error:#}"))];
    }
    let stage = stage(suite, suite);
    let mut trials = vec![trial(&stage, format!("{name}: ibv_devinfo shows sane attributes"), |bed| {
        [&bed.server, &bed.client].into_iter().try_for_each(|place| Device::query(bed, place)?.check())
    })];
    for program in PINGPONGS {
        trials.push(trial(&stage, format!("{name}: {program} -e"), move |bed| play(bed, program)));
    }
    for (program, options) in PERFTEST {
        let name = format!("{name}: {program} {}", options.join(" "));
        trials.push(trial(&stage, name, move |bed| measure(bed, &Tool::new(program, options))));
    }
    trials
}

fn oldest_with_newest() -> Vec<Trial> {
    if rootfs::debian(OLDEST).and(rootfs::debian(NEWEST)).is_err() {
        return vec![skipped(
            "the oldest with the newest".to_owned(),
            "a root file system is missing".to_owned(),
        )];
    }
    let stage = stage(OLDEST, NEWEST);
    let trials = PINGPONGS.map(|program| {
        let name = format!("{program} -e from the newest release to the oldest");
        trial(&stage, name, move |bed| play(bed, program))
    });
    trials.into()
}

fn stage(server: &'static str, client: &'static str) -> Stage {
    Stage::new(move || container::bed(common::tree()?, [&rootfs::debian(server)?, &rootfs::debian(client)?]))
}

fn skipped(name: String, reason: String) -> Trial {
    Trial::test(name.clone(), move || {
        common::skip(&name, &reason);
        Ok(())
    })
}

fn play(bed: &Bed, program: &str) -> Result<()> {
    pingpong::play(bed, program, &["-e", "-c"])
}

fn measure(bed: &Bed, tool: &Tool) -> Result<()> {
    let outcome = bed.run_pair(tool, LIMIT)?;
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    ensure!(row.iterations == 500 && row.has_figures(), "{row:?}\n{}", outcome.report());
    Ok(())
}

/// A test on a release. The newest moves: when its rdma-core is younger than all that the provider knows, it is
/// refused, and that is told loudly instead.
fn trial(stage: &Stage, name: String, test: impl FnOnce(&Bed) -> Result<()> + Send + 'static) -> Trial {
    stage.trial(name.clone(), move |bed| {
        let outcome = bed.run(&bed.client, &["ibv_devices"], SHORT)?;
        let refusal =
            outcome.stderr.lines().find(|line| line.contains("a layout this provider does not know"));
        let Some(line) = refusal else { return test(bed) };
        common::skip(&name, line);
        Ok(())
    })
}
