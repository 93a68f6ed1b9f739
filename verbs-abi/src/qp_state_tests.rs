//! What is promised of QP states.

use QpState::{Init, Reset, Rtr, Rts, Sqd, Sqe};

use super::*;

const LIMITS: AttrLimits = AttrLimits {
    gid_tbl_len: 4,
    max_mtu: Mtu::Mtu4096,
    max_rd_atomic: 16,
    max_dest_rd_atomic: 16,
    max_rate: 1000,
};

const RC_RTR: [A; 7] =
    [A::STATE, A::AV, A::PATH_MTU, A::DEST_QPN, A::RQ_PSN, A::MAX_DEST_RD_ATOMIC, A::MIN_RNR_TIMER];
const RC_RTS: [A; 6] = [A::STATE, A::TIMEOUT, A::RETRY_CNT, A::RNR_RETRY, A::SQ_PSN, A::MAX_QP_RD_ATOMIC];

fn all(attrs: &[A]) -> A {
    attrs.iter().fold(A::empty(), |sum, &attr| sum | attr)
}

fn climb(qp_type: QpType, init: A, rtr: A, rts: A) {
    for (from, to, mask) in [
        (Reset, Init, init),
        (Init, Rtr, rtr),
        (Rtr, Rts, rts),
        (Rts, Sqd, A::STATE),
        (Sqd, Rts, A::STATE),
        (Sqe, Rts, A::STATE),
        (Rts, QpState::Err, A::STATE),
        (QpState::Err, Reset, A::STATE),
    ] {
        assert_eq!(transition(qp_type, from, to, mask), Ok(()), "{qp_type} {from} {to}");
    }
}

