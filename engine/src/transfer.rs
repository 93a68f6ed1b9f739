//! Moving bytes from a gather list to a scatter list, piece by piece.
//!
//! Where all is mapped, in one copy. Where something is not, through a buffer (the [`Stage`]) that accesses to
//! foreign memory fill and write out between two attempts.

use std::ptr::NonNull;

use crate::{
    foreign::Run,
    memory::{Memory, Span},
    place::place,
    stage::{Stage, Staged},
    wire,
};

/// Bytes of a slice that is not all mapped: what a QP may have in buffers.
pub(crate) const STAGED_SLICE: u64 = 64 * 1024;

/// What is read of a null MR at a time.
static ZEROS: [u8; 4096] = [0; 4096];

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

impl<M: Memory> Side<'_, M> {
    #[inline]
    fn is_mapped(&self) -> bool {
        match self {
            Self::Spans(_, spans) => are_mapped(spans),
            Self::Bytes(_) => true,
        }
    }

    /// Whether what was copied from it is its content.
    #[inline]
    fn is_intact(&self) -> bool {
        match self {
            Self::Spans(memory, _) => memory.is_intact(),
            Self::Bytes(_) => true,
        }
    }

    fn foreign_runs(&self, skip: u64, len: u64) -> Vec<Run> {
        match self {
            Self::Spans(_, spans) => foreign_runs(spans, skip, len),
            Self::Bytes(_) => Vec::new(),
        }
    }
}

/// Why nothing was moved, or not all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The source could not be reached.
    Source,
    /// The target could not be reached.
    Target,
    /// An access must come first; the stage says which.
    Foreign,
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

    /// The piece here, unless a null MR is, and how long it is, at most `want`. `None`: the list ends, or what was
    /// mapped is not any more.
    #[inline]
    fn piece(&self, want: u64) -> Option<(Option<NonNull<u8>>, usize)> {
        match self.side {
            Side::Bytes(bytes) => {
                let rest = bytes.get(self.offset as usize..).filter(|rest| !rest.is_empty())?;
                Some((Some(NonNull::from(rest).cast()), rest.len().min(want as usize)))
            }
            Side::Spans(memory, spans) => {
                let span = spans.get(self.index)?;
                let len = (span.len - self.offset).min(want) as usize;
                if span.mr.is_null() {
                    return Some((None, len.min(ZEROS.len())));
                }
                Some((Some(memory.mapped(&span.mr, span.addr + self.offset, len)?), len))
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
}

/// Moves up to `len` bytes, `skip` bytes into both sides, to the memory of `to`; says how many. The lists are at
/// least that long.
pub(crate) fn transfer<M: Memory>(
    from: Side<'_, M>,
    to: (&M, &[Span]),
    skip: (u64, u64),
    len: u64,
    stage: &mut Stage,
) -> Result<u64, Broken> {
    if from.is_mapped() && are_mapped(to.1) {
        copy(from, to, skip, len)
    } else {
        staged(from, to, skip, len, stage)
    }
}

/// The bytes of `from`: where they are if all of them are mapped, else gathered in the stage.
pub(crate) fn gather<'a, M: Memory>(
    from: Side<'a, M>,
    len: u64,
    stage: &'a mut Stage,
) -> Result<Side<'a, M>, Broken> {
    if from.is_mapped() {
        return Ok(from);
    }
    let staged = stage.slice(0, len);
    staged.check()?;
    collect(from, 0, len, staged)?;
    Ok(Side::Bytes(&staged.bytes))
}

/// Appends `len` bytes of `from`, `skip` bytes into it, to a buffer.
pub(crate) fn append<M: Memory>(
    from: Side<'_, M>,
    skip: u64,
    len: u64,
    stage: &mut Stage,
    into: &mut Vec<u8>,
) -> Result<(), Broken> {
    let before = into.len();
    if from.is_mapped() {
        into.resize(before + len as usize, 0);
        return take_mapped(from, skip, &mut into[before..]);
    }
    let staged = stage.slice(skip, len);
    staged.check()?;
    collect(from, skip, len, staged)?;
    into.extend_from_slice(&staged.bytes);
    stage.clear();
    Ok(())
}

