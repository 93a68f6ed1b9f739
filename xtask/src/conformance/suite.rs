//! Getting a release of rdma-core's tests, with a pyverbs of the same release, from the package registries.
//!
//! v44 is what Debian 12 has: its package `python3-pyverbs` carries the compiled module and the tests; it is
//! downloaded and unpacked, not installed. v55 is built from the sources that the crate `ibverbs-sys` carries, once.
//! Both are kept in the target directory.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    headers::source_of_release_55,
    process::{command, has_program, run},
};

/// The Python of Debian, for which its pyverbs is built.
const DEBIAN_PYTHON: &str = "/usr/bin/python3";
/// What must be there for a module to be built for it.
const DEBIAN_HEADERS: &str = "/usr/include/python3.11/Python.h";
/// What compiles pyverbs.
const CYTHON: &str = "cython==3.0.12";
/// What rdma-core is built with.
const TOOLS: &str =
    "gcc cmake ninja-build pkg-config patch libnl-3-dev libnl-route-3-dev python3-dev python3-venv";
pub(super) const FETCH_LIMIT: Duration = Duration::from_secs(10 * 60);
pub(super) const BUILD_LIMIT: Duration = Duration::from_secs(60 * 60);

/// A release of rdma-core's tests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Suite {
    /// Debian 12's.
    V44,
    /// Built from source.
    V55,
}

/// A suite that is ready to run.
#[derive(Clone, Debug)]
pub struct Tests {
    /// The folder of the tests.
    pub folder: PathBuf,
    /// The folder that holds pyverbs.
    pub pyverbs: PathBuf,
    /// Where libibverbs and librdmacm are, if not where they always are.
    pub libraries: Option<PathBuf>,
    /// The Python that the module is for.
    pub python: String,
    /// Whether they run without what a stock libibverbs needs to find the device.
    pub bare: bool,
}

impl Tests {
    /// The same tests on the patched libraries, which need nothing else to find the device.
    #[must_use]
    pub fn on_patched(mut self, libraries: PathBuf) -> Self {
        (self.libraries, self.bare) = (Some(libraries), true);
        self
    }
}

impl Suite {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V44, Self::V55];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V44 => "v44",
            Self::V55 => "v55",
        }
    }

    /// The committed table of what its tests come to.
    pub fn table(self, workspace: &Path) -> PathBuf {
        workspace.join(format!("conformance/{}.txt", self.name()))
    }

    /// Gets below `cache` what comes from elsewhere, unless it is there already: that it cannot be had is no fault of the
    /// tests.
    pub fn fetch(self, cache: &Path) -> Result<()> {
        let home = self.home(cache);
        let fetched = match self {
            Self::V44 => fetch_debian(&home).map(|_| ()),
            Self::V55 => fetch_source(&home),
        };
        fetched.with_context(|| format!("cannot get rdma-core's tests {}", self.name()))
    }

    /// Gets it ready below `cache`, unless it is there already.
    pub fn prepare(self, cache: &Path) -> Result<Tests> {
        self.fetch(cache)?;
        let home = self.home(cache);
        match self {
            Self::V44 => Ok(tests_of_debian(&home)),
            Self::V55 => build_source(&home).context("cannot build rdma-core's pyverbs of release 55"),
        }
    }

    fn home(self, cache: &Path) -> PathBuf {
        cache.join("conformance").join(self.name())
    }
}

fn tests_of_debian(home: &Path) -> Tests {
    Tests {
        folder: home.join("usr/share/doc/rdma-core/tests"),
        pyverbs: home.join("usr/lib/python3/dist-packages"),
        libraries: None,
        python: DEBIAN_PYTHON.to_owned(),
        bare: false,
    }
}

/// Debian's package, unpacked.
fn fetch_debian(home: &Path) -> Result<()> {
    if tests_of_debian(home).folder.join("base.py").exists() {
        return Ok(());
    }
    for program in ["apt-get", "dpkg-deb", "gunzip", DEBIAN_PYTHON] {
        ensure!(
            Path::new(program).exists() || has_program(program),
            "it needs Debian 12: there is no {program}"
        );
    }
    let package = fresh(home)?;
    let mut download = command(["apt-get", "download", "-qq", "python3-pyverbs"]);
    download.current_dir(&package);
    run(download, FETCH_LIMIT)?;
    let archive = only_file(&package)?;
    let version = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
    ensure!(version.contains("_44."), "this system has {version}, and not the release of Debian 12");
    let unpacked = package.join("unpacked");
    run(command([Path::new("dpkg-deb"), Path::new("-x"), &archive, &unpacked]), FETCH_LIMIT)?;
    let mut unzip = command(["gunzip", "--recursive"]);
    unzip.arg(unpacked.join("usr/share/doc/rdma-core/tests"));
    run(unzip, FETCH_LIMIT)?;
    replace(&unpacked, home)?;
    fs::remove_dir_all(&package)?;
    Ok(())
}

