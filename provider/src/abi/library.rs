//! Libraries found among what is loaded, and the private functions of libibverbs.
//!
//! Nothing of rdma-core is linked: a link would bind to the version nodes of one release. Found by SONAME, pinned
//! (so that it is not unloaded under the hooks and the registered driver), asked by `dlsym`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::transmute;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use verbs_abi::ffi::{ibv_context, ibv_device, ibv_qp, ibv_qp_ex};

use super::elf::Object;
use super::layout::{Level, PRIVATE_ABIS, QP_COMP_MASK, VERBS_QP_EX};

/// The SONAME of libibverbs.
pub(crate) const LIBIBVERBS: &CStr = c"libibverbs.so.1";
/// The SONAME of librdmacm.
pub(crate) const LIBRDMACM: &CStr = c"librdmacm.so.1";

/// A library that stays loaded until the process ends.
#[derive(Debug)]
pub(crate) struct Library {
    object: Object,
    handle: NonNull<c_void>,
}

// SAFETY: the handle is a number to `dlsym`, which any thread may call; the object is read-only data.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The loaded library with this SONAME, pinned; `None` while nothing has loaded it.
    pub(crate) fn find(soname: &CStr) -> Option<Library> {
        let loaded = Object::find(soname)?;
        let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
        // SAFETY: a C string; NOLOAD runs no initialiser, NODELETE pins what is loaded already.
        let handle = NonNull::new(unsafe { libc::dlopen(loaded.path.as_ptr(), flags) })?;
        // Looked up again: another thread may have unloaded and loaded it anew before it was pinned.
        Some(Library { object: Object::find(soname)?, handle })
    }

    /// The loaded object.
    pub(crate) fn object(&self) -> &Object {
        &self.object
    }

    /// The address of a symbol of the library, or of one that it depends on.
    pub(crate) fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: a handle from `dlopen` that is never closed, and a C string.
        NonNull::new(unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) })
    }
}

/// What `dlsym` returns.
type Address = NonNull<c_void>;
type RegisterDriver = unsafe extern "C" fn(ops: *const c_void);
type RegisterUserDriver = unsafe extern "C" fn(ops: *const c_void, user_ops: *const c_void);
type InitAndAllocContext = unsafe extern "C" fn(
    device: *mut ibv_device,
    cmd_fd: c_int,
    size: usize,
    offset: *mut c_void,
    driver_id: u32,
) -> *mut c_void;
type SetOps = unsafe extern "C" fn(verbs_context: *mut c_void, ops: *const *const c_void);
type UninitContext = unsafe extern "C" fn(verbs_context: *mut c_void);
type QpToQpEx = unsafe extern "C" fn(qp: *mut ibv_qp) -> *mut ibv_qp_ex;

/// The libibverbs of this process: its layout and its private functions.
#[derive(Debug)]
pub(crate) struct Verbs {
    /// The library.
    pub(crate) library: Library,
    /// Its layout.
    pub(crate) level: Level,
    /// The offset of `verbs_qp.comp_mask`.
    pub(crate) qp_comp_mask: usize,
    /// `verbs_register_driver_NN`.
    pub(crate) register_driver: RegisterDriver,
    /// `verbs_register_user_driver`, where libibverbs lets providers announce devices of their own.
    pub(crate) register_user_driver: Option<RegisterUserDriver>,
    /// `_verbs_init_and_alloc_context`; owns the descriptor it is given, whatever it returns.
    pub(crate) init_and_alloc_context: InitAndAllocContext,
    /// `verbs_set_ops`.
    pub(crate) set_ops: SetOps,
    /// `verbs_uninit_context`; closes `cmd_fd` and `async_fd`.
    pub(crate) uninit_context: UninitContext,
}

