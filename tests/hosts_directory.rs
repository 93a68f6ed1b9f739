//! Promise: hosts whose directory is in etcd find each other's containers without being told, wherever these run; etcd may
//! come and go.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::ExitCode,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{hosts::cut, pingpong};
use libtest_mimic::{Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask::{
    bed::{Bed, Pair, Place, Tool},
    etcd::{Certificates, Etcd},
    hosts::{Hosts, Side},
    process::{Job, command, run},
    router::Router,
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(15);
/// Of the routers; etcd looks for what is over twice a second.
const LEASE: Duration = Duration::from_secs(3);
/// An address that moves.
const MOVING: &str = "10.201.77.9";

fn main() -> ExitCode {
    let obstacle = (!common::is_root()).then(|| "only root may make network namespaces".to_owned());
    common::run("hosts_directory", common::no_tree().or(obstacle), trials)
}

fn trials() -> Vec<Trial> {
    // Each has hosts of its own, one after the other.
    static TURN: Mutex<()> = Mutex::new(());
    let trial = |name: &str, test: fn(&Tree) -> Result<()>| {
        Trial::test(name, move || {
            let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let outcome = common::tree().and_then(|tree| test(&tree));
            outcome.map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    vec![
        trial("two hosts meet through etcd, and only what is to be announced is", meet),
        trial("a router that is killed is gone within its lease, and its successor is found", a_router_dies),
        trial("etcd may be killed under traffic and come back with its data", |tree| etcd_dies(tree, false)),
        trial("etcd may be killed under traffic and come back empty", |tree| etcd_dies(tree, true)),
        trial("etcd may stand still under traffic for longer than the leases", etcd_stands_still),
        trial("wall clocks that jump are noticed by nobody", clocks_jump),
        trial("routers start without etcd and serve their hosts", late_etcd),
        trial("an address that another host has is refused until that gives it back", second_claimant),
        trial("a container that moves is found at its new place", moves),
        trial("two tenants with the same overlay addresses do not meet", tenants),
        trial("etcd behind certificates and a password serves the same", secured),
    ]
}

/// Two hosts and their etcd, which runs on the left one.
struct Site {
    etcd: Etcd,
    hosts: Hosts,
}

impl Site {
    fn new(hosts: Hosts) -> Result<Self> {
        let etcd = Etcd::new(hosts.enter(Side::Left), hosts.address(Side::Left), None)?;
        let text = format!("etcd = [\"{}\"]\nlease = {}\n", etcd.url(), LEASE.as_secs());
        Ok(Self { etcd, hosts: hosts.with_registry(&text)? })
    }

    fn started(hosts: Hosts) -> Result<Self> {
        let mut site = Self::new(hosts)?;
        site.etcd.start()?;
        Ok(site)
    }

    /// Both routers, and a container on each host.
    fn bed(&self, tree: &Tree) -> Result<Bed> {
        self.bed_by(tree, &[])
    }

    /// The same, with further words in front of the routers' program.
    fn bed_by(&self, tree: &Tree, by: &[String]) -> Result<Bed> {
        let start = |side| self.hosts.start_router_by(tree, side, by);
        let (left, right) = (start(Side::Left)?, start(Side::Right)?);
        let (server, client) = (self.hosts.container(Side::Left, 0), self.hosts.container(Side::Right, 0));
        let mut bed = Bed::with_places(tree.clone(), left, server, client, Box::new(()));
        bed.client_router = Some(right);
        Ok(bed)
    }

    fn addresses(&self) -> Result<Vec<String>> {
        self.etcd.keys("/freeflow/addresses/")
    }
}

/// Waits for something; says what there was in its place.
fn eventually<T: std::fmt::Debug>(
    what: &str,
    mut look: impl FnMut() -> Result<T>,
    holds: impl Fn(&T) -> bool,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let found = look()?;
        if holds(&found) {
            return Ok(found);
        }
        ensure!(start.elapsed() < SOON, "never: {what}; there is {found:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn right(bed: &Bed) -> Result<&Router> {
    bed.client_router.as_ref().context("two routers")
}

fn directory(router: &Router) -> Result<Value> {
    Ok(router.status()?["directory"].clone())
}

fn is_up(router: &Router) -> Result<()> {
    eventually("the directory is up", || directory(router), |directory| directory["state"] == "up")
        .map(|_| ())
}

/// The router to which an address is routed.
fn route(router: &Router, prefix: &str) -> Result<Value> {
    let status = router.status()?;
    let routes = status["routes"].as_array().context("no routes")?;
    let found = routes.iter().find(|route| route["prefix"] == prefix);
    Ok(found.map_or(Value::Null, |route| route["router"].clone()))
}

/// A program on the left host that holds a device open and waits for its peer.
fn waiting_server(bed: &Bed, place: &Place, index: &str) -> Result<(Job, String)> {
    let port = xtask::bed::free_port()?.to_string();
    let words = ["ibv_rc_pingpong", "-d", "ff0", "-g", index, "-e", "-c", "-n", "500", "-p", &port];
    Ok((Job::spawn(bed.command(place, &common::words(&words)), LIMIT)?, port))
}

fn address(place: &Place, verb: &str, address: &str) -> Result<()> {
    let words = common::words(&["ip", "address", verb, &format!("{address}/32"), "dev", "eth0"]);
    run(place.plain_command(&words), common::SHORT).map(|_| ())
}

fn meet(tree: &Tree) -> Result<()> {
    let site = Site::started(Hosts::create(&[])?)?;
    let bed = site.bed(tree)?;
    eventually(
        "both routers say where they are",
        || site.etcd.keys("/freeflow/routers/"),
        |keys| keys == &["/freeflow/routers/left", "/freeflow/routers/right"],
    )?;
    ensure!(site.addresses()?.is_empty(), "no client, no address");
    // One that other hosts are not to be told of, beside the link-local one that each has.
    address(&bed.server, "add", "10.203.0.1")?;
    let (server, _) = waiting_server(&bed, &bed.server, "0")?;
    let own = ["/freeflow/addresses/default/10.201.77.1", "/freeflow/addresses/default/fd00:78::1"];
    eventually("its addresses are published", || site.addresses(), |keys| keys == &own)?;
    let status = eventually(
        "the right one knows",
        || right(&bed)?.status(),
        |status| status["directory"]["addresses"] == 2,
    )?;
    ensure!(status["directory"]["kind"] == "etcd" && status["directory"]["routers"] == 1, "{status}");
    let clients = bed.router.status()?["clients"].clone();
    ensure!(
        clients[0]["addresses"].to_string().contains("10.203.0.1"),
        "on its host it is served: {clients}"
    );
    ping(&bed, "10.201.77.1", "served by router left")?;
    ping(&bed, "10.203.0.1", "no route")?;
    drop(server);
    eventually("they go with the program", || site.addresses(), Vec::is_empty)?;
    for (program, options) in [
        ("ibv_rc_pingpong", &["-e", "-c"][..]),
        ("ibv_uc_pingpong", &["-e", "-c"]),
        ("ibv_ud_pingpong", &["-e", "-c"]),
    ] {
        pingpong::play(&bed, program, options).with_context(|| program.to_owned())?;
    }
    doctor(tree, &site)?;
    let start = Instant::now();
    drop(bed);
    eventually("routers that end say so", || site.etcd.keys("/freeflow/"), Vec::is_empty)?;
    ensure!(start.elapsed() < LEASE, "that was the lease's end, not theirs");
    Ok(())
}

/// What `freeflow ping` says on the right host.
fn ping(bed: &Bed, address: &str, expected: &str) -> Result<()> {
    let mut ping = command([bed.tree.program()]);
    ping.args(["ping", address, "--socket"]).arg(right(bed)?.socket()).env_remove("FREEFLOW_SOCKET");
    let told = Job::spawn(ping, common::SHORT)?.wait()?;
    ensure!(told.stdout.contains("etcd at http://10.200.77.1:2379, revision"), "{}", told.report());
    ensure!(told.stdout.contains(expected), "{}", told.report());
    Ok(())
}

/// What `freeflow doctor` says on the right host.
fn doctor(tree: &Tree, site: &Site) -> Result<()> {
    let program = tree.program().display().to_string();
    let words = [&program, "doctor", "--config"];
    let enter = site.hosts.enter(Side::Right);
    let mut doctor = command(enter.iter().map(String::as_str).chain(words));
    doctor.arg(site.hosts.configuration(Side::Right));
    let told = Job::spawn(doctor, common::SHORT)?.wait()?;
    let line = told.stdout.lines().find(|line| line.contains("etcd at")).unwrap_or_default();
    ensure!(line.starts_with("PASS") && line.contains("2 routers, 0 addresses"), "{}", told.report());
    Ok(())
}

fn a_router_dies(tree: &Tree) -> Result<()> {
    let site = Site::started(Hosts::create(&[])?)?;
    let mut bed = site.bed(tree)?;
    let (server, _) = waiting_server(&bed, &bed.server, "0")?;
    let shown = "10.201.77.1/32";
    eventually("the right host knows", || route(right(&bed)?, shown), |router| router == "left")?;
    let pid = i32::try_from(bed.router.pid()).ok().and_then(Pid::from_raw).context("no router")?;
    // The bed has not waited for it, so the number is still its own.
    kill_process(pid, Signal::KILL)?;
    let start = Instant::now();
    eventually("it is gone", || route(right(&bed)?, shown), Value::is_null)?;
    let took = start.elapsed();
    ensure!(took < LEASE + Duration::from_secs(2), "it was gone after {took:?} only");
    let known = directory(right(&bed)?)?;
    ensure!(known["routers"] == 0, "{known}");
    drop(server);
    bed.router = successor(&site, tree)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"])?;
    // Once more, and its successor does not wait for the lease.
    let pid = i32::try_from(bed.router.pid()).ok().and_then(Pid::from_raw).context("no router")?;
    kill_process(pid, Signal::KILL)?;
    bed.router = successor(&site, tree)?;
    let start = Instant::now();
    is_up(&bed.router)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"])?;
    ensure!(start.elapsed() < LEASE + Duration::from_secs(2), "{:?}", start.elapsed());
    Ok(())
}

/// A router on the left host, as soon as its address is free.
fn successor(site: &Site, tree: &Tree) -> Result<Router> {
    let start = Instant::now();
    loop {
        match site.hosts.start_router(tree, Side::Left) {
            Err(_) if start.elapsed() < LIMIT => thread::sleep(Duration::from_millis(100)),
            other => return other,
        }
    }
}

/// Reliable connections, and datagrams, each of which asks for its way anew, for so many seconds.
fn traffic(bed: &Bed, seconds: &str) -> Result<[Pair; 2]> {
    let write = Tool::new("ib_write_bw", &["-D", seconds]);
    let send = Tool::new("ib_send_lat", &["-c", "UD", "-D", seconds]);
    let pairs = [bed.start_pair(&write, LIMIT)?, bed.start_pair(&send, LIMIT)?];
    thread::sleep(Duration::from_secs(1));
    Ok(pairs)
}

fn ends_well(pairs: [Pair; 2]) -> Result<()> {
    pairs.into_iter().try_for_each(|pair| pair.wait()?.success())
}

/// It is there, takes what it is told, and says nothing: nobody's connection ends.
fn etcd_stands_still(tree: &Tree) -> Result<()> {
    let site = Site::started(Hosts::create(&[])?)?;
    let bed = site.bed(tree)?;
    let pairs = traffic(&bed, "16")?;
    let pid = i32::try_from(site.etcd.pid()).ok().and_then(Pid::from_raw).context("no etcd")?;
    // The site has not waited for it, so the number is still its own.
    kill_process(pid, Signal::STOP)?;
    for router in [&bed.router, right(&bed)?] {
        eventually("it is noticed", || directory(router), |directory| directory["state"] == "lost")?;
    }
    thread::sleep(LEASE + Duration::from_secs(1));
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("while etcd stands still")?;
    kill_process(pid, Signal::CONT)?;
    for router in [&bed.router, right(&bed)?] {
        is_up(router)?;
    }
    eventually("everything is published", || site.addresses(), |keys| keys.len() == 4)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("when etcd goes on")?;
    ends_well(pairs)?;
    eventually("the programs have ended", || site.addresses(), Vec::is_empty)?;
    pingpong::play(&bed, "ibv_ud_pingpong", &["-e", "-c"]).context("with new entries")
}

const FAKE_CLOCK: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// The clock that people set, of both routers; the one that only counts goes on as it does when people do that.
fn clocks_jump(tree: &Tree) -> Result<()> {
    if !Path::new(FAKE_CLOCK).exists() {
        common::skip("wall clocks that jump are noticed by nobody", "libfaketime is not there");
        return Ok(());
    }
    let site = Site::started(Hosts::create(&[])?)?;
    let file = site.hosts.dir().join("clock");
    let set = |offset: &str| {
        let fresh = file.with_extension("new");
        fs::write(&fresh, offset).and_then(|()| fs::rename(&fresh, &file))
    };
    set("+0")?;
    let by = [
        "env".to_owned(),
        format!("LD_PRELOAD={FAKE_CLOCK}"),
        format!("FAKETIME_TIMESTAMP_FILE={}", file.display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "DONT_FAKE_MONOTONIC=1".to_owned(),
        "FREEFLOW_LOG=info".to_owned(),
    ];
    let bed = site.bed_by(tree, &by)?;
    let pairs = traffic(&bed, "20")?;
    let known =
        ["10.201.77.1", "10.201.77.2"].map(|address| format!("/freeflow/addresses/default/{address}"));
    for (jump, years) in [("+4000d", 10), ("-8000d", -22), ("+0", 0)] {
        set(jump)?;
        let start = Instant::now();
        // For longer than any lease.
        while start.elapsed() < LEASE + Duration::from_secs(1) {
            let keys = site.addresses()?;
            ensure!(known.iter().all(|key| keys.contains(key)), "after {jump}: {keys:?}");
            ensure!(directory(&bed.router)?["state"] == "up", "{}", directory(&bed.router)?);
            thread::sleep(Duration::from_millis(100));
        }
        // It has jumped indeed: new lines of the log say so.
        cut()?;
        pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).with_context(|| format!("after {jump}"))?;
        let dates = |router: &Router| last_year(&router.log());
        let expected = this_year() + years;
        for router in [&bed.router, right(&bed)?] {
            let told = dates(router).context("a log without dates")?;
            ensure!((told - expected).abs() <= 1, "{told}, not {expected}:\n{}", router.log());
        }
    }
    for router in [&bed.router, right(&bed)?] {
        let log = router.log();
        ensure!(!log.contains("the directory is lost"), "{log}");
    }
    ends_well(pairs)
}

/// The year of the last line of a log.
fn last_year(log: &str) -> Option<i64> {
    log.lines().rev().find_map(|line| line.trim_start().get(..4)?.parse().ok())
}

fn this_year() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    1970 + (since.as_secs() / 31_556_952) as i64
}

fn etcd_dies(tree: &Tree, forgets: bool) -> Result<()> {
    let mut site = Site::started(Hosts::create(&[])?)?;
    let bed = site.bed(tree)?;
    let pairs = traffic(&bed, "16")?;
    site.etcd.kill();
    for router in [&bed.router, right(&bed)?] {
        eventually("it is noticed", || directory(router), |directory| directory["state"] == "lost")?;
        let warnings = router.log().matches("the directory is lost").count();
        ensure!(warnings == 1, "{warnings} warnings:\n{}", router.log());
    }
    // Addresses that are known stay so, for longer than any lease.
    thread::sleep(LEASE + Duration::from_secs(1));
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("while etcd is away")?;
    if forgets {
        site.etcd.wipe()?;
    }
    site.etcd.start()?;
    for router in [&bed.router, right(&bed)?] {
        is_up(router)?;
        ensure!(router.log().matches("the directory is there").count() == 2, "{}", router.log());
    }
    let published = |keys: &Vec<String>| keys.len() == 4;
    eventually("everything is published again", || site.addresses(), published)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("when etcd is back")?;
    ends_well(pairs)?;
    // New ones, by new entries.
    eventually("the programs have ended", || site.addresses(), Vec::is_empty)?;
    pingpong::play(&bed, "ibv_ud_pingpong", &["-e", "-c"]).context("with new entries")
}

fn late_etcd(tree: &Tree) -> Result<()> {
    let mut site = Site::new(Hosts::create(&[])?)?;
    let mut bed = site.bed(tree)?;
    eventually("it is said", || Ok(bed.router.log()), |log| log.contains("no directory yet"))?;
    // Both ends on the left host.
    let far = std::mem::replace(&mut bed.client, bed.server.clone());
    let far_router = bed.client_router.take();
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("on one host")?;
    (bed.client, bed.client_router) = (far, far_router);
    site.etcd.start()?;
    is_up(&bed.router)?;
    is_up(right(&bed)?)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"]).context("between hosts")
}

/// The GIDs that a program sees.
fn gids(bed: &Bed, place: &Place) -> Result<String> {
    let outcome = bed.run(place, &["ibv_devinfo", "-v"], common::SHORT)?;
    outcome.success()?;
    Ok(outcome.stdout)
}

fn second_claimant(tree: &Tree) -> Result<()> {
    let site = Site::started(Hosts::create(&[])?)?;
    let bed = site.bed(tree)?;
    address(&bed.server, "add", MOVING)?;
    address(&bed.client, "add", MOVING)?;
    let (server, _) = waiting_server(&bed, &bed.server, "0")?;
    let shown = format!("{MOVING}/32");
    eventually("the right host knows", || route(right(&bed)?, &shown), |router| router == "left")?;
    let seen = gids(&bed, &bed.client)?;
    ensure!(!seen.contains(MOVING) && seen.contains("10.201.77.2"), "{seen}");
    let (second, _) = waiting_server(&bed, &bed.client, "0")?;
    let own = eventually(
        "it is refused",
        || directory(right(&bed)?),
        |directory| {
            let own = directory["own"].as_array().map_or(&[][..], |own| own);
            own.iter()
                .any(|own| own["address"] == MOVING && own["state"] == "refused" && own["router"] == "left")
        },
    )?;
    let told = right(&bed)?.log();
    ensure!(told.contains(MOVING) && told.contains("router left has it"), "{own}\n{told}");
    ensure!(route(right(&bed)?, &shown)? == "left", "the first one keeps it");
    ping(&bed, MOVING, "router left had it first")?;
    drop(server);
    // By the program that runs already, and by new ones.
    eventually("the second one has it", || route(right(&bed)?, &shown), |router| router == "right")?;
    let clients = right(&bed)?.status()?["clients"].to_string();
    ensure!(clients.contains(MOVING), "{clients}");
    ensure!(gids(&bed, &bed.client)?.contains(MOVING), "a new program sees it");
    drop(second);
    Ok(())
}

/// Plays with a server at the moving address, which has the second place among its container's.
fn play_with(bed: &Bed, server: &Place, client: &Place) -> Result<()> {
    let (server_job, port) = waiting_server(bed, server, "1")?;
    thread::sleep(Duration::from_secs(1));
    let words =
        ["ibv_rc_pingpong", "-d", "ff0", "-g", "0", "-e", "-c", "-n", "500", "-p", &port, &server.address];
    let client = Job::spawn(bed.command(client, &common::words(&words)), LIMIT)?.wait()?;
    let server = server_job.wait()?;
    for end in [&client, &server] {
        let is_well = end.succeeded() && end.stdout.contains("500 iters in");
        ensure!(is_well && !end.stdout.contains("invalid data"), "{}{}", server.report(), client.report());
    }
    ensure!(client.stdout.contains(&format!("GID ::ffff:{MOVING}")), "another address: {}", client.report());
    Ok(())
}

fn moves(tree: &Tree) -> Result<()> {
    let site = Site::started(Hosts::create(&[])?)?;
    let bed = site.bed(tree)?;
    for round in 0..2 {
        for (at, from) in [(&bed.client, &bed.server), (&bed.server, &bed.client)] {
            address(at, "add", MOVING)?;
            play_with(&bed, at, from).with_context(|| format!("round {round}, at {}", at.address))?;
            address(at, "delete", MOVING)?;
        }
    }
    Ok(())
}

fn tenants(tree: &Tree) -> Result<()> {
    // One overlay, of which each host believes that it is another tenant's.
    let mut site = Site::new(Hosts::create(&[])?)?;
    site.etcd.start()?;
    let mut routers = Vec::new();
    for (side, tenant) in [(Side::Left, "blue"), (Side::Right, "red")] {
        let path = site.hosts.configuration(side);
        let text = fs::read_to_string(&path)?;
        let (text, announce) = text.split_at(text.find("announce").context("nothing announced")?);
        let socket = site.hosts.dir().join(tenant).join("router.sock");
        let own = format!("[[tenant]]\nname = \"{tenant}\"\nsocket = \"{}\"\n", socket.display());
        fs::write(&path, format!("{text}{own}{announce}"))?;
        routers.push((site.hosts.start_router(tree, side)?, socket));
    }
    let program = tree.program().display().to_string();
    let (left, right) = (site.hosts.container(Side::Left, 0), site.hosts.container(Side::Right, 0));
    address(&left, "add", MOVING)?;
    address(&right, "add", MOVING)?;
    let job = |at: usize, place: &Place, words: &[&str]| {
        let socket = routers[at].1.display().to_string();
        let all = [&[&program[..], "run", "--socket", &socket, "--"], words].concat();
        Job::spawn(place.plain_command(&common::words(&all)), LIMIT)
    };
    let words = ["ibv_rc_pingpong", "-d", "ff0", "-g", "0", "-n", "100", "-p", "18611"];
    let server = job(0, &left, &words)?;
    let other = job(1, &right, &words)?;
    let both = ["blue", "red"].map(|tenant| format!("/freeflow/addresses/{tenant}/{MOVING}"));
    let has = |keys: &Vec<String>| both.iter().all(|key| keys.contains(key));
    eventually("both have the same address", || site.addresses(), has)?;
    for (router, _) in &routers {
        let refused = directory(router)?.to_string();
        ensure!(!refused.contains("refused"), "{refused}");
    }
    drop(other);
    let client = job(1, &right, &[&words[..], &[&left.address]].concat())?.wait()?;
    ensure!(
        client.report().contains("Failed status transport retry counter exceeded"),
        "{}",
        client.report()
    );
    drop(server);
    Ok(())
}

fn secured(tree: &Tree) -> Result<()> {
    let hosts = Hosts::create(&[])?.secured(tree)?;
    let pki = hosts.dir().join("pki");
    let program = tree.program().display().to_string();
    let address = hosts.address(Side::Left);
    run(command([&program, "pki", "issue", &pki.display().to_string(), address]), common::SHORT)?;
    let file = |name: &str| pki.join(name);
    let certificates = Certificates {
        authority: file("ca.pem"),
        certificate: file(&format!("{address}.pem")),
        key: file(&format!("{address}.key")),
    };
    let mut etcd = Etcd::new(hosts.enter(Side::Left), address, Some(certificates))?;
    etcd.start()?;
    for words in [
        &["user", "add", "root:secret-of-root"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "router"],
        &["role", "grant-permission", "router", "--prefix=true", "readwrite", "/freeflow/"],
        &["user", "add", "freeflow:secret-of-routers"],
        &["user", "grant-role", "freeflow", "router"],
        &["auth", "enable"],
    ] {
        // There is no role of that name before authentication is switched on.
        let outcome = etcd.ctl(words);
        ensure!(outcome.is_ok() || words[1] == "grant-role", "{words:?}: {outcome:?}");
    }
    let password = hosts.dir().join("password");
    fs::write(&password, "secret-of-routers\n")?;
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600))?;
    let shown = |path: &std::path::Path| path.display().to_string();
    let text = format!(
        "etcd = [\"{}\"]\nlease = 3\nuser = \"freeflow\"\npassword_file = \"{}\"\nauthority = \"{}\"\n\
         certificate = \"{}\"\nkey = \"{}\"\n",
        etcd.url(),
        shown(&password),
        shown(&file("ca.pem")),
        shown(&file("left.pem")),
        shown(&file("left.key")),
    );
    let site = Site { etcd, hosts: hosts.with_registry(&text)? };
    let bed = site.bed(tree)?;
    is_up(&bed.router)?;
    is_up(right(&bed)?)?;
    pingpong::play(&bed, "ibv_rc_pingpong", &["-e", "-c"])?;
    let told = bed.router.log();
    ensure!(!told.contains("secret-of-routers"), "the password is in the log");
    // A wrong one is told of, and the host is served all the same.
    drop(bed);
    fs::write(&password, "wrong\n")?;
    let lonely = site.hosts.start_router(tree, Side::Right)?;
    eventually(
        "why there is no directory",
        || Ok(lonely.log()),
        |log| log.contains("authentication failed"),
    )?;
    ensure!(lonely.status()?["directory"]["state"] == "lost", "{}", lonely.status()?);
    Ok(())
}
