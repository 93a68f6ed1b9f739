//! What the directory needs of whatever it is kept in: etcd now, others (Kubernetes) later.
//!
//! A registry holds what routers say of themselves, under a lease each, and numbers its changes. All of it may wait, on the
//! directory's own threads. What it holds is untrusted, and checked by who implements this: a [`Change`] is sound.

use std::{fmt::Debug, net::SocketAddr, time::Duration};

use super::{
    announcements::Verdict,
    view::{Change, Key},
};

/// Why a registry does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// It cannot be reached, or hung up.
    #[error("{0}")]
    Away(String),
    /// It answers something else than it should.
    #[error("it makes no sense: {0}")]
    Nonsense(String),
    /// It refuses.
    #[error("it refuses: {0}")]
    Refusal(String),
    /// The configuration's files do not serve.
    #[error("{0}")]
    Files(String),
    /// What is watched was compacted: a new listing tells it all.
    #[error("its history was compacted")]
    Compacted,
    /// The lease is over.
    #[error("the lease has ended")]
    NoLease,
}

/// All that a registry holds, at a revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) revision: u64,
    pub(crate) changes: Vec<Change>,
    /// What stands in this router's name, at what revision each.
    pub(crate) own: Vec<(Key, u64)>,
}

/// A change, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) change: Change,
    pub(crate) revision: u64,
}

/// How long a router's word holds unless it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) time: Duration,
    /// Nothing stands under it yet.
    pub(crate) is_new: bool,
}

/// Ends a watch from another thread.
pub(crate) type Cancel = Box<dyn Fn() + Send>;

/// Changes, in order, each once.
pub(crate) trait Watch: Send {
    /// Waits for some.
    fn next(&mut self) -> Result<Vec<Seen>, Trouble>;
}

/// Where routers say what they serve.
pub(crate) trait Registry: Send + Debug {
    /// Where it is reached, for people.
    fn place(&self) -> String;
    /// How many servers there are.
    fn servers(&self) -> usize {
        1
    }
    /// Begins anew after trouble, with another server if there are some.
    fn reconnect(&mut self) -> Result<(), Trouble>;
    /// All that it holds.
    fn list(&mut self) -> Result<Listing, Trouble>;
    /// What changes after a revision.
    fn watch(&mut self, after: u64) -> Result<(Box<dyn Watch>, Cancel), Trouble>;
    /// Takes a lease, or repeats that this router is alive.
    fn keep(&mut self) -> Result<Lease, Trouble>;
    /// Says where this router listens; refused where another one uses its name.
    fn enrol(&mut self, address: SocketAddr) -> Result<Verdict, Trouble>;
    /// Says which addresses this router serves, each unless another one does.
    fn claim(&mut self, keys: &[Key]) -> Result<Vec<Verdict>, Trouble>;
    /// Takes that back.
    fn release(&mut self, keys: &[Key]) -> Result<(), Trouble>;
    /// Removes what a former life of this router left, each unless it has changed since a revision.
    fn sweep(&mut self, keys: &[(Key, u64)]) -> Result<(), Trouble>;
    /// Takes everything back.
    fn leave(&mut self);
}
