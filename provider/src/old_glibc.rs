//! Jumps to the old versions of functions of the C library, so that the provider loads on older ones than it was
//! built with. `build.rs` writes them, and says why.

std::arch::global_asm!(include_str!(concat!(env!("OUT_DIR"), "/old_glibc.s")));
