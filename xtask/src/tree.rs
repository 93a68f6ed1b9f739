//! The install tree: where its parts lie, and whether it is there.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The private ABI numbers of rdma-core that Debian and its relatives have shipped; libibverbs appends one of them
/// to the name of a provider. The provider is one file under all these names.
pub const PROVIDER_ABIS: [u32; 7] = [25, 33, 34, 57, 59, 64, 65];

/// A relocatable install tree, as `cargo xtask build` lays it out.
#[derive(Clone, Debug)]
pub struct Tree {
    prefix: PathBuf,
}

impl Tree {
    /// Where a tree would be; nothing is looked at.
    pub fn at(prefix: impl Into<PathBuf>) -> Self {
        Self { prefix: prefix.into() }
    }

    /// The tree that `FREEFLOW_TREE` names, else the one of this workspace.
    pub fn find(workspace: &Path) -> Result<Self> {
        let tree = match std::env::var_os("FREEFLOW_TREE") {
            Some(prefix) => Self::at(prefix),
            None => Self::at(workspace.join("target/freeflow")),
        };
        tree.check()?;
        Ok(tree)
    }

    /// Fails, naming the part, where the tree lacks one.
    pub fn check(&self) -> Result<()> {
        let mut parts = vec![self.program(), self.preload(), self.sysfs()];
        parts.extend(PROVIDER_ABIS.map(|abi| self.provider(abi)));
        for part in parts {
            if !part.exists() {
                bail!("the install tree lacks {}: run `cargo xtask build`", part.display());
            }
        }
        Ok(())
    }

    /// The root of the tree.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// The program `freeflow`.
    pub fn program(&self) -> PathBuf {
        self.prefix.join("bin/freeflow")
    }

    /// The provider under the name that libibverbs of this private ABI looks for.
    pub fn provider(&self, abi: u32) -> PathBuf {
        self.prefix.join(format!("lib/freeflow/libfreeflow-rdmav{abi}.so"))
    }

    /// The shim that keeps libibverbs from asking the kernel's RDMA netlink.
    pub fn preload(&self) -> PathBuf {
        self.prefix.join("lib/freeflow/libfreeflow-preload.so")
    }

    /// The fake sysfs tree in which libibverbs finds `ff0`.
    pub fn sysfs(&self) -> PathBuf {
        self.prefix.join("share/freeflow/sysfs")
    }

    /// The environment of a client, for places where `freeflow run` does not go (containers).
    pub fn client_environment(&self, socket: &Path) -> Vec<(&'static str, String)> {
        let text = |path: PathBuf| path.display().to_string();
        vec![
            ("SYSFS_PATH", text(self.sysfs())),
            ("RDMAV_DRIVERS", text(self.prefix.join("lib/freeflow/libfreeflow"))),
            ("LD_PRELOAD", text(self.preload())),
            ("FREEFLOW_SOCKET", text(socket.to_owned())),
        ]
    }
}
