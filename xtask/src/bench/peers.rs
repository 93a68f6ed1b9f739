//! Others that move messages through shared memory, measured by their own tools where those are installed.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use xtask::{
    bed::{Place, free_port, start_server},
    process::{Job, command, has_program},
};

const LIMIT: Duration = Duration::from_secs(60);
/// UCX's own shared memory, and nothing of a device.
const TRANSPORTS: &str = "UCX_TLS=posix,sysv,cma,self";
const MIB: f64 = 1_048_576.0;

/// What `ucx_perftest` prints of a whole run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ucx {
    /// Typical microseconds of one message.
    pub(crate) latency: f64,
    /// Bytes a second.
    pub(crate) bandwidth: f64,
    /// Messages a second.
    pub(crate) rate: f64,
}

/// Runs a test of `ucx_perftest` between two processes.
pub(crate) fn ucx(test: &str, bytes: usize, count: u32) -> Result<Ucx> {
    if !has_program("ucx_perftest") {
        bail!("ucx_perftest (ucx-utils) is not installed");
    }
    let port = free_port()?;
    let (bytes, count, port_word) = (bytes.to_string(), count.to_string(), port.to_string());
    let words = ["env", TRANSPORTS, "ucx_perftest", "-p", &port_word, "-t", test, "-s", &bytes, "-n", &count];
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let _server = start_server(&Place::host(), &words, port, LIMIT)?;
    let client = Job::spawn(command(words.iter().map(String::as_str).chain(["127.0.0.1"])), LIMIT)?.wait()?;
    client.success()?;
    parse(&client.stdout).with_context(|| client.report())
}

/// Microseconds one way of `fi_pingpong` over libfabric's shared memory.
pub(crate) fn libfabric(bytes: usize, count: u32) -> Result<f64> {
    if !has_program("fi_pingpong") {
        bail!("fi_pingpong (libfabric-bin) is not installed");
    }
    let port = free_port()?;
    let (bytes, count, port_word) = (bytes.to_string(), count.to_string(), port.to_string());
    let words = |side: &str| -> Vec<String> {
        let words = ["fi_pingpong", "-e", "rdm", "-p", "shm", "-S", &bytes, "-I", &count, side, &port_word];
        words.iter().map(|&word| word.to_owned()).collect()
    };
    let _server = start_server(&Place::host(), &words("-B"), port, LIMIT)?;
    let client = Job::spawn(command([words("-P"), vec!["127.0.0.1".to_owned()]].concat()), LIMIT)?.wait()?;
    client.success()?;
    // bytes, sent, acknowledged, total, time, MB/s, microseconds, millions a second
    let last = client.stdout.lines().last().unwrap_or_default();
    last.split_whitespace().nth(6).and_then(|word| word.parse().ok()).with_context(|| client.report())
}

fn parse(text: &str) -> Result<Ucx> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Final:"));
    let figures = line.context("ucx_perftest printed no result")?.split_whitespace();
    let figures: Vec<f64> = figures.map(str::parse).collect::<Result<_, _>>()?;
    let [_, latency, _, _, _, bandwidth, _, rate] = figures[..] else {
        bail!("not eight figures: {figures:?}")
    };
    Ok(Ucx { latency, bandwidth: bandwidth * MIB, rate })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_the_result() {
        let text = "[thread 0]  114  4034.5 4388.6 4388.6 0.0 0.0 228 228\n\
                    Final:  200000  0.065  4.458  14.269  1.71  0.50  224301  70084\n";
        let expected = Ucx { latency: 0.065, bandwidth: 0.5 * MIB, rate: 70084.0 };
        assert_eq!(parse(text).unwrap(), expected);
        assert!(parse("nothing").is_err());
    }
}
