//! A libibverbs that lets a provider announce devices of its own: one with the patches of `rdma-core-patches/`.
//!
//! There a table of functions takes the place of everything that [`crate::hooks`] catches otherwise, and of the fake
//! sysfs tree: nothing is rewritten. What the functions do is what the hooks do; only how libibverbs and librdmacm
//! come here differs. Leaves to others: the driver itself ([`crate::device`]).

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::RawFd;
use std::ptr;

use verbs_abi::ffi::{
    IBV_GID_TYPE_ROCE_V2, IBV_NODE_CA, ibv_comp_channel, ibv_context, ibv_cq, ibv_gid, ibv_gid_entry,
};
use verbs_abi::ffi_private::{AsyncEventDesc, CompEventDesc};

use crate::abi::edge::{self, Errno};
use crate::hooks::registry::{self, Owner, Role};
use crate::hooks::{self, rdmacm};
use crate::{context, device};

/// `IBV_SYSFS_NAME_MAX`.
const NAME_MAX: usize = 64;
/// The name of the device.
const NAME: &[u8] = b"ff0";
/// The default P_Key of every port.
const PKEY: u16 = 0xffff;

/// `verbs_user_device`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct UserDevice {
    name: [c_char; NAME_MAX],
    node_guid: u64,
    node_type: c_int,
    num_ports: u32,
    cdev: libc::dev_t,
}

/// `verbs_cm_ops`.
#[repr(C)]
#[derive(Debug)]
struct CmOps {
    open: unsafe extern "C" fn() -> c_int,
    write: unsafe extern "C-unwind" fn(c_int, *const c_void, usize) -> isize,
    close: unsafe extern "C" fn(c_int) -> c_int,
}

/// `verbs_user_ops`, with the members of the first version of the patches.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct UserOps {
    size: usize,
    get_device: unsafe extern "C" fn(c_uint, *mut UserDevice) -> bool,
    create_comp_channel: unsafe extern "C" fn(*mut ibv_context) -> c_int,
    destroy_comp_channel: unsafe extern "C" fn(*mut ibv_context, c_int),
    get_cq_event: unsafe extern "C-unwind" fn(*mut ibv_comp_channel, *mut *mut ibv_cq) -> c_int,
    get_async_event: unsafe extern "C-unwind" fn(*mut ibv_context, *mut AsyncEventDesc) -> c_int,
    query_gid: unsafe extern "C" fn(*mut ibv_context, u32, u32, *mut ibv_gid_entry) -> c_int,
    query_pkey: unsafe extern "C" fn(*mut ibv_context, u32, c_int, *mut u16) -> c_int,
    cm_ops: &'static CmOps,
}

static CM_OPS: CmOps = CmOps { open: open_channel, write: rdmacm::hooked_write, close: rdmacm::hooked_close };

/// What libibverbs is handed beside the driver's own table.
pub(crate) static USER_OPS: UserOps = UserOps {
    size: size_of::<UserOps>(),
    get_device,
    create_comp_channel,
    destroy_comp_channel,
    get_cq_event,
    get_async_event,
    query_gid,
    query_pkey,
    cm_ops: &CM_OPS,
};

/// There is one device, whether a router runs or not: opening it says what is missing.
unsafe extern "C" fn get_device(index: c_uint, into: *mut UserDevice) -> bool {
    edge::value(false, || {
        if index != 0 {
            return false;
        }
        let mut name = [0; NAME_MAX];
        name.iter_mut().zip(NAME).for_each(|(to, &from)| *to = from as c_char);
        let (major, minor) = device::NULL_DEVICE;
        let announced = UserDevice {
            name,
            node_guid: context::guid_before_open().map_or(0, u64::from_be_bytes),
            node_type: IBV_NODE_CA,
            num_ports: 1,
            // The command descriptor is one of `/dev/null`: nobody ever commands by it, but programs hand it on.
            cdev: libc::makedev(major, minor),
        };
        // SAFETY: libibverbs passes a structure to fill in.
        unsafe { into.write(announced) };
        true
    })
}

unsafe extern "C" fn create_comp_channel(context: *mut ibv_context) -> c_int {
    edge::syscall(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let command = unsafe { (*context).cmd_fd };
        match registry::look_up(command) {
            Some((Role::Command, Owner::Live(device))) => hooks::create_comp_channel(&device),
            _ => Err(Errno::IO),
        }
    })
}

unsafe extern "C" fn destroy_comp_channel(_context: *mut ibv_context, fd: c_int) {
    // SAFETY: the channel's descriptor, which nobody uses any more.
    unsafe { hooks::hooked_close(fd) };
}

unsafe extern "C-unwind" fn get_cq_event(channel: *mut ibv_comp_channel, into: *mut *mut ibv_cq) -> c_int {
    // SAFETY: libibverbs passes a channel of ours.
    let fd = unsafe { (*channel).fd };
    let mut event = CompEventDesc { cq_handle: 0 };
    if !read_event(fd, &mut event) {
        return -1;
    }
    // SAFETY: libibverbs passes a place for the CQ; the record has the address of an `ibv_cq`.
    unsafe { into.write(ptr::with_exposed_provenance_mut(event.cq_handle as usize)) };
    0
}

unsafe extern "C-unwind" fn get_async_event(context: *mut ibv_context, into: *mut AsyncEventDesc) -> c_int {
    // SAFETY: libibverbs passes an open context of ours.
    let fd = unsafe { (*context).async_fd };
    let mut event = AsyncEventDesc { element: 0, event_type: 0, reserved: 0 };
    if !read_event(fd, &mut event) {
        return -1;
    }
    // SAFETY: libibverbs passes a record to fill in.
    unsafe { into.write(event) };
    0
}

/// Takes the next event of a descriptor; false, with errno set, if there is none to be had.
fn read_event<T>(fd: RawFd, into: &mut T) -> bool {
    let len = size_of::<T>();
    // SAFETY: as many writable bytes as are said, of a structure of integers.
    let read = unsafe { hooks::hooked_read(fd, ptr::from_mut(into).cast(), len) };
    usize::try_from(read) == Ok(len)
}

unsafe extern "C" fn query_gid(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    into: *mut ibv_gid_entry,
) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes an open context of ours.
        let device = unsafe { device::state(context) };
        let entry = if port == 1 { device.gid(index as usize) } else { None };
        let (gid, interface) = entry.ok_or(Errno::INVAL)?;
        let entry = ibv_gid_entry {
            gid: ibv_gid { raw: gid },
            gid_index: index,
            port_num: port,
            gid_type: IBV_GID_TYPE_ROCE_V2,
            ndev_ifindex: interface,
        };
        // SAFETY: libibverbs passes an entry to fill in.
        unsafe { into.write(entry) };
        Ok(())
    })
}

unsafe extern "C" fn query_pkey(
    _context: *mut ibv_context,
    port: u32,
    index: c_int,
    into: *mut u16,
) -> c_int {
    edge::status(|| {
        if (port, index) != (1, 0) {
            return Err(Errno::INVAL);
        }
        // SAFETY: libibverbs passes a place for the key, which is the same in either byte order.
        unsafe { into.write(PKEY) };
        Ok(())
    })
}

unsafe extern "C" fn open_channel() -> c_int {
    edge::syscall(rdmacm::open_channel)
}
