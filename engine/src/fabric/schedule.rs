//! Whose turn it is, and who waits for the clock.
//!
//! ```text
//! fresh    clients that have just woken and had hardly more than who is served now: a turn each, at once
//! current  the client whose visit it is
//! waiting  the others, by what they have had
//! ```
//!
//! Turns are shared between clients first and between the QPs of a client inside its visits: ten thousand busy QPs
//! of one client get as much of a lane as the one QP of another. What a client has had is counted in bytes, a work
//! request as [`WORK`] beside its own, divided by the client's weight. Who has had least comes next, for a visit of
//! [`VISIT`], long enough for caches to be of use. A client that was idle is not owed what it did not use, but it
//! comes first: who asks for little waits for a turn of [`QUANTUM`], whatever the others have posted.
//! Leaves to others: what a turn does (`run`).

use std::collections::{BTreeSet, VecDeque};

use crate::SLICE;

/// What one turn may use: as long as a client that has just woken may have to wait.
pub(super) const QUANTUM: u64 = if cfg!(fuzzing) { 512 } else { 32 * 1024 };
/// What a client of weight 1 may use in one visit.
pub(super) const VISIT: u64 = SLICE;
/// What a work request costs beside its bytes: about as long as it takes to copy as many.
pub(super) const WORK: u64 = if cfg!(fuzzing) { 128 } else { 4096 };

/// A turn: the QP, its client, and how much it may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) at: usize,
    pub(super) client: usize,
    pub(super) budget: u64,
}

/// Turns and waits of QPs, by index.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// By client.
    lineups: Vec<Lineup>,
    fresh: VecDeque<usize>,
    current: Option<usize>,
    waiting: BTreeSet<(u64, usize)>,
    /// What the client of the last visit had had before it: who wakes counts as having had as much.
    floor: u64,
    /// By QP.
    entries: Vec<Entry>,
    /// QPs that have a turn.
    ready: usize,
    timers: BTreeSet<(u64, usize)>,
}

/// One client's QPs that have a turn.
#[derive(Debug)]
struct Lineup {
    /// Also QPs that went meanwhile: their entries say so.
    turns: VecDeque<usize>,
    /// What it has had, by its weight.
    had: u64,
    /// What is left of this visit.
    credit: u64,
    /// What it has used since it came.
    used: u64,
    weight: u64,
    place: Place,
}

/// Where a client stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Idle,
    Fresh,
    Current,
    Waiting,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    client: usize,
    queued: bool,
}

impl Default for Lineup {
    fn default() -> Self {
        Self { turns: VecDeque::new(), had: 0, credit: 0, used: 0, weight: 1, place: Place::Idle }
    }
}

impl Schedule {
    /// A new QP and whose it is.
    pub(super) fn adopt(&mut self, at: usize, client: usize) {
        if self.entries.len() <= at {
            self.entries.resize(at + 1, Entry::default());
        }
        let _ = self.lineup(client);
        self.entries[at] = Entry { client, queued: false };
    }

    /// How many times the usual share of a lane a client gets.
    pub(super) fn set_weight(&mut self, client: usize, weight: u32) {
        self.lineup(client).weight = u64::from(weight.max(1));
    }

    fn lineup(&mut self, client: usize) -> &mut Lineup {
        if self.lineups.len() <= client {
            self.lineups.resize_with(client + 1, Lineup::default);
        }
        &mut self.lineups[client]
    }

    /// Forgets a client whose QPs are gone.
    pub(super) fn dismiss(&mut self, client: usize) {
        let Some(lineup) = self.lineups.get_mut(client) else { return };
        match lineup.place {
            Place::Waiting => drop(self.waiting.remove(&(lineup.had, client))),
            Place::Current => self.current = None,
            // It is found without turns.
            Place::Fresh | Place::Idle => {}
        }
        let place = if lineup.place == Place::Fresh { Place::Fresh } else { Place::Idle };
        *lineup = Lineup { place, had: self.floor, ..Lineup::default() };
    }

    /// Gives a QP a turn, once.
    pub(super) fn enqueue(&mut self, at: usize) {
        let entry = &mut self.entries[at];
        if entry.queued {
            return;
        }
        entry.queued = true;
        self.ready += 1;
        let client = entry.client;
        self.lineups[client].turns.push_back(at);
        if self.lineups[client].place == Place::Idle {
            self.wake(client);
        }
    }

    /// Gives a QP a turn that was away for a moment, in the middle of what it did: its client has had no rest, and what it
    /// is owed or owes stays.
    pub(super) fn take_back(&mut self, at: usize) {
        let Entry { client, queued } = self.entries[at];
        let lineup = &mut self.lineups[client];
        if !queued && lineup.place == Place::Idle {
            lineup.place = Place::Waiting;
            self.waiting.insert((lineup.had, client));
        }
        self.enqueue(at);
    }

    /// Whether a QP has a turn to come.
    pub(super) fn has_turn(&self, at: usize) -> bool {
        self.entries[at].queued
    }

