//! Build script of verbs-abi: asks the C compiler for the layout of the verbs structures on this machine.
//!
//! The answer is for one unit test (verbs-abi/src/ffi_layout.rs) and goes to `$OUT_DIR/layout.txt`, with the reason
//! in its place when there is none. No build fails here: neither the header nor a C compiler is needed to build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Where distributions put the header; the compiler may find another.
const HEADER: &str = "/usr/include/infiniband/verbs.h";

fn main() {
    println!("cargo::rerun-if-changed=layout_probe.c");
    println!("cargo::rerun-if-changed=../build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    println!("cargo::rerun-if-env-changed=CFLAGS");
    // A file that does not exist would make every build run this anew.
    if Path::new(HEADER).exists() {
        println!("cargo::rerun-if-changed={HEADER}");
    }
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    let layout = probe(&out).unwrap_or_else(|reason| format!("skipped: {reason}\n"));
    if let Err(error) = fs::write(out.join("layout.txt"), layout) {
        println!("cargo::error=cannot write layout.txt into {}: {error}", out.display());
    }
}

/// Compiles and runs the probe; otherwise tells why it could not.
fn probe(out: &Path) -> Result<String, String> {
    if env::var("HOST") != env::var("TARGET") {
        return Err("the probe cannot run where another machine's program is built".into());
    }
    let compiler = cc::Build::new()
        .cargo_metadata(false)
        .cargo_warnings(false)
        .try_get_compiler()
        .map_err(|error| format!("no C compiler: {error}"))?;
    let program = out.join("layout_probe");
    let compiled =
        compiler.to_command().arg("layout_probe.c").arg("-o").arg(&program).output().map_err(|error| {
            format!("no C compiler: {} does not start: {error}", compiler.path().display())
        })?;
    if !compiled.status.success() {
        let complaints = String::from_utf8_lossy(&compiled.stderr);
        let first = complaints.lines().next().unwrap_or("no reason given");
        return Err(format!("layout_probe.c does not compile (is infiniband/verbs.h installed?): {first}"));
    }
    let ran =
        Command::new(&program).output().map_err(|error| format!("the probe does not start: {error}"))?;
    if !ran.status.success() {
        return Err(format!("the probe failed: {}", ran.status));
    }
    String::from_utf8(ran.stdout).map_err(|error| format!("the probe printed no text: {error}"))
}
