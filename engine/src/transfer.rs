//! Moving bytes from a gather list to a scatter list, piece by piece, whatever each piece is reached by.

use std::ptr::NonNull;

use crate::{
    memory::{Fault, Memory, Span},
    place::place,
};

const BOUNCE: usize = 16 * 1024;

/// How a piece of memory is reached from this seat.
#[derive(Clone, Copy, Debug)]
enum Piece {
    Mapped(NonNull<u8>),
    Foreign(u64),
}

/// One side of a transfer.
#[derive(Debug)]
pub(crate) enum Side<'a, M> {
    /// Checked memory of a client.
    Spans(&'a M, &'a [Span]),
    /// Bytes of this process (inline payload, a GRH, an atomic's result).
    Bytes(&'a [u8]),
}

impl<M> Clone for Side<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Side<'_, M> {}

/// Which side could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    Source,
    Target,
}

/// A place in a list of spans.
struct Cursor<'a, M> {
    side: Side<'a, M>,
    index: usize,
    offset: u64,
}

impl<'a, M: Memory> Cursor<'a, M> {
    fn new(side: Side<'a, M>, mut skip: u64) -> Self {
        let mut index = 0;
        if let Side::Spans(_, spans) = side {
            while spans.get(index).is_some_and(|span| skip >= span.len) {
                skip -= spans[index].len;
                index += 1;
            }
        }
        Self { side, index, offset: skip }
    }

    /// The piece here and how long it is, at most `want`. `None`: the list ends.
    #[inline]
    fn piece(&self, want: u64) -> Option<(Piece, usize)> {
        match self.side {
            Side::Bytes(bytes) => {
                let rest = bytes.get(self.offset as usize..).filter(|rest| !rest.is_empty())?;
                Some((Piece::Mapped(NonNull::from(rest).cast()), rest.len().min(want as usize)))
            }
            Side::Spans(memory, spans) => {
                let span = spans.get(self.index)?;
                Some(piece_of(memory, span, self.offset, want))
            }
        }
    }

    #[inline]
    fn advance(&mut self, by: usize) {
        self.offset += by as u64;
        if let Side::Spans(_, spans) = self.side
            && self.offset >= spans[self.index].len
        {
            self.index += 1;
            self.offset = 0;
        }
    }

    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        match self.side {
            Side::Spans(memory, _) => memory.read(addr, into),
            Side::Bytes(_) => Err(Fault),
        }
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        match self.side {
            Side::Spans(memory, _) => memory.write(addr, from),
            Side::Bytes(_) => Err(Fault),
        }
    }
}

/// The part of `span` from `offset` that is reached in one way.
#[inline]
fn piece_of(memory: &impl Memory, span: &Span, offset: u64, want: u64) -> (Piece, usize) {
    let addr = span.addr + offset;
    let len = (span.len - offset).min(want);
    let (start, end) = (span.mr.shared_start, span.mr.shared_end);
    if addr >= start && addr < end {
        let len = len.min(end - addr) as usize;
        if let Some(pointer) = memory.mapped(&span.mr, addr, len) {
            return (Piece::Mapped(pointer), len);
        }
        return (Piece::Foreign(addr), len);
    }
    let len = if addr < start && start < end { len.min(start - addr) } else { len };
    (Piece::Foreign(addr), len as usize)
}

/// Moves `len` bytes, `skip` bytes into both sides, to the memory of `to`. The lists are at least that long.
pub(crate) fn transfer<M: Memory>(
    from: Side<'_, M>,
    to: (&M, &[Span]),
    skip: (u64, u64),
    mut len: u64,
) -> Result<(), Broken> {
    let mut source = Cursor::new(from, skip.0);
    let mut target = Cursor::new(Side::Spans(to.0, to.1), skip.1);
    while len > 0 {
        let (read, most) = source.piece(len).ok_or(Broken::Source)?;
        let (write, n) = target.piece(most as u64).ok_or(Broken::Target)?;
        match (read, write) {
            // SAFETY: both pointers are valid for `n` bytes as `Memory::mapped` promises (or lie in a slice that
            // is borrowed for the whole transfer).
            (Piece::Mapped(read), Piece::Mapped(write)) => unsafe { place(read.as_ptr(), write.as_ptr(), n) },
            _ => bounce(&source, read, &target, write, n)?,
        }
        source.advance(n);
        target.advance(n);
        len -= n as u64;
    }
    Ok(())
}

/// Moves a piece of which at least one end is not mapped here, through a buffer of this process.
fn bounce<M: Memory>(
    source: &Cursor<'_, M>,
    read: Piece,
    target: &Cursor<'_, M>,
    write: Piece,
    len: usize,
) -> Result<(), Broken> {
    let mut buffer = [0u8; BOUNCE];
    for at in (0..len).step_by(BOUNCE) {
        let chunk = &mut buffer[..BOUNCE.min(len - at)];
        match read {
            Piece::Foreign(addr) => source.read(addr + at as u64, chunk).map_err(|Fault| Broken::Source)?,
            // SAFETY: the pointer is valid for `len` bytes; the chunk is ours.
            Piece::Mapped(from) => unsafe { place(from.as_ptr().add(at), chunk.as_mut_ptr(), chunk.len()) },
        }
        match write {
            Piece::Foreign(addr) => target.write(addr + at as u64, chunk).map_err(|Fault| Broken::Target)?,
            // SAFETY: as above.
            Piece::Mapped(to) => unsafe { place(chunk.as_ptr(), to.as_ptr().add(at), chunk.len()) },
        }
    }
    Ok(())
}

/// Where the aligned eight bytes of an atomic's target are mapped, if they are.
pub(crate) fn mapped_word<M: Memory>(memory: &M, span: &Span) -> Option<NonNull<u8>> {
    match piece_of(memory, span, 0, 8) {
        (Piece::Mapped(pointer), 8) => Some(pointer),
        _ => None,
    }
}
