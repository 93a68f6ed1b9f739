//! The life of a QP: which state may follow which, with which attributes, of which values.
//!
//! The rules are those that the Linux RDMA core lays on every RNIC, so a program that works here works there.
//! They are pure functions; who calls them changes the QP. One thing is kinder than Linux: RESET to ERR is allowed,
//! as the InfiniBand specification has it (any state to error). And every QP that sends can have a rate limit, which
//! Linux knows for raw packets alone.

use thiserror::Error;

use crate::ids::MAX_24;
use crate::proto::{AhAttr, QpAttr};
pub use crate::timer::{ack_timeout, rnr_timer};
use crate::verbs::{AccessFlags, MigState, Mtu, QpAttrMask as A, QpState, QpType, UnknownBits, UnknownValue};

/// The attributes of one transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// What must be given.
    pub required: A,
    /// What may be given beside that.
    pub optional: A,
}

/// Why a QP cannot go from one state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TransitionError {
    /// There is no such transition.
    #[error("a QP of type {qp_type} cannot go from {from} to {to}")]
    Illegal {
        /// The transport service.
        qp_type: QpType,
        /// The state it is in.
        from: QpState,
        /// The state it should go to.
        to: QpState,
    },
    /// The transition exists, but with other attributes.
    #[error(
        "a QP of type {qp_type} going from {from} to {to}: missing attributes {missing}, surplus {surplus}"
    )]
    Attributes {
        /// The transport service.
        qp_type: QpType,
        /// The state it is in.
        from: QpState,
        /// The state it should go to.
        to: QpState,
        /// What must be given and was not.
        missing: A,
        /// What was given and may not be.
        surplus: A,
    },
}

/// Why the value of an attribute is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AttrError {
    /// A number outside its range.
    #[error("{field} is {value}, but must be from {min} to {max}")]
    OutOfRange {
        /// The field of `ibv_qp_attr` or `ibv_ah_attr`.
        field: &'static str,
        /// What it was.
        value: u32,
        /// The least it may be.
        min: u32,
        /// The most it may be.
        max: u32,
    },
    /// Access flags that do not exist.
    #[error("qp_access_flags: {0}")]
    AccessFlags(#[from] UnknownBits),
    /// An address without a GRH.
    #[error("ah_attr.is_global is 0, but an Ethernet port needs a GRH: set it and grh.dgid")]
    NoGrh,
    /// An alternate path, of which there is none on Ethernet.
    #[error("IBV_QP_ALT_PATH is set, but an Ethernet port has no alternate path")]
    AlternatePath,
}

