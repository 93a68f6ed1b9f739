//! Promise: tenants on one router are as hosts on networks that are not joined, an address is its first claimant's,
//! and nobody gets more than its quota.

mod common;

use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{
    daemon::Daemon,
    probe::{self, MODES},
};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use tempfile::TempDir;
use xtask::{
    interrupt,
    netns::{Namespace, NamespacePair},
    process::{Job, Outcome, command, has_program, run},
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    common::run("isolation", common::no_tree(), trials)
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("addresses outside a tenant's prefixes are not granted", foreign_addresses),
        trial("a second claimant of an address is refused until the first has gone", second_claimant),
        trial("a tenant gets direct mode unless it or its member is isolated", no_direct_mode),
        trial("query_device tells the quotas and more is ENOMEM", quotas),
        trial("all clients of a tenant share its total", totals),
        trial("a tenant's socket shows that tenant, the operator's all and opens nothing", views),
        trial("a tenant's listeners are its own", listeners),
        trial("a configuration that cannot be is refused in its own words", wrong_configurations),
    ];
    for mode in MODES {
        trials.push(trial(
            format!("two tenants in two network namespaces are strangers ({mode})"),
            move |bed| strangers_across(bed, mode),
        ));
        trials.push(trial(
            format!("two tenants in one network namespace are strangers ({mode})"),
            move |bed| strangers_together(bed, mode),
        ));
        trials.push(trial(format!("one tenant in two network namespaces meets ({mode})"), move |bed| {
            family(bed, mode)
        }));
    }
    trials
}

/// Where a test's router serves.
struct Scene {
    tree: Tree,
    directory: TempDir,
}

/// A tenant in a test's configuration.
#[derive(Clone, Copy)]
struct Tenant {
    name: &'static str,
    /// The rest of its table.
    words: &'static str,
}

/// The two namespaces of the tests, each a tenant's.
const LEFT: Tenant = Tenant { name: "left", words: "prefixes = ['10.200.77.1/32', 'fd00:77::1/128']\n" };
const RIGHT: Tenant = Tenant { name: "right", words: "prefixes = ['10.200.77.2/32', 'fd00:77::2/128']\n" };
/// Both of one tenant, beside another.
const BOTH: Tenant = Tenant { name: "both", words: "prefixes = ['10.200.77.0/24']\n" };
const OTHER: Tenant = Tenant { name: "other", words: "prefixes = ['10.201.0.0/16']\n" };

fn trial(name: impl Into<String>, test: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let scene = || Ok(Scene { tree: common::tree()?, directory: TempDir::with_prefix("freeflow-")? });
        scene().and_then(|scene| test(&scene)).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A tenant's socket.
    fn socket(&self, tenant: &Tenant) -> PathBuf {
        self.path(tenant.name).join("router.sock")
    }

    fn configuration(&self, tenants: &[Tenant]) -> Result<PathBuf> {
        let table = |tenant: &Tenant| {
            let socket = self.socket(tenant);
            format!("[[tenant]]\nname = '{}'\nsocket = '{}'\n{}", tenant.name, socket.display(), tenant.words)
        };
        let path = self.path("router.toml");
        fs::write(&path, tenants.iter().map(table).collect::<String>())?;
        Ok(path)
    }

    fn router(&self, tenants: &[Tenant]) -> Result<Daemon> {
        let config = self.configuration(tenants)?;
        let words = ["--config", config.to_str().context("no UTF-8")?];
        Daemon::start_with(&self.tree, &self.path("operator.sock"), &words)
    }

    /// A probe as a client of a tenant, in a namespace or on this host; in mode `default` it is told none.
    fn client(&self, place: Option<&Namespace>, socket: &Path, mode: &str, words: &[&str]) -> Command {
        self.program(place, socket, mode, &[&[probe::path()], words].concat())
    }

    /// The same for any program.
    fn program(&self, place: Option<&Namespace>, socket: &Path, mode: &str, words: &[&str]) -> Command {
        let enter = place.map(Namespace::enter).unwrap_or_default();
        let mut line = enter;
        line.push(self.tree.program().display().to_string());
        line.push("run".to_owned());
        if mode != "default" {
            line.extend(common::words(&["--mode", mode]));
        }
        line.push("--socket".to_owned());
        line.push(socket.display().to_string());
        line.push("--".to_owned());
        line.extend(common::words(words));
        command(line)
    }

    /// Two probes that try to reach each other; what each found.
    fn meet(&self, ends: [(Option<&Namespace>, &Tenant); 2], mode: &str) -> Result<[Outcome; 2]> {
        let folder = self.path("meeting");
        fs::create_dir_all(&folder)?;
        let folder = folder.display().to_string();
        let start = |end: usize| {
            let (place, tenant) = ends[end];
            let names = ["one", "two"];
            let words = ["meet", &folder, names[end], names[1 - end]];
            Job::spawn(self.client(place, &self.socket(tenant), mode, &words), LIMIT)
        };
        let (one, two) = (start(0)?, start(1)?);
        Ok([one.wait()?, two.wait()?])
    }
}

