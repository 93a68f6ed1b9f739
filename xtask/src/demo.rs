//! `cargo xtask demo`: stock perftest between two network namespaces, beside kernel TCP over the same pair.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use xtask::{
    bed::{Bed, Mode, Place, Tool, free_port, start_server},
    interrupt, perftest,
    process::{Job, has_program, run},
    tree::Tree,
};

use crate::{build, packages, table::Table};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: f64 = 1_048_576.0;
pub(crate) const GIB: f64 = 1024.0 * MIB;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// An install tree to use instead of building one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Set when the demo has put itself into a user namespace
    #[arg(long, hide = true)]
    inside: bool,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let needed = [&packages::TOOLS[..], &packages::NAMESPACES, &packages::TCP].concat();
    packages::require(&needed)?;
    let tree = build::tree(options.tree.as_deref())?;
    if !rustix::process::geteuid().is_root() && !options.inside && may_unshare() {
        return Err(enter_user_namespace(&tree));
    }
    let bed = make_bed(tree)?;
    let tcp = Tcp::measure(&bed)?;
    let direct = bed.in_mode(Mode::Direct);
    let figures = measure(&direct)?;
    let isolated = direct.in_mode(Mode::Isolated);
    let table = compare(&figures, &measure(&isolated)?, &tcp);
    drop(isolated);
    println!("\n{table}");
    println!(
        "direct: the programs' own threads move the bytes (the default within a tenant); isolated: the router does."
    );
    println!(
        "Bandwidth of 64 KiB messages against one iperf3 stream, latency of 8 bytes against a TCP ping-pong."
    );
    println!(
        "write and send are one way (half a round trip), atomic is a whole round trip, as perftest counts."
    );
    Ok(ExitCode::SUCCESS)
}

/// Whether an ordinary user may make the namespaces that the demo wants.
fn may_unshare() -> bool {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "true"]);
    has_program("unshare") && run(command, Duration::from_secs(10)).is_ok()
}

/// Replaces this process by the same demo as root of a user namespace, where it may make network namespaces.
/// `ip netns` keeps them in `/run`, so that becomes a private one.
fn enter_user_namespace(tree: &Tree) -> anyhow::Error {
    println!("Not root: entering a user namespace to make the network namespaces in.");
    let script = r#"mount -t tmpfs tmpfs /run && exec "$0" "$@""#;
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return error.into(),
    };
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c", script]).arg(program);
    command.args(["demo", "--inside", "--tree"]).arg(tree.prefix()).env_remove("XDG_RUNTIME_DIR");
    anyhow::Error::from(command.exec()).context("could not enter a user namespace")
}

fn make_bed(tree: Tree) -> Result<Bed> {
    match Bed::across_namespaces(tree.clone()) {
        Ok(bed) => {
            println!("Router up; two network namespaces, {} and {}.", bed.server.address, bed.client.address);
            Ok(bed)
        }
        Err(error) => {
            interrupt::check()?;
            println!(
                "No two network namespaces here ({error:#});\nboth ends run in this one, TCP over loopback."
            );
            Bed::on_one_host(tree)
        }
    }
}

const BANDWIDTHS: [&str; 3] = ["ib_write_bw", "ib_read_bw", "ib_send_bw"];
const LATENCIES: [&str; 3] = ["ib_write_lat", "ib_send_lat", "ib_atomic_lat"];

/// What kernel TCP does between the same two places.
struct Tcp {
    /// Bytes a second of one stream.
    bandwidth: f64,
    /// Microseconds of a round trip.
    trip: f64,
}

impl Tcp {
    fn measure(bed: &Bed) -> Result<Self> {
        println!("kernel TCP:");
        let bandwidth = progress("iperf3", || Ok(iperf(&bed.server, &bed.client)?.bandwidth), gigabytes)?;
        let trip = progress("TCP ping-pong", || tcp_trip(&bed.server, &bed.client), microseconds)?;
        Ok(Self { bandwidth, trip })
    }

    /// Microseconds of what a latency tool counts.
    fn latency(&self, tool: &str) -> f64 {
        if tool.contains("atomic") { self.trip } else { self.trip / 2.0 }
    }
}

/// The figures of all tools: bytes a second, then microseconds.
fn measure(bed: &Bed) -> Result<Vec<f64>> {
    println!("FreeFlow, {}:", bed.mode().map_or("default", Mode::name));
    let bandwidths = BANDWIDTHS.iter().map(|tool| progress(tool, || bandwidth(bed, tool), gigabytes));
    let latencies = LATENCIES.iter().map(|tool| progress(tool, || latency(bed, tool), microseconds));
    bandwidths.chain(latencies).collect()
}

