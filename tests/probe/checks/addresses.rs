//! GIDs: whose addresses they are, and all the ways to ask for them.

use std::{
    net::{IpAddr, Ipv6Addr},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use verbs_abi::ffi::*;

use super::Skip;
use crate::{
    pair::{Pair, Setup},
    qp::Send,
    verbs::Context,
};

fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split(' ')).output().context("cannot run ip")?;
    ensure!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn gids(context: &Context) -> Result<Vec<Ipv6Addr>> {
    // SAFETY: any bytes are a raw GID.
    let raw = |entry: &ibv_gid_entry| Ipv6Addr::from(unsafe { entry.gid.raw });
    Ok(context.gid_table()?.iter().map(raw).collect())
}

fn gid(address: &str) -> Result<Ipv6Addr> {
    Ok(match address.parse()? {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    })
}

fn wait_for(context: &Context, address: &str, expected: bool) -> Result<usize> {
    let start = Instant::now();
    loop {
        let table = gids(context)?;
        let found = table.iter().position(|&entry| Some(entry) == gid(address).ok());
        if found.is_some() == expected {
            return Ok(found.unwrap_or(0));
        }
        if start.elapsed() > Duration::from_secs(5) {
            bail!("{address} is {} in the GID table: {table:?}", if expected { "not" } else { "still" });
        }
        thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn follow() -> Result<()> {
    // SAFETY: this process has one thread so far; only its network changes.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Skip(format!("may not make a network namespace: {error}")).into());
    }
    ip("link set lo up")?;
    let device = match ip("link add net0 type dummy").and_then(|()| ip("link set net0 up")) {
        Ok(()) => "net0",
        Err(_) => "lo",
    };
    let context = Context::open()?;
    wait_for(&context, "10.99.1.1", false)?;
    for address in ["10.99.1.1", "10.99.1.2", "fd99::1"] {
        let (prefix, options) = if address.contains(':') { (64, " nodad") } else { (24, "") };
        ip(&format!("address add {address}/{prefix} dev {device}{options}"))?;
        wait_for(&context, address, true)?;
    }
    let entry = context.gid_entry(wait_for(&context, "10.99.1.2", true)? as u32)?;
    // SAFETY: the name is a C string.
    let index = unsafe { libc::if_nametoindex(std::ffi::CString::new(device)?.as_ptr()) };
    ensure!(entry.ndev_ifindex == index, "the interface is {} and not {index}", entry.ndev_ifindex);
    ip(&format!("address delete 10.99.1.1/24 dev {device}"))?;
    wait_for(&context, "10.99.1.1", false)?;
    // Deleting the first address of a network may take its other ones along.
    let _ = ip(&format!("address add 10.99.1.2/24 dev {device}"));
    for address in ["10.99.1.2", "fd99::1"] {
        let mut setup = Setup::new(IBV_QPT_RC);
        setup.gid_index = wait_for(&context, address, true)? as u8;
        let pair = Pair::new(&setup)?;
        let (a, b) = (&pair.a, &pair.b);
        a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 8)).remote(b.remote(0)))?;
    }
    Ok(())
}

pub(crate) fn table() -> Result<()> {
    let context = Context::open()?;
    let port = context.port_attr()?;
    let table = context.gid_table()?;
    ensure!(!table.is_empty(), "the GID table is empty");
    for index in 0..port.gid_tbl_len {
        // Every index of the table can be asked for; past the last address it is zeros.
        let raw = context.gid(index)?;
        let listed = table.iter().find(|entry| entry.gid_index == index as u32);
        // SAFETY: any bytes are a raw GID.
        let expected = listed.map_or([0; 16], |entry| unsafe { entry.gid.raw });
        ensure!(raw == expected, "GID {index} is {raw:x?} by ibv_query_gid, {expected:x?} in the table");
        let Some(listed) = listed else { continue };
        ensure!(listed.port_num == 1 && listed.gid_type == IBV_GID_TYPE_ROCE_V2, "GID {index} is no RoCE v2");
        let entry = context.gid_entry(index as u32)?;
        // SAFETY: any bytes are a raw GID.
        ensure!(unsafe { entry.gid.raw } == raw, "GID {index} is another by ibv_query_gid_ex");
        ensure!(
            entry.gid_type == listed.gid_type && entry.ndev_ifindex == listed.ndev_ifindex,
            "GID {index}"
        );
    }
    ensure!(context.gid(port.gid_tbl_len).is_err(), "a GID beyond the table");
    Ok(())
}
