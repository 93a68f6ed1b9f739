//! Link settings of the cdylib.

fn main() {
    // libibverbs keeps pointers into a driver for ever: the library must survive a dlclose.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
}
