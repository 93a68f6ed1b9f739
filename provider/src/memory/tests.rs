//! The promises of the module, against the real kernel.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::region::{Piece, REGION_LEN, Region, pointer};
use super::{Mover, RegisterError, page_size};

pub(super) mod forking;
mod pinned;
mod staying;
pub(super) mod writers;

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A region file as the router makes it.
fn region_file() -> OwnedFd {
    let fd = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, REGION_LEN as u64).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL).unwrap();
    fd
}

/// A mover and the file as the router sees it.
fn mover() -> (Mover, File) {
    let fd = region_file();
    let router = fd.try_clone().unwrap();
    (Mover::new(fd).unwrap(), File::from(router))
}

/// Private anonymous memory of whole pages.
struct Memory(Range<usize>);

impl Memory {
    fn new(len: usize) -> Memory {
        // Of the two kinds, only accounted memory can join with what this module maps.
        let reserve = if len > 1 << 30 { MapFlags::NORESERVE } else { MapFlags::empty() };
        let flags = MapFlags::PRIVATE | reserve;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, RW, flags) }.unwrap() as usize;
        Memory(start..start + len)
    }

    fn pages(count: usize) -> Memory {
        Memory::new(count * page_size())
    }

    fn start(&self) -> usize {
        self.0.start
    }

    fn fill(&self, value: u8) {
        fill(&self.0, value);
    }

    fn unmap(&self) {
        // SAFETY: the test's own mapping.
        unsafe { rustix::mm::munmap(pointer(self.0.start), self.0.len()) }.unwrap();
    }

    /// Maps fresh private memory at the same place.
    fn map_anew(&self) {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: the test's own place.
        unsafe { rustix::mm::mmap_anonymous(pointer(self.0.start), self.0.len(), RW, flags) }.unwrap();
    }

    fn protect(&self, prot: MprotectFlags) {
        // SAFETY: the test's own mapping.
        unsafe { rustix::mm::mprotect(pointer(self.0.start), self.0.len(), prot) }.unwrap();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmap();
    }
}

fn fill(range: &Range<usize>, value: u8) {
    // SAFETY: tests pass their own writable memory.
    unsafe { std::ptr::write_bytes(pointer(range.start).cast::<u8>(), value, range.len()) };
}

fn byte(address: usize) -> u8 {
    // SAFETY: tests pass addresses in their own readable memory.
    unsafe { std::ptr::read_volatile(pointer(address).cast::<u8>()) }
}

fn set(address: usize, value: u8) {
    // SAFETY: tests pass addresses in their own writable memory.
    unsafe { std::ptr::write_volatile(pointer(address).cast::<u8>(), value) };
}

fn all(range: &Range<usize>, value: u8) -> bool {
    range.clone().all(|address| byte(address) == value)
}

/// What the router reads of the file at `offset`.
fn seen(router: &File, offset: usize) -> u8 {
    let mut one = [0u8];
    rustix::io::pread(router.as_fd(), &mut one, offset as u64).unwrap();
    one[0]
}

fn router_writes(router: &File, offset: usize, value: u8) {
    rustix::io::pwrite(router.as_fd(), &[value], offset as u64).unwrap();
}

/// Bytes of memory that the file has.
fn used(router: &File) -> u64 {
    rustix::fs::fstat(router).unwrap().st_blocks as u64 * 512
}

/// Whether the page of `address` is private anonymous memory: dropping its content gives zeros.
fn drops_to_zero(address: usize) -> bool {
    // SAFETY: the test's own memory, whose content it gives up.
    unsafe { rustix::mm::madvise(pointer(address), page_size(), Advice::LinuxDontNeed) }.unwrap();
    byte(address) == 0
}

#[test]
fn the_router_and_the_program_see_one_memory() {
    let (sut, router) = mover();
    let memory = Memory::pages(3);
    memory.fill(7);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert_eq!(mr.shared(), memory.0);
    assert!(all(&memory.0, 7));
    assert_eq!(seen(&router, memory.start() + 5000), 7);
    router_writes(&router, memory.start() + 1, 9);
    assert_eq!(byte(memory.start() + 1), 9);
    set(memory.start() + 2, 11);
    assert_eq!(seen(&router, memory.start() + 2), 11);
    sut.deregister(mr);
    assert_eq!((byte(memory.start() + 1), byte(memory.start() + 2)), (9, 11));
}

