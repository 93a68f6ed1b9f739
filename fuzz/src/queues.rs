//! Any words in the arenas of two clients while the router's seat works on them. Whatever they are, the engine
//! touches registered memory alone, comes to rest, and serves two bystanders as ever.

use std::sync::atomic::Ordering;

use engine::Fabric;
use verbs_abi::{
    proto::Mode,
    shm::wqe::{Address, MAX_INLINE, SendWqe, Sge, flag},
    verbs::{Opcode, QpState, QpType},
};

use crate::{
    Input,
    memory::{Guarded, LEN, REGION, REGIONS, Region, WINDOWS, addr, iova, key, window_key},
    world::{Accesses, Client, geometry, gid, settle},
};

const QP_TYPES: [QpType; 4] = [QpType::Rc, QpType::Rc, QpType::Uc, QpType::Ud];
const STATES: [QpState; 7] =
    [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts, QpState::Sqd, QpState::Sqe, QpState::Err];
/// Steps of one input; what lies behind them is not read.
const STEPS: usize = 200;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut host = Host::new(&mut input);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        host.step(&mut input);
    }
    host.finish();
}

struct Host {
    fabric: Fabric<Guarded>,
    now: u64,
    hostile: [Client; 2],
    bystanders: [Client; 2],
    pings: u64,
    accesses: Accesses,
}

impl Host {
    fn new(input: &mut Input<'_>) -> Self {
        let mut fabric = Fabric::new();
        let mode = if input.u8() & 1 == 0 { Mode::Isolated } else { Mode::Direct };
        let hostile = [1, 2].map(|id| Client::open(&mut fabric, id, mode, &QP_TYPES));
        let bystanders = [3, 4].map(|id| Client::open(&mut fabric, id, Mode::Isolated, &[QpType::Rc]));
        for (one, other) in [(0, 1), (1, 0)] {
            let peer = (bystanders[other].id, bystanders[other].qps[0].new.qpn);
            bystanders[one].connect(&mut fabric, 0, peer);
        }
        let mut host = Self { fabric, now: 1, hostile, bystanders, pings: 0, accesses: Accesses::default() };
        for who in 0..2 {
            for qp in 0..QP_TYPES.len() {
                let peer = host.peer(input);
                host.hostile[who].connect(&mut host.fabric, qp, peer);
            }
        }
        host
    }

    /// Some QP of the host, the bystanders' included.
    fn peer(&self, input: &mut Input<'_>) -> (u32, u32) {
        let byte = usize::from(input.u8());
        let who =
            if byte & 8 == 0 { &self.hostile[(byte / 4) & 1] } else { &self.bystanders[(byte / 4) & 1] };
        (who.id, who.qps[byte % who.qps.len()].new.qpn)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        let (who, qp) = (usize::from(kind >> 7), usize::from((kind >> 5) & 3));
        let client = &self.hostile[who];
        match kind & 31 {
            0..=2 => self.advance(input),
            3..=9 => {
                client.qps[qp].post(&send_wqe(input));
                client.doorbells.ring(client.qps[qp].new.slot);
            }
            10..=13 => post_receive(client, qp, input),
            14..=17 => header_word(client, qp, input),
            18..=20 => raw_block(client, qp, input),
            21 => raw_word(client, input),
            22 => client.doorbells.ring(input.u32() % 20_000),
            23..=25 => client.doorbells.ring(client.qps[qp].new.slot),
            26 => {
                let (to, peer) = (input.pick(&STATES), self.peer(input));
                if to == QpState::Reset {
                    self.accesses.perform(&mut self.fabric);
                }
                self.hostile[who].modify(&mut self.fabric, qp, to, peer);
            }
            27 => {
                let peer = self.peer(input);
                self.accesses.perform(&mut self.fabric);
                self.hostile[who].modify(&mut self.fabric, qp, QpState::Reset, peer);
                self.hostile[who].connect(&mut self.fabric, qp, peer);
            }
            28 => {
                let region = key(client.id, input.pick(&REGIONS));
                self.accesses.perform(&mut self.fabric);
                self.fabric.memory_mut(client.id).unwrap().remove(region);
            }
            29 => {
                self.fabric.is_quiet(client.id);
            }
            30 => {
                self.fabric.seize(client.id, client.qps[qp].new.qpn);
            }
            _ => self.ping(),
        }
    }

