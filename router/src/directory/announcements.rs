//! The addresses that this router's clients have and other hosts are told of, and how far each has come.
//!
//! ```text
//!   claim --> Pending --(registry: ours)--> Held --release--> Leaving --(registry: gone)--> forgotten
//!                |                           ^
//!                +--(another's)--> Refused --(it ended)--> Contested, others may want it, too
//! ```
//!
//! An address is served here while it is pending: the registry may be away, and this host goes on. One that is refused or
//! contested is not. Leaves to others: which addresses clients have (`claims`), asking the registry (`follower`).

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::view::Key;

/// How far an address has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The registry was not asked yet.
    Pending,
    /// It is this router's, since a revision of the registry.
    Held(u64),
    /// It is another's.
    Refused(String),
    /// It was another's, and the registry was not asked yet.
    Contested(String),
    /// No client has it any more, and the registry was not told yet.
    Leaving,
}

/// What an answer of the registry means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// Nothing for those who have the address.
    Quiet,
    /// It is served from now on.
    Won,
    /// It is not served any more: another router has it.
    Lost(String),
}

/// What the registry says to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ours, since a revision.
    Granted(u64),
    /// It is another's.
    Refused(String),
    /// Ask again: it changed hands meanwhile.
    Again,
}

impl Standing {
    /// Whether the registry is to be asked.
    fn is_asked_for(&self) -> bool {
        matches!(self, Self::Pending | Self::Contested(_))
    }

