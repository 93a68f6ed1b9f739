//! The private layouts against the C compiler's view of the sources of rdma-core 55, which no installed header shows.
//!
//! Each item is an expression of C and what it must come to here; one C program prints them all.

use std::mem::offset_of;

use verbs_abi::ffi::{ibv_srq, verbs_context};
use verbs_abi::ffi_private::{
    AsyncEventDesc, CMD_CREATE_COMP_CHANNEL, CONTEXT_TO_PRIV, CONTEXT_TO_SZ, CmdHdr, CompEventDesc,
    CreateCompChannel, CreateCompChannelResp, IBV_ACCESS_FLUSH_GLOBAL, IBV_ACCESS_FLUSH_PERSISTENT,
    IBV_QP_EX_WITH_FLUSH, IBV_WC_FLUSH, IBV_WR_FLUSH, MR_TYPE_MR, MR_TYPE_NULL_MR, VerbsMr,
};
use xtask::headers::Headers;

use super::{DEVICE_SIZE, DRIVER_UNKNOWN, DeviceOps, NO_MATCHES};
use crate::abi::layout::{
    Level, Op, PUBLIC_OPS, QP_COMP_MASK, SYSFS_DEV_CDEV, SYSFS_DEV_NAME, SYSFS_DEV_PATH, VERBS_QP_EX,
};
use crate::qp::QpObject;
use crate::srq;

/// The level of release 55, whose numbers are 34 and 14.
const LEVEL: Level = Level::V36;

/// The public ops that programs call through the table; the names of the others say that it is for old ones' sake.
const CALLED: [&str; 8] = [
    "poll_cq",
    "req_notify_cq",
    "post_srq_recv",
    "post_send",
    "post_recv",
    "alloc_mw",
    "bind_mw",
    "dealloc_mw",
];

/// What a C expression must come to.
struct Item {
    expression: String,
    ours: usize,
}

fn item(expression: impl Into<String>, ours: usize) -> Item {
    Item { expression: expression.into(), ours }
}

fn ops() -> Vec<Item> {
    let mut items = vec![item("sizeof(struct verbs_context_ops) / sizeof(void *)", LEVEL.ops().count())];
    for (slot, op) in LEVEL.ops().enumerate() {
        items.push(item(format!("offsetof(struct verbs_context_ops, {op}) / sizeof(void *)"), slot));
    }
    items.push(item("sizeof(struct ibv_context_ops) / sizeof(void *)", PUBLIC_OPS.len()));
    for (slot, op) in PUBLIC_OPS.iter().enumerate() {
        let Some(op) = op.map(Op::name) else { continue };
        let prefix = if CALLED.contains(&op) { "" } else { "_compat_" };
        items.push(item(format!("offsetof(struct ibv_context_ops, {prefix}{op}) / sizeof(void *)"), slot));
    }
    items
}

fn device() -> Vec<Item> {
    let field = |name: &str, ours| item(format!("offsetof(struct verbs_device_ops, {name})"), ours);
    let function = |rank: usize| offset_of!(DeviceOps, functions) + rank * size_of::<usize>();
    let sysfs = |name: &str, ours| item(format!("offsetof(struct verbs_sysfs_dev, {name})"), ours);
    vec![
        field("name", offset_of!(DeviceOps, name)),
        field("match_min_abi_version", offset_of!(DeviceOps, min_abi)),
        field("match_max_abi_version", offset_of!(DeviceOps, max_abi)),
        field("match_table", offset_of!(DeviceOps, match_table)),
        field("static_providers", offset_of!(DeviceOps, static_providers)),
        field("match_device", function(0)),
        field("alloc_context", function(1)),
        field("import_context", function(2)),
        field("alloc_device", function(3)),
        field("uninit_device", function(4)),
        item("VERBS_MATCH_SENTINEL", 0),
        item(fits("sizeof(struct verbs_match_ent)", size_of_val(&NO_MATCHES)), 1),
        item(fits("sizeof(struct verbs_device)", DEVICE_SIZE), 1),
        sysfs("sysfs_cdev", SYSFS_DEV_CDEV),
        sysfs("ibdev_name", SYSFS_DEV_NAME),
        sysfs("ibdev_path", SYSFS_DEV_PATH),
        item("RDMA_DRIVER_UNKNOWN", DRIVER_UNKNOWN as usize),
    ]
}