fn copy<M: Memory>(from: Side<'_, M>, to: (&M, &[Span]), skip: (u64, u64), len: u64) -> Result<u64, Broken> {
    let mut source = Cursor::new(from, skip.0);
    let mut target = Cursor::new(Side::Spans(to.0, to.1), skip.1);
    let mut left = len;
    while left > 0 {
        let (read, most) = source.piece(left).ok_or(Broken::Source)?;
        let (write, n) = target.piece(most as u64).ok_or(Broken::Target)?;
        let read = read.unwrap_or(NonNull::from(&ZEROS).cast());
        if let Some(write) = write {
            // SAFETY: both pointers are valid for `n` bytes as `Memory::mapped` promises (or lie in a slice that is
            // borrowed for the whole transfer, or are zeros of which a piece is no longer).
            unsafe { place(read.as_ptr(), write.as_ptr(), n) };
        }
        source.advance(n);
        target.advance(n);
        left -= n as u64;
    }
    match (from.is_intact(), to.0.is_intact()) {
        (true, true) => Ok(len),
        (false, _) => Err(Broken::Source),
        (true, false) => Err(Broken::Target),
    }
}

/// The same where something is foreign, a slice at a time. The mapped piece that holds the last byte is placed last,
/// as if it were one copy.
#[cold]
fn staged<M: Memory>(
    from: Side<'_, M>,
    to: (&M, &[Span]),
    skip: (u64, u64),
    len: u64,
    stage: &mut Stage,
) -> Result<u64, Broken> {
    // A slice that was begun keeps its length, whatever this turn may move.
    let len = stage.begun(skip.1).unwrap_or(len.min(STAGED_SLICE));
    let runs = foreign_runs(to.1, skip.1, len);
    if runs.is_empty() && from.foreign_runs(skip.0, len).is_empty() {
        return copy(from, to, skip, len);
    }
    let staged = stage.slice(skip.1, len);
    staged.check()?;
    if !staged.gathered {
        collect(from, skip.0, len, staged)?;
    }
    let pieces = pieces(to.1, skip.1, len);
    let (last, others) = pieces.split_last().ok_or(Broken::Target)?;
    if staged.written != runs {
        others.iter().try_for_each(|piece| piece.put(to.0, &staged.bytes)).map_err(|()| Broken::Target)?;
        staged.want_write(runs);
        return Err(Broken::Foreign);
    }
    if runs.is_empty() {
        others.iter().try_for_each(|piece| piece.put(to.0, &staged.bytes)).map_err(|()| Broken::Target)?;
    }
    last.put(to.0, &staged.bytes).map_err(|()| Broken::Target)?;
    stage.clear();
    Ok(len)
}

/// Brings the source's bytes into the stage.
fn collect<M: Memory>(from: Side<'_, M>, skip: u64, len: u64, staged: &mut Staged) -> Result<(), Broken> {
    if staged.gathered {
        return Ok(());
    }
    let runs = from.foreign_runs(skip, len);
    if !runs.is_empty() && !staged.fetched {
        staged.want_read(runs);
        return Err(Broken::Foreign);
    }
    staged.bytes.resize(len as usize, 0);
    take_mapped(from, skip, &mut staged.bytes)?;
    staged.gathered = true;
    Ok(())
}

/// Copies what is mapped of the bytes at `skip` into a buffer.
fn take_mapped<M: Memory>(from: Side<'_, M>, skip: u64, into: &mut [u8]) -> Result<(), Broken> {
    match from {
        Side::Bytes(bytes) => {
            let rest = bytes.get(skip as usize..).unwrap_or_default();
            into.copy_from_slice(rest.get(..into.len()).ok_or(Broken::Source)?);
            Ok(())
        }
        Side::Spans(memory, spans) => pieces(spans, skip, into.len() as u64)
            .iter()
            .try_for_each(|piece| piece.take(memory, into))
            .map_err(|()| Broken::Source),
    }
}

/// Copies a message that [`gather`] gave into a buffer.
pub(crate) fn take_out<M: Memory>(from: Side<'_, M>, into: &mut [u8]) -> Result<(), Broken> {
    take_mapped(from, 0, into)
}

