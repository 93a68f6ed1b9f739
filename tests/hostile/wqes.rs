//! Work requests that no provider would write.

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use verbs_abi::{
    proto::Mode,
    shm::wqe::{Address, MAX_SGE, SendWqe, Sge, flag},
    verbs::{Opcode, QpType, WcStatus},
};

use crate::{
    client::{BASE, LEN, transition},
    field::{Case, Field},
    rig::{PART, Rig},
};

/// A row of a table: what is posted, and how it must end.
type Row = (&'static str, fn(&Rig) -> SendWqe, WcStatus);
/// The same for a request whose blocks are bent afterwards: the QP cannot go on.
type Bent = (&'static str, fn(&mut Vec<[u64; 8]>));

pub(crate) fn cases() -> Vec<Case> {
    let reliable = [operations(), local(), remote(), lengths()].into_iter().flatten();
    let mut cases: Vec<Case> = reliable.map(|row| row_case(QpType::Rc, row)).collect();
    cases.extend(unconnected().into_iter().map(|row| row_case(QpType::Ud, row)));
    cases.extend(unreliable().into_iter().map(|row| row_case(QpType::Uc, row)));
    cases.extend(shapes().into_iter().map(shape_case));
    cases.extend(receives());
    cases.extend(elsewhere());
    cases
}

fn row_case(qp_type: QpType, (name, make, status): Row) -> Case {
    Case::new(format!("request: {name} ({})", qp_type.name()), move |field| {
        let mut rig = Rig::new(field, Mode::Isolated, qp_type)?;
        let wqe = make(&rig);
        rig.hostile.post(&rig.qp, &wqe);
        rig.ends_with(status)?;
        rig.peer_is_whole_outside(LEN)?;
        let whole = (0..LEN).step_by(8).all(|at| rig.peer.memory.u64(at).load(Ordering::Relaxed) == 0);
        ensure!(whole, "the peer's memory changed");
        Ok(())
    })
}

fn with(mut wqe: SendWqe, change: impl FnOnce(&mut SendWqe)) -> SendWqe {
    change(&mut wqe);
    wqe
}

fn local_sge(rig: &Rig, opcode: Opcode, sge: Sge) -> SendWqe {
    with(rig.good(opcode), |wqe| {
        wqe.reset();
        wqe.flags = flag::SIGNALED;
        assert!(wqe.push_sge(sge), "no room for an SGE");
    })
}

fn operations() -> Vec<Row> {
    use WcStatus::{LocLenErr, LocQpOpErr, RemInvReqErr};
    vec![
        (
            "an operation that is none",
            |rig| with(rig.good(Opcode::Write), |wqe| wqe.opcode = 255),
            LocQpOpErr,
        ),
        (
            "an operation beyond the last",
            |rig| with(rig.good(Opcode::Write), |wqe| wqe.opcode = 100),
            LocQpOpErr,
        ),
        (
            "a datagram's address",
            |rig| with(rig.good(Opcode::Send), |wqe| wqe.flags |= flag::ADDRESS),
            LocQpOpErr,
        ),
        (
            "an atomic on four bytes",
            |rig| local_sge(rig, Opcode::FetchAndAdd, Sge { length: 4, ..rig.own() }),
            LocLenErr,
        ),
        (
            "an atomic on sixteen bytes",
            |rig| local_sge(rig, Opcode::CmpAndSwp, Sge { length: 16, ..rig.own() }),
            LocLenErr,
        ),
        (
            "an atomic between two words",
            |rig| with(rig.good(Opcode::FetchAndAdd), |wqe| wqe.remote_addr += 4),
            RemInvReqErr,
        ),
        (
            "a read into the request itself",
            |rig| {
                with(rig.good(Opcode::Read), |wqe| {
                    wqe.reset();
                    wqe.inline_mut(8).expect("eight bytes fit").fill(1);
                    wqe.flags |= flag::SIGNALED;
                })
            },
            LocQpOpErr,
        ),
    ]
}

/// Keys and addresses of the requester's own side.
fn local() -> Vec<Row> {
    use WcStatus::LocProtErr;
    macro_rules! sge {
        ($opcode:ident, $rig:ident => $($field:ident: $value:expr),+) => {
            |$rig: &Rig| local_sge($rig, Opcode::$opcode, Sge { $($field: $value,)+ ..$rig.own() })
        };
    }
    vec![
        ("lkey 0", sge!(Write, rig => lkey: 0), LocProtErr),
        ("lkey of ones", sge!(Write, rig => lkey: u32::MAX), LocProtErr),
        ("an lkey with one bit wrong", sge!(Write, rig => lkey: rig.keys.full ^ 1), LocProtErr),
        ("an lkey at another index", sge!(Write, rig => lkey: rig.keys.full ^ 1 << 15), LocProtErr),
        ("the lkey of a victim", sge!(Write, rig => lkey: rig.victim_key), LocProtErr),
        ("the lkey of the peer", sge!(Write, rig => lkey: rig.peer_keys.full), LocProtErr),
        (
            "an lkey that is no more",
            sge!(Write, rig => lkey: rig.keys.dead, addr: BASE + 4 * PART),
            LocProtErr,
        ),
        (
            "an lkey of another PD",
            sge!(Write, rig => lkey: rig.keys.other_pd, addr: BASE + 3 * PART),
            LocProtErr,
        ),
        ("the byte before a region", sge!(Write, rig => addr: BASE - 1), LocProtErr),
        ("the byte behind a region", sge!(Write, rig => addr: BASE + PART - 7), LocProtErr),
        ("an address behind a region", sge!(Write, rig => addr: BASE + PART), LocProtErr),
        ("address 0", sge!(Write, rig => addr: 0), LocProtErr),
        ("an address that wraps", sge!(Write, rig => addr: u64::MAX - 3), LocProtErr),
        ("a length that reaches beyond", sge!(Write, rig => length: PART as u32 + 1), LocProtErr),
        (
            "a read into memory that may only be read",
            sge!(Read, rig => lkey: rig.keys.read_only, addr: BASE + PART),
            LocProtErr,
        ),
        (
            "an atomic into memory that may only be read",
            sge!(FetchAndAdd, rig => lkey: rig.keys.read_only, addr: BASE + PART),
            LocProtErr,
        ),
    ]
}

/// Keys and addresses of the other side.
fn remote() -> Vec<Row> {
    use WcStatus::RemAccessErr;
    macro_rules! remote {
        ($opcode:ident, $rig:ident, $wqe:ident => $change:expr) => {
            |$rig: &Rig| with($rig.good(Opcode::$opcode), |$wqe| $change)
        };
    }
    vec![
        ("rkey 0", remote!(Write, rig, wqe => wqe.rkey = 0), RemAccessErr),
        ("rkey of ones", remote!(Write, rig, wqe => wqe.rkey = u32::MAX), RemAccessErr),
        ("an rkey with one bit wrong", remote!(Write, rig, wqe => wqe.rkey ^= 1), RemAccessErr),
        ("a victim's rkey, to write", remote!(Write, rig, wqe => wqe.rkey = rig.victim_key), RemAccessErr),
        ("a victim's rkey, to read", remote!(Read, rig, wqe => wqe.rkey = rig.victim_key), RemAccessErr),
        (
            "a victim's rkey, to add",
            remote!(FetchAndAdd, rig, wqe => wqe.rkey = rig.victim_key),
            RemAccessErr,
        ),
        ("one's own rkey", remote!(Write, rig, wqe => wqe.rkey = rig.keys.full), RemAccessErr),
        (
            "an rkey that is no more",
            remote!(Write, rig, wqe => (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.dead, BASE + 4 * PART)),
            RemAccessErr,
        ),
        (
            "an rkey of another PD",
            remote!(Write, rig, wqe => (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.other_pd, BASE + 3 * PART)),
            RemAccessErr,
        ),
        ("the byte before the peer's region", remote!(Write, rig, wqe => wqe.remote_addr -= 1), RemAccessErr),
        (
            "the byte behind the peer's region",
            remote!(Read, rig, wqe => wqe.remote_addr += PART - 7),
            RemAccessErr,
        ),
        (
            "a remote address that wraps",
            remote!(Write, rig, wqe => wqe.remote_addr = u64::MAX - 3),
            RemAccessErr,
        ),
        ("remote address 0", remote!(Read, rig, wqe => wqe.remote_addr = 0), RemAccessErr),
        (
            "an atomic at the last address",
            remote!(CmpAndSwp, rig, wqe => wqe.remote_addr = u64::MAX - 7),
            RemAccessErr,
        ),
        (
            "a write to memory that is the peer's own",
            remote!(Write, rig, wqe => (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.private, BASE + 2 * PART)),
            RemAccessErr,
        ),
        (
            "a read of memory that is the peer's own",
            remote!(Read, rig, wqe => (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.private, BASE + 2 * PART)),
            RemAccessErr,
        ),
        (
            "an atomic on memory that is the peer's own",
            remote!(CmpAndSwp, rig, wqe => (wqe.rkey, wqe.remote_addr) = (rig.peer_keys.private, BASE + 2 * PART)),
            RemAccessErr,
        ),
    ]
}

fn lengths() -> Vec<Row> {
    use WcStatus::LocLenErr;
    vec![
        (
            "four gigabytes in one piece",
            |rig| local_sge(rig, Opcode::Write, Sge { length: u32::MAX, ..rig.own() }),
            LocLenErr,
        ),
        (
            "one byte more than a message may have",
            |rig| local_sge(rig, Opcode::Write, Sge { length: (1 << 30) + 1, ..rig.own() }),
            LocLenErr,
        ),
        (
            "lengths whose sum is beyond 32 bits",
            |rig| {
                with(rig.good(Opcode::Send), |wqe| {
                    wqe.reset();
                    wqe.flags = flag::SIGNALED;
                    // More than fit into the queue's entries as asked for, but not into the queue.
                    (0..MAX_SGE).for_each(|_| {
                        assert!(wqe.push_sge(Sge { length: 0x8000_0001, ..rig.own() }), "no room for an SGE");
                    });
                })
            },
            LocLenErr,
        ),
    ]
}

fn datagram(rig: &Rig, change: impl FnOnce(&mut SendWqe)) -> SendWqe {
    with(rig.good(Opcode::Send), |wqe| {
        wqe.flags |= flag::ADDRESS;
        wqe.address = Address { dgid: rig.gid, qpn: rig.peer_qp.new.qpn, qkey: 0x11, ..Address::default() };
        change(wqe);
    })
}

/// Datagrams. What is well formed goes well, and comes to nobody.
fn unconnected() -> Vec<Row> {
    use WcStatus::{LocLenErr, LocProtErr, LocQpOpErr, Success};
    vec![
        ("a datagram without an address", |rig| rig.good(Opcode::Send), LocQpOpErr),
        ("a write", |rig| datagram(rig, |wqe| wqe.opcode = Opcode::Write.value() as u8), LocQpOpErr),
        ("a read", |rig| datagram(rig, |wqe| wqe.opcode = Opcode::Read.value() as u8), LocQpOpErr),
        (
            "a datagram longer than the MTU",
            |rig| datagram(rig, |wqe| assert!(wqe.push_sge(Sge { length: 4089, ..rig.own() }), "no room")),
            LocLenErr,
        ),
        (
            "a datagram from a victim's memory",
            |rig| {
                datagram(rig, |wqe| {
                    assert!(wqe.push_sge(Sge { lkey: rig.victim_key, ..rig.own() }), "no room for an SGE");
                })
            },
            LocProtErr,
        ),
        (
            "a datagram to a connected QP of a victim",
            |rig| datagram(rig, |wqe| wqe.address.qpn = rig.victim_qp.new.qpn),
            Success,
        ),
        (
            "a datagram to a QP that there is not",
            |rig| datagram(rig, |wqe| wqe.address.qpn = u32::MAX),
            Success,
        ),
        (
            "a datagram to an address that there is not",
            |rig| datagram(rig, |wqe| wqe.address.dgid = [0xee; 16]),
            Success,
        ),
        ("a datagram with another Q_Key", |rig| datagram(rig, |wqe| wqe.address.qkey = 0x12), Success),
        (
            "a datagram from an address that there is not",
            |rig| datagram(rig, |wqe| wqe.address.sgid_index = 255),
            Success,
        ),
    ]
}

fn unreliable() -> Vec<Row> {
    use WcStatus::{LocProtErr, LocQpOpErr, Success};
    vec![
        ("a read", |rig| rig.good(Opcode::Read), LocQpOpErr),
        ("an atomic", |rig| rig.good(Opcode::FetchAndAdd), LocQpOpErr),
        (
            "a victim's lkey",
            |rig| local_sge(rig, Opcode::Write, Sge { lkey: rig.victim_key, ..rig.own() }),
            LocProtErr,
        ),
        // What the other side refuses is lost, as on a wire.
        ("a victim's rkey", |rig| with(rig.good(Opcode::Write), |wqe| wqe.rkey = rig.victim_key), Success),
    ]
}

/// Blocks that are no work request.
fn shapes() -> Vec<Bent> {
    fn shape(blocks: &mut [[u64; 8]], at: u32, value: u8) {
        let word = &mut blocks[0][1];
        *word = *word & !(0xff << at) | u64::from(value) << at;
    }
    fn inline(blocks: &mut [[u64; 8]], len: u32) {
        shape(blocks, 8, flag::INLINE | flag::SIGNALED);
        shape(blocks, 24, 0);
        blocks[0][3] |= u64::from(len) << 32;
    }
    vec![
        ("of no blocks", |blocks| shape(blocks, 16, 0)),
        ("of more blocks than posted", |blocks| shape(blocks, 16, 2)),
        ("of 255 blocks", |blocks| shape(blocks, 16, 255)),
        ("with more SGEs than blocks for them", |blocks| shape(blocks, 24, 2)),
        ("with 33 SGEs", |blocks| shape(blocks, 24, 33)),
        ("with 255 SGEs", |blocks| shape(blocks, 24, 255)),
        ("inline and with SGEs", |blocks| shape(blocks, 8, flag::INLINE)),
        ("inline, of more bytes than blocks for them", |blocks| inline(blocks, 64)),
        ("inline, of 513 bytes", |blocks| inline(blocks, 513)),
        ("inline, of four gigabytes", |blocks| inline(blocks, u32::MAX)),
        ("with an address block that is not there", |blocks| shape(blocks, 8, flag::ADDRESS)),
        ("of ones alone", |blocks| blocks[0] = [u64::MAX; 8]),
        ("of zeros alone", |blocks| blocks[0] = [0; 8]),
    ]
}

fn shape_case((name, bend): Bent) -> Case {
    Case::new(format!("block: {name}"), move |field| {
        let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
        let mut blocks = Vec::new();
        rig.good(Opcode::Write).encode(|_, block| blocks.push(*block));
        bend(&mut blocks);
        rig.hostile.post_blocks(&rig.qp, &blocks);
        rig.is_fatal()
    })
}

/// Receives that no provider would write: their own QP suffers, and whoever sends to it learns of it.
fn receives() -> Vec<Case> {
    type Post = fn(&Rig);
    let rows: Vec<(&str, Post, WcStatus)> = vec![
        (
            "with a key that is none",
            |rig| {
                rig.peer.post_recv(&rig.peer_qp, 1, &[Sge { addr: BASE, length: 8, lkey: 1 }]);
            },
            WcStatus::RemOpErr,
        ),
        (
            "into a victim's memory",
            |rig| {
                rig.peer.post_recv(&rig.peer_qp, 1, &[Sge { addr: BASE, length: 8, lkey: rig.victim_key }]);
            },
            WcStatus::RemOpErr,
        ),
        (
            "into memory that may only be read",
            |rig| {
                let sge = Sge { addr: BASE + PART, length: 8, lkey: rig.peer_keys.read_only };
                rig.peer.post_recv(&rig.peer_qp, 1, &[sge]);
            },
            WcStatus::RemOpErr,
        ),
        (
            "shorter than the message",
            |rig| {
                let sge = Sge { addr: BASE, length: 7, lkey: rig.peer_keys.full };
                rig.peer.post_recv(&rig.peer_qp, 1, &[sge]);
            },
            WcStatus::RemInvReqErr,
        ),
        ("of 255 SGEs", |rig| raw_receive(rig, [1, 255, 0, 0, 0, 0, 0, 0]), WcStatus::RemOpErr),
        (
            "of more SGEs than its entry holds",
            |rig| raw_receive(rig, [1, 12, 0, 0, 0, 0, 0, 0]),
            WcStatus::RemOpErr,
        ),
        ("of ones alone", |rig| raw_receive(rig, [u64::MAX; 8]), WcStatus::RemOpErr),
        (
            "further ahead than the queue holds",
            |rig| {
                rig.peer_qp.area.header.rq_tail().store(1000, Ordering::SeqCst);
            },
            WcStatus::RemOpErr,
        ),
        (
            "behind those that were taken",
            |rig| {
                rig.peer_qp.area.header.rq_tail().store(u64::MAX, Ordering::SeqCst);
            },
            WcStatus::RemOpErr,
        ),
        ("none at all", |_| {}, WcStatus::RnrRetryExcErr),
    ];
    let case = |(name, post, status): (&'static str, Post, WcStatus)| {
        Case::new(format!("receive: {name}"), move |field| {
            let mut rig = Rig::new(field, Mode::Isolated, QpType::Rc)?;
            post(&rig);
            rig.hostile.post(&rig.qp, &rig.good(Opcode::Send));
            rig.ends_with(status)?;
            rig.peer_is_whole_outside(0)
        })
    };
    rows.into_iter().map(case).collect()
}

fn raw_receive(rig: &Rig, block: [u64; 8]) {
    let area = &rig.peer_qp.area;
    area.write_rq_block(0, 0, &block);
    area.header.rq_tail().store(1, Ordering::SeqCst);
    rig.peer.ring(rig.peer_qp.new.slot);
}

/// QPs that are connected with whom they should not.
fn elsewhere() -> Vec<Case> {
    fn connect(field: &Field, qp_type: QpType, to: fn(&Rig) -> (u32, [u8; 16])) -> Result<Rig> {
        let mut rig = Rig::new(field, Mode::Isolated, qp_type)?;
        let qp = rig.hostile.qp(rig.hostile.pd()?, rig.hostile.cq(None)?.0, qp_type)?;
        for state in
            [verbs_abi::verbs::QpState::Init, verbs_abi::verbs::QpState::Rtr, verbs_abi::verbs::QpState::Rts]
        {
            let reply = rig.hostile.ask(&transition(&qp, state, to(&rig), 0xf))?;
            ensure!(reply.is_ok(), "{state:?}: {reply:?}");
        }
        rig.qp = qp;
        Ok(rig)
    }
    /// An empty write, for which no key is needed: only who is connected counts.
    fn empty(rig: &Rig) -> SendWqe {
        with(rig.good(Opcode::Write), |wqe| {
            wqe.reset();
            (wqe.flags, wqe.rkey) = (flag::SIGNALED, rig.victim_key);
        })
    }
    type To = fn(&Rig) -> (u32, [u8; 16]);
    let rows: Vec<(&str, QpType, To, WcStatus)> = vec![
        (
            "with a victim that is not with it",
            QpType::Rc,
            |rig| (rig.victim_qp.new.qpn, rig.gid),
            WcStatus::RetryExcErr,
        ),
        ("with a QP that there is not", QpType::Rc, |rig| (0xff_fff0, rig.gid), WcStatus::RetryExcErr),
        (
            "with a peer of another type",
            QpType::Uc,
            |rig| (rig.victim_qp.new.qpn, rig.gid),
            WcStatus::Success,
        ),
        (
            "with a victim at another address",
            QpType::Rc,
            |rig| (rig.victim_qp.new.qpn, [3; 16]),
            WcStatus::RetryExcErr,
        ),
    ];
    let case = |(name, qp_type, to, status): (&'static str, QpType, To, WcStatus)| {
        Case::new(format!("connected: {name}"), move |field| {
            let mut rig = connect(field, qp_type, to)?;
            rig.hostile.post(&rig.qp, &empty(&rig));
            rig.ends_with(status)
        })
    };
    rows.into_iter().map(case).collect()
}
