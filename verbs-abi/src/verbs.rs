//! The words of verbs: QP types and states, opcodes, statuses, flags. Their numbers are those of the C interface.
//!
//! What may follow what is told elsewhere ([`crate::qp_state`]); here are only facts of a single word.

use crate::ffi;
use crate::ffi_private as private;
pub use crate::words::{UnknownBits, UnknownValue};
use crate::words::{flag_word, value_word};

value_word! {
    /// The transport service of a QP.
    QpType, "QP type" {
        /// Reliable connection.
        Rc = ffi::IBV_QPT_RC, "RC";
        /// Unreliable connection.
        Uc = ffi::IBV_QPT_UC, "UC";
        /// Unreliable datagram.
        Ud = ffi::IBV_QPT_UD, "UD";
        /// Raw Ethernet frames.
        RawPacket = ffi::IBV_QPT_RAW_PACKET, "RAW_PACKET";
        /// The sending half of an extended reliable connection.
        XrcSend = ffi::IBV_QPT_XRC_SEND, "XRC_SEND";
        /// The receiving half of an extended reliable connection.
        XrcRecv = ffi::IBV_QPT_XRC_RECV, "XRC_RECV";
    }
}

impl QpType {
    /// Whether a QP of this type talks to one peer that is named when it goes to RTR.
    #[must_use]
    pub const fn is_connected(self) -> bool {
        !matches!(self, Self::Ud | Self::RawPacket)
    }

    /// Whether requests are acknowledged and repeated.
    #[must_use]
    pub const fn is_reliable(self) -> bool {
        matches!(self, Self::Rc | Self::XrcSend | Self::XrcRecv)
    }
}

value_word! {
    /// The state of a QP.
    QpState, "QP state" {
        /// As created: nothing may be posted.
        Reset = ffi::IBV_QPS_RESET, "RESET";
        /// Receives may be posted.
        Init = ffi::IBV_QPS_INIT, "INIT";
        /// Ready to receive.
        Rtr = ffi::IBV_QPS_RTR, "RTR";
        /// Ready to send.
        Rts = ffi::IBV_QPS_RTS, "RTS";
        /// The send queue is being drained, or is.
        Sqd = ffi::IBV_QPS_SQD, "SQD";
        /// The send queue met an error (UC and UD).
        Sqe = ffi::IBV_QPS_SQE, "SQE";
        /// Whatever is posted is flushed.
        Err = ffi::IBV_QPS_ERR, "ERR";
    }
}

impl QpState {
    /// Whether a receive may be posted.
    #[must_use]
    pub const fn may_post_recv(self) -> bool {
        !matches!(self, Self::Reset)
    }

    /// Whether a send may be posted (in SQE and ERR it will be flushed, in SQD it waits).
    #[must_use]
    pub const fn may_post_send(self) -> bool {
        matches!(self, Self::Rts | Self::Sqd | Self::Sqe | Self::Err)
    }

    /// Whether requests of the peer are executed.
    #[must_use]
    pub const fn may_respond(self) -> bool {
        matches!(self, Self::Rtr | Self::Rts | Self::Sqd | Self::Sqe)
    }
}

value_word! {
    /// The operation of a send work request.
    Opcode, "work request opcode" {
        /// RDMA WRITE.
        Write = ffi::IBV_WR_RDMA_WRITE, "RDMA_WRITE";
        /// RDMA WRITE that consumes a receive and carries immediate data.
        WriteWithImm = ffi::IBV_WR_RDMA_WRITE_WITH_IMM, "RDMA_WRITE_WITH_IMM";
        /// SEND.
        Send = ffi::IBV_WR_SEND, "SEND";
        /// SEND with immediate data.
        SendWithImm = ffi::IBV_WR_SEND_WITH_IMM, "SEND_WITH_IMM";
        /// RDMA READ.
        Read = ffi::IBV_WR_RDMA_READ, "RDMA_READ";
        /// Compare and swap of eight bytes.
        CmpAndSwp = ffi::IBV_WR_ATOMIC_CMP_AND_SWP, "ATOMIC_CMP_AND_SWP";
        /// Fetch and add of eight bytes.
        FetchAndAdd = ffi::IBV_WR_ATOMIC_FETCH_AND_ADD, "ATOMIC_FETCH_AND_ADD";
        /// Invalidation of an own MW or MR.
        LocalInv = ffi::IBV_WR_LOCAL_INV, "LOCAL_INV";
        /// Binding of a type 2 MW.
        BindMw = ffi::IBV_WR_BIND_MW, "BIND_MW";
        /// SEND that invalidates an rkey of the receiver.
        SendWithInv = ffi::IBV_WR_SEND_WITH_INV, "SEND_WITH_INV";
        /// Segmentation of a large TCP frame.
        Tso = ffi::IBV_WR_TSO, "TSO";
        /// Making earlier writes visible or persistent at the peer.
        Flush = private::IBV_WR_FLUSH, "FLUSH";
        /// An eight-byte write in one piece, after all that was written before.
        AtomicWrite = ffi::IBV_WR_ATOMIC_WRITE, "ATOMIC_WRITE";
    }
}

