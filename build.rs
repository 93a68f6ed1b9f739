//! Build script of verbs-abi: asks the C compiler for the layout of the verbs structures on this machine.
//!
//! What is asked is every field and constant of `verbs-abi/src/ffi.rs`: `declarations` makes a list for Rust
//! (`$OUT_DIR/layout_items.rs`) and a program for C (`$OUT_DIR/layout_probe.c`). The program's answer is for one unit
//! test (verbs-abi/src/ffi_layout.rs) and goes to `$OUT_DIR/layout.txt`, with the reason in its place when there is
//! none. No build fails here: neither the header nor a C compiler is needed to build.

#[path = "verbs-abi/declarations.rs"]
mod declarations;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What is compared, seen from the crate.
const DECLARED: &str = "src/ffi.rs";
/// Where distributions put the header; the compiler may find another.
const HEADER: &str = "/usr/include/infiniband/verbs.h";

fn main() {
    println!("cargo::rerun-if-changed=declarations.rs");
    println!("cargo::rerun-if-changed={DECLARED}");
    println!("cargo::rerun-if-changed=../build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    println!("cargo::rerun-if-env-changed=CFLAGS");
    // A file that does not exist would make every build run this anew.
    if Path::new(HEADER).exists() {
        println!("cargo::rerun-if-changed={HEADER}");
    }
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    if let Err(error) = write(&out) {
        println!("cargo::error=cannot write the layouts into {}: {error}", out.display());
    }
}

fn write(out: &Path) -> std::io::Result<()> {
    let declared = declarations::Declarations::read(&fs::read_to_string(DECLARED)?);
    fs::write(out.join("layout_items.rs"), declared.in_rust())?;
    fs::write(out.join("layout_probe.c"), declared.in_c())?;
    let layout = probe(out).unwrap_or_else(|reason| format!("skipped: {reason}\n"));
    fs::write(out.join("layout.txt"), layout)
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
        compiler.to_command().arg(out.join("layout_probe.c")).arg("-o").arg(&program).output().map_err(
            |error| format!("no C compiler: {} does not start: {error}", compiler.path().display()),
        )?;
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
