//! Extended completion queues: the completion is read field by field, under the CQ's lock from `start_poll` to
//! `end_poll`.
//!
//! A completion's time is that at which it was taken from its ring: entries of 32 bytes have no room for another. So it is never too
//! early, and the completions of one CQ are in the order of their times.

use std::ffi::{c_int, c_uint};
use std::ptr;

use verbs_abi::ffi::{
    IBV_CQ_INIT_ATTR_MASK_FLAGS, IBV_CQ_INIT_ATTR_MASK_PD, IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN,
    IBV_CREATE_CQ_ATTR_SINGLE_THREADED, IBV_WC_EX_WITH_COMPLETION_TIMESTAMP,
    IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK, IBV_WC_STANDARD_FLAGS, ibv_context, ibv_cq_ex,
    ibv_cq_init_attr_ex, ibv_poll_cq_attr, ibv_wc_opcode,
};

use crate::abi::edge::{self, Errno};
use crate::clock::Clocks;
use crate::cq::{self, Cq};
use crate::pd::Pd;
use crate::poll::Rings;

/// What a completion may be asked for.
const KNOWN: u64 = (IBV_WC_STANDARD_FLAGS
    | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP
    | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK) as u64;

pub(crate) unsafe extern "C" fn create(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    edge::pointer(|| {
        // SAFETY: libibverbs passes the application's attributes.
        let attr = unsafe { &*attr };
        let has_flags = attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS != 0;
        let flags = if has_flags { attr.flags } else { 0 };
        if attr.wc_flags & !KNOWN != 0
            || flags & !(IBV_CREATE_CQ_ATTR_SINGLE_THREADED | IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN) != 0
            || attr.comp_mask & !(IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD) != 0
        {
            return Err(Errno::OPNOTSUPP);
        }
        let has_domain = attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_PD != 0;
        let domain = if has_domain { attr.parent_domain } else { ptr::null_mut() };
        // SAFETY: the application names a live PD.
        if has_domain && (domain.is_null() || !unsafe { Pd::of(domain) }.is_parent_domain()) {
            return Err(Errno::INVAL);
        }
        // SAFETY: a live channel of this context, or none.
        let channel = (!attr.channel.is_null()).then(|| unsafe { (*attr.channel).fd });
        // SAFETY: libibverbs passes an open context of ours.
        let object = unsafe { cq::new(context, attr.cqe, channel, attr.comp_vector) }?;
        // Locks stay, whatever IBV_CREATE_CQ_ATTR_SINGLE_THREADED allows.
        if flags & IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN == 0 {
            // SAFETY: just made.
            let (own, cqe) = unsafe { (Cq::of(object.cast()), (*object).public.cqe as u32) };
            own.set_entries(&mut own.rings.lock(), cqe);
        }
        if has_domain {
            // SAFETY: as above; the object was just made.
            unsafe {
                Pd::of(domain).hold();
                (*object).domain = domain;
            }
        }
        let wants = |flag: u32| attr.wc_flags & u64::from(flag) != 0;
        // SAFETY: just made.
        unsafe { Cq::of(object.cast()) }.rings.lock().clocks = Clocks {
            raw: wants(IBV_WC_EX_WITH_COMPLETION_TIMESTAMP),
            wall: wants(IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK),
        };
        // SAFETY: as above, and nobody else has it.
        let public = unsafe { &mut (*object).public };
        public.read_completion_ts = Some(read_completion_ts);
        public.read_completion_wallclock_ns = Some(read_completion_wallclock_ns);
        public.start_poll = Some(start_poll);
        public.next_poll = Some(next_poll);
        public.end_poll = Some(end_poll);
        public.read_opcode = Some(read_opcode);
        public.read_vendor_err = Some(read_vendor_err);
        public.read_byte_len = Some(read_byte_len);
        public.read_imm_data = Some(read_imm_data);
        public.read_qp_num = Some(read_qp_num);
        public.read_src_qp = Some(read_src_qp);
        public.read_wc_flags = Some(read_wc_flags);
        public.read_slid = Some(read_slid);
        public.read_sl = Some(read_sl);
        public.read_dlid_path_bits = Some(read_path_bits);
        Ok(object.cast())
    })
}