impl Opcode {
    /// The opcode of the completion that this work request gets.
    #[must_use]
    pub const fn wc_opcode(self) -> WcOpcode {
        match self {
            Self::Write | Self::WriteWithImm => WcOpcode::RdmaWrite,
            Self::Send | Self::SendWithImm | Self::SendWithInv => WcOpcode::Send,
            Self::Read => WcOpcode::RdmaRead,
            Self::CmpAndSwp => WcOpcode::CompSwap,
            Self::FetchAndAdd => WcOpcode::FetchAdd,
            Self::LocalInv => WcOpcode::LocalInv,
            Self::BindMw => WcOpcode::BindMw,
            Self::Tso => WcOpcode::Tso,
            Self::Flush => WcOpcode::Flush,
            Self::AtomicWrite => WcOpcode::AtomicWrite,
        }
    }

    /// Whether the transport service of `qp_type` has this operation, as `ibv_post_send(3)` tables it.
    #[must_use]
    pub const fn allowed_on(self, qp_type: QpType) -> bool {
        match self {
            Self::Send => !matches!(qp_type, QpType::XrcRecv),
            Self::SendWithImm => !matches!(qp_type, QpType::XrcRecv | QpType::RawPacket),
            Self::Write | Self::WriteWithImm | Self::LocalInv | Self::BindMw | Self::SendWithInv => {
                matches!(qp_type, QpType::Rc | QpType::Uc | QpType::XrcSend)
            }
            Self::Read | Self::CmpAndSwp | Self::FetchAndAdd | Self::Flush | Self::AtomicWrite => {
                matches!(qp_type, QpType::Rc | QpType::XrcSend)
            }
            Self::Tso => matches!(qp_type, QpType::Ud | QpType::RawPacket),
        }
    }

    /// Whether the work request carries four bytes of immediate data.
    #[must_use]
    pub const fn has_imm(self) -> bool {
        matches!(self, Self::SendWithImm | Self::WriteWithImm)
    }

    /// Whether the peer must have posted a receive.
    #[must_use]
    pub const fn consumes_recv(self) -> bool {
        matches!(self, Self::Send | Self::SendWithImm | Self::SendWithInv | Self::WriteWithImm)
    }

    /// Whether it reads, compares and writes eight bytes of the peer in one step.
    #[must_use]
    pub const fn is_atomic(self) -> bool {
        matches!(self, Self::CmpAndSwp | Self::FetchAndAdd)
    }

    /// Whether it concerns the requester's own keys alone.
    #[must_use]
    pub const fn is_local(self) -> bool {
        matches!(self, Self::BindMw | Self::LocalInv)
    }

    /// Whether its scatter list is written by what comes back: such an operation may not be inline.
    #[must_use]
    pub const fn writes_locally(self) -> bool {
        matches!(self, Self::Read | Self::CmpAndSwp | Self::FetchAndAdd)
    }
}

