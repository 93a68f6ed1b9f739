//! Registration and deregistration: what may be moved, by whom it is held, when it goes back.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::mm::ProtFlags;
use thiserror::Error;

use super::extents::Extents;
use super::maps::{self, EVERYTHING, Mapping};
use super::pagemap::Pagemap;
use super::region::{Piece, REGION_LEN, Region};
use super::world::{self, Holding, MappingBudget, World};
use super::{fork, overlap, page_size, stack};

/// Fewest whole pages that are worth moving. Moving one and back costs some fifty microseconds, once; a page that
/// is reached through `/proc/PID/mem` costs a system call and a hand-over in the router at each access.
const MIN_PAGES: usize = 1;

/// Why memory could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range wraps around or leaves the address space.
    #[error("memory region {address:#x} + {len:#x} bytes leaves the address space; check the length")]
    OutOfBounds {
        /// Start of the range.
        address: usize,
        /// Its length.
        len: usize,
    },
    /// Nothing is mapped at some address of the range.
    #[error("nothing is mapped at {address:#x}; register only memory that is allocated")]
    Unmapped {
        /// The first such address.
        address: usize,
    },
    /// Some address of the range may not be accessed as the registration asks.
    #[error("memory at {address:#x} may not be {}; ask for fewer access flags or change its protection",
            if *.writable { "written" } else { "read" })]
    Protected {
        /// The first such address.
        address: usize,
        /// Whether writing was asked for.
        writable: bool,
    },
    /// The process was forked after this mover was made.
    #[error("this device was opened before fork; open it again in the child")]
    Forked,
    /// The kernel does not tell what is mapped.
    #[error("cannot read /proc/self/maps ({0}); mount /proc in this container")]
    Maps(Errno),
}

impl RegisterError {
    /// The errno that `ibv_reg_mr` reports for it.
    pub fn errno(&self) -> i32 {
        match self {
            RegisterError::OutOfBounds { .. } => libc::EINVAL,
            RegisterError::Unmapped { .. } | RegisterError::Protected { .. } => libc::EFAULT,
            RegisterError::Forked => libc::EIO,
            RegisterError::Maps(error) => error.raw_os_error(),
        }
    }
}

/// A registered range. Give it back with [`Mover::deregister`]; dropped, it leaves its pages moved until the mover
/// goes.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "pages stay moved until the registration is given back"]
pub struct Registration {
    shared: Range<usize>,
}

impl Registration {
    /// The part of the range, in whole pages and possibly empty, that lies in the region file now, at file offset
    /// equal to address.
    pub fn shared(&self) -> Range<usize> {
        self.shared.clone()
    }
}

/// Moves the registered memory of one client into its region file and back.
///
/// Dropping it makes everything private again.
#[derive(Debug)]
pub struct Mover {
    id: u64,
    generation: u64,
}

impl Mover {
    /// A mover for `region`, the client's memfd of sealed size `1 << 47` that the router made.
    pub fn new(region: OwnedFd) -> io::Result<Mover> {
        let region = Region::new(region)?;
        fork::install()?;
        let generation = fork::generation();
        let mut world = world::lock();
        let id = world.next_id;
        world.next_id += 1;
        let holding = Holding { region, extents: Extents::default(), stranded: false, generation };
        world.holdings.insert(id, holding);
        Ok(Mover { id, generation })
    }

