//! The promised ratios between two hosts: what goes over a link, against kernel TCP over the same cable.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use xtask::{
    bed::{Bed, Mode, Tool},
    hosts::{Hosts, Side},
    interrupt,
    router::Router,
};

use super::ratios::{LIMIT, Measurement, Ratio, Target, bytes_a_second, processor_time};
use crate::demo::{GIB, bandwidth, iperf, latency, tcp_trip};

const MANY: usize = 1000;
/// How long a run is looked at, once it runs.
const SAMPLE: Duration = Duration::from_secs(3);

/// All promises between hosts. On two cores two routers and a client that spins share what iperf3's two ends have to
/// themselves.
pub(crate) const RATIOS: [Ratio; 7] = [
    row("link write bandwidth 64 KiB", "x iperf3", Target::AtLeast(0.7), write_bandwidth),
    row("link read bandwidth 64 KiB", "x iperf3", Target::None, read_bandwidth),
    row("link write bandwidth 64 KiB, TLS", "x plain", Target::None, tls),
    row("link processor time of a GiB", "x iperf3", Target::None, processor),
    row("link write latency 8 B", "x TCP", Target::AtMost(1.3), write_latency),
    row("link bandwidth of 1000 QPs", "x one QP", Target::AtLeast(0.9), many_together),
    row("link fairness of 1000 QPs", "min/max", Target::AtLeast(0.9), many_evenly),
];

const fn row(
    name: &'static str,
    unit: &'static str,
    target: Target,
    measure: fn(&Bed) -> Result<Measurement>,
) -> Ratio {
    Ratio { name, unit, target, mode: Mode::Isolated, measure }
}

/// Two hosts, and a bed between them that ends before them.
fn hosts(bed: &Bed) -> Result<(Bed, Hosts)> {
    let hosts = Hosts::create(&[])?;
    Ok((hosts.lend(bed.tree.clone())?, hosts))
}

fn write_bandwidth(bed: &Bed) -> Result<Measurement> {
    against_iperf(bed, "ib_write_bw")
}

fn read_bandwidth(bed: &Bed) -> Result<Measurement> {
    against_iperf(bed, "ib_read_bw")
}

fn against_iperf(bed: &Bed, tool: &str) -> Result<Measurement> {
    let (bed, hosts) = hosts(bed)?;
    let tcp = || Ok::<_, anyhow::Error>(iperf(&hosts.host(Side::Left), &hosts.host(Side::Right))?.bandwidth);
    let before = tcp()?;
    let own = bandwidth(&bed, tool)?;
    let tcp = (before + tcp()?) / 2.0;
    let from = format!("{:.2} of {:.2} GB/s", own / 1e9, tcp / 1e9);
    Ok(Measurement { figure: own / tcp, from })
}

fn tls(bed: &Bed) -> Result<Measurement> {
    let plain = bandwidth(&hosts(bed)?.0, "ib_write_bw")?;
    let hosts = Hosts::create(&[])?.secured(&bed.tree)?;
    let secured = bandwidth(&hosts.lend(bed.tree.clone())?, "ib_write_bw")?;
    let from = format!("{:.2} of {:.2} GB/s", secured / 1e9, plain / 1e9);
    Ok(Measurement { figure: secured / plain, from })
}

/// With clients that sleep until they are told of a completion: one that spins uses all it gets.
fn processor(bed: &Bed) -> Result<Measurement> {
    let (bed, hosts) = hosts(bed)?;
    let tcp = iperf(&hosts.host(Side::Left), &hosts.host(Side::Right))?.processor;
    let pair = bed.start_pair(&Tool::new("ib_send_bw", &["-s", "65536", "-n", "150000", "-e"]), LIMIT)?;
    let right = bed.client_router.as_ref().context("two routers")?;
    await_traffic(right)?;
    let pids = [bed.router.pid(), right.pid(), pair.client.pid(), pair.server.pid()];
    let used = || pids.iter().map(|pid| processor_time(*pid)).sum::<Result<Duration>>();
    let (before, sent) = (used()?, sent(right)?);
    thread::sleep(SAMPLE);
    let (used, sent) = (used()?.saturating_sub(before), self::sent(right)? - sent);
    pair.wait()?.success()?;
    let own = used.as_secs_f64() / sent * GIB;
    Ok(Measurement { figure: own / tcp, from: format!("{own:.2} of {tcp:.2} s") })
}

fn write_latency(bed: &Bed) -> Result<Measurement> {
    let (bed, hosts) = hosts(bed)?;
    let tcp = || tcp_trip(&hosts.host(Side::Left), &hosts.host(Side::Right));
    let before = tcp()?;
    let own = latency(&bed, "ib_write_lat")?;
    // perftest counts one way.
    let tcp = (before + tcp()?) / 4.0;
    Ok(Measurement { figure: own / tcp, from: format!("{own:.2} of {tcp:.2} us, one way") })
}

fn many_together(bed: &Bed) -> Result<Measurement> {
    let (bed, _hosts) = hosts(bed)?;
    let own = |qps: &str| {
        let tool = Tool::new("ib_write_bw", &["-s", "65536", "-D", "4", "-t", "16", "-q", qps]);
        bytes_a_second(&bed.run_pair(&tool, LIMIT)?)
    };
    let alone = own("1")?;
    let together = own(&MANY.to_string())?;
    let from = format!("{:.2} of {:.2} GB/s", together / 1e9, alone / 1e9);
    Ok(Measurement { figure: together / alone, from })
}

fn many_evenly(bed: &Bed) -> Result<Measurement> {
    let (bed, _hosts) = hosts(bed)?;
    let qps = MANY.to_string();
    let tool = Tool::new("ib_write_bw", &["-s", "65536", "-D", "10", "-t", "16", "-q", &qps]);
    let pair = bed.start_pair(&tool, LIMIT)?;
    let right = bed.client_router.as_ref().context("two routers")?;
    await_traffic(right)?;
    let before = progress(right)?;
    thread::sleep(2 * SAMPLE);
    let after = progress(right)?;
    pair.wait()?.success()?;
    ensure!(before.len() == MANY && after.len() == MANY, "{} QPs of {MANY} are there", after.len());
    let moved = || after.iter().map(|(qpn, bytes)| bytes - before.get(qpn).copied().unwrap_or(0.0));
    let (least, most) = (moved().fold(f64::INFINITY, f64::min), moved().fold(0.0, f64::max));
    let from = format!("{:.1} to {:.1} MB a QP", least / 1e6, most / 1e6);
    Ok(Measurement { figure: least / most, from })
}

/// Waits until a pair that was started moves its bytes.
fn await_traffic(router: &Router) -> Result<()> {
    let start = Instant::now();
    while sent(router)? < 1e8 {
        interrupt::check()?;
        ensure!(start.elapsed() < LIMIT, "nothing moves");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Bytes that a router has sent over its link.
fn sent(router: &Router) -> Result<f64> {
    router.status()?["links"][0]["tx_bytes"].as_f64().context("the status tells of no link")
}

/// Bytes that each QP of a router's clients has had acknowledged.
fn progress(router: &Router) -> Result<BTreeMap<u64, f64>> {
    let status = router.status()?;
    let qps = status["qps"].as_array().context("the status tells of no QPs")?;
    let one = |qp: &serde_json::Value| Some((qp["qpn"].as_u64()?, qp["counters"]["tx_bytes"].as_f64()?));
    qps.iter().map(|qp| one(qp).context("a QP without counters")).collect()
}
