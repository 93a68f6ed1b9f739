//! Advice about memory that is registered on demand: what is asked for is brought into memory now.
//!
//! The router finds such pages at each access, so advice can spare time and never changes a result.

use std::ffi::{c_int, c_void};

use verbs_abi::ffi::{self, ibv_pd, ibv_sge};
use verbs_abi::shm::PAGE;
use verbs_abi::shm::mr_table::MrTable;
use verbs_abi::verbs::AccessFlags;

use crate::abi::edge::{self, Errno};
use crate::device;
use crate::pd::Pd;

/// `IBV_ADVISE_MR_FLAG_FLUSH`: the call returns when the advice is followed.
const FLUSH: u32 = 1;

pub(crate) unsafe extern "C" fn advise(
    pd: *mut ibv_pd,
    advice: ffi::ib_uverbs_advise_mr_advice,
    flags: u32,
    list: *mut ibv_sge,
    count: u32,
) -> c_int {
    edge::status(|| {
        // SAFETY: libibverbs passes a live PD of ours, whose context is open.
        let (device, own) = unsafe { (device::state((*pd).context), Pd::of(pd)) };
        device.health().check_owner()?;
        let is_write = advice == ffi::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE;
        if advice > ffi::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT {
            return Err(Errno::OPNOTSUPP);
        }
        if flags & !FLUSH != 0 || count == 0 || list.is_null() {
            return Err(Errno::INVAL);
        }
        let table = MrTable::new(&device.arena).ok_or(Errno::PROTO)?;
        // SAFETY: the application passes `count` elements.
        for sge in unsafe { std::slice::from_raw_parts(list, count as usize) } {
            check(&table, own.id, sge, is_write)?;
            if advice != ffi::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT {
                let fetched = populate(sge, is_write);
                if flags & FLUSH != 0 {
                    fetched?;
                }
            }
        }
        Ok(())
    })
}

/// Whether the element lies in a region on demand of this PD.
fn check(table: &MrTable, pd: u32, sge: &ibv_sge, is_write: bool) -> Result<(), Errno> {
    let mr = table.lookup(sge.lkey).ok_or(Errno::NOENT)?;
    let may = |right: AccessFlags| mr.access & right.bits() != 0;
    if mr.pd != pd || is_write && !may(AccessFlags::LOCAL_WRITE) {
        return Err(Errno::PERM);
    }
    let inside = sge.addr.checked_sub(mr.iova).and_then(|offset| offset.checked_add(u64::from(sge.length)));
    if !may(AccessFlags::ON_DEMAND) || inside.is_none_or(|end| end > mr.len) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

/// Brings the pages in. Kernels that have no such advice leave it to the first access.
fn populate(sge: &ibv_sge, is_write: bool) -> Result<(), Errno> {
    let start = sge.addr as usize / PAGE * PAGE;
    let end = (sge.addr as usize + sge.length as usize).next_multiple_of(PAGE);
    let advice = if is_write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: bringing pages in changes no byte of them.
    if unsafe { libc::madvise(start as *mut c_void, end - start, advice) } == 0 {
        return Ok(());
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EINVAL) => Ok(()),
        _ => Err(Errno::FAULT),
    }
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::mr_table::MrEntry;
    use verbs_abi::shm::{BLOCK, Window, arena};

    use super::*;

    #[test]
    fn advice_is_taken_for_the_own_regions_on_demand_only() {
        let arena = Window::heap(arena::MR_TABLE as usize + arena::MAX_MR as usize * BLOCK);
        let table = MrTable::new(&arena).unwrap();
        let access = (AccessFlags::ON_DEMAND | AccessFlags::REMOTE_READ).bits();
        let mr = MrEntry {
            key: 5,
            pd: 1,
            access,
            iova: 0x1000,
            addr: 0x1000,
            len: 0x2000,
            shared_start: 0,
            shared_end: 0,
        };
        table.publish(&mr);
        table.publish(&MrEntry { key: 1 << 15 | 6, access: 1, ..mr });
        let sge = |addr, length, lkey| ibv_sge { addr, length, lkey };
        assert_eq!(check(&table, 1, &sge(0x1800, 0x1800, 5), false), Ok(()));
        assert_eq!(check(&table, 1, &sge(0x1800, 0x1801, 5), false), Err(Errno::INVAL));
        assert_eq!(check(&table, 1, &sge(0x800, 8, 5), false), Err(Errno::INVAL));
        assert_eq!(check(&table, 1, &sge(0x1000, 8, 5), true), Err(Errno::PERM), "not writable");
        assert_eq!(check(&table, 2, &sge(0x1000, 8, 5), false), Err(Errno::PERM));
        assert_eq!(check(&table, 1, &sge(0x1000, 8, 1 << 15 | 6), false), Err(Errno::INVAL));
        assert_eq!(check(&table, 1, &sge(0x1000, 8, 9), false), Err(Errno::NOENT));
    }

    #[test]
    fn memory_that_is_not_there_cannot_be_brought_in() {
        let there = vec![0_u8; 3 * PAGE];
        let sge = |addr: usize| ibv_sge { addr: addr as u64, length: PAGE as u32, lkey: 0 };
        assert_eq!(populate(&sge(there.as_ptr().addr()), false), Ok(()));
        assert_eq!(populate(&sge(PAGE), false), Err(Errno::FAULT));
    }
}
