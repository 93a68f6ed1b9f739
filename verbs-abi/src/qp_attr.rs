//! The attributes of a QP between the C structures of an application and the messages of the socket protocol.
//!
//! An application fills only what its mask names, and one built long ago has a shorter `ibv_qp_attr`: what is not
//! named is therefore not touched. Whether the values are right is for [`crate::qp_state`] to say.

use std::ptr::{addr_of, addr_of_mut};

use crate::ffi;
use crate::ids::MAX_24;
use crate::proto::{AhAttr, QpAttr, QpCap};
use crate::verbs::QpAttrMask as A;

/// Reads the attributes in `mask`. PSNs lose what does not fit 24 bits, as under Linux.
///
/// # Safety
/// `attr` must point to an `ibv_qp_attr` whose fields that `mask` names are initialised.
#[must_use]
pub unsafe fn read_qp_attr(attr: *const ffi::ibv_qp_attr, mask: A) -> QpAttr {
    let mut out = QpAttr::default();
    /// Copies fields that one bit of the mask names.
    macro_rules! copy {
        ($($bit:ident: $($field:ident),+;)+) => {
            $(if mask.contains(A::$bit) {
                // SAFETY: the caller promises that what the mask names can be read; no reference is made to the
                // whole structure, so nothing is said about the rest of it.
                $(out.$field = unsafe { addr_of!((*attr).$field).read() };)+
            })+
        };
    }
    copy! {
        STATE: qp_state;
        CUR_STATE: cur_qp_state;
        EN_SQD_ASYNC_NOTIFY: en_sqd_async_notify;
        ACCESS_FLAGS: qp_access_flags;
        PKEY_INDEX: pkey_index;
        PORT: port_num;
        QKEY: qkey;
        PATH_MTU: path_mtu;
        TIMEOUT: timeout;
        RETRY_CNT: retry_cnt;
        RNR_RETRY: rnr_retry;
        RQ_PSN: rq_psn;
        MAX_QP_RD_ATOMIC: max_rd_atomic;
        MIN_RNR_TIMER: min_rnr_timer;
        SQ_PSN: sq_psn;
        MAX_DEST_RD_ATOMIC: max_dest_rd_atomic;
        PATH_MIG_STATE: path_mig_state;
        DEST_QPN: dest_qp_num;
        ALT_PATH: alt_pkey_index, alt_port_num, alt_timeout;
        RATE_LIMIT: rate_limit;
    }
    if mask.contains(A::AV) {
        // SAFETY: as above; the mask names the address.
        out.ah_attr = ah_from_c(&unsafe { addr_of!((*attr).ah_attr).read() });
    }
    if mask.contains(A::CAP) {
        // SAFETY: as above; the mask names the capacities.
        out.cap = cap_from_c(unsafe { addr_of!((*attr).cap).read() });
    }
    out.rq_psn &= MAX_24;
    out.sq_psn &= MAX_24;
    out
}

/// Writes all attributes, as `ibv_query_qp` does whatever it was asked for; all but the rate limit, which an
/// application built long ago has no room for.
///
/// # Safety
/// `attr` must point to memory for an `ibv_qp_attr` up to its rate limit, that nobody else uses now.
pub unsafe fn write_qp_attr(from: &QpAttr, attr: *mut ffi::ibv_qp_attr) {
    /// Copies fields of the same name.
    macro_rules! copy {
        ($($field:ident),+ $(,)?) => {
            // SAFETY: the caller promises room for each of these fields; none is read or dropped.
            $(unsafe { addr_of_mut!((*attr).$field).write(from.$field) };)+
        };
    }
    copy! {
        qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags,
        pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic,
        min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
    }
    let (path, alternate) = (ah_to_c(&from.ah_attr), ah_to_c(&from.alt_ah_attr));
    // SAFETY: as above, for the three structures among the fields.
    unsafe {
        addr_of_mut!((*attr).cap).write(cap_to_c(from.cap));
        addr_of_mut!((*attr).ah_attr).write(path);
        addr_of_mut!((*attr).alt_ah_attr).write(alternate);
    }
}

