//! Link settings of the cdylib, among them what makes it load on older C libraries than the one it is built with.
//!
//! A linker takes the newest version of a symbol. In 2.34 glibc gave new ones to most of what moved from libpthread
//! and libdl into libc, so that a build on Debian 12 would not load on Debian 11, though nothing in it needs anything
//! that Debian 11 lacks. Each such function is wrapped (`ld --wrap`) by a jump to its old version, which every glibc
//! still has; `src/old_glibc.rs` assembles the jumps. `cargo xtask build` refuses a provider that asks for more.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs, io};

/// The first version of functions that have had a new one since.
const MOVED: [(&str, &str); 13] = [
    ("dlopen", "GLIBC_2.2.5"),
    ("dlsym", "GLIBC_2.2.5"),
    ("pthread_attr_getguardsize", "GLIBC_2.2.5"),
    ("pthread_attr_getstack", "GLIBC_2.2.5"),
    ("pthread_attr_setstacksize", "GLIBC_2.2.5"),
    ("pthread_create", "GLIBC_2.2.5"),
    ("pthread_detach", "GLIBC_2.2.5"),
    ("pthread_getattr_np", "GLIBC_2.2.5"),
    ("pthread_key_create", "GLIBC_2.2.5"),
    ("pthread_key_delete", "GLIBC_2.2.5"),
    ("pthread_setname_np", "GLIBC_2.12"),
    ("pthread_setspecific", "GLIBC_2.2.5"),
    ("pthread_sigmask", "GLIBC_2.2.5"),
];

/// Functions that older libraries have only under another name, with the version of the structure before the arguments.
const RENAMED: [(&str, &str); 3] =
    [("fstat", "__fxstat"), ("fstat64", "__fxstat64"), ("stat64", "__xstat64")];

fn main() -> io::Result<()> {
    // libibverbs keeps pointers into a driver for ever: the library must survive a dlclose.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
    let is = |key: &str, value: &str| env::var(key).is_ok_and(|found| found == value);
    let applies = is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_ENV", "gnu");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("old_glibc.s"), if applies { jumps() } else { String::new() })?;
    if applies {
        wrap();
    }
    Ok(())
}

fn wrap() {
    for (name, _) in MOVED.iter().chain(&RENAMED) {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--wrap={name}");
    }
    // Where the old versions live on old systems; on new ones these are empty.
    for library in ["libpthread.so.0", "libdl.so.2"] {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--push-state,--no-as-needed,-l:{library},--pop-state");
    }
}

/// The functions that take the wrapped ones' place.
fn jumps() -> String {
    let mut text = String::new();
    for (name, version) in MOVED {
        // Writing to a string cannot fail.
        let _ = writeln!(text, ".symver freeflow_old_{name}, {name}@{version}");
        let _ = writeln!(text, "{}\tjmp freeflow_old_{name}@PLT", label(name));
    }
    for (name, old) in RENAMED {
        // The structure of 64-bit machines has number 1.
        let shift = "\tmov rdx, rsi\n\tmov rsi, rdi\n\tmov edi, 1\n";
        let _ = writeln!(text, "{}{shift}\tjmp {old}@PLT", label(name));
    }
    text
}

fn label(name: &str) -> String {
    format!(".globl __wrap_{name}\n.hidden __wrap_{name}\n.type __wrap_{name}, @function\n__wrap_{name}:\n")
}
