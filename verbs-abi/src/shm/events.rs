//! The async event ring of a client: the router writes, the provider reads and builds the record for libibverbs.

use std::sync::atomic::Ordering;

use super::{Window, arena};

const ENTRIES: u64 = 192;
const FIRST: usize = 64;
const LEN: usize = FIRST + ENTRIES as usize * 16;

/// One asynchronous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// `enum ibv_event_type`.
    pub kind: u32,
    /// QP number, CQ id or port number, by kind.
    pub element: u32,
}

/// The router's end.
#[derive(Debug)]
pub struct EventWriter {
    ring: Window,
    tail: u64,
}

/// The provider's end.
#[derive(Debug)]
pub struct EventReader {
    ring: Window,
    head: u64,
}

impl EventWriter {
    /// The ring in `arena`.
    #[must_use]
    pub fn new(arena: &Window) -> Option<Self> {
        Some(Self { ring: arena.sub(arena::EVENTS, LEN)?, tail: 0 })
    }

    /// Adds an event. False when the reader is so far behind that it was dropped.
    pub fn push(&mut self, event: AsyncEvent) -> bool {
        let head = self.ring.u64(8).load(Ordering::Acquire);
        // A head beyond the tail is a lie that can only lose the liar's own events.
        if self.tail.wrapping_sub(head) >= ENTRIES {
            return false;
        }
        let at = FIRST + (self.tail % ENTRIES) as usize * 16;
        self.ring.u64(at).store(u64::from(event.kind) << 32 | u64::from(event.element), Ordering::Relaxed);
        self.tail += 1;
        self.ring.u64(0).store(self.tail, Ordering::Release);
        true
    }
}

impl EventReader {
    /// The ring in `arena`.
    #[must_use]
    pub fn new(arena: &Window) -> Option<Self> {
        Some(Self { ring: arena.sub(arena::EVENTS, LEN)?, head: 0 })
    }

    /// Takes the oldest event.
    pub fn pop(&mut self) -> Option<AsyncEvent> {
        if self.head == self.ring.u64(0).load(Ordering::Acquire) {
            return None;
        }
        let word = self.ring.u64(FIRST + (self.head % ENTRIES) as usize * 16).load(Ordering::Relaxed);
        self.head += 1;
        self.ring.u64(8).store(self.head, Ordering::Release);
        Some(AsyncEvent { kind: (word >> 32) as u32, element: word as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_sleeps_loses_the_newest_events_and_nothing_else() {
        let ring = Window::heap(LEN);
        let mut writer = EventWriter { ring: ring.clone(), tail: 0 };
        let mut reader = EventReader { ring, head: 0 };
        let written = (0..300).filter(|n| writer.push(AsyncEvent { kind: 1, element: *n })).count();
        assert_eq!(written as u64, ENTRIES);
        let read: Vec<_> = std::iter::from_fn(|| reader.pop()).map(|event| event.element).collect();
        assert_eq!(read, (0..ENTRIES as u32).collect::<Vec<_>>());
        assert!(writer.push(AsyncEvent { kind: 1, element: 7 }));
        assert_eq!(reader.pop(), Some(AsyncEvent { kind: 1, element: 7 }));
    }
}
