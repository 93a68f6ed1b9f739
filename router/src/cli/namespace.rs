//! A `/dev` of one program's own, which has the device node.
//!
//! Does: move this process into a mount namespace (with a user namespace around it where it may not have one
//! otherwise) in which `/dev` is as before, with `/dev/infiniband/uverbs_ff0` added. Nothing on the host changes, and
//! all of it goes away with the last process in it. Leaves to others: what runs in there (run).

use std::{
    fs::{self, DirEntry, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change},
    process::{getegid, geteuid},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::node::{NAME, NODE};

const DIRECTORY: &str = "/dev/infiniband";

/// The step that was refused, and what the system said.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub(crate) struct NamespaceError {
    step: &'static str,
    source: io::Error,
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, NamespaceError> {
    result.map_err(|source| NamespaceError { step, source: source.into() })
}

/// Gives this process, and what it executes later, a `/dev` with the node. The process must have one thread.
pub(crate) fn enter() -> Result<(), NamespaceError> {
    match unshare(UnshareFlags::NEWNS) {
        Err(Errno::PERM) => enter_user_namespace()?,
        result => step("make a mount namespace", result)?,
    }
    make_private()?;
    if Path::new(DIRECTORY).is_dir() {
        mirror(Path::new(DIRECTORY), NAME)?;
    } else {
        mirror(Path::new("/dev"), "infiniband")?;
        step("make /dev/infiniband", fs::create_dir(DIRECTORY))?;
    }
    step("make the device node's file", File::create(NODE))?;
    step("bind /dev/null to the device node", mount_bind("/dev/null", NODE))
}

fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: no descriptor table is unshared, and the process has one thread.
    unsafe { unshare_unsafe(flags) }
}

/// A user namespace in which this user and group are themselves. Others show up as `nobody`.
fn enter_user_namespace() -> Result<(), NamespaceError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    match unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) {
        // The system's own words, "no space left on device", would send people to look at their disks.
        Err(Errno::NOSPC) => {
            step("make one more user namespace (user.max_user_namespaces)", Err(Errno::NOSPC))?
        }
        result => step("make a user namespace", result)?,
    }
    // A group map of one's own needs it; the groups one is in stay.
    step("give up setgroups in the user namespace", fs::write("/proc/self/setgroups", "deny"))?;
    step("map the user id", fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))?;
    step("map the group id", fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")))
}

/// What is mounted from now on stays here, and what the host mounts later still shows up here.
fn make_private() -> Result<(), NamespaceError> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    // In a chroot `/` is no mount. There `/dev` has to be one, or a mount on it would reach the host.
    let result = mount_change("/", flags).or_else(|_| mount_change("/dev", flags));
    step("keep mounts away from the host", result)
}

/// Covers `directory` with a writable copy that has the same entries, each bound to what it was; `without` is left out.
fn mirror(directory: &Path, without: &str) -> Result<(), NamespaceError> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    let old = step("open /dev", open(directory, flags, Mode::empty()))?;
    let entries =
        step("read /dev", fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>))?;
    let options = MountFlags::NOSUID | MountFlags::NOEXEC;
    step("mount a tmpfs on /dev", mount("freeflow", directory, "tmpfs", options, Some(c"mode=755,size=1m")))?;
    for entry in entries {
        if entry.file_name() != without {
            // What cannot be brought along (it went away meanwhile) is missing; what is needed is checked later.
            let _ = bring(&old, directory, &entry);
        }
    }
    Ok(())
}

/// Makes one entry of the covered directory show up in the new one.
fn bring(old: &OwnedFd, directory: &Path, entry: &DirEntry) -> io::Result<()> {
    let source = PathBuf::from(format!("/proc/self/fd/{}", old.as_raw_fd())).join(entry.file_name());
    let target = directory.join(entry.file_name());
    let kind = entry.file_type()?;
    if kind.is_symlink() {
        symlink(fs::read_link(source)?, target)
    } else if kind.is_dir() {
        fs::create_dir(&target)?;
        Ok(mount_bind_recursive(source, target)?)
    } else {
        File::create(&target)?;
        mount_bind(source, &target).map_err(|error| {
            // An empty file in a device's place would swallow what is written to it.
            let _ = fs::remove_file(&target);
            error.into()
        })
    }
}