#[test]
fn partly_owned_pages_stay_private_and_neighbours_keep_their_bytes() {
    let (sut, router) = mover();
    let (memory, page) = (Memory::pages(6), page_size());
    memory.fill(3);
    let (from, to) = (memory.start() + page + 100, memory.start() + 5 * page - 1);
    let mr = sut.register(from, to - from, true).unwrap();
    assert_eq!(mr.shared(), memory.start() + 2 * page..memory.start() + 4 * page);
    assert!(all(&memory.0, 3));
    assert_eq!(seen(&router, from), 0, "a partly owned page is not in the file");
    sut.deregister(mr);
    assert!(all(&memory.0, 3));
}

#[test]
fn a_range_without_a_whole_page_moves_nothing() {
    let (sut, router) = mover();
    let (memory, page) = (Memory::pages(2), page_size());
    memory.fill(1);
    for (offset, len) in [(0, page - 1), (1, page), (page / 2, page), (0, 0), (17, 1)] {
        let mr = sut.register(memory.start() + offset, len, true).unwrap();
        assert!(mr.shared().is_empty(), "offset {offset} length {len}");
        sut.deregister(mr);
    }
    assert_eq!(used(&router), 0);
}

#[test]
fn overlapping_registrations_share_until_the_last_is_given_back() {
    let (sut, router) = mover();
    let (memory, page) = (Memory::pages(6), page_size());
    memory.fill(4);
    let at = memory.start();
    let first = sut.register(at, 4 * page, true).unwrap();
    let second = sut.register(at + 2 * page, 4 * page, true).unwrap();
    let third = sut.register(at, 6 * page, true).unwrap();
    assert_eq!(third.shared(), memory.0);
    sut.deregister(first);
    sut.deregister(third);
    router_writes(&router, at + 3 * page, 44);
    assert_eq!(byte(at + 3 * page), 44, "still held by the second");
    set(at, 45);
    assert_eq!(seen(&router, at), 0, "held by nobody");
    sut.deregister(second);
    assert_eq!(byte(at + 3 * page), 44);
    assert_eq!(used(&router), 0);
}

#[test]
fn memory_is_private_again_after_the_last_deregistration() {
    let (sut, _router) = mover();
    let memory = Memory::pages(4);
    memory.fill(5);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    sut.deregister(mr);
    assert!(all(&memory.0, 5));
    assert!(drops_to_zero(memory.start()));
    assert!(drops_to_zero(memory.start() + 3 * page_size()));
}

#[test]
fn a_mapping_that_went_back_joins_its_neighbours_again() {
    let region = Region::new(region_file()).unwrap();
    let (memory, page) = (Memory::pages(1024), page_size());
    memory.fill(6);
    let inner = memory.start() + page..memory.0.end - page;
    region.move_in(&inner, RW, &super::pagemap::Pagemap::open(), false).unwrap();
    let piece = Piece { range: inner.clone(), offset: inner.start, prot: RW };
    assert_eq!(region.move_back(&piece, false), Ok(()));
    assert!(all(&memory.0, 6));
    let mappings = super::maps::select(&memory.0, |_| true).unwrap();
    assert_eq!(mappings.len(), 1, "{mappings:?}");
    assert!(drops_to_zero(inner.start));
}

#[test]
fn a_buffer_can_be_registered_over_and_over() {
    let (sut, router) = mover();
    let memory = Memory::pages(8);
    for round in 0..300u32 {
        memory.fill(round as u8);
        let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
        assert_eq!(mr.shared(), memory.0);
        router_writes(&router, memory.start(), !(round as u8));
        sut.deregister(mr);
        assert_eq!(byte(memory.start()), !(round as u8));
        assert!(all(&(memory.start() + 1..memory.0.end), round as u8));
    }
    assert_eq!(used(&router), 0);
}