    /// Gives a QP that has used its turn and has more to do another one: the next, if its client's visit goes on.
    pub(super) fn enqueue_again(&mut self, at: usize) {
        let Entry { client, queued } = self.entries[at];
        if queued || self.lineups[client].credit < WORK || self.lineups[client].place != Place::Current {
            return self.enqueue(at);
        }
        self.entries[at].queued = true;
        self.ready += 1;
        self.lineups[client].turns.push_front(at);
    }

    /// A client that had nothing to do has something.
    fn wake(&mut self, client: usize) {
        let served = self.current.map_or(self.floor, |current| self.lineups[current].had.max(self.floor));
        let alone = self.current.is_none() && self.waiting.is_empty();
        let lineup = &mut self.lineups[client];
        lineup.had = lineup.had.max(self.floor);
        if alone {
            self.floor = lineup.had;
        }
        if alone || lineup.had <= served + VISIT {
            (lineup.place, lineup.credit) = (Place::Fresh, QUANTUM * lineup.weight);
            self.fresh.push_back(client);
        } else {
            lineup.place = Place::Waiting;
            self.waiting.insert((lineup.had, client));
        }
    }

    /// The next turn. What it used is told to [`Self::charge`].
    pub(super) fn next(&mut self) -> Option<Call> {
        loop {
            let client = match self.fresh.front().copied().or(self.current) {
                Some(client) => client,
                None => self.next_visit()?,
            };
            let lineup = &mut self.lineups[client];
            if lineup.credit >= WORK
                && let Some(at) = lineup.turns.pop_front()
            {
                let entry = &mut self.entries[at];
                // Gone meanwhile, or gone and come back as another's.
                if !entry.queued || entry.client != client {
                    continue;
                }
                entry.queued = false;
                self.ready -= 1;
                return Some(Call { at, client, budget: lineup.credit.min(QUANTUM) });
            }
            self.end_visit(client);
        }
    }

    /// Chooses the client that has had least.
    fn next_visit(&mut self) -> Option<usize> {
        let (had, client) = self.waiting.pop_first()?;
        self.floor = self.floor.max(had);
        let lineup = &mut self.lineups[client];
        (lineup.place, lineup.credit) = (Place::Current, VISIT * lineup.weight);
        self.current = Some(client);
        Some(client)
    }

    fn end_visit(&mut self, client: usize) {
        let lineup = &mut self.lineups[client];
        match lineup.place {
            Place::Fresh => drop(self.fresh.pop_front()),
            _ => self.current = None,
        }
        if lineup.turns.is_empty() {
            lineup.place = Place::Idle;
        } else {
            lineup.place = Place::Waiting;
            self.waiting.insert((lineup.had, client));
        }
    }

    /// Says what a turn has used.
    pub(super) fn charge(&mut self, client: usize, used: u64) {
        let lineup = &mut self.lineups[client];
        lineup.credit = lineup.credit.saturating_sub(used);
        lineup.had += used / lineup.weight;
        lineup.used += used;
    }

    /// What a client has used since it came.
    pub(super) fn used(&self, client: usize) -> u64 {
        self.lineups.get(client).map_or(0, |lineup| lineup.used)
    }

    /// QPs that have a turn.
    pub(super) fn len(&self) -> usize {
        self.ready
    }

    /// Wakes a QP at a time.
    pub(super) fn set_timer(&mut self, when: u64, at: usize) {
        self.timers.insert((when, at));
    }

    /// Takes a timer back.
    pub(super) fn cancel(&mut self, when: u64, at: usize) {
        self.timers.remove(&(when, at));
    }

    /// The earliest timer.
    pub(super) fn next_timer(&self) -> Option<u64> {
        self.timers.first().map(|(when, _)| *when)
    }

    /// Takes a timer that is due.
    pub(super) fn expire(&mut self, now: u64) -> Option<(u64, usize)> {
        let first = *self.timers.first()?;
        (first.0 <= now).then(|| {
            self.timers.remove(&first);
            first
        })
    }

