//! An opened device: one client of the router.

use std::ffi::c_char;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use verbs_abi::ffi::ibv_device_attr;
use verbs_abi::ffi_private::{AsyncEventDesc, CompEventDesc};

use crate::abi::edge::Errno;
use crate::hooks::CommandChannel;

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Nobody listens where the router should.
    #[error(
        "no router answers at {} ({errno}). Start one with `freeflow router`, run the program by `freeflow run`, \
         or name the router's socket in FREEFLOW_SOCKET",
        path.display()
    )]
    NoRouter { path: PathBuf, errno: Errno },
}

impl OpenError {
    /// What C is told.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            OpenError::NoRouter { .. } => Errno::NODEV,
        }
    }
}

/// An opened device.
#[derive(Debug)]
pub(crate) struct Context {
    _router: OwnedFd,
}

/// Opens the device of this name; `events` is its async descriptor, one count an event.
pub(crate) fn open(_name: &str, _events: BorrowedFd<'_>) -> Result<Arc<Context>, OpenError> {
    let path = socket_path();
    match connect(&path) {
        Ok(router) => Ok(Arc::new(Context { _router: router })),
        Err(errno) => Err(OpenError::NoRouter { path, errno }),
    }
}

fn connect(path: &PathBuf) -> Result<OwnedFd, Errno> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn socket_path() -> PathBuf {
    if let Some(path) = std::env::var_os("FREEFLOW_SOCKET") {
        return path.into();
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
    runtime.map_or_else(|| PathBuf::from("/run"), PathBuf::from).join("freeflow/router.sock")
}

/// What a sysfs file of the device says while no device is open; `None` to let the file itself answer.
pub(crate) fn sysfs_before_open(_file: &str) -> Option<String> {
    None
}

impl Context {
    /// `ibv_context.num_comp_vectors`.
    pub(crate) fn num_comp_vectors(&self) -> i32 {
        1
    }

    /// Fills in the device's attributes.
    pub(crate) fn describe(&self, attributes: &mut ibv_device_attr) {
        for (to, &from) in attributes.fw_ver.iter_mut().zip(env!("CARGO_PKG_VERSION").as_bytes()) {
            *to = from as c_char;
        }
        attributes.max_mr_size = u64::MAX;
        attributes.page_size_cap = 4096;
        attributes.max_pkeys = 1;
        attributes.phys_port_cnt = 1;
    }
}

impl CommandChannel for Context {
    fn comp_channel_created(&self, _fd: RawFd) -> Result<(), Errno> {
        Ok(())
    }

    fn comp_channel_closed(&self, _fd: RawFd) {}

    fn next_comp_event(&self, _fd: RawFd) -> Result<Option<CompEventDesc>, Errno> {
        Ok(None)
    }

    fn next_async_event(&self) -> Result<Option<AsyncEventDesc>, Errno> {
        Ok(None)
    }

    fn sysfs(&self, file: &str) -> Option<String> {
        match file {
            "ports/1/gids/0" => Some("0000:0000:0000:0000:0000:ffff:7f00:0001\n".to_owned()),
            _ => None,
        }
    }
}
