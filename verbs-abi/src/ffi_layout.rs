//! Compares the layouts of `ffi.rs` with those that this machine's C compiler gives to its `infiniband/verbs.h`.
//!
//! `ffi.rs` asserts that it is what bindgen saw when it was generated; this test asserts that what it was generated
//! from is what is installed here. The other half is in `layout_probe.c`, run by the root `build.rs`.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};

use crate::ffi::*;

/// What the C compiler says, or `skipped: ` and why it could not be asked.
const PROBED: &str = include_str!(concat!(env!("OUT_DIR"), "/layout.txt"));

/// The layout of each structure, by the names that the probe prints.
fn ours() -> BTreeMap<String, usize> {
    let mut layout = BTreeMap::new();
    macro_rules! layout {
        ($($type:ident { $($($field:ident).+);* })+) => {
            $(
                layout.insert(concat!(stringify!($type), " size").to_owned(), size_of::<$type>());
                $(layout.insert(
                    format!("{} {}", stringify!($type), c_path(&[$(stringify!($field)),+])),
                    offset_of!($type, $($field).+),
                );)*
            )+
        };
    }
    layout! {
        ibv_device { name; dev_name; dev_path }
        ibv_context_ops { poll_cq; req_notify_cq; post_srq_recv; post_send; post_recv }
        ibv_context { device; ops; cmd_fd; async_fd; num_comp_vectors; mutex; abi_compat }
        ibv_pd {}
        ibv_mr { addr; length; lkey; rkey }
        ibv_mw {}
        ibv_ah {}
        ibv_comp_channel { fd; refcnt }
        ibv_cq { channel; cqe; mutex; cond; comp_events_completed }
        ibv_cq_ex { comp_mask; status; wr_id; start_poll; read_completion_wallclock_ns }
        ibv_cq_init_attr_ex {}
        ibv_qp { qp_num; state; qp_type; mutex; events_completed }
        ibv_qp_ex { comp_mask; wr_id; wr_flags; wr_atomic_cmp_swp; wr_send; wr_abort }
        ibv_srq { mutex; events_completed }
        ibv_wc { status; byte_len; __bindgen_anon_1.imm_data; qp_num; wc_flags; dlid_path_bits }
        ibv_sge { lkey }
        ibv_send_wr { sg_list; opcode; __bindgen_anon_1.imm_data; wr.rdma.rkey; wr.atomic.swap; wr.ud.remote_qkey; __bindgen_anon_2.bind_mw.bind_info }
        ibv_recv_wr {}
        ibv_mw_bind {}
        ibv_async_event {}
        ibv_grh {}
        ibv_device_attr { max_mr_size; atomic_cap; phys_port_cnt }
        ibv_device_attr_ex { odp_caps; completion_timestamp_mask; tm_caps }
        ibv_port_attr { gid_tbl_len; link_layer; port_cap_flags2 }
        ibv_ah_attr { is_global; port_num }
        ibv_qp_cap {}
        ibv_qp_init_attr { cap; sq_sig_all }
        ibv_qp_init_attr_ex { comp_mask; pd }
        ibv_qp_attr { ah_attr; alt_ah_attr; min_rnr_timer; rate_limit }
        ibv_srq_init_attr {}
    }
    layout
}

/// The path of a field as C has it: what bindgen named for want of a name is left out.
fn c_path(fields: &[&str]) -> String {
    let named: Vec<_> = fields.iter().filter(|field| !field.starts_with("__bindgen_anon")).copied().collect();
    named.join(".")
}

#[test]
fn every_layout_is_that_of_the_c_compiler() {
    if PROBED.starts_with("skipped: ") {
        // Past the harness's capture: a comparison that did not happen is not to look like one that did.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), PROBED.as_bytes());
        return;
    }
    let ours = ours();
    for line in PROBED.lines() {
        let (name, number) = line.rsplit_once(' ').unwrap();
        assert_eq!(ours.get(name), Some(&number.parse().unwrap()), "{name}");
    }
    assert!(PROBED.lines().count() > 100, "the probe printed {} lines only", PROBED.lines().count());
}
