//! Shared memory that changes while the router works on it, and requests faster than anybody needs.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::fs::{FallocateFlags, fallocate};
use verbs_abi::{
    proto::{Answer, Mode, QpAttr, Request},
    shm::{
        PAGE,
        arena::{DOORBELLS, EVENTS, HEAP, MR_TABLE},
        cq::CQ_LEN,
        wqe::{SendWqe, Sge},
    },
    verbs::{Opcode, QpState, QpType},
};

use crate::{
    client::{BASE, Client, LEN, RIGHTS, create_qp, reg_mr, transition},
    field::{Case, Field},
    noise::Noise,
    rig::{PART, Rig},
};

/// How long each race goes on.
const WHILE: Duration = Duration::from_millis(250);

/// Scribbles once: what, with numbers of whose making.
type Scribble = fn(&Rig, &mut Noise);

pub(crate) fn cases() -> Vec<Case> {
    let rows: Vec<(&str, Scribble)> = vec![
        ("send queue entries", |rig, noise| {
            let block = plausible(rig, noise);
            rig.qp.area.write_sq_block(noise.below(64), &block);
        }),
        ("keys and lengths of an entry that is posted", |rig, noise| {
            let key = if noise.below(2) == 0 { rig.keys.full } else { rig.victim_key };
            let sge = u64::from(key) << 32 | [8, 4096, u64::from(u32::MAX)][noise.below(3) as usize];
            let at = rig.qp.new.offset as usize + 512 + noise.below(64) as usize * 64;
            rig.hostile.arena.u64(at + 40).store(sge, Ordering::Relaxed);
            rig.hostile.arena.u64(at + 24).store(u64::from(key), Ordering::Relaxed);
        }),
        ("receive queue entries", |rig, noise| {
            let block = std::array::from_fn(|_| noise.next() >> noise.below(64));
            rig.qp.area.write_rq_block(noise.below(16), 0, &block);
        }),
        ("tails", |rig, noise| {
            rig.qp.area.header.sq_tail().fetch_add(noise.below(3), Ordering::SeqCst);
            rig.qp.area.header.rq_tail().fetch_add(noise.below(3), Ordering::SeqCst);
        }),
        ("all words of a header", |rig, noise| {
            let at = rig.qp.new.offset as usize + noise.below(64) as usize * 8;
            rig.hostile.arena.u64(at).store(noise.next() >> noise.below(64), Ordering::SeqCst);
        }),
        ("the seat", |rig, noise| {
            let at = rig.qp.new.offset as usize + 128;
            rig.hostile.arena.u32(at).store(noise.below(5) as u32, Ordering::SeqCst);
        }),
        ("doorbells", |rig, noise| {
            let at = DOORBELLS as usize + noise.below(264) as usize * 8;
            rig.hostile.arena.u64(at).store(noise.next(), Ordering::SeqCst);
        }),
        ("the CQ", |rig, noise| {
            let at = HEAP as usize + noise.below(CQ_LEN as u64 / 8) as usize * 8;
            rig.hostile.arena.u64(at).store(noise.next(), Ordering::SeqCst);
        }),
        ("completions", |rig, noise| {
            let at = noise.below(rig.qp.area.sq_cqes.len() as u64 / 8) as usize * 8;
            rig.qp.area.sq_cqes.u64(at).store(noise.next(), Ordering::SeqCst);
        }),
        ("the table of regions", |rig, noise| {
            let at = MR_TABLE as usize + noise.below(64) as usize * 8;
            rig.hostile.arena.u64(at).store(noise.next(), Ordering::SeqCst);
        }),
        ("events", |rig, noise| {
            let at = EVENTS as usize + noise.below(PAGE as u64 / 8) as usize * 8;
            rig.hostile.arena.u64(at).store(noise.next(), Ordering::SeqCst);
        }),
        ("the arena, which is emptied", |rig, _| {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(&rig.hostile.files[0], punch, 0, 1 << 25);
        }),
        ("the memory that is sent, which is taken away", |rig, _| {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(&rig.hostile.files[1], punch, BASE, LEN as u64);
        }),
    ];
    let mut cases = Vec::new();
    for (name, scribble) in rows {
        for mode in [Mode::Isolated, Mode::Direct] {
            cases.push(Case::new(format!("race: {name} ({mode:?})"), move |field| {
                race(field, mode, scribble)
            }));
        }
    }
    cases.extend(floods());
    cases
}

/// A block that is nearly a request.
fn plausible(rig: &Rig, noise: &mut Noise) -> [u64; 8] {
    let mut block = [0; 8];
    let opcode = noise.below(7);
    rig.good(Opcode::Write).encode(|_, good| block = *good);
    block[1] = block[1] & !0xff | opcode;
    let at = noise.below(8) as usize;
    match noise.below(4) {
        0 => block[at] = noise.next(),
        1 => block[at] ^= 1 << noise.below(64),
        2 => block[3] = u64::from(rig.victim_key),
        _ => {}
    }
    block
}

