//! Two unprivileged podman containers on a bridge network of their own.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;
use xtask::{
    bed::{Bed, Place},
    process::{Outcome, clean_up, command, has_program, run},
    router::Router,
    tree::Tree,
};

const PREFIX: &str = "freeflow-";
const LIMIT: Duration = Duration::from_secs(60);
/// Where a container finds the directory of the router's socket.
const SOCKET_FOLDER: &str = "/run/freeflow";

/// Why there can be no containers here, where there can be none.
pub(crate) fn obstacle() -> Option<String> {
    if !super::is_root() {
        return Some("only root may make containers on a bridge network".to_owned());
    }
    let missing: Vec<&str> =
        ["podman", "runc", "mmdebstrap"].into_iter().filter(|&name| !has_program(name)).collect();
    (!missing.is_empty()).then(|| format!("not installed: {}", missing.join(", ")))
}

/// A router and two containers on the server's and the client's root file systems.
pub(crate) fn bed(tree: Tree, rootfs: [&Path; 2]) -> Result<Bed> {
    let router = Router::start(&tree)?;
    let pair = ContainerPair::start(&tree, router.socket(), rootfs)?;
    let (server, client) = (pair.server.place(), pair.client.place());
    Ok(Bed::with_places(tree, router, server, client, Box::new(pair)))
}

/// A network and the two containers on it; removed when dropped.
#[derive(Debug)]
pub(crate) struct ContainerPair {
    network: Network,
    /// Where servers run.
    pub(crate) server: Container,
    /// Where clients run.
    pub(crate) client: Container,
}

impl ContainerPair {
    /// Starts them, with an install tree and the router's socket mounted.
    /// The root file systems are the server's and the client's.
    pub(crate) fn start(tree: &Tree, socket: &Path, rootfs: [&Path; 2]) -> Result<Self> {
        remove_leftovers();
        let network = Network::create()?;
        let start = |side, rootfs| Container::start(side, &network, tree, socket, rootfs);
        Ok(Self { server: start("server", rootfs[0])?, client: start("client", rootfs[1])?, network })
    }
}

impl Drop for ContainerPair {
    fn drop(&mut self) {
        // The containers must go before their network; fields are dropped later than this.
        self.server.remove();
        self.client.remove();
    }
}

/// A container that sleeps until something is run in it.
#[derive(Debug)]
pub(crate) struct Container {
    name: String,
    pid: u32,
    address: String,
}

impl Container {
    fn start(side: &str, network: &Network, tree: &Tree, socket: &Path, rootfs: &Path) -> Result<Self> {
        let name = format!("{}-{side}", network.name);
        // From here on dropping removes what has come up.
        let mut container = Self { name, pid: 0, address: String::new() };
        let prefix = tree.prefix().display();
        let folder = socket.parent().context("the socket is in no directory")?.display();
        let inside = Path::new(SOCKET_FOLDER).join(socket.file_name().unwrap_or_default());
        let mut words = vec!["--runtime", "runc", "run", "--detach", "--name", &container.name];
        // Where cgroups are version 1, podman wants these two limits spelt out.
        words.extend(["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]);
        words.extend(["--cap-drop=all", "--user", "65534:65534", "--security-opt=no-new-privileges"]);
        words.extend(["--device", "/dev/null:/dev/infiniband/uverbs_ff0", "--network", &network.name]);
        let volumes =
            [format!("--volume={prefix}:{prefix}:ro"), format!("--volume={folder}:{SOCKET_FOLDER}")];
        words.extend(volumes.iter().map(String::as_str));
        let environment = tree.client_environment(&inside);
        let environment: Vec<String> =
            environment.into_iter().map(|(name, value)| format!("--env={name}={value}")).collect();
        words.extend(environment.iter().map(String::as_str));
        let rootfs = rootfs.display().to_string();
        words.extend(["--rootfs", &rootfs, "sleep", "3600"]);
        podman(&words)?;
        container.inspect(&network.name)?;
        Ok(container)
    }

    fn inspect(&mut self, network: &str) -> Result<()> {
        let text = podman(&["inspect", &self.name])?.stdout;
        let report: Value = serde_json::from_str(&text)?;
        let pid = report[0]["State"]["Pid"].as_u64().filter(|&pid| pid > 0);
        self.pid = u32::try_from(pid.context("the container does not run")?)?;
        let address = report[0]["NetworkSettings"]["Networks"][network]["IPAddress"].as_str();
        self.address = address.context("the container has no address")?.to_owned();
        Ok(())
    }

    /// This container as a place of tests. What is run in it ends by itself, because killing podman would not end it.
    pub(crate) fn place(&self) -> Place {
        let enter = ["podman", "exec", &self.name, "timeout", "-k", "1", "60"].map(str::to_owned);
        Place::container(enter.to_vec(), self.pid, self.address.clone())
    }

    fn remove(&self) {
        clean_up(command(["podman", "rm", "--force", "--time", "0", &self.name]), LIMIT);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.remove();
    }
}

#[derive(Debug)]
struct Network {
    name: String,
}

impl Network {
    fn create() -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        podman(&["network", "create", "--disable-dns", &name])?;
        Ok(Self { name })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        clean_up(command(["podman", "network", "rm", "--force", &self.name]), LIMIT);
    }
}

/// Networks, and with them their containers, whose maker (its process number is in the name) is no more.
fn remove_leftovers() {
    let Ok(list) = podman(&["network", "ls", "--format", "{{.Name}}"]) else { return };
    for name in list.stdout.lines() {
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            clean_up(command(["podman", "network", "rm", "--force", name]), LIMIT);
        }
    }
}

fn podman(words: &[&str]) -> Result<Outcome> {
    run(command(["podman"].iter().chain(words)), LIMIT)
}
