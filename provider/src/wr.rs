//! The extended interface for posting: `wr_start`, one function a work request, setters, `wr_complete`.
//!
//! The send queue is locked from start to complete or abort. The first mistake is kept, and undoes everything when
//! `wr_complete` reports it.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;

use verbs_abi::ffi::{ibv_ah, ibv_data_buf, ibv_mw, ibv_mw_bind_info, ibv_qp_ex, ibv_sge};
use verbs_abi::shm::wqe::{SendWqe, flag};
use verbs_abi::verbs::{Opcode, QpType};

use crate::abi::edge::{self, Errno};
use crate::ah::Ah;
use crate::mw;
use crate::post::{self, Mark, SendQueue};
use crate::qp::{self, Qp};

/// What has happened since `wr_start`.
#[derive(Debug, Default)]
pub(crate) struct Session {
    /// Where to return to.
    mark: Mark,
    /// Whether a work request is being built.
    is_open: bool,
    error: Option<Errno>,
}

/// Puts the functions where C finds them: those that the release of libibverbs has, whose structure ends at `end`.
///
/// # Safety
/// `qp` must be a QP of ours that nobody uses yet, with room for the whole structure.
pub(crate) unsafe fn show(qp: *mut ibv_qp_ex, end: usize) {
    // Release 44 added the first, 45 the second; in older ones something else lies there.
    let later: [(usize, *const ()); 2] = [
        (offset_of!(ibv_qp_ex, wr_atomic_write), atomic_write as *const ()),
        (offset_of!(ibv_qp_ex, wr_atomic_write) + size_of::<*const ()>(), flush as *const ()),
    ];
    for (offset, function) in later.into_iter().filter(|(offset, _)| *offset < end) {
        // SAFETY: the caller's promise: the structure has this member.
        unsafe { qp.cast::<u8>().add(offset).cast::<*const ()>().write(function) };
    }
    // SAFETY: the caller's promise.
    let qp = unsafe { &mut *qp };
    qp.wr_start = Some(start);
    qp.wr_complete = Some(complete);
    qp.wr_abort = Some(abort);
    qp.wr_rdma_write = Some(rdma_write);
    qp.wr_rdma_write_imm = Some(rdma_write_imm);
    qp.wr_rdma_read = Some(rdma_read);
    qp.wr_send = Some(send);
    qp.wr_send_imm = Some(send_imm);
    qp.wr_atomic_cmp_swp = Some(atomic_cmp_swp);
    qp.wr_atomic_fetch_add = Some(atomic_fetch_add);
    qp.wr_send_inv = Some(send_inv);
    qp.wr_local_inv = Some(local_inv);
    qp.wr_bind_mw = Some(bind_mw);
    qp.wr_set_ud_addr = Some(set_ud_addr);
    qp.wr_set_xrc_srqn = Some(set_xrc_srqn);
    qp.wr_set_sge = Some(set_sge);
    qp.wr_set_sge_list = Some(set_sge_list);
    qp.wr_set_inline_data = Some(set_inline_data);
    qp.wr_set_inline_data_list = Some(set_inline_data_list);
}

impl SendQueue {
    /// Appends the work request being built, if any.
    fn finish(&mut self, qp: &Qp) {
        if self.close(qp) {
            self.append(qp);
        }
    }

    /// Ends the work request being built. True: there is one to post.
    #[inline]
    fn close(&mut self, qp: &Qp) -> bool {
        if !std::mem::take(&mut self.session.is_open) || self.session.error.is_some() {
            return false;
        }
        if qp.limits.qp_type == QpType::Ud && self.wqe.flags & flag::ADDRESS == 0 {
            self.session.error = Some(Errno::INVAL);
            return false;
        }
        true
    }

    /// Posts the session's work requests. True: the router must be rung.
    #[inline]
    fn commit(&mut self, qp: &Qp) -> bool {
        // Of several, the first are in the queue already, and whoever executes them executes all.
        let is_alone = self.mark() == self.session.mark;
        let is_open = self.close(qp);
        if self.session.error.is_some() {
            self.roll_back(self.session.mark);
            return false;
        }
        if !is_alone {
            if is_open {
                self.append(qp);
            }
            self.publish(qp);
        }
        self.begin_posting(qp);
        if is_alone && is_open {
            self.post(qp);
        }
        self.end_posting(qp)
    }

    /// Begins a work request.
    fn begin(&mut self, qp: &Qp, opcode: Opcode, wr_id: u64, flags: u32) -> Result<(), Errno> {
        self.finish(qp);
        let allowed = u32::from(flag::FENCE | flag::SIGNALED | flag::SOLICITED | flag::INLINE);
        if qp.limits.opcodes >> opcode.value() & 1 == 0 || flags & !allowed != 0 {
            return Err(Errno::INVAL);
        }
        self.check_room(qp)?;
        self.wqe.reset();
        self.wqe.wr_id = wr_id;
        self.wqe.opcode = opcode.value() as u8;
        // Whether payload is inline is told by the setter.
        let signaled = if qp.limits.sq_sig_all { flag::SIGNALED } else { 0 };
        self.wqe.flags = flags as u8 & !flag::INLINE | signaled;
        self.wqe.imm = 0;
        self.session.is_open = true;
        Ok(())
    }
}

