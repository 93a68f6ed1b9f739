//! The matrix of perftest cases, as `perftest-ci/matrix.toml` writes it, and what each case must print.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    bed::{PairOutcome, Tool},
    perftest,
};

/// The whole matrix.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// Iterations of a case that does not say otherwise.
    iterations: u64,
    /// Seconds that a case may take.
    seconds: u64,
    #[serde(rename = "case")]
    cases: Vec<Case>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    tools: Vec<String>,
    #[serde(default = "only_rc")]
    connections: Vec<Connection>,
    size: Option<Size>,
    #[serde(default = "one")]
    qps: u64,
    iterations: Option<u64>,
    /// Seconds, instead of iterations.
    duration: Option<u64>,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default = "only_process")]
    tiers: Vec<Tier>,
}

/// Where a case runs.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Two processes of one host.
    Process,
    /// Two network namespaces.
    Hosts,
    /// Two hosts, with a link between their routers.
    Links,
    /// Two containers.
    Containers,
    /// Two processes of one host, for their figures: the short subset of perftest-ci.
    Figures,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "UPPERCASE")]
enum Connection {
    Rc,
    Uc,
    Ud,
    Xrc,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    #[serde(deserialize_with = "all")]
    All,
}

/// One tool on one kind of connection: what is run, and what is expected of it.
#[derive(Clone, Debug)]
pub struct Run {
    /// Tool, connection and case.
    pub name: String,
    /// The tool and its options.
    pub tool: Tool,
    /// How long it may take.
    pub limit: Duration,
    connection: Connection,
    size: Option<Size>,
    /// What the column of iterations shows; nothing where time decides.
    iterations: Option<u64>,
}

impl Matrix {
    /// Reads the matrix of a workspace.
    pub fn load(workspace: &Path) -> Result<Self> {
        let path = workspace.join("perftest-ci/matrix.toml");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not a matrix", path.display()))
    }

    /// Those runs of one tier whose connections can be direct.
    pub fn direct_runs(&self, tier: Tier) -> Vec<Run> {
        self.runs(tier)
            .into_iter()
            .filter(|run| matches!(run.connection, Connection::Rc | Connection::Uc))
            .collect()
    }

    /// The runs of one tier, in the order of the file.
    pub fn runs(&self, tier: Tier) -> Vec<Run> {
        let cases = self.cases.iter().filter(|case| case.tiers.contains(&tier));
        cases.flat_map(|case| self.expand(case)).collect()
    }

    fn expand(&self, case: &Case) -> Vec<Run> {
        let combinations =
            case.tools.iter().flat_map(|tool| case.connections.iter().map(move |&kind| (tool, kind)));
        combinations
            .filter(|(tool, kind)| kind.suits(tool))
            .map(|(tool, kind)| self.run(case, tool, kind))
            .collect()
    }

    fn run(&self, case: &Case, program: &str, connection: Connection) -> Run {
        let iterations = case.iterations.unwrap_or(self.iterations);
        let mut options = vec!["-c".to_owned(), connection.name().to_owned()];
        match case.size {
            Some(Size::Bytes(bytes)) => options.extend(["-s".to_owned(), bytes.to_string()]),
            Some(Size::All) => options.push("-a".to_owned()),
            None => {}
        }
        match case.duration {
            Some(seconds) => options.extend(["-D".to_owned(), seconds.to_string()]),
            None => options.extend(["-n".to_owned(), iterations.to_string()]),
        }
        if case.qps > 1 {
            options.extend(["-q".to_owned(), case.qps.to_string()]);
        }
        options.extend(case.options.iter().cloned());
        Run {
            name: format!("{program} {} {}", connection.name(), case.name),
            tool: Tool { program: program.to_owned(), options },
            limit: Duration::from_secs(self.seconds),
            connection,
            size: case.size,
            iterations: case.duration.is_none().then_some(iterations * case.qps),
        }
    }
}

impl Run {
    /// Fails unless both ends exited with 0, did what they were asked, and the client printed the rows of this run.
    pub fn check(&self, outcome: &PairOutcome) -> Result<()> {
        outcome.success()?;
        let client = &outcome.client;
        // On a machine with other work perftest may fail to calibrate its clock: it says so, and has no figures.
        let timed = !client.stderr.contains("Correlation coefficient");
        self.check_rows(&client.stdout, timed).with_context(|| outcome.report())?;
        for end in [&outcome.server, client] {
            self.check_means(&end.stdout, &end.stderr).with_context(|| outcome.report())?;
        }
        Ok(())
    }

    /// On a device whose part number it does not know, perftest turns inline data and the new post-send interface
    /// off, says so in passing, and goes on.
    fn check_means(&self, stdout: &str, stderr: &str) -> Result<()> {
        let is_set = |option: &str| self.tool.options.iter().any(|word| word == option);
        let disabled = stderr.contains("Device not recognized to implement inline");
        ensure!(!(is_set("-I") && disabled), "perftest did not use inline data");
        let expected = if is_set("--use_old_post_send") { "OFF" } else { "ON" };
        let line = stdout.lines().find(|line| line.trim_start().starts_with("ibv_wr* API"));
        let used = line.and_then(|line| line.split_whitespace().last()).unwrap_or("unknown");
        ensure!(used == expected, "the new post-send interface is {used}, not {expected}");
        Ok(())
    }

