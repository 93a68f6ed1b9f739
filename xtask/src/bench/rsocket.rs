//! What TCP programs come to over rsocket, set against the same programs over kernel TCP between the same two network
//! namespaces.
//!
//! `rstream` speaks rsocket and TCP alike; iperf 2 is a TCP program that knows nothing of either, under librspreload.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use xtask::{
    bed::{Bed, Mode, Place, free_port, start_server},
    interrupt,
    process::Job,
};

use super::ratios::{LIMIT, Measurement, Ratio, Target, processor_time};
use crate::packages;

const PRELOAD: &str = "/usr/lib/x86_64-linux-gnu/rsocket/librspreload.so";
const GIB: f64 = (1_u64 << 30) as f64;
/// How long a stream is looked at, once it flows.
const SAMPLE: Duration = Duration::from_secs(2);
const SECONDS: &str = "8";

/// None of them is judged: rsocket's own protocol is in them.
pub(crate) const RATIOS: [Ratio; 6] = [
    row("rsocket latency 64 B", Mode::Direct, latency),
    row("rsocket latency 64 B, isolated", Mode::Isolated, latency),
    row("rsocket bandwidth 64 KiB", Mode::Direct, bandwidth),
    row("rsocket bandwidth 64 KiB, isolated", Mode::Isolated, bandwidth),
    row("rsocket bandwidth of iperf", Mode::Direct, iperf),
    row("rsocket processor time of a GiB by iperf", Mode::Direct, processor),
];

const fn row(name: &'static str, mode: Mode, measure: fn(&Bed) -> Result<Measurement>) -> Ratio {
    Ratio { name, unit: "x TCP", target: Target::None, mode, measure }
}

/// A bed between two network namespaces, in the mode of the one that is there.
fn namespaces(bed: &Bed) -> Result<Bed> {
    packages::require(&packages::RDMA_CM)?;
    let two = Bed::across_namespaces(bed.tree.clone())?;
    Ok(match bed.mode() {
        Some(mode) => two.in_mode(mode),
        None => two,
    })
}

fn latency(bed: &Bed) -> Result<Measurement> {
    let (bed, options) = (namespaces(bed)?, "-S 64 -C 1 -I 5000");
    let tcp = || rstream(&bed, &format!("{options} -T s"));
    let before = tcp()?;
    let own = rstream(&bed, options)?;
    let tcp = (before + tcp()?) / 2.0;
    Ok(Measurement { figure: own / tcp, from: format!("{own:.2} of {tcp:.2} us, one way") })
}

fn bandwidth(bed: &Bed) -> Result<Measurement> {
    let (bed, options) = (namespaces(bed)?, "-S 65536 -C 1000 -I 10");
    let gigabytes = |options: &str| Ok::<_, anyhow::Error>(65536.0 / rstream(&bed, options)? / 1e3);
    let tcp = || gigabytes(&format!("{options} -T s"));
    let before = tcp()?;
    let own = gigabytes(options)?;
    let tcp = (before + tcp()?) / 2.0;
    Ok(Measurement { figure: own / tcp, from: format!("{own:.2} of {tcp:.2} GB/s") })
}

/// Microseconds of a transfer.
fn rstream(bed: &Bed, options: &str) -> Result<f64> {
    let port = free_port()?;
    let server = words(&format!("rstream {options} -p {port}"));
    let client = words(&format!("rstream {options} -p {port} -s {}", bed.server.address));
    let (_server, client) = if options.contains("-T s") {
        (start_server(&bed.server, &server, port, LIMIT)?, bed.client.plain_command(&client))
    } else {
        (bed.start_cm_server(&server, port, LIMIT)?, bed.command(&bed.client, &client))
    };
    let outcome = Job::spawn(client, LIMIT)?.wait()?;
    outcome.success()?;
    let last = outcome.stdout.lines().last().and_then(|line| line.split_whitespace().last());
    let one = last.and_then(|word| word.parse().ok());
    one.with_context(|| format!("not the table of rstream:\n{}", outcome.stdout))
}

fn iperf(bed: &Bed) -> Result<Measurement> {
    let bed = namespaces(bed)?;
    let before = stream(&bed, false)?.bandwidth;
    let own = stream(&bed, true)?.bandwidth;
    let tcp = (before + stream(&bed, false)?.bandwidth) / 2.0;
    Ok(Measurement { figure: own / tcp, from: format!("{:.2} of {:.2} GB/s", own / 1e9, tcp / 1e9) })
}

fn processor(bed: &Bed) -> Result<Measurement> {
    let bed = namespaces(bed)?;
    let before = stream(&bed, false)?.processor;
    let own = stream(&bed, true)?.processor;
    let tcp = (before + stream(&bed, false)?.processor) / 2.0;
    Ok(Measurement { figure: own / tcp, from: format!("{own:.2} of {tcp:.2} s, both ends and the router") })
}

/// One stream of iperf 2.
struct Stream {
    /// Bytes a second.
    bandwidth: f64,
    /// Seconds of a processor for a GiB.
    processor: f64,
}

fn stream(bed: &Bed, over_rsocket: bool) -> Result<Stream> {
    let port = free_port()?;
    let server = format!("iperf -s -p {port} -P 1");
    let client = format!("iperf -c {} -p {port} -t {SECONDS} -y C", bed.server.address);
    let (server, client) = if over_rsocket {
        let server = bed.start_cm_server(&preloaded(&server), port, LIMIT)?;
        (server, Job::spawn(bed.command(&bed.client, &preloaded(&client)), LIMIT)?)
    } else {
        let server = start_server(&bed.server, &words(&server), port, LIMIT)?;
        (server, Job::spawn(plain(&bed.client, &client), LIMIT)?)
    };
    // By then the stream flows, and it does so until after the sample.
    thread::sleep(Duration::from_secs(3));
    interrupt::check()?;
    let pids = [bed.router.pid(), server.pid(), client.pid()];
    let used = || pids.iter().map(|pid| processor_time(*pid)).sum::<Result<Duration>>();
    let (before, start) = (used()?, Instant::now());
    thread::sleep(SAMPLE);
    let (used, took) = (used()?.saturating_sub(before), start.elapsed());
    let outcome = client.wait()?;
    outcome.success()?;
    // The last field of the line is bits a second.
    let bits = outcome.stdout.lines().last().and_then(|line| line.rsplit(',').next()?.parse::<f64>().ok());
    let bandwidth = bits.with_context(|| format!("not a line of iperf:\n{}", outcome.stdout))? / 8.0;
    ensure!(bandwidth > 0.0, "nothing flowed:\n{}", outcome.report());
    let bytes = bandwidth * took.as_secs_f64();
    Ok(Stream { bandwidth, processor: used.as_secs_f64() / bytes * GIB })
}

fn plain(place: &Place, text: &str) -> std::process::Command {
    place.plain_command(&words(text))
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// After a shell that adds the preload library to those that are there.
fn preloaded(text: &str) -> Vec<String> {
    ["sh".to_owned(), "-c".to_owned(), format!("LD_PRELOAD={PRELOAD}:$LD_PRELOAD exec {text}")].to_vec()
}