/// Fails unless a probe found exactly this.
fn found(outcome: &Outcome, expected: &[&str]) -> Result<()> {
    outcome.success()?;
    for line in expected {
        ensure!(outcome.stdout.lines().any(|told| told == *line), "not {line:?}: {}", outcome.report());
    }
    Ok(())
}

const SILENCE: [&str; 8] = [
    "write transport retry counter exceeded",
    "read transport retry counter exceeded",
    "send transport retry counter exceeded",
    "key remote access error",
    "datagram never",
    "buffer of write untouched",
    "buffer of read untouched",
    "buffer of send untouched",
];
const COMPANY: [&str; 8] = [
    "write success",
    "read success",
    "send success",
    "key remote access error",
    "datagram arrived",
    "buffer of write written",
    "buffer of read untouched",
    "buffer of send written",
];

/// The two namespaces, whose names are the process's: one test at a time has them.
struct Held {
    pair: NamespacePair,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Held {
    type Target = NamespacePair;

    fn deref(&self) -> &NamespacePair {
        &self.pair
    }
}

/// The two namespaces, or none where they may not be made.
fn namespaces(name: &str) -> Result<Option<Held>> {
    static TURN: Mutex<()> = Mutex::new(());
    if !common::is_root() {
        common::skip(name, "only root may make network namespaces");
        return Ok(None);
    }
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Some(Held { pair: NamespacePair::create()?, _turn: turn }))
}

fn strangers_across(scene: &Scene, mode: &str) -> Result<()> {
    let Some(pair) = namespaces("two tenants in two network namespaces are strangers")? else {
        return Ok(());
    };
    let daemon = scene.router(&[LEFT, RIGHT])?;
    let outcomes = scene.meet([(Some(&pair.left), &LEFT), (Some(&pair.right), &RIGHT)], mode)?;
    outcomes.iter().try_for_each(|outcome| found(outcome, &SILENCE))?;
    daemon.wait_until_idle()
}

fn strangers_together(scene: &Scene, mode: &str) -> Result<()> {
    let ends = [
        Tenant { name: "four", words: "prefixes = ['0.0.0.0/0']\n" },
        Tenant { name: "six", words: "prefixes = ['fd00:1234::/32']\n" },
    ];
    let daemon = scene.router(&ends)?;
    let outcomes = scene.meet([(None, &ends[0]), (None, &ends[1])], mode)?;
    outcomes.iter().try_for_each(|outcome| found(outcome, &SILENCE))?;
    daemon.wait_until_idle()
}

/// The same tries succeed where they may: the tests above can see.
fn family(scene: &Scene, mode: &str) -> Result<()> {
    let Some(pair) = namespaces("one tenant in two network namespaces meets")? else { return Ok(()) };
    let daemon = scene.router(&[BOTH, OTHER])?;
    let outcomes = scene.meet([(Some(&pair.left), &BOTH), (Some(&pair.right), &BOTH)], mode)?;
    outcomes.iter().try_for_each(|outcome| found(outcome, &COMPANY))?;
    daemon.wait_until_idle()
}