/// The QP and its send queue, which `wr_start` has locked.
///
/// # Safety
/// `qp` must be a live extended QP of ours, between `wr_start` and its end, in the thread that started.
unsafe fn locked<'a>(qp: *mut ibv_qp_ex) -> (&'a Qp, &'a mut SendQueue) {
    // SAFETY: the caller's promise: this thread holds the lock.
    unsafe {
        let own = Qp::of(qp.cast());
        (own, own.send.held())
    }
}

/// Begins a work request and lets `fill` complete it.
///
/// Here and in [`set`] nothing can panic, and nothing catches one: it would end the process at the edge to C.
///
/// # Safety
/// As for [`locked`].
#[inline]
unsafe fn begin(qp: *mut ibv_qp_ex, opcode: Opcode, fill: impl FnOnce(&mut SendWqe)) {
    // SAFETY: the caller's promise; the application has set the two fields.
    let ((own, queue), wr_id, flags) = unsafe { (locked(qp), (*qp).wr_id, (*qp).wr_flags) };
    match queue.begin(own, opcode, wr_id, flags) {
        Ok(()) => fill(&mut queue.wqe),
        Err(errno) => {
            queue.session.error.get_or_insert(errno);
        }
    }
}

/// Lets `set` add to the work request being built.
///
/// # Safety
/// As for [`locked`].
#[inline]
unsafe fn set(qp: *mut ibv_qp_ex, set: impl FnOnce(&Qp, &mut SendWqe) -> Result<(), Errno>) {
    // SAFETY: the caller's promise.
    let (own, queue) = unsafe { locked(qp) };
    let result = if queue.session.is_open { set(own, &mut queue.wqe) } else { Err(Errno::INVAL) };
    if let Err(errno) = result {
        queue.session.error.get_or_insert(errno);
    }
}

unsafe extern "C" fn start(qp: *mut ibv_qp_ex) {
    // SAFETY: the application passes a live extended QP of ours.
    let own = unsafe { Qp::of(qp.cast()) };
    // SAFETY: as above; an extended QP begins with the plain one, and this thread has not locked its send queue.
    unsafe { qp::accept_offer(qp.cast(), own) };
    own.send.acquire();
    // SAFETY: the lock was taken just now.
    let queue = unsafe { own.send.held() };
    let error = post::check_send(own).err();
    queue.session = Session { mark: queue.mark(), is_open: false, error };
}

unsafe extern "C" fn complete(qp: *mut ibv_qp_ex) -> c_int {
    edge::quick_status(|| {
        // SAFETY: the application calls it after `wr_start`, in the same thread.
        let (own, queue) = unsafe { locked(qp) };
        let (must_ring, streams) = (queue.commit(own), queue.streams(own));
        let error = queue.session.error.take();
        // SAFETY: the lock is held since `wr_start`, and `queue` is used no more.
        unsafe { own.send.release() };
        if must_ring {
            own.ring(streams);
        }
        error.map_or(Ok(()), Err)
    })
}

unsafe extern "C" fn abort(qp: *mut ibv_qp_ex) {
    edge::value((), || {
        // SAFETY: the application calls it after `wr_start`, in the same thread.
        let (own, queue) = unsafe { locked(qp) };
        queue.session.is_open = false;
        queue.roll_back(queue.session.mark);
        // SAFETY: the lock is held since `wr_start`, and `queue` is used no more.
        unsafe { own.send.release() };
    });
}

/// Functions of the extended interface that begin a work request.
macro_rules! requests {
    ($($name:ident($($arg:ident: $type:ty),*) = $opcode:ident, |$wqe:ident| $fill:expr;)*) => {
        $(unsafe extern "C" fn $name(qp: *mut ibv_qp_ex, $($arg: $type),*) {
            // SAFETY: the application calls it after `wr_start`, in the same thread.
            unsafe { begin(qp, Opcode::$opcode, |$wqe| $fill) }
        })*
    };
}

