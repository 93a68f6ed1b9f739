//! A test bed: a router and two places from which stock tools talk to each other.
//!
//! A place is this host, a network namespace or a container. A pair is one tool run as server in the first place
//! and as client in the second, the client started only when the server listens.

use std::{
    any::Any,
    net::TcpListener,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    interrupt,
    netns::{Namespace, NamespacePair},
    process::{Job, Outcome, command},
    router::Router,
    tree::Tree,
};

/// Somewhere a client of the router can run.
#[derive(Clone, Debug)]
pub struct Place {
    /// The address by which the other place reaches it.
    pub address: String,
    /// What goes before each command.
    enter: Vec<String>,
    /// Whether `freeflow run` prepares the environment; a container's is prepared when it is made.
    prepared: bool,
    /// A process whose network is the place's, where the tool's own process is not visible from here.
    resident: Option<u32>,
}

impl Place {
    /// This host.
    pub fn host() -> Self {
        Self { address: "127.0.0.1".to_owned(), enter: Vec::new(), prepared: false, resident: None }
    }

    /// A network namespace.
    pub fn namespace(namespace: &Namespace) -> Self {
        Self {
            address: namespace.address.to_owned(),
            enter: namespace.enter(),
            prepared: false,
            resident: None,
        }
    }

    /// A container whose environment is prepared: how to run something in it, and a process that lives in it.
    pub fn container(enter: Vec<String>, resident: u32, address: String) -> Self {
        Self { address, enter, prepared: true, resident: Some(resident) }
    }

    /// A command in this place, without the virtual RNIC.
    pub fn plain_command(&self, words: &[String]) -> Command {
        command(self.enter.iter().chain(words))
    }
}

/// Who executes the work requests of a bed's tools.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// The router.
    Isolated,
    /// The tools' own threads, where both ends are of one tenant.
    Direct,
}

impl Mode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Isolated, Self::Direct];

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Direct => "direct",
        }
    }
}

/// A router and two places.
#[derive(Debug)]
pub struct Bed {
    /// Where the programs come from.
    pub tree: Tree,
    /// The router that serves the server's place, and the client's unless that has its own.
    pub router: Router,
    /// The router of the client's place, where that is on another host.
    pub client_router: Option<Router>,
    /// Where servers run.
    pub server: Place,
    /// Where clients run.
    pub client: Place,
    /// What tools in places that `freeflow run` prepares are told; the default where it is none.
    mode: Option<Mode>,
    /// What the places live in; removed after the router has ended.
    _keep: Box<dyn Any + Send>,
}

impl Bed {
    /// Both ends on this host, in one network namespace.
    pub fn on_one_host(tree: Tree) -> Result<Self> {
        let router = Router::start(&tree)?;
        Ok(Self::with_places(tree, router, Place::host(), Place::host(), Box::new(())))
    }

    /// The ends in two network namespaces with their own addresses.
    pub fn across_namespaces(tree: Tree) -> Result<Self> {
        let pair = NamespacePair::create()?;
        let (server, client) = (Place::namespace(&pair.left), Place::namespace(&pair.right));
        let router = Router::start(&tree)?;
        Ok(Self::with_places(tree, router, server, client, Box::new(pair)))
    }

    /// A bed whose places were made elsewhere, with what they live in.
    pub fn with_places(
        tree: Tree,
        router: Router,
        server: Place,
        client: Place,
        keep: Box<dyn Any + Send>,
    ) -> Self {
        Self { tree, router, client_router: None, server, client, mode: None, _keep: keep }
    }

    /// The same bed, which keeps what its places live in.
    #[must_use]
    pub fn keeping(mut self, keep: Box<dyn Any + Send>) -> Self {
        self._keep = keep;
        self
    }

    /// The same bed, whose tools run in a mode from now on.
    #[must_use]
    pub fn in_mode(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// The mode that its tools are told, if any.
    #[must_use]
    pub fn mode(&self) -> Option<Mode> {
        self.mode
    }

    /// A command with the virtual RNIC, in one of the places.
    pub fn command(&self, place: &Place, words: &[String]) -> Command {
        let mut all = place.enter.clone();
        if !place.prepared {
            all.push(self.tree.program().display().to_string());
            all.extend(["run", "--socket"].map(str::to_owned));
            all.push(self.router_of(place).socket().display().to_string());
            all.extend(self.mode.iter().flat_map(|mode| ["--mode", mode.name()].map(str::to_owned)));
            all.push("--".to_owned());
        }
        all.extend_from_slice(words);
        command(all)
    }

    /// The router that serves a place.
    pub fn router_of(&self, place: &Place) -> &Router {
        let own = self.client_router.as_ref().filter(|_| place.address == self.client.address);
        own.unwrap_or(&self.router)
    }

    /// Runs a single tool to its end.
    pub fn run(&self, place: &Place, words: &[&str], limit: Duration) -> Result<Outcome> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        Job::spawn(self.command(place, &words), limit)?.wait()
    }

    /// Starts a tool as server and, once that listens, as client.
    pub fn start_pair(&self, tool: &Tool, limit: Duration) -> Result<Pair> {
        let port = free_port()?;
        let words = tool.words(port, None);
        let server = if tool.connects_by_name() {
            self.start_cm_server(&words, port, limit)?
        } else {
            self.start_tcp_server(&words, port, limit)?
        };
        let words = tool.words(port, Some(&self.server.address));
        let client = Job::spawn(self.command(&self.client, &words), limit)?;
        Ok(Pair { server, client })
    }

