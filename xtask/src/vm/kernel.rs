//! The kernel of the guests: that of a Debian package, unpacked beside what else was built, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::process::{command, run};

/// Debian's package that depends on the newest one.
const NEWEST: &str = "linux-image-amd64";
const LIMIT: Duration = Duration::from_secs(300);
/// Parts of the kernel that no guest of ours has a device for: half of the modules.
const LEFT_OUT: [&str; 5] =
    ["*/drivers/gpu/*", "*/drivers/media/*", "*/drivers/net/wireless/*", "*/kernel/sound/*", "./usr/*"];

/// A kernel with its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    cache: PathBuf,
    version: String,
}

impl Kernel {
    /// The one in the cache of this workspace, which is filled from the package archive where it is empty.
    pub fn prepare(workspace: &Path) -> Result<Self> {
        let cache = workspace.join("target/vm");
        fs::create_dir_all(&cache)?;
        let cache = cache.canonicalize()?;
        let version = match cached(&cache)? {
            Some(version) => version,
            None => fetch(&cache).context("no kernel for guests could be fetched")?,
        };
        Ok(Self { cache, version })
    }

    /// Where guests have their directories.
    pub(super) fn cache(&self) -> &Path {
        &self.cache
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    fn root(&self) -> PathBuf {
        self.cache.join(format!("{LINUX}{}", self.version))
    }

    pub(super) fn image(&self) -> PathBuf {
        self.root().join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The directory of its modules.
    pub(super) fn modules(&self) -> PathBuf {
        self.root().join("lib/modules").join(&self.version)
    }

    /// The files of some modules and of all that they need, in the order in which they are to be loaded.
    pub(super) fn modules_for(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut ask =
            command(["modprobe", "--show-depends", "--all", "--set-version", &self.version, "--dirname"]);
        ask.arg(self.root()).args(names);
        let mut files = Vec::new();
        for line in run(ask, LIMIT)?.stdout.lines() {
            // The others say that something is built in.
            let file = line
                .strip_prefix("insmod ")
                .and_then(|rest| rest.split_whitespace().next())
                .map(PathBuf::from);
            files.extend(file.filter(|file| !files.contains(file)));
        }
        Ok(files)
    }
}

const LINUX: &str = "linux-";

fn cached(cache: &Path) -> Result<Option<String>> {
    let names = fs::read_dir(cache)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter_map(|name| name.strip_prefix(LINUX).map(str::to_owned)).max())
}

/// Fetches and unpacks; the result appears in the cache when it is whole.
fn fetch(cache: &Path) -> Result<String> {
    eprintln!("vm: fetching a kernel of Debian ...");
    let work = TempDir::with_prefix_in("fetch-", cache)?;
    let package = newest().or_else(|_| {
        // The lists of packages may be absent.
        run(command(["apt-get", "update", "-qq"]), LIMIT)?;
        newest()
    })?;
    let mut download = command(["apt-get", "download", "-qq", &package]);
    download.current_dir(work.path());
    run(download, LIMIT)?;
    let unpacked = work.path().join("unpacked");
    fs::create_dir(&unpacked)?;
    let leave_out: Vec<String> = LEFT_OUT.iter().map(|pattern| format!("--exclude='{pattern}'")).collect();
    let unpack = format!("dpkg-deb --fsys-tarfile *.deb | tar -x -C unpacked {}", leave_out.join(" "));
    let mut unpack = command(["sh", "-c", &unpack]);
    unpack.current_dir(work.path());
    run(unpack, LIMIT)?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    run(command([Path::new("depmod"), Path::new("-b"), &unpacked, Path::new(&version)]), LIMIT)?;
    fs::rename(&unpacked, cache.join(format!("{LINUX}{version}")))?;
    Ok(version)
}

/// The package with the newest kernel's image.
fn newest() -> Result<String> {
    let answer = run(command(["apt-cache", "depends", NEWEST]), LIMIT)?.stdout;
    let package = answer.split_whitespace().find(|word| word.starts_with("linux-image-") && *word != NEWEST);
    match package {
        Some(package) => Ok(package.to_owned()),
        None => bail!("{NEWEST} depends on no image:\n{answer}"),
    }
}
