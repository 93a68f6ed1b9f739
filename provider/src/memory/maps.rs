//! What is mapped in this process now: `/proc/self/maps`, asked range by range where the kernel can, else read.
//!
//! Only facts are reported; what they mean for a registration is decided elsewhere.

use std::mem::size_of;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::ProtFlags;

/// The whole address space that a user program has without asking for more.
pub(super) const EVERYTHING: Range<usize> = 0..usize::MAX;

/// One mapping, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) range: Range<usize>,
    pub(super) prot: ProtFlags,
    pub(super) shared: bool,
    pub(super) offset: u64,
    /// Device major and minor number and inode of the mapped file, all zero without one.
    pub(super) file: (u32, u32, u64),
    pub(super) name: Name,
}

/// What the kernel calls a mapping, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    /// Nothing, `[heap]`, or a label that the program gave to anonymous memory.
    Plain,
    /// The main thread's stack: it grows.
    Stack,
    /// A file, or something of the kernel's.
    Other,
}

impl Name {
    fn of(text: &[u8]) -> Name {
        match text {
            b"" | b"[heap]" => Name::Plain,
            b"[stack]" => Name::Stack,
            label if label.starts_with(b"[anon:") => Name::Plain,
            _ => Name::Other,
        }
    }
}

impl Mapping {
    /// Private memory without a file behind it.
    pub(super) fn is_private_anonymous(&self) -> bool {
        !self.shared && self.file == (0, 0, 0) && self.name == Name::Plain
    }
}

/// The mappings that overlap `range` and that `keep` wants, by rising address.
pub(super) fn select(
    range: &Range<usize>,
    keep: impl FnMut(&Mapping) -> bool,
) -> Result<Vec<Mapping>, Errno> {
    Maps::open().select(range, keep)
}

/// The file, kept open by who asks often: opening it takes longer than a question. It tells of the process that opened
/// it, whoever asks.
#[derive(Debug)]
pub(super) struct Maps(Result<OwnedFd, Errno>);