    /// Lets time pass and gives a few turns, which need not be enough.
    fn advance(&mut self, input: &mut Input<'_>) {
        self.now += u64::from(input.u8()) * 100_000;
        self.fabric.collect();
        if self.now & 3 != 0 {
            self.accesses.perform(&mut self.fabric);
        }
        for _ in 0..input.below(4) {
            self.fabric.run(self.now);
            self.accesses.take(&mut self.fabric);
        }
    }

    /// A send and a write between the bystanders.
    fn ping(&mut self) {
        let [a, b] = &mut self.bystanders;
        self.pings += 1;
        let value = self.pings.wrapping_mul(0x0123_4567_89ab_cdef);
        let at = (addr(Region::Mapped) - crate::memory::BASE) as usize;
        a.bytes.u64(at).store(value, Ordering::Relaxed);
        let sge = |id: u32, offset: u64| Sge {
            addr: addr(Region::Mapped) + offset,
            length: 8,
            lkey: key(id, Region::Mapped),
        };
        b.qps[0].post_recv(self.pings, &[sge(b.id, 16)]);
        let mut wqe = SendWqe::default();
        (wqe.wr_id, wqe.flags) = (self.pings, flag::SIGNALED);
        assert!(wqe.push_sge(sge(a.id, 0)));
        wqe.opcode = Opcode::Write.value() as u8;
        (wqe.remote_addr, wqe.rkey) = (addr(Region::Mapped) + 8, key(b.id, Region::Mapped));
        a.qps[0].post(&wqe);
        wqe.opcode = Opcode::Send.value() as u8;
        a.qps[0].post(&wqe);
        a.doorbells.ring(a.qps[0].new.slot);
        assert!(settle(&mut self.fabric, self.now), "the fabric never comes to rest");
        for _ in 0..2 {
            let done = a.qps[0].sends.pop().expect("a bystander's request is not done");
            assert_eq!((done.wr_id, done.status), (self.pings, 0));
        }
        let received = b.qps[0].receives.pop().expect("a bystander received nothing");
        assert_eq!((received.wr_id, received.status, received.byte_len), (self.pings, 0, 8));
        assert_eq!((a.qps[0].sends.pop(), b.qps[0].receives.pop()), (None, None));
        let got = [8, 16].map(|offset| b.bytes.u64(at + offset).load(Ordering::Relaxed));
        assert_eq!(got, [value; 2]);
    }

    fn finish(mut self) {
        self.accesses.perform(&mut self.fabric);
        assert!(settle(&mut self.fabric, self.now), "the fabric never comes to rest");
        self.ping();
        let used = addr(Region::Mapped) - crate::memory::BASE;
        for client in &self.bystanders {
            let changed = (0..LEN).step_by(8).find(|at| {
                let pinged = *at >= used && *at < used + 24;
                !pinged && !client.is_untouched(*at)
            });
            assert_eq!(changed, None, "a bystander's memory was touched");
            assert_eq!(client.state(&mut self.fabric, 0), QpState::Rts);
        }
        for client in &self.hostile {
            let unregistered = |at: &u64| (at / REGION).is_multiple_of(2);
            let touched = (0..LEN).step_by(8).filter(unregistered).find(|at| !client.is_untouched(*at));
            assert_eq!(touched, None, "memory that was never registered was touched");
        }
        for client in self.hostile {
            self.fabric.close(client.id);
        }
        assert!(settle(&mut self.fabric, self.now + 10_000_000_000), "the dead leave something to do");
        assert_eq!(self.fabric.snapshot().len(), 2);
    }
}

/// A client's address and key, mostly of the same region, sometimes of nobody.
fn place(input: &mut Input<'_>, remote: bool) -> (u64, u32) {
    let kind = input.u8();
    let region = REGIONS[usize::from(kind & 7) % REGIONS.len()];
    let client = 1 + u32::from((kind >> 3) & 3);
    let start = if remote { iova(region) } else { addr(region) };
    let start = if kind & 0x80 == 0 { start } else { start.wrapping_add(input.odd_number()) };
    let owner_key = key(client, region);
    match kind & 0x60 {
        0x60 => (start, input.u32()),
        0x40 if remote => (start, any_window(client, input)),
        _ => (start, owner_key),
    }
}

fn any_window(client: u32, input: &mut Input<'_>) -> u32 {
    let which = input.u8();
    window_key(client, usize::from(which) % WINDOWS) | u32::from(which >> 6)
}

