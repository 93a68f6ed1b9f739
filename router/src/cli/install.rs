//! The install tree.
//!
//! Does: find it from this program's own place (`PREFIX/bin/freeflow`), and tell what is missing from it.
//! Leaves to others: making it (`cargo xtask build`), the variables that point into it (variables).

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// Numbers of libibverbs' private interface for which a link to the provider is installed.
pub(crate) const PRIVATE_ABIS: [u32; 7] = [25, 33, 34, 57, 59, 64, 65];

/// `PREFIX` and what lies where under it.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    prefix: PathBuf,
}

impl Tree {
    /// The tree this program belongs to, or the one that `FREEFLOW_PREFIX` names. It may be incomplete.
    pub(crate) fn find() -> anyhow::Result<Self> {
        if let Some(prefix) = env::var_os("FREEFLOW_PREFIX").filter(|prefix| !prefix.is_empty()) {
            let prefix = std::path::absolute(&prefix).context("FREEFLOW_PREFIX is not a usable path")?;
            return Ok(Self { prefix });
        }
        let program = fs::read_link("/proc/self/exe").context("cannot find this program's own file")?;
        let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        Ok(Self { prefix: prefix.to_owned() })
    }

    /// A tree at a known place, such as inside a container.
    pub(crate) fn at(prefix: &str) -> Self {
        Self { prefix: PathBuf::from(prefix) }
    }

    /// The tree, if nothing is missing and its path can be said in the variables.
    pub(crate) fn find_complete() -> anyhow::Result<Self> {
        let tree = Self::find()?;
        if let Some(fault) = tree.fault() {
            bail!("{fault}");
        }
        Ok(tree)
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// What `RDMAV_DRIVERS` names: libibverbs appends `-rdmavNN.so`.
    pub(crate) fn provider_stem(&self) -> PathBuf {
        self.prefix.join("lib/freeflow/libfreeflow")
    }

    /// The provider under its name for one private interface of libibverbs.
    pub(crate) fn provider(&self, abi: u32) -> PathBuf {
        self.prefix.join(format!("lib/freeflow/libfreeflow-rdmav{abi}.so"))
    }

    /// The shim that keeps libibverbs from asking the kernel for devices.
    pub(crate) fn shim(&self) -> PathBuf {
        self.prefix.join("lib/freeflow/libfreeflow-preload.so")
    }

    /// The tree that stands for `/sys`.
    pub(crate) fn sysfs(&self) -> PathBuf {
        self.prefix.join("share/freeflow/sysfs")
    }

    /// What is wrong with the tree and how to mend it.
    pub(crate) fn fault(&self) -> Option<String> {
        let prefix = self.prefix.display();
        let device = self.sysfs().join("class/infiniband_verbs/uverbs_ff0");
        let mut parts: Vec<PathBuf> = PRIVATE_ABIS.iter().map(|abi| self.provider(*abi)).collect();
        parts.extend([self.shim(), device]);
        let missing: Vec<_> = parts.iter().filter(|part| !part.exists()).collect();
        if let Some(first) = missing.first() {
            let more =
                if missing.len() > 1 { format!(" and {} more", missing.len() - 1) } else { String::new() };
            return Some(format!(
                "{prefix} is no complete install tree: {}{more} missing. `cargo xtask build` makes one in \
                 target/freeflow: use target/freeflow/bin/freeflow, or name a tree in FREEFLOW_PREFIX",
                first.strip_prefix(&self.prefix).unwrap_or(first).display(),
            ));
        }
        let text = self.prefix.to_string_lossy();
        text.contains([':', ';', ' ', '\t', '\n']).then(|| {
            format!(
                "the install tree's path {text:?} has a space, colon or semicolon in it, which LD_PRELOAD and \
                 RDMAV_DRIVERS take for the end of a name; move the tree to a plainer path"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(prefix: &Path) -> Tree {
        let tree = Tree { prefix: prefix.to_owned() };
        fs::create_dir_all(tree.shim().parent().unwrap()).unwrap();
        fs::create_dir_all(tree.sysfs().join("class/infiniband_verbs/uverbs_ff0")).unwrap();
        fs::write(tree.shim(), "").unwrap();
        PRIVATE_ABIS.iter().for_each(|abi| fs::write(tree.provider(*abi), "").unwrap());
        tree
    }

    #[test]
    fn a_complete_tree_has_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(filled(dir.path()).fault(), None);
    }

    #[test]
    fn a_missing_part_is_named_with_the_way_to_build_it() {
        let dir = tempfile::tempdir().unwrap();
        let tree = filled(dir.path());
        fs::remove_file(tree.provider(34)).unwrap();
        let fault = tree.fault().unwrap();
        assert!(fault.contains("lib/freeflow/libfreeflow-rdmav34.so missing"), "{fault}");
        assert!(fault.contains("cargo xtask build"), "{fault}");
    }

    #[test]
    fn a_path_that_the_variables_cannot_say_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fault = filled(&dir.path().join("my tree")).fault().unwrap();
        assert!(fault.contains("space"), "{fault}");
    }
}
