//! A queue pair, and work requests as values.
//!
//! Does: create, modify, query, post. Leaves to others: completions (`verbs`), and what goes well together (`pair`).

use std::{ffi::c_int, fmt, ptr, ptr::NonNull, sync::Arc};

use anyhow::{Context as _, Result};
use verbs_abi::ffi::*;

use crate::{
    cq::Cq,
    library::library,
    verbs::{Ah, Errno, Pd, pointer},
};

/// A send work request.
#[derive(Clone, Debug)]
pub(crate) struct Send<'a> {
    pub(crate) wr_id: u64,
    pub(crate) opcode: ibv_wr_opcode,
    pub(crate) flags: u32,
    pub(crate) imm: u32,
    pub(crate) sges: Vec<ibv_sge>,
    /// Address and rkey.
    pub(crate) remote: (u64, u32),
    pub(crate) compare_add: u64,
    pub(crate) swap: u64,
    /// The SRQ that an XRC request goes to.
    pub(crate) srqn: u32,
    /// Where a datagram goes: AH, QP number and qkey.
    pub(crate) to: Option<(&'a Ah, u32, u32)>,
}

impl Send<'_> {
    /// A signaled request of this kind without data.
    pub(crate) fn new(opcode: ibv_wr_opcode) -> Self {
        Self {
            wr_id: 0,
            opcode,
            flags: IBV_SEND_SIGNALED,
            imm: 0,
            sges: Vec::new(),
            remote: (0, 0),
            compare_add: 0,
            swap: 0,
            srqn: 0,
            to: None,
        }
    }

    pub(crate) fn id(mut self, wr_id: u64) -> Self {
        self.wr_id = wr_id;
        self
    }

    pub(crate) fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    pub(crate) fn sge(mut self, sge: ibv_sge) -> Self {
        self.sges.push(sge);
        self
    }

    pub(crate) fn remote(mut self, remote: (u64, u32)) -> Self {
        self.remote = remote;
        self
    }

    pub(crate) fn imm(mut self, imm: u32) -> Self {
        self.imm = imm;
        self
    }

    fn raw(&self, next: *mut ibv_send_wr) -> ibv_send_wr {
        let mut raw = ibv_send_wr {
            wr_id: self.wr_id,
            next,
            sg_list: self.sges.as_ptr().cast_mut(),
            num_sge: self.sges.len() as c_int,
            opcode: self.opcode,
            send_flags: self.flags,
            ..ibv_send_wr::default()
        };
        raw.__bindgen_anon_1.imm_data = self.imm;
        raw.qp_type.xrc = ibv_send_wr__bindgen_ty_3__bindgen_ty_1 { remote_srqn: self.srqn };
        let (remote_addr, rkey) = self.remote;
        if let Some((ah, remote_qpn, remote_qkey)) = self.to {
            raw.wr.ud = ibv_send_wr__bindgen_ty_2__bindgen_ty_3 { ah: ah.raw(), remote_qpn, remote_qkey };
        } else if matches!(self.opcode, IBV_WR_ATOMIC_CMP_AND_SWP | IBV_WR_ATOMIC_FETCH_AND_ADD) {
            let (compare_add, swap) = (self.compare_add, self.swap);
            raw.wr.atomic = ibv_send_wr__bindgen_ty_2__bindgen_ty_2 { remote_addr, compare_add, swap, rkey };
        } else {
            raw.wr.rdma = ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr, rkey };
        }
        raw
    }
}

/// A list that was not posted as a whole: the errno, and the index of the first work request that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) code: i32,
    pub(crate) at: usize,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "work request {} was refused: {}",
            self.at,
            std::io::Error::from_raw_os_error(self.code)
        )
    }
}

impl std::error::Error for Refused {}

/// A queue pair.
#[derive(Debug)]
pub(crate) struct Qp {
    raw: NonNull<ibv_qp>,
    number: u32,
    /// What the QP really got.
    pub(crate) cap: ibv_qp_cap,
    pd: Arc<Pd>,
    _cqs: [Arc<Cq>; 2],
}

// SAFETY: verbs objects may be used by all threads of a process.
unsafe impl std::marker::Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

/// What a QP is created with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QpInit {
    pub(crate) qp_type: ibv_qp_type,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) sq_sig_all: bool,
}

impl Qp {
    pub(crate) fn new(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        init: QpInit,
    ) -> Result<Self, Errno> {
        let mut attr = ibv_qp_init_attr {
            send_cq: ptr::without_provenance_mut(send_cq.addr()),
            recv_cq: ptr::without_provenance_mut(recv_cq.addr()),
            cap: init.cap,
            qp_type: init.qp_type,
            sq_sig_all: c_int::from(init.sq_sig_all),
            ..ibv_qp_init_attr::default()
        };
        // SAFETY: PD and CQs are alive; the attributes are ours.
        let raw = unsafe { (library().ibv_create_qp)(pd.raw(), &mut attr) };
        let code = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let raw = NonNull::new(raw).ok_or(Errno { verb: "ibv_create_qp", code })?;
        // SAFETY: the QP was just made.
        let number = unsafe { raw.as_ref() }.qp_num;
        let cqs = [Arc::clone(send_cq), Arc::clone(recv_cq)];
        Ok(Self { raw, number, cap: attr.cap, pd: Arc::clone(pd), _cqs: cqs })
    }

