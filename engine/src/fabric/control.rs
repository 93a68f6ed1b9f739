//! Words of the hosts themselves over a link: beside the packets of QPs, and in no order with them.
//!
//! Leaves to others: what they say (the connection manager). They may be lost, with the link or for want of room.

use std::{fmt::Debug, sync::Arc};

use verbs_abi::proto::Gid;

use super::{Fabric, Stream};
use crate::{
    Memory,
    wire::{
        Path,
        packet::{Header, Kind},
    },
};

/// The longest words, bytes.
pub const MAX_WORDS: usize = 1024;

/// Words from one address to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// The router at the other end of the link, whichever way they go.
    pub peer: u32,
    /// The tenant of both addresses, as this host numbers it.
    pub tenant: u32,
    /// Whose words they are: an address of the sending host.
    pub source: Gid,
    /// Whom they are for.
    pub destination: Gid,
    /// What is said.
    pub words: Vec<u8>,
}

/// Who hears them. Called with the fabric locked: must not wait.
pub trait Controls: Send + Sync + Debug {
    /// Words have come. The tenant is one that both hosts have, and the source an address behind the peer; nothing else
    /// was checked.
    fn arrived(&self, control: Control);

    /// A link is new: what was under way over an earlier one may be lost.
    fn link_up(&self, peer: u32);
}

impl<M: Memory> Fabric<M> {
    /// Sets who hears words of other hosts.
    pub fn set_controls(&mut self, controls: Arc<dyn Controls>) {
        self.links.controls = Some(controls);
    }

    /// Sends words, and has a link made where there is none. False: they are lost.
    pub fn send_control(&mut self, control: &Control) -> bool {
        let Control { peer, tenant, source, destination, words } = control;
        let stream = Stream::first(*peer);
        self.links.call(stream);
        let outbox = self.links.outbox(stream);
        if words.len() > MAX_WORDS || !outbox.has_reply_room() {
            return false;
        }
        let path = Path { tenant: *tenant, source_qpn: 0, target_qpn: 0, sgid: *source, dgid: *destination };
        let mut header = Header::new(Kind::Control, 0, &path, 0, 0);
        (header.len, header.total) = (words.len() as u32, words.len() as u32);
        let filled = outbox.push_with(&header, |into| {
            into.extend_from_slice(words);
            Ok::<(), ()>(())
        });
        filled.is_ok()
    }

    /// Words have come from a router, which speaks for the addresses behind it alone.
    pub(super) fn take_control(&mut self, peer: u32, header: &Header, words: &[u8]) {
        let path = &header.path;
        if self.route(path.tenant, &path.sgid) != Some(peer) || words.len() > MAX_WORDS {
            return;
        }
        if let Some(controls) = &self.links.controls {
            controls.arrived(Control {
                peer,
                tenant: path.tenant,
                source: path.sgid,
                destination: path.dgid,
                words: words.to_vec(),
            });
        }
    }
}
