//! The promised ratios of isolated mode on one host: how each is measured, and its target.
//!
//! Every figure is set against one of the same run on the same machine, except where time itself is promised.

use std::{
    fmt, fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use xtask::{
    bed::{Bed, Mode, Pair, PairOutcome, Tool, free_port, start_server},
    interrupt, perftest,
    process::Job,
    reference::{memcpy, memcpy_in_turn},
    wake,
};

use super::{connections, registration};
use crate::{
    build,
    demo::{bandwidth, latency},
};

pub(crate) const LIMIT: Duration = Duration::from_secs(180);
const MESSAGE: usize = 65_536;
const PAIRS: usize = 16;
const IDLE_QPS: &str = "10000";
const BUSY_QPS: &str = "1000";

/// One promise.
#[derive(Debug)]
pub(crate) struct Ratio {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) target: Target,
    /// Who executes.
    pub(crate) mode: Mode,
    pub(crate) measure: fn(&Bed) -> Result<Measurement>,
}

/// Which side of a number is good.
#[derive(Debug)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// Told, not judged.
    None,
}

/// A figure and what it was computed from.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub(crate) figure: f64,
    pub(crate) from: String,
}

/// All promises of isolated mode, and those that have nothing to do with modes.
pub(crate) const RATIOS: [Ratio; 12] = [
    Ratio {
        name: "write latency 8 B",
        unit: "us",
        target: Target::AtMost(2.5),
        mode: Mode::Isolated,
        measure: write_latency,
    },
    Ratio {
        name: "write bandwidth 64 KiB",
        unit: "x memcpy",
        target: Target::AtLeast(0.8),
        mode: Mode::Isolated,
        measure: write_bandwidth,
    },
    Ratio {
        name: "read bandwidth 64 KiB",
        unit: "x memcpy",
        target: Target::AtLeast(0.8),
        mode: Mode::Isolated,
        measure: read_bandwidth,
    },
    Ratio {
        name: "16 pairs together",
        unit: "x one pair",
        target: Target::AtLeast(1.0),
        mode: Mode::Isolated,
        measure: many_pairs,
    },
    Ratio {
        name: "latency beside 10000 idle QPs",
        unit: "x alone",
        target: Target::AtMost(1.1),
        mode: Mode::Isolated,
        measure: idle_qps,
    },
    Ratio {
        name: "latency beside 1000 busy QPs",
        unit: "x alone",
        target: Target::AtMost(2.0),
        mode: Mode::Isolated,
        measure: busy_qps,
    },
    Ratio {
        name: "connections by rdma_cm",
        unit: "x TCP",
        target: Target::AtLeast(1.0),
        mode: Mode::Direct,
        measure: connections::measure,
    },
    Ratio {
        name: "registration of 64 MiB",
        unit: "x first touch",
        target: Target::AtMost(1.3),
        mode: Mode::Isolated,
        measure: registration::large,
    },
    Ratio {
        name: "registration of 1 MiB",
        unit: "x first touch",
        target: Target::AtMost(1.3),
        mode: Mode::Isolated,
        measure: registration::medium,
    },
    Ratio {
        name: "registration of 64 KiB",
        unit: "x first touch",
        target: Target::AtMost(2.5),
        mode: Mode::Isolated,
        measure: registration::small,
    },
    Ratio {
        name: "registration of a page",
        unit: "us",
        target: Target::AtMost(80.0),
        mode: Mode::Isolated,
        measure: registration::page,
    },
    Ratio {
        name: "idle router",
        unit: "% of a core",
        target: Target::AtMost(0.5),
        mode: Mode::Isolated,
        measure: idle_router,
    },
];

impl Target {
    pub(crate) fn is_met_by(&self, figure: f64) -> bool {
        match *self {
            Self::AtMost(bound) => figure <= bound,
            Self::AtLeast(bound) => figure >= bound,
            Self::None => true,
        }
    }
}

impl Target {
    /// The word for a figure in the table.
    pub(crate) fn verdict(&self, figure: f64) -> &'static str {
        match self {
            Self::None => "told",
            _ if self.is_met_by(figure) => "kept",
            _ => "MISSED",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(formatter, "at most {bound}"),
            Self::AtLeast(bound) => write!(formatter, "at least {bound}"),
            Self::None => formatter.write_str("none, in"),
        }
    }
}

fn write_latency(bed: &Bed) -> Result<Measurement> {
    let before = wake::one_way();
    let figure = latency(bed, "ib_write_lat")?;
    let floor = (before + wake::one_way()).as_secs_f64() * 1e6 / 2.0;
    let times = figure / floor;
    let from = format!("typical, one way; {times:.2} x a bare wake-up of a third thread ({floor:.2} us)");
    Ok(Measurement { figure, from })
}

fn write_bandwidth(bed: &Bed) -> Result<Measurement> {
    against_memcpy(bed, "ib_write_bw")
}

fn read_bandwidth(bed: &Bed) -> Result<Measurement> {
    against_memcpy(bed, "ib_read_bw")
}

