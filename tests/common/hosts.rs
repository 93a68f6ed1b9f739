//! What happens to hosts and the links between them.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use xtask::{
    hosts::{Hosts, Side},
    process::{command, run},
    router::Router,
    tree::Tree,
};

use super::SHORT;

/// How long the kernel may keep an address of a router that has died.
const LIMIT: Duration = Duration::from_secs(40);

/// Breaks all links between hosts of this process.
pub(crate) fn cut() -> Result<()> {
    let own = format!("freeflow-{}-", std::process::id());
    for entry in fs::read_dir("/run/netns")?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&own) {
            let namespace = format!("--net={}", entry.path().display());
            let ports = ["sport", "=", "7471", "or", "dport", "=", "7471"];
            run(command(["nsenter", &namespace, "ss", "-K"].iter().chain(&ports)), SHORT)?;
        }
    }
    Ok(())
}

/// A router on the left host, as soon as its address is free.
pub(crate) fn successor(hosts: &Hosts, tree: &Tree) -> Result<Router> {
    let start = Instant::now();
    loop {
        match hosts.start_router(tree, Side::Left) {
            Err(_) if start.elapsed() < LIMIT => thread::sleep(Duration::from_millis(100)),
            other => return other,
        }
    }
}
