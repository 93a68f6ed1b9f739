//! The promised ratios of direct mode, against the machine itself and against those who move messages through shared
//! memory by interfaces of their own.

use anyhow::{Context, Result};
use xtask::{
    bed::{Bed, Mode, Tool},
    perftest,
    reference::memcpy,
};

use super::{
    handover,
    peers::{self, Ucx},
    ratios::{LIMIT, Measurement, Ratio, Target},
};
use crate::demo::{bandwidth, latency};

const SMALL: usize = 8;
const LONG: usize = 65_536;
const MIB: usize = 1 << 20;
/// Messages that a peer's tool sends.
const TRIPS: u32 = 200_000;
const SMALLS: u32 = 20_000_000;
const LONGS: u32 = 200_000;

/// All promises of direct mode.
pub(crate) const RATIOS: [Ratio; 11] = [
    row("direct write latency 8 B", "x hand-over", Target::AtMost(1.3), |bed| {
        let before = handover::one_way()?;
        let own = latency(bed, "ib_write_lat")?;
        let floor = (before + handover::one_way()?).as_secs_f64() * 1e6 / 2.0;
        let from = format!("{own:.2} us, typical, one way; a cache line from core to core {floor:.3} us");
        Ok(Measurement { figure: own / floor, from })
    }),
    row("direct write latency 8 B", "x UCX's put", Target::AtMost(1.15), |bed| {
        against_latency(bed, "ib_write_lat", "ucp_put_lat")
    }),
    row("direct send latency 8 B", "x UCX's tag", Target::AtMost(1.0), |bed| {
        against_latency(bed, "ib_send_lat", "tag_lat")
    }),
    row("direct send latency 64 B", "x libfabric's shm", Target::None, |bed| {
        let figure = own_latency(bed, "ib_send_lat", "64")?;
        let other = peers::libfabric(64, 20_000)?;
        Ok(Measurement { figure: figure / other, from: format!("{figure:.2} us, fi_pingpong {other:.2} us") })
    }),
    row("direct write bandwidth 64 KiB", "x memcpy", Target::AtLeast(0.9), |bed| {
        against_memcpy(bed, "ib_write_bw", LONG)
    }),
    row("direct read bandwidth 64 KiB", "x memcpy", Target::AtLeast(0.9), |bed| {
        against_memcpy(bed, "ib_read_bw", LONG)
    }),
    row("direct write bandwidth 64 KiB", "x UCX's put", Target::AtLeast(1.0), |bed| {
        let own = bandwidth(bed, "ib_write_bw")?;
        let ucx = peers::ucx("ucp_put_bw", LONG, LONGS)?.bandwidth;
        Ok(Measurement { figure: own / ucx, from: format!("{:.1} of {:.1} GB/s", own / 1e9, ucx / 1e9) })
    }),
    row("direct write bandwidth 8 MiB", "x memcpy", Target::None, |bed| {
        against_memcpy(bed, "ib_write_bw", 8 * MIB)
    }),
    row("direct write rate 8 B", "x UCX's put", Target::AtLeast(0.7), |bed| {
        against_rate(bed, "ib_write_bw", &[], "ucp_put_bw")
    }),
    row("direct write rate 8 B, lists of 16", "x UCX's put", Target::AtLeast(1.0), |bed| {
        against_rate(bed, "ib_write_bw", &["-l", "16"], "ucp_put_bw")
    }),
    row("direct send rate 8 B", "x UCX's tag", Target::None, |bed| {
        against_rate(bed, "ib_send_bw", &[], "tag_bw")
    }),
];

const fn row(
    name: &'static str,
    unit: &'static str,
    target: Target,
    measure: fn(&Bed) -> Result<Measurement>,
) -> Ratio {
    Ratio { name, unit, target, mode: Mode::Direct, measure }
}

fn against_latency(bed: &Bed, tool: &str, test: &str) -> Result<Measurement> {
    let own = latency(bed, tool)?;
    let ucx = peers::ucx(test, SMALL, TRIPS)?.latency;
    Ok(Measurement { figure: own / ucx, from: format!("{own:.2} of {ucx:.2} us") })
}

fn own_latency(bed: &Bed, tool: &str, bytes: &str) -> Result<f64> {
    let outcome = bed.run_pair(&Tool::new(tool, &["-s", bytes, "-n", "20000"]), LIMIT)?;
    outcome.success()?;
    perftest::single_row(&outcome.client.stdout)?.latency().context("not the table of a latency test")
}

fn against_memcpy(bed: &Bed, tool: &str, bytes: usize) -> Result<Measurement> {
    let before = memcpy(bytes);
    let own = own_bandwidth(bed, tool, bytes, &[])?;
    let memcpy = (before + memcpy(bytes)) / 2.0;
    let from = format!("{:.1} of {:.1} GB/s", own / 1e9, memcpy / 1e9);
    Ok(Measurement { figure: own / memcpy, from })
}

fn against_rate(bed: &Bed, tool: &str, options: &[&str], test: &str) -> Result<Measurement> {
    let own = own_bandwidth(bed, tool, SMALL, options)? / SMALL as f64;
    let Ucx { rate, .. } = peers::ucx(test, SMALL, SMALLS)?;
    Ok(Measurement { figure: own / rate, from: format!("{:.1} of {:.1} M/s", own / 1e6, rate / 1e6) })
}

/// Bytes a second.
fn own_bandwidth(bed: &Bed, tool: &str, bytes: usize, options: &[&str]) -> Result<f64> {
    let bytes = bytes.to_string();
    let tool = Tool::new(tool, &[&["-s", &bytes, "-D", "2"], options].concat());
    let outcome = bed.run_pair(&tool, LIMIT)?;
    outcome.success()?;
    let row = perftest::single_row(&outcome.client.stdout)?;
    Ok(row.bandwidth().context("not the table of a bandwidth test")? * MIB as f64)
}
