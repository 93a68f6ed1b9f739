//! `freeflow ping`: how an address resolves, step by step, and whether the way to it is open.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use router::{
    config::Prefix,
    status::{Announcement, Directory, Route, Status},
};

use super::{Failure, runtime::Socket, status};

/// How long the other router may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The address of a container
    address: IpAddr,
    /// Whose address it is
    #[arg(long, default_value = "default")]
    tenant: String,
    /// The router's control socket [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let status = status::ask(&Socket::choose(args.socket.as_deref())?.path)?;
    let mut lines = Vec::new();
    let reached = trace(&status, &args.tenant, args.address, &mut lines);
    super::print(&(lines.join("\n") + "\n"))?;
    Ok(if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Follows an address; says each step. False: it leads nowhere.
fn trace(status: &Status, tenant: &str, address: IpAddr, lines: &mut Vec<String>) -> bool {
    let text = address.to_canonical().to_string();
    let has = |client: &&router::status::Client| client.tenant == tenant && client.addresses.contains(&text);
    if let Some(client) = status.clients.iter().find(has) {
        lines.push(format!("this host: client {} of process {} has {text}", client.id, client.pid));
        lines.push("path: shared memory".to_owned());
        return true;
    }
    lines.push(format!("this host: no client of tenant {tenant} has {text}"));
    let announced = |own: &&Announcement| own.tenant == tenant && own.address == text;
    if let Some(own) = status.directory.own.iter().find(announced) {
        lines.push(match own.state.as_str() {
            "refused" => {
                format!("directory: a client here has {text}, too, but router {} had it first", own.router)
            }
            state => format!("directory: a client here has had {text}; {state}"),
        });
    }
    lines.extend(condition(&status.directory));
    let Some(route) = longest(&status.routes, tenant, address) else {
        lines.push(format!("directory: no route of tenant {tenant} holds {text}"));
        return false;
    };
    lines.push(format!("directory: {} is served by router {}", route.prefix, route.router));
    let Some(link) = status.links.iter().find(|link| link.router == route.router) else {
        if route.router != status.directory.name {
            lines.push(format!("router: {} is not in the directory now", route.router));
            return false;
        }
        lines.push("that is this router: nobody here has opened a device at that address yet".to_owned());
        return false;
    };
    let made =
        format!("{} connections so far, {} packets sent again", link.connections, link.retransmissions);
    if let Some(round_trip) = link.round_trip_us {
        lines.push(format!("link: up, {} streams, {made}", link.streams));
        lines.push(format!("router: {} answers over the link after {round_trip:.0} us", link.address));
        lines.push("path: the TCP link".to_owned());
        return true;
    }
    lines.push(format!("link: {}, {made}", link.state));
    answers(&link.address, lines)
}

/// What is to be said of the directory, where it is not a file.
fn condition(directory: &Directory) -> Option<String> {
    let Directory { kind, place, state, trouble, revision, addresses, .. } = directory;
    match (kind.as_str(), state.as_str()) {
        ("etcd", "up") => {
            Some(format!("directory: etcd at {place}, revision {revision}, {addresses} addresses"))
        }
        ("etcd", "lost") => {
            Some(format!("directory: etcd at {place} is lost ({trouble}); what was known goes on"))
        }
        ("etcd", _) => Some(format!("directory: etcd at {place} has not answered yet")),
        _ => None,
    }
}

/// Whether somebody listens where the other router should.
fn answers(address: &str, lines: &mut Vec<String>) -> bool {
    let start = Instant::now();
    let connect = |address: SocketAddr| TcpStream::connect_timeout(&address, PATIENCE);
    let connected = address.parse().map_err(|_| "no address".to_owned());
    match connected.and_then(|address| connect(address).map_err(|error| error.to_string())) {
        Ok(_) => {
            let took = start.elapsed().as_secs_f64() * 1000.0;
            lines.push(format!("router: {address} answers after {took:.1} ms"));
            lines.push("path: the TCP link".to_owned());
            true
        }
        Err(error) => {
            lines.push(format!("router: {address} does not answer: {error}"));
            false
        }
    }
}

/// The route that counts.
fn longest<'a>(routes: &'a [Route], tenant: &str, address: IpAddr) -> Option<&'a Route> {
    let gid = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    let parsed = |route: &&Route| route.prefix.parse::<Prefix>().ok();
    let holds = |route: &&Route| parsed(route).is_some_and(|prefix| prefix.contains(&gid));
    let of_tenant = routes.iter().filter(|route| route.tenant == tenant).filter(holds);
    of_tenant.max_by_key(|route| parsed(route).map_or(0, |prefix| prefix.bits()))
}

#[cfg(test)]
mod tests {
    use router::status::{Client, Link};

    use super::*;

    fn status() -> Status {
        let route = |prefix: &str, router: &str| Route {
            tenant: "blue".to_owned(),
            prefix: prefix.to_owned(),
            router: router.to_owned(),
        };
        let own =
            Client { tenant: "blue".to_owned(), addresses: vec!["10.1.0.1".to_owned()], ..Client::default() };
        // Port 1 of this host: nobody listens there.
        let link = Link { router: "b".to_owned(), address: "127.0.0.1:1".to_owned(), ..Link::default() };
        let live = Link {
            router: "c".to_owned(),
            streams: 4,
            round_trip_us: Some(31.4),
            state: "up".to_owned(),
            ..Link::default()
        };
        Status {
            clients: vec![own],
            routes: vec![
                route("10.0.0.0/8", "a"),
                route("10.2.0.0/16", "b"),
                route("10.4.0.1/32", "d"),
                route("10.5.0.0/16", "c"),
            ],
            links: vec![link, live],
            directory: Directory { name: "a".to_owned(), ..Directory::default() },
            ..Status::default()
        }
    }

    #[test]
    fn every_way_an_address_can_go_is_told() {
        for (address, reached, word) in [
            ("10.1.0.1", true, "shared memory"),
            ("10.2.0.1", false, "127.0.0.1:1 does not answer"),
            ("10.5.0.1", true, "path: the TCP link"),
            ("10.3.0.1", false, "that is this router"),
            ("10.4.0.1", false, "d is not in the directory now"),
            ("11.0.0.1", false, "no route"),
        ] {
            let mut lines = Vec::new();
            assert_eq!(trace(&status(), "blue", address.parse().unwrap(), &mut lines), reached);
            assert!(lines.last().unwrap().contains(word), "{address}: {lines:?}");
        }
        let mut status = status();
        let refused = Announcement {
            tenant: "blue".to_owned(),
            address: "10.2.0.1".to_owned(),
            state: "refused".to_owned(),
            router: "b".to_owned(),
        };
        (status.directory.kind, status.directory.state) = ("etcd".to_owned(), "lost".to_owned());
        status.directory.own.push(refused);
        let mut lines = Vec::new();
        trace(&status, "blue", "10.2.0.1".parse().unwrap(), &mut lines);
        assert!(lines.iter().any(|line| line.contains("router b had it first")), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("is lost")), "{lines:?}");
        let mut lines = Vec::new();
        assert!(!trace(&status, "red", "10.1.0.1".parse().unwrap(), &mut lines), "{lines:?}");
    }
}
