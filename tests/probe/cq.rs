//! Completion channels, CQs and completions.
//!
//! Does: polling, arming and events. Leaves to others: posting (`qp`), and the other objects (`verbs`).

use std::{
    ffi::{CStr, c_int},
    ptr::{self, NonNull},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use verbs_abi::ffi::*;

use crate::{
    cancel::Wait,
    library::library,
    verbs::{Context, Errno, check, pointer, readable},
};

/// A completion channel.
#[derive(Debug)]
pub(crate) struct Channel {
    raw: NonNull<ibv_comp_channel>,
    _context: Arc<Context>,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        // SAFETY: the context is alive.
        let raw = unsafe { (library().ibv_create_comp_channel)(context.raw()) };
        let raw = pointer("ibv_create_comp_channel", raw)?;
        Ok(Arc::new(Self { raw, _context: Arc::clone(context) }))
    }

    /// Whether an event is there, or comes in time.
    pub(crate) fn has_event(&self, timeout: Duration) -> bool {
        // SAFETY: the channel is alive.
        readable(unsafe { self.raw.as_ref() }.fd, timeout)
    }

    pub(crate) fn fd(&self) -> c_int {
        // SAFETY: the channel is alive.
        unsafe { self.raw.as_ref() }.fd
    }

    /// What a thread that waits for an event is in.
    pub(crate) fn wait(&self) -> Wait {
        let function = library().ibv_get_cq_event;
        // SAFETY: a pointer for a pointer, of as many arguments.
        Wait { function: unsafe { std::mem::transmute_copy(&function) }, channel: self.raw.as_ptr().cast() }
    }

    /// Blocks for an event of any CQ, acknowledges it, and tells the CQ's address.
    pub(crate) fn event(&self) -> Result<usize, Errno> {
        Ok(self.take_event()?.0 as usize)
    }

    /// Blocks for an event that is acknowledged when it is dropped.
    pub(crate) fn take_event(&self) -> Result<CqEvent, Errno> {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive, both results are ours.
        let code = unsafe { (library().ibv_get_cq_event)(self.raw.as_ptr(), &mut cq, &mut context) };
        check("ibv_get_cq_event", code)?;
        Ok(CqEvent(cq))
    }
}

/// A completion event that is not yet acknowledged.
#[derive(Debug)]
pub(crate) struct CqEvent(*mut ibv_cq);

