//! Programs that meet by name: those of rdmacm-utils, and TCP programs over rsocket.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use tempfile::TempDir;
use xtask::{
    bed::{Bed, PairOutcome, Tool, free_port},
    process::{Job, Outcome, has_program},
};

use super::{SHORT, Stage, probe};

/// Much more than any of these programs needs, also on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// Programs of rdmacm-utils: name, then the words of both ends. `ADDR` is the server's address, `PORT` a free port.
const TOOLS: &[(&str, &str, &str)] = &[
    ("rping", "rping -s -p PORT -C 20 -v -V", "rping -c -a ADDR -p PORT -C 20 -v -V"),
    ("rping on one address", "rping -s -a ADDR -p PORT -C 5 -V", "rping -c -a ADDR -p PORT -C 5 -V"),
    (
        "rping of 65,000 bytes",
        "rping -s -p PORT -C 5 -V -S 65000",
        "rping -c -a ADDR -p PORT -C 5 -V -S 65000",
    ),
    ("rping with its own QP", "rping -s -p PORT -C 5 -V -q", "rping -c -a ADDR -p PORT -C 5 -V -q"),
    ("rping in the older dialect", "OLD rping -s -p PORT -C 5 -V", "OLD rping -c -a ADDR -p PORT -C 5 -V"),
    ("ucmatose", "ucmatose -p PORT", "ucmatose -p PORT -s ADDR"),
    ("ucmatose of 100", "ucmatose -p PORT -c 100 -C 2", "ucmatose -p PORT -c 100 -C 2 -s ADDR"),
    ("ucmatose that migrates", "ucmatose -p PORT -m -c 5", "ucmatose -p PORT -m -c 5 -s ADDR"),
    ("ucmatose with a TOS", "ucmatose -p PORT -t 32 -a 20", "ucmatose -p PORT -t 32 -a 20 -s ADDR"),
    ("ucmatose in the older dialect", "OLD ucmatose -p PORT -c 5", "OLD ucmatose -p PORT -c 5 -s ADDR"),
    ("udaddy", "udaddy -c 3", "udaddy -c 3 -s ADDR"),
    ("udaddy in the older dialect", "OLD udaddy", "OLD udaddy -s ADDR"),
    ("rdma_server", "rdma_server -p PORT", "rdma_client -p PORT -s ADDR"),
    ("rdma_xserver", "rdma_xserver -p PORT", "rdma_xclient -p PORT -s ADDR"),
    ("rdma_xserver over XRC", "rdma_xserver -p PORT -c x", "rdma_xclient -p PORT -s ADDR -c x"),
    ("rstream", "rstream -p PORT -S all -C 50 -I 4", "rstream -p PORT -S all -C 50 -I 4 -s ADDR"),
    ("rstream -T b", "rstream -p PORT -S 4000 -T b", "rstream -p PORT -S 4000 -T b -s ADDR"),
    ("rstream -T n", "rstream -p PORT -S 4000 -T n", "rstream -p PORT -S 4000 -T n -s ADDR"),
    ("rstream -T r", "rstream -p PORT -S 4000 -T r", "rstream -p PORT -S 4000 -T r -s ADDR"),
    ("rstream -T v", "rstream -p PORT -S 4000 -T v", "rstream -p PORT -S 4000 -T v -s ADDR"),
    ("riostream", "riostream -p PORT -S 4000", "riostream -p PORT -S 4000 -s ADDR"),
    ("riostream -T b", "riostream -p PORT -S 4000 -T b", "riostream -p PORT -S 4000 -T b -s ADDR"),
    ("riostream -T v", "riostream -p PORT -S 4000 -T v", "riostream -p PORT -S 4000 -T v -s ADDR"),
];

/// Of [`TOOLS`], each program once, where the question is whether a release's programs work at all.
const EACH: [&str; 13] = [
    "rping",
    "ucmatose",
    "ucmatose that migrates",
    "ucmatose with a TOS",
    "udaddy",
    "rdma_server",
    "rdma_xserver",
    "rdma_xserver over XRC",
    "rstream",
    "rstream -T b",
    "rstream -T n",
    "riostream",
    "riostream -T b",
];

