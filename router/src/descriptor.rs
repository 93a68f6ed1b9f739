//! What kind of file a client sent.
//!
//! A descriptor that is not what it should be could block its user for ever (a pipe, a file of the client's own
//! file system) or mean something else when it is written, so its kind is asked of the kernel.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{OFlags, PROC_SUPER_MAGIC, fcntl_getfl, fstatfs};

/// Whether it is an eventfd.
pub(crate) fn is_eventfd(file: &impl AsFd) -> bool {
    link(file).is_some_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
}

/// A `/proc/PID/mem` that is open for writing, or `None` for anything else.
pub(crate) fn process_memory(file: OwnedFd) -> Option<File> {
    let on_proc = fstatfs(&file).ok()?.f_type == PROC_SUPER_MAGIC;
    let writable = fcntl_getfl(&file).ok()? & OFlags::ACCMODE == OFlags::RDWR;
    (on_proc && writable && names_memory(&link(&file)?)).then(|| File::from(file))
}

/// Whether a link's end is `PID/mem`. What comes before depends on where that namespace has its procfs.
fn names_memory(link: &Path) -> bool {
    let mut parts = link.components().rev().filter_map(|part| part.as_os_str().to_str());
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.next() == Some("mem") && parts.next().is_some_and(number)
}

fn link(file: &impl AsFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).ok()
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_eventfd_is_told_from_other_files() {
        assert!(is_eventfd(&eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
        assert!(!is_eventfd(&File::open("/dev/null").unwrap()));
        assert!(!is_eventfd(&rustix::pipe::pipe().unwrap().0));
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("anon_inode:[eventfd]");
        assert!(!is_eventfd(&File::create(fake).unwrap()));
    }

    #[test]
    fn only_a_writable_process_memory_is_taken() {
        let open = |path: &str, write: bool| {
            OwnedFd::from(File::options().read(true).write(write).open(path).unwrap())
        };
        assert!(process_memory(open("/proc/self/mem", true)).is_some());
        assert!(process_memory(open("/proc/self/mem", false)).is_none());
        assert!(process_memory(open("/proc/self/comm", true)).is_none());
        assert!(process_memory(open("/dev/null", true)).is_none());
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("77")).unwrap();
        let fake = dir.path().join("77/mem");
        let fake = File::options().read(true).write(true).create_new(true).open(fake).unwrap();
        assert!(process_memory(OwnedFd::from(fake)).is_none());
    }
}