    /// Whether this process is a fork of the one that made the mover. Nothing is moved then, and whatever else
    /// belongs to that device, such as its connection, is the parent's alone.
    pub fn is_child(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Moves the largest run of pages of the range that can be moved. Memory that cannot is no error: the
    /// registration's shared part is then smaller, or empty. `writable` asks for memory that may be written.
    pub fn register(
        &self,
        address: usize,
        len: usize,
        writable: bool,
    ) -> Result<Registration, RegisterError> {
        if self.is_child() {
            return Err(RegisterError::Forked);
        }
        let end = address.checked_add(len).filter(|&end| end <= isize::MAX as usize);
        let end = end.ok_or(RegisterError::OutOfBounds { address, len })?;
        let mut world = world::lock();
        let World { holdings, budget, .. } = &mut *world;
        let holding = holdings.get_mut(&self.id).ok_or(RegisterError::Forked)?;
        let shared = holding.register(&(address..end), writable, budget)?;
        Ok(Registration { shared })
    }

    /// Gives a registration back. Pages that no other registration holds become private again. Nobody else may
    /// work on the memory any more.
    pub fn deregister(&self, registration: Registration) {
        if self.is_child() {
            return;
        }
        let mut world = world::lock();
        let World { holdings, budget, .. } = &mut *world;
        if let Some(holding) = holdings.get_mut(&self.id) {
            holding.release(&registration.shared, budget);
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let mut world = world::lock();
        let World { holdings, budget, .. } = &mut *world;
        let Some(mut holding) = holdings.remove(&self.id) else { return };
        if !self.is_child() {
            let held: Vec<Range<usize>> = holding.extents.ranges().collect();
            held.iter().for_each(|range| holding.make_private(range, budget));
        }
    }
}

/// What can be done with a stretch of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Private anonymous memory: it can be moved.
    Movable,
    /// It lies in the region file already, in its place.
    Moved,
    /// It must stay.
    Fixed,
}

/// A stretch of a registered range with one mapping under it.
#[derive(Debug)]
struct Span {
    range: Range<usize>,
    prot: ProtFlags,
    kind: Kind,
}

impl Holding {
    /// Returns the part of `range` that lies in the region file afterwards.
    fn register(
        &mut self,
        range: &Range<usize>,
        writable: bool,
        budget: &mut MappingBudget,
    ) -> Result<Range<usize>, RegisterError> {
        if range.is_empty() {
            return Ok(0..0);
        }
        let mappings = maps::select(range, |_| true).map_err(RegisterError::Maps)?;
        check_access(&mappings, range, writable)?;
        let spans = self.spans(&mappings, &whole_pages(range));
        let run = largest_run(&spans);
        if run.len() < MIN_PAGES * page_size() {
            return Ok(0..0);
        }
        let movable = |span: &&Span| span.kind == Kind::Movable && run.contains(&span.range.start);
        if spans.iter().any(|span| movable(&span)) {
            let allowed = budget.allows(run.len()).map_err(RegisterError::Maps)? && !file_size_is_limited();
            if !allowed {
                return Ok(0..0);
            }
        }
        for span in spans.iter().filter(movable) {
            self.forget_stale(&span.range, budget);
        }
        self.extents.hold(&run);
        let pagemap = Pagemap::open();
        for span in spans.iter().filter(movable) {
            budget.spend(2);
            if let Err(error) = self.region.move_in(&span.range, span.prot, &pagemap) {
                self.release(&run, budget);
                return match error {
                    Errno::FAULT => Err(RegisterError::Unmapped { address: span.range.start }),
                    // No memory or no mapping to be had: the router serves it where it lies.
                    _ => Ok(0..0),
                };
            }
        }
        Ok(run)
    }

    /// Clears the way in the file for private memory at `range` where an older registration still has pages: the
    /// program mapped anew under it. If it moved those pages elsewhere, they are made private there, for they
    /// would be overwritten; the old registration then has the new memory.
    fn forget_stale(&mut self, range: &Range<usize>, budget: &mut MappingBudget) {
        let stale = if self.stranded { vec![range.clone()] } else { self.extents.held_in(range) };
        stale.iter().for_each(|part| self.make_private(part, budget));
    }

    /// Takes a holder from `range`.
    fn release(&mut self, range: &Range<usize>, budget: &mut MappingBudget) {
        for free in self.extents.release(range) {
            self.make_private(&free, budget);
        }
    }

    /// Makes every page of the region file in `free` private, wherever it is mapped now, and empties the file
    /// there.
    fn make_private(&mut self, free: &Range<usize>, budget: &mut MappingBudget) {
        // Pages that cannot be moved back keep their content in the file: the program works on.
        if self.try_make_private(free, budget).is_err() {
            self.stranded = true;
        }
    }

