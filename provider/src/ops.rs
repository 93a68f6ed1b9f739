//! Which function implements which op.

use std::ffi::{c_int, c_void};
use std::ptr;

use verbs_abi::ffi::{
    IBV_LINK_LAYER_ETHERNET, IBV_MTU_4096, IBV_PORT_ACTIVE, ibv_context, ibv_device_attr, ibv_device_attr_ex,
    ibv_pd, ibv_port_attr, ibv_query_device_ex_input,
};

use crate::abi::edge::{self, Errno};
use crate::abi::layout::Op;
use crate::device;

/// The implementation of an op, or `None` to leave it at libibverbs' "not supported". The function has the C type
/// that the op has in the release of libibverbs that asks.
pub(crate) fn implementation(op: Op) -> Option<*const c_void> {
    let function = match op {
        Op::AllocPd => alloc_pd as *const (),
        Op::DeallocPd => dealloc_pd as *const (),
        Op::FreeContext => free_context as *const (),
        Op::QueryDevice => query_device as *const (),
        Op::QueryDeviceEx => query_device_ex as *const (),
        Op::QueryPort => query_port as *const (),
        _ => return None,
    };
    Some(function.cast())
}

unsafe extern "C" fn alloc_pd(_context: *mut ibv_context) -> *mut ibv_pd {
    edge::pointer(|| Ok(Box::into_raw(Box::new(ibv_pd { context: ptr::null_mut(), handle: 0 }))))
}

unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes what `alloc_pd` returned, once.
        drop(unsafe { Box::from_raw(pd) });
        Ok(())
    })
}

unsafe extern "C" fn free_context(context: *mut ibv_context) {
    // SAFETY: libibverbs passes an open context of ours, for the last time.
    edge::value((), || unsafe { device::close(context) });
}

unsafe extern "C" fn query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller's own arguments; a plain attribute structure is the head of the extended one.
    unsafe { query_device_ex(context, ptr::null(), attributes.cast(), size_of::<ibv_device_attr>()) }
}

unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    _input: *const ibv_query_device_ex_input,
    attributes: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    edge::status(|| {
        if size < size_of::<ibv_device_attr>() {
            return Err(Errno::INVAL);
        }
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        // SAFETY: libibverbs passes `size` writable bytes, and the plain attributes come first.
        unsafe {
            attributes.cast::<u8>().write_bytes(0, size);
            device.describe(&mut (*attributes).orig_attr);
        }
        Ok(())
    })
}

unsafe extern "C" fn query_port(
    _context: *mut ibv_context,
    port: u8,
    attributes: *mut ibv_port_attr,
) -> c_int {
    edge::status(|| {
        if port != 1 {
            return Err(Errno::INVAL);
        }
        // SAFETY: libibverbs passes a structure that has at least these fields, zeroed.
        let attributes = unsafe { &mut *attributes };
        attributes.state = IBV_PORT_ACTIVE;
        attributes.max_mtu = IBV_MTU_4096;
        attributes.active_mtu = IBV_MTU_4096;
        attributes.gid_tbl_len = 1;
        attributes.max_msg_sz = 1 << 30;
        attributes.pkey_tbl_len = 1;
        attributes.active_width = 2;
        attributes.active_speed = 32;
        attributes.phys_state = 5;
        attributes.link_layer = IBV_LINK_LAYER_ETHERNET as u8;
        Ok(())
    })
}
