//! A client whose memory never answers: a page fault that nothing resolves, in a registered region.
//!
//! Three processes: the file system that lets everybody wait, the hostile client that has its pages registered, and
//! this one, which holds the hostile client's peer and two ends that have nothing to do with it. These must go on
//! as if nothing were, the peer must see what a silent wire shows, and the hostile client must be mortal.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::{Buffer, pattern},
    end_after,
    family::{Card, Socket, fork_into, kill, socket_pair, wait},
    fuse::{self, StuckFile},
    pair::{End, Pair, SOON, Setup},
    qp::Send,
    verbs::{ALL_ACCESS, Context, Mr},
};

const LIMIT: Duration = Duration::from_secs(90);
/// How long the other process may take for its next step.
const PATIENCE: Duration = Duration::from_secs(20);
/// Round trips of one look at the others' pace.
const ROUNDS: usize = 300;

pub(crate) fn run() -> Result<()> {
    end_after(LIMIT);
    // This process has one thread and no device until both children are there.
    crate::verbs::find_device()?;
    let stuck = StuckFile::new()?;
    let (socket, theirs) = socket_pair()?;
    let hostile = fork_into(|| be_hostile(&theirs, &stuck))?;
    drop(theirs);
    let result = watch(&socket, hostile);
    kill(hostile);
    wait(hostile)?;
    let bystanders = result?;
    // The client is gone, and what it left in the router still waits for the page.
    let after = bystanders.pace().context("after the client's death")?;
    drop(Context::open().context("a new device")?);
    stuck.end()?;
    println!("{{\"after_us\":{}}}", after.as_micros());
    Ok(())
}

/// All that happens while the hostile client lives.
fn watch(socket: &Socket, hostile: i32) -> Result<Bystanders> {
    let card: Card = socket.receive(PATIENCE)?.with_context(|| format!("client {hostile} made no QP"))?;
    let bystanders = Bystanders::new()?;
    let before = bystanders.pace().context("before anything happened")?;

    let mut setup = Setup::new(IBV_QPT_RC);
    setup.retry_cnt = 1;
    let peer = End::new(&setup)?;
    let own = peer.address()?;
    socket.send(&Card { gid: own.gid, qpn: own.qpn, ..Card::default() })?;
    peer.connect(card.address())?;
    let _: Card = socket.receive(PATIENCE)?.context("the hostile client did not post")?;

    let began = Instant::now();
    let write = Send::new(IBV_WR_RDMA_WRITE).sge(peer.sge(0, 64)).remote((card.addr, card.rkey));
    peer.qp.send(&write)?;
    let during = bystanders.pace().context("while the page fault lasts")?;
    ensure!(
        during < before * 20 + Duration::from_secs(1),
        "others take {during:?} where they took {before:?} before"
    );
    let mut completions = Vec::new();
    while completions.is_empty() {
        ensure!(began.elapsed() < PATIENCE, "the peer hears nothing");
        completions = peer.send_cq.poll(1)?;
    }
    completions[0].expect(IBV_WC_RETRY_EXC_ERR)?;
    println!("{{\"before_us\":{},\"during_us\":{}}}", before.as_micros(), during.as_micros());
    Ok(bystanders)
}

/// The hostile client: registers pages that never come, has them read by its own requests and offers them to a peer.
fn be_hostile(line: &Socket, stuck: &StuckFile) -> Result<()> {
    let mut setup = Setup::new(IBV_QPT_RC);
    setup.timeout = 0;
    let end = End::new(&setup)?;
    let addr = stuck.map()?;
    let mr = Mr::new(&end.pd, addr, fuse::LEN, ALL_ACCESS)?;
    let own = end.address()?;
    line.send(&Card { gid: own.gid, qpn: own.qpn, rkey: mr.rkey(), addr: addr as u64 })?;
    let peer: Card = line.receive(PATIENCE)?.context("there is no peer")?;
    end.connect(peer.address())?;

    // In direct mode its own thread would wait, which is nobody's business.
    let own = if std::env::var("FREEFLOW_MODE").as_deref() == Ok("direct") {
        None
    } else {
        Some(read_stuck(&end, addr)?)
    };
    line.send(&Card::default())?;
    loop {
        std::thread::park();
        std::hint::black_box(&own);
    }
}

/// Requests of the hostile client itself that read its stuck pages.
fn read_stuck(end: &End, addr: usize) -> Result<(End, End, Mr)> {
    let (a, b) =
        (End::on(&end.context, &Setup::new(IBV_QPT_RC))?, End::on(&end.context, &Setup::new(IBV_QPT_RC))?);
    a.connect(b.address()?)?;
    b.connect(a.address()?)?;
    let mr = Mr::new(&a.pd, addr, fuse::LEN, ALL_ACCESS)?;
    for _ in 0..8 {
        let sge = ibv_sge { addr: addr as u64, length: 4096, lkey: mr.lkey() };
        a.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(sge).remote(b.remote(0)))?;
    }
    Ok((a, b, mr))
}

/// Two ends that have nothing to do with the hostile client, with memory of either kind.
struct Bystanders {
    pair: Pair,
    small: Buffer,
    mr: Mr,
}

impl Bystanders {
    fn new() -> Result<Self> {
        let pair = Pair::of(IBV_QPT_RC)?;
        let small = Buffer::new(4096)?;
        // Not a whole page, so it is not moved.
        let mr = Mr::new(&pair.b.pd, small.addr() + 64, 1000, ALL_ACCESS)?;
        Ok(Self { pair, small, mr })
    }

    /// How long a few hundred requests of either kind take.
    fn pace(&self) -> Result<Duration> {
        let (a, b) = (&self.pair.a, &self.pair.b);
        let began = Instant::now();
        for round in 0..ROUNDS {
            let round_began = Instant::now();
            let data = pattern(round as u64, 64);
            a.buffer.write(0, &data);
            a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 64)).remote(b.remote(128)))?;
            let foreign = ((self.small.addr() + 64) as u64, self.mr.rkey());
            a.execute(&Send::new(IBV_WR_RDMA_WRITE).sge(a.sge(0, 64)).remote(foreign))?;
            ensure!(b.buffer.read(128, 64) == data && self.small.read(64, 64) == data, "other bytes arrived");
            ensure!(round_began.elapsed() < SOON, "round {round} took {:?}", round_began.elapsed());
        }
        Ok(began.elapsed())
    }
}
