//! Memory regions: `ibv_reg_mr`, `ibv_alloc_null_mr`, `ibv_rereg_mr` and `ibv_dereg_mr`.

use std::ops::Range;

use rustix::io::Errno;
use verbs_abi::{
    proto::{Answer, RegMr, Reply, WHOLE_PROCESS},
    shm::{PAGE, Window, arena::REGION_LEN, mr_table::MrEntry},
    verbs::AccessFlags,
};

use super::{
    Step,
    client::{Client, errno},
};
use crate::{account::Resource, throttle::Throttle};

/// A registered memory region.
#[derive(Debug)]
pub(super) struct Mr {
    pd: u32,
    /// What it counts for.
    bytes: u64,
    /// The part that is mapped here.
    mapped: Option<Range<u64>>,
    /// It became something else, and somebody may still use what it was: the part of that that is mapped.
    former: Option<Option<Range<u64>>>,
    /// Whether some of it is reached by a helper.
    foreign: bool,
    /// While it ends or becomes something else: the mark behind the last access that may name what it was.
    mark: Option<u64>,
}

/// The shared part of a region, as it is mapped here.
type Mapped = Option<(Range<u64>, Window)>;

impl Client {
    pub(super) fn reg_mr(&mut self, reg: &RegMr) -> Reply {
        let reg = check(reg)?;
        self.admit(&reg)?;
        let held = [(Resource::Mrs, 1), (Resource::Memory, weight(&reg))];
        if !self.account.take_all(&held) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let taken = self.keys.take(self.limits.max_mr).map_err(|error| errno(&error));
        let made = taken.and_then(|key| match self.map_shared(&reg) {
            Ok(mapped) => Ok((key, mapped)),
            Err(errno) => {
                self.keys.put(key);
                Err(errno)
            }
        });
        let (key, mapped) = match made {
            Ok(made) => made,
            Err(errno) => {
                self.account.give_all(&held);
                return Err(errno);
            }
        };
        let mapped = self.enter(key, &reg, mapped);
        let foreign = is_foreign(mapped.as_ref(), &reg);
        self.use_pd(reg.pd, true);
        let mr = Mr { pd: reg.pd, bytes: weight(&reg), mapped, former: None, foreign, mark: None };
        self.mrs.insert(key, mr);
        Ok(Answer::Mr { key })
    }