    /// The same with the extended interface for posting, of these operations (`IBV_QP_EX_WITH_...`).
    pub(crate) fn extended(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        init: QpInit,
        send_ops_flags: u32,
    ) -> Result<Self> {
        let more = ibv_qp_init_attr_ex {
            comp_mask: IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
            send_ops_flags: send_ops_flags.into(),
            ..ibv_qp_init_attr_ex::default()
        };
        Self::with(pd, [send_cq, recv_cq], init, more)
    }

    /// The same with `enum ibv_qp_create_flags`.
    pub(crate) fn with_flags(pd: &Arc<Pd>, cq: &Arc<Cq>, init: QpInit, create_flags: u32) -> Result<Self> {
        let more = ibv_qp_init_attr_ex {
            comp_mask: IBV_QP_INIT_ATTR_CREATE_FLAGS,
            create_flags,
            ..ibv_qp_init_attr_ex::default()
        };
        Self::with(pd, [cq, cq], init, more)
    }

    /// The same with these attributes beside the usual ones.
    fn with(
        pd: &Arc<Pd>,
        [send_cq, recv_cq]: [&Arc<Cq>; 2],
        init: QpInit,
        more: ibv_qp_init_attr_ex,
    ) -> Result<Self> {
        let mut attr = ibv_qp_init_attr_ex {
            send_cq: ptr::without_provenance_mut(send_cq.addr()),
            recv_cq: ptr::without_provenance_mut(recv_cq.addr()),
            cap: init.cap,
            qp_type: init.qp_type,
            sq_sig_all: c_int::from(init.sq_sig_all),
            comp_mask: more.comp_mask | IBV_QP_INIT_ATTR_PD,
            pd: pd.raw(),
            ..more
        };
        let context = pd.context();
        // SAFETY: the context is alive, and an extended one.
        let create = unsafe { (*context.extended()?).create_qp_ex }.context("no create_qp_ex")?;
        // SAFETY: as above; PD and CQs are alive; the attributes are ours.
        let raw = pointer("ibv_create_qp_ex", unsafe { create(context.raw(), &mut attr) })?;
        // SAFETY: the QP was just made.
        let number = unsafe { raw.as_ref() }.qp_num;
        let cqs = [Arc::clone(send_cq), Arc::clone(recv_cq)];
        Ok(Self { raw, number, cap: attr.cap, pd: Arc::clone(pd), _cqs: cqs })
    }

    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn raw(&self) -> *mut ibv_qp {
        self.raw.as_ptr()
    }

    /// Has it send no more than so many kbit/s, in bursts of no more than so many bytes.
    pub(crate) fn limit_rate(&self, rate_limit: u32, max_burst_sz: u32) -> Result<(), Errno> {
        let mut attr =
            ibv_qp_rate_limit_attr { rate_limit, max_burst_sz, ..ibv_qp_rate_limit_attr::default() };
        // SAFETY: the context is alive.
        let modify = unsafe { (*self.pd.context().verbs()).modify_qp_rate_limit }.expect("a provider paces");
        // SAFETY: the QP is alive, the attributes are ours.
        let code = unsafe { modify(self.raw.as_ptr(), &mut attr) };
        if code == 0 { Ok(()) } else { Err(Errno { verb: "ibv_modify_qp_rate_limit", code }) }
    }

    /// Its address, by which events name it.
    pub(crate) fn addr(&self) -> usize {
        self.raw.as_ptr() as usize
    }

    pub(crate) fn modify(&self, attr: &ibv_qp_attr, mask: u32) -> Result<(), Errno> {
        let mut attr = *attr;
        // SAFETY: the QP is alive, the attributes are ours.
        let code = unsafe { (library().ibv_modify_qp)(self.raw.as_ptr(), &mut attr, mask as c_int) };
        if code == 0 { Ok(()) } else { Err(Errno { verb: "ibv_modify_qp", code }) }
    }

    /// Changes nothing but the state.
    pub(crate) fn set_state(&self, state: ibv_qp_state) -> Result<(), Errno> {
        self.modify(&ibv_qp_attr { qp_state: state, ..ibv_qp_attr::default() }, IBV_QP_STATE)
    }

