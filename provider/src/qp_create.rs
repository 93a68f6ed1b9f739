//! Making a QP: what is asked for is checked, the router makes it, and C is shown the object.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use verbs_abi::ffi::{
    self, ibv_context, ibv_cq, ibv_pd, ibv_qp, ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_xrcd,
};
use verbs_abi::ffi_private;
use verbs_abi::proto::{Answer, CreateQp, NewQp, QpCap, Request};
use verbs_abi::qp_attr;
use verbs_abi::shm::Window;
use verbs_abi::shm::queue::{Geometry, QueueArea};
use verbs_abi::shm::wqe::MAX_SGE;
use verbs_abi::verbs::{Opcode, QpState, QpType};

use crate::abi::edge::{self, Errno};
use crate::abi::layout::VERBS_QP_EX;
use crate::abi::library::Verbs;
use crate::bell::Bell;
use crate::context::Context;
use crate::cq::Cq;
use crate::device;
use crate::event;
use crate::lock::Lock;
use crate::pd::Pd;
use crate::poll::Side;
use crate::post::{RecvQueue, SendQueue};
use crate::qp::{Limits, Qp, QpObject};
use crate::srq::{Srq, Xrcd};
use crate::wr;

/// Operations that a send queue executes, on the QP types that have them.
const OPCODES: [Opcode; 12] = [
    Opcode::Write,
    Opcode::WriteWithImm,
    Opcode::Send,
    Opcode::SendWithImm,
    Opcode::Read,
    Opcode::CmpAndSwp,
    Opcode::FetchAndAdd,
    Opcode::SendWithInv,
    Opcode::LocalInv,
    Opcode::BindMw,
    Opcode::AtomicWrite,
    Opcode::Flush,
];

/// The functions of the extended interface that a QP can have: those of [`OPCODES`].
const SEND_OPS: u64 = (ffi::IBV_QP_EX_WITH_RDMA_WRITE
    | ffi::IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | ffi::IBV_QP_EX_WITH_SEND
    | ffi::IBV_QP_EX_WITH_SEND_WITH_IMM
    | ffi::IBV_QP_EX_WITH_RDMA_READ
    | ffi::IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | ffi::IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | ffi::IBV_QP_EX_WITH_SEND_WITH_INV
    | ffi::IBV_QP_EX_WITH_LOCAL_INV
    | ffi::IBV_QP_EX_WITH_BIND_MW
    | ffi::IBV_QP_EX_WITH_ATOMIC_WRITE
    | ffi_private::IBV_QP_EX_WITH_FLUSH) as u64;

pub(crate) unsafe extern "C" fn create(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    edge::pointer(|| {
        // SAFETY: libibverbs passes a live PD of ours and the application's attributes.
        let object = unsafe { new((*pd).context, Home::Pd(pd), &*attr, Extras::default()) }?;
        // SAFETY: just made; the application's attributes.
        unsafe { tell_inline(object, &mut (*attr).cap) };
        Ok(object.cast())
    })
}

pub(crate) unsafe extern "C" fn create_ex(
    context: *mut ffi::ibv_context,
    attr: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        let extended = unsafe { &*attr };
        let known = ffi::IBV_QP_INIT_ATTR_PD
            | ffi::IBV_QP_INIT_ATTR_XRCD
            | ffi::IBV_QP_INIT_ATTR_CREATE_FLAGS
            | ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        if extended.comp_mask & !known != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let has = |bit| extended.comp_mask & bit != 0;
        let receives_xrc = extended.qp_type == ffi::IBV_QPT_XRC_RECV;
        if receives_xrc != has(ffi::IBV_QP_INIT_ATTR_XRCD) {
            return Err(Errno::INVAL);
        }
        let home = match receives_xrc {
            // SAFETY: the application names a live domain.
            true if !extended.xrcd.is_null() && unsafe { (*extended.xrcd).context } == context => {
                Home::Domain(
                    extended.xrcd,
                    if has(ffi::IBV_QP_INIT_ATTR_PD) { extended.pd } else { ptr::null_mut() },
                )
            }
            false
                if has(ffi::IBV_QP_INIT_ATTR_PD)
                    && !extended.pd.is_null()
                    // SAFETY: the application names a live PD.
                    && unsafe { (*extended.pd).context } == context =>
            {
                Home::Pd(extended.pd)
            }
            _ => return Err(Errno::INVAL),
        };
        let send_ops = if has(ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) { extended.send_ops_flags } else { 0 };
        let flags = if has(ffi::IBV_QP_INIT_ATTR_CREATE_FLAGS) { extended.create_flags } else { 0 };
        if send_ops & !SEND_OPS != 0 || flags & !ffi::IBV_QP_CREATE_BLOCK_SELF_MCAST_LB != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        if flags != 0 && extended.qp_type != ffi::IBV_QPT_UD {
            return Err(Errno::INVAL);
        }
        let extras =
            Extras { send_ops: has(ffi::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS), block_self_mcast: flags != 0 };
        // SAFETY: the extended attributes begin with the plain ones.
        let plain = unsafe { &*attr.cast::<ibv_qp_init_attr>() };
        // SAFETY: the PD or the domain is live, see above.
        let object = unsafe { new(context, home, plain, extras) }?;
        // SAFETY: just made; the application's attributes.
        unsafe { tell_inline(object, &mut (*attr).cap) };
        Ok(object.cast())
    })
}

