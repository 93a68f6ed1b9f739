//! The first words on a link: who speaks, which language, for which tenants.
//!
//! ```text
//!  0 magic (8)   8 length of the rest (32, little-endian)   12 JSON
//! ```

use std::hash::{BuildHasher, RandomState};

use engine::wire::packet;
use serde::{Deserialize, Serialize};

use crate::{config::MAX_TENANTS, rnic::Found};

const MAGIC: [u8; 8] = *b"FREEFLOW";
const PREFIX: usize = 12;
/// As many tenants as there may be, with the longest names.
const LONGEST: usize = 256 * 1024;

/// What a router says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// [`packet::VERSION`] of its engine.
    pub(crate) version: u32,
    /// Its name in the directory.
    pub(crate) name: String,
    /// Its tenants, by its numbers.
    pub(crate) tenants: Vec<String>,
    /// As many streams it would have. The end that wants fewer gets its way.
    pub(crate) streams: u32,
    /// A number that it chose when it was started: all streams of a link lead to the same life of a router.
    pub(crate) instance: u64,
    /// Which of the streams this is; said by whoever connects.
    pub(crate) stream: Option<u32>,
    /// Its NIC, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) nic: Option<NicWord>,
}

/// What a router says of its NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NicWord {
    /// Its GID.
    pub(crate) gid: [u8; 16],
    /// Whether it is RoCE.
    pub(crate) is_ethernet: bool,
}

impl NicWord {
    pub(crate) fn of(found: &Found) -> Self {
        Self { gid: found.gid, is_ethernet: found.is_ethernet }
    }

    /// Whether the two may reach each other. Over Ethernet that is found out when they try.
    fn shares_fabric(&self, other: &Self) -> bool {
        match (self.is_ethernet, other.is_ethernet) {
            (true, true) => true,
            (false, false) => self.gid[..8] == other.gid[..8],
            _ => false,
        }
    }
}

/// What a peer said instead.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadHello {
    #[error("it is no FreeFlow router")]
    Stranger,
    #[error("it speaks version {0} of the link's language, this router {ours}", ours = packet::VERSION)]
    Version(u32),
    #[error("its words make no sense: {0}")]
    Words(#[from] serde_json::Error),
    #[error("it has {0} tenants; a router has at most {MAX_TENANTS}")]
    Tenants(usize),
}

impl Hello {
    /// That of this router.
    pub(crate) fn new(name: &str, tenants: &[String], streams: u32) -> Self {
        let instance = RandomState::new().hash_one(std::process::id());
        let (name, tenants) = (name.to_owned(), tenants.to_vec());
        Self { version: packet::VERSION, name, tenants, streams, instance, stream: None, nic: None }
    }

    /// The same, for one of the streams.
    pub(crate) fn on(&self, stream: u32) -> Self {
        Self { stream: Some(stream), ..self.clone() }
    }

    /// How many streams both ends will have.
    pub(crate) fn agree(&self, other: &Self) -> u32 {
        self.streams.min(other.streams).max(1)
    }

    /// Whether both have NICs on a common fabric.
    pub(crate) fn shares_fabric(&self, other: &Self) -> bool {
        self.nic.as_ref().zip(other.nic.as_ref()).is_some_and(|(ours, theirs)| ours.shares_fabric(theirs))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let words = serde_json::to_vec(self).unwrap_or_default();
        [&MAGIC[..], &(words.len() as u32).to_le_bytes(), &words].concat()
    }

    /// Takes it from the beginning of what has come, and says how long it was. `None`: more must come.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, BadHello> {
        let begun = bytes.len().min(MAGIC.len());
        if bytes[..begun] != MAGIC[..begun] {
            return Err(BadHello::Stranger);
        }
        let Some(length) = bytes.get(MAGIC.len()..PREFIX).and_then(|length| length.first_chunk::<4>()) else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > LONGEST {
            return Err(BadHello::Stranger);
        }
        let Some(words) = bytes.get(PREFIX..PREFIX + length) else { return Ok(None) };
        let hello: Self = serde_json::from_slice(words)?;
        if hello.version != packet::VERSION {
            return Err(BadHello::Version(hello.version));
        }
        if hello.tenants.len() > MAX_TENANTS {
            return Err(BadHello::Tenants(hello.tenants.len()));
        }
        Ok(Some((hello, PREFIX + length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_understood_when_all_of_it_has_come() {
        let hello = Hello::new("a", &["blue".to_owned(), "red".to_owned()], 4).on(3);
        let mut bytes = hello.encode();
        let length = bytes.len();
        bytes.extend([1, 2, 3]);
        for part in 0..length {
            assert!(matches!(Hello::decode(&bytes[..part]), Ok(None)), "{part}");
        }
        assert_eq!(Hello::decode(&bytes).unwrap(), Some((hello, length)));
    }

    #[test]
    fn nics_share_a_fabric_on_ethernet_or_in_one_subnet() {
        let host = |gid: u8, is_ethernet| Hello {
            nic: Some(NicWord { gid: [gid; 16], is_ethernet }),
            ..Hello::new("a", &[], 4)
        };
        assert!(host(1, true).shares_fabric(&host(2, true)));
        assert!(host(1, false).shares_fabric(&host(1, false)));
        assert!(!host(1, false).shares_fabric(&host(2, false)));
        assert!(!host(1, true).shares_fabric(&host(1, false)));
        assert!(!host(1, true).shares_fabric(&Hello::new("b", &[], 4)));
        let hello = host(3, true);
        let bytes = hello.encode();
        assert_eq!(Hello::decode(&bytes).unwrap(), Some((hello, bytes.len())));
    }

    #[test]
    fn the_end_that_wants_fewer_streams_gets_its_way_and_none_is_not_to_be_had() {
        let wants = |streams| Hello::new("a", &[], streams);
        assert_eq!(wants(4).agree(&wants(2)), 2);
        assert_eq!(wants(1).agree(&wants(16)), 1);
        assert_eq!(wants(4).agree(&wants(0)), 1);
    }

    #[test]
    fn others_are_told_apart() {
        assert!(matches!(Hello::decode(b"GET / HTTP/1.1"), Err(BadHello::Stranger)));
        assert!(matches!(Hello::decode(b"FREEFLOW\xff\xff\xff\xff"), Err(BadHello::Stranger)));
        assert!(matches!(Hello::decode(b"FREEFLOW\x02\0\0\0{}"), Err(BadHello::Words(_))));
        let many = Hello::new("a", &vec![String::new(); MAX_TENANTS + 1], 1);
        assert!(matches!(Hello::decode(&many.encode()), Err(BadHello::Tenants(_))));
        let other = Hello { version: 99, ..Hello::new("a", &[], 1) };
        assert!(matches!(Hello::decode(&other.encode()), Err(BadHello::Version(99))));
    }
}
