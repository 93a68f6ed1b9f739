//! Promise: programs that meet by name (rdma_cm, rsocket) work unmodified, on one host and between two network
//! namespaces; the death of one end is told to the other.

mod common;

use std::process::ExitCode;

use anyhow::Result;
use common::{Stage, probe, programs};
use libtest_mimic::Trial;
use xtask::bed::Bed;

fn main() -> ExitCode {
    common::run("rdma_cm", common::no_tree().or(programs::no_tools()), || {
        let one = Stage::new(|| Bed::on_one_host(common::tree()?));
        let mut trials = programs::trials(&one, "one host");
        trials.extend(probe::checks(&one, |check| check.starts_with("rdma_cm ")));
        trials.extend(programs::endings(&one, "one host"));
        trials.extend(programs::perftest(&one, "one host"));
        if common::is_root() {
            let two = Stage::new(|| Bed::across_namespaces(common::tree()?));
            trials.extend(programs::trials(&two, "two namespaces"));
            trials.push(two.trial("rping by IPv6", rping_by_ipv6));
            trials.push(
                two.trial("an address of the other namespace cannot be bound", programs::foreign_address),
            );
        } else {
            trials.push(Trial::test("two namespaces", || {
                common::skip("two namespaces", "only root may make network namespaces");
                Ok(())
            }));
        }
        trials
    })
}

fn rping_by_ipv6(bed: &Bed) -> Result<()> {
    programs::tool(bed, "rping -s -a ::0 -p PORT -C 5 -V", "rping -c -a fd00:77::1 -p PORT -C 5 -V")
}