/// Opens an XRC receiver that another process of the tenant has made, or this one.
pub(crate) unsafe extern "C" fn open(
    context: *mut ibv_context,
    attr: *mut ffi::ibv_qp_open_attr,
) -> *mut ibv_qp {
    const NEEDED: u32 = ffi::IBV_QP_OPEN_ATTR_NUM | ffi::IBV_QP_OPEN_ATTR_XRCD | ffi::IBV_QP_OPEN_ATTR_TYPE;
    edge::pointer(|| {
        // SAFETY: libibverbs passes an open context of ours and the application's attributes.
        let (device, attr) = unsafe { (device::state(context), &*attr) };
        if attr.comp_mask >= ffi::IBV_QP_OPEN_ATTR_RESERVED {
            return Err(Errno::OPNOTSUPP);
        }
        // SAFETY: the application names a live domain, or none.
        let is_ours = !attr.xrcd.is_null() && unsafe { (*attr.xrcd).context } == context;
        if attr.comp_mask & NEEDED != NEEDED || !is_ours || attr.qp_type != ffi::IBV_QPT_XRC_RECV {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above.
        let xrcd = unsafe { Xrcd::of(attr.xrcd) }.id;
        let request = Request::OpenQp { xrcd, qpn: attr.qp_num };
        let (Answer::Qp(given), _) = device.link.ask(&request, &[])? else { return Err(Errno::PROTO) };
        let limits =
            Limits { qp_type: QpType::XrcRecv, cap: QpCap::default(), sq_sig_all: false, opcodes: 0 };
        let parts = Parts { send_cq: None, recv_cq: None, srq: None };
        // SAFETY: integers and pointers, for which zero is a value.
        let mut shown: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        (shown.qp_context, shown.qp_type) = (attr.qp_context, attr.qp_type);
        let object = make(device, (context, ptr::null_mut()), &shown, &given, limits, parts)?;
        // SAFETY: just made. Others may have brought it anywhere.
        unsafe { (*object.cast::<ibv_qp>()).state = ffi::IBV_QPS_UNKNOWN };
        Ok(object.cast())
    })
}

/// What `ibv_create_qp_ex` can ask for beside the rest.
#[derive(Clone, Copy, Default)]
struct Extras {
    /// The extended interface for posting.
    send_ops: bool,
    /// That its datagrams to a multicast group do not come back.
    block_self_mcast: bool,
}

/// Says how much may be sent inline: as much as has room anyway is given unasked.
///
/// # Safety
/// `object` must be a live QP.
unsafe fn tell_inline(object: *mut QpObject, cap: &mut ffi::ibv_qp_cap) {
    // SAFETY: the caller's promise.
    cap.max_inline_data = unsafe { Qp::of(object.cast()) }.limits.cap.max_inline_data;
}

/// What a QP is made in: a PD, or for an XRC receiver its domain. The PD that is named with a domain is shown to C, as
/// librdmacm relies on, and is nothing to the QP.
#[derive(Clone, Copy)]
enum Home {
    Pd(*mut ibv_pd),
    Domain(*mut ibv_xrcd, *mut ibv_pd),
}

/// What a QP uses.
pub(crate) struct Parts {
    pub(crate) send_cq: Option<Arc<Cq>>,
    pub(crate) recv_cq: Option<Arc<Cq>>,
    pub(crate) srq: Option<Arc<Srq>>,
}

impl Parts {
    /// What the attributes name, as far as a QP of this type has it.
    ///
    /// # Safety
    /// The CQs and the SRQ in `attr` must be live ones of ours, or null.
    unsafe fn of(context: *mut ibv_context, attr: &ibv_qp_init_attr, kind: QpType) -> Result<Parts, Errno> {
        let cq = |cq: *mut ibv_cq, wanted: bool| {
            if !wanted {
                return Ok(None);
            }
            // SAFETY: the caller's promise.
            if cq.is_null() || unsafe { (*cq).context } != context {
                return Err(Errno::INVAL);
            }
            // SAFETY: as above.
            Ok(Some(Arc::clone(unsafe { Cq::of(cq) })))
        };
        let is_xrc = matches!(kind, QpType::XrcSend | QpType::XrcRecv);
        let mut srq = None;
        if !attr.srq.is_null() {
            // SAFETY: the caller's promise.
            if is_xrc || unsafe { (*attr.srq).context } != context {
                return Err(Errno::INVAL);
            }
            // SAFETY: as above.
            srq = Some(Arc::clone(unsafe { Srq::of(attr.srq) }));
        }
        let sends = kind != QpType::XrcRecv;
        Ok(Parts { send_cq: cq(attr.send_cq, sends)?, recv_cq: cq(attr.recv_cq, !is_xrc)?, srq })
    }
}

/// # Safety
/// `home` must be a live object of ours, and the CQs and the SRQ in `attr` live ones of ours or null.
unsafe fn new(
    context: *mut ibv_context,
    home: Home,
    attr: &ibv_qp_init_attr,
    extras: Extras,
) -> Result<*mut QpObject, Errno> {
    // SAFETY: the caller's promise; the context of a live object is open.
    let device = unsafe { device::state(context) };
    let mut limits = limits(attr)?;
    // SAFETY: the caller's promise.
    let parts = unsafe { Parts::of(context, attr, limits.qp_type)? };
    if parts.srq.is_some() || limits.qp_type == QpType::XrcRecv {
        (limits.cap.max_recv_wr, limits.cap.max_recv_sge) = (0, 0);
    }
    let (pd, pd_id, xrcd) = match home {
        // SAFETY: the caller's promise.
        Home::Pd(pd) => (pd, unsafe { Pd::of(pd) }.id, None),
        // SAFETY: as above.
        Home::Domain(xrcd, pd) => (pd, 0, Some(unsafe { Xrcd::of(xrcd) }.id)),
    };
    let id = |cq: &Option<Arc<Cq>>| cq.as_ref().map_or(0, |cq| cq.id);
    let request = Request::CreateQp(CreateQp {
        pd: pd_id,
        send_cq: id(&parts.send_cq),
        recv_cq: id(&parts.recv_cq),
        srq: parts.srq.as_ref().map(|srq| srq.number()),
        xrcd,
        qp_type: attr.qp_type,
        cap: limits.cap,
        block_self_mcast: extras.block_self_mcast,
        sq_sig_all: limits.sq_sig_all,
    });
    let (Answer::Qp(given), _) = device.link.ask(&request, &[])? else { return Err(Errno::PROTO) };
    let object = make(device, (context, pd), attr, &given, limits, parts)?;
    if extras.send_ops {
        // SAFETY: just made; there is room for every release's `verbs_qp`.
        unsafe { show_extended(object)? }
    }
    if let Home::Pd(pd) = home {
        // SAFETY: the caller's promise.
        unsafe { Pd::of(pd) }.hold();
    }
    Ok(object)
}

/// The object of a QP that the router has given, as C sees it.
fn make(
    device: &Context,
    at: (*mut ibv_context, *mut ibv_pd),
    attr: &ibv_qp_init_attr,
    given: &NewQp,
    limits: Limits,
    parts: Parts,
) -> Result<*mut QpObject, Errno> {
    let object = Box::into_raw(Box::<QpObject>::new_uninit()).cast::<QpObject>();
    let Some(qp) = build(&device.arena, &device.bell, object as u64, given, limits, parts) else {
        // SAFETY: allocated above, and nobody else has it.
        drop(unsafe { Box::from_raw(object.cast::<std::mem::MaybeUninit<QpObject>>()) });
        return Err(Errno::PROTO);
    };
    // SAFETY: just allocated.
    unsafe {
        object.write(QpObject::new(&qp));
        show(object, at, attr, &qp);
    }
    device.events.elements().add_qp(qp);
    Ok(object)
}

/// What the attributes ask for, if the device has it.
pub(crate) fn limits(attr: &ibv_qp_init_attr) -> Result<Limits, Errno> {
    let qp_type = QpType::try_from(attr.qp_type).map_err(|_| Errno::INVAL)?;
    if qp_type == QpType::RawPacket {
        return Err(Errno::OPNOTSUPP);
    }
    let mut cap = qp_attr::cap_from_c(attr.cap);
    // Every RNIC gives the room of the gather list, and programs (rdma_xclient) send inline without having asked.
    let room = cap.max_send_sge.min(MAX_SGE as u32) * size_of::<ffi::ibv_sge>() as u32;
    cap.max_inline_data = cap.max_inline_data.max(room);
    Geometry::new(cap.max_send_wr, cap.max_recv_wr, cap.max_send_sge, cap.max_recv_sge, cap.max_inline_data)
        .ok_or(Errno::INVAL)?;
    let allowed = OPCODES.into_iter().filter(|opcode| opcode.allowed_on(qp_type));
    let opcodes = allowed.fold(0, |bits, opcode| bits | 1 << opcode.value());
    Ok(Limits { qp_type, cap, sq_sig_all: attr.sq_sig_all != 0, opcodes })
}

/// The QP that the router has given, attached to its CQs. `None` when what it gave lies outside the arena.
pub(crate) fn build(
    arena: &Window,
    bell: &Arc<Bell>,
    address: u64,
    given: &NewQp,
    limits: Limits,
    parts: Parts,
) -> Option<Arc<Qp>> {
    let area = QueueArea::new(arena, given.offset, given.geometry)?;
    let qp = Arc::new(Qp {
        number: given.qpn,
        slot: given.slot,
        address,
        area,
        bell: Arc::clone(bell),
        limits,
        send: Lock::new(SendQueue::new(limits.cap.max_send_wr)),
        recv: Lock::new(RecvQueue::new()),
        sq_freed: AtomicU64::new(0),
        rq_freed: AtomicU64::new(0),
        begins: AtomicBool::new(false),
        async_delivered: AtomicU32::new(0),
        srq: parts.srq,
        send_cq: parts.send_cq.map(|cq| (cq, given.send_slot)),
        recv_cq: parts.recv_cq.map(|cq| (cq, given.recv_slot)),
        groups: Lock::new(BTreeSet::new()),
    });
    for (cq, side) in [(&qp.send_cq, Side::Send), (&qp.recv_cq, Side::Recv)] {
        if let Some((cq, slot)) = cq {
            cq.attach(*slot, side, &qp);
        }
    }
    Some(qp)
}

/// Fills in the public part.
///
/// # Safety
/// `object` must be allocated, zero where C sees it, and nobody else's yet.
unsafe fn show(
    object: *mut QpObject,
    (context, pd): (*mut ibv_context, *mut ibv_pd),
    attr: &ibv_qp_init_attr,
    qp: &Qp,
) {
    // SAFETY: the caller's promise; the public part begins with an `ibv_qp`.
    unsafe {
        let public = object.cast::<ibv_qp>();
        (*public).context = context;
        (*public).qp_context = attr.qp_context;
        (*public).pd = pd;
        (*public).srq = attr.srq;
        (*public).send_cq = attr.send_cq;
        (*public).recv_cq = attr.recv_cq;
        (*public).handle = qp.number;
        (*public).qp_num = qp.number;
        (*public).state = QpState::Reset.value();
        (*public).qp_type = attr.qp_type;
        event::init_sync(&raw mut (*public).mutex, &raw mut (*public).cond);
    }
}

/// Fills in the functions of the extended interface, and says that they are there.
///
/// # Safety
/// As for [`show`].
unsafe fn show_extended(object: *mut QpObject) -> Result<(), Errno> {
    let verbs = Verbs::loaded().ok().flatten().ok_or(Errno::NODEV)?;
    // SAFETY: the caller's promise; the probed offset lies behind the functions and within the room.
    unsafe {
        wr::show(object.cast(), verbs.qp_comp_mask);
        let mask = object.cast::<u8>().add(verbs.qp_comp_mask).cast::<u32>();
        mask.write(VERBS_QP_EX);
    }
    Ok(())
}

const _: () = {
    // `verbs_qp` of every release: the public part, the mask behind it, a pointer.
    assert!(size_of::<[u64; 64]>() >= crate::abi::layout::QP_COMP_MASK[2] + 2 * size_of::<*mut c_void>());
};