/// The address of a peer, from C.
#[must_use]
pub fn ah_from_c(ah: &ffi::ibv_ah_attr) -> AhAttr {
    AhAttr {
        // SAFETY: both halves of the union are 16 bytes without padding, and any 16 bytes are a GID.
        dgid: unsafe { ah.grh.dgid.raw },
        flow_label: ah.grh.flow_label,
        sgid_index: ah.grh.sgid_index,
        hop_limit: ah.grh.hop_limit,
        traffic_class: ah.grh.traffic_class,
        dlid: ah.dlid,
        sl: ah.sl,
        src_path_bits: ah.src_path_bits,
        static_rate: ah.static_rate,
        is_global: ah.is_global,
        port_num: ah.port_num,
    }
}

/// The address of a peer, for C.
#[must_use]
pub fn ah_to_c(ah: &AhAttr) -> ffi::ibv_ah_attr {
    ffi::ibv_ah_attr {
        grh: ffi::ibv_global_route {
            dgid: ffi::ibv_gid { raw: ah.dgid },
            flow_label: ah.flow_label,
            sgid_index: ah.sgid_index,
            hop_limit: ah.hop_limit,
            traffic_class: ah.traffic_class,
        },
        dlid: ah.dlid,
        sl: ah.sl,
        src_path_bits: ah.src_path_bits,
        static_rate: ah.static_rate,
        is_global: ah.is_global,
        port_num: ah.port_num,
    }
}

/// The capacities of a QP, from C.
#[must_use]
pub fn cap_from_c(cap: ffi::ibv_qp_cap) -> QpCap {
    QpCap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

/// The capacities of a QP, for C.
#[must_use]
pub fn cap_to_c(cap: QpCap) -> ffi::ibv_qp_cap {
    ffi::ibv_qp_cap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{MaybeUninit, offset_of};

    use super::*;

    fn some_attr() -> QpAttr {
        QpAttr {
            qp_state: 2,
            path_mtu: 3,
            dest_qp_num: 0x11,
            rq_psn: 0x22,
            cap: QpCap { max_send_wr: 5, ..QpCap::default() },
            ah_attr: AhAttr { dgid: [7; 16], sgid_index: 1, is_global: 1, port_num: 1, ..AhAttr::default() },
            max_dest_rd_atomic: 4,
            min_rnr_timer: 12,
            ..QpAttr::default()
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut c = ffi::ibv_qp_attr::default();
        // SAFETY: the structure is whole and initialised.
        let read = unsafe {
            write_qp_attr(&some_attr(), &raw mut c);
            read_qp_attr(&raw const c, A::ALL)
        };
        assert_eq!(read, some_attr());
    }

    #[test]
    fn what_the_mask_does_not_name_is_not_read() {
        let mut c = MaybeUninit::<ffi::ibv_qp_attr>::uninit();
        // SAFETY: the one field that the mask names is initialised.
        let read = unsafe {
            addr_of_mut!((*c.as_mut_ptr()).min_rnr_timer).write(9);
            read_qp_attr(c.as_ptr(), A::MIN_RNR_TIMER)
        };
        assert_eq!(read, QpAttr { min_rnr_timer: 9, ..QpAttr::default() });
    }

    #[test]
    fn the_rate_limit_of_an_old_application_is_not_written() {
        let mut bytes = [0xa5_u8; size_of::<ffi::ibv_qp_attr>() + 8];
        let start = bytes.as_mut_ptr().cast::<u32>().wrapping_byte_add(bytes.as_ptr().align_offset(8));
        // SAFETY: the bytes hold an aligned structure.
        unsafe { write_qp_attr(&some_attr(), start.cast()) };
        let limit = start.wrapping_byte_add(offset_of!(ffi::ibv_qp_attr, rate_limit));
        // SAFETY: the rate limit lies inside the bytes.
        assert_eq!(unsafe { limit.read() }, 0xa5a5_a5a5);
    }

    #[test]
    fn psns_are_cut_to_24_bits() {
        let c = ffi::ibv_qp_attr { sq_psn: 0xff00_0001, ..ffi::ibv_qp_attr::default() };
        // SAFETY: the structure is whole and initialised.
        assert_eq!(unsafe { read_qp_attr(&raw const c, A::SQ_PSN) }.sq_psn, 1);
    }
}
