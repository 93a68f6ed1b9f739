//! Whatever is posted and whenever the link breaks: each request is executed once, in order, and completes.

use proptest::prelude::*;

use super::*;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Event {
    Write { from: u32, to: u32, len: u32 },
    Send { from: u32, len: u32 },
    Read { from: u32, to: u32, len: u32 },
    Add { at: u32, add: u64 },
    Cut,
    Fuse(usize),
    Wait,
    Settle,
}

/// The last part of each buffer is written to by the own side's requests alone.
const HALF: u32 = 512 * 1024;

fn event() -> impl Strategy<Value = Event> {
    let len = prop_oneof![0..100_u32, 30_000..70_000_u32, 0..200_000_u32];
    prop_oneof![
        4 => (0..HALF / 2, 64..HALF / 2, len.clone()).prop_map(|(from, to, len)| Event::Write { from, to, len }),
        3 => (0..HALF / 2, len.clone()).prop_map(|(from, len)| Event::Send { from, len }),
        3 => (64..HALF / 2, 0..HALF / 2, len).prop_map(|(from, to, len)| Event::Read { from, to, len }),
        4 => (0..8_u32, 1..1000_u64).prop_map(|(at, add)| Event::Add { at, add }),
        1 => Just(Event::Cut),
        2 => (0..300_000_usize).prop_map(Event::Fuse),
        1 => Just(Event::Wait),
        3 => Just(Event::Settle),
    ]
}

struct World {
    hosts: Hosts,
    a: App,
    b: App,
    /// What the peer's buffer must hold.
    expected: Vec<u8>,
    posted: u64,
    completed: u64,
    received: u64,
    sent: Vec<u32>,
    /// What each READ (by id) must bring, and where to.
    sums: HashMap<u64, u64>,
    added: [u64; 8],
}

impl World {
    fn new() -> Self {
        let (hosts, mut a, mut b) = pair_across(QpType::Rc, |attr| {
            (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (14, 7, 7);
            (attr.max_rd_atomic, attr.max_dest_rd_atomic) = (4, 4);
        });
        fill(&mut a);
        b.bytes().fill(0);
        let expected = b.bytes().to_vec();
        Self {
            hosts,
            a,
            b,
            expected,
            posted: 0,
            completed: 0,
            received: 0,
            sent: Vec::new(),
            sums: HashMap::new(),
            added: [0; 8],
        }
    }

    fn post(&mut self, wqe: SendWqe) {
        while self.posted - self.completed >= 16 {
            self.settle();
            self.poll();
        }
        let wqe = with_id(wqe, self.posted);
        self.a.post(&wqe);
        self.posted += 1;
    }

    /// Lets everything happen, with a new link where there is none.
    fn settle(&mut self) {
        for _ in 0..50 {
            if !self.hosts.up {
                self.hosts.connect();
            }
            self.hosts.settle();
            self.poll();
            if self.completed == self.posted && self.hosts.up {
                return;
            }
            self.hosts.wait();
        }
        panic!("{} of {} have completed", self.completed, self.posted);
    }

    fn poll(&mut self) {
        while let Some(done) = self.a.sends.pop() {
            assert_eq!((done.wr_id, done.status), (self.completed, 0), "in order, and well");
            if let Some(found) = self.sums.remove(&done.wr_id) {
                let at = HALF as usize / 8 + 60_000 + done.wr_id as usize % 16;
                assert_eq!(self.a.buffer[at], found, "what an atomic finds is what those before it left");
            }
            self.completed += 1;
        }
        while let Some(done) = self.b.receives.pop() {
            assert_eq!((done.wr_id, done.status), (self.received, 0));
            assert_eq!(done.byte_len, self.sent[self.received as usize]);
            self.received += 1;
        }
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Write { from, to, len } => {
                let mut wqe = send(Opcode::Write, self.a.sge(from.into(), len));
                (wqe.remote_addr, wqe.rkey) = (self.b.addr() + u64::from(to), self.b.key);
                let bytes = self.a.bytes()[from as usize..][..len as usize].to_vec();
                self.expected[to as usize..][..len as usize].copy_from_slice(&bytes);
                self.post(wqe);
            }
            Event::Send { from, len } => {
                let at = HALF + HALF / 2;
                self.b.post_recv(self.sent.len() as u64, &[self.b.sge(at.into(), 200_000)]);
                self.sent.push(len);
                let bytes = self.a.bytes()[from as usize..][..len as usize].to_vec();
                self.expected[at as usize..][..len as usize].copy_from_slice(&bytes);
                let wqe = send(Opcode::Send, self.a.sge(from.into(), len));
                self.post(wqe);
                // So many receives are never taken that they would be too many.
                self.settle();
            }
            Event::Read { from, to, len } => {
                let to = HALF + to / 4;
                let mut wqe = send(Opcode::Read, self.a.sge(to.into(), len));
                (wqe.remote_addr, wqe.rkey) = (self.b.addr() + u64::from(from), self.b.key);
                let expected = self.expected[from as usize..][..len as usize].to_vec();
                self.post(wqe);
                self.settle();
                assert_eq!(self.a.bytes()[to as usize..][..len as usize], expected);
            }
            Event::Add { at, add } => {
                let place = u64::from(HALF) + 8 * (60_000 + self.posted % 16);
                let mut wqe = send(Opcode::FetchAndAdd, self.a.sge(place, 8));
                (wqe.remote_addr, wqe.rkey) = (self.b.addr() + u64::from(at) * 8, self.b.key);
                wqe.compare_add = add;
                let sum = &mut self.added[at as usize];
                self.sums.insert(self.posted, *sum);
                *sum += add;
                let bytes = sum.to_ne_bytes();
                self.expected[at as usize * 8..][..8].copy_from_slice(&bytes);
                self.post(wqe);
            }
            Event::Cut => self.hosts.cut(),
            Event::Fuse(bytes) => self.hosts.fuse = Some(bytes),
            Event::Wait => {
                if self.hosts.up {
                    self.hosts.settle();
                }
                self.poll();
            }
            Event::Settle => self.settle(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_executed_once_in_order_whenever_the_link_breaks(
        events in prop::collection::vec(event(), 1..60),
        places in any::<bool>()
    ) {
        let mut world = World::new();
        world.hosts.places = places;
        for event in &events {
            world.happen(event);
        }
        world.settle();
        prop_assert_eq!(world.received as usize, world.sent.len());
        let same = world.b.bytes() == &world.expected[..];
        prop_assert!(same, "the peer's memory is not what the requests make of it");
    }
}