/// perftest, connected by name: each of its tools, with each transport that it has.
const BY_NAME: &[(&str, &[&str])] = &[
    ("ib_write_bw", &["-R", "-s", "65536", "-n", "200"]),
    ("ib_read_bw", &["-R", "-n", "200"]),
    ("ib_send_bw", &["-R", "-q", "4", "-n", "100"]),
    ("ib_send_bw", &["-R", "-c", "UD", "-n", "200"]),
    ("ib_atomic_bw", &["-R", "-n", "200"]),
    ("ib_write_lat", &["-R", "-n", "100"]),
    ("ib_read_lat", &["-R", "-n", "100"]),
    ("ib_send_lat", &["-R", "-n", "100"]),
    ("ib_send_lat", &["-R", "-c", "UD", "-n", "100"]),
    ("ib_atomic_lat", &["-R", "-n", "100"]),
];

/// perftest by name.
pub(crate) fn perftest(stage: &Stage, place: &str) -> Vec<Trial> {
    let trials = BY_NAME.iter().map(|(program, options)| {
        let name = format!("{program} {} ({place})", options.join(" "));
        stage.trial(name, move |bed| bed.run_pair(&Tool::new(program, options), LIMIT)?.success())
    });
    trials.collect()
}

/// A test of one program.
pub(crate) type Test = Box<dyn FnOnce(&Bed) -> Result<()> + Send>;

/// The programs of a release between two containers: name and test. `newest`: of release 65.
pub(crate) fn of_release(newest: bool) -> Vec<(&'static str, Test)> {
    let tools = TOOLS.iter().filter(|(name, ..)| EACH.contains(name));
    let test = |&(name, server, client): &(&'static str, &'static str, &'static str)| match name {
        "rping" if newest => (name, Box::new(rping_that_may_wait) as Test),
        _ => (name, Box::new(move |bed: &Bed| tool(bed, server, client)) as Test),
    };
    let others: [(&str, Test); 3] = [
        ("mckey", Box::new(multicast)),
        ("cmtime of 1000 connections", Box::new(if newest { cmtime_of_peers } else { cmtime })),
        ("rcopy", Box::new(rcopy_in_containers)),
    ];
    tools.map(test).chain(others).collect()
}

/// rping of release 65 polls for an event of rdma_cm and then asks for it, in one thread, while the other destroys the id of
/// that event at the end. Where that comes between the two steps, the client waits for ever, on every device: Linux, too,
/// forgets the events of a destroyed id (`ucma_cleanup_ctx_events`). By then it has done all its work.
fn rping_that_may_wait(bed: &Bed) -> Result<()> {
    let mut outcome = None;
    for _ in 0..3 {
        let port = free_port()?;
        let server = serve(bed, "rping -s -p PORT -C 20 -v -V", port)?;
        let client = run_client(bed, "timeout 30 rping -c -a ADDR -p PORT -C 20 -v -V", port)?;
        let outcome = outcome.insert(PairOutcome { server: server.stop(Duration::from_secs(2))?, client });
        for end in [&outcome.server, &outcome.client] {
            ensure!(end.stdout.matches("rdma-ping-").count() == 20, "{}", outcome.report());
        }
        ensure!(outcome.server.succeeded(), "{}", outcome.report());
        match outcome.client.status.and_then(|status| status.code()) {
            Some(0) => return Ok(()),
            // What timeout(1) says of a program that it had to end.
            Some(124) => {}
            _ => break,
        }
    }
    bail!("{}", outcome.map(|outcome| outcome.report()).unwrap_or_default())
}

/// What is copied is there in each container, and the copy goes where everybody may write.
fn rcopy_in_containers(bed: &Bed) -> Result<()> {
    let client = format!("rcopy /usr/bin/rping {}:/dev/shm/copy -p PORT", bed.server.address);
    with_server(bed, "rcopy -p PORT", &client)?;
    let words = super::words(&["sha256sum", "/usr/bin/rping", "/dev/shm/copy"]);
    let sums = Job::spawn(bed.server.plain_command(&words), SHORT)?.wait()?;
    let digests: Vec<&str> = sums.stdout.lines().filter_map(|line| line.split(' ').next()).collect();
    ensure!(matches!(digests[..], [from, to] if from == to), "the copy differs\n{}", sums.report());
    Ok(())
}

