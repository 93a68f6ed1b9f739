//! Promise: the connection manager answers and speaks as Linux does over Soft-RoCE, field by field.
//!
//! `tests/golden` holds decoded recordings of stock tools, one file for each end. They are replayed: each command is
//! given to the manager, and what it answers must be what was recorded. What a machine chooses (ids, ephemeral
//! ports, PSNs) may differ, but must differ in the same way everywhere.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "golden/line.rs"]
mod line;
#[path = "golden/player.rs"]
mod player;

use player::play;

#[test]
fn rping_connects_and_disconnects() {
    play("rping", &["rping.srv.326", "rping.cli.329"]);
}

#[test]
fn ucmatose_connects_and_disconnects() {
    play("ucmatose", &["ucmatose.srv.339", "ucmatose.cli.341"]);
}

#[test]
fn ids_migrate_between_channels() {
    play("migrate", &["migrate.srv.390", "migrate.cli.392"]);
}

#[test]
fn synchronous_ids_migrate_before_they_are_accepted() {
    play("rdma_server", &["rdma_server.srv.355", "rdma_server.cli.357"]);
}

#[test]
fn rsockets_connect_without_blocking() {
    play("rstream", &["rstream.srv.363", "rstream.cli.366"]);
}

#[test]
fn a_listener_elsewhere_is_no_listener() {
    play("reject", &["reject.srv.398", "reject.cli.400"]);
}

#[test]
fn perftest_connects_twice() {
    play("sendbwR", &["sendbwR.srv.374", "sendbwR.cli.376"]);
}

#[test]
fn datagrams_are_asked_for_and_accepted() {
    play("udaddy", &["udaddy.srv.347", "udaddy.cli.349"]);
}

#[test]
fn perftest_asks_for_datagrams_after_a_connection() {
    play("udsendbwR", &["udsendbwR.srv.382", "udsendbwR.cli.384"]);
}

#[test]
fn two_members_join_a_multicast_group() {
    play("mckey", &["mckey.srv.406", "mckey.cli.409"]);
}
