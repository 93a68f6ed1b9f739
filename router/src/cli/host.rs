//! What this host offers, as far as the virtual RNIC needs it.
//!
//! Does: the looking behind `freeflow doctor`; nothing is changed. Leaves to others: the order and the verdict (doctor).

use std::{
    ffi::{CStr, CString},
    fs::{self, OpenOptions},
    io,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    process::{Resource, geteuid, getrlimit},
};

use super::{
    doctor::Finding,
    install::{PRIVATE_ABIS, Tree},
    namespace,
};

/// Below this many open files a program with a few hundred connections of its own gets into trouble.
const FEW_FILES: u64 = 4096;
/// Below this much memory large registrations do not fit.
const LITTLE_MEMORY: u64 = 256 << 20;
/// Inode number of the initial PID namespace; the kernel has fixed it.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
/// Number of CAP_SYS_PTRACE.
const CAP_SYS_PTRACE: u32 = 19;

/// Whether `freeflow run` can give a program its own `/dev`: tried in a child.
pub(crate) fn namespaces() -> Finding {
    let mut child = Command::new("/proc/self/exe");
    child.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let enter = || {
        namespace::enter().map_err(|error| {
            let code =
                std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
            io::Error::from_raw_os_error(code.and_then(io::Error::raw_os_error).unwrap_or(libc::EIO))
        })
    };
    // SAFETY: this process has one thread, so the child may allocate and make any system call.
    unsafe { child.pre_exec(enter) };
    match child.status() {
        Ok(_) => Finding::pass("a program can be given a /dev of its own"),
        Err(error) => {
            Finding::warn(format!("a program cannot be given a /dev of its own: {error}"), namespace_advice())
        }
    }
}

/// The switch that most likely forbids user namespaces here.
fn namespace_advice() -> String {
    let read = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let switches = [
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            1,
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("/proc/sys/kernel/unprivileged_userns_clone", 0, "kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/user/max_user_namespaces", 0, "user.max_user_namespaces=10000"),
    ];
    match switches.iter().find(|(path, bad, _)| read(path) == Some(*bad)) {
        Some((_, _, setting)) => {
            format!("as root: sysctl -w {setting}; or make the device node there once and for all")
        }
        None => {
            "make the device node there once and for all (see above); then no namespace is needed".to_owned()
        }
    }
}

/// Whether libibverbs is there, and speaks a private interface that the provider knows.
pub(crate) fn libibverbs(tree: &Tree) -> Finding {
    let install = "install it: apt-get install libibverbs1 ibverbs-providers, or dnf install libibverbs";
    // SAFETY: loading a library runs its constructors; libibverbs' own do nothing but set defaults.
    let library = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Finding::fail("libibverbs.so.1 is not here (a container uses its image's own)", install);
    }
    let has = |symbol: &CStr| {
        // SAFETY: `library` is a live handle, never closed, and the name ends in a zero byte.
        !unsafe { libc::dlsym(library, symbol.as_ptr()) }.is_null()
    };
    let name = |abi: &u32| CString::new(format!("verbs_register_driver_{abi}")).unwrap_or_default();
    let Some(abi) = PRIVATE_ABIS.iter().rev().find(|abi| has(&name(abi))) else {
        return Finding::fail(
            "libibverbs.so.1 speaks a private interface that the provider does not know",
            format!("known are {PRIVATE_ABIS:?}: rdma-core 25 to 65; use one of those"),
        );
    };
    let link = tree.provider(*abi);
    match link.exists() {
        true => Finding::pass(format!("private interface {abi}, provider {}", link.display())),
        false => Finding::fail(
            format!("private interface {abi}, but {} is missing", link.display()),
            "build the install tree: cargo xtask build",
        ),
    }
}

