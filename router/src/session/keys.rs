//! Which keys a client's memory regions get.
//!
//! A key is `index << 15 | random`. Indices come back in the order in which they were given up, so a stale key
//! meets a new region as late as possible, and then its random part is wrong with all but certainty.

use std::{collections::VecDeque, io};

use rustix::rand::{GetRandomFlags, getrandom};
use verbs_abi::shm::mr_table::{KEY_RANDOM_BITS, index_of};

/// Free indices of one client.
#[derive(Debug, Default)]
pub(super) struct Keys {
    next: u32,
    free: VecDeque<u32>,
}

impl Keys {
    /// A key that is not in use, never 0. `limit` is the number of regions a client may have.
    pub(super) fn take(&mut self, limit: u32) -> io::Result<u32> {
        let random = random()?;
        // Fresh indices first: they are the ones no old key names.
        let index = if self.next < limit {
            self.next += 1;
            self.next - 1
        } else {
            self.free.pop_front().ok_or(io::ErrorKind::OutOfMemory)?
        };
        Ok(index << KEY_RANDOM_BITS | random)
    }

    /// Gives a key up.
    pub(super) fn put(&mut self, key: u32) {
        self.free.push_back(index_of(key));
    }
}

/// Random low bits, never all zero: no key is 0.
fn random() -> io::Result<u32> {
    let mut bytes = [0u8; 4];
    loop {
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let random = u32::from_ne_bytes(bytes) & ((1 << KEY_RANDOM_BITS) - 1);
        if random != 0 {
            return Ok(random);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn keys_are_distinct_and_an_index_rests_as_long_as_possible() {
        let mut keys = Keys::default();
        let taken: Vec<_> = (0..100).map(|_| keys.take(100).unwrap()).collect();
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), 100);
        assert!(taken.iter().all(|key| *key != 0));
        assert!(keys.take(100).is_err());
        keys.put(taken[7]);
        keys.put(taken[3]);
        assert_eq!(index_of(keys.take(100).unwrap()), 7);
    }

    #[test]
    fn a_new_region_at_an_old_index_has_another_key() {
        let mut keys = Keys::default();
        let mut seen = HashSet::new();
        for _ in 0..50 {
            let key = keys.take(1).unwrap();
            seen.insert(key);
            keys.put(key);
        }
        assert!(seen.len() > 40);
    }
}