/// Why `ibv_modify_qp` is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ModifyError {
    /// A mask with bits that do not exist.
    #[error(transparent)]
    Mask(#[from] UnknownBits),
    /// A state that does not exist.
    #[error(transparent)]
    State(#[from] UnknownValue),
    /// The caller believes the QP to be in another state than it is.
    #[error("cur_qp_state is {claimed}, but the QP is in {actual}")]
    CurState {
        /// What the caller said.
        claimed: QpState,
        /// What is.
        actual: QpState,
    },
    /// A transition that does not exist, or not with these attributes.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// An attribute with a wrong value.
    #[error(transparent)]
    Attr(#[from] AttrError),
}

/// How large attributes may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttrLimits {
    /// Entries of the port's GID table.
    pub gid_tbl_len: u32,
    /// The port's largest MTU.
    pub max_mtu: Mtu,
    /// Reads and atomics that a requester may have outstanding (`max_qp_init_rd_atom` of the device).
    pub max_rd_atomic: u8,
    /// Reads and atomics that a responder takes at a time (`max_qp_rd_atom` of the device).
    pub max_dest_rd_atomic: u8,
    /// The highest rate that a QP can be limited to, kbit/s (`packet_pacing_caps` of the device).
    pub max_rate: u32,
}

/// Checks all of an `ibv_modify_qp` on a QP that is in `current`, and tells the state it leads to.
///
/// # Errors
/// The first thing that is wrong with it; the errno of all of them is EINVAL.
pub fn modify(
    qp_type: QpType,
    current: QpState,
    mask: u32,
    attr: &QpAttr,
    limits: &AttrLimits,
) -> Result<QpState, ModifyError> {
    let mask = heeded(qp_type, A::try_from(mask)?);
    if mask.contains(A::CUR_STATE) {
        let claimed = QpState::try_from(attr.cur_qp_state)?;
        if claimed != current {
            return Err(ModifyError::CurState { claimed, actual: current });
        }
    }
    let to = if mask.contains(A::STATE) { QpState::try_from(attr.qp_state)? } else { current };
    transition(qp_type, current, to, mask)?;
    validate(mask, attr, limits)?;
    Ok(to)
}

/// The attributes of a mask that mean something to the type. An XRC QP has one half only: what concerns the other one is
/// ignored, and programs that treat it as RC rest on that.
#[must_use]
pub fn heeded(qp_type: QpType, mask: A) -> A {
    match qp_type {
        QpType::XrcSend => mask.difference(A::MAX_DEST_RD_ATOMIC | A::MIN_RNR_TIMER),
        QpType::XrcRecv => mask.difference(A::MAX_QP_RD_ATOMIC | A::RETRY_CNT | A::RNR_RETRY),
        _ => mask,
    }
}

/// Checks that a QP may go from one state to another with the attributes in `mask`.
///
/// A mask without `STATE` is a transition from a state to itself.
///
/// # Errors
/// When there is no such transition, an attribute is missing, or one is given that may not be.
pub fn transition(qp_type: QpType, from: QpState, to: QpState, mask: A) -> Result<(), TransitionError> {
    let Some(rule) = rule(qp_type, from, to) else {
        return Err(TransitionError::Illegal { qp_type, from, to });
    };
    let missing = rule.required.difference(mask);
    let surplus = mask.difference(rule.required | rule.optional | A::STATE);
    if missing.is_empty() && surplus.is_empty() {
        Ok(())
    } else {
        Err(TransitionError::Attributes { qp_type, from, to, missing, surplus })
    }
}

/// The attributes of a transition; `None` if a QP cannot be moved so.
#[must_use]
pub fn rule(qp_type: QpType, from: QpState, to: QpState) -> Option<Rule> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    let (required, optional) = match (from, to) {
        (_, Reset | Err) => (A::empty(), A::empty()),
        (Reset, Init) => (init_attrs(qp_type), A::empty()),
        (Init, Init) => (A::empty(), reinit_attrs(qp_type)),
        (Init, Rtr) => (rtr_required(qp_type), rtr_optional(qp_type)),
        (Rtr, Rts) => (rts_required(qp_type), rts_optional(qp_type)),
        (Rts, Rts) => (A::empty(), rts_optional(qp_type)),
        (Rts, Sqd) => (A::empty(), drain_optional(qp_type)),
        (Sqd, Sqd) => (A::empty(), sqd_optional(qp_type)),
        (Sqd, Rts) => (A::empty(), rts_optional(qp_type).difference(A::RATE_LIMIT)),
        (Sqe, Rts) => (A::empty(), recover_optional(qp_type)),
        _ => return None,
    };
    Some(Rule { required, optional })
}

fn init_attrs(qp_type: QpType) -> A {
    match qp_type {
        QpType::Ud => A::PKEY_INDEX | A::PORT | A::QKEY,
        QpType::RawPacket => A::PORT,
        _ => A::PKEY_INDEX | A::PORT | A::ACCESS_FLAGS,
    }
}

fn reinit_attrs(qp_type: QpType) -> A {
    match qp_type {
        QpType::RawPacket => A::empty(),
        _ => init_attrs(qp_type),
    }
}

fn rtr_required(qp_type: QpType) -> A {
    let path = A::AV | A::PATH_MTU | A::DEST_QPN | A::RQ_PSN;
    match qp_type {
        QpType::Ud | QpType::RawPacket => A::empty(),
        QpType::Uc | QpType::XrcSend => path,
        QpType::Rc | QpType::XrcRecv => path | A::MAX_DEST_RD_ATOMIC | A::MIN_RNR_TIMER,
    }
}

fn rtr_optional(qp_type: QpType) -> A {
    match qp_type {
        QpType::RawPacket => A::empty(),
        QpType::Ud => A::PKEY_INDEX | A::QKEY,
        _ => A::ALT_PATH | A::ACCESS_FLAGS | A::PKEY_INDEX,
    }
}

fn rts_required(qp_type: QpType) -> A {
    match qp_type {
        QpType::RawPacket => A::empty(),
        QpType::Ud | QpType::Uc => A::SQ_PSN,
        QpType::XrcRecv => A::TIMEOUT | A::SQ_PSN,
        QpType::Rc | QpType::XrcSend => {
            A::TIMEOUT | A::RETRY_CNT | A::RNR_RETRY | A::SQ_PSN | A::MAX_QP_RD_ATOMIC
        }
    }
}

/// What may be changed on the way to RTS, and in it.
fn rts_optional(qp_type: QpType) -> A {
    let connected = A::CUR_STATE | A::ALT_PATH | A::ACCESS_FLAGS | A::PATH_MIG_STATE;
    match qp_type {
        QpType::RawPacket => A::RATE_LIMIT,
        QpType::Ud => A::CUR_STATE | A::QKEY | A::RATE_LIMIT,
        QpType::Uc | QpType::XrcSend => connected | A::RATE_LIMIT,
        QpType::Rc => connected | A::MIN_RNR_TIMER | A::RATE_LIMIT,
        QpType::XrcRecv => connected | A::MIN_RNR_TIMER,
    }
}

