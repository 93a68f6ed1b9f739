//! Root file systems of Debian with the stock verbs tools, made once and kept in the target directory.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use xtask::process::{command, run};

use super::{SHORT, words, workspace};

const SUITE: &str = "bookworm";
const LIMIT: Duration = Duration::from_secs(900);

/// Debian 12's; made by debootstrap where it is not there yet.
pub(crate) fn debian() -> Result<PathBuf> {
    let folder = workspace().join("target/rootfs");
    let rootfs = folder.join(SUITE);
    if rootfs.is_dir() {
        return Ok(rootfs);
    }
    fs::create_dir_all(&folder)?;
    // Made beside, then renamed: what has the name is whole.
    let fresh = folder.join(format!("{SUITE}.new"));
    if fresh.exists() {
        fs::remove_dir_all(&fresh).context("cannot remove what is left of a failed debootstrap")?;
    }
    let fresh_name = fresh.display().to_string();
    let mut line = words(&["debootstrap", "--variant=minbase", "--include=ibverbs-utils,perftest", SUITE]);
    line.push(fresh_name);
    line.extend(mirror());
    eprintln!("making a root file system with debootstrap, about a minute ...");
    run(command(line), LIMIT)?;
    fs::rename(&fresh, &rootfs)?;
    Ok(rootfs)
}

/// Where this host itself gets that suite from; debootstrap has a default of its own.
fn mirror() -> Option<String> {
    let line = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"];
    let targets = run(command(line), SHORT).ok()?.stdout;
    let target = targets.lines().find_map(|line| line.strip_prefix(&format!("{SUITE} ")));
    target.map(str::to_owned)
}
