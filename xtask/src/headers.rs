//! rdma-core's headers, as the C compiler sees them.
//!
//! Those of release 55 are inside the sources that the crate `ibverbs-sys` carries, the private ones among them; cargo
//! fetches it. Does: compile a C program against them and run it. Leaves to others: what is asked, and comparing.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::process::{command, has_program, run};

/// The crate whose archive holds the sources of rdma-core 55.
const SOURCE_CRATE: (&str, &str) = ("ibverbs-sys", "0.3.2+55.0");
const FETCH_LIMIT: Duration = Duration::from_secs(10 * 60);
const COMPILE_LIMIT: Duration = Duration::from_secs(60);
/// Where a build would put the headers of the source's folders, by the names that they use among themselves.
const FOLDERS: [(&str, &str); 6] = [
    ("infiniband", "libibverbs"),
    ("infiniband", "kernel-headers/rdma"),
    ("rdma", "kernel-headers/rdma"),
    ("rdma", "librdmacm"),
    ("ccan", "ccan"),
    ("util", "util"),
];

/// The headers of a release, in the places where programs look for them.
#[derive(Debug)]
pub struct Headers {
    folder: TempDir,
}

impl Headers {
    /// Those of release 55.
    pub fn of_release_55() -> Result<Self> {
        ensure!(has_program("cc"), "there is no C compiler");
        let source = source_of_release_55()?;
        let folder = tempfile::tempdir()?;
        for (name, place) in FOLDERS {
            link_headers(&source.join(place), &folder.path().join(name))?;
        }
        // What a build has found out about this machine is no matter for layouts.
        fs::write(folder.path().join("config.h"), "")?;
        Ok(Self { folder })
    }

    /// What a C program prints that is compiled against them.
    pub fn ask(&self, program: &str) -> Result<String> {
        let (source, executable) = (self.folder.path().join("probe.c"), self.folder.path().join("probe"));
        fs::write(&source, program)?;
        let mut compile = command(["cc", "-std=gnu11", "-D_GNU_SOURCE", "-I"]);
        compile.arg(self.folder.path()).arg(&source).arg("-o").arg(&executable);
        run(compile, COMPILE_LIMIT)?;
        Ok(run(Command::new(&executable), COMPILE_LIMIT)?.stdout)
    }
}

fn link_headers(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let (header, link) = (entry.path(), to.join(entry.file_name()));
        if header.extension().is_some_and(|end| end == "h") && !link.exists() {
            symlink(header, link)?;
        }
    }
    Ok(())
}

/// Where cargo keeps the sources of rdma-core 55; fetched if they are not there.
pub fn source_of_release_55() -> Result<PathBuf> {
    let (name, version) = SOURCE_CRATE;
    let package = tempfile::tempdir()?;
    fs::create_dir_all(package.path().join("src"))?;
    fs::write(package.path().join("src/lib.rs"), "")?;
    let manifest = format!(
        "[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[dependencies]\n\
         {name} = \"={version}\"\n[workspace]\n"
    );
    fs::write(package.path().join("Cargo.toml"), manifest)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut metadata = command([cargo]);
    metadata.args(["metadata", "--format-version", "1"]).current_dir(package.path());
    let outcome = run(metadata, FETCH_LIMIT)?;
    let metadata: serde_json::Value = serde_json::from_str(&outcome.stdout)?;
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let found = packages.find(|package| package["name"] == name).context("cargo knows no such crate")?;
    let manifest = found["manifest_path"].as_str().context("cargo names no manifest")?;
    Ok(Path::new(manifest).parent().unwrap_or(Path::new("/")).join("vendor/rdma-core"))
}
