//! A guest as a host of FreeFlow: a container (a network namespace) whose network reaches that of the other guest, and
//! a router that knows the other one's.

use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::{ENTER, EXCHANGE, Guest, GuestJob, SHORT};
use crate::tree::Tree;

const PORT: u16 = 7471;
/// A router lives as long as its guest.
const LIFE: Duration = Duration::from_secs(super::LIFE_SECONDS);

impl Guest {
    /// The IPv4 address of its container.
    pub fn container_address(&self) -> String {
        format!("10.244.{}.2", self.end)
    }

    /// The IPv6 address of its container.
    pub fn container_address6(&self) -> String {
        format!("fd0a:0:0:{}::2", self.end)
    }

    /// Makes its container: a network namespace `box`, with a way to that of the other guest.
    pub fn add_container(self: &Arc<Self>) -> Result<()> {
        let (own, other) = (self.end, 3 - self.end);
        let script = format!(
            "set -e\n\
             echo 1 >/proc/sys/net/ipv4/ip_forward\n\
             echo 1 >/proc/sys/net/ipv6/conf/all/forwarding\n\
             ip netns add box\n\
             ip link add box0 mtu 9000 type veth peer name eth0 mtu 9000 netns box\n\
             ip address add 10.244.{own}.1/24 dev box0\n\
             ip address add fd0a:0:0:{own}::1/64 dev box0 nodad\n\
             ip link set box0 up\n\
             ip -n box link set lo up\n\
             ip -n box address add 10.244.{own}.2/24 dev eth0\n\
             ip -n box address add fd0a:0:0:{own}::2/64 dev eth0 nodad\n\
             ip -n box link set eth0 up\n\
             ip -n box route add default via 10.244.{own}.1\n\
             ip -n box -6 route add default via fd0a:0:0:{own}::1\n\
             ip route add 10.244.{other}.0/24 via 10.9.0.{other}\n\
             ip -6 route add fd0a:0:0:{other}::/64 via fd09::{other}\n"
        );
        self.run(&script, SHORT).map(|_| ())
    }

    /// Starts its router and waits until that answers. Its configuration has the link to the other guest's and what is
    /// in `more`.
    pub fn start_router(self: &Arc<Self>, tree: &Tree, more: &str) -> Result<GuestJob> {
        let mut directory = "[routers]\n".to_owned();
        for end in [1, 2] {
            directory += &format!("guest{end} = \"10.9.0.{end}:{PORT}\"\n");
        }
        for end in [1, 2] {
            for prefix in [format!("10.244.{end}.0/24"), format!("fd0a:0:0:{end}::/64")] {
                directory += &format!(
                    "[[route]]\nprefix = \"{prefix}\"\nrouter = \"guest{end}\"\ntenant = \"default\"\n"
                );
            }
        }
        fs::write(self.exchange().join("directory.toml"), directory)?;
        let configuration = format!(
            "[links]\nname = \"guest{end}\"\nlisten = \"10.9.0.{end}:{PORT}\"\nsecurity = \"plain\"\n\
             [directory]\nfile = \"{EXCHANGE}/directory.toml\"\n{more}",
            end = self.end,
        );
        fs::write(self.exchange().join("router.toml"), configuration)?;
        let program = tree.program().display().to_string();
        let mut router =
            self.start(&format!("exec {program} router --config $EXCHANGE/router.toml"), LIFE)?;
        let start = Instant::now();
        while !self.start(&format!("{program} status"), SHORT)?.wait()?.succeeded() {
            if router.has_ended()? || start.elapsed() > SHORT {
                bail!("the router does not answer: {}{}", router.stdout(), router.stderr());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(router)
    }

    /// The words that run something in its container as a client of its router.
    pub fn in_container(&self, tree: &Tree, words: &str) -> String {
        format!("{ENTER} {} run -- {words}", tree.program().display())
    }
}
