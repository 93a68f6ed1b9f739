//! The memory of one client, as a seat reaches it, and the checks that every key passes.

use std::ptr::NonNull;

use verbs_abi::{
    shm::{Window, mr_table::MrEntry, wqe::Sge},
    verbs::AccessFlags,
};

use crate::window::MemoryWindow;

/// Memory that should be there could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// One client's memory and keys, as this seat reaches them. What is outside of an MR's shared sub-range is for
/// [`crate::Foreign`].
pub trait Memory {
    /// The MR of a key that is valid now; compares the whole key.
    fn lookup(&self, key: u32) -> Option<MrEntry>;

    /// What a peer's key stands for, when it is used at the QP `qpn`: an MR, or what a memory window is bound to.
    fn lookup_remote(&self, key: u32, _qpn: u32) -> Option<MrEntry> {
        self.lookup(key)
    }

    /// Whether this seat can bind and invalidate windows. One that cannot leaves it to the router.
    fn has_windows(&self) -> bool {
        false
    }

    /// The window whose key this is but for [`crate::CHOSEN_BITS`].
    fn window(&self, _key: u32) -> Option<MemoryWindow> {
        None
    }

    /// Replaces a window that [`Self::window`] has told.
    fn set_window(&self, _window: MemoryWindow) {}

    /// Where `[addr, addr + len)`, a range inside the MR's shared sub-range, is mapped in this process. The
    /// pointer is valid for reads and writes of `len` bytes until the MR is invalidated and the seat has left.
    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>>;

    /// The mapping of an MR's shared sub-range, for a NIC to register.
    fn shared(&self, _mr: &MrEntry) -> Option<Window> {
        None
    }

    /// Where a range is mapped in this process in one piece, if its key allows it. `None` tells nothing more than that
    /// the general way must be gone. Valid as long as what [`Self::mapped`] gives.
    #[inline]
    fn locate(&self, range: &KeyedRange) -> Option<NonNull<u8>> {
        let mr = match range.qpn {
            None => self.lookup(range.key),
            Some(qpn) => self.lookup_remote(range.key, qpn),
        };
        within(mr?, range.pd, range.iova, range.len, range.need)?.mapped(self)
    }

    /// Whether all that was read from it so far was its content. Memory that the kernel could not give any more is
    /// zeros from then on, and what was copied from it is worth nothing.
    fn is_intact(&self) -> bool {
        true
    }

    /// Whether this seat can reach the range at all. One that cannot leaves the whole request to the router.
    fn reaches(&self, _mr: &MrEntry, _addr: u64, _len: u64) -> bool {
        true
    }
}

/// What somebody wants to touch.
#[derive(Clone, Copy, Debug)]
pub struct KeyedRange {
    /// The key that is shown.
    pub key: u32,
    /// The protection domain of the QP that the key is used at.
    pub pd: u32,
    /// That QP, where the key is a peer's.
    pub qpn: Option<u32>,
    /// First address, as the key's users name it.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// The rights that it takes.
    pub need: AccessFlags,
}

/// A checked piece of a client's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) mr: MrEntry,
    /// First address in the application.
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

impl Span {
    /// Where all of it is mapped in this process, if it lies in one piece in the shared sub-range.
    #[inline(always)]
    pub(crate) fn mapped(&self, memory: &(impl Memory + ?Sized)) -> Option<NonNull<u8>> {
        let inside = self.addr >= self.mr.shared_start
            && self.addr.checked_add(self.len).is_some_and(|end| end <= self.mr.shared_end);
        if inside { memory.mapped(&self.mr, self.addr, self.len as usize) } else { None }
    }
}

/// Whether this seat reaches every span.
#[inline]
pub(crate) fn all_reached(memory: &impl Memory, spans: &[Span]) -> bool {
    spans.iter().all(|span| memory.reaches(&span.mr, span.addr, span.len))
}

/// The range `[iova, iova + len)` under `key`, if the key's owner, PD, bounds and rights allow it.
#[inline(always)]
pub(crate) fn check(
    memory: &impl Memory,
    pd: u32,
    key: u32,
    iova: u64,
    len: u64,
    need: AccessFlags,
) -> Option<Span> {
    within(memory.lookup(key)?, pd, iova, len, need)
}

/// The same for the key of a peer, used at the QP `qpn`.
#[inline(always)]
pub(crate) fn check_remote(
    memory: &impl Memory,
    (pd, qpn): (u32, u32),
    key: u32,
    iova: u64,
    len: u64,
    need: AccessFlags,
) -> Option<Span> {
    within(memory.lookup_remote(key, qpn)?, pd, iova, len, need)
}

#[inline(always)]
fn within(mr: MrEntry, pd: u32, iova: u64, len: u64, need: AccessFlags) -> Option<Span> {
    let offset = iova.checked_sub(mr.iova)?;
    let inside = offset.checked_add(len).is_some_and(|end| end <= mr.len);
    if mr.pd != pd || !inside || mr.access & need.bits() != need.bits() {
        return None;
    }
    Some(Span { mr, addr: mr.addr.checked_add(offset)?, len })
}

/// Bytes of a scatter or gather list.
#[inline]
pub(crate) fn list_len(sges: &[Sge]) -> u64 {
    sges.iter().map(|sge| u64::from(sge.length)).sum()
}

/// Checks the first `len` bytes of a scatter or gather list into `spans`: what a message does not reach may be
/// anything. False: some SGE is not covered by its lkey.
#[inline]
pub(crate) fn check_list(
    memory: &impl Memory,
    pd: u32,
    sges: &[Sge],
    mut len: u64,
    need: AccessFlags,
    spans: &mut Vec<Span>,
) -> bool {
    spans.clear();
    for sge in sges.iter().filter(|sge| sge.length > 0) {
        if len == 0 {
            break;
        }
        let here = len.min(u64::from(sge.length));
        match check(memory, pd, sge.lkey, sge.addr, here, need) {
            Some(span) => spans.push(span),
            None => return false,
        }
        len -= here;
    }
    true
}