value_word! {
    /// How a work request ended.
    WcStatus, "work completion status" {
        /// As asked.
        Success = ffi::IBV_WC_SUCCESS, "success";
        /// The message does not fit the receive, or the SGEs are longer than a message may be.
        LocLenErr = ffi::IBV_WC_LOC_LEN_ERR, "local length error";
        /// The QP cannot do this operation.
        LocQpOpErr = ffi::IBV_WC_LOC_QP_OP_ERR, "local QP operation error";
        /// Of RD only.
        LocEecOpErr = ffi::IBV_WC_LOC_EEC_OP_ERR, "local EE context operation error";
        /// An SGE is not covered by its lkey.
        LocProtErr = ffi::IBV_WC_LOC_PROT_ERR, "local protection error";
        /// The QP was in ERR before this work request was done.
        WrFlushErr = ffi::IBV_WC_WR_FLUSH_ERR, "work request flushed error";
        /// An MW could not be bound.
        MwBindErr = ffi::IBV_WC_MW_BIND_ERR, "memory bind operation error";
        /// The peer's answer made no sense.
        BadRespErr = ffi::IBV_WC_BAD_RESP_ERR, "bad response error";
        /// A write with immediate data met a protection error at this side.
        LocAccessErr = ffi::IBV_WC_LOC_ACCESS_ERR, "local access error";
        /// The peer found the request invalid.
        RemInvReqErr = ffi::IBV_WC_REM_INV_REQ_ERR, "remote invalid request error";
        /// The peer's memory may not be accessed so.
        RemAccessErr = ffi::IBV_WC_REM_ACCESS_ERR, "remote access error";
        /// The peer could not complete the operation.
        RemOpErr = ffi::IBV_WC_REM_OP_ERR, "remote operation error";
        /// The peer did not answer.
        RetryExcErr = ffi::IBV_WC_RETRY_EXC_ERR, "transport retry counter exceeded";
        /// The peer had no receive posted.
        RnrRetryExcErr = ffi::IBV_WC_RNR_RETRY_EXC_ERR, "RNR retry counter exceeded";
        /// Of RD only.
        LocRddViolErr = ffi::IBV_WC_LOC_RDD_VIOL_ERR, "local RDD violation error";
        /// Of RD only.
        RemInvRdReqErr = ffi::IBV_WC_REM_INV_RD_REQ_ERR, "remote invalid RD request";
        /// The peer aborted the operation.
        RemAbortErr = ffi::IBV_WC_REM_ABORT_ERR, "aborted error";
        /// Of RD only.
        InvEecnErr = ffi::IBV_WC_INV_EECN_ERR, "invalid EE context number";
        /// Of RD only.
        InvEecStateErr = ffi::IBV_WC_INV_EEC_STATE_ERR, "invalid EE context state";
        /// The device failed.
        FatalErr = ffi::IBV_WC_FATAL_ERR, "fatal error";
        /// The response did not come in time.
        RespTimeoutErr = ffi::IBV_WC_RESP_TIMEOUT_ERR, "response timeout error";
        /// Anything else.
        GeneralErr = ffi::IBV_WC_GENERAL_ERR, "general error";
        /// A tag matching error.
        TmErr = ffi::IBV_WC_TM_ERR, "TM error";
        /// A tag matching rendezvous that the software must complete.
        TmRndvIncomplete = ffi::IBV_WC_TM_RNDV_INCOMPLETE, "TM software rendezvous";
    }
}

value_word! {
    /// What completed.
    WcOpcode, "work completion opcode" {
        /// A SEND of any kind.
        Send = ffi::IBV_WC_SEND, "SEND";
        /// An RDMA WRITE of either kind, at the requester.
        RdmaWrite = ffi::IBV_WC_RDMA_WRITE, "RDMA_WRITE";
        /// An RDMA READ.
        RdmaRead = ffi::IBV_WC_RDMA_READ, "RDMA_READ";
        /// A compare and swap.
        CompSwap = ffi::IBV_WC_COMP_SWAP, "COMP_SWAP";
        /// A fetch and add.
        FetchAdd = ffi::IBV_WC_FETCH_ADD, "FETCH_ADD";
        /// A memory window was bound.
        BindMw = ffi::IBV_WC_BIND_MW, "BIND_MW";
        /// A local invalidation.
        LocalInv = ffi::IBV_WC_LOCAL_INV, "LOCAL_INV";
        /// A segmented TCP frame.
        Tso = ffi::IBV_WC_TSO, "TSO";
        /// A FLUSH.
        Flush = private::IBV_WC_FLUSH, "FLUSH";
        /// An ATOMIC WRITE.
        AtomicWrite = ffi::IBV_WC_ATOMIC_WRITE, "ATOMIC_WRITE";
        /// A receive, filled by a SEND of any kind.
        Recv = ffi::IBV_WC_RECV, "RECV";
        /// A receive, consumed by an RDMA WRITE with immediate data.
        RecvRdmaWithImm = ffi::IBV_WC_RECV_RDMA_WITH_IMM, "RECV_RDMA_WITH_IMM";
    }
}

