//! Compares every field and constant of `ffi.rs` with what the C compiler makes of rdma-core's headers: those that
//! this machine has installed, and those of the sources of release 55.
//!
//! `ffi.rs` asserts that it is what bindgen saw when it was generated; these tests assert that what it was generated
//! from is what a program is compiled with. The list and the C program come from `ffi.rs` by the root `build.rs`.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};

use libc::{pthread_cond_t, pthread_mutex_t, timespec};
use xtask::headers::Headers;

use crate::ffi::*;
use crate::ffi_private::PORT_ATTR_SIZE_V49;

/// Every item and what it comes to here: offsets, sizes and values.
#[rustfmt::skip]
const OURS: &[(&str, i64)] = include!(concat!(env!("OUT_DIR"), "/layout_items.rs"));
/// The program that prints the same for C.
const PROGRAM: &str = include_str!(concat!(env!("OUT_DIR"), "/layout_probe.c"));
/// What it printed where it was built, or `skipped: ` and why it could not be asked.
const INSTALLED: &str = include_str!(concat!(env!("OUT_DIR"), "/layout.txt"));
/// What release 44, from which `ffi.rs` is, declares at the least: fewer items would be a list that was misread.
const LEAST_ITEMS: usize = 1500;

/// What release 55 has appended: `wr_flush` to extended QPs (45), `active_speed_ex` to port attributes (49).
const APPENDED: [(&str, i64); 2] = [
    ("ibv_qp_ex size", size_of::<ibv_qp_ex>() as i64 + 8),
    ("ibv_port_attr size", PORT_ATTR_SIZE_V49 as i64),
];

/// Fails with all items that differ, but for those that are known to.
fn compare(printed: &str, known: &[(&str, i64)]) {
    let printed = printed.lines().map(|line| line.rsplit_once(' ').unwrap());
    let theirs: BTreeMap<&str, i64> = printed.map(|(item, number)| (item, number.parse().unwrap())).collect();
    assert!(theirs.len() > LEAST_ITEMS, "only {} items were compared", theirs.len());
    assert_eq!(theirs.len(), OURS.len());
    let known: BTreeMap<&str, i64> = known.iter().copied().collect();
    let differences: Vec<String> = OURS
        .iter()
        .map(|&(item, ours)| (item, known.get(item).copied().unwrap_or(ours), theirs.get(item)))
        .filter(|(_, ours, theirs)| Some(ours) != *theirs)
        .map(|(item, ours, theirs)| format!("{item}: {ours} here, {theirs:?} in C"))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_field_and_constant_is_that_of_the_installed_header() {
    if let Some(reason) = INSTALLED.strip_prefix("skipped: ") {
        print!("SKIP every_field_and_constant_is_that_of_the_installed_header: {reason}");
        return;
    }
    compare(INSTALLED, &[]);
}

#[test]
fn every_field_and_constant_is_that_of_release_55_but_for_what_it_appended() {
    let headers = match Headers::of_release_55() {
        Ok(headers) => headers,
        Err(error) => {
            println!("SKIP every_field_and_constant_is_that_of_release_55: {error:#}");
            return;
        }
    };
    compare(&headers.ask(PROGRAM).unwrap(), &APPENDED);
}