/// Whether the kernel has RDMA devices: then libibverbs finds those and never looks at the fake tree, but for the shim.
pub(crate) fn kernel_rdma(tree: &Tree) -> Finding {
    let names = |path: &str| -> Option<Vec<String>> {
        let entries = fs::read_dir(path).ok()?;
        Some(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    };
    let devices = names("/sys/class/infiniband").unwrap_or_default();
    let loaded =
        names("/sys/class/infiniband_verbs").is_some() || fs::exists("/sys/module/ib_core").unwrap_or(false);
    let shim = tree.shim();
    if !shim.exists() {
        let what =
            format!("the shim {} is missing; without it the kernel's device list hides ff0", shim.display());
        return Finding::fail(what, "build the install tree: cargo xtask build");
    }
    if devices.is_empty() {
        return Finding::pass(format!(
            "no devices (modules {}loaded); the shim is in place",
            if loaded { "" } else { "not " }
        ));
    }
    Finding::pass(format!(
        "the kernel has {}; with the shim programs see ff0 instead of them",
        devices.join(", ")
    ))
}

/// Which real NIC the router would use towards other hosts, and how much memory it may register there.
pub(crate) fn real_nic(config: &router::config::Rnic) -> Finding {
    let found = match router::rnic::examine(config) {
        Ok(found) => found,
        Err(why) => return Finding::pass(format!("none ({why}): what goes to other hosts goes over TCP")),
    };
    match router::rnic::memory_limit() {
        None => Finding::pass(found),
        Some(limit) => Finding::warn(
            format!("{found}; {} MiB of clients' memory can be registered", limit >> 20),
            "for more: LimitMEMLOCK=infinity of the service, --ulimit memlock=-1 of the container, or CAP_IPC_LOCK",
        ),
    }
}

/// Whether a process's memory can be reached the way the router does it.
pub(crate) fn process_memory() -> Finding {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/proc/self/mem") {
        let what = format!("/proc/self/mem cannot be opened: {error}");
        return Finding::fail(what, "mount /proc; without it memory that cannot be moved is not reachable");
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim() {
        "2" | "3" if !geteuid().is_root() => Finding::warn(
            format!(
                "kernel.yama.ptrace_scope is {}: only root's router reaches memory that cannot be moved",
                scope.trim()
            ),
            "use root's router, or as root: sysctl -w kernel.yama.ptrace_scope=1",
        ),
        _ => Finding::pass("/proc/PID/mem can be used"),
    }
}

/// Whether sealed shared memory can be made.
pub(crate) fn memfd() -> Finding {
    let make = || -> rustix::io::Result<()> {
        let file = memfd_create(c"freeflow-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, 1 << 47)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
    };
    match make() {
        Ok(()) => Finding::pass("sparse and sealed shared memory"),
        Err(error) => Finding::fail(
            format!("no sealed shared memory of full length: {error}"),
            "needs Linux 3.17 or newer, and no limit of file sizes (ulimit -f unlimited)",
        ),
    }
}

/// How many files may be open.
pub(crate) fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < FEW_FILES => Finding::warn(
            format!("at most {limit} open files: the router serves about {} clients", limit / 8),
            "raise it: LimitNOFILE= of the service, --ulimit nofile= of the container, or ulimit -Hn",
        ),
        Some(limit) => Finding::pass(format!("up to {limit}")),
        None => Finding::pass("no limit"),
    }
}

/// The cgroup's memory limit: registered memory is charged to whoever touches it first.
pub(crate) fn memory_limit() -> Finding {
    let Some((path, limit)) = cgroup_limit() else {
        return Finding::pass("none of the cgroup");
    };
    let shown = format!("{} MiB ({path})", limit >> 20);
    if limit < LITTLE_MEMORY {
        return Finding::warn(
            shown,
            "registered memory counts here; raise the limit for large registrations",
        );
    }
    Finding::pass(shown)
}

/// The limit of this process's own cgroup, version 2 or 1, and the file that says it.
fn cgroup_limit() -> Option<(String, u64)> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_end_matches('/'));
        let files = match controllers {
            "" => [format!("/sys/fs/cgroup{path}/memory.max"), "/sys/fs/cgroup/memory.max".to_owned()],
            "memory" => ["", path].map(|path| format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
            _ => return None,
        };
        files.into_iter().find_map(|file| {
            let limit = fs::read_to_string(&file).ok()?.trim().parse().ok()?;
            // Version 1 says "no limit" by a number that is larger than any memory.
            (limit < 1 << 60).then_some((file, limit))
        })
    })
}

/// Whether root's router can see the processes it serves.
pub(crate) fn privileges() -> Finding {
    if !geteuid().is_root() {
        return Finding::pass("an ordinary user; this user's router serves this user's programs");
    }
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    if namespace.as_os_str() != INITIAL_PID_NAMESPACE {
        return Finding::warn(
            "root, but not in the host's PID namespace: a router started here serves only programs started here",
            "start the router on the host, or its container with --pid=host",
        );
    }
    if !has_capability(CAP_SYS_PTRACE) {
        return Finding::warn(
            "root without CAP_SYS_PTRACE: memory that cannot be moved is out of a router's reach",
            "give it CAP_SYS_PTRACE",
        );
    }
    Finding::pass("root in the host's PID namespace, with CAP_SYS_PTRACE")
}

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_some_and(|bits| bits >> number & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checks_run_on_any_host() {
        let tree = Tree::at("/nonexistent");
        for finding in
            [memfd(), open_files(), memory_limit(), process_memory(), privileges(), kernel_rdma(&tree)]
        {
            assert!(!format!("{finding:?}").is_empty());
        }
    }
}