impl Maps {
    pub(super) fn open() -> Maps {
        Maps(rustix::fs::open(c"/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()))
    }

    /// The mappings that overlap `range` and that `keep` wants, by rising address.
    pub(super) fn select(
        &self,
        range: &Range<usize>,
        mut keep: impl FnMut(&Mapping) -> bool,
    ) -> Result<Vec<Mapping>, Errno> {
        let maps = self.0.as_ref().map_err(|errno| *errno)?;
        let mut kept = Vec::new();
        let mut visit = |mapping: Mapping| {
            if keep(&mapping) {
                kept.push(mapping);
            }
        };
        if *range == EVERYTHING || !ask(maps, range, &mut visit)? {
            rustix::fs::seek(maps, SeekFrom::Start(0))?;
            read(maps, range, &mut visit)?;
        }
        Ok(kept)
    }
}

/// How many mappings there are. As slow as there are many.
pub(super) fn count() -> Result<usize, Errno> {
    let mut count = 0;
    select(&EVERYTHING, |_| {
        count += 1;
        false
    })?;
    Ok(count)
}

/// `struct procmap_query` of `linux/fs.h`, Linux 6.11.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: rustix::ioctl::Opcode = 0xC068_6611;
const COVERING_OR_NEXT: u64 = 0x10;
const READABLE: u64 = 0x1;
const WRITABLE: u64 = 0x2;
const EXECUTABLE: u64 = 0x4;
const SHARED: u64 = 0x8;

const _: () = assert!(size_of::<ProcmapQuery>() == 0x68);

/// Whether every question costs reading all mappings, as before Linux 6.11.
pub(super) fn must_be_read() -> bool {
    CANNOT_ASK.load(Ordering::Relaxed)
}

/// Set when the kernel was found not to know the query.
static CANNOT_ASK: AtomicBool = AtomicBool::new(false);

/// Asks the kernel for each mapping of `range`; `false` when this kernel cannot be asked.
///
/// A process with tens of thousands of mappings would else pay milliseconds for each registration.
fn ask(maps: &OwnedFd, range: &Range<usize>, visit: &mut dyn FnMut(Mapping)) -> Result<bool, Errno> {
    if CANNOT_ASK.load(Ordering::Relaxed) {
        return Ok(false);
    }
    let mut at = range.start;
    while at < range.end {
        match ask_one(maps, at) {
            Ok(mapping) if mapping.range.start < range.end => {
                at = mapping.range.end;
                visit(mapping);
            }
            Ok(_) | Err(Errno::NOENT) => break,
            // Only the first question may be refused: later ones would repeat what was visited.
            Err(Errno::NOTTY | Errno::INVAL | Errno::PERM | Errno::NOSYS) if at == range.start => {
                CANNOT_ASK.store(true, Ordering::Relaxed);
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// The mapping that covers `address`, or else the next above it.
fn ask_one(maps: &OwnedFd, address: usize) -> Result<Mapping, Errno> {
    let mut query = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: address as u64,
        ..ProcmapQuery::default()
    };
    ask_kernel(maps, &mut query)?;
    let mut name = Name::Other;
    if query.inode == 0 {
        // A second question, because a file's name may need a page of room and is of no interest.
        let mut text = [0u8; 128];
        let room = text.len() as u32;
        let mut named = ProcmapQuery {
            size: query.size,
            query_flags: COVERING_OR_NEXT,
            query_addr: query.query_addr,
            vma_name_size: room,
            vma_name_addr: text.as_mut_ptr() as u64,
            ..ProcmapQuery::default()
        };
        ask_kernel(maps, &mut named)?;
        let len = (named.vma_name_size.saturating_sub(1)).min(room) as usize;
        name = Name::of(&text[..len]);
        query = named;
    }
    Ok(Mapping {
        range: query.vma_start as usize..query.vma_end as usize,
        prot: prot_of(
            query.vma_flags & READABLE != 0,
            query.vma_flags & WRITABLE != 0,
            query.vma_flags & EXECUTABLE != 0,
        ),
        shared: query.vma_flags & SHARED != 0,
        offset: query.vma_offset,
        file: (query.dev_major, query.dev_minor, query.inode),
        name,
    })
}

fn ask_kernel(maps: &OwnedFd, query: &mut ProcmapQuery) -> Result<(), Errno> {
    // SAFETY: the operation takes a pointer to exactly this structure; a name buffer that it names is a live array
    // of the caller with the stated length.
    unsafe {
        let updater = rustix::ioctl::Updater::<PROCMAP_QUERY, ProcmapQuery>::new(query);
        rustix::ioctl::ioctl(maps, updater)
    }
}

fn prot_of(read: bool, write: bool, execute: bool) -> ProtFlags {
    let mut prot = ProtFlags::empty();
    prot.set(ProtFlags::READ, read);
    prot.set(ProtFlags::WRITE, write);
    prot.set(ProtFlags::EXEC, execute);
    prot
}

/// Longest line that is kept; what a file name has beyond it does not matter.
const LINE: usize = 8192;

/// Reads the text form line by line up to the end of `range`.
fn read(maps: &OwnedFd, range: &Range<usize>, visit: &mut dyn FnMut(Mapping)) -> Result<(), Errno> {
    let mut buffer = [0u8; LINE];
    let mut filled = 0;
    let mut skipping = false;
    // Returns whether there may be more to see.
    let mut take = |line: &[u8]| {
        let mapping = parse(line);
        let more = mapping.as_ref().is_none_or(|mapping| mapping.range.start < range.end);
        mapping.filter(|mapping| more && mapping.range.end > range.start).into_iter().for_each(&mut *visit);
        more
    };
    loop {
        match rustix::io::read(maps, &mut buffer[filled..]) {
            Ok(0) => return Ok(()),
            Ok(got) => filled += got,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        }
        let mut start = 0;
        while let Some(len) = buffer[start..filled].iter().position(|&byte| byte == b'\n') {
            let line = &buffer[start..start + len];
            start += len + 1;
            if !std::mem::take(&mut skipping) && !take(line) {
                return Ok(());
            }
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
        if filled == LINE {
            if !std::mem::replace(&mut skipping, true) && !take(&buffer) {
                return Ok(());
            }
            filled = 0;
        }
    }
}

/// Parses `start-end rwxp offset major:minor inode  name`.
fn parse(line: &[u8]) -> Option<Mapping> {
    let (start, rest) = number::<16>(line)?;
    let (end, rest) = number::<16>(rest.strip_prefix(b"-")?)?;
    let (flags, rest) = rest.strip_prefix(b" ")?.split_at_checked(4)?;
    let (offset, rest) = number::<16>(rest.strip_prefix(b" ")?)?;
    let (major, rest) = number::<16>(rest.strip_prefix(b" ")?)?;
    let (minor, rest) = number::<16>(rest.strip_prefix(b":")?)?;
    let (inode, name) = number::<10>(rest.strip_prefix(b" ")?)?;
    Some(Mapping {
        range: start as usize..end as usize,
        prot: prot_of(flags[0] == b'r', flags[1] == b'w', flags[2] == b'x'),
        shared: flags[3] == b's',
        offset,
        file: (major as u32, minor as u32, inode),
        name: Name::of(name.trim_ascii()),
    })
}

/// The number in front of `text`, and what follows it.
fn number<const RADIX: u32>(text: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    while let Some(digit) = text.get(len).and_then(|&byte| (byte as char).to_digit(RADIX)) {
        value = value.checked_mul(u64::from(RADIX))?.checked_add(u64::from(digit))?;
        len += 1;
    }
    (len > 0).then_some((value, &text[len..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_understood_to_its_last_field() {
        let line = b"7f0010000000-7f0010021000 rw-s 7f0010000000 00:01 1027   /memfd:region (deleted)";
        let mapping = parse(line).unwrap();
        assert_eq!(mapping.range, 0x7f00_1000_0000..0x7f00_1002_1000);
        assert_eq!(mapping.prot, ProtFlags::READ | ProtFlags::WRITE);
        assert!(mapping.shared);
        assert_eq!(mapping.offset, 0x7f00_1000_0000);
        assert_eq!(mapping.file, (0, 1, 1027));
        assert_eq!(mapping.name, Name::Other);
    }

    #[test]
    fn anonymous_memory_is_told_from_everything_else() {
        let anonymous = |line: &[u8]| parse(line).unwrap().is_private_anonymous();
        assert!(anonymous(b"1000-2000 rw-p 00000000 00:00 0"));
        assert!(anonymous(b"1000-2000 rw-p 00000000 00:00 0       [heap]"));
        assert!(anonymous(b"1000-2000 rw-p 00000000 00:00 0       [anon:arena]"));
        assert!(!anonymous(b"1000-2000 rw-p 00000000 00:00 0      [stack]"));
        assert!(!anonymous(b"1000-2000 r-xp 00000000 00:00 0      [vdso]"));
        assert!(!anonymous(b"1000-2000 rw-s 00000000 00:01 7      /dev/zero (deleted)"));
        assert!(!anonymous(b"1000-2000 rw-p 00000000 08:01 7      /usr/lib/libx.so"));
    }

    #[test]
    fn garbage_is_no_mapping() {
        for line in [
            &b""[..],
            b"1000",
            b"1000-2000",
            b"1000-2000 rw",
            b"x-y rw-p 0 0:0 0",
            b"1-2 rw-p 0 0:0 ",
            b"1-2 rw-p 0 0:0 x",
        ] {
            assert_eq!(parse(line), None, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn asking_and_reading_agree() {
        let maps =
            rustix::fs::open(c"/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let here = &maps as *const _ as usize;
        let code = asking_and_reading_agree as fn() as usize;
        for range in [here..here + 1, code..code + 1] {
            let (mut asked, mut found) = (Vec::new(), Vec::new());
            if !ask(&maps, &range, &mut |mapping| asked.push(mapping)).unwrap() {
                eprintln!("skipped: this kernel has no PROCMAP_QUERY");
                return;
            }
            rustix::fs::seek(&maps, SeekFrom::Start(0)).unwrap();
            read(&maps, &range, &mut |mapping| found.push(mapping)).unwrap();
            assert_eq!(asked, found);
            assert_eq!(asked.len(), 1);
        }
    }
}