    fn check_rows(&self, stdout: &str, timed: bool) -> Result<()> {
        let rows = perftest::rows(stdout);
        let bytes: Vec<u64> = rows.iter().map(|row| row.bytes).collect();
        self.check_sizes(&bytes)?;
        for row in &rows {
            let enough = self.iterations.map_or(row.iterations > 0, |expected| row.iterations == expected);
            ensure!(enough, "{} bytes: {} iterations, not {:?}", row.bytes, row.iterations, self.iterations);
            ensure!(row.has_figures() || !timed, "{} bytes: no figures", row.bytes);
        }
        Ok(())
    }

    fn check_sizes(&self, bytes: &[u64]) -> Result<()> {
        let powers: Vec<u64> = (1..=23).map(|power| 1 << power).collect();
        let as_expected = match self.size {
            // UD ends at the path's MTU, which is 256 bytes at the least.
            Some(Size::All) if self.connection == Connection::Ud => {
                bytes.len() >= 8 && powers.starts_with(bytes)
            }
            Some(Size::All) => bytes == powers,
            Some(Size::Bytes(size)) => bytes == [size],
            None => bytes.len() == 1,
        };
        if !as_expected {
            bail!("rows for {bytes:?} bytes, where {:?} was asked", self.size);
        }
        Ok(())
    }
}

impl Connection {
    fn name(self) -> &'static str {
        match self {
            Self::Rc => "RC",
            Self::Uc => "UC",
            Self::Ud => "UD",
            Self::Xrc => "XRC",
        }
    }

    /// READ and atomics need RC, WRITE at least UC.
    fn suits(self, tool: &str) -> bool {
        match self {
            Self::Rc | Self::Xrc => true,
            Self::Uc => tool.starts_with("ib_write") || tool.starts_with("ib_send"),
            Self::Ud => tool.starts_with("ib_send"),
        }
    }
}

fn only_rc() -> Vec<Connection> {
    vec![Connection::Rc]
}

fn only_process() -> Vec<Tier> {
    vec![Tier::Process]
}

fn one() -> u64 {
    1
}

fn all<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    let word = String::deserialize(deserializer)?;
    if word != "all" {
        return Err(serde::de::Error::custom(format!("size is a number or \"all\", not {word:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Matrix {
        Matrix::load(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap()
    }

    fn run(name: &str) -> Run {
        matrix().runs(Tier::Process).into_iter().find(|run| run.name == name).expect("a run of that name")
    }

    #[test]
    fn every_tool_is_in_every_tier() {
        for tier in [Tier::Process, Tier::Hosts, Tier::Links, Tier::Containers] {
            let runs = matrix().runs(tier);
            for verb in ["write", "read", "send", "atomic"] {
                for kind in ["bw", "lat"] {
                    let tool = format!("ib_{verb}_{kind}");
                    assert!(runs.iter().any(|run| run.tool.program == tool), "{tool} in {tier:?}");
                }
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<String> = matrix().runs(Tier::Process).into_iter().map(|run| run.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn connections_follow_what_the_tool_allows() {
        let runs = matrix().runs(Tier::Process);
        assert!(runs.iter().any(|run| run.name.starts_with("ib_send_bw UD")));
        assert!(runs.iter().any(|run| run.name.starts_with("ib_write_lat UC")));
        assert!(!runs.iter().any(|run| run.name.starts_with("ib_read_bw UC")));
        assert!(!runs.iter().any(|run| run.name.starts_with("ib_write_bw UD")));
    }

    #[test]
    fn rows_that_are_missing_or_short_are_noticed() {
        let run = run("ib_write_bw RC all-sizes");
        assert!(run.check_rows("", true).is_err());
        let count = run.iterations.unwrap();
        let mut table = String::from(" #bytes #iterations\n");
        for power in 1..=23 {
            table += &format!("{} {count} 1.0 1.0 1.0\n", 1u64 << power);
        }
        run.check_rows(&table, true).unwrap();
        assert!(run.check_rows(&table.replace(&format!("4096 {count}"), "4096 7"), true).is_err());
        assert!(run.check_rows(&table.replace(&format!("4096 {count} 1.0"), "4097 x y"), true).is_err());
        let untimed = table.replace("1.0", "0.00");
        assert!(run.check_rows(&untimed, true).is_err());
        run.check_rows(&untimed, false).unwrap();
    }

    #[test]
    fn a_means_that_perftest_dropped_is_noticed() {
        let new = " ibv_wr* API     : ON\n";
        let old = " ibv_wr* API     : OFF\n";
        let inline = run("ib_write_bw RC inline");
        inline.check_means(new, "").unwrap();
        assert!(inline.check_means(old, "").is_err());
        assert!(
            inline
                .check_means(new, "Device not recognized to implement inline feature. Disabling it")
                .is_err()
        );
        run("ib_write_bw RC old-post-send").check_means(old, "").unwrap();
    }
}