fn drain_optional(qp_type: QpType) -> A {
    match qp_type {
        QpType::RawPacket => A::empty(),
        _ => A::EN_SQD_ASYNC_NOTIFY,
    }
}

/// What may be changed while the send queue stands still, which is nearly everything.
fn sqd_optional(qp_type: QpType) -> A {
    let path = A::AV | A::ALT_PATH | A::ACCESS_FLAGS | A::PKEY_INDEX | A::PATH_MIG_STATE;
    let requester = A::RETRY_CNT | A::RNR_RETRY | A::MAX_QP_RD_ATOMIC;
    let responder = A::MAX_DEST_RD_ATOMIC | A::MIN_RNR_TIMER;
    match qp_type {
        QpType::RawPacket => A::empty(),
        QpType::Ud => A::PKEY_INDEX | A::QKEY,
        QpType::Uc => path,
        QpType::Rc => path | A::PORT | A::TIMEOUT | requester | responder,
        QpType::XrcSend => path | A::PORT | A::TIMEOUT | requester,
        QpType::XrcRecv => path | A::PORT | A::TIMEOUT | responder,
    }
}

/// What may be changed on the way out of SQE.
fn recover_optional(qp_type: QpType) -> A {
    match qp_type {
        QpType::Ud => A::CUR_STATE | A::QKEY,
        QpType::Uc => A::CUR_STATE | A::ACCESS_FLAGS,
        _ => A::empty(),
    }
}

/// Checks the values of the attributes in `mask`, and no other.
///
/// # Errors
/// The first attribute that is wrong.
pub fn validate(mask: A, attr: &QpAttr, limits: &AttrLimits) -> Result<(), AttrError> {
    if mask.contains(A::ALT_PATH) {
        return Err(AttrError::AlternatePath);
    }
    if mask.contains(A::ACCESS_FLAGS) {
        AccessFlags::try_from(attr.qp_access_flags)?;
    }
    if mask.contains(A::AV) {
        validate_ah(&attr.ah_attr, limits)?;
    }
    let ranges = [
        (A::PORT, "port_num", attr.port_num.into(), 1, 1),
        (A::PKEY_INDEX, "pkey_index", attr.pkey_index.into(), 0, 0),
        (A::PATH_MTU, "path_mtu", attr.path_mtu, Mtu::Mtu256.value(), limits.max_mtu.value()),
        (A::TIMEOUT, "timeout", attr.timeout.into(), 0, 31),
        (A::RETRY_CNT, "retry_cnt", attr.retry_cnt.into(), 0, 7),
        (A::RNR_RETRY, "rnr_retry", attr.rnr_retry.into(), 0, 7),
        (A::MIN_RNR_TIMER, "min_rnr_timer", attr.min_rnr_timer.into(), 0, 31),
        (A::RQ_PSN, "rq_psn", attr.rq_psn, 0, MAX_24),
        (A::SQ_PSN, "sq_psn", attr.sq_psn, 0, MAX_24),
        (A::DEST_QPN, "dest_qp_num", attr.dest_qp_num, 0, MAX_24),
        (A::MAX_QP_RD_ATOMIC, "max_rd_atomic", attr.max_rd_atomic.into(), 0, limits.max_rd_atomic.into()),
        (
            A::MAX_DEST_RD_ATOMIC,
            "max_dest_rd_atomic",
            attr.max_dest_rd_atomic.into(),
            0,
            limits.max_dest_rd_atomic.into(),
        ),
        (A::RATE_LIMIT, "rate_limit", attr.rate_limit, 0, limits.max_rate),
        (A::PATH_MIG_STATE, "path_mig_state", attr.path_mig_state, 0, MigState::Armed.value()),
    ];
    for (bit, field, value, min, max) in ranges {
        if mask.contains(bit) {
            in_range(field, value, min, max)?;
        }
    }
    Ok(())
}

/// Checks the address of a peer: of a QP, or of an AH.
///
/// # Errors
/// The first field that is wrong.
pub fn validate_ah(ah: &AhAttr, limits: &AttrLimits) -> Result<(), AttrError> {
    if ah.is_global == 0 {
        return Err(AttrError::NoGrh);
    }
    in_range("ah_attr.port_num", ah.port_num.into(), 1, 1)?;
    in_range("ah_attr.grh.sgid_index", ah.sgid_index.into(), 0, limits.gid_tbl_len.saturating_sub(1))
}

fn in_range(field: &'static str, value: u32, min: u32, max: u32) -> Result<(), AttrError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(AttrError::OutOfRange { field, value, min, max }) }
}

#[cfg(test)]
#[path = "qp_state_tests.rs"]
mod tests;
