//! A sysfs tree that shows the kernel's RDMA devices beside `ff0`.
//!
//! libibverbs looks for devices in one tree, and the install tree's has `ff0` alone. Here is one of links to both, in the
//! user's directory of control sockets, named after what it shows: made once, used again, and harmless when devices
//! have gone, since libibverbs passes over what it cannot read.
//! Leaves to others: the variable that names it (variables).

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash, Hasher},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::{install::Tree, runtime::create_default_directory};

const SYSFS: &str = "/sys";
const VERBS: &str = "class/infiniband_verbs";
const DEVICES: &str = "class/infiniband";
const MISC: &str = "class/misc";
const NODES: &str = "/dev/infiniband";
/// The kernel's connection manager.
const RDMA_CM: &str = "/dev/infiniband/rdma_cm";

/// A tree, and the device nodes of what it shows.
#[derive(Debug)]
pub(crate) struct Beside {
    pub(crate) sysfs: PathBuf,
    pub(crate) nodes: Vec<String>,
}

/// The tree for programs that find the install tree where it is here.
pub(crate) fn tree_for_here(tree: &Tree) -> anyhow::Result<PathBuf> {
    Ok(tree_for(tree)?.sysfs)
}

/// The tree for programs that find the install tree there.
pub(crate) fn tree_for(tree: &Tree) -> anyhow::Result<Beside> {
    let devices = Devices::of_kernel(Path::new(SYSFS))?;
    if devices.verbs.is_empty() {
        bail!("the kernel has no RDMA device here; without --kernel-devices the program sees ff0");
    }
    let nodes = devices.verbs.iter().map(|name| format!("{NODES}/{name}"));
    let nodes = nodes.chain(Path::new(RDMA_CM).exists().then(|| RDMA_CM.to_owned())).collect();
    let sysfs = devices.link(&create_default_directory()?, &tree.sysfs())?;
    Ok(Beside { sysfs, nodes })
}

/// The names of the kernel's devices and of their nodes.
#[derive(Debug, Hash)]
struct Devices {
    devices: Vec<String>,
    verbs: Vec<String>,
}

impl Devices {
    fn of_kernel(sysfs: &Path) -> anyhow::Result<Self> {
        let mut verbs = names(&sysfs.join(VERBS))?;
        // Beside the devices' directories there is the version of the interface.
        verbs.retain(|name| name.starts_with("uverbs"));
        Ok(Self { devices: names(&sysfs.join(DEVICES))?, verbs })
    }

    /// The tree below `directory` that links to these and to those of `ours`.
    fn link(&self, directory: &Path, ours: &Path) -> anyhow::Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        (self, ours).hash(&mut hasher);
        let whole = directory.join(format!("sysfs-{:016x}", hasher.finish()));
        if whole.exists() {
            return Ok(whole);
        }
        let building = directory.join(format!("sysfs-{}.new", std::process::id()));
        self.build(&building, ours).with_context(|| format!("cannot make {}", building.display()))?;
        if let Err(error) = fs::rename(&building, &whole) {
            // Another program may have been faster.
            let _ = fs::remove_dir_all(&building);
            if !whole.exists() {
                return Err(error).with_context(|| format!("cannot make {}", whole.display()));
            }
        }
        Ok(whole)
    }

    fn build(&self, at: &Path, ours: &Path) -> io::Result<()> {
        for class in [VERBS, DEVICES] {
            fs::create_dir_all(at.join(class))?;
        }
        symlink(ours.join(MISC), at.join(MISC))?;
        for (class, own) in [(VERBS, &["uverbs_ff0", "abi_version"][..]), (DEVICES, &["ff0"])] {
            for name in own {
                symlink(ours.join(class).join(name), at.join(class).join(name))?;
            }
        }
        for (class, names) in [(VERBS, &self.verbs), (DEVICES, &self.devices)] {
            for name in names {
                symlink(Path::new(SYSFS).join(class).join(name), at.join(class).join(name))?;
            }
        }
        Ok(())
    }
}

/// What a directory has in it; nothing where there is none.
fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", directory.display()))?,
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_shows_the_kernels_devices_beside_ours_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path().join("sys");
        for path in [format!("{VERBS}/uverbs0"), format!("{DEVICES}/rxe0")] {
            fs::create_dir_all(sys.join(path)).unwrap();
        }
        fs::write(sys.join(VERBS).join("abi_version"), "6\n").unwrap();
        let devices = Devices::of_kernel(&sys).unwrap();
        let tree = devices.link(dir.path(), Path::new("/opt/ff/sysfs")).unwrap();
        assert_eq!(names(&tree.join(VERBS)).unwrap(), ["abi_version", "uverbs0", "uverbs_ff0"]);
        assert_eq!(names(&tree.join(DEVICES)).unwrap(), ["ff0", "rxe0"]);
        let target = |name: &str| fs::read_link(tree.join(name)).unwrap();
        assert_eq!(target("class/infiniband/rxe0"), Path::new("/sys/class/infiniband/rxe0"));
        assert_eq!(target("class/infiniband/ff0"), Path::new("/opt/ff/sysfs/class/infiniband/ff0"));
        assert_eq!(
            target("class/infiniband_verbs/abi_version"),
            Path::new("/opt/ff/sysfs/class/infiniband_verbs/abi_version")
        );
        assert_eq!(devices.link(dir.path(), Path::new("/opt/ff/sysfs")).unwrap(), tree);
        assert_ne!(devices.link(dir.path(), Path::new("/opt/other/sysfs")).unwrap(), tree);
    }

    #[test]
    fn a_kernel_without_rdma_has_no_devices() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Devices::of_kernel(dir.path()).unwrap().verbs.is_empty());
    }
}
