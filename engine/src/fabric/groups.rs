//! Multicast groups: which QPs are attached to which.
//!
//! A group is known by its GID, within a tenant; it is there while a QP is attached to it. Leaves to others: sending
//! to it (`datagrams`), and how many attachments a client may have.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use verbs_abi::{ids, proto::Gid, verbs::QpType};

use super::Fabric;
use crate::Memory;

const EINVAL: i32 = 22;
const ENOENT: i32 = 2;

/// All groups: the members of each, by their QP numbers, with their indices.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<(u32, Gid), BTreeMap<u32, usize>>);

impl Groups {
    /// The member with the lowest number from `from` on.
    pub(super) fn next(&self, tenant: u32, group: &Gid, from: u32) -> Option<(u32, usize)> {
        let (qpn, at) = self.0.get(&(tenant, *group))?.range(from..).next()?;
        Some((*qpn, *at))
    }

    /// All that have members, with their tenants.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, Gid)> + '_ {
        self.0.keys().copied()
    }

    /// True: it was the last.
    fn leave(&mut self, tenant: u32, group: &Gid, qpn: u32) -> bool {
        let key = (tenant, *group);
        if let Some(members) = self.0.get_mut(&key) {
            members.remove(&qpn);
            if members.is_empty() {
                self.0.remove(&key);
                return true;
            }
        }
        false
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl<M: Memory> Fabric<M> {
    /// Lets a QP get the datagrams of a group. False: it does already.
    ///
    /// # Errors
    /// ENOENT without such a QP, EINVAL for one that is not UD or a GID that is no group's.
    pub fn attach(&mut self, client: u32, qpn: u32, group: &Gid) -> Result<bool, i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        let qp = self.qps[at].as_mut().ok_or(ENOENT)?;
        if qp.requester.qp_type() != QpType::Ud || !ids::Gid(*group).is_multicast() {
            return Err(EINVAL);
        }
        if !qp.groups.insert(*group) {
            return Ok(false);
        }
        let tenant = qp.tenant;
        let members = self.groups.0.entry((tenant, *group)).or_default();
        let is_first = members.is_empty();
        members.insert(qpn, at);
        if is_first {
            self.announce_group(tenant, group, true);
        }
        Ok(true)
    }

    /// Lets a QP get them no more.
    ///
    /// # Errors
    /// ENOENT without such a QP, EINVAL for one that is not attached to the group.
    pub fn detach(&mut self, client: u32, qpn: u32, group: &Gid) -> Result<(), i32> {
        let at = self.owned(client, qpn).ok_or(ENOENT)?;
        let qp = self.qps[at].as_mut().ok_or(ENOENT)?;
        if !qp.groups.remove(group) {
            return Err(EINVAL);
        }
        let tenant = qp.tenant;
        self.leave_group(tenant, group, qpn);
        Ok(())
    }

    /// A QP ends: it leaves its groups.
    pub(super) fn leave_groups(&mut self, tenant: u32, qpn: u32, groups: &BTreeSet<Gid>) {
        groups.iter().for_each(|group| self.leave_group(tenant, group, qpn));
    }

    fn leave_group(&mut self, tenant: u32, group: &Gid, qpn: u32) {
        if self.groups.leave(tenant, group, qpn) {
            self.announce_group(tenant, group, false);
        }
    }
}