    pub(super) fn alloc_null_mr(&mut self, pd: u32) -> Reply {
        if !self.pds.contains_key(&pd) {
            return Err(Errno::INVAL.raw_os_error());
        }
        if !self.account.take(Resource::Mrs, 1) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let key = self.keys.take(self.limits.max_mr).map_err(|error| errno(&error));
        let key = key.inspect_err(|_| self.account.give(Resource::Mrs, 1))?;
        self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.insert_null(key, pd);
            }
        });
        self.use_pd(pd, true);
        self.mrs.insert(key, Mr { pd, bytes: 0, mapped: None, former: None, foreign: false, mark: None });
        Ok(Answer::Mr { key })
    }

    /// The key becomes another region at once; the reply waits until nobody uses what it named before.
    pub(super) fn rereg_mr(&mut self, key: u32, reg: &RegMr, last: bool) -> Step {
        if self.lane.with(|fabric| fabric.memory_mut(self.id).is_some_and(|memory| memory.is_bound(key))) {
            return Step::Done(Err(Errno::BUSY.raw_os_error()));
        }
        let is_changed = match self.mrs.get(&key) {
            None => return Step::Done(Err(Errno::INVAL.raw_os_error())),
            Some(mr) => mr.former.is_some(),
        };
        if !is_changed && let Err(errno) = self.change_mr(key, reg) {
            return Step::Done(Err(errno));
        }
        if !self.is_unused(key, last) {
            return Step::Later;
        }
        let former = self.mrs.get_mut(&key).and_then(|mr| {
            mr.mark = None;
            mr.former.take().flatten()
        });
        if let Some(former) = former {
            self.region.release(&former);
        }
        Step::Done(Ok(Answer::Done))
    }

    fn change_mr(&mut self, key: u32, reg: &RegMr) -> Result<(), i32> {
        let invalid = Errno::INVAL.raw_os_error();
        let reg = check(reg)?;
        let (old_pd, old_bytes) = self.mrs.get(&key).map(|mr| (mr.pd, mr.bytes)).ok_or(invalid)?;
        self.admit(&reg)?;
        self.account.give(Resource::Memory, old_bytes);
        let mapped = match self.account.take(Resource::Memory, weight(&reg)) {
            true => {
                let mapped = self.map_shared(&reg);
                if mapped.is_err() {
                    self.account.give(Resource::Memory, weight(&reg));
                }
                mapped
            }
            false => Err(Errno::NOMEM.raw_os_error()),
        };
        // What was given up a moment ago is still free.
        let mapped = mapped.inspect_err(|_| {
            self.account.take(Resource::Memory, old_bytes);
        })?;
        let mapped = self.enter(key, &reg, mapped);
        self.use_pd(reg.pd, true);
        self.use_pd(old_pd, false);
        if let Some(mr) = self.mrs.get_mut(&key) {
            // What it was counts until nobody uses that.
            mr.foreign |= is_foreign(mapped.as_ref(), &reg);
            mr.former = Some(std::mem::replace(&mut mr.mapped, mapped));
            (mr.pd, mr.bytes) = (reg.pd, weight(&reg));
        }
        Ok(())
    }

    /// Whether a region may be there at all.
    fn admit(&self, reg: &RegMr) -> Result<(), i32> {
        if !self.pds.contains_key(&reg.pd) {
            return Err(Errno::INVAL.raw_os_error());
        }
        if reg.access & AccessFlags::ON_DEMAND.bits() != 0 && !self.reaches_process() {
            return Err(Errno::OPNOTSUPP.raw_os_error());
        }
        Ok(())
    }

    /// Maps the part of a region that was moved to the region memfd.
    fn map_shared(&mut self, reg: &RegMr) -> Result<Mapped, i32> {
        let shared = reg.shared_start..reg.shared_end;
        if is_foreign(Some(&shared), reg) {
            self.need_helper()?;
        }
        if shared.is_empty() {
            return Ok(None);
        }
        match self.region.view(&shared) {
            Ok(window) => Ok(Some((shared, window))),
            // The same bytes, reached the slow way.
            Err(error) if self.reaches_process() => {
                self.need_helper()?;
                unmapped(self.id, &shared, &error);
                Ok(None)
            }
            Err(error) => Err(errno(&error)),
        }
    }

    /// Makes the key stand for the region; returns the part that is mapped.
    fn enter(&self, key: u32, reg: &RegMr, mapped: Mapped) -> Option<Range<u64>> {
        let (range, window) = mapped.unzip();
        let RegMr { pd, addr, len, iova, access, .. } = *reg;
        let Range { start: shared_start, end: shared_end } = range.clone().unwrap_or_default();
        let entry = MrEntry { key, pd, access, iova, addr, len, shared_start, shared_end };
        self.lane.with(|fabric| {
            fabric.end_registration(self.id, key);
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.insert(entry, window);
            }
        });
        range
    }

    /// The key dies at once; the reply waits until nobody uses what it named.
    pub(super) fn dereg_mr(&mut self, key: u32, last: bool) -> Step {
        if !self.mrs.contains_key(&key) {
            return Step::Done(Err(Errno::INVAL.raw_os_error()));
        }
        let free = self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                if memory.is_bound(key) {
                    return None;
                }
                memory.remove(key);
            }
            fabric.end_registration(self.id, key);
            Some(())
        });
        if free.is_none() {
            return Step::Done(Err(Errno::BUSY.raw_os_error()));
        }
        if !self.is_unused(key, last) {
            return Step::Later;
        }
        if let Some(mr) = self.mrs.remove(&key) {
            for mapped in mr.mapped.iter().chain(mr.former.iter().flatten()) {
                self.region.release(mapped);
            }
            self.keys.put(key);
            self.use_pd(mr.pd, false);
            self.account.give_all(&[(Resource::Mrs, 1), (Resource::Memory, mr.bytes)]);
        }
        Step::Done(Ok(Answer::Done))
    }

    /// Whether nobody uses any more what a key named until a moment ago. A direct peer is waited for only so long
    /// (`last`); a page fault of the client's own takes as long as it takes.
    fn is_unused(&mut self, key: u32, last: bool) -> bool {
        let Some(mr) = self.mrs.get_mut(&key) else { return true };
        let (quiet, ended) = self.lane.with(|fabric| {
            let mark = *mr.mark.get_or_insert_with(|| fabric.access_mark(self.id));
            let passed = !mr.foreign || fabric.has_passed(self.id, mark);
            (fabric.is_quiet(self.id), passed && !fabric.is_deregistering(self.id, key))
        });
        ended && (quiet || last)
    }
}

