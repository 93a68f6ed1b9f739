//! What other hosts say to the thread that answers clients: put in by the thread of the links, which must not wait,
//! taken out when there is time.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use engine::{Control, Controls};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

/// Letters of one host that may wait. Who sends more has what it lost to say again.
const WAITING: usize = 8192;
/// Letters that are taken at a time: clients wait meanwhile.
const BATCH: usize = 256;

/// A mailbox.
#[derive(Debug)]
pub(crate) struct Mailbox {
    waiting: Mutex<Waiting>,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Waiting {
    letters: VecDeque<Control>,
    /// How many of each host.
    counts: HashMap<u32, usize>,
    /// Hosts to which there is a new link.
    links: BTreeSet<u32>,
}

/// What was taken out.
#[derive(Debug, Default)]
pub(crate) struct Post {
    /// Hosts to which there is a new link.
    pub(crate) links: BTreeSet<u32>,
    /// What was said, some of it perhaps over earlier links.
    pub(crate) letters: Vec<Control>,
}

impl Mailbox {
    /// An empty one.
    pub(crate) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { waiting: Mutex::default(), wake })
    }

    /// Takes some out. What is left makes it readable again.
    pub(crate) fn take(&self) -> Post {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        let mut waiting = self.waiting.lock();
        let some = waiting.letters.len().min(BATCH);
        let letters: Vec<Control> = waiting.letters.drain(..some).collect();
        for letter in &letters {
            if let Some(count) = waiting.counts.get_mut(&letter.peer) {
                *count -= 1;
            }
        }
        let links = std::mem::take(&mut waiting.links);
        if waiting.letters.is_empty() {
            waiting.counts.clear();
        } else {
            self.ring();
        }
        Post { links, letters }
    }

    fn ring(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Controls for Mailbox {
    fn arrived(&self, control: Control) {
        let mut waiting = self.waiting.lock();
        let count = waiting.counts.entry(control.peer).or_default();
        if *count >= WAITING {
            return;
        }
        *count += 1;
        waiting.letters.push_back(control);
        if waiting.letters.len() == 1 {
            self.ring();
        }
    }

    fn link_up(&self, peer: u32) {
        self.waiting.lock().links.insert(peer);
        self.ring();
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(peer: u32, word: u32) -> Control {
        let words = word.to_ne_bytes().to_vec();
        Control { peer, tenant: 0, source: [1; 16], destination: [2; 16], words }
    }

    fn is_readable(mailbox: &Mailbox) -> bool {
        let poll = rustix::event::PollFd::new(&mailbox.wake, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [poll], Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
    }

    #[test]
    fn letters_come_out_as_they_went_in_and_a_host_that_sends_too_many_loses_its_own() {
        let mailbox = Mailbox::new().unwrap();
        let sent = WAITING as u32 + 500;
        (0..sent).for_each(|word| mailbox.arrived(letter(0, word)));
        mailbox.arrived(letter(1, 7));
        mailbox.link_up(5);
        mailbox.link_up(5);
        let (mut taken, mut links) = (Vec::new(), Vec::new());
        while is_readable(&mailbox) {
            let post = mailbox.take();
            assert!(post.letters.len() <= BATCH);
            taken.extend(post.letters);
            links.extend(post.links);
        }
        let mut expected: Vec<Control> = (0..WAITING as u32).map(|word| letter(0, word)).collect();
        expected.push(letter(1, 7));
        assert!(taken == expected);
        assert_eq!(links, [5]);
        mailbox.arrived(letter(0, 1));
        assert!(is_readable(&mailbox));
        assert_eq!(mailbox.take().letters, [letter(0, 1)]);
        assert!(!is_readable(&mailbox) && mailbox.take().letters.is_empty());
    }
}
