//! The private layouts of libibverbs, release by release.
//!
//! The ops table that a provider fills, `verbs_context_ops`, is **kept sorted by member name**: a new op lands in
//! the middle and moves all that follow, and the private ABI number does not always change with it. What does
//! change each time is the newest public version node, so the pair (private ABI, newest node) names the layout.
//! A slot of the table is the rank of its op's name among the ops of that level. Layouts are said here as the ops
//! of release 25 and the changes since; offsets that never changed are constants.

use std::fmt;

macro_rules! ops {
    ($($op:ident $name:ident),* $(,)?) => {
        /// An op of `verbs_context_ops`, of any release; declared in the order of the C names.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs, reason = "the verbs man pages document them")]
        pub(crate) enum Op { $($op),* }

        impl Op {
            /// Every op, in the order of the C names.
            pub(crate) const ALL: &[Op] = &[$(Op::$op),*];

            /// The name of the member in C.
            pub(crate) fn name(self) -> &'static str {
                const NAMES: &[&str] = &[$(stringify!($name)),*];
                NAMES[self as usize]
            }
        }
    };
}

ops! {
        AdviseMr advise_mr, AllocBuf alloc_buf, AllocDm alloc_dm, AllocDmah alloc_dmah, AllocMw alloc_mw,
        AllocNullMr alloc_null_mr, AllocParentDomain alloc_parent_domain, AllocPd alloc_pd,
        AllocTd alloc_td, AsyncEvent async_event, AttachCountersPointFlow attach_counters_point_flow,
        AttachMcast attach_mcast, BindMw bind_mw, CloseXrcd close_xrcd, CqEvent cq_event,
        CreateAh create_ah, CreateCompCntr create_comp_cntr, CreateCounters create_counters,
        CreateCq create_cq, CreateCqEx create_cq_ex, CreateFlow create_flow,
        CreateFlowActionEsp create_flow_action_esp, CreateQp create_qp, CreateQpEx create_qp_ex,
        CreateRwqIndTable create_rwq_ind_table, CreateSrq create_srq, CreateSrqEx create_srq_ex,
        CreateWq create_wq, DeallocDmah dealloc_dmah, DeallocMw dealloc_mw, DeallocPd dealloc_pd,
        DeallocTd dealloc_td, DeregMr dereg_mr, DestroyAh destroy_ah, DestroyCompCntr destroy_comp_cntr,
        DestroyCounters destroy_counters, DestroyCq destroy_cq, DestroyFlow destroy_flow,
        DestroyFlowAction destroy_flow_action, DestroyQp destroy_qp,
        DestroyRwqIndTable destroy_rwq_ind_table, DestroySrq destroy_srq, DestroyWq destroy_wq,
        DetachMcast detach_mcast, DmExportDmabufFd dm_export_dmabuf_fd, FreeBuf free_buf,
        FreeContext free_context, FreeDm free_dm, GetSrqNum get_srq_num, ImportDm import_dm,
        ImportMr import_mr, ImportPd import_pd, IncCompCntr inc_comp_cntr, IncErrCompCntr inc_err_comp_cntr,
        ModifyCq modify_cq, ModifyFlowActionEsp modify_flow_action_esp, ModifyQp modify_qp,
        ModifyQpRateLimit modify_qp_rate_limit, ModifySrq modify_srq, ModifyWq modify_wq, OpenQp open_qp,
        OpenXrcd open_xrcd, PollCq poll_cq, PostRecv post_recv, PostSend post_send, PostSrqOps post_srq_ops,
        PostSrqRecv post_srq_recv, QpAttachCompCntr qp_attach_comp_cntr,
        QueryCompCntrCaps query_comp_cntr_caps, QueryDevice query_device, QueryDeviceEx query_device_ex,
        QueryEce query_ece, QueryPort query_port, QueryPortSpeed query_port_speed, QueryQp query_qp,
        QueryQpDataInOrder query_qp_data_in_order, QueryRtValues query_rt_values, QuerySrq query_srq,
        ReadCompCntr read_comp_cntr, ReadCounters read_counters, ReadErrCompCntr read_err_comp_cntr,
        RegDmMr reg_dm_mr, RegDmabufMr reg_dmabuf_mr, RegMr reg_mr, RegMrEx reg_mr_ex,
        ReqNotifyCq req_notify_cq, ReregMr rereg_mr, ResizeCq resize_cq, SetCompCntr set_comp_cntr,
        SetEce set_ece, SetErrCompCntr set_err_comp_cntr, UnimportDm unimport_dm, UnimportMr unimport_mr,
        UnimportPd unimport_pd,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A layout of the private ABI, named after the first rdma-core release that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    V25,
    V28,
    V31,
    V33,
    V34,
    V35,
    V36,
    V59,
    V62,
    V64,
    V65,
}