value_word! {
    /// The path MTU, as a code.
    Mtu, "MTU" {
        /// 256 bytes.
        Mtu256 = ffi::IBV_MTU_256, "256";
        /// 512 bytes.
        Mtu512 = ffi::IBV_MTU_512, "512";
        /// 1024 bytes.
        Mtu1024 = ffi::IBV_MTU_1024, "1024";
        /// 2048 bytes.
        Mtu2048 = ffi::IBV_MTU_2048, "2048";
        /// 4096 bytes.
        Mtu4096 = ffi::IBV_MTU_4096, "4096";
    }
}

impl Mtu {
    /// How many bytes of payload a packet holds.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        128 << self.value()
    }
}

value_word! {
    /// The state of path migration.
    MigState, "path migration state" {
        /// The path in use is the primary one; what a QP starts with.
        Migrated = ffi::IBV_MIG_MIGRATED, "MIGRATED";
        /// The alternate path is being armed.
        Rearm = ffi::IBV_MIG_REARM, "REARM";
        /// The alternate path may be taken.
        Armed = ffi::IBV_MIG_ARMED, "ARMED";
    }
}

value_word! {
    /// What an async event tells.
    EventType, "async event type" {
        /// A CQ overran.
        CqErr = ffi::IBV_EVENT_CQ_ERR, "CQ error";
        /// A QP failed without a completion to say so.
        QpFatal = ffi::IBV_EVENT_QP_FATAL, "local work queue catastrophic error";
        /// The peer's request was invalid.
        QpReqErr = ffi::IBV_EVENT_QP_REQ_ERR, "invalid request local work queue error";
        /// The peer's request violated protection.
        QpAccessErr = ffi::IBV_EVENT_QP_ACCESS_ERR, "local access violation work queue error";
        /// The first message came in RTR.
        CommEst = ffi::IBV_EVENT_COMM_EST, "communication established";
        /// The send queue is drained.
        SqDrained = ffi::IBV_EVENT_SQ_DRAINED, "send queue drained";
        /// The path migrated.
        PathMig = ffi::IBV_EVENT_PATH_MIG, "path migrated";
        /// The path could not migrate.
        PathMigErr = ffi::IBV_EVENT_PATH_MIG_ERR, "path migration request error";
        /// The device is lost.
        DeviceFatal = ffi::IBV_EVENT_DEVICE_FATAL, "local catastrophic error";
        /// The port came up.
        PortActive = ffi::IBV_EVENT_PORT_ACTIVE, "port active";
        /// The port went down.
        PortErr = ffi::IBV_EVENT_PORT_ERR, "port error";
        /// The port's LID changed.
        LidChange = ffi::IBV_EVENT_LID_CHANGE, "LID change";
        /// The port's pkey table changed.
        PkeyChange = ffi::IBV_EVENT_PKEY_CHANGE, "P_Key change";
        /// The subnet manager changed.
        SmChange = ffi::IBV_EVENT_SM_CHANGE, "SM change";
        /// An SRQ failed.
        SrqErr = ffi::IBV_EVENT_SRQ_ERR, "SRQ catastrophic error";
        /// An SRQ went below its limit.
        SrqLimitReached = ffi::IBV_EVENT_SRQ_LIMIT_REACHED, "SRQ limit reached";
        /// A QP in ERR will take nothing more from its SRQ.
        QpLastWqeReached = ffi::IBV_EVENT_QP_LAST_WQE_REACHED, "last WQE reached";
        /// The subnet manager asks to register anew.
        ClientReregister = ffi::IBV_EVENT_CLIENT_REREGISTER, "client reregistration";
        /// The port's GID table changed.
        GidChange = ffi::IBV_EVENT_GID_CHANGE, "GID table change";
        /// A WQ failed.
        WqFatal = ffi::IBV_EVENT_WQ_FATAL, "WQ catastrophic error";
    }
}

