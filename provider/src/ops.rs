//! Which function implements which op, and the ops that belong to the device as a whole.

use std::ffi::{c_int, c_void};
use std::ptr;

use verbs_abi::ffi::{
    ibv_context, ibv_device_attr, ibv_device_attr_ex, ibv_port_attr, ibv_query_device_ex_input,
};

use crate::abi::edge::{self, Errno};
use crate::abi::layout::Op;
use crate::{
    ah, attributes, clock, cq, cq_ex, device, dm, dmabuf, ece, import, mcast, mr, mw, on_demand, pd, post,
    qp, qp_create, srq,
};

/// The implementation of an op, or `None` to leave it at libibverbs' "not supported". The function has the C type
/// that the op has in the release of libibverbs that asks.
pub(crate) fn implementation(op: Op) -> Option<*const c_void> {
    let function = match op {
        Op::AdviseMr => on_demand::advise as *const (),
        Op::AllocDm => dm::alloc as *const (),
        Op::AllocNullMr => mr::alloc_null as *const (),
        Op::AllocMw => mw::alloc as *const (),
        Op::AllocParentDomain => pd::alloc_parent_domain as *const (),
        Op::AllocPd => pd::alloc as *const (),
        Op::AllocTd => pd::alloc_td as *const (),
        Op::AttachMcast => mcast::attach as *const (),
        Op::BindMw => mw::bind as *const (),
        Op::CloseXrcd => srq::close_xrcd as *const (),
        Op::CreateAh => ah::create as *const (),
        Op::CreateCq => cq::create as *const (),
        Op::CreateCqEx => cq_ex::create as *const (),
        Op::CreateQp => qp_create::create as *const (),
        Op::CreateQpEx => qp_create::create_ex as *const (),
        Op::DeallocMw => mw::dealloc as *const (),
        Op::CreateSrq => srq::create as *const (),
        Op::CreateSrqEx => srq::create_ex as *const (),
        Op::DeallocPd => pd::dealloc as *const (),
        Op::DeallocTd => pd::dealloc_td as *const (),
        Op::DeregMr => mr::deregister as *const (),
        Op::DetachMcast => mcast::detach as *const (),
        Op::DestroyAh => ah::destroy as *const (),
        Op::DestroyCq => cq::destroy as *const (),
        Op::DestroyQp => qp::destroy as *const (),
        Op::DestroySrq => srq::destroy as *const (),
        Op::FreeDm => dm::free as *const (),
        Op::FreeContext => free_context as *const (),
        Op::ImportDm => import::dm as *const (),
        Op::ImportMr => import::mr as *const (),
        Op::ImportPd => import::pd as *const (),
        Op::GetSrqNum => srq::number as *const (),
        Op::ModifyCq => cq::modify as *const (),
        Op::ModifyQpRateLimit => qp::modify_rate_limit as *const (),
        Op::ModifySrq => srq::modify as *const (),
        Op::OpenQp => qp_create::open as *const (),
        Op::OpenXrcd => srq::open_xrcd as *const (),
        Op::PostSrqRecv => srq::post_recv as *const (),
        Op::QuerySrq => srq::query as *const (),
        Op::ModifyQp => qp::modify as *const (),
        Op::PollCq => cq::poll as *const (),
        Op::PostRecv => post::recv as *const (),
        Op::PostSend => post::send as *const (),
        Op::QueryDevice => query_device as *const (),
        Op::QueryDeviceEx => query_device_ex as *const (),
        Op::QueryPort => query_port as *const (),
        Op::QueryRtValues => clock::query as *const (),
        Op::QueryEce => ece::query as *const (),
        Op::SetEce => ece::set as *const (),
        Op::RegDmabufMr => dmabuf::register as *const (),
        Op::QueryQp => qp::query as *const (),
        Op::RegDmMr => dm::register as *const (),
        Op::RegMr => mr::register as *const (),
        Op::ReregMr => mr::reregister as *const (),
        Op::ResizeCq => cq::resize as *const (),
        Op::ReqNotifyCq => cq::request_notification as *const (),
        Op::UnimportDm => import::release_dm as *const (),
        Op::UnimportMr => import::release_mr as *const (),
        Op::UnimportPd => import::release_pd as *const (),
        _ => return None,
    };
    Some(function.cast())
}

unsafe extern "C" fn free_context(context: *mut ibv_context) {
    // SAFETY: libibverbs passes an open context of ours, for the last time.
    edge::value((), || unsafe {
        device::state(context).leave();
        device::close(context);
    });
}

unsafe extern "C" fn query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller's own arguments; a plain attribute structure is the head of the extended one.
    unsafe { query_device_ex(context, ptr::null(), attributes.cast(), size_of::<ibv_device_attr>()) }
}

unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    _input: *const ibv_query_device_ex_input,
    into: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    edge::status(|| {
        if size < size_of::<ibv_device_attr>() {
            return Err(Errno::INVAL);
        }
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        // Also in a child of fork: it is what the router said when the device was opened.
        let attributes = attributes::device(&device.welcome);
        let known = size.min(size_of::<ibv_device_attr_ex>());
        // SAFETY: libibverbs passes `size` writable bytes; what this build does not know stays zero.
        unsafe {
            into.cast::<u8>().write_bytes(0, size);
            into.cast::<u8>().copy_from_nonoverlapping(ptr::from_ref(&attributes).cast(), known);
        }
        Ok(())
    })
}

unsafe extern "C" fn query_port(context: *mut ibv_context, port: u8, into: *mut ibv_port_attr) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        device.health().check_owner()?;
        if port != 1 {
            return Err(Errno::INVAL);
        }
        // SAFETY: libibverbs passes a structure that has at least these fields.
        unsafe { attributes::port(into) };
        Ok(())
    })
}