fn sge(input: &mut Input<'_>) -> Sge {
    let (addr, lkey) = place(input, false);
    Sge { addr, length: input.odd_number() as u32, lkey }
}

fn send_wqe(input: &mut Input<'_>) -> SendWqe {
    let mut wqe = SendWqe::default();
    wqe.wr_id = input.u64();
    (wqe.opcode, wqe.flags) = (input.u8() % 16, input.u8() & !flag::INLINE);
    (wqe.remote_addr, wqe.rkey) = place(input, true);
    match Opcode::try_from(u32::from(wqe.opcode)) {
        Ok(Opcode::BindMw) => {
            let (client, rights) = (1 + u32::from(input.u8() & 1), u64::from(input.u8()));
            wqe.rkey = any_window(client, input);
            wqe.compare_add = input.odd_number();
            wqe.swap = u64::from(key(client, input.pick(&REGIONS))) | rights << 32;
        }
        Ok(Opcode::LocalInv | Opcode::SendWithInv) => {
            wqe.imm = any_window(1 + u32::from(input.u8() & 1), input);
        }
        Ok(_) if wqe.opcode < 5 => {}
        _ => (wqe.compare_add, wqe.swap) = (input.u64(), input.odd_number()),
    }
    if wqe.flags & flag::ADDRESS != 0 {
        let to = input.u8();
        wqe.address = Address {
            dgid: gid(u32::from(to & 7)),
            sgid_index: to,
            qpn: 0x100 + u32::from(to >> 3),
            qkey: if to & 1 == 0 { 0x11 } else { input.u32() },
            ..Address::default()
        };
    }
    match input.u8() {
        kind @ 0..=9 => (0..kind).for_each(|_| assert!(wqe.push_sge(sge(input)))),
        kind => {
            let len = usize::from(kind) * 3 % (MAX_INLINE + 1);
            wqe.inline_mut(len).unwrap().fill(kind);
        }
    }
    wqe
}

fn post_receive(client: &Client, qp: usize, input: &mut Input<'_>) {
    let sges: Vec<Sge> = (0..input.below(6)).map(|_| sge(input)).collect();
    if client.qps[qp].post_recv(input.u64(), &sges) {
        client.doorbells.ring(client.qps[qp].new.slot);
    }
}

/// One of the words that both sides write.
fn header_word(client: &Client, qp: usize, input: &mut Input<'_>) {
    let header = &client.qps[qp].area.header;
    let words = [
        header.sq_tail(),
        header.rq_tail(),
        header.sq_head(),
        header.sq_done(),
        header.sq_completions(),
        header.rights(),
        header.rq_done(),
        header.journal_wqe(),
        header.journal_placed(),
    ];
    let value = input.odd_number();
    match input.u8() {
        which if which & 0x40 != 0 => {
            words[usize::from(which & 63) % words.len()].fetch_add(value, Ordering::Relaxed);
        }
        which if which & 0x80 != 0 => {
            words[usize::from(which & 63) % words.len()].store(value, Ordering::Relaxed)
        }
        0 => header.seat().park(),
        1 => header.seat().leave(),
        2 => drop(header.seat().enter(false)),
        3 => header.seat().give(),
        4 => header.state().store(value as u32, Ordering::Relaxed),
        5 => header.peer().store(value as u32, Ordering::Relaxed),
        6 => header.rq_ring_me().store(value as u32, Ordering::Relaxed),
        _ => header.verdict().store(value as u32, Ordering::Relaxed),
    }
}

/// A block of either queue, as it comes, published.
fn raw_block(client: &Client, qp: usize, input: &mut Input<'_>) {
    let area = &client.qps[qp].area;
    let block: [u64; 8] = std::array::from_fn(|_| input.u64());
    if input.u8() & 1 == 0 {
        let tail = area.header.sq_tail().fetch_add(1, Ordering::Relaxed);
        area.write_sq_block(tail, &block);
    } else {
        let tail = area.header.rq_tail().fetch_add(1, Ordering::Relaxed);
        let part = usize::from(input.u8()) % geometry().rq_stride as usize;
        area.write_rq_block(tail, part, &block);
    }
    client.doorbells.ring(client.qps[qp].new.slot);
}

/// Any word of the arena.
fn raw_word(client: &Client, input: &mut Input<'_>) {
    let at = usize::from(input.u16()) * 8 % client.arena.len();
    client.arena.u64(at & !7).store(input.odd_number(), Ordering::Relaxed);
}
