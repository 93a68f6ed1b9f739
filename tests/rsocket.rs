//! Promise: TCP programs run over rsocket as they are, under `librspreload.so`: an HTTP server with a load generator, a file
//! transfer, a throughput test with several streams. What is not among them is told in docs/rsocket.md.

mod common;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use common::{
    SHORT, Stage,
    programs::{self, LIMIT, RSPRELOAD, preloaded},
};
use tempfile::TempDir;
use xtask::{
    bed::{Bed, PairOutcome, free_port},
    process::{Job, has_program},
};

/// Bytes of the file that is sent.
const FILE: u32 = 8 << 20;
const PAGES: usize = 10;
/// Lines of a page.
const ENTRIES: usize = 3000;

fn main() -> ExitCode {
    let obstacle = (!Path::new(RSPRELOAD).exists()).then(|| "librspreload.so is not there".to_owned());
    common::run("rsocket", common::no_tree().or(obstacle).or(programs::no_tools()), || {
        let mut trials = trials(&Stage::new(|| Bed::on_one_host(common::tree()?)), "one host");
        if common::is_root() {
            let two = Stage::new(|| Bed::across_namespaces(common::tree()?));
            trials.extend(self::trials(&two, "two namespaces"));
        }
        trials
    })
}

fn trials(stage: &Stage, place: &str) -> Vec<libtest_mimic::Trial> {
    vec![
        with(
            stage,
            format!("an HTTP server and a load generator ({place})"),
            &["mini_httpd", "httperf"],
            http,
        ),
        with(stage, format!("a file is sent by netcat ({place})"), &["nc.traditional"], file),
        with(stage, format!("iperf with four streams ({place})"), &["iperf"], iperf),
        with(stage, format!("NetPIPE ({place})"), &["NPtcp"], netpipe),
    ]
}

/// A test of programs that may not be installed.
fn with(
    stage: &Stage,
    name: String,
    programs: &'static [&str],
    test: fn(&Bed) -> Result<()>,
) -> libtest_mimic::Trial {
    stage.trial(name.clone(), move |bed| match programs.iter().find(|program| !has_program(program)) {
        Some(missing) => {
            common::skip(&name, &format!("{missing} is not installed"));
            Ok(())
        }
        None => test(bed),
    })
}

/// The server forks for each connection, and its child goes on by rsocket where TCP has brought both together. A child
/// opens the device anew, which takes longer than its answer.
fn http(bed: &Bed) -> Result<()> {
    let (port, folder) = (free_port()?, TempDir::with_prefix("freeflow-")?);
    // The page is the list of these, and takes a while: long enough to see by what it goes.
    (0..ENTRIES).try_for_each(|entry| fs::write(folder.path().join(format!("entry-{entry}")), ""))?;
    let fork = |words: String| {
        let words = preloaded(&words);
        [vec!["env".to_owned(), "RDMAV_FORK_SAFE=1".to_owned()], words].concat()
    };
    let path = folder.path().display();
    let server = fork(format!("mini_httpd -D -u root -p {port} -d {path}"));
    let server = bed.start_tcp_server(&server, port, LIMIT)?;
    let address = &bed.server.address;
    let load = format!("httperf --server {address} --port {port} --uri / --num-conns {PAGES} --timeout 30");
    // A connection is short: again until one was seen.
    let start = Instant::now();
    let (client, carried) = loop {
        let mut client = Job::spawn(bed.command(&bed.client, &fork(load.clone())), LIMIT)?;
        let mut carried = false;
        while !client.has_ended()? {
            carried |= has_connection(bed)?;
            thread::sleep(Duration::from_millis(5));
        }
        let client = client.wait()?;
        if carried || start.elapsed() > SHORT {
            break (client, carried);
        }
    };
    let server = server.stop(Duration::from_secs(2))?;
    let outcome = PairOutcome { server, client };
    let all = format!("Reply status: 1xx=0 2xx={PAGES} 3xx=0 4xx=0 5xx=0");
    ensure!(outcome.client.succeeded() && outcome.client.stdout.contains(&all), "{}", outcome.report());
    ensure!(outcome.client.stdout.contains("Errors: total 0 "), "{}", outcome.report());
    ensure!(carried, "no QP was seen, so it was TCP\n{}", outcome.report());
    Ok(())
}

/// Whether some QP is connected.
fn has_connection(bed: &Bed) -> Result<bool> {
    let status = bed.router.status()?;
    let qps = status["qps"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(qps.iter().any(|qp| matches!(qp["state"].as_str(), Some("RTR" | "RTS"))))
}

fn file(bed: &Bed) -> Result<()> {
    let (port, folder) = (free_port()?, TempDir::with_prefix("freeflow-")?);
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let content: Vec<u8> =
        (0..FILE / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_ne_bytes()).collect();
    fs::write(&from, &content)?;
    let take = preloaded(&format!("nc.traditional -l -p {port} > {}", to.display()));
    let server = bed.start_cm_server(&take, port, LIMIT)?;
    let address = &bed.server.address;
    let send = preloaded(&format!("nc.traditional -q 1 {address} {port} < {}", from.display()));
    let client = Job::spawn(bed.command(&bed.client, &send), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    let outcome = PairOutcome { server, client };
    ensure!(outcome.client.succeeded(), "{}", outcome.report());
    ensure!(fs::read(to)? == content, "another file came\n{}", outcome.report());
    Ok(())
}

fn iperf(bed: &Bed) -> Result<()> {
    let port = free_port()?;
    let server = bed.start_cm_server(&preloaded(&format!("iperf -s -p {port}")), port, LIMIT)?;
    let load = preloaded(&format!("iperf -c {} -p {port} -n 8M -P 4", bed.server.address));
    let client = Job::spawn(bed.command(&bed.client, &load), LIMIT)?.wait()?;
    let server = server.stop(Duration::from_secs(2))?;
    let outcome = PairOutcome { server, client };
    ensure!(outcome.client.succeeded(), "{}", outcome.report());
    ensure!(outcome.client.stdout.contains("[SUM]"), "{}", outcome.report());
    ensure!(outcome.client.stdout.matches("8.00 MBytes").count() >= 4, "{}", outcome.report());
    Ok(())
}

/// It compares what comes with what was sent.
fn netpipe(bed: &Bed) -> Result<()> {
    let folder = TempDir::with_prefix("freeflow-")?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let options = "-i -u 65536 -P 5002";
    let take = preloaded(&format!("NPtcp {options} -o {}", path("server")));
    let server = bed.start_cm_server(&take, 5002, LIMIT)?;
    let ask = preloaded(&format!("NPtcp {options} -h {} -o {}", bed.server.address, path("client")));
    let client = Job::spawn(bed.command(&bed.client, &ask), LIMIT)?.wait()?;
    let server = if client.succeeded() { server.wait()? } else { server.stop(Duration::from_millis(500))? };
    let outcome = PairOutcome { server, client };
    outcome.success()?;
    ensure!(fs::read_to_string(path("client"))?.lines().count() > 20, "{}", outcome.report());
    Ok(())
}