impl Level {
    /// The level of a libibverbs with this private ABI number and this newest node `IBVERBS_1.node`.
    pub(crate) fn of(private_abi: u32, node: u32) -> Option<Level> {
        Some(match (private_abi, node) {
            (25, 7) => Level::V25,
            (25, 8 | 9) => Level::V28,
            (25, 10 | 11) => Level::V31,
            (33, 11) => Level::V33,
            (34, 12) => Level::V34,
            (34, 13) => Level::V35,
            (34 | 57, 14) => Level::V36,
            (59, 15) => Level::V59,
            (59, 16) => Level::V62,
            (64, 17) => Level::V64,
            (65, 18) => Level::V65,
            _ => return None,
        })
    }

    /// The ops of this level, slot by slot.
    pub(crate) fn ops(self) -> impl Iterator<Item = Op> {
        Op::ALL.iter().copied().filter(move |&op| self.has(op))
    }

    /// Whether the ops table of this level has a slot for `op`.
    pub(crate) fn has(self, op: Op) -> bool {
        let added = ADDED.iter().find(|(_, ops)| ops.contains(&op)).map_or(Level::V25, |&(level, _)| level);
        added <= self && !(op == Op::QueryDevice && self >= QUERY_DEVICE_REMOVED)
    }

    /// The size of `verbs_context`, which grows at its front: the public `ibv_context` is always its end.
    pub(crate) fn context_size(self) -> usize {
        match self {
            Level::V59 => 672,
            Level::V62 => 680,
            Level::V64 | Level::V65 => 696,
            _ => 648,
        }
    }

    /// Whether `verbs_device_ops` has `free_context` after `alloc_context`; later it is one of the ops.
    pub(crate) fn device_frees_context(self) -> bool {
        self < Level::V28
    }

    /// Whether `verbs_device_ops` has `import_context` before `alloc_device`.
    pub(crate) fn device_imports_context(self) -> bool {
        self >= Level::V31
    }
}

/// The level from which on each op exists, for those that are younger than release 25.
const ADDED: &[(Level, &[Op])] = &[
    (Level::V28, &[Op::FreeContext]),
    (Level::V31, &[Op::ImportMr, Op::ImportPd, Op::QueryEce, Op::SetEce, Op::UnimportMr, Op::UnimportPd]),
    (Level::V34, &[Op::RegDmabufMr]),
    (Level::V35, &[Op::ImportDm, Op::UnimportDm]),
    (Level::V36, &[Op::QueryQpDataInOrder]),
    (Level::V59, &[Op::AllocDmah, Op::DeallocDmah, Op::RegMrEx]),
    (Level::V62, &[Op::DmExportDmabufFd, Op::QueryPortSpeed]),
    (Level::V64, &[Op::AllocBuf, Op::FreeBuf]),
    (
        Level::V65,
        &[
            Op::CreateCompCntr,
            Op::DestroyCompCntr,
            Op::IncCompCntr,
            Op::IncErrCompCntr,
            Op::QpAttachCompCntr,
            Op::QueryCompCntrCaps,
            Op::ReadCompCntr,
            Op::ReadErrCompCntr,
            Op::SetCompCntr,
            Op::SetErrCompCntr,
        ],
    ),
];

/// The one op that was ever removed went here: `query_device`, in favour of `query_device_ex`.
const QUERY_DEVICE_REMOVED: Level = Level::V33;

/// The private ABI numbers that have a level, newest first: a provider file needs a name for each.
pub(crate) const PRIVATE_ABIS: &[u32] = &[65, 64, 59, 57, 34, 33, 25];

/// More than the longest ops table has.
pub(crate) const MAX_OPS: usize = 128;

