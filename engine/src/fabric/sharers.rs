//! XRC receivers that are open more than once: whoever holds one may change it, all hear of its events, and it ends with
//! its last holder. Its address and the turns it takes are those of one of them, its owner; at first its creator.

use verbs_abi::shm::arena;

use super::{Client, Fabric};
use crate::Memory;

const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;

/// A holder of a QP beside its owner.
#[derive(Debug)]
pub(super) struct Sharer {
    /// Index of the client.
    pub(super) owner: usize,
    /// Its doorbell slot, which nobody needs to ring.
    slot: u32,
}

impl<M: Memory> Fabric<M> {
    /// Opens a receiver of an XRC domain, which the client has open, once more. Returns the client's doorbell slot.
    ///
    /// # Errors
    /// EINVAL without such a receiver in the domain, ENOMEM without a free slot.
    pub fn open_qp(&mut self, client: u32, qpn: u32, domain: u32) -> Result<u32, i32> {
        let owner = *self.client_index.get(&client).ok_or(EINVAL)?;
        let at = *self.qpn_index.get(&qpn).ok_or(EINVAL)?;
        let qp = self.qps[at].as_mut().filter(|qp| qp.create.xrcd == Some(domain)).ok_or(EINVAL)?;
        let slot = self.clients[owner].as_mut().ok_or(EINVAL)?.take_slot(at).ok_or(ENOMEM)?;
        qp.sharers.push(Sharer { owner, slot });
        Ok(slot)
    }

    /// Takes a QP from one of its holders. False: that was the last one, and the QP is to be removed.
    pub(super) fn let_go(&mut self, at: usize, owner: usize) -> bool {
        let Some(qp) = self.qps[at].as_mut() else { return true };
        let gone = match qp.sharers.iter().position(|sharer| sharer.owner == owner) {
            Some(found) => qp.sharers.remove(found),
            None if qp.sharers.is_empty() => return false,
            None => {
                let heir = qp.sharers.remove(0);
                let gone = Sharer { owner, slot: std::mem::replace(&mut qp.slot, heir.slot) };
                qp.owner = heir.owner;
                self.schedule.forget(at);
                self.schedule.adopt(at, heir.owner);
                self.schedule.enqueue(at);
                gone
            }
        };
        if let Some(client) = self.clients[gone.owner].as_mut() {
            client.slots[gone.slot as usize] = None;
            client.free_slots.push(gone.slot);
        }
        true
    }
}

impl<M> Client<M> {
    /// A free doorbell slot, which is the QP's from now on.
    fn take_slot(&mut self, at: usize) -> Option<u32> {
        let slot = self.free_slots.last().copied().unwrap_or(self.slots.len() as u32);
        if slot >= arena::MAX_QP {
            return None;
        }
        self.free_slots.pop();
        if slot as usize == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot as usize] = Some(at);
        Some(slot)
    }
}
