//! Memory windows: what may be bound and invalidated, by whom. What a window is bound to is kept by [`Memory`].
//!
//! A window of type 1 is bound by `ibv_bind_mw`, as often as one likes, and serves every QP of its PD. One of type 2
//! is bound by a work request under a key whose low byte the application chose, serves the QP that bound it, and must
//! be invalidated before it is bound again.

use verbs_abi::{
    shm::{mr_table::MrEntry, wqe::SendWqe},
    verbs::AccessFlags,
};

use crate::Memory;

/// The bits of a key that the application may choose when it binds a window.
pub const CHOSEN_BITS: u32 = 0xff;

/// A memory window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryWindow {
    /// Its key; but for [`CHOSEN_BITS`] it stays.
    pub key: u32,
    /// Protection domain.
    pub pd: u32,
    /// Whether it is of type 2.
    pub is_type_2: bool,
    /// What it is bound to, if it is.
    pub bound: Option<Bound>,
}

/// What a window is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The key of the MR.
    pub mr: u32,
    /// The QP that it serves, 0 for every one.
    pub qpn: u32,
    /// The part of the MR under the window's key, with the rights of the window.
    pub entry: MrEntry,
}

/// A window could not be bound or invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// Binds a window, as a work request of the QP `qpn` asks.
pub(crate) fn bind(memory: &impl Memory, pd: u32, qpn: u32, wqe: &SendWqe) -> Result<(), Refused> {
    let (addr, len) = (wqe.remote_addr, wqe.compare_add);
    let (mr_key, access) = (wqe.swap as u32, (wqe.swap >> 32) as u32);
    let window = memory.window(wqe.rkey).filter(|window| window.pd == pd).ok_or(Refused)?;
    if window.is_type_2 && (window.bound.is_some() || len == 0) {
        return Err(Refused);
    }
    let bound = match len {
        0 => None,
        _ => {
            let entry = part(memory, pd, mr_key, (addr, len), access).ok_or(Refused)?;
            let qpn = if window.is_type_2 { qpn } else { 0 };
            Some(Bound { mr: mr_key, qpn, entry: MrEntry { key: wqe.rkey, ..entry } })
        }
    };
    memory.set_window(MemoryWindow { key: wqe.rkey, bound, ..window });
    Ok(())
}

/// The part of an MR that a window may be bound to with these rights.
fn part(memory: &impl Memory, pd: u32, mr: u32, range: (u64, u64), access: u32) -> Option<MrEntry> {
    const RIGHTS: AccessFlags =
        AccessFlags::REMOTE_READ.union(AccessFlags::REMOTE_WRITE).union(AccessFlags::REMOTE_ATOMIC);
    let (addr, len) = range;
    let mr = memory.lookup(mr)?;
    let has = |right: AccessFlags| mr.access & right.bits() != 0;
    let access = AccessFlags::try_from(access).ok()?;
    let writes = access.intersects(AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC);
    let offset = addr.checked_sub(mr.iova)?;
    let inside = offset.checked_add(len).is_some_and(|end| end <= mr.len);
    if mr.pd != pd || !inside || !has(AccessFlags::MW_BIND) || writes && !has(AccessFlags::LOCAL_WRITE) {
        return None;
    }
    let iova = if access.contains(AccessFlags::ZERO_BASED) { 0 } else { addr };
    let kept = mr.access & AccessFlags::ON_DEMAND.bits();
    let access = (access & RIGHTS).bits() | kept;
    Some(MrEntry { access, iova, addr: mr.addr.checked_add(offset)?, len, ..mr })
}

/// Whether a peer of the QP `qpn` may invalidate the window of a key.
pub(crate) fn may_invalidate(memory: &impl Memory, pd: u32, key: u32, qpn: u32) -> bool {
    let window = memory.window(key).filter(|window| window.pd == pd && window.key == key);
    window.is_some_and(|window| window.is_type_2 && window.bound.is_some_and(|bound| bound.qpn == qpn))
}

/// Makes the key of a bound window of type 2 useless. With a `qpn` only if the window serves that QP.
pub(crate) fn invalidate(memory: &impl Memory, pd: u32, key: u32, qpn: Option<u32>) -> Result<(), Refused> {
    let window = memory.window(key).filter(|window| window.pd == pd && window.key == key).ok_or(Refused)?;
    let bound = window.bound.filter(|bound| qpn.is_none_or(|qpn| bound.qpn == qpn)).ok_or(Refused)?;
    if !window.is_type_2 {
        return Err(Refused);
    }
    debug_assert_eq!(bound.entry.key, key);
    memory.set_window(MemoryWindow { bound: None, ..window });
    Ok(())
}
