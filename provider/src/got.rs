//! Rewriting the imports of one loaded library: the words of its global offset table that hold the addresses of
//! functions it takes from others.
//!
//! Other libraries and the program keep theirs, so a replaced `write` sees the calls of that library alone. Which
//! functions and when is [`crate::hooks`]' decision.

use std::ffi::{CStr, CString, c_void};
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::abi::elf::Import;
use crate::abi::library::{Library, default_symbol};

/// The function that an import led to before it was rewritten.
#[derive(Debug)]
pub(crate) struct Original(AtomicPtr<c_void>);

impl Original {
    /// Nothing rewritten yet.
    pub(crate) const fn new() -> Original {
        Original(AtomicPtr::new(ptr::null_mut()))
    }

    /// The function's address, if it was rewritten.
    pub(crate) fn load(&self) -> Option<*const c_void> {
        let address = self.0.load(Ordering::Acquire);
        (!address.is_null()).then_some(address.cast_const())
    }
}

/// What an import is to be replaced by.
#[derive(Debug)]
pub(crate) struct Hook {
    /// The imported symbol.
    pub(crate) name: &'static CStr,
    /// The function to lead to, of the same C type as the symbol's.
    pub(crate) replacement: *const c_void,
    /// Where to keep the address of what it replaces.
    pub(crate) original: &'static Original,
}

/// Why an import could not be rewritten.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PatchError {
    /// The page of the slot could not be made writable (sealed, or forbidden by a policy).
    #[error("cannot rewrite the import {name:?} of {library:?}: {source}")]
    Protected { name: CString, library: CString, source: io::Error },
    /// The library binds lazily and nothing defines the symbol.
    #[error("{library:?} imports {name:?}, which nothing defines")]
    Undefined { name: CString, library: CString },
}

/// Leads the imports of `library` that `hooks` name to their replacements; those that do so already stay. Returns
/// the hooks that the library has no import for.
pub(crate) fn patch<'h>(library: &Library, hooks: &'h [Hook]) -> Result<Vec<&'h Hook>, PatchError> {
    let mut absent: Vec<&Hook> = hooks.iter().collect();
    for import in library.object().imports() {
        if let Some(hook) = hooks.iter().find(|hook| hook.name == import.name) {
            absent.retain(|other| other.name != hook.name);
            rewrite(library, &import, hook)?;
        }
    }
    Ok(absent)
}

fn rewrite(library: &Library, import: &Import<'_>, hook: &Hook) -> Result<(), PatchError> {
    // SAFETY: the slot is an aligned word of the pinned library; the dynamic linker writes it atomically too.
    let slot = unsafe { AtomicPtr::from_ptr(import.slot) };
    let current = slot.load(Ordering::Acquire);
    if ptr::eq(current, hook.replacement) {
        return Ok(());
    }
    let original = resolved(library, hook.name, current).ok_or_else(|| PatchError::Undefined {
        name: hook.name.to_owned(),
        library: library.object().path.clone(),
    })?;
    // The first one stays: all imports of a symbol lead to the same function.
    let _ = hook.original.0.compare_exchange(ptr::null_mut(), original, Ordering::AcqRel, Ordering::Acquire);
    let protected = |source| PatchError::Protected {
        name: hook.name.to_owned(),
        library: library.object().path.clone(),
        source,
    };
    writable(library, import.slot as usize, || slot.store(hook.replacement.cast_mut(), Ordering::Release))
        .map_err(protected)
}

/// What a slot leads to. A lazily bound slot that was not used yet points into its own library's linkage table:
/// calling that would bind the slot and so undo the rewriting.
fn resolved(library: &Library, name: &CStr, current: *mut c_void) -> Option<*mut c_void> {
    if !library.object().image.contains(&(current as usize)) {
        return Some(current);
    }
    let global = default_symbol(name);
    if global.is_null() { library.symbol(name).map(|symbol| symbol.as_ptr()) } else { Some(global) }
}

/// Runs `write` while the page of `address` is writable. Only pages that the dynamic linker made read-only are
/// touched: an import table outside them shares its page with ordinary data.
fn writable(library: &Library, address: usize, write: impl FnOnce()) -> io::Result<()> {
    let page = page_of(address);
    let relro = &library.object().relro;
    let read_only = page_of(relro.start).start..page_of(relro.end).start;
    if !read_only.contains(&page.start) {
        write();
        return Ok(());
    }
    protect(&page, libc::PROT_READ | libc::PROT_WRITE)?;
    write();
    protect(&page, libc::PROT_READ)
}

fn protect(page: &Range<usize>, protection: i32) -> io::Result<()> {
    // SAFETY: a page of a pinned library's data, whose content this does not change.
    match unsafe { libc::mprotect(page.start as *mut c_void, page.len(), protection) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn page_of(address: usize) -> Range<usize> {
    // SAFETY: no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let start = address & !(size - 1);
    start..start + size
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::library::LIBIBVERBS;
    use std::mem::transmute;
    use std::sync::atomic::AtomicUsize;

    static GETUID: Original = Original::new();
    static CALLS: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn counted_getuid() -> libc::uid_t {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the original of `getuid` has its type.
        let original: extern "C" fn() -> libc::uid_t = unsafe { transmute(GETUID.load().unwrap()) };
        original()
    }

    #[test]
    fn a_rewritten_import_sees_the_calls_of_its_library_alone() {
        // SAFETY: libibverbs' initialisers have no effect outside it.
        if unsafe { libc::dlopen(LIBIBVERBS.as_ptr(), libc::RTLD_NOW) }.is_null() {
            println!(
                "SKIP a_rewritten_import_sees_the_calls_of_its_library_alone: libibverbs1 is not installed"
            );
            return;
        }
        let library = Library::find(LIBIBVERBS).unwrap();
        let replacement = counted_getuid as *const () as *const c_void;
        let hooks = [
            Hook { name: c"getuid", replacement, original: &GETUID },
            Hook { name: c"not_imported", replacement, original: &GETUID },
        ];
        let absent: Vec<_> = patch(&library, &hooks).unwrap().iter().map(|hook| hook.name).collect();
        assert_eq!(absent, [c"not_imported"]);
        // SAFETY: getuid has no preconditions.
        unsafe { libc::getuid() };
        assert_eq!(CALLS.load(Ordering::Relaxed), 0, "the program's own calls are not its business");
        type SysfsPath = extern "C" fn() -> *const std::ffi::c_char;
        // SAFETY: the function has had this type in every release.
        let path: SysfsPath = unsafe { transmute(library.symbol(c"ibv_get_sysfs_path").unwrap()) };
        assert!(!path().is_null());
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert!(patch(&library, &hooks).is_ok(), "a second time changes nothing");
    }
}
