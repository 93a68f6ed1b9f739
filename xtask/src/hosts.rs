//! Two hosts on one machine: a network namespace each, a cable, a router each with a link to the other, and containers
//! on overlay networks between them.
//!
//! The routers talk over the cable (10.200.77.0/24); the containers have the addresses of their overlay (10.201.77.0/24,
//! 10.202.77.0/24). The two routers number their tenants differently.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{
    bed::{Bed, Place},
    interrupt,
    netns::{Namespace, NamespacePair},
    process::{Job, command, run},
    router::Router,
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(20);
const WIRE_LIMIT: Duration = Duration::from_secs(200);
const PORT: u16 = 7471;
/// The first overlay's addresses.
const ANNOUNCED: &str = "\"10.201.77.0/24\", \"fd00:78::/64\"";

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where servers run.
    Left,
    /// Where clients run.
    Right,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

/// The ends of a bad cable.
const WIRE: [&str; 2] = ["10.203.77.1", "10.203.77.2"];
const WIRE_LIFE: &str = "180";

/// The hosts and what runs on them. Declared so that containers go before their hosts.
#[derive(Debug)]
pub struct Hosts {
    /// Carries packets between the routers, where the cable does not.
    wire: Option<Job>,
    overlays: Vec<NamespacePair>,
    cable: NamespacePair,
    tenants: Vec<String>,
    secured: bool,
    /// What stands under `[directory]`, if that is not a file.
    registry: Option<String>,
    dir: TempDir,
}

impl Hosts {
    /// Makes two hosts with one overlay of the default tenant, or one for each of some tenants.
    pub fn create(tenants: &[&str]) -> Result<Self> {
        Self::with_overlays(tenants, |id| id)
    }

    /// The same, where the overlays of all tenants have the same addresses.
    pub fn create_alike(tenants: &[&str]) -> Result<Self> {
        Self::with_overlays(tenants, |_| 0)
    }

    fn with_overlays(tenants: &[&str], addresses: impl Fn(usize) -> usize) -> Result<Self> {
        let cable = NamespacePair::create()?;
        let overlays = (0..tenants.len().max(1))
            .map(|id| NamespacePair::on_overlay(&cable, id, addresses(id)))
            .collect::<Result<_>>()?;
        let dir = TempDir::with_prefix("freeflow-")?;
        let tenants = tenants.iter().map(|&tenant| tenant.to_owned()).collect();
        let hosts = Self { wire: None, overlays, cable, tenants, secured: false, registry: None, dir };
        hosts.write_configurations()?;
        Ok(hosts)
    }

    /// The same hosts, whose routers use TLS.
    pub fn secured(mut self, tree: &Tree) -> Result<Self> {
        let pki = self.dir.path().join("pki").display().to_string();
        let program = tree.program().display().to_string();
        for words in [&["init", &pki][..], &["issue", &pki, "left"], &["issue", &pki, "right"]] {
            run(command([&program[..], "pki"].iter().chain(words)), LIMIT)?;
        }
        self.secured = true;
        self.write_configurations()?;
        Ok(self)
    }

    /// The same hosts, whose directory is in an etcd: what the routers' configurations say of that. Each publishes the
    /// addresses of the overlays.
    pub fn with_registry(mut self, text: &str) -> Result<Self> {
        self.registry = Some(text.to_owned());
        self.write_configurations()?;
        Ok(self)
    }

    /// The same hosts, whose routers talk over a cable that can be made bad (see [`Self::set_wire`]); `probe` is the
    /// program that carries its packets.
    pub fn over_wire(mut self, probe: &Path) -> Result<Self> {
        self.set_wire("")?;
        let ends = [Side::Left, Side::Right].map(|side| self.namespace(side).path());
        let words = [&*probe.display().to_string(), "cable", &ends[0], &ends[1]].map(str::to_owned);
        let file = [self.wire_file().display().to_string(), WIRE_LIFE.to_owned()];
        let mut job = Job::spawn(command(words.iter().chain(&file)), WIRE_LIMIT)?;
        let start = Instant::now();
        while !job.stdout().contains("READY") {
            interrupt::check()?;
            if job.has_ended()? || start.elapsed() > LIMIT {
                bail!("no cable: {}", job.stop(Duration::ZERO)?.report());
            }
            thread::sleep(Duration::from_millis(10));
        }
        for (side, address) in [Side::Left, Side::Right].into_iter().zip(WIRE) {
            let enter = self.enter(side);
            let ip = |words: &str| {
                let words = format!("ip {words}");
                run(command(enter.iter().map(String::as_str).chain(words.split(' '))), LIMIT).map(drop)
            };
            ip(&format!("address add {address}/24 dev wire0"))?;
            ip("link set wire0 up")?;
        }
        self.wire = Some(job);
        self.write_configurations()?;
        Ok(self)
    }

    /// A directory of these hosts' own, for files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the bad cable does: microseconds of delay and of jitter, and of a thousand packets how many are lost, overtake
    /// others, and come twice; zero where nothing is said.
    pub fn set_wire(&self, conditions: &str) -> Result<()> {
        let fresh = self.dir.path().join("wire.new");
        fs::write(&fresh, conditions)?;
        Ok(fs::rename(fresh, self.wire_file())?)
    }

    fn wire_file(&self) -> PathBuf {
        self.dir.path().join("wire")
    }

