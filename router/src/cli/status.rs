//! `freeflow status`: what the router tells about itself, as tables or JSON.

use std::{fmt::Write, path::PathBuf, process::ExitCode};

use anyhow::{Context, bail};
use router::status::{Announcement, Client, Directory, Lane, Link, Qp, Rnic, Status};

use super::{
    Failure,
    probe::{Listener, probe},
    runtime::Socket,
    wire,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The router's control socket [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let socket = Socket::choose(args.socket.as_deref())?.path;
    let status = ask(&socket)?;
    if args.json {
        let text = serde_json::to_string_pretty(&status).context("cannot write JSON")?;
        return super::print(&(text + "\n"));
    }
    super::print(&text(&status))
}

/// Asks the router, after seeing that there is one.
pub(crate) fn ask(socket: &std::path::Path) -> anyhow::Result<Status> {
    let shown = socket.display();
    match probe(socket) {
        Listener::Live { .. } => {
            wire::status(socket).with_context(|| format!("the router at {shown} gave no status"))
        }
        Listener::Absent | Listener::Stale => {
            bail!(
                "no router serves {shown}; `freeflow run` starts one, `freeflow router` is one, --socket names one"
            )
        }
        Listener::Unreachable(error) => {
            Err(error).with_context(|| format!("cannot reach a router at {shown}"))
        }
    }
}

/// What is to be said of the directory.
fn directory(text: &mut String, directory: &Directory) {
    if directory.kind.is_empty() {
        return;
    }
    let place = if directory.place.is_empty() { String::new() } else { format!(" at {}", directory.place) };
    let _ = write!(text, "\ndirectory: {}{place}, {}", directory.kind, directory.state);
    if directory.kind != "file" {
        let _ = write!(
            text,
            " for {}, revision {}, {} addresses",
            duration(directory.since_seconds),
            directory.revision,
            directory.addresses
        );
    }
    let _ = writeln!(text, ", {} other routers; this one is {}", directory.routers, directory.name);
    if !directory.trouble.is_empty() {
        let _ = writeln!(text, "  {}", printable(&directory.trouble));
    }
    let row = |own: &Announcement| {
        let by = if own.router.is_empty() { "-".to_owned() } else { printable(&own.router) };
        vec![own.tenant.clone(), own.address.clone(), own.state.clone(), by]
    };
    if !directory.own.is_empty() {
        let rows = directory.own.iter().map(row).collect();
        table(text, "announced", &["TENANT", "ADDRESS", "STATE", "ROUTER"], rows);
    }
}

/// Everything for people.
fn text(status: &Status) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "freeflow {}, pid {}, up {}, {}",
        status.version,
        status.pid,
        duration(status.uptime_seconds),
        status.socket
    );
    let lanes = status.lanes.iter().map(lane_row).collect();
    table(&mut text, "lanes", &["LANE", "WORK REQUESTS", "SLEEPS"], lanes);
    let clients = status.clients.iter().map(client_row).collect();
    let columns = [
        "ID",
        "PID",
        "UID",
        "COMMAND",
        "TENANT",
        "MODE",
        "QPS",
        "CQS",
        "MRS",
        "MR BYTES",
        "TX MSGS",
        "TX BYTES",
        "RX MSGS",
        "RX BYTES",
        "RNR",
        "RETRIES",
        "ERRORS",
        "ADDRESSES",
    ];
    table(&mut text, "clients", &columns, clients);
    let qps = status.qps.iter().map(qp_row).collect();
    let columns = [
        "QPN", "CLIENT", "TYPE", "STATE", "MODE", "PATH", "TX MSGS", "TX BYTES", "RX MSGS", "RX BYTES",
        "PEER",
    ];
    table(&mut text, "queue pairs", &columns, qps);
    let listeners = status.listeners.iter();
    let listeners = listeners.map(|l| vec![l.pid.to_string(), l.space.clone(), l.address.clone()]).collect();
    table(&mut text, "rdma_cm listeners", &["PID", "SPACE", "ADDRESS"], listeners);
    let links = status.links.iter().map(link_row).collect();
    let columns = [
        "ROUTER",
        "ADDRESS",
        "STATE",
        "STREAMS",
        "RTT",
        "TX BYTES",
        "RX BYTES",
        "RETRANSMITS",
        "CONNECTIONS",
        "RNIC",
    ];
    table(&mut text, "links", &columns, links);
    directory(&mut text, &status.directory);
    rnic(&mut text, &status.rnic);
    text
}

/// The real NIC, where the router tells of it.
fn rnic(text: &mut String, rnic: &Rnic) {
    let Rnic { state, device, port, gid, gid_index, why, qps, mrs, mr_bytes } = rnic;
    let _ = match state.as_str() {
        "" => Ok(()),
        "none" => writeln!(text, "\nrnic: none ({})", printable(why)),
        _ => writeln!(
            text,
            "\nrnic: {device} port {port}, GID {gid_index} {gid}, {state} ({}); {qps} shadow QPs, {mrs} MRs, {} bytes",
            printable(why),
            size(*mr_bytes),
        ),
    };
}

fn link_row(link: &Link) -> Vec<String> {
    vec![
        printable(&link.router),
        link.address.clone(),
        link.state.clone(),
        link.streams.to_string(),
        link.round_trip_us.map_or_else(|| "-".to_owned(), |us| format!("{us:.0} us")),
        size(link.tx_bytes),
        size(link.rx_bytes),
        link.retransmissions.to_string(),
        link.connections.to_string(),
        if link.rnic { "yes" } else { "no" }.to_owned(),
    ]
}

