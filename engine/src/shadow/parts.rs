//! A list of an application's memory, cut into what the NIC reaches and what bounces.

use super::bounce::{Pool, Slot};
use crate::{memory::Span, nic::NicSge};

/// How the NIC reaches the shared part of a memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// By this local key.
    Key(u32),
    /// It will be known soon.
    Later,
    /// Not at all.
    Never,
}

/// A part of a list.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The NIC reaches it.
    Direct(NicSge),
    /// It bounces: where it lies in the message, and its length.
    Bounced(u64, u64),
}

/// A part that bounces, and the memory by which it does.
#[derive(Debug)]
pub(crate) struct Bounced {
    /// Where in the message it lies.
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) slot: Slot,
}

/// Cuts the parts of a checked piece, `at` bytes into the message.
pub(crate) fn cut(span: &Span, at: u64, key: Option<u32>, parts: &mut Vec<Part>) {
    let (start, end) = (span.addr, span.addr + span.len);
    let (from, to) = match key {
        Some(_) => (span.mr.shared_start.clamp(start, end), span.mr.shared_end.clamp(start, end)),
        None => (start, start),
    };
    let to = to.max(from);
    add_bounced(at, from - start, parts);
    if let Some(lkey) = key.filter(|_| to > from) {
        parts.push(Part::Direct(NicSge { addr: from, len: (to - from) as u32, lkey }));
    }
    add_bounced(at + (to - start), end - to, parts);
}

fn add_bounced(at: u64, len: u64, parts: &mut Vec<Part>) {
    if len == 0 {
        return;
    }
    match parts.last_mut() {
        Some(Part::Bounced(before, room)) if *before + *room == at => *room += len,
        _ => parts.push(Part::Bounced(at, len)),
    }
}

/// Bytes that bounce.
pub(crate) fn bounced(parts: &[Part]) -> u64 {
    parts.iter().map(|part| if let Part::Bounced(_, len) = part { *len } else { 0 }).sum()
}

/// Gives the parts that bounce their memory, and makes the list for the NIC. `None`: there is no room.
pub(crate) fn place_parts(parts: &[Part], pool: &mut Pool) -> Option<(Vec<NicSge>, Vec<Bounced>)> {
    let (mut sges, mut taken) = (Vec::with_capacity(parts.len()), Vec::new());
    for part in parts {
        match part {
            Part::Direct(sge) => sges.push(*sge),
            Part::Bounced(at, len) => match pool.take(*len) {
                Some(slot) => {
                    sges.push(pool.sge(&slot, *len));
                    taken.push(Bounced { at: *at, len: *len, slot });
                }
                None => {
                    taken.into_iter().for_each(|bounced: Bounced| pool.give(bounced.slot));
                    return None;
                }
            },
        }
    }
    Some((sges, taken))
}

#[cfg(test)]
mod tests {
    use verbs_abi::shm::mr_table::MrEntry;

    use super::*;

    fn span(addr: u64, len: u64) -> Span {
        let mr = MrEntry {
            key: 1,
            pd: 1,
            access: 15,
            iova: 0x800,
            addr: 0x800,
            len: 0x3000,
            shared_start: 0x1000,
            shared_end: 0x3000,
        };
        Span { mr, addr, len }
    }

    fn parts(spans: &[Span], key: Option<u32>) -> Vec<Part> {
        let (mut parts, mut at) = (Vec::new(), 0);
        for span in spans {
            cut(span, at, key, &mut parts);
            at += span.len;
        }
        parts
    }

    #[test]
    fn edges_bounce_and_the_interior_is_the_nics() {
        let inner = |addr, len| Part::Direct(NicSge { addr, len, lkey: 5 });
        assert_eq!(parts(&[span(0x1000, 0x2000)], Some(5)), [inner(0x1000, 0x2000)]);
        assert_eq!(
            parts(&[span(0x900, 0x2800)], Some(5)),
            [Part::Bounced(0, 0x700), inner(0x1000, 0x2000), Part::Bounced(0x2700, 0x100)]
        );
        assert_eq!(parts(&[span(0x800, 0x100)], Some(5)), [Part::Bounced(0, 0x100)]);
        assert_eq!(parts(&[span(0x3000, 0x100)], Some(5)), [Part::Bounced(0, 0x100)]);
        assert_eq!(parts(&[span(0x900, 0x2800)], None), [Part::Bounced(0, 0x2800)]);
        assert_eq!(
            parts(&[span(0x2fff, 2), span(0x800, 2)], Some(5)),
            [inner(0x2fff, 1), Part::Bounced(1, 3)],
            "neighbours in the message bounce together"
        );
    }
}