    pub(crate) fn query(&self) -> Result<(ibv_qp_attr, ibv_qp_init_attr), Errno> {
        let (mut attr, mut init) = (ibv_qp_attr::default(), ibv_qp_init_attr::default());
        let mask = (IBV_QP_RATE_LIMIT << 1) - 1;
        // SAFETY: the QP is alive, both structures are ours.
        let code =
            unsafe { (library().ibv_query_qp)(self.raw.as_ptr(), &mut attr, mask as c_int, &mut init) };
        if code == 0 { Ok((attr, init)) } else { Err(Errno { verb: "ibv_query_qp", code }) }
    }

    pub(crate) fn state(&self) -> Result<ibv_qp_state, Errno> {
        Ok(self.query()?.0.qp_state)
    }

    /// Gets the datagrams of a multicast group from now on.
    pub(crate) fn attach(&self, group: [u8; 16]) -> Result<(), Errno> {
        let gid = ibv_gid { raw: group };
        // SAFETY: the QP is alive, the GID is ours.
        let code = unsafe { (library().ibv_attach_mcast)(self.raw.as_ptr(), &gid, 0) };
        if code == 0 { Ok(()) } else { Err(Errno { verb: "ibv_attach_mcast", code }) }
    }

    /// Gets them no more.
    pub(crate) fn detach(&self, group: [u8; 16]) -> Result<(), Errno> {
        let gid = ibv_gid { raw: group };
        // SAFETY: as above.
        let code = unsafe { (library().ibv_detach_mcast)(self.raw.as_ptr(), &gid, 0) };
        if code == 0 { Ok(()) } else { Err(Errno { verb: "ibv_detach_mcast", code }) }
    }

    /// Tries to end a QP that is in use.
    pub(crate) fn try_destroy(&self) -> Result<(), Errno> {
        // SAFETY: the QP is alive; where the call succeeds the test has failed and uses it no more.
        let code = unsafe { (library().ibv_destroy_qp)(self.raw.as_ptr()) };
        if code == 0 { Ok(()) } else { Err(Errno { verb: "ibv_destroy_qp", code }) }
    }

    /// Posts one work request.
    pub(crate) fn send(&self, work: &Send<'_>) -> Result<()> {
        self.send_list(std::slice::from_ref(work))?;
        Ok(())
    }

    /// Posts a list by one call.
    pub(crate) fn send_list(&self, list: &[Send<'_>]) -> Result<(), Refused> {
        let mut raw: Vec<ibv_send_wr> = list.iter().map(|work| work.raw(ptr::null_mut())).collect();
        for at in (1..raw.len()).rev() {
            raw[at - 1].next = &raw mut raw[at];
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the context lives as long as the QP.
        let post = unsafe { (*self.pd.context().raw()).ops.post_send }.expect("a provider posts");
        // SAFETY: the QP is alive; the list and all it points to live until the call returns, AHs for longer.
        let code = unsafe { post(self.raw.as_ptr(), raw.as_mut_ptr(), &mut bad) };
        if code == 0 {
            return Ok(());
        }
        let at = raw.iter().position(|work| ptr::eq(work, bad)).unwrap_or(usize::MAX);
        Err(Refused { code, at })
    }

    /// Posts one receive.
    pub(crate) fn recv(&self, wr_id: u64, sges: &[ibv_sge]) -> Result<()> {
        self.recv_list(&[(wr_id, sges.to_vec())])?;
        Ok(())
    }

    /// Posts a list of receives by one call.
    pub(crate) fn recv_list(&self, list: &[(u64, Vec<ibv_sge>)]) -> Result<(), Refused> {
        let work = |(wr_id, sges): &(u64, Vec<ibv_sge>)| ibv_recv_wr {
            wr_id: *wr_id,
            next: ptr::null_mut(),
            sg_list: sges.as_ptr().cast_mut(),
            num_sge: sges.len() as c_int,
        };
        let mut raw: Vec<ibv_recv_wr> = list.iter().map(work).collect();
        for at in (1..raw.len()).rev() {
            raw[at - 1].next = &raw mut raw[at];
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the context lives as long as the QP.
        let post = unsafe { (*self.pd.context().raw()).ops.post_recv }.expect("a provider posts");
        // SAFETY: the QP is alive; the list and all it points to live until the call returns.
        let code = unsafe { post(self.raw.as_ptr(), raw.as_mut_ptr(), &mut bad) };
        if code == 0 {
            return Ok(());
        }
        let at = raw.iter().position(|work| ptr::eq(work, bad)).unwrap_or(usize::MAX);
        Err(Refused { code, at })
    }

    /// Posts a send whose refusal is what the caller looks for.
    pub(crate) fn refusal(&self, work: &Send<'_>) -> Result<i32> {
        let refused = self.send_list(std::slice::from_ref(work)).err();
        Ok(refused.context("a work request was taken that must not be")?.code)
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: the QP is destroyed once, here; its events were acknowledged.
        let code = unsafe { (library().ibv_destroy_qp)(self.raw.as_ptr()) };
        if code != 0 {
            eprintln!("ibv_destroy_qp: {}", std::io::Error::from_raw_os_error(code));
        }
    }
}