/// Shows the next completion; ENOENT if there is none.
///
/// # Safety
/// `cq` must be a live extended CQ of ours, whose lock the caller holds.
unsafe fn show_next(cq: *mut ibv_cq_ex) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    let own = unsafe { Cq::of(cq.cast()) };
    // SAFETY: the caller holds the lock, and the reference ends here.
    let rings = unsafe { own.rings.held() };
    let mut shown = None;
    own.take(rings, 1, &mut |number, cqe| shown = Some((*cqe, number)));
    let (cqe, number) = shown.ok_or(Errno::NOENT)?;
    rings.shown = (cqe, number);
    rings.times = rings.clocks.now();
    // SAFETY: the caller's promise; these two fields are ours to write while the lock is held.
    unsafe {
        (*cq).status = cqe.status.into();
        (*cq).wr_id = cqe.wr_id;
    }
    Ok(())
}

/// Shows the next completion and keeps the lock; without one the application does not call `end_poll`, so the lock is
/// given up. The error is for how many polls there has been none.
///
/// # Safety
/// `cq` must be a live extended CQ of ours.
unsafe fn begin(cq: *mut ibv_cq_ex) -> Result<(), u32> {
    // SAFETY: the caller's promise.
    let own = unsafe { Cq::of(cq.cast()) };
    own.rings.acquire();
    // SAFETY: the lock was taken just now, and is given up where this thread does not hold it for the application.
    unsafe {
        show_next(cq).map_err(|_| {
            let idle = own.rings.held().idle;
            own.rings.release();
            idle
        })
    }
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes a live extended CQ of ours.
        let own = unsafe { Cq::of(cq.cast()) };
        own.bell.health().check_owner()?;
        // SAFETY: the application passes attributes.
        if unsafe { (*attr).comp_mask } != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the application passes a live extended CQ of ours.
        unsafe {
            match begin(cq) {
                Err(idle) if own.rest(idle) => begin(cq).map_err(|_| Errno::NOENT),
                begun => begun.map_err(|_| Errno::NOENT),
            }
        }
    })
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the application calls it between `start_poll` and `end_poll`, so this thread holds the lock.
    edge::status(|| unsafe { show_next(cq) })
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: as above, and it is given up once.
    edge::value((), || unsafe { Cq::of(cq.cast()).rings.release() });
}

/// # Safety
/// This thread must be between `start_poll` and `end_poll` of the CQ.
unsafe fn shown<'a>(cq: *mut ibv_cq_ex) -> &'a Rings {
    // SAFETY: the caller's promise: it holds the lock.
    unsafe { Cq::of(cq.cast()).rings.held() }
}

macro_rules! readers {
    ($($name:ident: $type:ty = |$rings:ident| $value:expr;)*) => {
        $(unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $type {
            // SAFETY: the application calls it between `start_poll` and `end_poll`.
            let $rings = unsafe { shown(cq) };
            $value
        })*
    };
}

readers! {
    read_opcode: ibv_wc_opcode = |rings| rings.shown.0.opcode.into();
    read_vendor_err: u32 = |rings| rings.shown.0.status.into();
    read_byte_len: u32 = |rings| rings.shown.0.byte_len;
    read_imm_data: u32 = |rings| rings.shown.0.imm;
    read_qp_num: u32 = |rings| rings.shown.1;
    read_src_qp: u32 = |rings| rings.shown.0.src_qp;
    read_wc_flags: c_uint = |rings| rings.shown.0.flags.into();
    read_completion_ts: u64 = |rings| rings.times.raw;
    read_completion_wallclock_ns: u64 = |rings| rings.times.wall;
    read_sl: u8 = |rings| rings.shown.0.sl;
}

unsafe extern "C" fn read_slid(_cq: *mut ibv_cq_ex) -> u32 {
    0
}

unsafe extern "C" fn read_path_bits(_cq: *mut ibv_cq_ex) -> u8 {
    0
}