pub(crate) fn no_tools() -> Option<String> {
    (!has_program("rping")).then(|| "rdmacm-utils is not installed".to_owned())
}

pub(crate) fn trials(stage: &Stage, place: &str) -> Vec<Trial> {
    let mut trials: Vec<Trial> = TOOLS
        .iter()
        .map(|&(name, server, client)| {
            stage.trial(format!("{name} ({place})"), move |bed| tool(bed, server, client))
        })
        .collect();
    trials.push(stage.trial(format!("rcopy ({place})"), rcopy));
    trials.push(stage.trial(format!("a TCP program over rsocket ({place})"), tcp_program));
    trials.push(stage.trial(format!("iperf over rsocket ({place})"), iperf));
    trials.push(stage.trial(format!("rstream -T a ({place})"), asynchronous));
    trials.push(stage.trial(format!("mckey ({place})"), multicast));
    trials.push(stage.trial(format!("cmtime of 1000 connections ({place})"), cmtime));
    trials
}

/// The words of a command.
pub(crate) fn words(text: &str, bed: &Bed, port: u16) -> Vec<String> {
    let word = |word: &str| match word {
        "ADDR" => vec![bed.server.address.clone()],
        "PORT" => vec![port.to_string()],
        // The dialect of librdmacm for kernels without InfiniBand addresses.
        "OLD" => vec!["env".to_owned(), "FREEFLOW_CM_DIALECT=ip".to_owned()],
        word => vec![word.to_owned()],
    };
    text.split(' ').flat_map(word).collect()
}

pub(crate) fn serve(bed: &Bed, server: &str, port: u16) -> Result<Job> {
    // These programs' port cannot be chosen.
    let listens_on = if server.contains("udaddy") { 7174 } else { port };
    bed.start_cm_server(&words(server, bed, port), listens_on, LIMIT)
}

pub(crate) fn run_client(bed: &Bed, client: &str, port: u16) -> Result<Outcome> {
    Job::spawn(bed.command(&bed.client, &words(client, bed, port)), LIMIT)?.wait()
}

pub(crate) fn tool(bed: &Bed, server: &str, client: &str) -> Result<()> {
    let port = free_port()?;
    let server = serve(bed, server, port)?;
    let client = run_client(bed, client, port)?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    let outcome = PairOutcome { server, client };
    outcome.success()?;
    if outcome.client.name.contains("rping") && outcome.client.name.contains("-v ") {
        for end in [&outcome.server, &outcome.client] {
            ensure!(end.stdout.matches("rdma-ping-").count() == 20, "{}", outcome.report());
        }
    }
    Ok(())
}

/// A server that serves for ever and a client that ends.
pub(crate) fn with_server(bed: &Bed, server: &str, client: &str) -> Result<PairOutcome> {
    let port = free_port()?;
    let server = serve(bed, server, port)?;
    let client = run_client(bed, client, port)?;
    let server = server.stop(Duration::from_secs(2))?;
    let outcome = PairOutcome { server, client };
    ensure!(outcome.client.succeeded(), "{}", outcome.report());
    Ok(outcome)
}

fn rcopy(bed: &Bed) -> Result<()> {
    let directory = TempDir::with_prefix("freeflow-")?;
    let path = |name: &str| directory.path().join(name);
    let content: Vec<u8> =
        (0..3_000_000_u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_ne_bytes()).collect();
    std::fs::write(path("from"), &content)?;
    let client =
        format!("rcopy {} {}:{} -p PORT", path("from").display(), bed.server.address, path("to").display());
    let outcome = with_server(bed, "rcopy -p PORT", &client)?;
    ensure!(std::fs::read(path("to"))? == content, "the copy differs\n{}", outcome.report());
    Ok(())
}

fn cmtime(bed: &Bed) -> Result<()> {
    let options = "-c 1000 -p PORT";
    let outcome = with_server(
        bed,
        &format!("cmtime -b {} {options}", bed.server.address),
        &format!("cmtime -s {} {options}", bed.server.address),
    )?;
    for word in ["REJECTED", "ERROR", "UNREACHABLE"] {
        ensure!(!outcome.client.stdout.contains(word), "{}", outcome.report());
    }
    ensure!(outcome.client.stdout.contains("disconnect"), "{}", outcome.report());
    Ok(())
}

