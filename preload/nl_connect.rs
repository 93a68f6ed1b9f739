//! A preload that keeps libibverbs' device enumeration with sysfs.
//!
//! libibverbs asks the kernel for devices by RDMA netlink first, which loads the kernel's RDMA core where there is
//! one, and then looks no further. This object defines `nl_connect` and refuses that one protocol; all others go
//! to libnl. It is preloaded into every program of an environment, whatever its libc, so it needs no library and
//! asks for no symbol version: `dlopen` and `dlsym` are weak, and absent in a program that has neither.
//!
//! Built outside the workspace, with a plain
//!
//! ```text
//! rustc --edition 2024 --crate-type cdylib --crate-name freeflow_preload -C panic=abort -C opt-level=2 \
//!     -C strip=symbols -C link-arg=-nostartfiles -C link-arg=-nodefaultlibs -C link-arg=-Wl,--as-needed \
//!     -C link-arg=-Wl,-soname,libfreeflow-preload.so -o libfreeflow-preload.so preload/nl_connect.rs
//! ```
//!
//! `readelf -dV` of the result must show no NEEDED entry and no version section, `nm -D --defined-only` only
//! `nl_connect`.

#![no_std]

use core::arch::{asm, global_asm};
use core::ffi::{c_char, c_int, c_void};
use core::mem::transmute;
use core::ptr;

/// The netlink protocol of RDMA.
const NETLINK_RDMA: c_int = 20;
/// libnl's unspecific failure, `-NLE_FAILURE`.
const REFUSED: c_int = -1;
/// `RTLD_LAZY | RTLD_NOLOAD`.
const ONLY_IF_LOADED: c_int = 5;
/// `RTLD_NEXT`: what comes after this object in the program's search order.
const RTLD_NEXT: *mut c_void = ptr::without_provenance_mut(usize::MAX);

type DlOpen = unsafe extern "C" fn(*const c_char, c_int) -> *mut c_void;
type DlSym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
type NlConnect = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;

global_asm!(".weak dlopen", ".weak dlsym");

/// The address of a weak symbol, null if nothing defines it. Stable Rust cannot declare one.
macro_rules! weak {
    ($symbol:literal) => {{
        let address: *const c_void;
        // SAFETY: loads one word of this object's own global offset table, which the dynamic linker has filled.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            asm!(
                concat!("mov {0}, qword ptr [rip + ", $symbol, "@GOTPCREL]"),
                out(reg) address,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            asm!(
                concat!("adrp {0}, :got:", $symbol),
                concat!("ldr {0}, [{0}, :got_lo12:", $symbol, "]"),
                out(reg) address,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        address
    }};
}

/// Stands before libnl's function of this name.
///
/// # Safety
/// As libnl's: `socket` must be a `struct nl_sock`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nl_connect(socket: *mut c_void, protocol: c_int) -> c_int {
    if protocol == NETLINK_RDMA {
        return REFUSED;
    }
    match real_nl_connect() {
        // SAFETY: the caller's own arguments for the function it meant.
        Some(real) => unsafe { real(socket, protocol) },
        None => REFUSED,
    }
}

/// libnl's own: next in the search order, or, where libnl was loaded by a plugin and is not in that order, by name.
fn real_nl_connect() -> Option<NlConnect> {
    let (open, symbol) = (weak!("dlopen"), weak!("dlsym"));
    if symbol.is_null() {
        return None;
    }
    // SAFETY: the C library's `dlsym` has this type.
    let symbol: DlSym = unsafe { transmute(symbol) };
    let name = c"nl_connect".as_ptr();
    // SAFETY: a pseudo-handle and a C string.
    let mut real = unsafe { symbol(RTLD_NEXT, name) };
    if real.is_null() && !open.is_null() {
        // SAFETY: the C library's `dlopen` has this type.
        let open: DlOpen = unsafe { transmute(open) };
        // SAFETY: a C string; nothing is loaded that is not already.
        let libnl = unsafe { open(c"libnl-3.so.200".as_ptr(), ONLY_IF_LOADED) };
        if !libnl.is_null() {
            // SAFETY: a live handle and a C string.
            real = unsafe { symbol(libnl, name) };
        }
    }
    // SAFETY: `nl_connect` has this type in every libnl 3.
    if real.is_null() { None } else { Some(unsafe { transmute::<*mut c_void, NlConnect>(real) }) }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing above panics.
    loop {}
}