    /// The address by which the other router knows that of a host.
    fn router_address(&self, side: Side) -> &'static str {
        match (&self.wire, side) {
            (None, side) => self.address(side),
            (Some(_), Side::Left) => WIRE[0],
            (Some(_), Side::Right) => WIRE[1],
        }
    }

    /// What the configuration of a host says of security.
    fn security(&self, side: Side) -> String {
        if !self.secured {
            return "security = \"plain\"\n".to_owned();
        }
        let (pki, name) = (self.dir.path().join("pki"), side.name());
        let pki = pki.display();
        format!(
            "security = \"tls\"\nauthority = \"{pki}/ca.pem\"\ncertificate = \"{pki}/{name}.pem\"\n\
             key = \"{pki}/{name}.key\"\n"
        )
    }

    fn namespace(&self, side: Side) -> &Namespace {
        match side {
            Side::Left => &self.cable.left,
            Side::Right => &self.cable.right,
        }
    }

    /// What goes before a command to run it on a host.
    pub fn enter(&self, side: Side) -> Vec<String> {
        self.namespace(side).enter()
    }

    /// The address of a host on the cable.
    pub fn address(&self, side: Side) -> &'static str {
        self.namespace(side).address
    }

    /// A host itself, on the cable.
    pub fn host(&self, side: Side) -> Place {
        Place::namespace(self.namespace(side))
    }

    /// A container on a host, on one of the overlays.
    pub fn container(&self, side: Side, overlay: usize) -> Place {
        let overlay = &self.overlays[overlay];
        Place::namespace(match side {
            Side::Left => &overlay.left,
            Side::Right => &overlay.right,
        })
    }

    /// The socket of a tenant on a host.
    pub fn tenant_socket(&self, side: Side, tenant: usize) -> PathBuf {
        self.dir.path().join(format!("{}-{}", side.name(), self.tenants[tenant])).join("router.sock")
    }

    fn write_configurations(&self) -> Result<()> {
        let directory = self.dir.path().join("directory.toml");
        let mut text = "[routers]\n".to_owned();
        for side in [Side::Left, Side::Right] {
            text += &format!("{} = \"{}:{PORT}\"\n", side.name(), self.router_address(side));
        }
        let defaults = vec!["default".to_owned()];
        let tenants = if self.tenants.is_empty() { &defaults } else { &self.tenants };
        for (tenant, overlay) in tenants.iter().zip(&self.overlays) {
            for (side, end) in [(Side::Left, &overlay.left), (Side::Right, &overlay.right)] {
                for prefix in [format!("{}/32", end.address), format!("{}/128", end.address6)] {
                    let name = side.name();
                    text += &format!(
                        "[[route]]\nprefix = \"{prefix}\"\nrouter = \"{name}\"\ntenant = \"{tenant}\"\n"
                    );
                }
            }
        }
        fs::write(&directory, text)?;
        for side in [Side::Left, Side::Right] {
            let (name, address) = (side.name(), self.router_address(side));
            let security = self.security(side);
            let mut text =
                format!("[links]\nname = \"{name}\"\nlisten = \"{address}:{PORT}\"\n{security}[directory]\n");
            text += &match &self.registry {
                None => format!("file = \"{}\"\n", directory.display()),
                Some(registry) if self.tenants.is_empty() => format!("{registry}announce = [{ANNOUNCED}]\n"),
                Some(registry) => registry.clone(),
            };
            let mut tenants: Vec<String> = (0..self.tenants.len()).map(|i| self.tenant(side, i)).collect();
            if side == Side::Right {
                tenants.reverse();
            }
            text += &tenants.concat();
            fs::write(self.configuration(side), text)?;
        }
        Ok(())
    }

    /// A tenant's part of a configuration.
    fn tenant(&self, side: Side, tenant: usize) -> String {
        let overlay = &self.overlays[tenant];
        let ends = [&overlay.left, &overlay.right];
        let prefixes: Vec<String> = ends
            .iter()
            .flat_map(|end| [format!("\"{}/32\"", end.address), format!("\"{}/128\"", end.address6)])
            .collect();
        let (name, socket) = (&self.tenants[tenant], self.tenant_socket(side, tenant));
        let announce = match self.registry {
            Some(_) => format!("announce = [{}]\n", prefixes.join(", ")),
            None => String::new(),
        };
        format!(
            "[[tenant]]\nname = \"{name}\"\nsocket = \"{}\"\nprefixes = [{}]\n{announce}",
            socket.display(),
            prefixes.join(", ")
        )
    }

    /// The file with the configuration of a host's router.
    pub fn configuration(&self, side: Side) -> PathBuf {
        self.dir.path().join(format!("{}.toml", side.name()))
    }

    /// Starts the router of a host.
    pub fn start_router(&self, tree: &Tree, side: Side) -> Result<Router> {
        self.start_router_by(tree, side, &[])
    }

    /// The same, with further words in front of the program.
    pub fn start_router_by(&self, tree: &Tree, side: Side, by: &[String]) -> Result<Router> {
        let words = ["--config".to_owned(), self.configuration(side).display().to_string()];
        Router::start_in(tree, &[&self.enter(side), by].concat(), &words)
            .with_context(|| format!("no router on the {} host", side.name()))
    }

    /// A bed whose server is a container of the left host, and its client one of the right host, on the first overlay.
    pub fn bed(self, tree: Tree) -> Result<Bed> {
        let bed = self.lend(tree)?;
        Ok(bed.keeping(Box::new(self)))
    }

    /// The same for as long as these hosts are kept.
    pub fn lend(&self, tree: Tree) -> Result<Bed> {
        let (left, right) = (self.start_router(&tree, Side::Left)?, self.start_router(&tree, Side::Right)?);
        let (server, client) = (self.container(Side::Left, 0), self.container(Side::Right, 0));
        let mut bed = Bed::with_places(tree, left, server, client, Box::new(()));
        bed.client_router = Some(right);
        Ok(bed)
    }
}