    /// What it comes to when somebody has the address at a revision; `None` is nobody, `Some(None)` this router.
    fn after(&self, holder: Option<Option<&str>>, revision: u64) -> Self {
        match (holder, self) {
            (Some(Some(other)), _) => Self::Refused(other.to_owned()),
            (Some(None), Self::Held(_)) => Self::Held(revision),
            (_, Self::Refused(other) | Self::Contested(other)) => Self::Contested(other.clone()),
            // In this router's name by a former life, or by nobody.
            _ => Self::Pending,
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Announcements(Mutex<BTreeMap<Key, Standing>>);

impl Announcements {
    /// A client has an address. `holder` is the other router that is known to serve it. True: there is something to do.
    pub(crate) fn claim(&self, key: Key, holder: Option<&str>) -> bool {
        let mut all = self.0.lock();
        let standing = all.get(&key).filter(|standing| **standing != Standing::Leaving);
        if standing.is_some() {
            return false;
        }
        let new = holder.map_or(Standing::Pending, |holder| Standing::Refused(holder.to_owned()));
        let is_pending = new == Standing::Pending;
        all.insert(key, new);
        is_pending
    }

    /// No client has it any more. True: there is something to do.
    pub(crate) fn release(&self, key: Key) -> bool {
        let mut all = self.0.lock();
        match all.get_mut(&key) {
            None | Some(Standing::Leaving) => false,
            Some(Standing::Refused(_)) => {
                all.remove(&key);
                false
            }
            // What is asked for may be on its way to the registry.
            Some(standing @ (Standing::Pending | Standing::Contested(_) | Standing::Held(_))) => {
                *standing = Standing::Leaving;
                true
            }
        }
    }

    /// How far an address has come.
    pub(crate) fn standing(&self, key: &Key) -> Option<Standing> {
        self.0.lock().get(key).cloned()
    }

    /// Some of those that the registry is to be asked for.
    pub(crate) fn pending(&self, most: usize) -> Vec<Key> {
        self.some(most, Standing::is_asked_for)
    }

    /// Some of those that the registry is to be told are over.
    pub(crate) fn leaving(&self, most: usize) -> Vec<Key> {
        self.some(most, |standing| *standing == Standing::Leaving)
    }

    fn some(&self, most: usize, wanted: impl Fn(&Standing) -> bool) -> Vec<Key> {
        let all = self.0.lock();
        all.iter().filter(|(_, standing)| wanted(standing)).map(|(key, _)| *key).take(most).collect()
    }

    /// The registry has answered.
    pub(crate) fn settle(&self, key: &Key, verdict: Verdict) -> Settlement {
        let mut all = self.0.lock();
        let Some(standing) = all.get_mut(key).filter(|standing| standing.is_asked_for()) else {
            return Settlement::Quiet;
        };
        let was_served = *standing == Standing::Pending;
        match verdict {
            Verdict::Granted(revision) => {
                *standing = Standing::Held(revision);
                if was_served { Settlement::Quiet } else { Settlement::Won }
            }
            Verdict::Refused(by) => {
                *standing = Standing::Refused(by.clone());
                if was_served { Settlement::Lost(by) } else { Settlement::Quiet }
            }
            Verdict::Again => Settlement::Quiet,
        }
    }

    /// The registry has forgotten them.
    pub(crate) fn left(&self, keys: &[Key]) {
        let mut all = self.0.lock();
        for key in keys {
            if all.get(key) == Some(&Standing::Leaving) {
                all.remove(key);
            }
        }
    }

    /// The registry tells who has an address at a revision; `None` is nobody, `Some(None)` this router. True: it is to be
    /// asked for anew, or was lost.
    pub(crate) fn saw(&self, key: &Key, holder: Option<Option<&str>>, revision: u64) -> bool {
        let mut all = self.0.lock();
        let Some(standing) = all.get_mut(key) else { return false };
        // What was said before it became ours is old.
        if matches!(standing, Standing::Leaving)
            || matches!(standing, Standing::Held(since) if *since >= revision)
        {
            return false;
        }
        let new = standing.after(holder, revision);
        let is_news = *standing != new && !matches!(new, Standing::Held(_));
        if is_news {
            *standing = new;
        }
        is_news
    }

    /// A whole listing, at a revision, tells who has each address, as for [`Self::saw`]. True: something was lost, or has to be
    /// asked for. What was said before counts no more, whatever its revision: the registry may be another one.
    pub(crate) fn compare<'a>(
        &self,
        holder: impl Fn(&Key) -> Option<Option<&'a str>>,
        revision: u64,
    ) -> bool {
        let mut is_news = false;
        for (key, standing) in
            self.0.lock().iter_mut().filter(|(_, standing)| **standing != Standing::Leaving)
        {
            let new = standing.after(holder(key), revision);
            is_news |= *standing != new && !matches!(new, Standing::Held(_));
            *standing = new;
        }
        is_news
    }

    /// What was held has to be asked for again, and what was to be told is void: the lease is over.
    pub(crate) fn start_over(&self) {
        let mut all = self.0.lock();
        all.retain(|_, standing| *standing != Standing::Leaving);
        for standing in all.values_mut().filter(|standing| matches!(standing, Standing::Held(_))) {
            *standing = Standing::Pending;
        }
    }

    /// All, for the status.
    pub(crate) fn all(&self) -> Vec<(Key, Standing)> {
        self.0.lock().iter().map(|(key, standing)| (*key, standing.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(last: u8) -> Key {
        (0, [last; 16])
    }

    #[test]
    fn an_address_is_asked_for_once_and_given_back() {
        let all = Announcements::default();
        assert!(all.claim(key(1), None) && !all.claim(key(1), None));
        assert_eq!(all.pending(9), [key(1)]);
        assert_eq!(all.settle(&key(1), Verdict::Granted(7)), Settlement::Quiet);
        assert!(all.pending(9).is_empty());
        assert!(all.release(key(1)) && !all.release(key(1)));
        assert_eq!(all.leaving(9), [key(1)]);
        all.left(&[key(1)]);
        assert_eq!(all.standing(&key(1)), None);
    }

    #[test]
    fn one_that_comes_back_while_it_leaves_is_asked_for_again() {
        let all = Announcements::default();
        all.claim(key(1), None);
        all.settle(&key(1), Verdict::Granted(7));
        all.release(key(1));
        assert!(all.claim(key(1), None));
        // The answer to what was asked before.
        all.left(&[key(1)]);
        assert_eq!(all.standing(&key(1)), Some(Standing::Pending));
    }

    #[test]
    fn a_second_claimant_waits_for_the_first_to_end() {
        let all = Announcements::default();
        assert!(!all.claim(key(1), Some("b")), "the view knows better already");
        assert_eq!(all.standing(&key(1)), Some(Standing::Refused("b".to_owned())));
        assert!(all.saw(&key(1), None, 9), "it is free");
        assert_eq!(all.pending(9), [key(1)]);
        assert_eq!(
            all.standing(&key(1)),
            Some(Standing::Contested("b".to_owned())),
            "but others may want it, too"
        );
        assert_eq!(all.settle(&key(1), Verdict::Refused("c".to_owned())), Settlement::Quiet);
        assert!(!all.saw(&key(1), Some(Some("c")), 10), "that is known");
        assert!(all.saw(&key(1), None, 11));
        assert_eq!(all.settle(&key(1), Verdict::Granted(12)), Settlement::Won);
        assert!(all.saw(&key(1), Some(Some("d")), 13), "overwritten");
        assert!(!all.release(key(1)), "nothing to be told");
        assert_eq!(all.standing(&key(1)), None);
    }

    #[test]
    fn what_was_told_late_does_not_take_an_address_away() {
        let all = Announcements::default();
        all.claim(key(1), None);
        all.settle(&key(1), Verdict::Granted(10));
        assert!(!all.saw(&key(1), Some(Some("b")), 8) && !all.saw(&key(1), None, 9));
        assert_eq!(all.standing(&key(1)), Some(Standing::Held(10)));
        assert!(!all.saw(&key(1), Some(None), 10), "our own");
        assert!(all.saw(&key(1), None, 11), "somebody deleted it");
        assert_eq!(all.standing(&key(1)), Some(Standing::Pending));
    }

    #[test]
    fn a_listing_puts_everything_right_even_from_another_registry() {
        let all = Announcements::default();
        for last in 1..=4 {
            all.claim(key(last), (last == 4).then_some("b"));
            all.settle(&key(last), Verdict::Granted(1000));
        }
        let holder = |of: &Key| match of.1[0] {
            1 => Some(None),
            2 => Some(Some("b")),
            _ => None,
        };
        assert!(all.compare(holder, 5));
        let standings: Vec<Standing> = all.all().into_iter().map(|(_, standing)| standing).collect();
        let refused = Standing::Refused("b".to_owned());
        let contested = Standing::Contested("b".to_owned());
        assert_eq!(standings, [Standing::Held(5), refused, Standing::Pending, contested]);
        assert!(all.saw(&key(1), None, 6), "its revisions count now");
    }

    #[test]
    fn a_lease_that_ended_has_everything_asked_for_again() {
        let all = Announcements::default();
        for last in 1..=3 {
            all.claim(key(last), (last == 3).then_some("b"));
            all.settle(&key(last), Verdict::Granted(5));
        }
        all.release(key(2));
        all.start_over();
        assert_eq!(all.pending(9), [key(1)]);
        assert_eq!(all.standing(&key(2)), None);
        assert_eq!(all.standing(&key(3)), Some(Standing::Refused("b".to_owned())));
    }
}
