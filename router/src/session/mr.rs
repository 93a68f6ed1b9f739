//! Memory regions: `ibv_reg_mr` and `ibv_dereg_mr`.

use std::ops::Range;

use rustix::io::Errno;
use verbs_abi::{
    proto::{Answer, RegMr, Reply},
    shm::{PAGE, arena::REGION_LEN, mr_table::MrEntry},
    verbs::AccessFlags,
};

use super::{
    Step,
    client::{Client, errno},
};
use crate::throttle::Throttle;

/// A registered memory region.
#[derive(Debug)]
pub(super) struct Mr {
    pd: u32,
    len: u64,
    /// The part that is mapped here.
    mapped: Option<Range<u64>>,
}

impl Client {
    pub(super) fn reg_mr(&mut self, reg: &RegMr) -> Reply {
        let access = check(reg)?;
        if !self.pds.contains_key(&reg.pd) {
            return Err(Errno::INVAL.raw_os_error());
        }
        let bytes = self.mr_bytes.checked_add(reg.len).filter(|bytes| *bytes <= self.memory_limit);
        let bytes = bytes.ok_or(Errno::NOMEM.raw_os_error())?;
        let key = self.keys.take(self.limits.max_mr).map_err(|error| errno(&error))?;
        let shared = reg.shared_start..reg.shared_end;
        let window = match shared.is_empty() {
            true => None,
            false => match self.region.view(&shared) {
                Ok(window) => Some(window),
                // The same bytes, reached the slow way.
                Err(error) if self.reaches_process => {
                    unmapped(self.id, &shared, &error);
                    None
                }
                Err(error) => {
                    self.keys.put(key);
                    return Err(errno(&error));
                }
            },
        };
        let mapped = window.is_some().then_some(shared);
        let RegMr { pd, addr, len, iova, .. } = *reg;
        let Range { start: shared_start, end: shared_end } = mapped.clone().unwrap_or_default();
        let entry = MrEntry { key, pd, access, iova, addr, len, shared_start, shared_end };
        self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.insert(entry, window);
            }
        });
        self.use_pd(pd, true);
        self.mr_bytes = bytes;
        self.mrs.insert(key, Mr { pd, len, mapped });
        Ok(Answer::Mr { key })
    }

    /// The key dies at once; the reply waits until nobody uses what it named.
    pub(super) fn dereg_mr(&mut self, key: u32, last: bool) -> Step {
        if !self.mrs.contains_key(&key) {
            return Step::Done(Err(Errno::INVAL.raw_os_error()));
        }
        let quiet = self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.remove(key);
            }
            fabric.is_quiet(self.id)
        });
        if !quiet && !last {
            return Step::Later;
        }
        if let Some(mr) = self.mrs.remove(&key) {
            if let Some(mapped) = &mr.mapped {
                self.region.release(mapped);
            }
            self.keys.put(key);
            self.use_pd(mr.pd, false);
            self.mr_bytes -= mr.len;
        }
        Step::Done(Ok(Answer::Done))
    }
}

/// Checks what needs no table; the access flags that count.
fn check(reg: &RegMr) -> Result<u32, i32> {
    let invalid = Err(Errno::INVAL.raw_os_error());
    let Ok(access) = AccessFlags::try_from(reg.access) else { return invalid };
    // Where the memory lies and how it is ordered are hints that this device need not follow.
    let access = access.difference(AccessFlags::HUGETLB | AccessFlags::RELAXED_ORDERING);
    if !access.difference(KNOWN).is_empty() {
        return Err(Errno::OPNOTSUPP.raw_os_error());
    }
    if !access.valid_for_mr() {
        return invalid;
    }
    let end = reg.addr.checked_add(reg.len).filter(|end| *end <= REGION_LEN);
    let (Some(end), Some(_)) = (end, reg.iova.checked_add(reg.len)) else { return invalid };
    let page = PAGE as u64;
    let shared = reg.shared_start..reg.shared_end;
    let aligned = shared.start % page == 0 && shared.end % page == 0;
    let inside = shared.start >= reg.addr / page * page && shared.end <= end.next_multiple_of(page);
    let sane = shared.start == shared.end || shared.start < shared.end && aligned && inside;
    if reg.len == 0 || !sane {
        return invalid;
    }
    Ok(access.bits())
}

/// The rights that this device gives.
const KNOWN: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);

fn unmapped(client: u32, range: &Range<u64>, error: &std::io::Error) {
    static UNMAPPED: Throttle = Throttle::new();
    if let Some(suppressed) = UNMAPPED.admit() {
        let bytes = range.end - range.start;
        tracing::warn!(client, bytes, %error, suppressed, "memory cannot be mapped; it is served, but slowly");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reg() -> RegMr {
        RegMr {
            pd: 1,
            addr: 0x1_0800,
            len: 0x3000,
            iova: 0x1_0800,
            access: 15,
            shared_start: 0x1_1000,
            shared_end: 0x1_3000,
        }
    }

    #[test]
    fn what_a_client_claims_is_checked() {
        let bad = |change: fn(&mut RegMr)| {
            let mut reg = reg();
            change(&mut reg);
            check(&reg).is_err()
        };
        assert_eq!(check(&reg()), Ok(15));
        assert!(bad(|reg| reg.len = 0));
        assert!(bad(|reg| reg.len = u64::MAX));
        assert!(bad(|reg| reg.addr = REGION_LEN));
        assert!(bad(|reg| reg.iova = u64::MAX - 5));
        assert!(bad(|reg| reg.shared_start += 1));
        assert!(bad(|reg| reg.shared_start = 0xf000));
        assert!(bad(|reg| reg.shared_end += 0x2000));
        assert!(bad(|reg| reg.shared_end = 0x1_0000));
        assert!(bad(|reg| reg.access = 2));
        assert!(bad(|reg| reg.access = 1 << 5));
        assert!(!bad(|reg| reg.access = 1 | 1 << 20));
        assert!(!bad(|reg| (reg.shared_start, reg.shared_end) = (0, 0)));
    }
}
