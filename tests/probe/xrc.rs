//! XRC: domains that a file stands for, their receivers, and shared receive queues that any process can bring.
//!
//! Two processes play the promise of `ibv_open_qp`: the first makes a receiver, the second opens it by its number,
//! connects it and brings the queue; the receiver stays when the first lets go, and ends with the second.

use std::{
    ffi::c_int,
    fs::File,
    io::{BufRead as _, BufReader},
    os::fd::AsRawFd as _,
    path::Path,
    process::{Child, Command, Stdio},
    ptr::{self, NonNull},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use verbs_abi::ffi::*;

use crate::{
    cq::Cq,
    library::library,
    pair::{Address, End, Setup, ah_attr},
    qp::Send,
    verbs::{AsyncEvent, Context, Errno, check, pointer},
};

const TEXTS: [&str; 2] = ["by the queue of another process", "after the first has gone"];
const ROOM: usize = 64;

/// A domain.
struct Domain {
    raw: NonNull<ibv_xrcd>,
    context: Arc<Context>,
}

impl Domain {
    fn open(context: &Arc<Context>, file: &File, oflags: c_int) -> Result<Self, Errno> {
        let mut attr = ibv_xrcd_init_attr {
            comp_mask: IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS,
            fd: file.as_raw_fd(),
            oflags,
        };
        // SAFETY: the context is alive, and an extended one.
        let open = unsafe { (*context.verbs()).open_xrcd }.expect("a provider opens XRC domains");
        // SAFETY: as above; the attributes are ours.
        let raw = pointer("ibv_open_xrcd", unsafe { open(context.raw(), &mut attr) })?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Closes it, or says why not.
    fn try_close(&self) -> Result<(), Errno> {
        // SAFETY: as for `open`.
        let close = unsafe { (*self.context.verbs()).close_xrcd }.expect("a provider closes XRC domains");
        // SAFETY: it is alive; where the call succeeds it is used no more.
        check("ibv_close_xrcd", unsafe { close(self.raw.as_ptr()) })
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let _ = self.try_close();
    }
}

/// A receiver that was made or opened.
struct Receiver {
    raw: NonNull<ibv_qp>,
}

impl Receiver {
    fn new(domain: &Domain) -> Result<Self, Errno> {
        let mut attr = ibv_qp_init_attr_ex {
            qp_type: IBV_QPT_XRC_RECV,
            comp_mask: IBV_QP_INIT_ATTR_XRCD,
            xrcd: domain.raw.as_ptr(),
            ..ibv_qp_init_attr_ex::default()
        };
        // SAFETY: the context is alive, and an extended one.
        let create = unsafe { (*domain.context.verbs()).create_qp_ex }.expect("a provider makes QPs");
        // SAFETY: as above; the domain is alive.
        let raw = unsafe { create(domain.context.raw(), &mut attr) };
        Ok(Self { raw: pointer("ibv_create_qp_ex", raw)? })
    }

    fn open(domain: &Domain, qp_num: u32, qp_type: ibv_qp_type) -> Result<Self, Errno> {
        let mut attr = ibv_qp_open_attr {
            comp_mask: IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE,
            qp_num,
            xrcd: domain.raw.as_ptr(),
            qp_context: ptr::null_mut(),
            qp_type,
        };
        // SAFETY: as for `new`.
        let open = unsafe { (*domain.context.verbs()).open_qp }.expect("a provider opens QPs");
        // SAFETY: as above; the domain is alive.
        Ok(Self { raw: pointer("ibv_open_qp", unsafe { open(domain.context.raw(), &mut attr) })? })
    }

    fn number(&self) -> u32 {
        // SAFETY: it is alive.
        unsafe { self.raw.as_ref() }.qp_num
    }

    fn connect(&self, peer: Address) -> Result<()> {
        for (attr, mask) in steps(peer, &[IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER, IBV_QP_TIMEOUT]) {
            modify(self.raw.as_ptr(), attr, mask)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<ibv_qp_state> {
        let (mut attr, mut init) = (ibv_qp_attr::default(), ibv_qp_init_attr::default());
        // SAFETY: it is alive, the rest is ours.
        let code = unsafe {
            (library().ibv_query_qp)(self.raw.as_ptr(), &mut attr, IBV_QP_STATE as c_int, &mut init)
        };
        check("ibv_query_qp", code)?;
        Ok(attr.qp_state)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // SAFETY: it is destroyed once, here.
        unsafe { (library().ibv_destroy_qp)(self.raw.as_ptr()) };
    }
}

/// What INIT, RTR and RTS take of either end of XRC, with what else RTR and RTS take of this one.
fn steps(peer: Address, own: &[u32; 2]) -> [(ibv_qp_attr, u32); 3] {
    let state = |qp_state| ibv_qp_attr { qp_state, ..ibv_qp_attr::default() };
    let init = ibv_qp_attr { port_num: 1, qp_access_flags: IBV_ACCESS_REMOTE_WRITE, ..state(IBV_QPS_INIT) };
    let rtr = ibv_qp_attr {
        path_mtu: IBV_MTU_1024,
        dest_qp_num: peer.qpn,
        ah_attr: ah_attr(peer.gid, 0),
        min_rnr_timer: 1,
        ..state(IBV_QPS_RTR)
    };
    let rts = ibv_qp_attr { timeout: 12, retry_cnt: 2, rnr_retry: 7, ..state(IBV_QPS_RTS) };
    let path = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
    [
        (init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
        (rtr, IBV_QP_STATE | path | own[0]),
        (rts, IBV_QP_STATE | IBV_QP_SQ_PSN | own[1]),
    ]
}

fn modify(qp: *mut ibv_qp, mut attr: ibv_qp_attr, mask: u32) -> Result<(), Errno> {
    // SAFETY: the callers' QPs are alive, the attributes are ours.
    check("ibv_modify_qp", unsafe { (library().ibv_modify_qp)(qp, &mut attr, mask as c_int) })
}

/// The sending end.
fn sender() -> Result<End> {
    End::new(&Setup::new(IBV_QPT_XRC_SEND))
}

fn connect_sender(end: &End, peer: Address) -> Result<()> {
    let reliable = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    steps(peer, &[0, reliable]).into_iter().try_for_each(|(attr, mask)| Ok(end.qp.modify(&attr, mask)?))
}

/// Sends a text to a queue, and tells how that ended.
fn send(end: &End, text: &str, srqn: u32) -> Result<ibv_wc_status> {
    end.buffer.write(0, text.as_bytes());
    let mut work = Send::new(IBV_WR_SEND).sge(end.sge(0, text.len()));
    work.srqn = srqn;
    end.qp.send(&work)?;
    Ok(end.send_cq.next()?.status)
}

/// A file that is gone when the test is.
struct Mark(std::path::PathBuf);

impl Mark {
    fn new(name: &str) -> Result<(Self, File)> {
        let path = std::env::temp_dir().join(format!("freeflow-probe-{name}-{}", std::process::id()));
        let file = File::create_new(&path)?;
        Ok((Self(path), file))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The second process.
struct Second {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Second {
    fn start(file: &Path, receiver: u32, sender: u32) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("xrc-second").arg(file).args([receiver.to_string(), sender.to_string()]);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
        Ok(Self { child, lines })
    }

    /// What it says next behind this word.
    fn says(&mut self, word: &str) -> Result<String> {
        let line =
            self.lines.next().with_context(|| format!("the second process ended before its {word}"))??;
        let rest = line.strip_prefix(word).with_context(|| format!("{line:?} in place of {word}"))?;
        Ok(rest.trim().to_owned())
    }
}

/// The check of the first process.
pub(crate) fn shared() -> Result<()> {
    let (mark, file) = Mark::new("xrcd")?;
    let end = sender()?;
    let context = Context::open()?;
    let domain = Domain::open(&context, &file, libc::O_CREAT)?;
    let receiver = Receiver::new(&domain)?;
    let mut second = Second::start(&mark.0, receiver.number(), end.qp.number())?;
    let srqn: u32 = second.says("QUEUE")?.parse()?;
    ensure!(receiver.state()? == IBV_QPS_RTS, "what the second did is not seen by the first");
    connect_sender(&end, Address { gid: context.gid(0)?, qpn: receiver.number() })?;
    let status = send(&end, TEXTS[0], srqn)?;
    ensure!(status == IBV_WC_SUCCESS, "the first message ended with status {status}");
    ensure!(second.says("GOT")? == TEXTS[0], "the first message is another one");
    let busy = domain.try_close().err().map(|errno| errno.code);
    ensure!(busy == Some(libc::EBUSY), "a domain with a receiver was closed: {busy:?}");
    // All of the first process but what sends.
    drop((receiver, domain, context));
    let status = send(&end, TEXTS[1], srqn)?;
    ensure!(status == IBV_WC_SUCCESS, "the second message ended with status {status}");
    ensure!(second.says("GOT")? == TEXTS[1], "the second message is another one");
    ensure!(second.says("OK").is_ok() && second.child.wait()?.success(), "the second process failed");
    let status = send(&end, "to nobody", srqn)?;
    ensure!(status == IBV_WC_RETRY_EXC_ERR, "the receiver lives on without anybody: status {status}");
    Ok(())
}

/// The second process.
pub(crate) fn second(file: &str, receiver: u32, sender: u32) -> Result<()> {
    let context = Context::open()?;
    let domain = Domain::open(&context, &File::open(file)?, 0)?;
    let receiver = Receiver::open(&domain, receiver, IBV_QPT_XRC_RECV)?;
    receiver.connect(Address { gid: context.gid(0)?, qpn: sender })?;
    let end = End::on(&context, &Setup::new(IBV_QPT_RC))?;
    let cq = Cq::new(&context, 16, None)?;
    let queue = Queue::new(&end, &domain, &cq)?;
    (0..TEXTS.len()).try_for_each(|at| queue.post(at as u64, end.sge(at * ROOM, ROOM)))?;
    println!("QUEUE {}", queue.number()?);
    for (at, text) in TEXTS.iter().enumerate() {
        let wc = cq.next()?;
        wc.expect(IBV_WC_SUCCESS)?;
        ensure!((wc.wr_id, wc.qp_num) == (at as u64, receiver.number()), "{wc:?}");
        ensure!(wc.byte_len as usize == text.len(), "{wc:?} of {text:?}");
        println!("GOT {}", String::from_utf8_lossy(&end.buffer.read(at * ROOM, text.len())));
    }
    Ok(())
}

/// What `ibv_open_qp` takes and refuses, and who hears of events.
pub(crate) fn opened() -> Result<()> {
    let (_marks, files): (Vec<_>, Vec<_>) = [Mark::new("one")?, Mark::new("other")?].into_iter().unzip();
    let end = sender()?;
    let contexts = [Context::open()?, Context::open()?];
    let domain = |context, file| Domain::open(context, file, libc::O_CREAT);
    let made_in = domain(&contexts[0], &files[0])?;
    let first = Receiver::new(&made_in)?;
    let (same, other) = (domain(&contexts[1], &files[0])?, domain(&contexts[1], &files[1])?);
    let refused = |opened: Result<Receiver, Errno>| opened.err().map(|errno| errno.code);
    for (what, code) in [
        ("of another domain", refused(Receiver::open(&other, first.number(), IBV_QPT_XRC_RECV))),
        ("that is none", refused(Receiver::open(&same, end.qp.number(), IBV_QPT_XRC_RECV))),
        ("with a number that nothing has", refused(Receiver::open(&same, 0x00ff_0000, IBV_QPT_XRC_RECV))),
        ("of another type", refused(Receiver::open(&same, first.number(), IBV_QPT_RC))),
    ] {
        ensure!(code == Some(libc::EINVAL), "a receiver {what}: {code:?}");
    }
    // Also by its maker, and more than once.
    let again = Receiver::open(&made_in, first.number(), IBV_QPT_XRC_RECV)?;
    let second = Receiver::open(&same, first.number(), IBV_QPT_XRC_RECV)?;
    second.connect(end.address()?)?;
    connect_sender(&end, Address { gid: contexts[0].gid(0)?, qpn: first.number() })?;
    let status = send(&end, "to no queue", 4_000_000)?;
    ensure!(status == IBV_WC_REM_INV_REQ_ERR, "a queue that nothing has: status {status}");
    let events = |context: &Context| -> Result<Vec<AsyncEvent>> {
        let mut events = Vec::new();
        while let Some(event) = context.async_event(crate::pair::QUIET)? {
            events.push(event);
        }
        Ok(events)
    };
    let mut heard: Vec<_> = events(&contexts[0])?.into_iter().chain(events(&contexts[1])?).collect();
    ensure!(heard.iter().all(|event| event.kind == heard[0].kind), "{heard:?}");
    let mut wanted = [&first, &again, &second].map(|receiver| receiver.raw.as_ptr() as usize);
    heard.sort_by_key(|event| event.element);
    wanted.sort_unstable();
    ensure!(
        heard.iter().map(|event| event.element).eq(wanted),
        "{heard:?}, and not one for each of {wanted:?}"
    );
    ensure!(first.state()? == IBV_QPS_ERR && second.state()? == IBV_QPS_ERR, "they are not one QP");
    Ok(())
}

/// An XRC queue.
struct Queue<'a> {
    raw: NonNull<ibv_srq>,
    context: &'a Context,
}

impl<'a> Queue<'a> {
    fn new(end: &'a End, domain: &Domain, cq: &Cq) -> Result<Self, Errno> {
        let mut attr = ibv_srq_init_attr_ex {
            srq_type: IBV_SRQT_XRC,
            comp_mask: IBV_SRQ_INIT_ATTR_TYPE
                | IBV_SRQ_INIT_ATTR_PD
                | IBV_SRQ_INIT_ATTR_XRCD
                | IBV_SRQ_INIT_ATTR_CQ,
            pd: end.pd.raw(),
            xrcd: domain.raw.as_ptr(),
            cq: ptr::without_provenance_mut(cq.addr()),
            attr: ibv_srq_attr { max_wr: 8, max_sge: 1, srq_limit: 0 },
            ..ibv_srq_init_attr_ex::default()
        };
        // SAFETY: the context is alive, and an extended one.
        let create = unsafe { (*end.context.verbs()).create_srq_ex }.expect("a provider makes SRQs");
        // SAFETY: as above; what the attributes name is alive.
        let raw = pointer("ibv_create_srq_ex", unsafe { create(end.context.raw(), &mut attr) })?;
        Ok(Self { raw, context: &end.context })
    }

    fn number(&self) -> Result<u32, Errno> {
        let mut number = 0;
        // SAFETY: the context is alive, and an extended one.
        let get = unsafe { (*self.context.verbs()).get_srq_num }.expect("a provider numbers SRQs");
        // SAFETY: the SRQ is alive, the number is ours.
        check("ibv_get_srq_num", unsafe { get(self.raw.as_ptr(), &mut number) })?;
        Ok(number)
    }

    fn post(&self, wr_id: u64, mut sge: ibv_sge) -> Result<()> {
        let mut work = ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: the context is alive.
        let Some(post) = (unsafe { (*self.context.raw()).ops.post_srq_recv }) else {
            bail!("no post_srq_recv")
        };
        // SAFETY: the SRQ is alive, the rest is ours.
        Ok(check("ibv_post_srq_recv", unsafe { post(self.raw.as_ptr(), &mut work, &mut bad) })?)
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // SAFETY: it is destroyed once, here.
        unsafe { (library().ibv_destroy_srq)(self.raw.as_ptr()) };
    }
}
