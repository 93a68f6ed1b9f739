//! Memory that fails under the router. No client can bring that about, since what is shared is sealed; so these are
//! clients of a router whose seals do nothing, and cut short what it maps. The same signal comes when the kernel has no
//! page to give.

use std::{
    env, mem,
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::Command,
    ptr,
};

use anyhow::{Result, ensure};
use rustix::{fs::ftruncate, thread::set_no_new_privs};
use tempfile::TempDir;
use verbs_abi::{
    proto::{Mode, Request},
    shm::wqe::{SendWqe, Sge, flag},
    verbs::{Opcode, QpType},
};
use xtask::process::command;

use crate::{
    client::{BASE, ensure_dropped},
    common::{self, daemon::Daemon},
    field::{Case, Field},
    puppet::MARK,
    rig::{PART, Rig},
};

/// Places of the files in a welcome.
const ARENA: usize = 0;
const REGION: usize = 1;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("failing: the region, under a peer's RDMA READ", |_| region(Opcode::Read, PART)),
        Case::new("failing: the region, under a peer's RDMA WRITE", |_| region(Opcode::Write, PART)),
        Case::new("failing: the region, under a peer's atomic", |_| region(Opcode::FetchAndAdd, 8)),
        Case::new("failing: the region, under a peer's SEND", |_| region(Opcode::Send, PART)),
        Case::new("failing: the region, under its own SEND", |_| own_send()),
        Case::new("failing: the arena, under the data path", |_| arena(false)),
        Case::new("failing: the arena, under a request", |_| arena(true)),
        Case::new("failing: one client after the other", |_| many()),
    ]
}

/// A router whose seals do nothing.
fn unsealed() -> Result<Field> {
    let (tree, directory) = (common::tree()?, TempDir::with_prefix("freeflow-")?);
    let socket = directory.path().join("router.sock");
    let mut start = command([env::current_exe()?]);
    start.args([MARK, "unsealed"]).arg(tree.program()).arg(&socket);
    Field::around(Daemon::start_by(&tree, &socket, start)?, directory)
}

/// Becomes that router.
pub(crate) fn serve(program: &Path, socket: &Path) -> Result<()> {
    ignore_seals()?;
    Err(Command::new(program).args(["router", "--socket"]).arg(socket).exec().into())
}

/// From now on, `fcntl(F_ADD_SEALS)` says that it went well, and does nothing.
fn ignore_seals() -> Result<()> {
    let rule = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |at: usize| rule(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at as u32);
    // Goes on behind the next `jf` rules unless it is `k`.
    let is =
        |k: u32, jf: u8| libc::sock_filter { jf, ..rule(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k) };
    let end = |what: u32| rule(libc::BPF_RET | libc::BPF_K, what);
    let mut rules = [
        load(mem::offset_of!(libc::seccomp_data, nr)),
        is(libc::SYS_fcntl as u32, 3),
        load(mem::offset_of!(libc::seccomp_data, args) + size_of::<u64>()),
        is(libc::F_ADD_SEALS as u32, 1),
        // Errno 0 is none.
        end(libc::SECCOMP_RET_ERRNO),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: rules.len() as u16, filter: rules.as_mut_ptr() };
    set_no_new_privs(true)?;
    // SAFETY: the kernel copies the rules, which live until then; they concern this process alone.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, ptr::from_ref(&program))
    };
    ensure!(result == 0, "seccomp: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Fails unless the router has dropped the hostile client and serves all others.
fn only_it_ends(field: &Field, rig: Rig) -> Result<()> {
    ensure_dropped(&rig.hostile.endpoint)?;
    rig.victim_is_whole()?;
    drop(rig);
    field.check()?;
    ensure!(field.log().contains("memory that it shares is gone"), "nothing was said:\n{}", field.log());
    Ok(())
}

/// The peer's request meets a region that was cut short.
fn region(opcode: Opcode, len: u64) -> Result<()> {
    let field = unsealed()?;
    let mut rig = Rig::new(&field, Mode::Isolated, QpType::Rc)?;
    rig.hostile.post_recv(&rig.qp, 3, &[Sge { addr: BASE, length: PART as u32, lkey: rig.keys.full }]);
    ftruncate(&rig.hostile.files[REGION], 0)?;
    let mut wqe = SendWqe::default();
    (wqe.wr_id, wqe.flags, wqe.opcode) = (7, flag::SIGNALED, opcode.value() as u8);
    (wqe.remote_addr, wqe.rkey) = (BASE, rig.keys.full);
    wqe.push_sge(Sge { addr: BASE, length: len as u32, lkey: rig.peer_keys.full });
    rig.peer.post(&rig.peer_qp, &wqe);
    let done = rig.peer_qp.completion()?;
    ensure!(done.status != 0, "{opcode:?} of memory that is gone went well");
    only_it_ends(&field, rig)
}

fn own_send() -> Result<()> {
    let field = unsealed()?;
    let mut rig = Rig::new(&field, Mode::Isolated, QpType::Rc)?;
    rig.peer.post_recv(&rig.peer_qp, 3, &[Sge { addr: BASE, length: 8, lkey: rig.peer_keys.full }]);
    ftruncate(&rig.hostile.files[REGION], 0)?;
    let wqe = rig.good(Opcode::Send);
    rig.hostile.post(&rig.qp, &wqe);
    ensure_dropped(&rig.hostile.endpoint)?;
    ensure!(rig.peer_qp.receives.pop().is_none_or(|done| done.status != 0), "a message of nothing came");
    only_it_ends(&field, rig)
}

/// The lane looks at all doorbells again and again; requests change the arena in the control thread.
fn arena(ask: bool) -> Result<()> {
    let field = unsealed()?;
    let rig = Rig::new(&field, Mode::Isolated, QpType::Rc)?;
    ftruncate(&rig.hostile.files[ARENA], 0)?;
    if ask {
        // Whether it is answered depends on who comes first.
        let _ = rig.hostile.endpoint.send(&Request::CreateCq { cqe: 100, channel: None }, &[]);
    }
    only_it_ends(&field, rig)
}

fn many() -> Result<()> {
    let field = unsealed()?;
    for round in 0..20 {
        let client = field.open()?;
        let (pd, (cq, _)) = (client.pd()?, client.cq(None)?);
        let qp = client.qp(pd, cq, QpType::Rc)?;
        client.connect(&qp, (qp.new.qpn, client.gid()?))?;
        ftruncate(client.files[round % 2].as_fd(), 0)?;
        if round % 2 == REGION {
            // Nobody touches it: it lives, until its arena goes as well.
            ftruncate(client.files[ARENA].as_fd(), 0)?;
        }
        ensure_dropped(&client.endpoint)?;
    }
    field.check()
}