/// cmtime of release 65: both ends find each other over TCP, connect thrice (once for practice, with QPs, without) and end.
fn cmtime_of_peers(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let options = format!("-C {} -c 1000 -p {port}", bed.server.address);
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let server = words(format!("stdbuf -oL cmtime -L -b {} {options}", bed.server.address));
    let server = Job::spawn(bed.command(&bed.server, &server), LIMIT)?;
    wait_for(&server, "Running as OOB root")?;
    let client = words(format!("cmtime -b {} {options}", bed.client.address));
    let client = Job::spawn(bed.command(&bed.client, &client), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_secs(1))? };
    let outcome = PairOutcome { server, client };
    outcome.success()?;
    for (end, kind) in
        [(&outcome.client, "qp_conn"), (&outcome.client, "cm_conn"), (&outcome.server, "qp_conn")]
    {
        let counted = end.stdout.lines().any(|line| line.split_whitespace().eq([kind, "1000"]));
        ensure!(counted, "{}", outcome.report());
    }
    Ok(())
}

/// The server leaves as soon as it has sent the last message. When the client's `rpoll` tells of that together with
/// the message, rstream ends with the bits as its exit code: POLLHUP is 16.
fn asynchronous(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let server = serve(bed, "rstream -p PORT -S 4000 -T a", port)?;
    let client = run_client(bed, "rstream -p PORT -S 4000 -T a -s ADDR", port)?;
    let server = server.wait()?;
    let code = client.status.and_then(|status| status.code());
    let outcome = PairOutcome { server, client };
    ensure!(outcome.server.succeeded() && matches!(code, Some(0 | 16)), "{}", outcome.report());
    Ok(())
}

/// The sender waits some seconds between joining and sending; who joined before gets all of its messages.
fn multicast(bed: &Bed) -> Result<()> {
    let words = |end: &str, address: &str| {
        let text = format!("stdbuf -oL mckey -m 239.77.0.1 -C 10 -b {address}{end}");
        text.split(' ').map(str::to_owned).collect::<Vec<_>>()
    };
    let receiver = words("", &bed.server.address);
    let receiver = Job::spawn(bed.command(&bed.server, &receiver), LIMIT)?;
    wait_for(&receiver, "joined dgid")?;
    let sender = words(" -s", &bed.client.address);
    let client = Job::spawn(bed.command(&bed.client, &sender), LIMIT)?.wait()?;
    let server = if client.succeeded() { receiver.wait()? } else { receiver.stop(Duration::from_secs(1))? };
    PairOutcome { server, client }.success()
}

pub(crate) const RSPRELOAD: &str = "/usr/lib/x86_64-linux-gnu/rsocket/librspreload.so";

/// A TCP program over rsocket: its words after a shell that adds the preload library to those that are there.
pub(crate) fn preloaded(words: &str) -> Vec<String> {
    let script = format!("LD_PRELOAD={RSPRELOAD}:$LD_PRELOAD exec {words}");
    vec!["sh".to_owned(), "-c".to_owned(), script]
}

