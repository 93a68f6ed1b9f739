//! A client's region memfd as the router holds it: the pieces of it that registered memory needs mapped here.
//!
//! Pieces are rounded out to chunks and shared: thousands of small MRs of one heap cost one mapping, and the
//! number of mappings of a process is limited. Mapping more than an MR gives no one access to more: the router
//! alone maps it, and it checks bounds on every use.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use verbs_abi::shm::{Window, arena::REGION_LEN};

use crate::{arena, guard::Health, segment};

/// Pieces start and end on multiples of this.
const CHUNK: u64 = 256 << 20;
/// Mappings that one client may cause, so that no client takes the limit of the process.
const MAX_VIEWS: usize = 8192;

/// The region of one client.
#[derive(Debug)]
pub(crate) struct Region {
    file: OwnedFd,
    views: BTreeMap<(u64, u64), (Window, u32)>,
    health: Arc<Health>,
}

impl Region {
    /// A new region. File offset is application address. What happens to its memory concerns `health`.
    pub(crate) fn new(health: &Arc<Health>) -> io::Result<Self> {
        let file = segment::sealed(c"freeflow-region", REGION_LEN)?;
        Ok(Self { file, views: BTreeMap::new(), health: Arc::clone(health) })
    }

    /// The window of the addresses `range`. Each call is answered by one of [`Self::release`].
    pub(crate) fn view(&mut self, range: &Range<u64>) -> io::Result<Window> {
        let (start, end) = chunks(range);
        let full = self.views.len() >= MAX_VIEWS;
        let (window, users) = match self.views.entry((start, end)) {
            Entry::Occupied(view) => view.into_mut(),
            Entry::Vacant(_) if full => return Err(io::ErrorKind::OutOfMemory.into()),
            Entry::Vacant(room) => {
                let len = usize::try_from(end - start).map_err(|_| io::ErrorKind::OutOfMemory)?;
                room.insert((arena::map(&self.file, start, len, &self.health)?, 0))
            }
        };
        let len = (range.end - range.start) as usize;
        let part = window.sub(range.start - start, len).ok_or(io::ErrorKind::InvalidInput)?;
        *users += 1;
        Ok(part)
    }

    /// Says that one user of `range` is gone. The mapping goes with the last one.
    pub(crate) fn release(&mut self, range: &Range<u64>) {
        if let Entry::Occupied(mut view) = self.views.entry(chunks(range)) {
            view.get_mut().1 -= 1;
            if view.get().1 == 0 {
                view.remove();
            }
        }
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `range`, which lies inside the region, rounded out.
fn chunks(range: &Range<u64>) -> (u64, u64) {
    (range.start / CHUNK * CHUNK, range.end.next_multiple_of(CHUNK))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn an_offset_of_the_file_is_the_address_of_the_application() {
        let mut region = Region::new(&Arc::default()).unwrap();
        let range = 0x7f12_3456_7000..0x7f12_3456_9000;
        let window = region.view(&range).unwrap();
        window.u64(8).store(5, Ordering::Relaxed);
        let direct = Window::map(&region, range.start, 4096, false).unwrap();
        assert_eq!(direct.u64(8).load(Ordering::Relaxed), 5);
    }

    #[test]
    fn neighbours_share_a_mapping_and_the_last_user_ends_it() {
        let mut region = Region::new(&Arc::default()).unwrap();
        let ranges: Vec<_> = (0..1000u64).map(|i| 0x1000_0000 + i * 8192..0x1000_1000 + i * 8192).collect();
        ranges.iter().for_each(|range| drop(region.view(range).unwrap()));
        assert_eq!(region.views.len(), 1);
        ranges.iter().for_each(|range| region.release(range));
        assert!(region.views.is_empty());
    }

    #[test]
    fn memory_beyond_four_gigabytes_is_one_piece() {
        let mut region = Region::new(&Arc::default()).unwrap();
        let range = 0x5000..0x5000 + (6 << 30);
        assert_eq!(region.view(&range).unwrap().len(), 6 << 30);
        assert!(region.view(&(0..REGION_LEN)).is_err(), "more than an address space holds");
        region.release(&range);
        assert!(region.views.is_empty());
    }
}