impl Drop for CqEvent {
    fn drop(&mut self) {
        // SAFETY: the CQ of the event is alive: its destruction waits for this acknowledgement.
        unsafe { (library().ibv_ack_cq_events)(self.0, 1) };
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: all CQs of the channel are gone: each holds a reference.
        unsafe { (library().ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: ibv_wc_status,
    pub(crate) opcode: ibv_wc_opcode,
    pub(crate) byte_len: u32,
    pub(crate) imm: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) flags: u32,
}

/// What an extended CQ can be asked for, but for times.
pub(crate) const ALL_FIELDS: u32 = IBV_WC_EX_WITH_BYTE_LEN
    | IBV_WC_EX_WITH_IMM
    | IBV_WC_EX_WITH_QP_NUM
    | IBV_WC_EX_WITH_SRC_QP
    | IBV_WC_EX_WITH_SLID
    | IBV_WC_EX_WITH_SL
    | IBV_WC_EX_WITH_DLID_PATH_BITS;

/// A completion of an extended CQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) wc: Wc,
    pub(crate) vendor_err: u32,
    pub(crate) slid: u32,
    pub(crate) sl: u8,
    pub(crate) path_bits: u8,
}

impl Wc {
    /// Fails, by the name of the status, where it is another than this.
    pub(crate) fn expect(&self, status: ibv_wc_status) -> Result<()> {
        ensure!(
            self.status == status,
            "WR {} ended with {}, not with {}",
            self.wr_id,
            status_name(self.status),
            status_name(status)
        );
        Ok(())
    }
}

/// What libibverbs calls a status.
pub(crate) fn status_name(status: ibv_wc_status) -> String {
    // SAFETY: the function returns a static C string for any number.
    unsafe { CStr::from_ptr((library().ibv_wc_status_str)(status)) }.to_string_lossy().into_owned()
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct Cq {
    raw: NonNull<ibv_cq>,
    context: Arc<Context>,
    channel: Option<Arc<Channel>>,
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    pub(crate) fn new(
        context: &Arc<Context>,
        entries: u32,
        channel: Option<&Arc<Channel>>,
    ) -> Result<Arc<Self>, Errno> {
        let raw_channel = channel.map_or(ptr::null_mut(), |channel| channel.raw.as_ptr());
        // SAFETY: context and channel are alive; no CQ context is wanted.
        let raw = unsafe {
            (library().ibv_create_cq)(context.raw(), entries as c_int, ptr::null_mut(), raw_channel, 0)
        };
        let raw = pointer("ibv_create_cq", raw)?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context), channel: channel.cloned() }))
    }

    /// An extended CQ without a channel, whose completions tell these things (`IBV_WC_EX_...`).
    pub(crate) fn extended(context: &Arc<Context>, entries: u32, wc_flags: u32) -> Result<Arc<Self>> {
        let mut attr =
            ibv_cq_init_attr_ex { cqe: entries, wc_flags: wc_flags.into(), ..ibv_cq_init_attr_ex::default() };
        // SAFETY: the context is alive, and was found to be an extended one.
        let create = unsafe { (*context.extended()?).create_cq_ex }.context("no create_cq_ex")?;
        // SAFETY: as above; the attributes are ours.
        let raw = pointer("ibv_create_cq_ex", unsafe { create(context.raw(), &mut attr) })?;
        Ok(Arc::new(Self { raw: raw.cast(), context: Arc::clone(context), channel: None }))
    }

    /// An extended CQ without a channel, with `enum ibv_create_cq_attr_flags`.
    pub(crate) fn with_flags(context: &Arc<Context>, entries: u32, flags: u32) -> Result<Arc<Self>, Errno> {
        let mut attr = ibv_cq_init_attr_ex {
            cqe: entries,
            comp_mask: IBV_CQ_INIT_ATTR_MASK_FLAGS,
            flags,
            ..ibv_cq_init_attr_ex::default()
        };
        // SAFETY: the context is alive.
        let create = unsafe { (*context.verbs()).create_cq_ex }.expect("a provider makes CQs");
        // SAFETY: as above; the attributes are ours.
        let raw = pointer("ibv_create_cq_ex", unsafe { create(context.raw(), &mut attr) })?;
        Ok(Arc::new(Self { raw: raw.cast(), context: Arc::clone(context), channel: None }))
    }

    /// Gives it another number of entries.
    pub(crate) fn resize(&self, entries: u32) -> Result<(), Errno> {
        // SAFETY: the CQ is alive.
        check("ibv_resize_cq", unsafe { (library().ibv_resize_cq)(self.raw.as_ptr(), entries as c_int) })
    }

    /// Holds events back for so many completions or microseconds.
    pub(crate) fn moderate(&self, cq_count: u16, cq_period: u16) -> Result<(), Errno> {
        let moderate = ibv_moderate_cq { cq_count, cq_period };
        let mut attr = ibv_modify_cq_attr { attr_mask: IBV_CQ_ATTR_MODERATE, moderate };
        // SAFETY: the context is alive.
        let modify = unsafe { (*self.context.verbs()).modify_cq }.expect("a provider modifies CQs");
        // SAFETY: the CQ is alive, the attributes are ours.
        check("ibv_modify_cq", unsafe { modify(self.raw.as_ptr(), &mut attr) })
    }

    /// Polls an extended CQ until there is a completion, which is read from what this gives, and the poll ended.
    fn begin_poll(&self) -> Result<*mut ibv_cq_ex> {
        let raw: *mut ibv_cq_ex = self.raw.as_ptr().cast();
        let start = Instant::now();
        // SAFETY: the CQ is alive and was made as an extended one, so its functions are there and may be called.
        unsafe {
            let begin = (*raw).start_poll.context("no start_poll")?;
            while begin(raw, &mut ibv_poll_cq_attr::default()) != 0 {
                ensure!(start.elapsed() < Duration::from_secs(5), "no completion came");
            }
        }
        Ok(raw)
    }

    /// Takes the next completion of an extended CQ that was made for all [`ALL_FIELDS`], field by field.
    pub(crate) fn next_fields(&self) -> Result<Fields> {
        let raw = self.begin_poll()?;
        // SAFETY: the CQ is alive, an extended one, and being polled, so its functions are there and may be called.
        unsafe {
            let wc = Wc {
                wr_id: (*raw).wr_id,
                status: (*raw).status,
                opcode: (*raw).read_opcode.context("no read_opcode")?(raw),
                byte_len: (*raw).read_byte_len.context("no read_byte_len")?(raw),
                imm: (*raw).read_imm_data.context("no read_imm_data")?(raw),
                qp_num: (*raw).read_qp_num.context("no read_qp_num")?(raw),
                src_qp: (*raw).read_src_qp.context("no read_src_qp")?(raw),
                flags: (*raw).read_wc_flags.context("no read_wc_flags")?(raw),
            };
            let fields = Fields {
                wc,
                vendor_err: (*raw).read_vendor_err.context("no read_vendor_err")?(raw),
                slid: (*raw).read_slid.context("no read_slid")?(raw),
                sl: (*raw).read_sl.context("no read_sl")?(raw),
                path_bits: (*raw).read_dlid_path_bits.context("no read_dlid_path_bits")?(raw),
            };
            (*raw).end_poll.context("no end_poll")?(raw);
            Ok(fields)
        }
    }

    /// Takes the next completion of an extended CQ: its status, and its times by the device's and by the wall's clock.
    pub(crate) fn next_with_times(&self) -> Result<(ibv_wc_status, u64, u64)> {
        let raw = self.begin_poll()?;
        // SAFETY: the CQ is alive, an extended one, and being polled, so its functions are there and may be called.
        unsafe {
            let device = (*raw).read_completion_ts.context("no read_completion_ts")?(raw);
            let wall = (*raw).read_completion_wallclock_ns.context("no wallclock")?(raw);
            let status = (*raw).status;
            (*raw).end_poll.context("no end_poll")?(raw);
            Ok((status, device, wall))
        }
    }

    pub(crate) fn addr(&self) -> usize {
        self.raw.as_ptr() as usize
    }

    /// Takes up to `limit` completions.
    pub(crate) fn poll(&self, limit: usize) -> Result<Vec<Wc>> {
        let mut raw = [ibv_wc::default(); 64];
        let limit = limit.min(raw.len());
        // SAFETY: the context is alive, and the provider has set its table.
        let poll = unsafe { (*self.context.raw()).ops.poll_cq }.context("no poll_cq")?;
        // SAFETY: the CQ is alive; the array has room for `limit` completions.
        let count = unsafe { poll(self.raw.as_ptr(), limit as c_int, raw.as_mut_ptr()) };
        ensure!(count >= 0, "ibv_poll_cq: {count}");
        Ok(raw[..count as usize].iter().map(completion).collect())
    }

    /// Polls until `count` completions have come.
    pub(crate) fn wait(&self, count: usize, timeout: Duration) -> Result<Vec<Wc>> {
        let start = Instant::now();
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.poll(count - all.len())?);
            ensure!(
                all.len() >= count || start.elapsed() < timeout,
                "only {} of {count} completions within {timeout:?}: {all:?}",
                all.len()
            );
        }
        Ok(all)
    }

    /// Polls for the next completion.
    pub(crate) fn next(&self) -> Result<Wc> {
        Ok(self.wait(1, Duration::from_secs(5))?[0])
    }

    /// Fails where a completion comes within this time.
    pub(crate) fn stays_empty(&self, time: Duration) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            if let Some(wc) = self.poll(1)?.first() {
                bail!("a completion that should not be: {wc:?}");
            }
        }
        Ok(())
    }

    /// Asks for an event at the next completion.
    pub(crate) fn arm(&self, solicited_only: bool) -> Result<()> {
        // SAFETY: the context is alive, and the provider has set its table.
        let arm = unsafe { (*self.context.raw()).ops.req_notify_cq }.context("no req_notify_cq")?;
        // SAFETY: the CQ is alive.
        check("ibv_req_notify_cq", unsafe { arm(self.raw.as_ptr(), c_int::from(solicited_only)) })?;
        Ok(())
    }

    pub(crate) fn channel(&self) -> Result<&Arc<Channel>> {
        self.channel.as_ref().context("the CQ has no channel")
    }

    /// Tries to end a CQ that is in use.
    pub(crate) fn try_destroy(&self) -> Result<(), Errno> {
        // SAFETY: the CQ is alive; where the call succeeds the test has failed and uses it no more.
        check("ibv_destroy_cq", unsafe { (library().ibv_destroy_cq)(self.raw.as_ptr()) })
    }
}

fn completion(raw: &ibv_wc) -> Wc {
    Wc {
        wr_id: raw.wr_id,
        status: raw.status,
        opcode: raw.opcode,
        byte_len: raw.byte_len,
        // SAFETY: both members of the union are 32 bits wide, and any bits are a number.
        imm: unsafe { raw.__bindgen_anon_1.imm_data },
        qp_num: raw.qp_num,
        src_qp: raw.src_qp,
        flags: raw.wc_flags,
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: all QPs of the CQ are gone: each holds a reference; all its events were acknowledged.
        unsafe { (library().ibv_destroy_cq)(self.raw.as_ptr()) };
    }
}