/// Whether some of a region lies outside of the part that is mapped.
fn is_foreign(mapped: Option<&Range<u64>>, reg: &RegMr) -> bool {
    mapped.is_none_or(|mapped| mapped.start > reg.addr || mapped.end < reg.addr.saturating_add(reg.len))
}

/// The bytes that a region counts for: one whose pages are found at each access holds none.
fn weight(reg: &RegMr) -> u64 {
    if reg.access & AccessFlags::ON_DEMAND.bits() == 0 { reg.len } else { 0 }
}

/// Checks what needs no table; returns the region with what counts of it.
fn check(reg: &RegMr) -> Result<RegMr, i32> {
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
    let on_demand = access.contains(AccessFlags::ON_DEMAND);
    let zero_based = access.contains(AccessFlags::ZERO_BASED);
    let is_implicit = on_demand && reg.addr == 0 && reg.len == WHOLE_PROCESS;
    let len = if is_implicit { REGION_LEN } else { reg.len };
    let end = reg.addr.checked_add(len).filter(|end| *end <= REGION_LEN);
    let (Some(end), Some(_)) = (end, reg.iova.checked_add(len)) else { return invalid };
    let page = PAGE as u64;
    let shared = reg.shared_start..reg.shared_end;
    let aligned = shared.start % page == 0 && shared.end % page == 0;
    let inside = shared.start >= reg.addr / page * page && shared.end <= end.next_multiple_of(page);
    let sane = shared.start == shared.end || shared.start < shared.end && aligned && inside && !on_demand;
    // Device memory may be registered in empty pieces; and only there addresses count from the start.
    if len == 0 && !zero_based || zero_based && reg.iova != 0 || !sane {
        return invalid;
    }
    Ok(RegMr { access: access.bits(), len, ..*reg })
}

/// The rights that this device gives.
const KNOWN: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC)
    .union(AccessFlags::MW_BIND)
    .union(AccessFlags::FLUSH_GLOBAL)
    .union(AccessFlags::ZERO_BASED)
    .union(AccessFlags::ON_DEMAND);

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
        assert_eq!(check(&reg()), Ok(reg()));
        assert!(bad(|reg| reg.len = 0));
        assert!(bad(|reg| reg.len = u64::MAX));
        assert!(bad(|reg| reg.addr = REGION_LEN));
        assert!(bad(|reg| reg.iova = u64::MAX - 5));
        assert!(bad(|reg| reg.shared_start += 1));
        assert!(bad(|reg| reg.shared_start = 0xf000));
        assert!(bad(|reg| reg.shared_end += 0x2000));
        assert!(bad(|reg| reg.shared_end = 0x1_0000));
        assert!(bad(|reg| reg.access = 2));
        assert!(bad(|reg| reg.access = 1 << 9), "no persistence");
        assert!(bad(|reg| (reg.access, reg.iova) = (1 << 5, 8)), "zero-based means from zero");
        assert!(bad(|reg| reg.access = 1 << 6), "nothing is moved for access on demand");
        assert!(!bad(|reg| reg.access = 1 | 1 << 20));
        assert!(!bad(|reg| (reg.shared_start, reg.shared_end) = (0, 0)));
        let whole = RegMr {
            addr: 0,
            len: WHOLE_PROCESS,
            iova: 0,
            access: 1 << 6,
            shared_start: 0,
            shared_end: 0,
            pd: 1,
        };
        assert_eq!(check(&whole).map(|reg| reg.len), Ok(REGION_LEN));
        assert!(check(&RegMr { access: 1, ..whole }).is_err(), "only on demand");
    }
}
