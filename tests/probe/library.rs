//! The functions of the stock libibverbs, found when the program runs.
//!
//! Does: `dlopen` and `dlsym`. Leaves to others: what a call means and who owns what (`verbs`). Nothing is linked, so
//! that the probe can be built where libibverbs is not installed.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

use anyhow::{Result, anyhow};
use verbs_abi::ffi::*;

const NAME: &CStr = c"libibverbs.so.1";

macro_rules! library {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)+) => {
        /// The entry points that the probe uses, by their C names.
        #[derive(Debug)]
        pub(crate) struct Library {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)+
        }

        impl Library {
            fn find(symbol: impl Fn(&'static CStr) -> Result<*mut c_void>) -> Result<Self> {
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        let name = CStr::from_bytes_with_nul(name.as_bytes())?;
                        // SAFETY: the symbol is the function of this name of rdma-core's stable interface, whose
                        // prototype is spelled out below.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($argument),*) $(-> $result)?,
                            >(symbol(name)?)
                        }
                    },)+
                })
            }
        }
    };
}

library! {
    ibv_fork_init: fn() -> c_int;
    ibv_get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list: fn(*mut *mut ibv_device);
    ibv_open_device: fn(*mut ibv_device) -> *mut ibv_context;
    ibv_import_device: fn(c_int) -> *mut ibv_context;
    ibv_import_pd: fn(*mut ibv_context, u32) -> *mut ibv_pd;
    ibv_unimport_pd: fn(*mut ibv_pd);
    ibv_import_mr: fn(*mut ibv_pd, u32) -> *mut ibv_mr;
    ibv_unimport_mr: fn(*mut ibv_mr);
    ibv_close_device: fn(*mut ibv_context) -> c_int;
    ibv_query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    ibv_query_gid: fn(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
    _ibv_query_gid_ex: fn(*mut ibv_context, u32, u32, *mut ibv_gid_entry, u32, usize) -> c_int;
    _ibv_query_gid_table: fn(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
    ibv_alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd: fn(*mut ibv_pd) -> c_int;
    ibv_reg_mr: fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    ibv_dereg_mr: fn(*mut ibv_mr) -> c_int;
    ibv_reg_mr_iova: fn(*mut ibv_pd, *mut c_void, usize, u64, c_int) -> *mut ibv_mr;
    ibv_reg_dmabuf_mr: fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
    ibv_query_ece: fn(*mut ibv_qp, *mut ibv_ece) -> c_int;
    ibv_set_ece: fn(*mut ibv_qp, *mut ibv_ece) -> c_int;
    ibv_query_qp_data_in_order: fn(*mut ibv_qp, ibv_wr_opcode, u32) -> c_int;
    ibv_create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
    ibv_create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    ibv_resize_cq: fn(*mut ibv_cq, c_int) -> c_int;
    ibv_destroy_cq: fn(*mut ibv_cq) -> c_int;
    ibv_get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events: fn(*mut ibv_cq, c_uint);
    ibv_get_async_event: fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ibv_ack_async_event: fn(*mut ibv_async_event);
    ibv_create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    ibv_query_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
    ibv_destroy_qp: fn(*mut ibv_qp) -> c_int;
    ibv_destroy_srq: fn(*mut ibv_srq) -> c_int;
    ibv_qp_to_qp_ex: fn(*mut ibv_qp) -> *mut ibv_qp_ex;
    ibv_attach_mcast: fn(*mut ibv_qp, *const ibv_gid, u16) -> c_int;
    ibv_detach_mcast: fn(*mut ibv_qp, *const ibv_gid, u16) -> c_int;
    ibv_create_ah: fn(*mut ibv_pd, *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_init_ah_from_wc: fn(*mut ibv_context, u8, *mut ibv_wc, *mut ibv_grh, *mut ibv_ah_attr) -> c_int;
    ibv_destroy_ah: fn(*mut ibv_ah) -> c_int;
    ibv_wc_status_str: fn(ibv_wc_status) -> *const c_char;
}

static LIBRARY: OnceLock<Library> = OnceLock::new();

/// Opens the library; once, before anything else.
pub(crate) fn load() -> Result<()> {
    // SAFETY: libibverbs may be loaded at any time; its constructors ask for nothing.
    let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        return Err(anyhow!("cannot load {}: {}", NAME.to_string_lossy(), loader_error()));
    }
    let library = Library::find(|name| {
        // SAFETY: the handle is that of a loaded library, the name a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        if symbol.is_null() {
            Err(anyhow!("libibverbs lacks {}", name.to_string_lossy()))
        } else {
            Ok(symbol)
        }
    })?;
    LIBRARY.get_or_init(|| library);
    Ok(())
}

/// The library that [`load`] opened.
pub(crate) fn library() -> &'static Library {
    LIBRARY.get().expect("the library is loaded first")
}

fn loader_error() -> String {
    // SAFETY: after a failed dlopen this is a C string that stays until the next call of this thread.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown".to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}