    fn try_make_private(&self, free: &Range<usize>, budget: &mut MappingBudget) -> Result<(), Errno> {
        let alone = is_single_threaded();
        let pieces = self.pieces(free)?;
        let mut result = Ok(());
        for piece in &pieces {
            match self.region.move_back(piece, alone) {
                Ok(separate) => budget.spend(separate),
                Err(error) => result = Err(error),
            }
        }
        result?;
        if total_len(&pieces) < free.len() {
            // The program unmapped the rest.
            self.region.punch(free)?;
        }
        Ok(())
    }

    /// Where the file's pages at the offsets `free` are mapped.
    fn pieces(&self, free: &Range<usize>) -> Result<Vec<Piece>, Errno> {
        let find = |range: &Range<usize>| -> Result<Vec<Piece>, Errno> {
            let shown = maps::select(range, |mapping| self.region.is_shown_by(mapping))?;
            Ok(shown.iter().filter_map(|mapping| Piece::of(mapping, free)).collect())
        };
        let mut pieces = find(free)?;
        pieces.retain(Piece::is_at_home);
        if total_len(&pieces) < free.len() {
            // Part of it was unmapped or moved elsewhere by the program: look everywhere.
            pieces = find(&EVERYTHING)?;
        }
        Ok(pieces)
    }

    /// Cuts `pages` into stretches by what can be done with them.
    fn spans(&self, mappings: &[Mapping], pages: &Range<usize>) -> Vec<Span> {
        let mut spans = Vec::with_capacity(mappings.len() + 2);
        for mapping in mappings {
            let kind = self.kind(mapping);
            let live = match kind {
                Kind::Movable => stack::live_part(&mapping.range),
                _ => mapping.range.start..mapping.range.start,
            };
            let parts = [
                (mapping.range.start..live.start, kind),
                (live.clone(), Kind::Fixed),
                (live.end..mapping.range.end, kind),
            ];
            for (part, kind) in parts {
                let range = overlap(&part, pages);
                if !range.is_empty() {
                    spans.push(Span { range, prot: mapping.prot, kind });
                }
            }
        }
        spans
    }

    fn kind(&self, mapping: &Mapping) -> Kind {
        let home = mapping.offset == mapping.range.start as u64;
        let plain = mapping.prot == ProtFlags::READ || mapping.prot == ProtFlags::READ | ProtFlags::WRITE;
        if self.region.is_shown_by(mapping) && home {
            Kind::Moved
        } else if mapping.is_private_anonymous() && plain {
            Kind::Movable
        } else {
            Kind::Fixed
        }
    }
}

fn total_len(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.range.len()).sum()
}

/// Refuses what a NIC could not access either.
fn check_access(mappings: &[Mapping], range: &Range<usize>, writable: bool) -> Result<(), RegisterError> {
    let wanted = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    let mut at = range.start;
    for mapping in mappings {
        if mapping.range.start > at {
            return Err(RegisterError::Unmapped { address: at });
        }
        if !mapping.prot.contains(wanted) {
            return Err(RegisterError::Protected { address: at, writable });
        }
        at = mapping.range.end;
    }
    if at < range.end { Err(RegisterError::Unmapped { address: at }) } else { Ok(()) }
}

/// The pages that lie wholly in `range` and have a place in the file.
fn whole_pages(range: &Range<usize>) -> Range<usize> {
    let page = page_size();
    let start = range.start.next_multiple_of(page);
    let end = (range.end / page * page).min(REGION_LEN);
    start..end.max(start)
}

/// The longest run of neighbouring stretches that need not stay.
fn largest_run(spans: &[Span]) -> Range<usize> {
    let mut best = 0..0;
    let mut run = 0..0;
    for span in spans.iter().filter(|span| span.kind != Kind::Fixed) {
        if run.end != span.range.start {
            run.start = span.range.start;
        }
        run.end = span.range.end;
        if run.len() > best.len() {
            best = run.clone();
        }
    }
    best
}

/// Whether a write beyond some offset would kill the process with SIGXFSZ.
fn file_size_is_limited() -> bool {
    rustix::process::getrlimit(rustix::process::Resource::Fsize).current.is_some()
}

/// Whether the calling thread is the only one. Its links count the directories of threads.
fn is_single_threaded() -> bool {
    rustix::fs::stat(c"/proc/self/task").is_ok_and(|stat| stat.st_nlink == 3)
}
