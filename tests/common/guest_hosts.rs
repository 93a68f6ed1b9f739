//! Two hosts in virtual machines, each with an RNIC in software, a router and a container: what tests do with them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::{
    process::Outcome,
    tree::Tree,
    vm::{self, Guest, GuestJob, Kernel},
};

/// Much more than a tool needs under emulation.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);
/// Where the tools listen unless they are told otherwise.
pub(crate) const PORT: u16 = 18515;
/// How long something that comes by itself may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two hosts, each with an RNIC, a router and a container.
pub(crate) struct Hosts {
    pub(crate) guests: [Arc<Guest>; 2],
    pub(crate) tree: Tree,
    routers: Mutex<[GuestJob; 2]>,
}

impl Hosts {
    pub(crate) fn boot(kernel: &Kernel) -> Result<Self> {
        let (guests, tree) = (Guest::pair(kernel)?, super::tree()?);
        for guest in &guests {
            guest.add_rxe()?;
            guest.add_container()?;
        }
        let [left, right] = &guests;
        let routers = Mutex::new([left.start_router(&tree, "")?, right.start_router(&tree, "")?]);
        Ok(Self { guests, tree, routers })
    }

    /// Starts the router of a host anew, after its end.
    pub(crate) fn restart_router(&self, host: usize) -> Result<()> {
        let router = self.guests[host].start_router(&self.tree, "")?;
        self.routers.lock().unwrap_or_else(PoisonError::into_inner)[host] = router;
        Ok(())
    }

    /// The words that run something on a host itself, with options of `freeflow run`.
    pub(crate) fn run(&self, options: &str) -> String {
        format!("{} run {options} --", self.program())
    }

    pub(crate) fn program(&self) -> String {
        self.tree.program().display().to_string()
    }

    /// Runs a tool on the bare RNICs of the two hosts: a server on the left one, then a client on the right one.
    pub(crate) fn bare(&self, tool: &str) -> Result<[Outcome; 2]> {
        both(self.begin_bare(tool)?)
    }

    /// The same without waiting for their ends.
    pub(crate) fn begin_bare(&self, tool: &str) -> Result<[GuestJob; 2]> {
        let [left, right] = &self.guests;
        let server = left.start(tool, LIMIT)?;
        left.wait_for_listener("", PORT)?;
        Ok([server, right.start(&format!("{tool} {}", left.address()), LIMIT)?])
    }

    /// Runs a tool between the containers of the two hosts.
    pub(crate) fn contained(&self, tool: &str) -> Result<[Outcome; 2]> {
        both(self.begin(tool)?)
    }

    /// The same without waiting for their ends.
    pub(crate) fn begin(&self, tool: &str) -> Result<[GuestJob; 2]> {
        let [left, right] = &self.guests;
        let server = left.start(&left.in_container(&self.tree, tool), LIMIT)?;
        left.wait_for_listener(vm::ENTER, PORT)?;
        let client = right.in_container(&self.tree, &format!("{tool} {}", left.container_address()));
        Ok([server, right.start(&client, LIMIT)?])
    }

    /// Runs a tool between the containers whose server listens by rdma_cm, on this port. `{}` in the client's words stands for
    /// the server's address.
    pub(crate) fn named(&self, server: &str, client: &str, port: u16) -> Result<[Outcome; 2]> {
        let [left, right] = &self.guests;
        let server = left.start(&left.in_container(&self.tree, server), LIMIT)?;
        self.wait_for_cm_listener(port)?;
        let client = right.in_container(&self.tree, &client.replace("{}", &left.container_address()));
        both([server, right.start(&client, LIMIT)?])
    }

    /// Waits until the router of the left host lists a listener of rdma_cm.
    pub(crate) fn wait_for_cm_listener(&self, port: u16) -> Result<()> {
        let program = self.program();
        let script = format!(
            "for i in $(seq 100); do {program} status --json | grep -q ':{port}\"' && exit 0; sleep 0.2; done; exit 1"
        );
        self.guests[0]
            .run(&script, LIMIT)
            .map(|_| ())
            .with_context(|| format!("nobody listens on port {port}"))
    }

    /// What a host's router says of itself.
    pub(crate) fn status(&self, host: usize) -> Result<Value> {
        let said = self.guests[host].run(&format!("{} status --json", self.program()), LIMIT)?;
        serde_json::from_str(&said.stdout).context("the status is no JSON")
    }

    /// Waits until a condition holds for a host's status.
    pub(crate) fn wait_for(&self, host: usize, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.status(host)?;
            if holds(&status) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                bail!("{what} does not come: {status:#}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Packets that a host's RNIC has sent.
    pub(crate) fn packets(&self, host: usize) -> Result<u64> {
        let counter = "cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts";
        Ok(self.guests[host].run(counter, LIMIT)?.stdout.trim().parse()?)
    }

    /// Fails unless the RNICs have sent so many packets each while this was done.
    pub(crate) fn by_rnic<R>(&self, packets: [u64; 2], work: impl FnOnce() -> Result<R>) -> Result<R> {
        let before = [self.packets(0)?, self.packets(1)?];
        let done = work()?;
        let sent = [self.packets(0)? - before[0], self.packets(1)? - before[1]];
        ensure!(
            sent.iter().zip(packets).all(|(sent, least)| *sent >= least),
            "the RNICs sent {sent:?} packets"
        );
        Ok(done)
    }

    /// Nothing of anybody's is left on the RNIC of a host.
    pub(crate) fn is_clean(&self, host: usize) -> Result<()> {
        let unused = |status: &Value| status["rnic"]["qps"] == 0 && status["rnic"]["mrs"] == 0;
        self.wait_for(host, "an RNIC without clients", unused)?;
        let script = "rdma resource show qp | grep -c -e 'type RC' -e 'type UC' -e 'type UD' || true";
        let shown = self.guests[host].run(script, LIMIT)?;
        ensure!(shown.stdout.trim() == "0", "QPs are left: {}", shown.report());
        Ok(())
    }
}

/// The ends of a server and its client, both of which must be well.
fn both([server, client]: [GuestJob; 2]) -> Result<[Outcome; 2]> {
    let (client, server) = (client.wait()?, server.wait()?);
    client.success()?;
    server.success()?;
    Ok([server, client])
}

/// The path of every connected QP that a status tells of.
pub(crate) fn paths(status: &Value) -> Vec<String> {
    let qps = status["qps"].as_array().cloned().unwrap_or_default();
    qps.iter().map(|qp| qp["path"].as_str().unwrap_or_default().to_owned()).collect()
}
