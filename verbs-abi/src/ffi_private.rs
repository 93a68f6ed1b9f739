//! What a provider must know of libibverbs and no header tells it, or a later header than that of `ffi.rs` does.
//!
//! These layouts have been the same from rdma-core 25 to 65. The ones that were not (the ops table, the front of
//! `verbs_context`, `verbs_sysfs_dev`, `verbs_qp`) are the provider's business: it chooses them when it is loaded.

use std::mem::{offset_of, size_of};

use crate::ffi;

/// An MR as libibverbs sees it: `ibv_dereg_mr` and `ibv_rereg_mr` read past the public part.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VerbsMr {
    /// The part that the application sees.
    pub ibv_mr: ffi::ibv_mr,
    /// [`MR_TYPE_MR`] for memory registered by address.
    pub mr_type: u32,
    /// The `ibv_access_flags` given at registration.
    pub access: i32,
}

/// `mr_type` of an ordinary MR; `ibv_dereg_mr` undoes its `MADV_DONTFORK`.
pub const MR_TYPE_MR: u32 = 0;
/// `mr_type` of a null MR, which has no pages.
pub const MR_TYPE_NULL_MR: u32 = 1;

/// `mr_type` of an MR that was imported by its handle.
pub const MR_TYPE_IMPORTED_MR: u32 = 2;

/// `mr_type` of an MR over a dma-buf (`enum ibv_mr_type` of `libibverbs/driver.h`), which is no memory of the process.
pub const MR_TYPE_DMABUF_MR: u32 = 3;

/// What a command written to a uverbs descriptor begins with.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CmdHdr {
    /// Which command: [`CMD_CREATE_COMP_CHANNEL`] or another.
    pub command: u32,
    /// The length of the command with this header, in words of four bytes.
    pub in_words: u16,
    /// The length of the reply, in words of four bytes.
    pub out_words: u16,
}

/// The command that creates a completion channel; libibverbs writes it whatever the provider offers.
pub const CMD_CREATE_COMP_CHANNEL: u32 = 17;

/// [`CMD_CREATE_COMP_CHANNEL`] as it is written.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CreateCompChannel {
    /// The header.
    pub hdr: CmdHdr,
    /// The address of a [`CreateCompChannelResp`].
    pub response: u64,
}

/// Where the reply to [`CreateCompChannel`] goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CreateCompChannelResp {
    /// The new channel's descriptor.
    pub fd: u32,
}

/// What a command given to a uverbs descriptor by `ioctl` begins with; its attributes follow.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct IoctlHdr {
    /// The length of header and attributes, bytes.
    pub length: u16,
    /// What it is about: [`OBJECT_ASYNC_EVENT`] or another.
    pub object_id: u16,
    /// What is to be done.
    pub method_id: u16,
    /// The number of attributes.
    pub num_attrs: u16,
    /// Zero.
    pub reserved1: u64,
    /// The kernel's number for the provider.
    pub driver_id: u32,
    /// Zero.
    pub reserved2: u32,
}

/// An attribute of a command given by `ioctl`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct IoctlAttr {
    /// Which attribute of the method.
    pub attr_id: u16,
    /// The length of what `data` points to.
    pub len: u16,
    /// How the kernel is to understand it.
    pub flags: u16,
    /// An element of an enumeration, or zero.
    pub reserved: u16,
    /// A value, a pointer, or where a new descriptor goes.
    pub data: u64,
}

/// `RDMA_VERBS_IOCTL`: reads and writes a structure of 24 bytes, the first of the type 0x1b.
pub const VERBS_IOCTL: u64 = 3 << 30 | 24 << 16 | 0x1b << 8 | 1;
/// `UVERBS_OBJECT_ASYNC_EVENT`, whose method 0 makes an async descriptor and stores it in its attribute 0.
pub const OBJECT_ASYNC_EVENT: u16 = 16;

/// What `ibv_get_async_event` reads from the async descriptor.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AsyncEventDesc {
    /// The address of the `ibv_cq`, `ibv_qp`, `ibv_srq` or `ibv_wq`, or a port number.
    pub element: u64,
    /// An `ibv_event_type`.
    pub event_type: u32,
    /// Zero.
    pub reserved: u32,
}

/// What `ibv_get_cq_event` reads from a completion channel.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CompEventDesc {
    /// The address of the `ibv_cq`.
    pub cq_handle: u64,
}

/// The size of `ibv_port_attr` from rdma-core 49 on, where `active_speed_ex` was added at its end.
pub const PORT_ATTR_SIZE_V49: usize = 56;

/// The access flag of an MR that a FLUSH to global visibility may name (rdma-core 45).
pub const IBV_ACCESS_FLUSH_GLOBAL: u32 = 1 << 8;
/// The access flag of an MR that a FLUSH to persistence may name (rdma-core 45).
pub const IBV_ACCESS_FLUSH_PERSISTENT: u32 = 1 << 9;
/// The first of the access flags that a device may ignore.
pub const IBV_ACCESS_OPTIONAL_FIRST: u32 = ffi::IBV_ACCESS_OPTIONAL_FIRST;
/// All access flags that a device may ignore.
pub const IBV_ACCESS_OPTIONAL_RANGE: u32 = 0x3ff0_0000;
/// FLUSH among the work request opcodes (rdma-core 45).
pub const IBV_WR_FLUSH: u32 = 14;
/// FLUSH among the completion opcodes (rdma-core 45).
pub const IBV_WC_FLUSH: u32 = 8;
/// FLUSH among the `send_ops_flags` of `ibv_create_qp_ex` (rdma-core 45).
pub const IBV_QP_EX_WITH_FLUSH: u32 = 1 << 11;

/// `verbs_context` grows at its front, so what lies before the public context is reached by distance from it.
pub const CONTEXT_TO_SZ: usize = offset_of!(ffi::verbs_context, context) - offset_of!(ffi::verbs_context, sz);
/// The distance from `verbs_context.priv` to the public context.
pub const CONTEXT_TO_PRIV: usize =
    offset_of!(ffi::verbs_context, context) - offset_of!(ffi::verbs_context, priv_);

const _: () = {
    assert!(size_of::<ffi::ibv_context>() == 328);
    assert!(size_of::<ffi::verbs_context>() == 648);
    assert!(size_of::<ffi::ibv_port_attr>() == 52);
    assert!(CONTEXT_TO_SZ == 8 && CONTEXT_TO_PRIV == 112);
    assert!(offset_of!(VerbsMr, mr_type) == 48 && size_of::<VerbsMr>() == 56);
    assert!(size_of::<IoctlHdr>() == 24 && size_of::<IoctlAttr>() == 16);
    assert!(size_of::<CmdHdr>() == 8 && size_of::<CreateCompChannel>() == 16);
    assert!(size_of::<AsyncEventDesc>() == 16 && size_of::<CompEventDesc>() == 8);
};