#[test]
fn unmapped_memory_is_a_fault() {
    let (sut, _router) = mover();
    let (memory, page) = (Memory::pages(3), page_size());
    // SAFETY: the test's own mapping; the hole is unmapped again harmlessly at the end.
    unsafe { rustix::mm::munmap(pointer(memory.start() + page), page) }.unwrap();
    let error = sut.register(memory.start(), 3 * page, true).unwrap_err();
    assert_eq!(error, RegisterError::Unmapped { address: memory.start() + page });
    assert_eq!(error.errno(), libc::EFAULT);
    let error = sut.register(usize::MAX - 10, 100, true).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(sut.register(0, 1, false).is_err());
}

#[test]
fn protection_is_checked_and_kept() {
    let (sut, router) = mover();
    let memory = Memory::pages(2);
    memory.fill(8);
    memory.protect(MprotectFlags::READ);
    let error = sut.register(memory.start(), memory.0.len(), true).unwrap_err();
    assert_eq!(error, RegisterError::Protected { address: memory.start(), writable: true });
    let mr = sut.register(memory.start(), memory.0.len(), false).unwrap();
    assert_eq!(mr.shared(), memory.0);
    assert_eq!(seen(&router, memory.start()), 8);
    sut.deregister(mr);
    let mapping = super::maps::select(&(memory.start()..memory.start() + 1), |_| true).unwrap().remove(0);
    assert_eq!(mapping.prot, ProtFlags::READ);
    assert!(all(&memory.0, 8));
    memory.protect(MprotectFlags::empty());
    assert_eq!(sut.register(memory.start(), 1, false).unwrap_err().errno(), libc::EFAULT);
}

#[test]
fn files_and_shared_memory_are_not_moved() {
    let (sut, _router) = mover();
    let page = page_size();
    let file = tempfile_of(4 * page);
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        // SAFETY: new mappings at addresses of the kernel's choice.
        let (mapped, anonymous) = unsafe {
            (
                rustix::mm::mmap(std::ptr::null_mut(), 4 * page, RW, flags, &file, 0).unwrap(),
                rustix::mm::mmap_anonymous(std::ptr::null_mut(), 4 * page, RW, MapFlags::SHARED).unwrap(),
            )
        };
        for start in [mapped, anonymous] {
            let mr = sut.register(start as usize, 4 * page, true).unwrap();
            assert!(mr.shared().is_empty());
            sut.deregister(mr);
            // SAFETY: mapped above.
            unsafe { rustix::mm::munmap(start, 4 * page) }.unwrap();
        }
    }
}

fn tempfile_of(len: usize) -> OwnedFd {
    let fd = rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len as u64).unwrap();
    fd
}

#[test]
fn of_mixed_memory_the_largest_run_is_moved() {
    let (sut, _router) = mover();
    let (memory, page) = (Memory::pages(10), page_size());
    memory.fill(2);
    let file = tempfile_of(page);
    let (flags, at) = (MapFlags::SHARED | MapFlags::FIXED, memory.start() + 3 * page);
    // SAFETY: replaces a page of the test's own mapping.
    unsafe { rustix::mm::mmap(pointer(at), page, RW, flags, &file, 0) }.unwrap();
    let mr = sut.register(memory.start(), 10 * page, true).unwrap();
    assert_eq!(mr.shared(), memory.start() + 4 * page..memory.0.end);
    sut.deregister(mr);
    assert!(all(&(memory.start() + 4 * page..memory.0.end), 2));
}

#[test]
fn the_running_stack_stays() {
    let (sut, _router) = mover();
    let buffer = [1u8; 64 << 10];
    let mr = sut.register(buffer.as_ptr() as usize, buffer.len(), true).unwrap();
    assert!(mr.shared().is_empty());
    sut.deregister(mr);
}