/// An attribute, the name it is refused by, and what makes it wrong.
type Spoiled = (A, &'static str, fn(&mut QpAttr));

/// Attributes that are all valid, those of a peer included.
fn valid_attr() -> QpAttr {
    QpAttr {
        path_mtu: Mtu::Mtu1024.value(),
        port_num: 1,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 12,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        ah_attr: AhAttr { is_global: 1, port_num: 1, ..AhAttr::default() },
        ..QpAttr::default()
    }
}

#[test]
fn an_rc_qp_climbs_to_rts_and_back() {
    let init = A::STATE | A::PKEY_INDEX | A::PORT | A::ACCESS_FLAGS;
    climb(QpType::Rc, init, all(&RC_RTR), all(&RC_RTS));
}

#[test]
fn a_uc_qp_climbs_without_what_only_reliability_needs() {
    let init = A::STATE | A::PKEY_INDEX | A::PORT | A::ACCESS_FLAGS;
    let rtr = A::STATE | A::AV | A::PATH_MTU | A::DEST_QPN | A::RQ_PSN;
    climb(QpType::Uc, init, rtr, A::STATE | A::SQ_PSN);
}

#[test]
fn a_ud_qp_climbs_with_a_qkey_and_without_a_peer() {
    let init = A::STATE | A::PKEY_INDEX | A::PORT | A::QKEY;
    climb(QpType::Ud, init, A::STATE, A::STATE | A::SQ_PSN);
}

#[test]
fn the_masks_of_rdma_cm_are_accepted() {
    let mask = |bits: u32| A::try_from(bits).unwrap();
    assert_eq!(transition(QpType::Rc, Reset, Init, mask(0x39)), Ok(()));
    assert_eq!(transition(QpType::Rc, Init, Rtr, mask(0x12_9181)), Ok(()));
    assert_eq!(transition(QpType::Rc, Rtr, Rts, mask(0x1_2e01)), Ok(()));
    assert_eq!(transition(QpType::Ud, Reset, Init, mask(0x71)), Ok(()));
}

#[test]
fn every_state_leads_to_reset_and_to_err() {
    for &qp_type in QpType::ALL {
        for &from in QpState::ALL {
            assert_eq!(transition(qp_type, from, Reset, A::STATE), Ok(()));
            assert_eq!(transition(qp_type, from, QpState::Err, A::STATE), Ok(()));
        }
    }
}

#[test]
fn no_other_transition_exists() {
    let legal = [
        (Reset, Init),
        (Init, Init),
        (Init, Rtr),
        (Rtr, Rts),
        (Rts, Rts),
        (Rts, Sqd),
        (Sqd, Sqd),
        (Sqd, Rts),
        (Sqe, Rts),
    ];
    for &from in QpState::ALL {
        for &to in QpState::ALL {
            let expected = matches!(to, Reset | QpState::Err) || legal.contains(&(from, to));
            assert_eq!(rule(QpType::Rc, from, to).is_some(), expected, "{from} {to}");
        }
    }
}

#[test]
fn an_illegal_transition_is_named() {
    let error = transition(QpType::Rc, Reset, Rts, A::STATE).unwrap_err();
    assert_eq!(error.to_string(), "a QP of type RC cannot go from RESET to RTS");
    assert!(transition(QpType::Uc, Rtr, Sqd, A::STATE).is_err());
    assert!(transition(QpType::Ud, QpState::Err, Rts, A::STATE).is_err());
}

#[test]
fn each_missing_attribute_is_named() {
    for (from, to, attrs) in [(Init, Rtr, &RC_RTR[1..]), (Rtr, Rts, &RC_RTS[1..])] {
        for &missing in attrs {
            let mask = (all(attrs) | A::STATE).difference(missing);
            let expected =
                TransitionError::Attributes { qp_type: QpType::Rc, from, to, missing, surplus: A::empty() };
            assert_eq!(transition(QpType::Rc, from, to, mask), Err(expected));
        }
    }
}

#[test]
fn surplus_attributes_are_named() {
    let mask = A::STATE | A::PKEY_INDEX | A::PORT | A::QKEY | A::CAP;
    let error = transition(QpType::Rc, Reset, Init, mask).unwrap_err();
    let text = "a QP of type RC going from RESET to INIT: missing attributes ACCESS_FLAGS, surplus QKEY|CAP";
    assert_eq!(error.to_string(), text);
    assert!(transition(QpType::Rc, Rts, QpState::Err, A::STATE | A::CUR_STATE).is_err());
    assert!(transition(QpType::Ud, Init, Rtr, A::STATE | A::AV).is_err());
}

#[test]
fn attributes_change_without_a_change_of_state() {
    assert_eq!(transition(QpType::Rc, Rts, Rts, A::MIN_RNR_TIMER), Ok(()));
    assert_eq!(transition(QpType::Rc, Sqd, Sqd, A::AV | A::TIMEOUT), Ok(()));
    assert!(transition(QpType::Uc, Rts, Rts, A::MIN_RNR_TIMER).is_err());
    assert!(transition(QpType::Rc, Rts, Rts, A::TIMEOUT).is_err());
    assert!(transition(QpType::Rc, Rtr, Rtr, A::empty()).is_err());
}

#[test]
fn valid_values_pass_and_unmasked_ones_are_not_looked_at() {
    let everything = A::ALL.difference(A::ALT_PATH);
    assert_eq!(validate(everything, &valid_attr(), &LIMITS), Ok(()));
    assert_eq!(validate(A::STATE, &QpAttr { port_num: 9, ..QpAttr::default() }, &LIMITS), Ok(()));
}

#[test]
fn each_value_out_of_range_is_refused() {
    let refused: &[Spoiled] = &[
        (A::PORT, "port_num", |attr| attr.port_num = 2),
        (A::PKEY_INDEX, "pkey_index", |attr| attr.pkey_index = 1),
        (A::PATH_MTU, "path_mtu", |attr| attr.path_mtu = 0),
        (A::PATH_MTU, "path_mtu", |attr| attr.path_mtu = 6),
        (A::TIMEOUT, "timeout", |attr| attr.timeout = 32),
        (A::RETRY_CNT, "retry_cnt", |attr| attr.retry_cnt = 8),
        (A::RNR_RETRY, "rnr_retry", |attr| attr.rnr_retry = 8),
        (A::MIN_RNR_TIMER, "min_rnr_timer", |attr| attr.min_rnr_timer = 32),
        (A::RQ_PSN, "rq_psn", |attr| attr.rq_psn = 1 << 24),
        (A::SQ_PSN, "sq_psn", |attr| attr.sq_psn = 1 << 24),
        (A::DEST_QPN, "dest_qp_num", |attr| attr.dest_qp_num = 1 << 24),
        (A::MAX_QP_RD_ATOMIC, "max_rd_atomic", |attr| attr.max_rd_atomic = 17),
        (A::MAX_DEST_RD_ATOMIC, "max_dest_rd_atomic", |attr| attr.max_dest_rd_atomic = 17),
        (A::AV, "ah_attr.grh.sgid_index", |attr| attr.ah_attr.sgid_index = 4),
    ];
    for &(bit, name, spoil) in refused {
        let mut attr = valid_attr();
        spoil(&mut attr);
        let error = validate(bit, &attr, &LIMITS).unwrap_err();
        assert!(matches!(error, AttrError::OutOfRange { field, .. } if field == name), "{name}: {error}");
    }
}

#[test]
fn an_address_needs_a_grh_and_a_known_port() {
    let ah = valid_attr().ah_attr;
    assert_eq!(validate_ah(&AhAttr { is_global: 0, ..ah }, &LIMITS), Err(AttrError::NoGrh));
    let error = validate_ah(&AhAttr { port_num: 0, ..ah }, &LIMITS).unwrap_err();
    assert_eq!(error.to_string(), "ah_attr.port_num is 0, but must be from 1 to 1");
}

#[test]
fn there_is_no_alternate_path() {
    assert_eq!(validate(A::ALT_PATH, &valid_attr(), &LIMITS), Err(AttrError::AlternatePath));
}

#[test]
fn modify_tells_the_next_state() {
    let mut attr = QpAttr { qp_state: Init.value(), ..valid_attr() };
    let mask = (A::STATE | A::PKEY_INDEX | A::PORT | A::ACCESS_FLAGS).bits();
    assert_eq!(modify(QpType::Rc, Reset, mask, &attr, &LIMITS), Ok(Init));
    attr.min_rnr_timer = 3;
    assert_eq!(modify(QpType::Rc, Rts, A::MIN_RNR_TIMER.bits(), &attr, &LIMITS), Ok(Rts));
}

#[test]
fn modify_refuses_whatever_is_wrong() {
    let attr = QpAttr { qp_state: 7, cur_qp_state: Rtr.value(), ..valid_attr() };
    let modify = |mask: u32| modify(QpType::Rc, Rts, mask, &attr, &LIMITS);
    assert!(matches!(modify(1 << 30), Err(ModifyError::Mask(_))));
    assert!(matches!(modify(A::STATE.bits()), Err(ModifyError::State(_))));
    let belief = ModifyError::CurState { claimed: Rtr, actual: Rts };
    assert_eq!(modify(A::CUR_STATE.bits()), Err(belief));
    assert!(matches!(modify(A::QKEY.bits()), Err(ModifyError::Transition(_))));
}

#[test]
fn an_xrc_qp_takes_the_attributes_of_rc_and_ignores_those_of_the_half_that_it_lacks() {
    let path = A::STATE | A::AV | A::PATH_MTU | A::DEST_QPN | A::RQ_PSN;
    let to_rtr = path | A::MAX_DEST_RD_ATOMIC | A::MIN_RNR_TIMER;
    let to_rts = A::STATE | A::TIMEOUT | A::RETRY_CNT | A::RNR_RETRY | A::SQ_PSN | A::MAX_QP_RD_ATOMIC;
    for qp_type in [QpType::XrcSend, QpType::XrcRecv] {
        for (from, to, mask) in [(Init, Rtr, to_rtr), (Rtr, Rts, to_rts)] {
            let attr = QpAttr { qp_state: to.value(), ..valid_attr() };
            assert_eq!(modify(qp_type, from, mask.bits(), &attr, &LIMITS), Ok(to), "{qp_type}");
        }
    }
    // Not even their values matter.
    let attr = QpAttr { qp_state: Rtr.value(), min_rnr_timer: 99, ..valid_attr() };
    assert_eq!(modify(QpType::XrcSend, Init, to_rtr.bits(), &attr, &LIMITS), Ok(Rtr));
    assert!(modify(QpType::XrcRecv, Init, to_rtr.bits(), &attr, &LIMITS).is_err());
    // An initiator needs no more than the path, a target the rest as well.
    assert_eq!(modify(QpType::XrcSend, Init, path.bits(), &attr, &LIMITS), Ok(Rtr));
    assert!(modify(QpType::XrcRecv, Init, path.bits(), &attr, &LIMITS).is_err());
    // Other types ignore nothing.
    assert!(modify(QpType::Uc, Init, to_rtr.bits(), &attr, &LIMITS).is_err());
}
