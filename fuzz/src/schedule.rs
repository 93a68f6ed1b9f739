//! Three clients in a ring that keep the rules, in every order of posts, seats, turns, time, verbs and deaths.
//!
//! Held against a model (`end`): each work request ends once, in order; what is done well was done exactly once,
//! bytes included; after the first error everything is flushed; and whatever was posted ends.

mod end;
mod seat;

use engine::Fabric;
use verbs_abi::{
    proto::Mode,
    verbs::{QpState, QpType},
};

use crate::{
    Input,
    copies::Copies,
    memory::{Guarded, LEN, REGION},
    world::{Accesses, Client, settle},
};
use end::{End, counter};
use seat::Seat;

/// Clients. QP 0 of each is connected with QP 1 of the next.
const CLIENTS: usize = 3;
/// Steps of one input; what lies behind them is not read.
const STEPS: usize = 300;
const SECOND: u64 = 1_000_000_000;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut ring = Ring::new(&mut input);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        ring.step(&mut input);
    }
    ring.finish();
}

struct Ring {
    fabric: Fabric<Guarded>,
    now: u64,
    clients: Vec<Client>,
    ends: Vec<[End; 2]>,
    modes: Vec<Mode>,
    next_id: u32,
    lives: u32,
    accesses: Accesses,
    copies: Copies,
}

/// Which end: client and QP.
type At = (usize, usize);

fn peer_of((client, qp): At) -> At {
    if qp == 0 { ((client + 1) % CLIENTS, 1) } else { ((client + CLIENTS - 1) % CLIENTS, 0) }
}

impl Ring {
    fn new(input: &mut Input<'_>) -> Self {
        let bits = input.u8();
        let modes = (0..CLIENTS).map(|i| if bits >> i & 1 == 0 { Mode::Direct } else { Mode::Isolated });
        let mut ring = Self {
            fabric: Fabric::new(),
            now: 1,
            clients: Vec::new(),
            ends: Vec::new(),
            modes: modes.collect(),
            next_id: 1,
            lives: 0,
            accesses: Accesses::default(),
            copies: Copies::default(),
        };
        ring.fabric.share_copies(bits >> 7 == 0);
        for i in 0..CLIENTS {
            let client = ring.open(i);
            ring.clients.push(client);
            let ends = [0, 1].map(|qp| ring.end(qp));
            ring.ends.push(ends);
        }
        for client in 0..CLIENTS {
            ring.connect((client, 0));
            ring.connect(peer_of((client, 0)));
        }
        ring
    }

    fn open(&mut self, i: usize) -> Client {
        self.next_id += 1;
        Client::open(&mut self.fabric, self.next_id, self.modes[i], &[QpType::Rc; 2])
    }

    fn end(&mut self, qp: usize) -> End {
        self.lives += 1;
        End::new(qp, self.lives)
    }

    /// Brings an end from RESET to RTS, with a seat of its own where the router offers one.
    fn connect(&mut self, at: At) {
        let (peer, qp) = peer_of(at);
        let to = (self.clients[peer].id, self.clients[peer].qps[qp].new.qpn);
        let offer = self.clients[at.0].connect(&mut self.fabric, at.1, to);
        let (own, peer) = (&self.clients[at.0], &self.clients[peer]);
        let end = &mut self.ends[at.0][at.1];
        end.queue.seat = offer.map(|offer| Seat::new(own, &own.qps[at.1], peer, &offer));
        end.counter_at_first = counter(peer, at.1);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let (kind, at) = (input.u8(), input.u8());
        let at = (usize::from(at) % CLIENTS, usize::from(at >> 4 & 1));
        let (client, peer) = (&self.clients[at.0], &self.clients[peer_of(at).0]);
        let end = &mut self.ends[at.0][at.1];
        match kind & 31 {
            0..=7 => end.post(client, peer, input),
            8..=12 => {
                if end.post_receive(client, input) {
                    client.doorbells.ring(client.qps[at.1].new.slot);
                }
            }
            13..=17 => self.end_list(at),
            18..=22 => self.advance(input),
            23..=25 => self.poll(at),
            26 => self.drain(at),
            27 => self.fail(at),
            28 => self.reset(at),
            29 => self.mend(at),
            30 => self.die(at.0, input),
            _ => {
                self.perform();
                self.now += SECOND;
            }
        }
    }

    fn advance(&mut self, input: &mut Input<'_>) {
        self.now += u64::from(input.u8()) * 50_000;
        self.fabric.collect();
        self.perform();
        for _ in 0..input.below(4) {
            self.fabric.run(self.now);
            self.copies.take(&mut self.fabric);
            if input.u8() & 1 == 0 {
                self.copies.end(input.u8().into(), &mut self.fabric);
            }
        }
        // These take until the next time, whatever happens in between.
        self.accesses.take(&mut self.fabric);
    }

