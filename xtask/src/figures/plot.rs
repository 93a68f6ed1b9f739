//! Figures over message size, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::reference::Reference;

use super::{Case, Unit};

const SIZE: (u32, u32) = (900, 500);
const COLOURS: [RGBColor; 4] = [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(44, 160, 44), BLACK];

/// A curve: its name, and points of bytes and figures.
type Curve = (String, Vec<(f64, f64)>);

/// Draws what was measured over many sizes into a folder; the files' names.
pub fn plots(cases: &[Case], reference: &Reference, folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for (unit, file, title) in [
        (Unit::GigabytesPerSecond, "bandwidth.svg", "RC bandwidth, GB/s"),
        (Unit::Microseconds, "latency.svg", "RC latency one way, us"),
    ] {
        let mut curves = curves(cases, unit);
        if curves.is_empty() {
            continue;
        }
        if unit == Unit::GigabytesPerSecond {
            let copied = reference.copied().iter().map(|(&bytes, &speed)| (bytes as f64, speed / 1e9));
            curves.push(("memcpy".to_owned(), copied.collect()));
        }
        draw(&folder.join(file), title, &curves).map_err(|error| anyhow!("cannot draw {file}: {error}"))?;
        files.push(file.to_owned());
    }
    Ok(files)
}

fn curves(cases: &[Case], unit: Unit) -> Vec<Curve> {
    let swept = cases.iter().filter(|case| case.name.ends_with(" RC all-sizes") && case.figures.len() > 1);
    let of_unit = swept.filter(|case| case.figures[0].unit == unit);
    let points =
        |case: &Case| case.figures.iter().map(|figure| (figure.bytes as f64, figure.value)).collect();
    of_unit.map(|case| (case.name.split(' ').next().unwrap_or_default().to_owned(), points(case))).collect()
}

fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|(_, points)| points.iter().copied());
    let (left, right) = bounds(points().map(|(bytes, _)| bytes));
    let (bottom, top) = bounds(points().map(|(_, value)| value));
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((left..right).log_scale().base(2.0), (bottom * 0.8..top * 1.25).log_scale())?;
    let size = |bytes: &f64| shown(*bytes);
    chart.configure_mesh().x_desc("bytes of a message").x_label_formatter(&size).draw()?;
    for ((name, points), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let line = chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], *colour));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(least, most), value| (value.min(least), value.max(most)))
}

/// A size as people write it.
fn shown(bytes: f64) -> String {
    match bytes {
        bytes if bytes >= 1_048_576.0 => format!("{:.0} MiB", bytes / 1_048_576.0),
        bytes if bytes >= 1024.0 => format!("{:.0} KiB", bytes / 1024.0),
        bytes => format!("{bytes:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::case, *};

    #[test]
    fn sweeps_are_drawn_and_single_figures_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut reference = Reference::of_wake(1.0);
        reference.memcpy(4096);
        let sweep = case("ib_write_bw RC all-sizes", Unit::GigabytesPerSecond, &[0.1, 0.2, 0.4]);
        let single = case("ib_write_lat RC default", Unit::Microseconds, &[2.0]);
        assert_eq!(plots(&[sweep, single], &reference, folder.path()).unwrap(), ["bandwidth.svg"]);
        let drawn = std::fs::read_to_string(folder.path().join("bandwidth.svg")).unwrap();
        for part in ["<svg", "ib_write_bw", "memcpy", "bytes of a message"] {
            assert!(drawn.contains(part), "no {part:?}");
        }
    }
}