fn tcp_program(bed: &Bed) -> Result<()> {
    if !Path::new(RSPRELOAD).exists() {
        super::skip("a TCP program over rsocket", "librspreload.so is not there");
        return Ok(());
    }
    let port = free_port()?;
    let serve = preloaded(&format!("{} tcp-echo {port}", probe::path()));
    // That the router lists it shows that it is no TCP any more.
    let server = bed.start_cm_server(&serve, port, LIMIT)?;
    let words = preloaded(&format!("{} tcp-exchange {}:{port}", probe::path(), bed.server.address));
    let client = Job::spawn(bed.command(&bed.client, &words), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    PairOutcome { server, client }.success()
}

/// iperf 2, a TCP program that knows nothing of RDMA, with threads of its own.
fn iperf(bed: &Bed) -> Result<()> {
    const NAME: &str = "iperf over rsocket";
    if !has_program("iperf") || !Path::new(RSPRELOAD).exists() {
        super::skip(NAME, "iperf or librspreload.so is not there");
        return Ok(());
    }
    let port = free_port()?;
    let server = bed.start_cm_server(&preloaded(&format!("iperf -s -p {port} -P 1")), port, LIMIT)?;
    let words = preloaded(&format!("iperf -c {} -p {port} -n 32M", bed.server.address));
    let client = Job::spawn(bed.command(&bed.client, &words), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    let outcome = PairOutcome { server, client };
    outcome.success()?;
    for end in [&outcome.server, &outcome.client] {
        ensure!(end.stdout.contains("32.0 MBytes"), "{}", outcome.report());
    }
    Ok(())
}

/// Waits until a program has said something.
pub(crate) fn wait_for(job: &Job, text: &str) -> Result<()> {
    let start = Instant::now();
    while !(job.stdout() + &job.stderr()).contains(text) {
        ensure!(start.elapsed() < SHORT, "it never said {text:?}:\n{}{}", job.stdout(), job.stderr());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// How connections end that nobody takes or whose ends die.
pub(crate) fn endings(stage: &Stage, place: &str) -> Vec<Trial> {
    vec![
        stage.trial(format!("nobody listens ({place})"), nobody_listens),
        stage.trial(format!("a killed server ({place})"), killed_server),
        stage.trial(format!("a killed client ({place})"), killed_client),
    ]
}

/// An address of the other place cannot be bound.
pub(crate) fn foreign_address(bed: &Bed) -> Result<()> {
    let words = words(&format!("rping -s -a {} -p PORT", bed.client.address), bed, 7999);
    let outcome = Job::spawn(bed.command(&bed.server, &words), SHORT)?.wait()?;
    ensure!(!outcome.succeeded(), "{}", outcome.report());
    ensure!(outcome.stderr.contains("Cannot assign requested address"), "{}", outcome.report());
    Ok(())
}

fn nobody_listens(bed: &Bed) -> Result<()> {
    let outcome = run_client(bed, "rping -c -a ADDR -p PORT -C 1", free_port()?)?;
    ensure!(!outcome.succeeded() && outcome.took < SHORT, "{}", outcome.report());
    let told = outcome.stdout.clone() + &outcome.stderr;
    ensure!(told.contains("RDMA_CM_EVENT_REJECTED, error 8"), "{}", outcome.report());
    Ok(())
}

fn kill(job: Job) -> Result<()> {
    // The job's handle kills the whole group; `freeflow run` has become the program.
    drop(job);
    Ok(())
}

/// Two ends that ping for ever, unbuffered so that what they say can be seen.
pub(crate) fn endless(bed: &Bed, port: u16) -> Result<(Job, Job)> {
    let server = serve(bed, "stdbuf -oL rping -s -p PORT -v", port)?;
    let mut words = words("stdbuf -oL rping -c -a ADDR -p PORT -v", bed, port);
    words.retain(|word| !word.is_empty());
    let client = Job::spawn(bed.command(&bed.client, &words), LIMIT)?;
    wait_for(&client, "rdma-ping-3")?;
    Ok((server, client))
}

fn killed_server(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let (server, client) = endless(bed, port)?;
    kill(server)?;
    let outcome = client.wait()?;
    ensure!(outcome.status.is_some() && outcome.took < LIMIT, "{}", outcome.report());
    // What was under way may fail before the client hears of the end.
    let told = outcome.stdout.clone() + &outcome.stderr;
    let known = ["DISCONNECT EVENT", "cq completion failed"];
    ensure!(known.iter().any(|word| told.contains(word)), "{}", outcome.report());
    ensure!(!bed.router.lists(port)?, "a dead process listens");
    Ok(())
}

fn killed_client(bed: &Bed) -> Result<()> {
    let (server, client) = endless(bed, free_port()?)?;
    kill(client)?;
    let outcome = server.wait()?;
    ensure!(outcome.status.is_some(), "{}", outcome.report());
    let told = outcome.stdout.clone() + &outcome.stderr;
    let known = ["DISCONNECT EVENT", "cq completion failed"];
    ensure!(known.iter().any(|word| told.contains(word)), "{}", outcome.report());
    Ok(())
}
