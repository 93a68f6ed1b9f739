//! The results as a page of Markdown.

use std::fmt::Write as _;

use crate::reference::Reference;

use super::{Baseline, Case};

/// The page: what changed first, then the plots, then every case.
pub fn markdown(
    cases: &[Case],
    baseline: &Baseline,
    tolerance: f64,
    reference: &Reference,
    plots: &[String],
) -> String {
    let failed = cases.iter().filter(|case| case.failure.is_some()).count();
    let mut page = format!(
        "# perftest on ff0\n\n{} cases, {} work, {failed} do not. A ratio is bandwidth through that of memcpy of the \
         same size, or latency through that of waking a third thread ({:.2} us here).\n\n",
        cases.len(),
        cases.len() - failed,
        reference.wake_us(),
    );
    changes(&mut page, cases, baseline, tolerance);
    for plot in plots {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "![{plot}]({plot})\n");
    }
    table(&mut page, cases, baseline);
    for case in cases {
        let Some(reason) = &case.failure else { continue };
        let _ = writeln!(page, "\n## {} does not work\n\n```\n{}\n```", case.name, reason.trim_end());
    }
    page
}

fn changes(page: &mut String, cases: &[Case], baseline: &Baseline, tolerance: f64) {
    let changed = cases.iter().filter_map(|case| Some((case, baseline.change(case, tolerance)?)));
    let lines: Vec<String> =
        changed.map(|(case, change)| format!("- {}: {}\n", case.name, change.text())).collect();
    let _ = if lines.is_empty() {
        writeln!(page, "Nothing differs from the baseline by more than {tolerance} times.\n")
    } else {
        writeln!(page, "Against the baseline, by more than {tolerance} times:\n\n{}", lines.concat())
    };
}

fn table(page: &mut String, cases: &[Case], baseline: &Baseline) {
    page.push_str("| case | bytes | figure | ratio | baseline |\n|---|--:|--:|--:|--:|\n");
    for case in cases {
        let (bytes, figure) = match (case.figures.last(), &case.failure) {
            (_, Some(_)) => (String::new(), "fails".to_owned()),
            (Some(last), _) => (last.bytes.to_string(), format!("{:.3} {}", last.value, last.unit.name())),
            (None, None) => (String::new(), "works".to_owned()),
        };
        let ratio = |ratio: Option<f64>| ratio.map(|ratio| format!("{ratio:.3}")).unwrap_or_default();
        let now = ratio(case.ratio().map(|(ratio, _)| ratio));
        let before = ratio(baseline.ratio(&case.name));
        let _ = writeln!(page, "| {} | {bytes} | {figure} | {now} | {before} |", case.name);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Unit, tests::case},
        *,
    };

    #[test]
    fn a_page_names_what_changed_and_what_fails() {
        let mut baseline = Baseline::default();
        baseline.update(&[
            case("fast", Unit::GigabytesPerSecond, &[1.0]),
            case("gone", Unit::Microseconds, &[1.0]),
        ]);
        let gone = Case { failure: Some("the reason".to_owned()), ..case("gone", Unit::Microseconds, &[]) };
        let cases = [case("fast", Unit::GigabytesPerSecond, &[0.1]), gone];
        let reference = Reference::of_wake(1.0);
        let page = markdown(&cases, &baseline, 2.0, &reference, &["latency.svg".to_owned()]);
        for part in [
            "2 cases, 1 work, 1 do not",
            "- fast: 10.0 x slower",
            "- gone: stopped working",
            "(latency.svg)",
            "the reason",
        ] {
            assert!(page.contains(part), "no {part:?} in\n{page}");
        }
    }
}
