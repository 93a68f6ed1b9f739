//! What `ibv_query_device` and `ibv_query_port` say.

use std::ffi::c_char;

use verbs_abi::ffi;
use verbs_abi::proto::Welcome;
use verbs_abi::shm::wqe;

use crate::abi::library::Verbs;
use crate::clock;
use crate::dm;
use crate::gid::TABLE_LEN;
use crate::moderation;

/// Reads and atomics that a QP may have outstanding, either way.
const MAX_RD_ATOM: i32 = 16;
/// An MR can span what a process can address.
const MAX_MR_SIZE: u64 = 1 << 47;
/// Page sizes from 4 KiB up.
const PAGE_SIZE_CAP: u64 = 0xffff_f000;
/// The longest message.
const MAX_MESSAGE: u32 = 1 << 30;
/// 4 lanes of 25 Gbit/s: the codes of `ibv_devinfo`. Some programs refuse a port without a rate.
const WIDTH_4X: u8 = 2;
const SPEED_25G: u8 = 32;
/// What devices without an OUI of their own say.
pub(crate) const VENDOR: u32 = 0xff_ffff;
/// A part number that perftest knows (it looks at the number alone): on others it silently drops inline data and the
/// extended post-send interface. No program can take it for the real part, whose vendor id it lacks.
const PART: u32 = 4119;
/// Another one, with which perftest knows inline data alone, for rdma-core 45 and newer: beside those there are
/// releases of perftest (24.10 to 25.04, Debian 13's among them) that ask every device on which they use the extended
/// interface for a feature of one vendor, and give up.
const PART_SINCE_45: u32 = 1824;
/// `IBV_PORT_PHYS_STATE_LINK_UP`.
const LINK_UP: u8 = 5;
/// `IBV_QPF_GRH_REQUIRED`, in a header of rdma-core that is not installed.
const GRH_REQUIRED: u8 = 1;

/// The attributes of the device whose router said `welcome`.
pub(crate) fn device(welcome: &Welcome) -> ffi::ibv_device_attr_ex {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut all: ffi::ibv_device_attr_ex = unsafe { std::mem::zeroed() };
    let attr = &mut all.orig_attr;
    let version = concat!("freeflow-", env!("CARGO_PKG_VERSION"));
    for (to, from) in attr.fw_ver.iter_mut().zip(version.bytes()) {
        *to = from as c_char;
    }
    let limit = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    attr.node_guid = u64::from_ne_bytes(welcome.guid);
    attr.sys_image_guid = attr.node_guid;
    attr.max_mr_size = welcome.limits.max_mr_size.min(MAX_MR_SIZE);
    attr.page_size_cap = PAGE_SIZE_CAP;
    attr.vendor_id = VENDOR;
    let since_45 = Verbs::loaded().ok().flatten().is_some_and(Verbs::is_45_or_newer);
    attr.vendor_part_id = if since_45 { PART_SINCE_45 } else { PART };
    attr.max_qp = limit(welcome.limits.max_qp);
    attr.max_qp_wr = limit(wqe::MAX_WR);
    attr.device_cap_flags = ffi::IBV_DEVICE_CURR_QP_STATE_MOD
        | ffi::IBV_DEVICE_PORT_ACTIVE_EVENT
        | ffi::IBV_DEVICE_SYS_IMAGE_GUID
        | ffi::IBV_DEVICE_RC_RNR_NAK_GEN
        | ffi::IBV_DEVICE_MEM_WINDOW
        | ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2B
        | ffi::IBV_DEVICE_XRC
        | ffi::IBV_DEVICE_SRQ_RESIZE;
    attr.max_srq = attr.max_qp;
    attr.max_srq_wr = limit(wqe::MAX_WR);
    attr.max_srq_sge = limit(wqe::MAX_SGE as u32);
    attr.max_mw = limit(welcome.limits.max_mr);
    attr.max_sge = wqe::MAX_SGE as i32;
    attr.max_sge_rd = wqe::MAX_SGE as i32;
    attr.max_cq = limit(welcome.limits.max_cq);
    attr.max_cqe = limit(welcome.limits.max_cqe);
    attr.max_mr = limit(welcome.limits.max_mr);
    attr.max_pd = limit(welcome.limits.max_pd);
    attr.max_qp_rd_atom = MAX_RD_ATOM;
    attr.max_res_rd_atom = attr.max_qp.saturating_mul(MAX_RD_ATOM);
    attr.max_qp_init_rd_atom = MAX_RD_ATOM;
    // Atomics are executed by the processor's own, so they are atomic towards its loads and stores, too. That would be GLOB, but
    // programs take it for atomics of PCI Express alone (UCX), and so for none.
    attr.atomic_cap = ffi::IBV_ATOMIC_HCA;
    attr.max_ah = i32::MAX;
    attr.max_mcast_grp = limit(welcome.limits.max_mcast);
    attr.max_mcast_qp_attach = attr.max_qp;
    attr.max_total_mcast_qp_attach = attr.max_mcast_grp;
    attr.max_pkeys = 1;
    attr.local_ca_ack_delay = 15;
    attr.phys_port_cnt = 1;
    all.device_cap_flags_ex = u64::from(all.orig_attr.device_cap_flags);
    all.phys_port_cnt_ex = 1;
    all.hca_core_clock = clock::FREQUENCY;
    all.completion_timestamp_mask = u64::MAX;
    all.max_dm_size = dm::MAX_TOTAL;
    all.packet_pacing_caps = ffi::ibv_packet_pacing_caps {
        qp_rate_limit_min: 1,
        qp_rate_limit_max: engine::MAX_RATE,
        supported_qpts: [ffi::IBV_QPT_RC, ffi::IBV_QPT_UC, ffi::IBV_QPT_UD, ffi::IBV_QPT_XRC_SEND]
            .map(|kind| 1 << kind)
            .into_iter()
            .sum(),
    };
    all.cq_mod_caps =
        ffi::ibv_cq_moderation_caps { max_cq_count: moderation::MAX, max_cq_period: moderation::MAX };
    on_demand(&mut all);
    all
}

