//! The daemon's part in what other hosts say to this one.

use std::collections::BTreeSet;

use super::Daemon;

impl Daemon {
    /// Takes some of it in.
    pub(super) fn hear_hosts(&mut self) {
        let Some(links) = &self.links else { return };
        let post = links.mailbox().take();
        post.links.iter().for_each(|peer| self.broker.link_up(*peer));
        let tenants: BTreeSet<u32> = post.letters.iter().map(|letter| letter.tenant).collect();
        // They may ask for addresses that somebody has just got.
        tenants.into_iter().for_each(|tenant| self.refresh_stale(tenant));
        post.letters.iter().for_each(|letter| self.broker.hear(letter));
        self.settle_managers();
    }
}
