//! Debian packages that the demo and the tests need: which are missing, and getting them.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};
use xtask::process::has_program;

/// A package, how to tell that it is there, and what for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Package {
    name: &'static str,
    /// A program's name, or a file's path.
    probe: &'static str,
    why: &'static str,
}

const fn package(name: &'static str, probe: &'static str, why: &'static str) -> Package {
    Package { name, probe, why }
}

/// Stock verbs programs.
pub(crate) const TOOLS: [Package; 2] = [
    package("ibverbs-utils", "ibv_devinfo", "stock verbs programs: ibv_devinfo, ibv_rc_pingpong"),
    package("perftest", "ib_write_bw", "stock verbs benchmarks: ib_write_bw and its kin"),
];

/// Programs that meet by name.
pub(crate) const RDMA_CM: [Package; 2] = [
    package(
        "rdmacm-utils",
        "rping",
        "stock programs of rdma_cm and rsocket: rping, ucmatose, mckey, rstream",
    ),
    package("iperf", "iperf", "a TCP program for rsocket"),
];

/// TCP programs for rsocket; the tests of those that are missing are skipped.
pub(crate) const RSOCKET: [Package; 4] = [
    package("mini-httpd", "mini_httpd", "an HTTP server for rsocket"),
    package("httperf", "httperf", "a load generator for it"),
    package("netcat-traditional", "nc.traditional", "a file sent over rsocket"),
    package("netpipe-tcp", "NPtcp", "a TCP benchmark that checks what it gets, for rsocket"),
];

/// Allocators that give memory back as soon as they can.
pub(crate) const ALLOCATORS: [Package; 2] = [
    package("libjemalloc2", "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2", "registered memory under jemalloc"),
    package(
        "libtcmalloc-minimal4",
        "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
        "registered memory under tcmalloc",
    ),
];

/// Other people's programs over verbs; the tests of those that are missing are skipped.
pub(crate) const PROGRAMS: [Package; 5] = [
    package("ucx-utils", "ucx_perftest", "UCX over verbs"),
    package("libfabric-bin", "fi_pingpong", "libfabric over verbs"),
    package("openmpi-bin", "mpirun", "an MPI, over UCX and over libfabric"),
    package("fio", "fio", "a storage benchmark with an engine for RDMA"),
    package("qperf", "qperf", "a network benchmark with tests for RDMA"),
];

/// What builds rdma-core 55 and its pyverbs; the tests on a patched one, and its own tests, are skipped where it is missing.
pub(crate) const RDMA_CORE: [Package; 8] = [
    package("cmake", "cmake", "building rdma-core 55"),
    package("ninja-build", "ninja", "building rdma-core 55"),
    package("pkg-config", "pkg-config", "building rdma-core 55"),
    package("patch", "patch", "patching rdma-core"),
    package("libnl-3-dev", "/usr/include/libnl3/netlink/netlink.h", "building rdma-core 55"),
    package("libnl-route-3-dev", "/usr/include/libnl3/netlink/route/link.h", "building rdma-core 55"),
    package(
        "python3-dev",
        "/var/lib/dpkg/info/python3-dev.list",
        "building pyverbs, for rdma-core's own tests",
    ),
    package("python3-venv", "/var/lib/dpkg/info/python3-venv.list", "Cython, which compiles pyverbs"),
];

/// Network namespaces.
pub(crate) const NAMESPACES: [Package; 2] = [
    package("iproute2", "ip", "network namespaces and the cable between them"),
    package("util-linux", "nsenter", "running a program in a network namespace"),
];

/// The directory of several hosts.
pub(crate) const ETCD: [Package; 2] = [
    package("etcd-server", "etcd", "the directory that several hosts share"),
    package("etcd-client", "etcdctl", "looking at what stands in it"),
];

/// Wall clocks that jump.
pub(crate) const CLOCKS: [Package; 1] = [package(
    "libfaketime",
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "routers whose wall clock jumps",
)];

/// Kernel TCP, to compare with.
pub(crate) const TCP: [Package; 1] =
    [package("iperf3", "iperf3", "the bandwidth of kernel TCP, to compare with")];

/// Containers on Debian root file systems.
pub(crate) const CONTAINERS: [Package; 7] = [
    package("podman", "podman", "containers"),
    package("runc", "runc", "the runtime of the containers"),
    package("conmon", "conmon", "podman's watcher of a container"),
    package("netavark", "/usr/lib/podman/netavark", "podman's bridge networks"),
    package("aardvark-dns", "/usr/lib/podman/aardvark-dns", "podman's bridge networks"),
    package("iptables", "iptables", "podman's bridge networks"),
    package("mmdebstrap", "mmdebstrap", "root file systems of Debian's releases for the containers"),
];

/// Virtual machines whose kernel has RDMA. Their kernel is unpacked from its package, not installed.
pub(crate) const MACHINES: [Package; 4] = [
    package("qemu-system-x86", "qemu-system-x86_64", "virtual machines"),
    package(
        "busybox-static",
        // Another package has the same program, but not static.
        "/var/lib/dpkg/info/busybox-static.list",
        "the first programs of a virtual machine",
    ),
    package("kmod", "depmod", "finding the kernel modules of a virtual machine"),
    package("iproute2", "rdma", "an RNIC in software, inside"),
];

/// Installs those that are missing, saying what and why. Who may not is told the one command that does.
pub(crate) fn require(packages: &[Package]) -> Result<()> {
    let missing: Vec<Package> = packages.iter().copied().filter(|package| !package.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("Missing Debian packages:");
    for package in &missing {
        println!("  {:<14} {}", package.name, package.why);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if !has_program("apt-get") {
        bail!("this is no Debian: install these by your own means: {}", names.join(" "));
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "some packages are missing, and only root may install them. Run\n\n    \
             sudo apt-get install --no-install-recommends {}\n",
            names.join(" ")
        );
    }
    install(&names)
}

impl Package {
    fn is_there(&self) -> bool {
        if self.probe.starts_with('/') { Path::new(self.probe).exists() } else { has_program(self.probe) }
    }
}

fn install(names: &[&str]) -> Result<()> {
    println!("Installing them with apt-get ...");
    // Package lists may be old or absent; an update that fails is no reason to give up before trying.
    let updated = apt(&["update", "-qq"]);
    let mut words = vec!["install", "-qq", "--yes", "--no-install-recommends"];
    words.extend(names);
    if apt(&words).is_err() {
        updated.context("apt-get update failed before")?;
        bail!("apt-get could not install {}", names.join(" "));
    }
    Ok(())
}

fn apt(words: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
    let output = command.output().context("could not start apt-get")?;
    if !output.status.success() {
        bail!("apt-get {}:\n{}", words.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_asked_for() {
        require(&[package("coreutils", "true", "a test"), package("base-files", "/etc/passwd", "a test")])
            .unwrap();
        assert!(!package("none", "no-such-program", "a test").is_there());
        assert!(!package("none", "/no/such/file", "a test").is_there());
    }
}
