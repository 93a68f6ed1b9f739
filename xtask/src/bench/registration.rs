//! What it costs to register memory, beside touching its pages for the first time.

use std::time::Duration;

use anyhow::{Context, Result};
use xtask::{bed::Bed, process::Job};

use super::ratios::Measurement;
use crate::build;

const LIMIT: Duration = Duration::from_secs(180);

/// 64 MiB, beside the first touch.
pub(crate) fn large(bed: &Bed) -> Result<Measurement> {
    ratio(bed, 64 << 20)
}

/// 1 MiB, beside the first touch.
pub(crate) fn medium(bed: &Bed) -> Result<Measurement> {
    ratio(bed, 1 << 20)
}

/// 64 KiB, beside the first touch.
pub(crate) fn small(bed: &Bed) -> Result<Measurement> {
    ratio(bed, 64 << 10)
}

/// One page, in us.
pub(crate) fn page(bed: &Bed) -> Result<Measurement> {
    let (touch, registration) = cost(bed, 4096)?;
    let from = format!("one page, whose first touch takes {:.2} us", touch / 1e3);
    Ok(Measurement { figure: registration / 1e3, from })
}

fn ratio(bed: &Bed, len: usize) -> Result<Measurement> {
    let (touch, registration) = cost(bed, len)?;
    let from =
        format!("{:.1} of {:.1} us, memory of 4 KiB pages with content", registration / 1e3, touch / 1e3);
    Ok(Measurement { figure: registration / touch, from })
}

/// First touch and registration of so many bytes, ns.
fn cost(bed: &Bed, len: usize) -> Result<(f64, f64)> {
    let probe = build::probe()?.display().to_string();
    let words = [probe, "registration".to_owned(), len.to_string()];
    let outcome = Job::spawn(bed.command(&bed.client, &words), LIMIT)?.wait()?;
    outcome.success()?;
    let line = outcome.stdout.lines().next().unwrap_or_default();
    let (touch, registration) = line.split_once(' ').context("no times")?;
    Ok((touch.parse()?, registration.parse()?))
}
