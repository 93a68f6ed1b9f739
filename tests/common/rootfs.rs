//! Root file systems of Debian's releases with the stock verbs tools, made once and kept in the target directory.
//!
//! Packages are unpacked, not configured: the tools need nothing of it, and it takes seconds, not a minute.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use xtask::process::{command, run};

use super::{SHORT, words, workspace};

/// The release that the rest of the tests is about.
pub(crate) const OURS: &str = "bookworm";
const PACKAGES: &str =
    "base-files,coreutils,ibverbs-utils,perftest,rdmacm-utils,iperf,iperf3,redis-server,redis-tools";
/// Where a root file system tells what it was made of.
const MADE_OF: &str = "freeflow-packages";
const LIMIT: Duration = Duration::from_secs(300);

/// A release's; made where it is not there yet.
pub(crate) fn debian(suite: &str) -> Result<PathBuf> {
    let folder = workspace().join("target/rootfs");
    let rootfs = folder.join(suite);
    if fs::read_to_string(rootfs.join(MADE_OF)).is_ok_and(|packages| packages == PACKAGES) {
        return Ok(rootfs);
    }
    if rootfs.exists() {
        fs::remove_dir_all(&rootfs).context("cannot remove a root file system of other packages")?;
    }
    fs::create_dir_all(&folder)?;
    // Made beside, then renamed: what has the name is whole.
    let fresh = folder.join(format!("{suite}.new"));
    if fresh.exists() {
        fs::remove_dir_all(&fresh).context("cannot remove what is left of a failed attempt")?;
    }
    let mut line = words(&["mmdebstrap", "--quiet", "--variant=extract", "--format=directory"]);
    // A mirror that lags behind does as well.
    line.push("--aptopt=Acquire::Check-Valid-Until \"false\"".to_owned());
    line.extend([format!("--include={PACKAGES}"), suite.to_owned(), fresh.display().to_string()]);
    line.extend(mirror());
    eprintln!("making a root file system of Debian {suite}, about twenty seconds ...");
    run(command(line), LIMIT).with_context(|| format!("no root file system of Debian {suite}"))?;
    // What programs ask for and packages make only when they are configured.
    for place in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(fresh.join(place))?;
    }
    fs::write(fresh.join(MADE_OF), PACKAGES)?;
    fs::rename(&fresh, &rootfs)?;
    Ok(rootfs)
}

/// Where this host itself gets Debian from; mmdebstrap has a default of its own.
fn mirror() -> Option<String> {
    let line = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"];
    let targets = run(command(line), SHORT).ok()?.stdout;
    let target = targets.lines().find_map(|line| line.strip_prefix(&format!("{OURS} ")));
    target.map(str::to_owned)
}