/// `verbs_sysfs_dev.sysfs_cdev`: the device number of the uverbs node. Nothing after `ibdev_path` may be read,
/// since later members moved between releases.
pub(crate) const SYSFS_DEV_CDEV: usize = 104;
/// `verbs_sysfs_dev.ibdev_name`, a string of at most 64 bytes.
pub(crate) const SYSFS_DEV_NAME: usize = 112;
/// `verbs_sysfs_dev.ibdev_path`, a string of at most 256 bytes: where its sysfs directory is.
pub(crate) const SYSFS_DEV_PATH: usize = 176;

/// Where `verbs_qp.comp_mask` may lie: until release 43, in 44, from 45 on. It changed inside one level, so
/// it is found by a probe (see [`super::library`]).
pub(crate) const QP_COMP_MASK: [usize; 3] = [344, 352, 360];
/// The bit of `verbs_qp.comp_mask` that says a QP has the extended post-send functions.
pub(crate) const VERBS_QP_EX: u32 = 1 << 1;

/// The ops that the public `ibv_context.ops` shows, slot by slot; `None` where libibverbs puts its own function.
/// A table that was laid out wrongly shows itself here.
pub(crate) const PUBLIC_OPS: [Option<Op>; 32] = [
    None, // query_device
    None, // query_port
    Some(Op::AllocPd),
    Some(Op::DeallocPd),
    Some(Op::RegMr),
    Some(Op::ReregMr),
    Some(Op::DeregMr),
    Some(Op::AllocMw),
    Some(Op::BindMw),
    Some(Op::DeallocMw),
    Some(Op::CreateCq),
    Some(Op::PollCq),
    Some(Op::ReqNotifyCq),
    Some(Op::CqEvent),
    Some(Op::ResizeCq),
    Some(Op::DestroyCq),
    Some(Op::CreateSrq),
    Some(Op::ModifySrq),
    Some(Op::QuerySrq),
    Some(Op::DestroySrq),
    Some(Op::PostSrqRecv),
    Some(Op::CreateQp),
    Some(Op::QueryQp),
    Some(Op::ModifyQp),
    Some(Op::DestroyQp),
    Some(Op::PostSend),
    Some(Op::PostRecv),
    Some(Op::CreateAh),
    Some(Op::DestroyAh),
    Some(Op::AttachMcast),
    Some(Op::DetachMcast),
    Some(Op::AsyncEvent),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The documented size of each level's ops table.
    const SIZES: [(Level, usize); 11] = [
        (Level::V25, 66),
        (Level::V28, 67),
        (Level::V31, 73),
        (Level::V33, 72),
        (Level::V34, 73),
        (Level::V35, 75),
        (Level::V36, 76),
        (Level::V59, 79),
        (Level::V62, 81),
        (Level::V64, 83),
        (Level::V65, 93),
    ];

    #[test]
    fn each_level_has_its_number_of_ops() {
        for (level, size) in SIZES {
            assert_eq!(level.ops().count(), size, "{level:?}");
            assert!(size <= MAX_OPS);
        }
    }

    #[test]
    fn ops_are_in_the_order_of_their_c_names() {
        assert!(Op::ALL.iter().is_sorted_by(|a, b| a.name() < b.name() && a < b));
    }

    #[test]
    fn slots_of_the_hot_ops_are_those_of_release_44() {
        let slot = |op| Level::V36.ops().position(|o| o == op);
        assert_eq!(slot(Op::AdviseMr), Some(0));
        assert_eq!(slot(Op::PollCq), Some(53));
        assert_eq!(slot(Op::PostSend), Some(55));
        assert_eq!(slot(Op::UnimportPd), Some(75));
        assert_eq!(slot(Op::QueryDevice), None);
    }

    #[test]
    fn a_level_is_known_by_both_numbers_only() {
        assert_eq!(Level::of(34, 14), Some(Level::V36));
        assert_eq!(Level::of(57, 14), Some(Level::V36));
        assert_eq!((Level::of(25, 11), Level::of(33, 11)), (Some(Level::V31), Some(Level::V33)));
        assert_eq!((Level::of(34, 15), Level::of(65, 19), Level::of(66, 18)), (None, None, None));
        assert!(PRIVATE_ABIS.iter().all(|&abi| (0..32).any(|node| Level::of(abi, node).is_some())));
    }
}