/// Every transport finds pages on demand, for whatever it does.
fn on_demand(all: &mut ffi::ibv_device_attr_ex) {
    let messages = ffi::IBV_ODP_SUPPORT_SEND | ffi::IBV_ODP_SUPPORT_RECV | ffi::IBV_ODP_SUPPORT_SRQ_RECV;
    let remote = ffi::IBV_ODP_SUPPORT_WRITE | ffi::IBV_ODP_SUPPORT_READ | ffi::IBV_ODP_SUPPORT_ATOMIC;
    all.odp_caps.general_caps = u64::from(ffi::IBV_ODP_SUPPORT | ffi::IBV_ODP_SUPPORT_IMPLICIT);
    let caps = &mut all.odp_caps.per_transport_caps;
    caps.rc_odp_caps = messages | remote;
    caps.uc_odp_caps = messages | ffi::IBV_ODP_SUPPORT_WRITE;
    caps.ud_odp_caps = messages;
    all.xrc_odp_caps = messages | remote;
}

/// Fills in the attributes of the port. Only the fields of release 25 are touched: the structure has grown since.
///
/// # Safety
/// `attr` must be writable for the fields of [`ffi::ibv_port_attr`].
pub(crate) unsafe fn port(attr: *mut ffi::ibv_port_attr) {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut port: ffi::ibv_port_attr = unsafe { std::mem::zeroed() };
    port.state = ffi::IBV_PORT_ACTIVE;
    port.max_mtu = ffi::IBV_MTU_4096;
    port.active_mtu = ffi::IBV_MTU_4096;
    port.gid_tbl_len = TABLE_LEN as i32;
    port.port_cap_flags = ffi::IBV_PORT_CM_SUP | ffi::IBV_PORT_IP_BASED_GIDS;
    port.max_msg_sz = MAX_MESSAGE;
    port.pkey_tbl_len = 1;
    port.max_vl_num = 1;
    port.subnet_timeout = 18;
    port.active_width = WIDTH_4X;
    port.active_speed = SPEED_25G;
    port.phys_state = LINK_UP;
    port.link_layer = ffi::IBV_LINK_LAYER_ETHERNET as u8;
    port.flags = GRH_REQUIRED;
    // SAFETY: the caller's promise.
    unsafe { attr.write(port) }
}