/// Why a libibverbs cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LibraryError {
    /// A release with a layout that is not in the table.
    #[error(
        "{path} has private ABI {} and newest version IBVERBS_1.{}, a layout this provider does not know; \
         the device ff0 is not offered. Use rdma-core 25 to 65 or a newer freeflow",
        shown(*abi),
        shown(*node)
    )]
    UnknownLayout { path: String, abi: Option<u32>, node: Option<u32> },
    /// A symbol that every known release has is not there.
    #[error("{path} has no symbol {symbol}, which rdma-core 25 to 65 have; the device ff0 is not offered")]
    NoSymbol { path: String, symbol: &'static str },
    /// No known place of `verbs_qp.comp_mask` has the meaning it should have.
    #[error("{path} lays its QPs out in a way this provider does not know; the device ff0 is not offered")]
    UnknownQp { path: String },
}

fn shown(number: Option<u32>) -> String {
    number.map_or_else(|| "(none)".to_owned(), |number| number.to_string())
}

impl Verbs {
    /// The libibverbs of this process, looked for once and again as long as there is none.
    pub(crate) fn loaded() -> Result<Option<&'static Verbs>, LibraryError> {
        static VERBS: OnceLock<Verbs> = OnceLock::new();
        if let Some(verbs) = VERBS.get() {
            return Ok(Some(verbs));
        }
        match Library::find(LIBIBVERBS) {
            None => Ok(None),
            Some(library) => {
                let verbs = Verbs::of(library)?;
                Ok(Some(VERBS.get_or_init(|| verbs)))
            }
        }
    }

    /// Whether it is of release 45 or newer, where extended QPs grew.
    pub(crate) fn is_45_or_newer(&self) -> bool {
        self.qp_comp_mask == QP_COMP_MASK[2]
    }

    fn of(library: Library) -> Result<Verbs, LibraryError> {
        let path = || library.object.path.to_string_lossy().into_owned();
        let nodes = library.object.version_nodes();
        let (abi, node) = (newest(&nodes, "IBVERBS_PRIVATE_"), newest(&nodes, "IBVERBS_1."));
        let level = abi.zip(node).and_then(|(abi, node)| Level::of(abi, node));
        let Some(level) = level else {
            return Err(LibraryError::UnknownLayout { path: path(), abi, node });
        };
        let symbol = |name: &'static CStr| {
            let missing =
                || LibraryError::NoSymbol { path: path(), symbol: name.to_str().unwrap_or_default() };
            library.symbol(name).ok_or_else(missing)
        };
        // SAFETY: `ibv_qp_to_qp_ex` has had this type in every release.
        let qp_to_qp_ex = unsafe { transmute::<Address, QpToQpEx>(symbol(c"ibv_qp_to_qp_ex")?) };
        let qp_comp_mask = probe_qp(qp_to_qp_ex).ok_or_else(|| LibraryError::UnknownQp { path: path() })?;
        Ok(Verbs {
            level,
            qp_comp_mask,
            // SAFETY: each of these functions has had the type of its field in every release from 25 to 65, and
            // the level says that this is one of them.
            register_driver: unsafe { transmute::<Address, RegisterDriver>(symbol(register_driver(abi))?) },
            // SAFETY: what `rdma-core-patches/` gives this name has this type.
            register_user_driver: library
                .symbol(c"verbs_register_user_driver")
                .map(|symbol| unsafe { transmute::<Address, RegisterUserDriver>(symbol) }),
            // SAFETY: as above.
            init_and_alloc_context: unsafe {
                transmute::<Address, InitAndAllocContext>(symbol(c"_verbs_init_and_alloc_context")?)
            },
            // SAFETY: as above.
            set_ops: unsafe { transmute::<Address, SetOps>(symbol(c"verbs_set_ops")?) },
            // SAFETY: as above.
            uninit_context: unsafe { transmute::<Address, UninitContext>(symbol(c"verbs_uninit_context")?) },
            library,
        })
    }
}

/// The greatest number that follows `prefix` among the names of version nodes.
fn newest(nodes: &[&CStr], prefix: &str) -> Option<u32> {
    let numbers = nodes.iter().filter_map(|node| node.to_str().ok()?.strip_prefix(prefix)?.parse().ok());
    numbers.max()
}