    /// Starts a server on the virtual device that listens by TCP and waits until its port is open.
    pub fn start_tcp_server(&self, words: &[String], port: u16, limit: Duration) -> Result<Job> {
        let server = Job::spawn(self.command(&self.server, words), limit)?;
        wait_until_it_listens(server, self.server.resident, port)
    }

    /// Starts a server that listens by rdma_cm and waits until the router lists it.
    pub fn start_cm_server(&self, words: &[String], port: u16, limit: Duration) -> Result<Job> {
        let mut server = Job::spawn(self.command(&self.server, words), limit)?;
        let start = Instant::now();
        while !self.router.lists(port)? {
            interrupt::check()?;
            if server.has_ended()? || start.elapsed() > LISTEN_LIMIT {
                let outcome = server.stop(Duration::ZERO)?;
                bail!("the server never listened on port {port} of rdma_cm: {}", outcome.report());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Runs a tool between the two places.
    pub fn run_pair(&self, tool: &Tool, limit: Duration) -> Result<PairOutcome> {
        self.start_pair(tool, limit)?.wait()
    }
}

/// A tool of perftest or of ibverbs-utils, and what it is asked to do, on the virtual device.
#[derive(Clone, Debug)]
pub struct Tool {
    /// The program.
    pub program: String,
    /// The options that both ends get.
    pub options: Vec<String>,
}

impl Tool {
    /// A tool with options that are the same at both ends.
    pub fn new(program: &str, options: &[&str]) -> Self {
        Self {
            program: program.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    /// Whether it meets its peer by rdma_cm; then no TCP port shows that it listens.
    fn connects_by_name(&self) -> bool {
        self.options.iter().any(|option| option == "-R" || option == "-z")
    }

    fn words(&self, port: u16, peer: Option<&str>) -> Vec<String> {
        let mut words = vec![self.program.clone(), "-d".to_owned(), "ff0".to_owned()];
        words.extend(["-p".to_owned(), port.to_string()]);
        // perftest refuses to believe clocks whose frequency changes, unless told so.
        words.extend(self.program.starts_with("ib_").then(|| "-F".to_owned()));
        words.extend_from_slice(&self.options);
        words.extend(peer.map(str::to_owned));
        words
    }
}

/// The two ends of a running tool.
#[derive(Debug)]
pub struct Pair {
    /// The passive end.
    pub server: Job,
    /// The active end.
    pub client: Job,
}

impl Pair {
    /// Waits for both ends. A server whose client has failed is given a moment, not its whole limit.
    pub fn wait(self) -> Result<PairOutcome> {
        let client = self.client.wait()?;
        let server = if client.succeeded() {
            self.server.wait()?
        } else {
            self.server.stop(Duration::from_millis(500))?
        };
        Ok(PairOutcome { server, client })
    }
}

/// How the two ends of a tool ended.
#[derive(Clone, Debug)]
pub struct PairOutcome {
    /// The passive end.
    pub server: Outcome,
    /// The active end.
    pub client: Outcome,
}

impl PairOutcome {
    /// Fails, with all that both printed, unless both exited with 0.
    pub fn success(&self) -> Result<()> {
        if !(self.server.succeeded() && self.client.succeeded()) {
            bail!("{}", self.report());
        }
        Ok(())
    }

    /// Both ends, for a person who has to find out what went wrong.
    pub fn report(&self) -> String {
        format!("server {}client {}", self.server.report(), self.client.report())
    }
}

/// Starts a server and waits until its port is open.
pub fn start_server(place: &Place, words: &[String], port: u16, limit: Duration) -> Result<Job> {
    let job = Job::spawn(place.plain_command(words), limit)?;
    wait_until_it_listens(job, place.resident, port)
}

/// A TCP port that nothing on this host uses now.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("0.0.0.0", 0)).context("no free TCP port")?;
    Ok(listener.local_addr()?.port())
}

const LISTEN_LIMIT: Duration = Duration::from_secs(15);

fn wait_until_it_listens(mut server: Job, resident: Option<u32>, port: u16) -> Result<Job> {
    let start = Instant::now();
    let pid = resident.unwrap_or(server.pid());
    while !listens(pid, port) {
        interrupt::check()?;
        if server.has_ended()? || start.elapsed() > LISTEN_LIMIT {
            let outcome = server.stop(Duration::ZERO)?;
            bail!("the server never listened on port {port}: {}", outcome.report());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(server)
}

/// Whether a TCP socket listens on the port in the network namespace of a process. Asking `/proc` does not disturb
/// a server that takes the first connection for its client.
fn listens(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        std::fs::read_to_string(format!("/proc/{pid}/net/{table}"))
            .is_ok_and(|text| text.lines().skip(1).any(|line| is_listener(line, port)))
    })
}

/// Fields of a line: slot, local address and port, remote address and port, state (0A is LISTEN), all hexadecimal.
fn is_listener(line: &str, port: u16) -> bool {
    let fields: Vec<&str> = line.split_whitespace().take(4).collect();
    matches!(fields.as_slice(), [_, local, _, "0A"] if local.ends_with(&format!(":{port:04X}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_seen_and_a_closed_one_is_not() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(std::process::id(), port));
        drop(listener);
        assert!(!listens(std::process::id(), port));
    }

    #[test]
    fn perftest_gets_its_own_options_and_pingpong_does_not() {
        let words = Tool::new("ib_write_bw", &["-a"]).words(4000, Some("10.0.0.1")).join(" ");
        assert_eq!(words, "ib_write_bw -d ff0 -p 4000 -F -a 10.0.0.1");
        let words = Tool::new("ibv_rc_pingpong", &["-g", "0"]).words(4000, None).join(" ");
        assert_eq!(words, "ibv_rc_pingpong -d ff0 -p 4000 -g 0");
    }
}