fn objects() -> Vec<Item> {
    let to_context = |name: &str| {
        format!("offsetof(struct verbs_context, context) - offsetof(struct verbs_context, {name})")
    };
    vec![
        item("sizeof(struct verbs_context)", LEVEL.context_size()),
        item("offsetof(struct verbs_context, context)", offset_of!(verbs_context, context)),
        item(to_context("sz"), CONTEXT_TO_SZ),
        item(to_context("priv"), CONTEXT_TO_PRIV),
        item("offsetof(struct verbs_qp, comp_mask)", QP_COMP_MASK[2]),
        item("VERBS_QP_EX", VERBS_QP_EX as usize),
        item(fits("sizeof(struct verbs_qp)", offset_of!(QpObject, public) + size_of::<[u64; 64]>()), 1),
        item(fits("sizeof(struct verbs_srq)", size_of::<ibv_srq>() + srq::ROOM * size_of::<u64>()), 1),
        item("sizeof(struct verbs_mr)", size_of::<VerbsMr>()),
        item("offsetof(struct verbs_mr, mr_type)", offset_of!(VerbsMr, mr_type)),
        item("offsetof(struct verbs_mr, access)", offset_of!(VerbsMr, access)),
        item("IBV_MR_TYPE_MR", MR_TYPE_MR as usize),
        item("IBV_MR_TYPE_NULL_MR", MR_TYPE_NULL_MR as usize),
    ]
}

/// What passes the hooks, and the constants that are younger than the header of `ffi.rs`.
fn words() -> Vec<Item> {
    vec![
        item("IB_USER_VERBS_CMD_CREATE_COMP_CHANNEL", CMD_CREATE_COMP_CHANNEL as usize),
        item("sizeof(struct ib_uverbs_cmd_hdr)", size_of::<CmdHdr>()),
        item("offsetof(struct ib_uverbs_cmd_hdr, in_words)", offset_of!(CmdHdr, in_words)),
        item("offsetof(struct ib_uverbs_cmd_hdr, out_words)", offset_of!(CmdHdr, out_words)),
        item(
            "sizeof(struct ib_uverbs_cmd_hdr) + offsetof(struct ib_uverbs_create_comp_channel, response)",
            offset_of!(CreateCompChannel, response),
        ),
        item("sizeof(struct ib_uverbs_create_comp_channel_resp)", size_of::<CreateCompChannelResp>()),
        item("sizeof(struct ib_uverbs_async_event_desc)", size_of::<AsyncEventDesc>()),
        item(
            "offsetof(struct ib_uverbs_async_event_desc, event_type)",
            offset_of!(AsyncEventDesc, event_type),
        ),
        item("sizeof(struct ib_uverbs_comp_event_desc)", size_of::<CompEventDesc>()),
        item("IBV_ACCESS_FLUSH_GLOBAL", IBV_ACCESS_FLUSH_GLOBAL as usize),
        item("IBV_ACCESS_FLUSH_PERSISTENT", IBV_ACCESS_FLUSH_PERSISTENT as usize),
        item("IBV_WR_FLUSH", IBV_WR_FLUSH as usize),
        item("IBV_WC_FLUSH", IBV_WC_FLUSH as usize),
        item("IBV_QP_EX_WITH_FLUSH", IBV_QP_EX_WITH_FLUSH as usize),
    ]
}

/// Whether a size of C's fits into the room that there is here.
fn fits(size: &str, room: usize) -> String {
    format!("{size} <= {room}")
}

fn program(items: &[Item]) -> String {
    let show = |item: &Item| format!("\tprintf(\"%lld\\n\", (long long)({}));\n", item.expression);
    let body: String = items.iter().map(show).collect();
    // The header of the kernel's commands needs files that a build generates; the structures themselves do not.
    format!(
        "#define KERN_ABI_H\n#include <stddef.h>\n#include <stdio.h>\n#include <rdma/ib_user_verbs.h>\n\
         #include <infiniband/driver.h>\n#include <rdma/rdma_user_ioctl_cmds.h>\n\nint main(void)\n{{\n{body}\treturn 0;\n}}\n"
    )
}

#[test]
fn private_layouts_are_those_of_the_sources_of_release_55() {
    let headers = match Headers::of_release_55() {
        Ok(headers) => headers,
        Err(error) => {
            println!("SKIP private_layouts_are_those_of_the_sources_of_release_55: {error:#}");
            return;
        }
    };
    let items: Vec<Item> = [ops(), device(), objects(), words()].into_iter().flatten().collect();
    let printed = headers.ask(&program(&items)).unwrap();
    let theirs: Vec<usize> = printed.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(theirs.len(), items.len());
    let differing = items.iter().zip(&theirs).filter(|(item, theirs)| item.ours != **theirs);
    let differing: Vec<String> = differing
        .map(|(item, theirs)| format!("{}: {} here, {theirs} in C", item.expression, item.ours))
        .collect();
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}
