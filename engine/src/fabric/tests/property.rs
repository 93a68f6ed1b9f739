//! Random sequences of verbs over two QPs, in both seats, against a simple model of two memories and two queues.
//!
//! After each operation everything that the applications can see must be what the model says: completions with
//! their order, events, states, and every byte of both memories.

mod model;

use std::ops::Range;

use proptest::{collection::vec, prelude::*, test_runner::Config};

use super::*;
use model::{Attributes, Done, End, Key, LOCAL_WRITE, Model, Piece, Send};

const MEMORY: usize = 1 << 20;
/// What a queue holds.
const DEPTH: usize = 16;
const KEYS: usize = 5;

#[derive(Clone, Debug)]
enum Op {
    Send(usize, Vec<SendArgs>),
    Receive(usize, Vec<Piece>),
    /// One state further on the way to RTS.
    Step(usize),
    /// Both to RESET and then to RTS.
    Connect,
    Enter(usize, QpState),
    Deregister(usize, usize),
    Register(usize, usize),
    /// Nanoseconds pass.
    Sleep(u64),
}

#[derive(Clone, Debug)]
struct SendArgs {
    opcode: Opcode,
    signaled: bool,
    inline: bool,
    good_qkey: bool,
    pieces: Vec<Piece>,
    remote: Piece,
    imm: u32,
    operands: [u64; 2],
}

/// A piece: mostly of the key that opens everything, mostly short, seldom out of bounds.
fn piece(len: impl Strategy<Value = usize>) -> impl Strategy<Value = Piece> {
    let key = prop_oneof![12 => Just(0_usize), 1 => 1..KEYS];
    let at = prop_oneof![
        8 => 0..8192_i64,
        4 => (0..MEMORY as i64 / 8).prop_map(|word| word * 8),
        2 => 990..1010_i64,
        1 => (MEMORY as i64 - 100)..MEMORY as i64,
        1 => -20..0_i64,
    ];
    (key, at, len).prop_map(|(key, at, len)| Piece { key, at, len })
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..64_usize, 4 => Just(8_usize), 2 => 64..5000_usize, 1 => Just(700_001_usize)]
}