flag_word! {
    /// What may be done to an MR, or through a QP. Optional flags that are not known are dropped.
    AccessFlags, "access flags", ignored private::IBV_ACCESS_OPTIONAL_RANGE, {
        /// The owner's receives, reads and atomics may write here.
        LOCAL_WRITE = ffi::IBV_ACCESS_LOCAL_WRITE;
        /// A peer may write.
        REMOTE_WRITE = ffi::IBV_ACCESS_REMOTE_WRITE;
        /// A peer may read.
        REMOTE_READ = ffi::IBV_ACCESS_REMOTE_READ;
        /// A peer may execute atomics.
        REMOTE_ATOMIC = ffi::IBV_ACCESS_REMOTE_ATOMIC;
        /// MWs may be bound to the MR.
        MW_BIND = ffi::IBV_ACCESS_MW_BIND;
        /// Addresses count from the start of the MR.
        ZERO_BASED = ffi::IBV_ACCESS_ZERO_BASED;
        /// Pages are found when they are accessed.
        ON_DEMAND = ffi::IBV_ACCESS_ON_DEMAND;
        /// The MR lies in huge pages.
        HUGETLB = ffi::IBV_ACCESS_HUGETLB;
        /// A FLUSH to global visibility may name it.
        FLUSH_GLOBAL = private::IBV_ACCESS_FLUSH_GLOBAL;
        /// A FLUSH to persistence may name it.
        FLUSH_PERSISTENT = private::IBV_ACCESS_FLUSH_PERSISTENT;
        /// Writes may become visible in any order.
        RELAXED_ORDERING = ffi::IBV_ACCESS_RELAXED_ORDERING;
    }
}

impl AccessFlags {
    /// Whether an MR may be registered so: what a peer may write, the owner must be allowed to write.
    #[must_use]
    pub const fn valid_for_mr(self) -> bool {
        !self.intersects(Self::REMOTE_WRITE.union(Self::REMOTE_ATOMIC)) || self.contains(Self::LOCAL_WRITE)
    }
}

flag_word! {
    /// How a send work request is to be executed.
    SendFlags, "send flags", ignored 0, {
        /// Wait for all earlier reads and atomics.
        FENCE = ffi::IBV_SEND_FENCE;
        /// Make a completion.
        SIGNALED = ffi::IBV_SEND_SIGNALED;
        /// Make the receiver's completion a solicited one.
        SOLICITED = ffi::IBV_SEND_SOLICITED;
        /// The payload is copied when the work request is posted.
        INLINE = ffi::IBV_SEND_INLINE;
        /// Compute IP checksums.
        IP_CSUM = ffi::IBV_SEND_IP_CSUM;
    }
}

flag_word! {
    /// What a completion says beside its numbers.
    WcFlags, "work completion flags", ignored 0, {
        /// The receive begins with 40 bytes of GRH.
        GRH = ffi::IBV_WC_GRH;
        /// The immediate data is valid.
        WITH_IMM = ffi::IBV_WC_WITH_IMM;
        /// The checksums were right.
        IP_CSUM_OK = ffi::IBV_WC_IP_CSUM_OK;
        /// The invalidated rkey is valid.
        WITH_INV = ffi::IBV_WC_WITH_INV;
    }
}

