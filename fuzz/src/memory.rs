//! A client's memory that notices when the engine reaches for what it was not given.

use std::{cell::RefCell, ptr::NonNull, rc::Rc, sync::atomic::Ordering};

use engine::{CHOSEN_BITS, Fault, Foreign, Memory, MemoryWindow};
use verbs_abi::{
    shm::{Window, mr_table::MrEntry},
    verbs::AccessFlags,
};

/// Protection domain of the ordinary regions.
pub(crate) const PD: u32 = 7;
/// Another one of the same client.
pub(crate) const OTHER_PD: u32 = 8;
/// Address of the first byte of each client's memory; it need not be an address of this process.
pub(crate) const BASE: u64 = 0x10_0000;
/// Bytes of it.
pub(crate) const LEN: u64 = (2 * REGIONS.len() as u64 + 1) * REGION;
/// Bytes of one region. Before, between and after them lies as much that is in none.
pub(crate) const REGION: u64 = 1024;

/// The regions of a client; which of them a number means is the order here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Region {
    /// All rights, all of it mapped.
    Mapped,
    /// All rights; a page's middle is mapped, its edges are reached by calls.
    Edges,
    /// All rights, reached by calls alone.
    Foreign,
    /// No rights but reading it here.
    ReadOnly,
    /// All rights in another PD.
    OtherPd,
    /// Remote addresses are not the application's.
    Shifted,
    /// Mapped for all that is known, but cannot be reached.
    Broken,
}

/// All kinds, by number.
pub(crate) const REGIONS: [Region; 7] = [
    Region::Mapped,
    Region::Edges,
    Region::Foreign,
    Region::ReadOnly,
    Region::OtherPd,
    Region::Shifted,
    Region::Broken,
];

/// One client's memory. A clone is another view of the same bytes.
#[derive(Clone, Debug)]
pub(crate) struct Guarded {
    bytes: Window,
    mrs: Vec<MrEntry>,
    windows: Rc<RefCell<[MemoryWindow; WINDOWS]>>,
    /// Keys looked up since the last [`Memory::mapped`], for a message that helps.
    looked_up: RefCell<u32>,
}

impl Guarded {
    /// Memory with a region of each kind. `client` tells its keys from those of others.
    pub(crate) fn new(client: u32) -> Self {
        let bytes = Window::heap(LEN as usize);
        for at in (0..LEN as usize).step_by(8) {
            bytes.u64(at).store(canary(client, at as u64), Ordering::Relaxed);
        }
        let window = |n| MemoryWindow {
            key: window_key(client, n),
            pd: if n == 0 { OTHER_PD } else { PD },
            is_type_2: n != 1,
            bound: None,
        };
        Self {
            bytes,
            mrs: REGIONS.map(|region| entry(client, region)).to_vec(),
            windows: Rc::new(RefCell::new(std::array::from_fn(window))),
            looked_up: RefCell::new(0),
        }
    }

    /// The bytes, for whoever owns them.
    pub(crate) fn bytes(&self) -> Window {
        self.bytes.clone()
    }

    /// Ends a region, unless a window is bound to it.
    pub(crate) fn remove(&mut self, key: u32) {
        let windows = self.windows.borrow();
        if !windows.iter().any(|window| window.bound.is_some_and(|bound| bound.mr == key)) {
            self.mrs.retain(|mr| mr.key != key);
        }
    }

    /// Whether that is a region now, or a window's part of one.
    fn is_known(&self, mr: &MrEntry) -> bool {
        let mut bound = self.mrs.iter().any(|known| known == mr);
        for window in self.windows.borrow().iter() {
            bound |= window.bound.is_some_and(|bound| {
                bound.entry == *mr && self.mrs.iter().any(|known| known.key == bound.mr)
            });
        }
        bound
    }

    /// Where its own program finds `len` bytes at `addr`.
    pub(crate) fn pointer(&self, addr: u64, len: usize) -> NonNull<u8> {
        assert!(self.region_at(addr, len as u64).is_some(), "{len} bytes at {addr:#x} are in no region");
        NonNull::new(self.bytes.as_ptr().wrapping_add((addr - BASE) as usize)).unwrap()
    }

    fn region_at(&self, addr: u64, len: u64) -> Option<&MrEntry> {
        self.mrs.iter().find(|mr| addr >= mr.addr && addr + len <= mr.addr + mr.len)
    }

    fn offset(&self, addr: u64, len: u64, write: bool) -> usize {
        let mr = self.region_at(addr, len);
        let mr = mr.unwrap_or_else(|| panic!("{len} bytes at {addr:#x} are in no region"));
        assert!(
            !write || mr.access & AccessFlags::LOCAL_WRITE.bits() != 0,
            "a write of {len} bytes at {addr:#x}, which may only be read"
        );
        (addr - BASE) as usize
    }
}

