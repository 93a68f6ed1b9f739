//! The device node `/dev/infiniband/uverbs_ff0`.
//!
//! Does: tell whether a usable one is there. libibverbs stats and opens it and wants the numbers that the fake sysfs
//! tree names: 1:3, which is /dev/null. Leaves to others: making one for a single program (namespace).

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use rustix::fs::{major, minor};

/// Where libibverbs looks.
pub(crate) const NODE: &str = "/dev/infiniband/uverbs_ff0";
/// Its name in that directory.
pub(crate) const NAME: &str = "uverbs_ff0";
/// How an administrator makes one that stays until the next boot.
pub(crate) const MEND: &str = "mkdir -p /dev/infiniband && mknod -m 666 /dev/infiniband/uverbs_ff0 c 1 3";

/// What is at the node's path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Usable,
    Absent,
    /// Something else, or a device that cannot be opened.
    Wrong(String),
}

pub(crate) fn look() -> Node {
    look_at(Path::new(NODE))
}

fn look_at(path: &Path) -> Node {
    let Ok(data) = fs::metadata(path) else {
        return Node::Absent;
    };
    let (major, minor) = (major(data.rdev()), minor(data.rdev()));
    if !data.file_type().is_char_device() {
        return Node::Wrong("it is no character device".to_owned());
    }
    if (major, minor) != (1, 3) {
        return Node::Wrong(format!("it is the character device {major}:{minor}, not 1:3"));
    }
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Node::Usable,
        Err(error) => Node::Wrong(format!("it cannot be opened: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_null_device_will_do() {
        assert_eq!(look_at(Path::new("/dev/null")), Node::Usable);
        assert_eq!(look_at(Path::new("/dev/nonexistent")), Node::Absent);
        assert_eq!(
            look_at(Path::new("/dev/zero")),
            Node::Wrong("it is the character device 1:5, not 1:3".into())
        );
        assert!(matches!(look_at(Path::new("/proc/self/exe")), Node::Wrong(_)));
    }
}
