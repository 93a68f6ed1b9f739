//! `freeflow doctor`: what this host offers, and how to mend what is missing.
//!
//! Does: the list of checks, a line each, and the verdict. Leaves to others: looking at the host (host).

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{
    Failure, configuration, failure, host,
    install::Tree,
    node::{self, MEND, Node},
    probe::{Listener, probe},
    runtime::Socket,
    wire,
};

const MORE: &str = "\
PASS is well; WARN works with a restriction; FAIL has to be mended.
Exit codes: 0 nothing failed; 1 something did.";

#[derive(Debug, clap::Args)]
#[command(after_help = MORE)]
pub(crate) struct Args {
    /// The router's control socket [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The router's configuration; without it, /etc/freeflow/router.toml where it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Pass,
    Warn,
    Fail,
}

/// What one check found.
#[derive(Debug)]
pub(crate) struct Finding {
    level: Level,
    what: String,
    mend: String,
}

impl Finding {
    pub(crate) fn pass(what: impl Into<String>) -> Self {
        Self { level: Level::Pass, what: what.into(), mend: String::new() }
    }

    pub(crate) fn warn(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { level: Level::Warn, what: what.into(), mend: mend.into() }
    }

    pub(crate) fn fail(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { level: Level::Fail, what: what.into(), mend: mend.into() }
    }
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let tree = Tree::find()?;
    let socket = Socket::choose(args.socket.as_deref())?;
    // Namespaces are tried before libibverbs is loaded: no library may have started a thread by then.
    let namespaces = host::namespaces();
    let node = device_node(namespaces.level);
    let mut findings = vec![
        ("install tree", install_tree(&tree)),
        ("device node", node),
        ("namespaces", namespaces),
        ("libibverbs", host::libibverbs(&tree)),
        ("kernel RDMA", host::kernel_rdma(&tree)),
        ("real NIC", host::real_nic(&configuration::nic(args.config.as_deref()))),
        ("configuration", configuration::look(args.config.as_deref(), &socket)),
        ("router", router(&socket)),
        ("client memory", host::process_memory()),
        ("memfd", host::memfd()),
        ("open files", host::open_files()),
        ("memory limit", host::memory_limit()),
        ("privileges", host::privileges()),
    ];
    let directory = configuration::directory(args.config.as_deref());
    findings.extend(directory.map(|finding| ("directory", finding)));
    super::print(&report(&findings))?;
    let failed = findings.iter().any(|(_, finding)| finding.level == Level::Fail);
    Ok(if failed { ExitCode::from(failure::FAILED) } else { ExitCode::SUCCESS })
}

fn report(findings: &[(&str, Finding)]) -> String {
    let mut text = String::new();
    let mut counts = [0; 3];
    for (name, finding) in findings {
        counts[finding.level as usize] += 1;
        let word = ["PASS", "WARN", "FAIL"][finding.level as usize];
        // Writing to a string does not fail.
        let _ = writeln!(text, "{word}  {name:<14}{}", finding.what);
        if !finding.mend.is_empty() {
            let _ = writeln!(text, "      {:<14}-> {}", "", finding.mend);
        }
    }
    let [pass, warn, fail] = counts;
    let _ = writeln!(text, "{pass} passed, {warn} warned, {fail} failed");
    text
}

fn install_tree(tree: &Tree) -> Finding {
    match tree.fault() {
        None => Finding::pass(format!("complete at {}", tree.prefix().display())),
        Some(fault) => Finding::fail(format!("not usable at {}", tree.prefix().display()), fault),
    }
}

fn device_node(namespaces: Level) -> Finding {
    let mend = format!("as root: {MEND}; in a container: --device /dev/null:{}", node::NODE);
    match node::look() {
        Node::Usable => Finding::pass(node::NODE),
        Node::Absent if namespaces == Level::Pass => Finding::pass(
            "none; `freeflow run` makes one for its program (for `freeflow env`: ".to_owned() + MEND + ")",
        ),
        Node::Absent => Finding::fail(format!("{} is missing", node::NODE), mend),
        Node::Wrong(fault) => Finding::fail(format!("{}: {fault}", node::NODE), mend),
    }
}

fn router(socket: &Socket) -> Finding {
    let shown = socket.path.display();
    match probe(&socket.path) {
        Listener::Live { pid } => answering(&socket.path, pid),
        Listener::Unreachable(error) => Finding::fail(
            format!("cannot reach {shown}: {error}"),
            "check the permissions, or name the right --socket",
        ),
        Listener::Absent | Listener::Stale if socket.named => Finding::fail(
            format!("none serves {shown}"),
            format!("start one: freeflow router --socket {shown}"),
        ),
        Listener::Absent | Listener::Stale => {
            Finding::pass(format!("none serves {shown} now; `freeflow run` starts one when it is needed"))
        }
    }
}

fn answering(socket: &Path, pid: Option<u32>) -> Finding {
    let shown = socket.display();
    let pid = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
    let ours = env!("CARGO_PKG_VERSION");
    match wire::status(socket) {
        Ok(status) if status.version == ours => Finding::pass(format!("{ours}{pid} serves {shown}")),
        Ok(status) => Finding::warn(
            format!("the router{pid} at {shown} is version {}, this program {ours}", status.version),
            "restart the router from this install tree",
        ),
        Err(error) => Finding::warn(
            format!("one{pid} listens on {shown}, but does not tell its status: {error:#}"),
            "restart it from this install tree; if it hangs, its log says why",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_a_line_a_check_a_way_to_mend_and_a_sum() {
        let findings = [
            ("one", Finding::pass("fine")),
            ("two", Finding::warn("so so", "do this")),
            ("three", Finding::fail("broken", "do that")),
        ];
        let text = report(&findings);
        let lines: Vec<_> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let wanted = ["PASS one fine", "WARN two so so", "-> do this", "FAIL three broken", "-> do that"]
            .map(str::to_owned);
        assert_eq!(lines[..5], wanted);
        assert_eq!(lines[5], "1 passed, 1 warned, 1 failed");
    }
}
