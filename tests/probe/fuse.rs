//! A file whose pages never come: a file system in user space that answers everything but READ.
//!
//! The file system is attached nowhere; the file is the way to it. Its server is a child process: as long as that
//! lives, whoever touches a page of the file waits, and no signal helps.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use anyhow::{Result, bail};

use crate::{
    checks::Skip,
    family::{fork_into, kill, wait},
};

/// Bytes of the file.
pub(crate) const LEN: usize = 64 << 10;
/// More than any request here is long, and no less than the kernel demands.
const REQUEST: usize = 64 << 10;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INIT: u32 = 26;

/// The file and its server.
#[derive(Debug)]
pub(crate) struct StuckFile {
    file: File,
    server: i32,
}

impl StuckFile {
    /// Makes one, or tells why this machine cannot.
    pub(crate) fn new() -> Result<Self> {
        let skip = |what: &str, error: io::Error| Skip(format!("{what}: {error}"));
        let open = File::options().read(true).write(true).open("/dev/fuse");
        let channel = open.map_err(|error| skip("/dev/fuse", error))?;
        let mount = mount(channel.as_raw_fd()).map_err(|error| skip("mounting a FUSE file system", error))?;
        let server = fork_into(|| serve(&channel))?;
        drop(channel);
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        // Asking for its length is what lets the kernel know it.
        let open = || {
            let file = File::options().read(true).write(true).open(path)?;
            Ok((file.metadata()?.len(), file))
        };
        match open() {
            Ok((len, file)) if len == LEN as u64 => Ok(Self { file, server }),
            Ok((len, _)) => {
                kill(server);
                bail!("a file of a FUSE file system with {len} bytes instead of {LEN}")
            }
            Err::<_, io::Error>(error) => {
                kill(server);
                bail!("opening a file of a FUSE file system: {error}")
            }
        }
    }

    /// Maps the file; returns the address.
    pub(crate) fn map(&self) -> Result<usize> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let file = self.file.as_raw_fd();
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, libc::MAP_PRIVATE, file, 0) };
        if start == libc::MAP_FAILED {
            bail!("cannot map a FUSE file: {}", io::Error::last_os_error());
        }
        Ok(start as usize)
    }

    /// Ends the server, and with it every wait for a page.
    pub(crate) fn end(self) -> Result<()> {
        kill(self.server);
        wait(self.server).map(|_| ())
    }
}

/// A file system whose root is a regular file, attached nowhere.
fn mount(channel: RawFd) -> io::Result<OwnedFd> {
    let context = descriptor(|| {
        // SAFETY: a C string; the call makes a descriptor.
        unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), libc::FSOPEN_CLOEXEC) }
    })?;
    let set = |key: &CStr, value: &CStr| {
        configure(&context, libc::FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    };
    let number = std::ffi::CString::new(channel.to_string())?;
    set(c"source", c"freeflow-probe")?;
    set(c"fd", &number)?;
    set(c"rootmode", c"100644")?;
    set(c"user_id", c"0")?;
    set(c"group_id", c"0")?;
    configure(&context, libc::FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    descriptor(|| {
        // SAFETY: a live descriptor and plain flags; the call makes a descriptor.
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, 0) }
    })
}

fn configure(context: &OwnedFd, command: u32, key: *const i8, value: *const i8) -> io::Result<()> {
    // SAFETY: a live descriptor; key and value are C strings or null, as the command demands.
    let code = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn descriptor(call: impl FnOnce() -> libc::c_long) -> io::Result<OwnedFd> {
    let fd = call();
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Answers requests until killed.
fn serve(mut channel: &File) -> Result<()> {
    let mut request = vec![0; REQUEST];
    loop {
        let len = match channel.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The last file is closed, or a request was taken back before it was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(_) => return Ok(()),
        };
        let word = |at: usize| {
            request.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        if len < 40 {
            bail!("a FUSE request of {len} bytes");
        }
        if let Some(answer) = answer(word(4), word(44)) {
            let mut reply = (16 + answer.body.len() as u32).to_ne_bytes().to_vec();
            reply.extend(answer.error.to_ne_bytes());
            reply.extend(&request[8..16]);
            reply.extend(answer.body);
            // A request that was taken back in the meantime wants no answer.
            let _ = channel.write(&reply);
        }
    }
}

struct Answer {
    error: i32,
    body: Vec<u8>,
}

/// The answer to a request of this kind. `None`: there never is one.
fn answer(opcode: u32, minor: u32) -> Option<Answer> {
    let body = match opcode {
        READ => return None,
        INIT => init(minor),
        GETATTR => attributes(),
        // A handle, and no flags.
        OPEN => vec![0; 16],
        RELEASE => Vec::new(),
        _ => return Some(Answer { error: -libc::ENOSYS, body: Vec::new() }),
    };
    Some(Answer { error: 0, body })
}

/// `struct fuse_init_out`: the protocol's version, and no wishes but a sensible longest write.
fn init(minor: u32) -> Vec<u8> {
    let mut body = vec![0; 64];
    body[..4].copy_from_slice(&7_u32.to_ne_bytes());
    body[4..8].copy_from_slice(&minor.min(31).to_ne_bytes());
    body[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
    body
}

/// `struct fuse_attr_out`: a regular file, valid for a day.
fn attributes() -> Vec<u8> {
    let mut body = vec![0; 104];
    let mut put = |at: usize, bytes: &[u8]| body[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &86_400_u64.to_ne_bytes());
    put(16, &1_u64.to_ne_bytes());
    put(24, &(LEN as u64).to_ne_bytes());
    put(76, &(libc::S_IFREG | 0o644).to_ne_bytes());
    put(80, &1_u32.to_ne_bytes());
    body
}
