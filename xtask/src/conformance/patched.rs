//! rdma-core 55 with the patches of `rdma-core-patches/`: libibverbs and librdmacm, built once for each state of the
//! patches and kept in the target directory, beside the stock release.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::suite::{
    BUILD_LIMIT, FETCH_LIMIT, copy_source, fresh, in_folder, name_no_drivers, replace, require_tools,
};
use crate::{
    headers::source_of_release_55,
    process::{command, run},
};

/// What a command gets to use the patched libraries with nothing else of what stock ones need: the words that go
/// before it. The libraries are found by `LD_LIBRARY_PATH`.
pub const BARE: [&str; 5] = ["env", "-u", "SYSFS_PATH", "-u", "LD_PRELOAD"];

/// The patches of the series, in order.
pub fn series(workspace: &Path) -> Result<Vec<PathBuf>> {
    let folder = workspace.join("rdma-core-patches");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut patches: Vec<_> =
        files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "patch")).collect();
    patches.sort();
    ensure!(!patches.is_empty(), "no patches in {}", folder.display());
    Ok(patches)
}

/// Fails where what they are built of or with cannot be had: that is no fault of the patches.
pub fn fetch(workspace: &Path, cache: &Path) -> Result<()> {
    if is_built(&home(cache), &state(&series(workspace)?)?) {
        return Ok(());
    }
    require_tools(&["patch"])?;
    source_of_release_55().context("no sources of rdma-core 55").map(|_| ())
}

/// The folder of the patched libraries, built below `cache` unless that is done already.
pub fn libraries(workspace: &Path, cache: &Path) -> Result<PathBuf> {
    fetch(workspace, cache)?;
    build(workspace, &home(cache)).context("cannot build a patched rdma-core")
}

fn home(cache: &Path) -> PathBuf {
    cache.join("conformance/v55-patched")
}

/// What the patches say, by which a build is known.
fn state(patches: &[PathBuf]) -> Result<String> {
    Ok(patches.iter().map(fs::read_to_string).collect::<Result<String, _>>()?)
}

fn is_built(home: &Path, state: &str) -> bool {
    fs::read_to_string(home.join("built")).is_ok_and(|built| built == state)
}

fn build(workspace: &Path, home: &Path) -> Result<PathBuf> {
    let patches = series(workspace)?;
    let state = state(&patches)?;
    let (source, folder) = (home.join("source"), home.join("build"));
    let libraries = folder.join("lib");
    if is_built(home, &state) {
        return Ok(libraries);
    }
    println!("Building rdma-core 55 with the patches, once ...");
    let room = fresh(home)?;
    copy_source(&source_of_release_55()?, &room.join("source"))?;
    for patch in &patches {
        apply(patch, &room.join("source"))?;
    }
    replace(&room, home)?;
    fs::create_dir_all(&folder)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut configure = command(["cmake", "-GNinja", "-DIN_PLACE=1", "-DNO_MAN_PAGES=1", "-DNO_PYVERBS=1"]);
    configure.arg(&source);
    run(in_folder(configure, &folder, &path), BUILD_LIMIT)?;
    name_no_drivers(&folder)?;
    let make = command(["nice", "-n", "10", "ninja", "-j2", "lib/libibverbs.so", "lib/librdmacm.so"]);
    run(in_folder(make, &folder, &path), BUILD_LIMIT)?;
    fs::write(home.join("built"), state)?;
    Ok(libraries)
}

/// Each patch fits as it is, or not at all.
fn apply(patch: &Path, source: &Path) -> Result<()> {
    let mut command = command(["patch", "--strip=1", "--fuzz=0", "--forward", "--batch", "--input"]);
    command.arg(patch).current_dir(source);
    run(command, FETCH_LIMIT).with_context(|| format!("{} does not apply", patch.display())).map(|_| ())
}