fn compare(direct: &[f64], isolated: &[f64], tcp: &Tcp) -> Table {
    let mut table = Table::new(&["test", "direct", "isolated", "kernel TCP", "direct is", "isolated is"]);
    let tools = BANDWIDTHS.iter().chain(&LATENCIES);
    for ((tool, direct), isolated) in tools.zip(direct).zip(isolated) {
        let row = if BANDWIDTHS.contains(tool) {
            let gain = |figure: &f64| format!("{:.1} x the bandwidth", figure / tcp.bandwidth);
            let figures = [*direct, *isolated, tcp.bandwidth].map(gigabytes);
            (format!("{tool} 64 KiB"), figures, [gain(direct), gain(isolated)])
        } else {
            let of_tcp = tcp.latency(tool);
            let gain = |figure: &f64| format!("{:.1} x as quick", of_tcp / figure);
            (
                format!("{tool} 8 B"),
                [*direct, *isolated, of_tcp].map(microseconds),
                [gain(direct), gain(isolated)],
            )
        };
        let (name, figures, gains) = row;
        table.row([vec![name], figures.to_vec(), gains.to_vec()].concat());
    }
    table
}

fn progress(what: &str, measure: impl FnOnce() -> Result<f64>, unit: fn(f64) -> String) -> Result<f64> {
    use std::io::Write;
    print!("  {what:<14} ");
    std::io::stdout().flush()?;
    let figure = measure().with_context(|| format!("{what} failed")).inspect_err(|_| println!("failed"))?;
    println!("{}", unit(figure));
    Ok(figure)
}

fn gigabytes(bytes_a_second: f64) -> String {
    format!("{:.2} GB/s", bytes_a_second / 1e9)
}

fn microseconds(figure: f64) -> String {
    format!("{figure:.2} us")
}

/// Average bytes a second of 64 KiB messages.
pub(crate) fn bandwidth(bed: &Bed, tool: &str) -> Result<f64> {
    let tool = Tool::new(tool, &["-s", "65536", "-D", "2"]);
    let outcome = bed.run_pair(&tool, LIMIT)?;
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    Ok(row.bandwidth().context("not the table of a bandwidth test")? * MIB)
}

/// Typical microseconds of 8 bytes.
pub(crate) fn latency(bed: &Bed, tool: &str) -> Result<f64> {
    let size: &[&str] = if tool.contains("atomic") { &[] } else { &["-s", "8"] };
    let tool = Tool::new(tool, &[size, &["-n", "20000"]].concat());
    let outcome = bed.run_pair(&tool, LIMIT)?;
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    row.latency().context("not the table of a latency test")
}

/// What one TCP stream does between two places.
pub(crate) struct Stream {
    /// Bytes a second.
    pub(crate) bandwidth: f64,
    /// What both ends used of a processor for a GiB, seconds.
    pub(crate) processor: f64,
}

/// One stream of iperf3.
pub(crate) fn iperf(server: &Place, client: &Place) -> Result<Stream> {
    let port = free_port()?;
    let words = words(&["iperf3", "--server", "--one-off", "--port", &port.to_string()]);
    let _server = start_server(server, &words, port, LIMIT)?;
    let words = self::words(&["iperf3", "--json", "--time", "2", "--port", &port.to_string(), "--client"]);
    let words = [words, vec![server.address.clone()]].concat();
    let outcome = run(client.plain_command(&words), LIMIT)?;
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout)?;
    let end = &report["end"];
    let figure = |value: &serde_json::Value| value.as_f64().context("iperf3 reported no rate");
    let bandwidth = figure(&end["sum_received"]["bits_per_second"])? / 8.0;
    let use_of = &end["cpu_utilization_percent"];
    let percent = figure(&use_of["host_total"])? + figure(&use_of["remote_total"])?;
    Ok(Stream { bandwidth, processor: percent / 100.0 / bandwidth * GIB })
}

/// Microseconds of a round trip of 8 bytes over TCP.
pub(crate) fn tcp_trip(server: &Place, client: &Place) -> Result<f64> {
    let program = std::env::current_exe()?.display().to_string();
    let port = free_port()?;
    let words = words(&[&program, "tcp-serve", &port.to_string()]);
    let _server = start_server(server, &words, port, LIMIT)?;
    let words = self::words(&[&program, "tcp-ping", &server.address, &port.to_string()]);
    let outcome = Job::spawn(client.plain_command(&words), LIMIT)?.wait()?;
    outcome.success()?;
    outcome.stdout.trim().parse().context("no figure from the TCP ping-pong")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}