fn lane_row(lane: &Lane) -> Vec<String> {
    vec![lane.id.to_string(), lane.work_requests.to_string(), lane.sleeps.to_string()]
}

fn client_row(client: &Client) -> Vec<String> {
    let counters = &client.counters;
    vec![
        client.id.to_string(),
        client.pid.to_string(),
        client.uid.to_string(),
        printable(&client.comm),
        client.tenant.clone(),
        client.mode.clone(),
        beside(client.qps, client.quotas.qps),
        beside(client.cqs, client.quotas.cqs),
        beside(client.mrs, client.quotas.mrs),
        format!("{}/{}", size(client.mr_bytes), size(client.quotas.mr_bytes)),
        counters.tx_messages.to_string(),
        size(counters.tx_bytes),
        counters.rx_messages.to_string(),
        size(counters.rx_bytes),
        counters.rnr_naks.to_string(),
        counters.retries.to_string(),
        counters.errors.to_string(),
        client.addresses.join(","),
    ]
}

fn qp_row(qp: &Qp) -> Vec<String> {
    let number = qp.peer_qpn.map_or(String::new(), |qpn| format!("{qpn:#08x}"));
    let address = qp.peer_gid.clone().unwrap_or_default();
    let peer = format!("{address} {number}").trim().to_owned();
    vec![
        format!("{:#08x}", qp.qpn),
        qp.client.to_string(),
        qp.transport.clone(),
        qp.state.clone(),
        qp.mode.clone(),
        if qp.path.is_empty() { "-".to_owned() } else { qp.path.clone() },
        qp.counters.tx_messages.to_string(),
        size(qp.counters.tx_bytes),
        qp.counters.rx_messages.to_string(),
        size(qp.counters.rx_bytes),
        if peer.is_empty() { "-".to_owned() } else { peer },
    ]
}

/// What is held, beside its quota.
fn beside(held: u32, quota: u32) -> String {
    format!("{held}/{quota}")
}

/// One table with its title; of an empty one only the title.
fn table(text: &mut String, title: &str, columns: &[&str], rows: Vec<Vec<String>>) {
    let _ = writeln!(text, "\n{title}: {}", rows.len());
    if rows.is_empty() {
        return;
    }
    let header = columns.iter().map(|column| (*column).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    for line in &lines {
        let cells: Vec<_> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "  {}", cells.join("  ").trim_end());
    }
}

/// A process chooses its own name; what would move the cursor or colour the screen is shown as a dot.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '.' } else { c }).collect()
}

/// `1.5G`: three digits at most.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["", "K", "M", "G", "T"] {
        if value < 1000.0 {
            let digits = usize::from(value < 10.0 && !unit.is_empty());
            return format!("{value:.digits$}{unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.0}P")
}

/// `1h02m`, `3m20s`, `12s`, `2d03h`.
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(size(0), "0");
        assert_eq!(size(999), "999");
        assert_eq!(size(1536), "1.5K");
        assert_eq!(size(64 << 30), "64G");
        assert_eq!(size(u64::MAX), "16384P");
        assert_eq!(duration(12), "12s");
        assert_eq!(duration(3720), "1h02m");
        assert_eq!(duration(2 * 86_400 + 3 * 3600), "2d03h");
    }

    #[test]
    fn the_directory_is_told_of_with_what_is_announced_and_refused() {
        assert!(!text(&Status::default()).contains("directory"));
        let own = |address: &str, state: &str, router: &str| Announcement {
            tenant: "blue".into(),
            address: address.into(),
            state: state.into(),
            router: router.into(),
        };
        let directory = Directory {
            kind: "etcd".into(),
            name: "a".into(),
            place: "http://10.0.0.5:2379".into(),
            state: "lost".into(),
            trouble: "it hung up".into(),
            revision: 7,
            routers: 2,
            own: vec![own("10.1.0.1", "published", ""), own("10.1.0.2", "refused", "b")],
            ..Directory::default()
        };
        let text = text(&Status { directory, ..Status::default() });
        for words in
            ["etcd at http://10.0.0.5:2379, lost for 0s, revision 7", "it hung up", "2 other routers"]
        {
            assert!(text.contains(words), "{text}");
        }
        let refused = text.lines().find(|line| line.contains("10.1.0.2")).unwrap();
        assert!(refused.contains("refused") && refused.trim_end().ends_with('b'), "{text}");
    }

    #[test]
    fn tables_are_aligned_and_a_hostile_name_cannot_reach_the_terminal() {
        let client =
            Client { id: 7, comm: "evil\x1b[31m".into(), addresses: vec!["::1".into()], ..Client::default() };
        let qp = Qp { qpn: 0x11, state: "RTS".into(), transport: "RC".into(), ..Qp::default() };
        let status = Status { clients: vec![client.clone(), client], qps: vec![qp], ..Status::default() };
        let text = text(&status);
        assert!(!text.contains('\x1b'));
        assert!(
            text.contains("clients: 2") && text.contains("lanes: 0") && text.contains("0x000011"),
            "{text}"
        );
        let rows: Vec<_> = text.lines().filter(|line| line.contains("evil")).collect();
        let header = text.lines().find(|line| line.contains("COMMAND")).unwrap();
        assert_eq!(rows[0].find("evil"), header.find("COMMAND"));
    }
}