flag_word! {
    /// Which attributes of a QP are being set.
    QpAttrMask, "QP attribute mask bits", ignored 0, {
        /// The state to go to.
        STATE = ffi::IBV_QP_STATE;
        /// The state that the caller believes the QP to be in.
        CUR_STATE = ffi::IBV_QP_CUR_STATE;
        /// Whether SQD is to be announced by an event.
        EN_SQD_ASYNC_NOTIFY = ffi::IBV_QP_EN_SQD_ASYNC_NOTIFY;
        /// What the peer may do.
        ACCESS_FLAGS = ffi::IBV_QP_ACCESS_FLAGS;
        /// The index into the pkey table.
        PKEY_INDEX = ffi::IBV_QP_PKEY_INDEX;
        /// The port.
        PORT = ffi::IBV_QP_PORT;
        /// The qkey of a datagram QP.
        QKEY = ffi::IBV_QP_QKEY;
        /// The address of the peer.
        AV = ffi::IBV_QP_AV;
        /// The path MTU.
        PATH_MTU = ffi::IBV_QP_PATH_MTU;
        /// The acknowledgement timeout.
        TIMEOUT = ffi::IBV_QP_TIMEOUT;
        /// How often a request is repeated.
        RETRY_CNT = ffi::IBV_QP_RETRY_CNT;
        /// How often a request is repeated after RNR.
        RNR_RETRY = ffi::IBV_QP_RNR_RETRY;
        /// The PSN to expect.
        RQ_PSN = ffi::IBV_QP_RQ_PSN;
        /// How many reads and atomics may be outstanding.
        MAX_QP_RD_ATOMIC = ffi::IBV_QP_MAX_QP_RD_ATOMIC;
        /// The alternate path.
        ALT_PATH = ffi::IBV_QP_ALT_PATH;
        /// How long a peer is asked to wait after RNR.
        MIN_RNR_TIMER = ffi::IBV_QP_MIN_RNR_TIMER;
        /// The PSN to begin with.
        SQ_PSN = ffi::IBV_QP_SQ_PSN;
        /// How many reads and atomics of the peer are accepted at a time.
        MAX_DEST_RD_ATOMIC = ffi::IBV_QP_MAX_DEST_RD_ATOMIC;
        /// The state of path migration.
        PATH_MIG_STATE = ffi::IBV_QP_PATH_MIG_STATE;
        /// The sizes of the queues.
        CAP = ffi::IBV_QP_CAP;
        /// The QP number of the peer.
        DEST_QPN = ffi::IBV_QP_DEST_QPN;
        /// The rate limit of a raw QP.
        RATE_LIMIT = ffi::IBV_QP_RATE_LIMIT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_and_its_number_convert_into_each_other() {
        for &word in Opcode::ALL {
            assert_eq!(Opcode::try_from(word.value()), Ok(word));
        }
        for &word in WcStatus::ALL {
            assert_eq!(WcStatus::try_from(u32::from(word)), Ok(word));
        }
        assert_eq!(WcStatus::ALL.len(), 24);
        assert_eq!(QpType::Rc.value(), 2);
        assert_eq!(WcOpcode::Recv.value(), 128);
    }

    #[test]
    fn a_number_that_means_nothing_is_refused_by_name() {
        let error = QpType::try_from(7).unwrap_err();
        assert_eq!(error.to_string(), "7 is not a known QP type");
        assert!(QpState::try_from(7).is_err());
        assert!(Opcode::try_from(11).is_err());
        assert!(Mtu::try_from(0).is_err() && Mtu::try_from(6).is_err());
        assert!(WcStatus::try_from(u32::MAX).is_err());
    }

    #[test]
    fn unknown_bits_are_refused_and_optional_ones_dropped() {
        let error = AccessFlags::try_from(1 | 1 << 15).unwrap_err();
        assert_eq!(error, UnknownBits { kind: "access flags", bits: 1 << 15 });
        assert_eq!(AccessFlags::try_from(1 | 1 << 25), Ok(AccessFlags::LOCAL_WRITE));
        assert_eq!(AccessFlags::try_from(1 << 20), Ok(AccessFlags::RELAXED_ORDERING));
        assert!(SendFlags::try_from(1 << 5).is_err());
    }

    #[test]
    fn a_set_names_its_bits() {
        let set = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_READ;
        assert_eq!(set.to_string(), "LOCAL_WRITE|REMOTE_READ");
        assert_eq!(format!("{:?}", SendFlags::empty()), "SendFlags(0)");
    }

    #[test]
    fn a_set_that_came_over_the_socket_is_checked() {
        let good = postcard::to_allocvec(&AccessFlags::REMOTE_READ).unwrap();
        assert_eq!(postcard::from_bytes(&good), Ok(AccessFlags::REMOTE_READ));
        let bad = postcard::to_allocvec(&(1_u32 << 15)).unwrap();
        assert!(postcard::from_bytes::<AccessFlags>(&bad).is_err());
    }

    #[test]
    fn remote_writing_needs_local_writing() {
        assert!(!AccessFlags::REMOTE_WRITE.valid_for_mr());
        assert!(!AccessFlags::REMOTE_ATOMIC.valid_for_mr());
        assert!((AccessFlags::REMOTE_WRITE | AccessFlags::LOCAL_WRITE).valid_for_mr());
        assert!(AccessFlags::REMOTE_READ.valid_for_mr());
    }

    #[test]
    fn datagrams_only_send() {
        let allowed: Vec<_> = Opcode::ALL.iter().filter(|op| op.allowed_on(QpType::Ud)).collect();
        assert_eq!(allowed, [&Opcode::Send, &Opcode::SendWithImm, &Opcode::Tso]);
    }

    #[test]
    fn mtu_codes_are_powers_of_two() {
        let bytes: Vec<_> = Mtu::ALL.iter().map(|mtu| mtu.bytes()).collect();
        assert_eq!(bytes, [256, 512, 1024, 2048, 4096]);
    }
}