/// A client that holds a pair of QPs until it is stopped.
fn hold(scene: &Scene, place: Option<&Namespace>, tenant: &Tenant, mode: &str) -> Result<Job> {
    let command = scene.client(place, &scene.socket(tenant), mode, &["hold", "1"]);
    let mut job = Job::spawn(command, LIMIT)?;
    while !job.stdout().contains("READY\n") {
        interrupt::check()?;
        ensure!(!job.has_ended()?, "it was never ready: {}", job.wait()?.report());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(job)
}

/// The clients of a tenant, as the operator sees them.
fn clients(daemon: &Daemon, tenant: &Tenant) -> Result<Vec<Value>> {
    let status = daemon.status()?;
    let all = status["clients"].as_array().context("no clients")?;
    Ok(all.iter().filter(|client| client["tenant"] == tenant.name).cloned().collect())
}

/// The GIDs of one of a process's devices.
fn addresses(daemon: &Daemon, tenant: &Tenant, job: &Job) -> Result<Vec<String>> {
    let clients = clients(daemon, tenant)?;
    let own = clients.iter().find(|client| client["pid"] == job.pid()).context("no such client")?;
    let list = own["addresses"].as_array().context("no addresses")?;
    Ok(list.iter().filter_map(|address| address.as_str().map(str::to_owned)).collect())
}

fn foreign_addresses(scene: &Scene) -> Result<()> {
    let Some(pair) = namespaces("addresses outside a tenant's prefixes are not granted")? else {
        return Ok(());
    };
    let daemon = scene.router(&[LEFT, RIGHT])?;
    let home = hold(scene, Some(&pair.left), &LEFT, "isolated")?;
    let own = addresses(&daemon, &LEFT, &home)?;
    ensure!(own == [pair.left.address, pair.left.address6], "link-local and others have gone: {own:?}");
    // The same namespace by the other tenant's socket: whoever mounts it there gains nothing by it.
    let stranger = hold(scene, Some(&pair.left), &RIGHT, "isolated")?;
    let own = addresses(&daemon, &RIGHT, &stranger)?;
    ensure!(own == ["127.0.0.1"], "{own:?}");
    let log = daemon.log();
    let told = |line: &str| ["right", pair.left.address, "prefixes"].iter().all(|word| line.contains(word));
    ensure!(log.lines().any(told), "nobody was told: {log}");
    Ok(())
}

fn second_claimant(scene: &Scene) -> Result<()> {
    let name = "a second claimant of an address is refused until the first has gone";
    let Some(pair) = namespaces(name)? else { return Ok(()) };
    let stolen = pair.left.address;
    let mut line = pair.right.enter();
    line.extend(common::words(&["ip", "address", "add", &format!("{stolen}/32"), "dev", "lo"]));
    run(command(line), LIMIT)?;
    let daemon = scene.router(&[BOTH, OTHER])?;
    let first = hold(scene, Some(&pair.left), &BOTH, "isolated")?;
    let neighbour = hold(scene, Some(&pair.left), &BOTH, "isolated")?;
    let thief = hold(scene, Some(&pair.right), &BOTH, "isolated")?;
    for sharer in [&first, &neighbour] {
        ensure!(addresses(&daemon, &BOTH, sharer)?.contains(&stolen.to_owned()), "the first lost it");
    }
    let own = addresses(&daemon, &BOTH, &thief)?;
    ensure!(own == [pair.right.address], "{own:?}");
    ensure!(
        daemon.log().contains("in use by another network namespace"),
        "nobody was told: {}",
        daemon.log()
    );
    first.stop(SOON)?;
    let late = hold(scene, Some(&pair.right), &BOTH, "isolated")?;
    ensure!(
        !addresses(&daemon, &BOTH, &late)?.contains(&stolen.to_owned()),
        "its namespace still has a client"
    );
    neighbour.stop(SOON)?;
    let began = Instant::now();
    loop {
        let heir = hold(scene, Some(&pair.right), &BOTH, "isolated")?;
        if addresses(&daemon, &BOTH, &heir)?.contains(&stolen.to_owned()) {
            return Ok(());
        }
        ensure!(began.elapsed() < SOON, "an address of nobody is granted to nobody");
    }
}

fn no_direct_mode(scene: &Scene) -> Result<()> {
    let strict = Tenant { name: "strict", words: "mode = 'isolated'\nprefixes = ['0.0.0.0/0']\n" };
    let loose = Tenant { name: "loose", words: "prefixes = ['fd00::/8']\n" };
    let daemon = scene.router(&[strict, loose])?;
    for (tenant, asked, granted) in [
        (&strict, "direct", "isolated"),
        (&strict, "isolated", "isolated"),
        (&loose, "direct", "direct"),
        (&loose, "isolated", "isolated"),
        (&strict, "default", "isolated"),
        (&loose, "default", "direct"),
    ] {
        let client = hold(scene, None, tenant, asked)?;
        let all = clients(&daemon, tenant)?;
        ensure!(all.len() == 2 && all.iter().all(|client| client["mode"] == granted), "{asked}: {all:?}");
        let status = daemon.status()?;
        let qps = status["qps"].as_array().context("no QPs")?;
        ensure!(qps.iter().all(|qp| qp["mode"] == granted), "{asked} at {}: {status}", tenant.name);
        client.stop(SOON)?;
        daemon.wait_until_idle()?;
    }
    Ok(())
}

fn quotas(scene: &Scene) -> Result<()> {
    let small = Tenant {
        name: "small",
        words: "[tenant.limits]\nqps = 5\ncqs = 6\nmrs = 7\npds = 3\nmemory = '1MiB'\n",
    };
    let daemon = scene.router(&[small])?;
    let exhaust = scene.client(None, &scene.socket(&small), "isolated", &["exhaust"]);
    let outcome = Job::spawn(exhaust, LIMIT)?.wait()?;
    let lines = [
        "pds 3 of 3, then 12",
        "mrs 7 of 7, then 12",
        "bytes 1048576, then 12",
        "cqs 6 of 6, then 12",
        "qps 5 of 5, then 12",
    ];
    found(&outcome, &lines)?;
    daemon.wait_until_idle()
}

fn totals(scene: &Scene) -> Result<()> {
    let small = Tenant { name: "small", words: "[tenant.total]\nclients = 4\nqps = 3\n" };
    let daemon = scene.router(&[small])?;
    let _first = hold(scene, None, &small, "isolated")?;
    let hold = || {
        let command = scene.client(None, &scene.socket(&small), "isolated", &["hold", "1"]);
        Job::spawn(command, LIMIT)?.wait()
    };
    let second = hold()?;
    ensure!(!second.succeeded() && second.stderr.contains("ibv_create_qp"), "{}", second.report());
    ensure!(second.stderr.contains("Cannot allocate memory"), "{}", second.report());
    let began = Instant::now();
    while clients(&daemon, &small)?.len() > 2 {
        ensure!(began.elapsed() < SOON, "clients that are gone are still there");
    }
    let shown = &clients(&daemon, &small)?[0];
    ensure!(shown["qps"] == 1 && shown["quotas"]["qps"] == 16_384, "{shown}");
    Ok(())
}

fn views(scene: &Scene) -> Result<()> {
    let ends = [
        Tenant { name: "one", words: "prefixes = ['0.0.0.0/0']\n" },
        Tenant { name: "two", words: "prefixes = ['fd00::/8']\n" },
    ];
    let daemon = scene.router(&[ends[0], ends[1]])?;
    let _clients = [hold(scene, None, &ends[0], "isolated")?, hold(scene, None, &ends[1], "isolated")?];
    for (socket, tenants) in [
        (scene.socket(&ends[0]), &["one"][..]),
        (scene.socket(&ends[1]), &["two"]),
        (daemon.socket.clone(), &["one", "two"]),
    ] {
        let status = daemon.status_at(&socket)?;
        let clients = status["clients"].as_array().context("no clients")?;
        let ids: Vec<&Value> = clients.iter().map(|client| &client["id"]).collect();
        let shown = clients.iter().all(|client| tenants.iter().any(|tenant| client["tenant"] == *tenant));
        ensure!(shown && clients.len() == 2 * tenants.len(), "{}: {status}", socket.display());
        let qps = status["qps"].as_array().context("no QPs")?;
        ensure!(
            qps.len() == 2 * tenants.len() && qps.iter().all(|qp| ids.contains(&&qp["client"])),
            "{status}"
        );
    }
    let open = scene.client(None, &daemon.socket, "isolated", &["open"]);
    let refused = Job::spawn(open, LIMIT)?.wait()?;
    ensure!(!refused.succeeded() && refused.stderr.contains("Permission denied"), "{}", refused.report());
    ensure!(daemon.log().contains("operator"), "nobody was told: {}", daemon.log());
    Ok(())
}

/// Both listen on one port, and each sees, and reaches, its own listener alone.
fn listeners(scene: &Scene) -> Result<()> {
    const PORT: &str = "7788";
    if !has_program("rping") {
        common::skip("a tenant's listeners are its own", "rdmacm-utils is not installed");
        return Ok(());
    }
    let Some(pair) = namespaces("a tenant's listeners are its own")? else { return Ok(()) };
    let daemon = scene.router(&[LEFT, RIGHT])?;
    let ends = [(&pair.left, &LEFT, "10.200.77.1"), (&pair.right, &RIGHT, "10.200.77.2")];
    let rping = |(place, tenant, _): (&Namespace, &Tenant, &str), words: &[&str]| {
        let line = [&["rping", "-p", PORT, "-C", "3", "-V"], words].concat();
        Job::spawn(scene.program(Some(place), &scene.socket(tenant), "default", &line), LIMIT)
    };
    let servers = ends.iter().map(|end| rping(*end, &["-s"])).collect::<Result<Vec<_>>>()?;
    let shown = |socket: &Path| -> Result<usize> {
        Ok(daemon.status_at(socket)?["listeners"].as_array().context("no listeners")?.len())
    };
    let start = Instant::now();
    while shown(&daemon.socket)? < 2 {
        interrupt::check()?;
        ensure!(start.elapsed() < LIMIT, "the servers do not listen");
        thread::sleep(Duration::from_millis(20));
    }
    for (own, other) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        ensure!(shown(&scene.socket(own.1))? == 1, "another tenant's listener is seen");
        let refused = rping(own, &["-c", "-a", other.2])?.wait()?;
        let told = refused.stdout.clone() + &refused.stderr;
        ensure!(!refused.succeeded() && told.contains("ADDR_ERROR"), "{}", refused.report());
    }
    for (server, end) in servers.into_iter().zip(ends) {
        rping(end, &["-c", "-a", end.2])?.wait()?.success()?;
        server.wait()?.success()?;
    }
    daemon.wait_until_idle()
}

fn wrong_configurations(scene: &Scene) -> Result<()> {
    for (tenants, words) in [
        (vec![Tenant { name: "a", words: "prefix = '10.0.0.0/8'\n" }], ["prefix", "line 4"]),
        (vec![Tenant { name: "a", words: "prefixes = ['10.0.0.1/8']\n" }], ["10.0.0.1/8", "10.0.0.0/8"]),
        (vec![Tenant { name: "a", words: "" }, Tenant { name: "b", words: "" }], ["a", "no prefixes"]),
    ] {
        let config = scene.configuration(&tenants)?;
        let mut start = command([scene.tree.program()]);
        start.args(["router", "--socket"]).arg(scene.path("operator.sock")).arg("--config").arg(&config);
        let outcome = Job::spawn(start, LIMIT)?.wait()?;
        ensure!(outcome.status.and_then(|status| status.code()) == Some(2), "{}", outcome.report());
        ensure!(words.iter().all(|word| outcome.stderr.contains(word)), "{words:?}: {}", outcome.report());
    }
    Ok(())
}