    /// Forgets a QP that has no timer. A turn that it has left finds nothing.
    pub(super) fn forget(&mut self, at: usize) {
        if std::mem::take(&mut self.entries[at].queued) {
            self.ready -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `clients` with `qps` busy QPs each; the index of a QP is `client * qps + i`.
    fn busy(clients: usize, qps: usize) -> Schedule {
        let mut schedule = Schedule::default();
        for at in 0..clients * qps {
            schedule.adopt(at, at / qps);
            schedule.enqueue(at);
        }
        schedule
    }

    /// Gives a turn that uses all it may and leaves more to do.
    fn turn(schedule: &mut Schedule) -> Call {
        let call = schedule.next().unwrap();
        schedule.charge(call.client, call.budget);
        schedule.enqueue_again(call.at);
        call
    }

    #[test]
    fn a_client_that_asks_for_little_waits_for_no_turn_but_the_one_in_progress() {
        for (clients, qps) in [(1, 1), (1, 1000), (4, 64), (63, 16)] {
            let mut schedule = busy(clients, qps);
            let victim = clients * qps;
            schedule.adopt(victim, clients);
            // All others have had their first turn.
            (0..clients).for_each(|_| assert!(turn(&mut schedule).at < victim));
            for round in 0..500 {
                // At any point of anybody's visit.
                for _ in 0..1 + clients / 4 + round % 11 {
                    turn(&mut schedule);
                }
                schedule.enqueue(victim);
                let call = schedule.next().unwrap();
                assert_eq!(call.at, victim, "{clients} x {qps}, round {round}");
                schedule.charge(call.client, WORK + 8);
            }
        }
    }

    #[test]
    fn a_ready_qp_waits_for_three_visits_of_each_other_client_at_the_most() {
        // Clients that sleep and wake as they like, by a generator of pseudo-random numbers.
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        const CLIENTS: usize = 9;
        let mut schedule = busy(CLIENTS, 1);
        // What each client has used since each other became ready.
        let mut since = [Some([0_u64; CLIENTS]); CLIENTS];
        for _ in 0..200_000 {
            let at = random(CLIENTS as u64) as usize;
            if random(3) > 0 && since[at].is_none() {
                since[at] = Some([0; CLIENTS]);
                schedule.enqueue(at);
            }
            let Some(call) = schedule.next() else { continue };
            let used = if random(2) == 0 { call.budget } else { WORK.max(random(call.budget)) };
            schedule.charge(call.client, used);
            since[call.at] = None;
            since.iter_mut().flatten().for_each(|waits| waits[call.client] += used);
            let most = since.iter().flatten().flatten().max().copied().unwrap_or(0);
            assert!(most <= 3 * VISIT, "{most}");
            if random(4) > 0 {
                since[call.at] = Some([0; CLIENTS]);
                schedule.enqueue_again(call.at);
            }
        }
    }

    #[test]
    fn clients_share_evenly_however_many_qps_they_have_and_by_weight_where_it_is_set() {
        let mut schedule = Schedule::default();
        let qps = [1000, 1, 30, 30];
        for (client, at) in qps.iter().enumerate().flat_map(|(client, n)| vec![client; *n]).zip(0..) {
            schedule.adopt(at, client);
            schedule.enqueue(at);
        }
        schedule.set_weight(3, 3);
        for _ in 0..12_000 {
            turn(&mut schedule);
        }
        let share = schedule.used(1);
        for (client, weight) in [1, 1, 1, 3].into_iter().enumerate() {
            let used = schedule.used(client);
            assert!(used.abs_diff(share * weight) <= 4 * VISIT, "client {client}: {used} of {share}");
        }
    }

    #[test]
    fn a_client_that_comes_and_goes_gets_no_more_than_one_that_stays() {
        let mut schedule = busy(1, 1);
        schedule.adopt(1, 1);
        for _ in 0..10_000 {
            // The second rings again as soon as it has nothing left to do.
            schedule.enqueue(1);
            let call = schedule.next().unwrap();
            schedule.charge(call.client, call.budget);
            if call.client == 0 {
                schedule.enqueue_again(0);
            }
        }
        assert!(schedule.used(1) <= schedule.used(0) + VISIT, "{} {}", schedule.used(1), schedule.used(0));
    }

    #[test]
    fn a_client_that_slept_is_owed_nothing_and_owes_nothing_for_having_been_alone() {
        let mut schedule = busy(2, 1);
        schedule.forget(1);
        for _ in 0..10_000 {
            turn(&mut schedule);
        }
        schedule.enqueue(1);
        let before = schedule.used(0);
        for _ in 0..100 {
            turn(&mut schedule);
        }
        assert!(schedule.used(1).abs_diff(schedule.used(0) - before) <= 2 * VISIT);
    }

    #[test]
    fn the_qps_of_a_client_have_a_visit_each() {
        let mut schedule = busy(1, 5);
        let mut order: Vec<_> = (0..200).map(|_| turn(&mut schedule).at).collect();
        order.dedup();
        assert_eq!(order[..12], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]);
    }

    #[test]
    fn what_is_gone_has_no_turn_and_its_place_is_anothers() {
        for turns in 0..20 {
            let mut schedule = busy(2, 2);
            for _ in 0..turns {
                turn(&mut schedule);
            }
            schedule.forget(0);
            schedule.forget(1);
            schedule.dismiss(0);
            assert_eq!(schedule.len(), 2);
            schedule.adopt(0, 1);
            schedule.enqueue(0);
            let mut left: Vec<_> =
                std::iter::from_fn(|| schedule.next()).map(|call| (call.client, call.at)).collect();
            left.sort_unstable();
            assert_eq!(left, [(1, 0), (1, 2), (1, 3)], "after {turns} turns");
            assert_eq!(schedule.len(), 0);
            schedule.adopt(1, 0);
            schedule.enqueue(1);
            assert_eq!(schedule.next().map(|call| (call.client, call.at)), Some((0, 1)));
        }
    }
}