fn send_args() -> impl Strategy<Value = SendArgs> {
    let opcode = prop_oneof![
        4 => Just(Opcode::Send),
        2 => Just(Opcode::SendWithImm),
        4 => Just(Opcode::Write),
        2 => Just(Opcode::WriteWithImm),
        2 => Just(Opcode::Read),
        1 => Just(Opcode::CmpAndSwp),
        1 => Just(Opcode::FetchAndAdd),
    ];
    let flags = (any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.9));
    let pieces =
        prop_oneof![6 => vec(piece(len()), 1), 3 => vec(piece(Just(8)), 1), 2 => vec(piece(len()), 0..4)];
    // Few values, so that comparisons succeed.
    (opcode, flags, pieces, piece(Just(8)), any::<u32>(), [0..3_u64, 0..3_u64]).prop_map(
        |(opcode, (signaled, inline, good_qkey), pieces, remote, imm, operands)| SendArgs {
            opcode,
            signaled,
            inline: inline && !opcode.writes_locally(),
            good_qkey,
            pieces,
            remote,
            imm,
            operands,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let long = || prop_oneof![3 => 64..8192_usize, 1 => 0..64_usize, 1 => Just(720_000_usize)];
    let end = 0..2_usize;
    prop_oneof![
        12 => (end.clone(), vec(send_args(), 1..4)).prop_map(|(end, sends)| Op::Send(end, sends)),
        8 => (end.clone(), vec(piece(long()), 0..3)).prop_map(|(end, pieces)| Op::Receive(end, pieces)),
        3 => Just(Op::Connect),
        4 => end.clone().prop_map(Op::Step),
        1 => (end.clone(), state()).prop_map(|(end, state)| Op::Enter(end, state)),
        1 => (end.clone(), 0..KEYS).prop_map(|(end, key)| Op::Deregister(end, key)),
        2 => (end, 0..KEYS).prop_map(|(end, key)| Op::Register(end, key)),
        4 => prop_oneof![0..50_000_u64, 0..20_000_000_u64].prop_map(Op::Sleep),
    ]
}

fn state() -> impl Strategy<Value = QpState> {
    prop_oneof![
        3 => Just(QpState::Err),
        3 => Just(QpState::Reset),
        4 => Just(QpState::Sqd),
        4 => Just(QpState::Rts),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let access = prop_oneof![4 => Just(0xe_u32), 1 => (0..8_u32).prop_map(|bits| bits << 1)];
    (0..13_u8, 0..8_u8, 0..8_u8, 1..20_u8, access, prop_oneof![8 => Just(4_u8), 1 => Just(0)]).prop_map(
        |(timeout, retry_cnt, rnr_retry, min_rnr_timer, access, rd_atomic)| Attributes {
            timeout,
            retry_cnt,
            rnr_retry,
            min_rnr_timer,
            access,
            rd_atomic,
        },
    )
}

/// What each key opens: everything; everything, for reading; a few odd bytes; another PD's; what never was.
fn keys() -> Vec<Key> {
    let all: Range<i64> = 0..MEMORY as i64;
    let key = |range: Range<i64>, rights, own_pd, valid| Key {
        start: range.start,
        len: range.end - range.start,
        rights,
        own_pd,
        valid,
    };
    vec![
        key(all.clone(), RIGHTS, true, true),
        key(all.clone(), AccessFlags::REMOTE_READ.bits(), true, true),
        key(1001..6001, RIGHTS, true, true),
        key(all.clone(), RIGHTS, false, true),
        key(all, LOCAL_WRITE, true, false),
    ]
}

/// The engine under test, with what the two applications hold.
struct Bench {
    fabric: Fabric<TestMemory>,
    apps: [App; 2],
    /// In direct mode, who executes by itself.
    owners: [Option<Owner>; 2],
    model: Model,
    now: u64,
    next_id: u64,
}

impl Bench {
    fn new(qp_type: QpType, mode: Mode, attributes: Attributes) -> Self {
        let mut fabric = Fabric::new();
        let mut apps = [1, 2].map(|client| App::new(&mut fabric, client, qp_type, mode));
        let ends = [0, 1].map(|at| {
            let bytes = apps[at].bytes();
            for (i, chunk) in bytes.chunks_mut(251).enumerate() {
                chunk.fill((i * 7 + at * 100) as u8);
            }
            End::new(bytes.to_vec(), keys())
        });
        let model = Model { qp_type, attributes, ends, gids: [gid(1), gid(2)] };
        let mut bench = Self { fabric, apps, owners: [None, None], model, now: 0, next_id: 1 };
        (0..2).for_each(|at| bench.publish_keys(at));
        bench
    }

    fn sge(&self, at: usize, piece: Piece) -> Sge {
        let addr = self.apps[at].addr().wrapping_add_signed(piece.at);
        Sge { addr, length: piece.len as u32, lkey: 100 + piece.key as u32 }
    }

    /// Gives the engine the keys that the model has.
    fn publish_keys(&mut self, at: usize) {
        let (app, end) = (&self.apps[at], &self.model.ends[at]);
        let table = &mut self.fabric.memory_mut(app.client).unwrap().table;
        let whole = MrEntry { iova: 0, ..table[0] };
        table.truncate(1);
        for (i, key) in end.keys.iter().enumerate().filter(|(_, key)| key.valid) {
            let start = app.addr().wrapping_add_signed(key.start);
            let limit = start + key.len as u64;
            table.push(MrEntry {
                key: 100 + i as u32,
                pd: if key.own_pd { PD } else { PD + 1 },
                access: key.rights,
                iova: start,
                addr: start,
                len: key.len as u64,
                shared_start: whole.shared_start.clamp(start, limit),
                shared_end: whole.shared_end.clamp(start, limit),
            });
        }
    }

    fn perform(&mut self, op: &Op) {
        match op {
            Op::Send(at, sends) => self.post_sends(*at, sends),
            Op::Receive(at, pieces) => self.post_receive(*at, pieces),
            Op::Step(at) => self.further(*at),
            Op::Connect => {
                (0..2).for_each(|at| self.enter(at, QpState::Reset));
                for _ in 0..3 {
                    (0..2).for_each(|at| self.further(at));
                }
            }
            Op::Enter(at, state) => self.enter(*at, *state),
            Op::Deregister(at, key) => {
                self.model.ends[*at].keys[*key].valid = false;
                self.publish_keys(*at);
            }
            Op::Register(at, key) => {
                self.model.ends[*at].keys[*key] = Key { valid: *key + 1 < KEYS, ..keys()[*key] };
                self.publish_keys(*at);
            }
            Op::Sleep(time) => self.now += time,
        }
        self.settle();
    }

    fn settle(&mut self) {
        turn(&mut self.fabric, self.now);
        self.model.settle(self.now);
    }

    fn post_sends(&mut self, at: usize, sends: &[SendArgs]) {
        let end = &self.model.ends[at];
        if !end.state.may_post_send() || end.sends.len() + sends.len() > DEPTH {
            return;
        }
        for args in sends {
            let send = self.model_send(at, args);
            let wqe = self.wqe(at, &send);
            self.apps[at].put(&wqe);
            self.model.ends[at].sends.push_back(send);
        }
        self.execute(at);
    }

    fn model_send(&mut self, at: usize, args: &SendArgs) -> Send {
        let end = &self.model.ends[at];
        // Inline payload is copied, whatever keys say; at most what fits.
        let inside = |piece: &Piece| piece.at >= 0 && piece.at as usize + piece.len <= MEMORY;
        let total: usize = args.pieces.iter().map(|piece| piece.len).sum();
        let inline = args.inline && total <= 64 && args.pieces.iter().all(inside);
        self.next_id += 1;
        Send {
            id: self.next_id,
            opcode: args.opcode,
            signaled: args.signaled,
            inline: inline.then(|| end.gather(&args.pieces)),
            pieces: args.pieces.clone(),
            remote: args.remote,
            imm: args.imm,
            operands: args.operands,
            good_qkey: args.good_qkey,
        }
    }

    fn wqe(&self, at: usize, send: &Send) -> SendWqe {
        let mut wqe = SendWqe::default();
        (wqe.wr_id, wqe.opcode, wqe.imm) = (send.id, send.opcode.value() as u8, send.imm);
        wqe.flags = if send.signaled { flag::SIGNALED } else { 0 };
        match &send.inline {
            Some(bytes) => wqe.inline_mut(bytes.len()).unwrap().copy_from_slice(bytes),
            None => assert!(send.pieces.iter().all(|piece| wqe.push_sge(self.sge(at, *piece)))),
        }
        let remote = self.sge(1 - at, send.remote);
        (wqe.remote_addr, wqe.rkey) = (remote.addr, remote.lkey);
        [wqe.compare_add, wqe.swap] = send.operands;
        if self.model.qp_type == QpType::Ud {
            let peer = &self.apps[1 - at];
            let qkey = if send.good_qkey { 0x11 } else { 0x12 };
            wqe.flags |= flag::ADDRESS;
            wqe.address = Address { dgid: gid(peer.client), qpn: peer.qpn, qkey, ..Address::default() };
        }
        wqe
    }

    /// Executes in the owner's seat, or rings the router.
    fn execute(&mut self, at: usize) {
        let memory = |fabric: &mut Fabric<TestMemory>, client| fabric.memory_mut(client).unwrap().clone();
        let [own, other] = [at, 1 - at].map(|at| memory(&mut self.fabric, self.apps[at].client));
        let done = self.owners[at].as_mut().is_some_and(|owner| {
            owner.own = own;
            owner.other = TestMemory { moved_only: true, ..other };
            owner.run(&self.apps[at])
        });
        if !done {
            self.apps[at].doorbells.ring(self.apps[at].slot);
        }
    }

    fn post_receive(&mut self, at: usize, pieces: &[Piece]) {
        let end = &mut self.model.ends[at];
        if !end.state.may_post_recv() || end.receives.len() >= DEPTH {
            return;
        }
        self.next_id += 1;
        end.receives.push_back((self.next_id, pieces.to_vec()));
        let sges: Vec<Sge> = pieces.iter().map(|piece| self.sge(at, *piece)).collect();
        self.apps[at].post_recv(self.next_id, &sges);
    }

    fn further(&mut self, at: usize) {
        let next = match self.model.ends[at].state {
            QpState::Reset => QpState::Init,
            QpState::Init => QpState::Rtr,
            QpState::Rtr | QpState::Sqd | QpState::Sqe => QpState::Rts,
            QpState::Err => QpState::Reset,
            QpState::Rts => return,
        };
        self.enter(at, next);
    }

    fn enter(&mut self, at: usize, state: QpState) {
        let from = self.model.ends[at].state;
        let Some(rule) = verbs_abi::qp_state::rule(self.model.qp_type, from, state) else { return };
        if from == state && state != QpState::Reset && state != QpState::Err {
            return;
        }
        let announce = rule.optional.contains(Mask::EN_SQD_ASYNC_NOTIFY);
        let attributes = self.model.attributes;
        let peer = (self.apps[1 - at].client, self.apps[1 - at].qpn);
        let app = (self.apps[at].client, self.apps[at].qpn);
        let modified = fabric_modify_tuned(&mut self.fabric, app, state, peer, self.model.qp_type, |attr| {
            (attr.timeout, attr.retry_cnt) = (attributes.timeout, attributes.retry_cnt);
            (attr.rnr_retry, attr.min_rnr_timer) = (attributes.rnr_retry, attributes.min_rnr_timer);
            (attr.max_rd_atomic, attr.max_dest_rd_atomic) = (attributes.rd_atomic, attributes.rd_atomic);
            attr.qp_access_flags = attributes.access;
            attr.en_sqd_async_notify = announce.into();
        });
        self.model.enter(at, state, announce);
        let app = &mut self.apps[at];
        if state == QpState::Reset {
            self.owners[at] = None;
            app.sends = CompletionReader::new(app.area.sq_cqes.clone(), 0);
            app.receives = CompletionReader::new(app.area.rq_cqes.clone(), 0);
        }
        if modified.direct.is_some() {
            self.owners[at] = Some(Owner::new(&self.fabric, &self.apps[at], &self.apps[1 - at]));
        }
        self.settle();
    }

    /// Compares all that can be seen with the model.
    fn check(&mut self) {
        for at in 0..2 {
            let (app, end) = (&mut self.apps[at], &mut self.model.ends[at]);
            let sent: Vec<Done> = std::iter::from_fn(|| app.sends.pop()).map(|cqe| sent(&cqe)).collect();
            assert_eq!(sent, std::mem::take(&mut end.sent), "send completions of {at}");
            let received: Vec<Done> =
                std::iter::from_fn(|| app.receives.pop()).map(|cqe| received(&cqe)).collect();
            assert_eq!(received, std::mem::take(&mut end.received), "receive completions of {at}");
            assert_eq!(events(app), std::mem::take(&mut end.events), "events of {at}");
            assert_eq!(app.state(&mut self.fabric), end.state, "state of {at}");
            let (bytes, expected) = (app.bytes(), &end.memory);
            if bytes != expected.as_slice() {
                let first = bytes.iter().zip(expected).position(|(byte, expected)| byte != expected);
                panic!("memory of {at} differs from byte {first:?} on");
            }
        }
    }
}

/// What a send completion says.
fn sent(cqe: &Cqe) -> Done {
    let status = status(Some(*cqe));
    let brings = [WcOpcode::RdmaRead, WcOpcode::CompSwap, WcOpcode::FetchAdd]
        .iter()
        .any(|opcode| opcode.value() as u8 == cqe.opcode);
    let len = (status == WcStatus::Success && brings).then_some(cqe.byte_len);
    Done { id: cqe.wr_id, status, len, imm: None }
}

/// What a receive completion says.
fn received(cqe: &Cqe) -> Done {
    let status = status(Some(*cqe));
    let success = status == WcStatus::Success;
    let with_imm = success && u32::from(cqe.flags) & WcFlags::WITH_IMM.bits() != 0;
    Done { id: cqe.wr_id, status, len: success.then_some(cqe.byte_len), imm: with_imm.then_some(cqe.imm) }
}

fn agrees(qp_type: QpType, mode: Mode, attributes: Attributes, ops: &[Op]) {
    let mut bench = Bench::new(qp_type, mode, attributes);
    bench.perform(&Op::Connect);
    bench.check();
    for op in ops {
        bench.perform(op);
        bench.check();
    }
}

fn config() -> Config {
    // `PROPTEST_CASES` asks for more.
    let usual = Config::default();
    Config { cases: usual.cases / 2, failure_persistence: None, ..usual }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_reliable_connection_does_what_the_model_does(attributes in attributes(), ops in vec(op(), 1..40)) {
        agrees(QpType::Rc, Mode::Isolated, attributes, &ops);
    }

    #[test]
    fn the_owners_seat_does_what_the_model_does(attributes in attributes(), ops in vec(op(), 1..40)) {
        agrees(QpType::Rc, Mode::Direct, attributes, &ops);
    }

    #[test]
    fn an_unreliable_connection_does_what_the_model_does(attributes in attributes(), ops in vec(op(), 1..40)) {
        agrees(QpType::Uc, Mode::Isolated, attributes, &ops);
    }

    #[test]
    fn the_owners_seat_of_an_unreliable_connection_does_what_the_model_does(
        attributes in attributes(), ops in vec(op(), 1..40)
    ) {
        agrees(QpType::Uc, Mode::Direct, attributes, &ops);
    }

    #[test]
    fn datagrams_do_what_the_model_does(attributes in attributes(), ops in vec(op(), 1..40)) {
        agrees(QpType::Ud, Mode::Isolated, attributes, &ops);
    }
}