    /// Lets the accesses to foreign memory come to their end.
    fn perform(&mut self) {
        for _ in 0..100 {
            if !self.accesses.perform(&mut self.fabric) {
                return;
            }
            self.fabric.run(self.now);
            self.copies.take(&mut self.fabric);
        }
    }

    /// Ends the list that is being posted, if one is.
    fn end_list(&mut self, at: At) {
        let (client, end) = (&self.clients[at.0], &mut self.ends[at.0][at.1]);
        if end.queue.is_posting() && end.queue.end(&client.qps[at.1]) {
            client.doorbells.ring(client.qps[at.1].new.slot);
        }
    }

    fn poll(&mut self, at: At) {
        let [client, peer] = self.clients.get_disjoint_mut([at.0, peer_of(at).0]).unwrap();
        self.ends[at.0][at.1].poll(client, peer);
    }

    /// Stops the send queue, or lets it go on.
    fn drain(&mut self, at: At) {
        self.end_list(at);
        let to = match self.clients[at.0].state(&mut self.fabric, at.1) {
            QpState::Rts => QpState::Sqd,
            QpState::Sqd => QpState::Rts,
            _ => return,
        };
        assert!(self.clients[at.0].modify(&mut self.fabric, at.1, to, (0, 0)).is_some());
    }

    fn fail(&mut self, at: At) {
        self.perform();
        self.end_list(at);
        let client = &self.clients[at.0];
        if self.fabric.seize(client.id, client.qps[at.1].new.qpn)
            && client.modify(&mut self.fabric, at.1, QpState::Err, (0, 0)).is_some()
        {
            self.ends[at.0][at.1].queue.seat = None;
        }
    }

    /// Ends a life of a QP. False: a peer is in the middle of something.
    fn end_life(&mut self, at: At) -> bool {
        self.perform();
        self.end_list(at);
        let qpn = self.clients[at.0].qps[at.1].new.qpn;
        if !self.fabric.seize(self.clients[at.0].id, qpn) {
            return false;
        }
        assert!(self.clients[at.0].modify(&mut self.fabric, at.1, QpState::Reset, (0, 0)).is_some());
        self.clients[at.0].qps[at.1].restart();
        self.ends[at.0][at.1] = self.end(at.1);
        true
    }

    fn reset(&mut self, at: At) {
        if self.end_life(at) {
            self.connect(at);
        }
    }

    /// Connects both ends anew.
    fn mend(&mut self, at: At) {
        if !self.end_life(at) {
            return;
        }
        let peer = self.end_life(peer_of(at));
        self.connect(at);
        if peer {
            self.connect(peer_of(at));
        }
    }

    /// Kills a client, in the middle of what it did, and opens another in its place, which nobody knows yet.
    fn die(&mut self, i: usize, input: &mut Input<'_>) {
        self.perform();
        let how = input.u8();
        for qp in 0..2 {
            if how >> qp & 1 == 1 {
                self.ends[i][qp].die(&self.clients[i], how >> (2 + qp) & 1 == 1, input);
            }
        }
        self.fabric.close(self.clients[i].id);
        self.clients[i] = self.open(i);
        self.ends[i] = [0, 1].map(|qp| self.end(qp));
        for at in [(i, 0), (i, 1)] {
            self.connect(at);
            // What the survivor adds to from now on is another's word.
            let (peer, qp) = peer_of(at);
            self.ends[peer][qp].peer_lost = true;
        }
    }

    fn finish(mut self) {
        self.perform();
        self.copies.end_all(&mut self.fabric);
        let all: Vec<At> = (0..CLIENTS).flat_map(|client| [(client, 0), (client, 1)]).collect();
        for _ in 0..20 {
            all.iter().for_each(|at| self.end_list(*at));
            assert!(settle(&mut self.fabric, self.now), "the fabric never comes to rest");
            all.iter().for_each(|at| self.poll(*at));
            self.now += SECOND;
        }
        for at in all {
            let state = self.clients[at.0].state(&mut self.fabric, at.1);
            let (end, peer) = (&self.ends[at.0][at.1], peer_of(at));
            if state != QpState::Rts && state != QpState::Err {
                continue;
            }
            assert!(end.is_done(), "QP {at:?} in {state:?} never comes to an end: {end:?}");
            assert!(
                state == QpState::Rts || end.has_no_receive(),
                "QP {at:?} keeps receives in ERR: {end:?}"
            );
            end.check_counter(&self.clients[peer.0]);
            let expected = self.ends[peer.0][peer.1].expected.filter(|(life, _)| *life == end.life);
            if let Some((_, next)) = expected {
                assert_eq!(next, end.delivered(), "messages of QP {at:?}");
            }
        }
        for client in &self.clients {
            let unregistered = |at: &u64| (at / REGION).is_multiple_of(2);
            let touched = (0..LEN).step_by(8).filter(unregistered).find(|at| !client.is_untouched(*at));
            assert_eq!(touched, None, "memory that was never registered was touched");
        }
    }
}