/// Memory windows of a client: one of another PD, one of type 1, one of type 2.
pub(crate) const WINDOWS: usize = 3;

/// The key of a client's window, before a program chose its low byte.
pub(crate) fn window_key(client: u32, n: usize) -> u32 {
    0x5678_0000 + client * 0x1000 + n as u32 * 0x100
}

/// What an untouched word holds.
pub(crate) fn canary(client: u32, at: u64) -> u64 {
    (u64::from(client) << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The key of a client's region.
pub(crate) fn key(client: u32, region: Region) -> u32 {
    0x1234_0000 + client * 0x100 + region as u32
}

/// The first address of a region, as its application names it.
pub(crate) fn addr(region: Region) -> u64 {
    BASE + REGION + region as u64 * 2 * REGION
}

/// The same as keys' users name it.
pub(crate) fn iova(region: Region) -> u64 {
    if region == Region::Shifted { u64::MAX - REGION } else { addr(region) }
}

fn entry(client: u32, region: Region) -> MrEntry {
    let (start, end) = (addr(region), addr(region) + REGION);
    let (shared_start, shared_end) = match region {
        Region::Edges => (start + 104, end - 104),
        Region::Foreign => (0, 0),
        _ => (start, end),
    };
    MrEntry {
        key: key(client, region),
        pd: if region == Region::OtherPd { OTHER_PD } else { PD },
        access: if region == Region::ReadOnly { 0 } else { 0x1f },
        iova: iova(region),
        addr: start,
        len: REGION,
        shared_start,
        shared_end,
    }
}

impl Memory for Guarded {
    fn lookup(&self, key: u32) -> Option<MrEntry> {
        self.looked_up.replace(key);
        self.mrs.iter().find(|mr| mr.key == key).copied()
    }

    fn lookup_remote(&self, key: u32, qpn: u32) -> Option<MrEntry> {
        self.lookup(key).or_else(|| {
            let windows = self.windows.borrow();
            let mut bound = windows.iter().filter_map(|window| window.bound);
            let bound = bound.find(|bound| bound.entry.key == key && [0, qpn].contains(&bound.qpn))?;
            Some(bound.entry)
        })
    }

    fn has_windows(&self) -> bool {
        true
    }

    fn window(&self, key: u32) -> Option<MemoryWindow> {
        let windows = self.windows.borrow();
        windows.iter().find(|window| window.key | CHOSEN_BITS == key | CHOSEN_BITS).copied()
    }

    fn set_window(&self, window: MemoryWindow) {
        let mut windows = self.windows.borrow_mut();
        let same = |known: &&mut MemoryWindow| known.key | CHOSEN_BITS == window.key | CHOSEN_BITS;
        *windows.iter_mut().find(same).expect("a window that was never told of") = window;
    }

    fn mapped(&self, mr: &MrEntry, addr: u64, len: usize) -> Option<NonNull<u8>> {
        let end = addr.checked_add(len as u64).expect("an address that wraps");
        assert!(
            addr >= mr.shared_start && end <= mr.shared_end,
            "{len} bytes at {addr:#x} are outside {mr:?}; key looked up last: {:#x}",
            *self.looked_up.borrow()
        );
        assert!(addr >= mr.addr && end <= mr.addr + mr.len, "{len} bytes at {addr:#x} are outside {mr:?}");
        assert!(self.is_known(mr), "a region that is gone, or never was: {mr:?}");
        if self.region_at(addr, 1).is_some_and(|mr| mr.key & 0xff == Region::Broken as u32) {
            return None;
        }
        NonNull::new(self.bytes.as_ptr().wrapping_add((addr - BASE) as usize))
    }
}

impl Foreign for Guarded {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let at = self.offset(addr, into.len() as u64, false);
        if self.region_at(addr, 1).is_some_and(|mr| mr.key & 0xff == Region::Broken as u32) {
            return Err(Fault);
        }
        for (i, byte) in into.iter_mut().enumerate() {
            let word = self.bytes.u64((at + i) & !7).load(Ordering::Relaxed);
            *byte = word.to_le_bytes()[(at + i) % 8];
        }
        Ok(())
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let at = self.offset(addr, from.len() as u64, true);
        if self.region_at(addr, 1).is_some_and(|mr| mr.key & 0xff == Region::Broken as u32) {
            return Err(Fault);
        }
        for (i, byte) in from.iter().enumerate() {
            let word = self.bytes.u64((at + i) & !7);
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            bytes[(at + i) % 8] = *byte;
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        Ok(())
    }
}