/// Says where `len` bytes of `from` are, `skip` bytes into it. False: not all of them are mapped.
pub(crate) fn locate<M: Memory>(
    from: Side<'_, M>,
    skip: u64,
    mut len: u64,
    tell: &mut dyn FnMut(wire::Piece),
) -> bool {
    if !from.is_mapped() {
        return false;
    }
    let mut cursor = Cursor::new(from, skip);
    while len > 0 {
        // What a null MR takes or gives is nowhere.
        let Some((Some(start), n)) = cursor.piece(len) else { return false };
        tell(wire::Piece { start, len: n });
        cursor.advance(n);
        len -= n as u64;
    }
    true
}

/// Appends what lies in pieces that the fabric has told, but for the first `skip` bytes.
pub(crate) fn copy_out(pieces: &[wire::Piece], mut skip: usize, into: &mut Vec<u8>) {
    for piece in pieces {
        let (from, at) = (skip.min(piece.len), into.len());
        let len = piece.len - from;
        into.resize(at + len, 0);
        // SAFETY: a piece is valid for its length until the fabric that told it is changed, before which it is used;
        // the buffer is ours.
        unsafe { place(piece.start.as_ptr().add(from), into[at..].as_mut_ptr(), len) };
        skip -= from;
    }
}

/// A part of a slice that is reached in one way.
struct Piece<'a> {
    span: &'a Span,
    run: Run,
    mapped: bool,
}

impl Piece<'_> {
    /// Copies it into the slice's buffer, if it is mapped.
    fn take(&self, memory: &impl Memory, into: &mut [u8]) -> Result<(), ()> {
        let Run { addr, at, len } = self.run;
        if self.span.mr.is_null() {
            into.get_mut(at..at + len).ok_or(())?.fill(0);
        } else if self.mapped {
            let from = memory.mapped(&self.span.mr, addr, len).ok_or(())?;
            let into = into.get_mut(at..at + len).ok_or(())?;
            // SAFETY: the pointer is valid for `len` bytes as `Memory::mapped` promises; the buffer is ours.
            unsafe { place(from.as_ptr(), into.as_mut_ptr(), len) };
        }
        if memory.is_intact() { Ok(()) } else { Err(()) }
    }

    /// Places it from the slice's buffer, if it is mapped.
    fn put(&self, memory: &impl Memory, from: &[u8]) -> Result<(), ()> {
        let Run { addr, at, len } = self.run;
        if self.mapped && !self.span.mr.is_null() {
            let to = memory.mapped(&self.span.mr, addr, len).ok_or(())?;
            let from = from.get(at..at + len).ok_or(())?;
            // SAFETY: as above.
            unsafe { place(from.as_ptr(), to.as_ptr(), len) };
        }
        if memory.is_intact() { Ok(()) } else { Err(()) }
    }
}

/// The pieces of `len` bytes, `skip` bytes into the list.
fn pieces(spans: &[Span], mut skip: u64, len: u64) -> Vec<Piece<'_>> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    for span in spans {
        while skip < span.len && at < len {
            let addr = span.addr + skip;
            let most = (span.len - skip).min(len - at);
            let (start, end) = (span.mr.shared_start, span.mr.shared_end);
            let (mapped, n) = match addr {
                addr if addr >= start && addr < end => (true, most.min(end - addr)),
                addr if addr < start && start < end => (false, most.min(start - addr)),
                _ => (false, most),
            };
            pieces.push(Piece { span, run: Run { addr, at: at as usize, len: n as usize }, mapped });
            (skip, at) = (skip + n, at + n);
        }
        skip = skip.saturating_sub(span.len);
    }
    pieces
}

fn foreign_runs(spans: &[Span], skip: u64, len: u64) -> Vec<Run> {
    pieces(spans, skip, len).iter().filter(|piece| !piece.mapped).map(|piece| piece.run).collect()
}

/// Whether a span lies inside its MR's shared sub-range.
#[inline]
fn lies_inside(span: &Span) -> bool {
    let (start, end) = (span.mr.shared_start, span.mr.shared_end);
    span.addr >= start && span.len <= end.saturating_sub(span.addr)
}

/// Whether all of a list is mapped.
#[inline]
pub(crate) fn are_mapped(spans: &[Span]) -> bool {
    spans.iter().all(lies_inside)
}

/// Where the aligned eight bytes of an atomic's target are mapped, if they are.
pub(crate) fn mapped_word<M: Memory>(memory: &M, span: &Span) -> Option<NonNull<u8>> {
    if lies_inside(span) { memory.mapped(&span.mr, span.addr, 8) } else { None }
}
