//! Whether the kernel holds pages of this process in place for somebody for long: `VmPin` of `/proc/self/status`.
//!
//! Buffers that are registered with io_uring or with a kernel's RDMA device stay these very pages for their user,
//! wherever the program's mapping goes. What such a user writes after a page has moved, the program would never see;
//! and which pages these are is not told.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::log::{self, Level};

const LABEL: &[u8] = b"\nVmPin:";

/// The file, read anew at each question.
#[derive(Debug)]
pub(super) struct Pinned {
    file: Option<OwnedFd>,
}

impl Pinned {
    pub(super) fn open() -> Pinned {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Pinned { file: rustix::fs::open(c"/proc/self/status", flags, Mode::empty()).ok() }
    }

    /// Whether there are such pages. Without procfs nobody can tell, and nothing is registered either. Allocates
    /// nothing.
    pub(super) fn any(&self) -> bool {
        let Some(file) = &self.file else { return false };
        let (mut search, mut offset) = (Search::default(), 0);
        let mut buffer = [0u8; 2048];
        // A line that lists a program's groups may be long.
        while let Ok(len @ 1..) = rustix::io::pread(file, &mut buffer, offset) {
            if let Some(answer) = buffer[..len].iter().find_map(|&byte| search.take(byte)) {
                return answer;
            }
            offset += len as u64;
        }
        false
    }
}

/// Says, once a process, why memory stays where it is.
pub(super) fn complain() {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        log::say(
            Level::Warn,
            format_args!(
                "memory of this program is pinned (io_uring's registered buffers, another RDMA device): what it \
                 registers here stays where it is meanwhile, and is served more slowly"
            ),
        );
    }
}

/// Finds the line and tells whether its number is another than 0.
#[derive(Debug, Default)]
struct Search {
    /// Bytes of the label that were found.
    found: usize,
}

impl Search {
    fn take(&mut self, byte: u8) -> Option<bool> {
        if self.found == LABEL.len() {
            return match byte {
                b' ' | b'\t' | b'0' => None,
                b'1'..=b'9' => Some(true),
                _ => Some(false),
            };
        }
        // Only the first byte of the label is a newline.
        self.found = if byte == LABEL[self.found] { self.found + 1 } else { usize::from(byte == LABEL[0]) };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(text: &[u8]) -> Option<bool> {
        let mut search = Search::default();
        text.iter().find_map(|&byte| search.take(byte))
    }

    #[test]
    fn the_number_of_the_right_line_counts() {
        assert_eq!(search(b"Name:\tx\nVmLck:\t 4 kB\nVmPin:\t       0 kB\nVmHWM:\t8 kB\n"), Some(false));
        assert_eq!(search(b"Name:\tx\nVmPin:\t    1024 kB\n"), Some(true));
        assert_eq!(search(b"Name:\tVmPin:\t9\nVmPi\n\nVmPin:\t       0 kB\n"), Some(false));
        assert_eq!(search(b"Name:\tVmPin:\t9\n"), None);
    }
}