requests! {
    rdma_write(rkey: u32, addr: u64) = Write, |wqe| (wqe.rkey, wqe.remote_addr) = (rkey, addr);
    rdma_write_imm(rkey: u32, addr: u64, imm: u32) = WriteWithImm,
        |wqe| (wqe.rkey, wqe.remote_addr, wqe.imm) = (rkey, addr, imm);
    rdma_read(rkey: u32, addr: u64) = Read, |wqe| (wqe.rkey, wqe.remote_addr) = (rkey, addr);
    send() = Send, |_wqe| ();
    send_imm(imm: u32) = SendWithImm, |wqe| wqe.imm = imm;
    send_inv(key: u32) = SendWithInv, |wqe| wqe.imm = key;
    local_inv(key: u32) = LocalInv, |wqe| wqe.imm = key;
    atomic_cmp_swp(rkey: u32, addr: u64, compare: u64, swap: u64) = CmpAndSwp,
        |wqe| (wqe.rkey, wqe.remote_addr, wqe.compare_add, wqe.swap) = (rkey, addr, compare, swap);
    atomic_fetch_add(rkey: u32, addr: u64, add: u64) = FetchAndAdd,
        |wqe| (wqe.rkey, wqe.remote_addr, wqe.compare_add, wqe.swap) = (rkey, addr, add, 0);
}

unsafe extern "C" fn bind_mw(qp: *mut ibv_qp_ex, _mw: *mut ibv_mw, rkey: u32, info: *const ibv_mw_bind_info) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, and names a live MR or none.
    unsafe { begin(qp, Opcode::BindMw, |wqe| mw::fill(wqe, rkey, &*info)) }
}

unsafe extern "C" fn atomic_write(qp: *mut ibv_qp_ex, rkey: u32, addr: u64, word: *const c_void) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, with eight readable bytes.
    unsafe {
        begin(qp, Opcode::AtomicWrite, |wqe| {
            (wqe.rkey, wqe.remote_addr) = (rkey, addr);
            if let Some(room) = wqe.inline_mut(size_of::<u64>()) {
                room.copy_from_slice(&word.cast::<[u8; size_of::<u64>()]>().read());
            }
        });
    }
}

unsafe extern "C" fn flush(qp: *mut ibv_qp_ex, rkey: u32, addr: u64, len: usize, kind: u8, level: u8) {
    // SAFETY: the application calls it after `wr_start`, in the same thread.
    unsafe {
        begin(qp, Opcode::Flush, |wqe| {
            (wqe.rkey, wqe.remote_addr, wqe.compare_add) = (rkey, addr, len as u64);
            wqe.swap = u64::from(level) << 32 | u64::from(kind);
        });
    }
}

unsafe extern "C" fn set_ud_addr(qp: *mut ibv_qp_ex, ah: *mut ibv_ah, qpn: u32, qkey: u32) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, with a live AH.
    unsafe {
        set(qp, |own, wqe| {
            if own.limits.qp_type != QpType::Ud || ah.is_null() {
                return Err(Errno::INVAL);
            }
            post::set_address(wqe, Ah::of(ah), qpn, qkey);
            Ok(())
        });
    }
}

unsafe extern "C" fn set_xrc_srqn(qp: *mut ibv_qp_ex, srqn: u32) {
    // SAFETY: the application calls it after `wr_start`, in the same thread.
    unsafe {
        set(qp, |own, wqe| {
            if own.limits.qp_type != QpType::XrcSend {
                return Err(Errno::INVAL);
            }
            wqe.srqn = post::check_srqn(srqn)?;
            Ok(())
        });
    }
}

unsafe extern "C" fn set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    // SAFETY: the application calls it after `wr_start`, in the same thread.
    unsafe { set(qp, |own, wqe| replace_sges(wqe, own, &[ibv_sge { addr, length, lkey }])) }
}

unsafe extern "C" fn set_sge_list(qp: *mut ibv_qp_ex, count: usize, list: *const ibv_sge) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, with `count` elements.
    unsafe { set(qp, |own, wqe| replace_sges(wqe, own, post::list(list, to_count(count))?)) }
}

/// Setting the payload a second time replaces it.
fn replace_sges(wqe: &mut SendWqe, qp: &Qp, sges: &[ibv_sge]) -> Result<(), Errno> {
    let (flags, srqn) = (wqe.flags & !flag::INLINE, wqe.srqn);
    wqe.reset();
    (wqe.flags, wqe.srqn) = (flags, srqn);
    post::gather(wqe, qp, sges)
}

unsafe extern "C" fn set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, with readable data.
    unsafe {
        set(qp, |own, wqe| post::copy_inline(wqe, own, [(addr.cast_const().cast(), length)].into_iter()))
    }
}

unsafe extern "C" fn set_inline_data_list(qp: *mut ibv_qp_ex, count: usize, list: *const ibv_data_buf) {
    // SAFETY: the application calls it after `wr_start`, in the same thread, with `count` readable buffers.
    unsafe {
        set(qp, |own, wqe| {
            let parts = post::list(list, to_count(count))?.iter();
            post::copy_inline(wqe, own, parts.map(|part| (part.addr.cast_const().cast(), part.length)))
        });
    }
}

/// A count for [`post::list`], which refuses what is too many.
fn to_count(count: usize) -> c_int {
    c_int::try_from(count).unwrap_or(-1)
}