/// The symbol with which drivers of a private ABI register.
fn register_driver(abi: Option<u32>) -> &'static CStr {
    const NAMES: [&CStr; PRIVATE_ABIS.len()] = [
        c"verbs_register_driver_65",
        c"verbs_register_driver_64",
        c"verbs_register_driver_59",
        c"verbs_register_driver_57",
        c"verbs_register_driver_34",
        c"verbs_register_driver_33",
        c"verbs_register_driver_25",
    ];
    let rank = PRIVATE_ABIS.iter().position(|&known| Some(known) == abi);
    rank.map_or(c"verbs_register_driver", |rank| NAMES[rank])
}

/// Finds `verbs_qp.comp_mask`: the word whose `VERBS_QP_EX` makes `ibv_qp_to_qp_ex` return the QP.
fn probe_qp(qp_to_qp_ex: QpToQpEx) -> Option<usize> {
    QP_COMP_MASK.into_iter().find(|&offset| {
        let mut scratch = [0_u64; 128];
        // SAFETY: every candidate lies within the scratch, at a multiple of four bytes.
        unsafe { scratch.as_mut_ptr().cast::<u8>().add(offset).cast::<u32>().write(VERBS_QP_EX) };
        // SAFETY: the function reads one word of the QP, which is at most 400 bytes long, and keeps nothing.
        !unsafe { qp_to_qp_ex(scratch.as_mut_ptr().cast()) }.is_null()
    })
}

/// The `verbs_context` that ends in this public context.
///
/// # Safety
/// `context` must be the public part of a `verbs_context` of this level.
pub(crate) unsafe fn verbs_context(level: Level, context: *mut ibv_context) -> *mut c_void {
    // SAFETY: the caller's promise; the public part is the last.
    unsafe { context.cast::<u8>().add(size_of::<ibv_context>()).sub(level.context_size()).cast() }
}

/// The public context at the end of a `verbs_context`.
///
/// # Safety
/// `verbs_context` must be one of this level.
pub(crate) unsafe fn public_context(level: Level, verbs_context: *mut c_void) -> *mut ibv_context {
    // SAFETY: the caller's promise; the public part is the last.
    unsafe { verbs_context.cast::<u8>().add(level.context_size()).sub(size_of::<ibv_context>()).cast() }
}

/// The address of a function as the process at large sees it.
pub(crate) fn default_symbol(name: &CStr) -> *mut c_void {
    let name: *const c_char = name.as_ptr();
    // SAFETY: RTLD_DEFAULT is a valid pseudo-handle, and the name a C string.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name) }).map_or(ptr::null_mut(), NonNull::as_ptr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_node_is_the_greatest_number() {
        let nodes = [c"libibverbs.so.1", c"IBVERBS_1.9", c"IBVERBS_1.14", c"IBVERBS_PRIVATE_34"];
        assert_eq!(newest(&nodes, "IBVERBS_1."), Some(14));
        assert_eq!(newest(&nodes, "IBVERBS_PRIVATE_"), Some(34));
        assert_eq!(newest(&nodes, "OTHER_"), None);
    }

    #[test]
    fn every_private_abi_has_its_registering_symbol() {
        for &abi in PRIVATE_ABIS {
            assert_eq!(register_driver(Some(abi)).to_str().unwrap(), format!("verbs_register_driver_{abi}"));
        }
    }

    #[test]
    fn an_installed_libibverbs_is_known() {
        // SAFETY: libibverbs' initialisers have no effect outside it.
        if unsafe { libc::dlopen(LIBIBVERBS.as_ptr(), libc::RTLD_NOW) }.is_null() {
            println!("SKIP an_installed_libibverbs_is_known: libibverbs1 is not installed");
            return;
        }
        let verbs = Verbs::loaded().unwrap().expect("it was loaded just now");
        assert!(QP_COMP_MASK.contains(&verbs.qp_comp_mask));
        assert!(verbs.library.symbol(c"ibv_get_device_list").is_some());
    }
}