/// The sources of rdma-core, and Cython in a virtual environment.
fn fetch_source(home: &Path) -> Result<()> {
    if home.join("fetched").exists() {
        return Ok(());
    }
    require_tools(&["python3"])?;
    let (room, environment) = (fresh(home)?, home.join("python"));
    copy_source(&source_of_release_55()?, &room.join("source"))?;
    replace(&room, home)?;
    let base = if Path::new(DEBIAN_HEADERS).exists() { DEBIAN_PYTHON } else { "python3" };
    run(command([Path::new(base), Path::new("-m"), Path::new("venv"), &environment]), FETCH_LIMIT)?;
    let python = environment.join("bin/python3");
    let mut headers = command([&python]);
    headers.args(["-c", "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"]);
    run(headers, FETCH_LIMIT).context("there is no Python.h: install python3-dev")?;
    let mut pip = command([&python]);
    pip.args(["-m", "pip", "install", "--quiet", CYTHON]);
    run(pip, FETCH_LIMIT)?;
    fs::write(home.join("fetched"), "")?;
    Ok(())
}

/// libibverbs, librdmacm and pyverbs, in place, with what pyverbs' modules about vendors' devices are linked to: the
/// tests' own helpers import them all.
fn build_source(home: &Path) -> Result<Tests> {
    let (source, build, environment) = (home.join("source"), home.join("build"), home.join("python"));
    let python = environment.join("bin/python3");
    let tests = Tests {
        folder: source.join("tests"),
        pyverbs: build.join("python"),
        libraries: Some(build.join("lib")),
        python: python.display().to_string(),
        bare: false,
    };
    let done = home.join("built");
    if done.exists() {
        return Ok(tests);
    }
    println!("Building rdma-core's pyverbs of release 55, once, which takes minutes ...");
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", environment.join("bin").display());
    fs::create_dir_all(&build)?;
    let mut configure = command(["cmake", "-GNinja", "-DIN_PLACE=1", "-DNO_MAN_PAGES=1"]);
    // Half of the time would go into debugging information and optimisation.
    configure.args(["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_C_FLAGS=-O1"]);
    configure.arg(format!("-DPYTHON_EXECUTABLE={}", python.display())).arg(&source);
    run(in_folder(configure, &build, &path), BUILD_LIMIT)?;
    name_no_drivers(&build)?;
    run(in_folder(command(["nice", "-n", "10", "ninja", "-j2", "pyverbs/all"]), &build, &path), BUILD_LIMIT)?;
    fs::write(done, "")?;
    Ok(tests)
}

/// Fails where something is missing that rdma-core is built with, or one of these programs.
pub(super) fn require_tools(others: &[&str]) -> Result<()> {
    let programs = ["cc", "cmake", "ninja", "pkg-config", "cargo"];
    let missing = programs.iter().chain(others).find(|program| !has_program(program));
    ensure!(missing.is_none(), "there is no {}: install {TOOLS}", missing.unwrap_or(&""));
    let libraries = ["pkg-config", "--exists", "libnl-3.0", "libnl-route-3.0"];
    run(command(libraries), FETCH_LIMIT)
        .with_context(|| format!("there is no libnl: install {TOOLS}"))
        .map(|_| ())
}

/// A libibverbs that is built in place would warn of each driver that is named there and not built.
pub(super) fn name_no_drivers(build: &Path) -> Result<()> {
    let folder = build.join("etc/libibverbs.d");
    fs::remove_dir_all(&folder)?;
    fs::create_dir(&folder)?;
    Ok(())
}

pub(super) fn in_folder(
    mut command: std::process::Command,
    folder: &Path,
    path: &str,
) -> std::process::Command {
    command.current_dir(folder).env("PATH", path);
    command
}

/// Copies the sources: cargo's own are shared and stay as they are.
pub(super) fn copy_source(from: &Path, to: &Path) -> Result<()> {
    let mut copy = command(["cp", "--recursive", "--no-preserve=mode,ownership"]);
    copy.args([from, to]);
    run(copy, FETCH_LIMIT)?;
    // A build runs scripts of the tree.
    let mut executable = command(["chmod", "--recursive", "u+rwX,+x"]);
    executable.arg(to.join("buildlib"));
    run(executable, FETCH_LIMIT).map(|_| ())
}

/// An empty folder beside the place of something, on the same file system.
pub(super) fn fresh(home: &Path) -> Result<PathBuf> {
    let room = home.with_extension("new");
    if room.exists() {
        fs::remove_dir_all(&room)?;
    }
    fs::create_dir_all(&room).with_context(|| format!("cannot make {}", room.display()))?;
    Ok(room)
}

/// Puts a finished folder in its place.
pub(super) fn replace(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir_all(to.parent().unwrap_or(Path::new("/")))?;
    fs::rename(from, to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

fn only_file(folder: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(folder)?.map_while(Result::ok).map(|entry| entry.path());
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file),
        _ => bail!("apt-get did not download exactly one file"),
    }
}