/// Two threads scribble while this one posts and mends. Nobody else may notice.
fn race(field: &Field, mode: Mode, scribble: Scribble) -> Result<()> {
    let rig = Rig::new(field, mode, QpType::Rc)?;
    let (stop, began) = (AtomicBool::new(false), Instant::now());
    let outcome = thread::scope(|scope| {
        for seed in 1..3 {
            let (rig, stop) = (&rig, &stop);
            scope.spawn(move || {
                let mut noise = Noise::new(seed);
                while !stop.load(Ordering::Relaxed) {
                    (0..100).for_each(|_| scribble(rig, &mut noise));
                    // Two cores are few.
                    thread::yield_now();
                }
            });
        }
        let mut outcome = Ok(());
        while began.elapsed() < WHILE && outcome.is_ok() {
            outcome = post_and_mend(&rig);
        }
        stop.store(true, Ordering::Relaxed);
        outcome
    });
    outcome?;
    rig.victim_is_whole()?;
    rig.peer_is_whole_outside(PART as usize)?;
    field.traffic_goes_on()
}

fn post_and_mend(rig: &Rig) -> Result<()> {
    rig.peer.post_recv(&rig.peer_qp, 1, &[Sge { addr: BASE, length: 8, lkey: rig.peer_keys.full }]);
    for opcode in [Opcode::Write, Opcode::Read, Opcode::Send, Opcode::FetchAndAdd] {
        rig.hostile.post(&rig.qp, &rig.good(opcode));
    }
    if rig.hostile.state(rig.qp.new.qpn)? != QpState::Rts {
        for (client, qp, other) in [(&rig.hostile, &rig.qp, &rig.peer_qp), (&rig.peer, &rig.peer_qp, &rig.qp)]
        {
            for state in [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts] {
                let reply = client.ask(&transition(qp, state, (other.new.qpn, rig.gid), RIGHTS))?;
                ensure!(reply.is_ok(), "a QP cannot come to {state:?} any more: {reply:?}");
            }
        }
    }
    Ok(())
}

fn floods() -> Vec<Case> {
    type Once = fn(&Client, u32, u32) -> Result<()>;
    let rows: Vec<(&str, Once)> = vec![
        ("regions registered and given up", |client, pd, _| {
            let key = client.mr(pd, 0, LEN as u64, RIGHTS)?;
            ensure!(client.ask(&Request::DeregMr { key })? == Ok(Answer::Done), "not given up");
            Ok(())
        }),
        ("regions of a terabyte", |client, pd, _| {
            let mut reg = reg_mr(pd, 0, 1 << 40, RIGHTS);
            reg.iova = 0;
            if let Ok(Answer::Mr { key }) = client.ask(&Request::RegMr(reg))? {
                ensure!(client.ask(&Request::DeregMr { key })? == Ok(Answer::Done), "not given up");
            }
            Ok(())
        }),
        ("QPs made, reset and destroyed", |client, pd, cq| {
            let qp = client.qp(pd, cq, QpType::Rc)?;
            let attr = QpAttr { qp_state: QpState::Reset.value(), ..QpAttr::default() };
            client.ask(&Request::ModifyQp { qpn: qp.new.qpn, mask: 1, attr })?.ok();
            let ended = client.ask(&Request::DestroyQp { qpn: qp.new.qpn })?;
            ensure!(ended == Ok(Answer::Done), "not destroyed: {ended:?}");
            Ok(())
        }),
        ("QPs connected with themselves", |client, pd, cq| {
            let qp = client.qp(pd, cq, QpType::Rc)?;
            client.connect(&qp, (qp.new.qpn, client.gid()?))?;
            client.post(&qp, &SendWqe::default());
            ensure!(
                client.ask(&Request::DestroyQp { qpn: qp.new.qpn })? == Ok(Answer::Done),
                "not destroyed"
            );
            Ok(())
        }),
        ("QPs that wait for one that there is not", |client, pd, cq| {
            let qp = client.qp(pd, cq, QpType::Rc)?;
            client.connect(&qp, (0xff_fff0, client.gid()?))?;
            client.post(&qp, &SendWqe::default());
            Ok(())
        }),
        ("large QPs, reset", |client, pd, cq| {
            let mut create = create_qp(pd, cq, QpType::Rc);
            (create.cap.max_send_wr, create.cap.max_recv_wr) = (16_384, 16_384);
            let Ok(Answer::Qp(new)) = client.ask(&Request::CreateQp(create))? else { return Ok(()) };
            for state in [QpState::Err, QpState::Reset] {
                let attr = QpAttr { qp_state: state.value(), ..QpAttr::default() };
                client.ask(&Request::ModifyQp { qpn: new.qpn, mask: 1, attr })?.ok();
            }
            ensure!(client.ask(&Request::DestroyQp { qpn: new.qpn })? == Ok(Answer::Done), "not destroyed");
            Ok(())
        }),
    ];
    let case = |(name, once): (&str, Once)| {
        Case::new(format!("flood: {name}"), move |field| {
            let clients = (0..3).map(|_| field.open()).collect::<Result<Vec<_>>>()?;
            thread::scope(|scope| {
                let threads: Vec<_> = clients
                    .iter()
                    .map(|client| {
                        scope.spawn(move || {
                            let (pd, (cq, _)) = (client.pd()?, client.cq(None)?);
                            let began = Instant::now();
                            while began.elapsed() < WHILE {
                                once(client, pd, cq)?;
                            }
                            Ok(())
                        })
                    })
                    .collect();
                field.traffic_goes_on()?;
                threads
                    .into_iter()
                    .try_for_each(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a panic")))
            })
        })
    };
    rows.into_iter().map(case).collect()
}