#[test]
fn a_buffer_joined_with_the_running_stack_is_moved_without_it() {
    let memory = Memory::new(4 << 20);
    memory.fill(14);
    extern "C" fn run(memory: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: the parent passes its `Memory` and waits for this thread.
        let memory = unsafe { &*memory.cast::<Memory>() };
        let (sut, router) = mover();
        let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
        assert_eq!(mr.shared(), memory.start() + (1 << 20)..memory.0.end);
        assert_eq!(seen(&router, mr.shared().start), 14);
        sut.deregister(mr);
        std::ptr::null_mut()
    }
    // SAFETY: the stack is the first MiB of memory that outlives the thread, which is joined.
    unsafe {
        let mut attributes = std::mem::zeroed();
        assert_eq!(libc::pthread_attr_init(&mut attributes), 0);
        assert_eq!(libc::pthread_attr_setstack(&mut attributes, pointer(memory.start()), 1 << 20), 0);
        let (mut thread, argument) = (0, (&raw const memory).cast_mut().cast());
        assert_eq!(libc::pthread_create(&mut thread, &attributes, run, argument), 0);
        assert_eq!(libc::pthread_join(thread, std::ptr::null_mut()), 0);
        libc::pthread_attr_destroy(&mut attributes);
    }
    assert!(all(&(memory.start() + (1 << 20)..memory.0.end), 14));
}

#[test]
fn memory_mapped_anew_under_a_live_registration_is_noticed() {
    let (sut, router) = mover();
    let memory = Memory::pages(4);
    memory.fill(1);
    let old = sut.register(memory.start(), memory.0.len(), true).unwrap();
    memory.map_anew();
    let new = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert_eq!(new.shared(), memory.0);
    assert!(all(&memory.0, 0), "old content must not come back");
    set(memory.start(), 2);
    assert_eq!(seen(&router, memory.start()), 2);
    sut.deregister(old);
    router_writes(&router, memory.start(), 3);
    assert_eq!(byte(memory.start()), 3);
    sut.deregister(new);
    assert_eq!(byte(memory.start()), 3);
    assert!(drops_to_zero(memory.start()));
    assert_eq!(used(&router), 0);
}

#[test]
fn deregistering_memory_that_was_mapped_anew_leaves_the_new_alone() {
    let (sut, router) = mover();
    let memory = Memory::pages(4);
    memory.fill(1);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    memory.map_anew();
    memory.fill(9);
    sut.deregister(mr);
    assert!(all(&memory.0, 9));
    assert_eq!(used(&router), 0);
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    memory.unmap();
    sut.deregister(mr);
    memory.map_anew();
    assert_eq!(used(&router), 0);
}

#[test]
fn pages_that_the_program_remapped_elsewhere_are_made_private_there() {
    let (sut, router) = mover();
    let (memory, elsewhere) = (Memory::pages(4), Memory::pages(4));
    memory.fill(6);
    let old = sut.register(memory.start(), memory.0.len(), true).unwrap();
    let (len, flags) = (memory.0.len(), MremapFlags::MAYMOVE);
    // SAFETY: both are the test's own mappings.
    unsafe {
        rustix::mm::mremap_fixed(pointer(memory.start()), len, len, flags, pointer(elsewhere.start()))
            .unwrap()
    };
    memory.map_anew();
    memory.fill(7);
    let new = sut.register(memory.start(), memory.0.len(), true).unwrap();
    assert!(all(&elsewhere.0, 6) && all(&memory.0, 7));
    sut.deregister(new);
    sut.deregister(old);
    assert!(all(&elsewhere.0, 6) && all(&memory.0, 7));
    assert!(drops_to_zero(elsewhere.start()) && drops_to_zero(memory.start()));
    assert_eq!(used(&router), 0);
}

#[test]
fn a_dropped_mover_leaves_private_memory() {
    let (sut, router) = mover();
    let memory = Memory::pages(4);
    memory.fill(12);
    let _kept = sut.register(memory.start(), memory.0.len(), true).unwrap();
    drop(sut);
    assert!(all(&memory.0, 12));
    assert!(drops_to_zero(memory.start()));
    assert_eq!(used(&router), 0);
}

#[test]
fn two_movers_do_not_disturb_each_other() {
    let ((one, _), (two, router)) = (mover(), mover());
    let memory = Memory::pages(4);
    memory.fill(13);
    let first = one.register(memory.start(), memory.0.len(), true).unwrap();
    let second = two.register(memory.start(), memory.0.len(), true).unwrap();
    assert!(second.shared().is_empty(), "the pages lie in the other's file");
    two.deregister(second);
    one.deregister(first);
    let again = two.register(memory.start(), memory.0.len(), true).unwrap();
    assert_eq!(again.shared(), memory.0);
    assert_eq!(seen(&router, memory.start()), 13);
    two.deregister(again);
    assert!(all(&memory.0, 13));
}