fn against_memcpy(bed: &Bed, tool: &str) -> Result<Measurement> {
    let before = memcpy(MESSAGE);
    let bandwidth = bandwidth(bed, tool)?;
    let memcpy = (before + memcpy(MESSAGE)) / 2.0;
    let from = format!("{:.1} of {:.1} GB/s", bandwidth / 1e9, memcpy / 1e9);
    Ok(Measurement { figure: bandwidth / memcpy, from })
}

fn many_pairs(bed: &Bed) -> Result<Measurement> {
    // Sampled from the 5th to the 9th second of each pair's 14: by then all run, and all still do.
    let tool = Tool::new("ib_write_bw", &["-s", "65536", "-D", "14", "-f", "5"]);
    let alone = bytes_a_second(&bed.run_pair(&tool, LIMIT)?)?;
    let pairs = (0..PAIRS).map(|_| bed.start_pair(&tool, LIMIT)).collect::<Result<Vec<Pair>>>()?;
    let mut together = 0.0;
    for pair in pairs {
        together += bytes_a_second(&pair.wait()?)?;
    }
    // What the caches take from it, whoever copies.
    let floor = memcpy_in_turn(MESSAGE, PAIRS) / memcpy(MESSAGE);
    let from = format!(
        "{:.1} of {:.1} GB/s; a memcpy that goes round {PAIRS} pairs of buffers has {floor:.2} x that of one",
        together / 1e9,
        alone / 1e9
    );
    Ok(Measurement { figure: together / alone, from })
}

pub(super) fn bytes_a_second(outcome: &PairOutcome) -> Result<f64> {
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    Ok(row.bandwidth().context("not the table of a bandwidth test")? * 1_048_576.0)
}

fn idle_qps(bed: &Bed) -> Result<Measurement> {
    beside(bed, ["idle-qps", IDLE_QPS], |bed| latency(bed, "ib_write_lat"))
}

/// Both ends of the ping sleep until they are told of a completion, and the flooding process sleeps between
/// filling its queues: so what is compared is the router's work, not who gets a core.
fn busy_qps(bed: &Bed) -> Result<Measurement> {
    beside(bed, ["flood", BUSY_QPS], |bed| {
        let tool = Tool::new("ib_send_lat", &["-s", "8", "-n", "5000", "-e"]);
        let outcome = bed.run_pair(&tool, LIMIT)?;
        outcome.success()?;
        let row = perftest::single_row(&outcome.client.stdout)?;
        row.latency().context("not the table of a latency test")
    })
}

/// A latency beside a probe that does this, in that without it.
fn beside(bed: &Bed, probe_words: [&str; 2], latency: fn(&Bed) -> Result<f64>) -> Result<Measurement> {
    let probe = build::probe()?.display().to_string();
    let alone = latency(bed)?;
    let [subcommand, count] = probe_words;
    let words = [probe.as_str(), subcommand, count].map(str::to_owned);
    let mut sleeper = Job::spawn(bed.command(&bed.client, &words), LIMIT)?;
    while !sleeper.stdout().contains("READY") {
        interrupt::check()?;
        if sleeper.has_ended()? {
            bail!("no {subcommand} {count}: {}", sleeper.wait()?.report());
        }
        thread::sleep(Duration::from_millis(50));
    }
    let beside = latency(bed)?;
    if sleeper.has_ended()? {
        bail!("the other QPs went before the end: {}", sleeper.wait()?.report());
    }
    Ok(Measurement { figure: beside / alone, from: format!("{beside:.2} of {alone:.2} us") })
}

fn idle_router(bed: &Bed) -> Result<Measurement> {
    // A client that has opened the device, made its objects, and waits for a peer that never comes.
    let port = free_port()?;
    let tool = ["ibv_rc_pingpong", "-d", "ff0", "-g", "0", "-p"].map(str::to_owned);
    let mut words: Vec<String> = vec![bed.tree.program().display().to_string()];
    words.extend(["run", "--socket"].map(str::to_owned));
    words.push(bed.router.socket().display().to_string());
    words.push("--".to_owned());
    words.extend(tool);
    words.push(port.to_string());
    let _client = start_server(&bed.server, &words, port, LIMIT)?;
    thread::sleep(Duration::from_secs(1));
    let (before, start) = (processor_time(bed.router.pid())?, Instant::now());
    thread::sleep(Duration::from_secs(10));
    let used = processor_time(bed.router.pid())?.saturating_sub(before);
    let figure = 100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64();
    Ok(Measurement { figure, from: format!("{used:.1?} in 10 s beside one idle client") })
}

/// What all threads of a process have used so far, to the nanosecond.
pub(super) fn processor_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("no process {pid}"))? {
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        total += text.split_whitespace().next().map_or(0, |field| field.parse().unwrap_or(0));
    }
    Ok(Duration::from_nanos(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_a_good_side() {
        assert!(Target::AtMost(2.5).is_met_by(2.5) && !Target::AtMost(2.5).is_met_by(2.6));
        assert!(Target::AtLeast(0.8).is_met_by(0.8) && !Target::AtLeast(0.8).is_met_by(0.7));
    }

    #[test]
    fn counting_gives_figures() {
        let before = processor_time(std::process::id()).unwrap();
        assert!(memcpy(MESSAGE) > 1e8);
        assert!(processor_time(std::process::id()).unwrap() > before);
    }
}
