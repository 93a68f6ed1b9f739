//! Two processes that try everything to reach each other: RC, UD, and by each key that the other names.
//!
//! They exchange addresses by files in a directory, for they may be of two network namespaces. Says what came of each
//! try, a line each, and at the end what became of the own buffer. What is right, the test that runs them knows.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use verbs_abi::ffi::*;

use crate::{
    buffer::Buffer,
    cq::{Cq, status_name},
    pair::{Address, End, QKEY, QUIET, Setup, ah_attr},
    qp::{Qp, QpInit, Send},
    verbs::{ALL_ACCESS, Ah, Context, Errno, Mr, Pd},
};

/// How long the other may take for a step.
const LIMIT: Duration = Duration::from_secs(20);
const BYTES: usize = 4096;

/// What is tried on a QP of its own each.
const TRIES: [(&str, ibv_wr_opcode); 3] =
    [("write", IBV_WR_RDMA_WRITE), ("read", IBV_WR_RDMA_READ), ("send", IBV_WR_SEND)];

/// Meets `other` as `own` by files in `folder`.
pub(crate) fn meet(folder: &str, own: &str, other: &str) -> Result<()> {
    let file = |name: &str, step: &str| Path::new(folder).join(format!("{name}.{step}"));
    let barrier = |step: &str| tell(&file(own, step), "").and_then(|()| hear(&file(other, step)));
    let mut setup = Setup::new(IBV_QPT_RC);
    // Silence is found out in a fraction of a second.
    (setup.timeout, setup.retry_cnt, setup.buffer) = (12, 3, 4 * BYTES);
    let context = Context::open()?;
    let ends = TRIES.iter().map(|_| End::on(&context, &setup)).collect::<Result<Vec<_>>>()?;
    let datagram = End::on(&context, &Setup { qp_type: IBV_QPT_UD, ..setup })?;
    let gid = datagram.address()?.gid;
    let mut text = format!("{} {}", u128::from_be_bytes(gid), datagram.qp.number());
    for end in &ends {
        end.buffer.write(0, &vec![b'a'; BYTES]);
        let (addr, rkey) = end.remote(0);
        text += &format!(" {} {addr} {rkey}", end.qp.number());
    }
    tell(&file(own, "here"), &text)?;
    let theirs = Theirs::parse(&hear(&file(other, "here"))?).context("what the other says is no address")?;
    for (end, (qpn, _)) in ends.iter().zip(&theirs.tries) {
        end.connect(Address { gid: theirs.gid, qpn: *qpn })?;
        end.qp.recv(1, &[end.sge(0, BYTES)])?;
    }
    let ud = Address { gid: theirs.gid, qpn: theirs.datagrams };
    datagram.connect(ud)?;
    datagram.qp.recv(1, &[datagram.sge(0, BYTES)])?;
    barrier("ready")?;

    for (((name, opcode), end), (_, remote)) in TRIES.iter().zip(&ends).zip(&theirs.tries) {
        end.qp.send(&Send::new(*opcode).sge(end.sge(2 * BYTES, 64)).remote(*remote))?;
        println!("{name} {}", status_name(end.send_cq.wait(1, LIMIT)?[0].status));
    }
    let ah = Ah::new(&datagram.pd, &ah_attr(ud.gid, 0))?;
    let message = Send { to: Some((&ah, ud.qpn, QKEY)), ..Send::new(IBV_WR_SEND) };
    datagram.execute(&message.sge(datagram.sge(2 * BYTES, 64)))?;
    // A key is its owner's: by an own QP it is nothing.
    let own_loop = End::on(&context, &setup)?;
    own_loop.connect(own_loop.address()?)?;
    own_loop.qp.send(&Send::new(IBV_WR_RDMA_WRITE).sge(own_loop.sge(0, 64)).remote(theirs.tries[0].1))?;
    println!("key {}", status_name(own_loop.send_cq.wait(1, LIMIT)?[0].status));

    barrier("tried")?;
    thread::sleep(QUIET);
    println!("datagram {}", if datagram.recv_cq.poll(1)?.is_empty() { "never" } else { "arrived" });
    for ((name, _), end) in TRIES.iter().zip(&ends) {
        let untouched = end.buffer.read(0, BYTES).iter().all(|byte| *byte == b'a');
        println!("buffer of {name} {}", if untouched { "untouched" } else { "written" });
    }
    barrier("done").map(drop)
}

/// Where the other is.
struct Theirs {
    gid: [u8; 16],
    /// Number of its datagram QP.
    datagrams: u32,
    /// For each try the QP's number, and the buffer's address and key.
    tries: Vec<(u32, (u64, u32))>,
}

impl Theirs {
    fn parse(words: &[String]) -> Option<Self> {
        let numbers: Option<Vec<u128>> = words.iter().map(|word| word.parse().ok()).collect();
        let numbers = numbers?;
        let (head, tries) = numbers.split_at_checked(2)?;
        let tries = tries.chunks_exact(3).map(|try_| (try_[0] as u32, (try_[1] as u64, try_[2] as u32)));
        Some(Self { gid: head[0].to_be_bytes(), datagrams: head[1] as u32, tries: tries.collect() })
    }
}

/// Says something that appears whole.
pub(crate) fn tell(path: &PathBuf, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)?;
    Ok(fs::rename(fresh, path)?)
}

pub(crate) fn hear(path: &PathBuf) -> Result<Vec<String>> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        if let Ok(text) = fs::read_to_string(path) {
            return Ok(text.split_whitespace().map(str::to_owned).collect());
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("the other never came to {}", path.display())
}

/// Takes all that the device says one may have of each kind, and one more; says the errno of that.
pub(crate) fn exhaust() -> Result<()> {
    let context = Context::open()?;
    let attr = context.device_attr()?;
    let (pds, refused) = until_refused(|| Pd::new(&context))?;
    println!("pds {} of {}, then {refused}", pds.len(), attr.max_pd);
    let pd = &pds[0];
    let whole = attr.max_mr_size as usize;
    let buffer = Buffer::new(whole + 4096)?;
    let (mrs, refused) = until_refused(|| Mr::new(pd, buffer.addr(), 4096, ALL_ACCESS))?;
    println!("mrs {} of {}, then {refused}", mrs.len(), attr.max_mr);
    drop(mrs);
    let refused = Mr::new(pd, buffer.addr(), whole + 1, ALL_ACCESS).err().map_or(0, |error| error.code);
    drop(Mr::new(pd, buffer.addr(), whole, ALL_ACCESS)?);
    println!("bytes {whole}, then {refused}");
    let (cqs, refused) = until_refused(|| Cq::new(&context, 16, None))?;
    println!("cqs {} of {}, then {refused}", cqs.len(), attr.max_cq);
    let cap =
        ibv_qp_cap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
    let init = QpInit { qp_type: IBV_QPT_RC, cap, sq_sig_all: false };
    let (qps, refused) = until_refused(|| Qp::new(pd, &cqs[0], &cqs[0], init))?;
    println!("qps {} of {}, then {refused}", qps.len(), attr.max_qp);
    Ok(())
}

/// As many as there are, and the errno of one more.
fn until_refused<T>(make: impl Fn() -> Result<T, Errno>) -> Result<(Vec<T>, i32)> {
    let mut made = Vec::new();
    while made.len() < 100_000 {
        match make() {
            Ok(one) => made.push(one),
            Err(error) => return Ok((made, error.code)),
        }
    }
    bail!("no end of them")
}