#[test]
fn ten_thousand_small_registrations_live_at_once() {
    assert!(forking::in_child(|| {
        ten_thousand_small_registrations();
        true
    }));
}

fn ten_thousand_small_registrations() {
    let (sut, router) = mover();
    let page = page_size();
    super::maps::select(&(page..page + 1), |_| true).unwrap();
    // More would not be moved where each registration reads all mappings, and disturb the other tests.
    let count = if super::maps::must_be_read() { 500 } else { 10_000 };
    let memory = Memory::pages(3 * count);
    let start = Instant::now();
    let mut live = Vec::new();
    for index in 0..count {
        let at = memory.start() + index * 3 * page;
        set(at + page, index as u8);
        // Two and a half pages: every third page stays private, so no two join.
        live.push(sut.register(at, 2 * page + page / 2, true).unwrap());
    }
    let registered = start.elapsed();
    let moved = live.iter().filter(|mr| !mr.shared().is_empty()).count();
    for mr in live.iter().filter(|mr| !mr.shared().is_empty()).step_by(97) {
        assert_eq!(seen(&router, mr.shared().start + page), byte(mr.shared().start + page));
    }
    live.into_iter().rev().for_each(|mr| sut.deregister(mr));
    println!(
        "{count} registrations ({moved} moved) {registered:?}, deregistrations {:?}",
        start.elapsed() - registered
    );
    for index in 0..count {
        assert_eq!(byte(memory.start() + (3 * index + 1) * page), index as u8);
    }
    assert_eq!(used(&router), 0);
}

#[test]
fn untouched_memory_costs_nothing() {
    let (sut, router) = mover();
    let memory = Memory::new(5 << 30);
    set(memory.start() + (3 << 30), 1);
    let start = Instant::now();
    let mr = sut.register(memory.start(), memory.0.len(), true).unwrap();
    let registered = start.elapsed();
    assert_eq!(mr.shared(), memory.0);
    assert!(used(&router) < 4 << 20, "{} bytes used", used(&router));
    assert_eq!(byte(memory.start() + (3 << 30)), 1);
    set(memory.start() + (4 << 30), 2);
    sut.deregister(mr);
    println!("5 GiB untouched: register {registered:?}, deregister {:?}", start.elapsed() - registered);
    assert_eq!((byte(memory.start() + (3 << 30)), byte(memory.start() + (4 << 30))), (1, 2));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(used(&router), 0);
}

/// No promise, a measurement: read it with `--nocapture`, in a release build, with nothing else running.
#[test]
fn registration_is_measured_against_a_first_touch() {
    assert!(forking::in_child(|| {
        measure_registration();
        true
    }));
}

fn measure_registration() {
    let (sut, _router) = mover();
    for len in [page_size(), 64 << 10, 1 << 20, 64 << 20] {
        let rounds = ((128 << 20) / len).clamp(2, 1000);
        let (mut touch, mut register, mut again, mut deregister) = Default::default();
        let timed = |total: &mut Duration, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            *total += start.elapsed();
        };
        for _ in 0..rounds {
            let memory = Memory::new(len);
            timed(&mut touch, &mut || memory.fill(1));
            let mut mr = None;
            timed(&mut register, &mut || mr = Some(sut.register(memory.start(), len, true).unwrap()));
            timed(&mut again, &mut || memory.fill(2));
            timed(&mut deregister, &mut || sut.deregister(mr.take().unwrap()));
        }
        let ratio = |part: Duration| part.as_secs_f64() / touch.as_secs_f64();
        println!(
            "{len:>9} bytes: first touch {:?}, register {:.2} x, touch after it {:.2} x, deregister {:.2} x",
            touch / rounds as u32,
            ratio(register),
            ratio(again),
            ratio(deregister)
        );
    }
}
