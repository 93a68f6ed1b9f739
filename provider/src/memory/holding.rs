//! What one mover holds: which pages of a range may be moved, by whom moved pages are held, when they go back.
//!
//! A page of a registration is in one of two states, and stays in it until the last registration of the page is given
//! back: *moved*, or *staying*, when the router reaches it through `/proc/PID/mem`. To move a staying page, or to send
//! home a moved page that stays for another registration, could lose what the router writes at that moment.

use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::ProtFlags;

use super::extents::Extents;
use super::maps::{EVERYTHING, Mapping, Maps};
use super::mover::{RegisterError, Registration};
use super::pagemap::Pagemap;
use super::pinned::{self, Pinned};
use super::region::{Piece, REGION_LEN, Region};
use super::views::Views;
use super::world::Books;
use super::{locked, overlap, page_size, stack};

/// Most bytes that change their place before other threads may go on for a while.
const SLICE: usize = 32 << 20;

/// What is known of one mover.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) region: Region,
    pinned: Pinned,
    maps: Maps,
    pagemap: Pagemap,
    /// Moved pages, with their holders.
    extents: Extents,
    /// Moved pages without a holder that could not go back yet.
    idle: Extents,
    /// The [`super::fork::generation`] of the process that made it.
    pub(super) generation: u64,
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
    pub(super) fn new(region: Region, generation: u64) -> Holding {
        Holding {
            region,
            pinned: Pinned::open(),
            maps: Maps::open(),
            pagemap: Pagemap::open(),
            extents: Extents::default(),
            idle: Extents::default(),
            generation,
        }
    }

    /// Whether no page lies in the region file.
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty() && self.idle.is_empty()
    }

    /// Moves what can be moved, and keeps the books.
    pub(super) fn register(
        &mut self,
        range: &Range<usize>,
        writable: bool,
        books: &mut Books,
    ) -> Result<Registration, RegisterError> {
        if range.is_empty() {
            return Ok(Registration { pages: 0..0, shared: 0..0 });
        }
        let mappings = self.maps.select(range, |_| true).map_err(RegisterError::Maps)?;
        check_access(&mappings, range, writable)?;
        let spans = self.spans(&mappings, range, &books.staying);
        let mut shared = largest_run(&spans);
        if let Err(error) = self.move_in(&spans, &shared, books) {
            match error {
                Errno::FAULT => return Err(RegisterError::Unmapped { address: shared.start }),
                Errno::BUSY => pinned::complain(),
                // No memory or no mapping to be had, or no peace: the router serves it where it lies.
                _ => books.peace.complain(),
            }
            shared = 0..0;
        }
        let registration = Registration { pages: touched_pages(range), shared };
        for stays in registration.staying() {
            books.staying.hold(&stays);
        }
        Ok(registration)
    }

    /// Moves what of `run` is not moved yet, and holds it all; on an error, nothing is held.
    fn move_in(&mut self, spans: &[Span], run: &Range<usize>, books: &mut Books) -> Result<(), Errno> {
        let movable =
            spans.iter().filter(|span| span.kind == Kind::Movable && run.contains(&span.range.start));
        let movable: Vec<&Span> = movable.collect();
        if !movable.is_empty() {
            if !books.budget.allows(run.len())? || file_size_is_limited() {
                return Err(Errno::NOMEM);
            }
            for span in &movable {
                self.forget_stale(&span.range, books)?;
            }
        }
        for part in self.idle.held_in(run) {
            self.idle.release(&part);
        }
        self.extents.hold(run);
        books.budget.spend(2 * movable.len());
        let moved = self.move_spans(&movable, books);
        if moved.is_err() {
            self.give_back(run);
            self.send_home(books);
        }
        moved
    }

    fn move_spans(&self, spans: &[&Span], books: &mut Books) -> Result<(), Errno> {
        let mut peace = None;
        let (mut left, mut pinned) = (0, false);
        for span in spans {
            let is_locked = locked::is_locked(span.range.start);
            let mut at = span.range.start;
            while at < span.range.end {
                if left == 0 {
                    drop(peace.take());
                    peace = Some(books.peace.make()?);
                    pinned = self.pinned.any();
                    left = SLICE;
                }
                let end = span.range.end.min(at + left);
                self.region.move_in(&(at..end), span.prot, &self.pagemap, pinned)?;
                left -= end - at;
                at = end;
            }
            if is_locked {
                locked::lock(&span.range);
            }
        }
        Ok(())
    }

    /// Clears the way in the file for private memory at `range` where an older registration still has pages: the
    /// program mapped anew under it. If it moved those pages elsewhere, they are made private there, for they
    /// would be overwritten; the old registration then has the new memory.
    fn forget_stale(&mut self, range: &Range<usize>, books: &mut Books) -> Result<(), Errno> {
        for stale in self.extents.held_in(range) {
            self.make_private(&stale, books)?;
        }
        for stale in self.idle.held_in(range) {
            self.make_private(&stale, books)?;
            self.idle.release(&stale);
        }
        Ok(())
    }

    /// Ends a registration. Its pages go back by [`Self::send_home`].
    pub(super) fn release(&mut self, registration: &Registration, books: &mut Books) {
        for stays in registration.staying() {
            books.staying.release(&stays);
        }
        self.give_back(&registration.shared);
    }

    fn give_back(&mut self, range: &Range<usize>) {
        for free in self.extents.release(range) {
            self.idle.hold(&free);
        }
    }

    /// Makes the pages private again that nobody holds. Those that cannot be now keep their content in the file:
    /// the program works on.
    pub(super) fn send_home(&mut self, books: &mut Books) {
        let free = self.idle.ranges().flat_map(|range| without(&range, &books.staying.held_in(&range)));
        for range in free.collect::<Vec<_>>() {
            if self.make_private(&range, books).is_ok() {
                self.idle.release(&range);
            }
        }
    }

    /// Sends all home, when the mover ends.
    pub(super) fn release_all(&mut self, books: &mut Books) {
        let held = self.extents.ranges().chain(self.idle.ranges());
        for range in held.collect::<Vec<_>>() {
            // Nothing more can be done for what fails: it keeps its content in a file that nobody else knows.
            let _ = self.make_private(&range, books);
        }
    }

    /// Makes every page of the region file in `free` private, wherever it is mapped now, and empties the file
    /// there.
    fn make_private(&self, free: &Range<usize>, books: &mut Books) -> Result<(), Errno> {
        let pieces = self.pieces(free, &books.views)?;
        for piece in &pieces {
            let is_locked = locked::is_locked(piece.range.start);
            for slice in piece.slices(SLICE) {
                let _peace = books.peace.make()?;
                self.region.move_back(&slice, self.pinned.any())?;
            }
            if is_locked {
                locked::lock(&piece.range);
            }
        }
        if total_len(&pieces) < free.len() {
            // The program unmapped the rest.
            self.region.punch(free)?;
        }
        Ok(())
    }

    /// Where the file's pages at the offsets `free` are mapped.
    fn pieces(&self, free: &Range<usize>, views: &Views) -> Result<Vec<Piece>, Errno> {
        let find = |range: &Range<usize>| -> Result<Vec<Piece>, Errno> {
            let shown = self.maps.select(range, |mapping| {
                self.region.is_shown_by(mapping) && !views.cover(mapping.range.start)
            })?;
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

    /// Cuts the pages of `range` into stretches by what can be done with them.
    fn spans(&self, mappings: &[Mapping], range: &Range<usize>, staying: &Extents) -> Vec<Span> {
        let (pages, own) = (touched_pages(range), whole_pages(range));
        let mut spans = Vec::with_capacity(mappings.len() + 2);
        for mapping in mappings {
            let (kind, mapped) = (self.kind(mapping), overlap(&mapping.range, &pages));
            let mut add = |range: Range<usize>, kind| {
                if !range.is_empty() {
                    spans.push(Span { range, prot: mapping.prot, kind });
                }
            };
            if kind != Kind::Movable {
                add(mapped, kind);
                continue;
            }
            let mut holes = staying.held_in(&mapped);
            let live = overlap(&stack::live_part(&mapping.range), &mapped);
            holes.extend([
                mapped.start..own.start.min(mapped.end),
                live,
                own.end.max(mapped.start)..mapped.end,
            ]);
            // What lies between is fixed, and a gap between spans says as much.
            without(&mapped, &holes).into_iter().for_each(|range| add(range, kind));
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

impl Registration {
    /// Its pages that the router reaches where they lie.
    fn staying(&self) -> [Range<usize>; 2] {
        if self.shared.is_empty() {
            return [self.pages.clone(), 0..0];
        }
        [self.pages.start..self.shared.start, self.shared.end..self.pages.end]
    }
}

fn total_len(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.range.len()).sum()
}

/// The parts of `range` outside of `holes`, which may be in any order.
fn without(range: &Range<usize>, holes: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut holes: Vec<_> = holes.iter().filter(|hole| !hole.is_empty()).collect();
    holes.sort_by_key(|hole| hole.start);
    let mut parts = Vec::with_capacity(holes.len() + 1);
    let mut at = range.start;
    for hole in holes {
        parts.push(at..hole.start.min(range.end));
        at = at.max(hole.end);
    }
    parts.push(at..range.end);
    parts.retain(|part| !part.is_empty());
    parts
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

/// All pages that `range` touches and that have a place in the file.
pub(super) fn touched_pages(range: &Range<usize>) -> Range<usize> {
    let page = page_size();
    let start = range.start / page * page;
    let end = range.end.min(REGION_LEN).next_multiple_of(page);
    start..end.max(start)
}

/// Those that lie wholly in it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_in_any_order_are_left_out() {
        let left =
            |holes: &[Range<usize>]| without(&(5..10), holes).into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(left(&[]), [5, 6, 7, 8, 9]);
        assert_eq!(left(&[8..9, 0..6, 8..12, 7..7]), [6, 7]);
        assert_eq!(without(&(5..10), &[8..9, 6..7]).len(), 3);
        assert!(left(&[0..20, 6..7]).is_empty());
        assert_eq!(left(&[12..20, 0..5]).len(), 5);
    }
}
