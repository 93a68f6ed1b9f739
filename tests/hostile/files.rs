//! Descriptors: what clients send to the router, and what they can do with those that it hands out.

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use rustix::{
    event::epoll,
    fs::{
        FallocateFlags, MemfdFlags, Mode as FileMode, OFlags, SealFlags, fallocate, fcntl_add_seals,
        ftruncate, memfd_create, mkfifoat,
    },
    io::{Errno, pwrite},
    net::{AddressFamily, SocketType, socket},
    time::{TimerfdClockId, TimerfdFlags, timerfd_create},
};
use verbs_abi::{
    proto::{Answer, Mode, Request},
    shm::{PAGE, Window},
    verbs::QpType,
};

use crate::{
    client::{Client, LEN, RIGHTS, ask, dial, event, hello},
    field::{Case, Field, beside},
};

type Make = fn(&Field) -> Result<OwnedFd>;

/// Files that are no eventfd.
fn strangers() -> Vec<(&'static str, Make)> {
    vec![
        ("the null device", |_| Ok(File::open("/dev/null")?.into())),
        ("an endless device", |_| Ok(File::options().read(true).write(true).open("/dev/zero")?.into())),
        ("a pipe's reading end", |_| Ok(rustix::pipe::pipe()?.0)),
        ("a pipe's writing end", |_| Ok(rustix::pipe::pipe()?.1)),
        ("a named pipe", |field| {
            let path = beside(field, "fifo");
            let _ = fs::remove_file(&path);
            mkfifoat(rustix::fs::CWD, &path, FileMode::RWXU)?;
            Ok(File::options().read(true).write(true).open(path)?.into())
        }),
        ("an ordinary file", |field| Ok(File::create(beside(field, "anon_inode:[eventfd]"))?.into())),
        ("a directory", |_| Ok(File::open("/")?.into())),
        ("a file that is only a name", |_| {
            Ok(OpenOptions::new().read(true).custom_flags(OFlags::PATH.bits() as i32).open("/")?.into())
        }),
        ("a memory file", |_| Ok(memfd_create(c"[eventfd]", MemfdFlags::CLOEXEC)?)),
        ("an unconnected socket", |_| Ok(socket(AddressFamily::UNIX, SocketType::STREAM, None)?)),
        ("a socket of the network", |_| Ok(socket(AddressFamily::INET, SocketType::DGRAM, None)?)),
        ("a connection to this router", |field| Ok(dial(field.socket())?.as_fd().try_clone_to_owned()?)),
        ("a timer", |_| Ok(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty())?)),
        ("an epoll set", |_| Ok(epoll::create(epoll::CreateFlags::CLOEXEC)?)),
        ("a process's memory", |_| Ok(File::open("/proc/self/mem")?.into())),
    ]
}

/// Files that are not the memory of a process that the client may write.
fn not_memory() -> Vec<(&'static str, Make)> {
    let mut rows = strangers();
    rows.push(("another file of its process", |_| Ok(File::open("/proc/self/maps")?.into())));
    rows.push(("its memory, for reading alone", |_| Ok(File::open("/proc/self/mem")?.into())));
    rows.push(("a file called mem", |field| {
        let directory = beside(field, "77");
        fs::create_dir_all(&directory)?;
        let mut options = File::options();
        Ok(options.read(true).write(true).create(true).truncate(true).open(directory.join("mem"))?.into())
    }));
    rows
}

pub(crate) fn cases() -> Vec<Case> {
    let as_events = strangers().into_iter().map(|(name, make)| {
        Case::new(format!("file: {name} in place of an eventfd"), move |field| {
            let file = make(field)?;
            let (reply, _) = ask(&dial(field.socket())?, &hello(Mode::Isolated), &[file.as_fd()])?;
            ensure!(reply == Err(libc::EBADF), "Hello: {reply:?}");
            let reply = field.open()?.channel(&file)?;
            ensure!(reply == Err(libc::EBADF), "CreateChannel: {reply:?}");
            Ok(())
        })
    });
    let as_memory = not_memory().into_iter().map(|(name, make)| {
        Case::new(format!("file: {name} in place of the memory"), move |field| {
            let (file, events) = (make(field)?, event()?);
            let (reply, _) =
                ask(&dial(field.socket())?, &hello(Mode::Isolated), &[events.as_fd(), file.as_fd()])?;
            // What cannot be used is not: the device opens without it.
            ensure!(matches!(reply, Ok(Answer::Hello(_))), "{reply:?}");
            Ok(())
        })
    });
    let mut cases: Vec<Case> = as_events.chain(as_memory).collect();
    cases.extend(handed_out());
    cases.extend([
        Case::new("file: an eventfd that is closed at once", |field| {
            let client = field.open()?;
            let file = event()?;
            let reply = client.channel(&file)?;
            drop(file);
            ensure!(reply.is_ok(), "{reply:?}");
            Ok(())
        }),
        Case::new("file: an eventfd that is full", full_event),
        Case::new("file: more completion channels than there may be", channels),
    ]);
    cases
}

/// What a client may not do to the files that it is given.
fn handed_out() -> Vec<Case> {
    const NAMES: [&str; 4] = ["the arena", "the region", "the lane page", "the wake page"];
    let mut cases = Vec::new();
    for (at, name) in NAMES.into_iter().enumerate() {
        cases.push(Case::new(format!("given: {name} shortened, lengthened, sealed"), move |field| {
            let client = field.open()?;
            for file in [client.files[at].try_clone()?, reopened(&client.files[at])?] {
                let len = rustix::fs::fstat(&file)?.st_size.cast_unsigned();
                for other in [0, 1, len - 1, len + PAGE as u64] {
                    ensure!(ftruncate(&file, other) == Err(Errno::PERM), "{name} can become {other} bytes");
                }
                for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
                    ensure!(fcntl_add_seals(&file, seal).is_err(), "{name} can be sealed");
                }
                let grown = fallocate(&file, FallocateFlags::empty(), len, PAGE as u64);
                ensure!(grown == Err(Errno::PERM), "{name} can grow: {grown:?}");
            }
            Ok(())
        }));
    }
    cases.extend([
        Case::new("given: the lane page mapped for writing", |field| lane_page(field, false)),
        Case::new("given: the lane page opened anew and mapped for writing", |field| lane_page(field, true)),
        Case::new("given: the lane page written by calls", |field| {
            let client = field.open()?;
            for file in [client.files[2].try_clone()?, reopened(&client.files[2])?] {
                ensure!(pwrite(&file, &[1], 0) == Err(Errno::PERM), "the lane page can be written");
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                ensure!(fallocate(&file, punch, 0, PAGE as u64) == Err(Errno::PERM), "it can be emptied");
            }
            Ok(())
        }),
        Case::new("given: the lane page made writable afterwards", protection),
        Case::new("given: the router's own descriptors and memory, through /proc", through_proc),
        Case::new("given: holes punched into arena, region and wake page", holes),
    ]);
    cases
}

/// The same file through /proc, with all rights that this process can get.
fn reopened(file: &OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(File::options().read(true).write(true).open(path)?.into())
}

fn lane_page(field: &Field, anew: bool) -> Result<()> {
    let client = field.open()?;
    let file = if anew { reopened(&client.files[2])? } else { client.files[2].try_clone()? };
    ensure!(Window::map(&file, 0, PAGE, true).is_err(), "the lane page can be mapped for writing");
    Ok(())
}

fn protection(field: &Field) -> Result<()> {
    let client = field.open()?;
    let page = Window::map(&client.files[2], 0, PAGE, false)?;
    // SAFETY: a page of this process that nothing else here refers to; nothing is written to it.
    let changed = unsafe {
        rustix::mm::mprotect(
            page.as_ptr().cast(),
            PAGE,
            rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
        )
    };
    ensure!(changed == Err(Errno::ACCESS), "a page of the router can be made writable: {changed:?}");
    Ok(())
}

/// Root may look into anything; anybody else, the router's own user included, may not.
fn through_proc(field: &Field) -> Result<()> {
    const NOBODY: u32 = 65_534;
    let router = field.router()?;
    for name in ["fd", "map_files", "maps", "mem", "environ"] {
        let path = format!("/proc/{router}/{name}");
        let mut look = Command::new(if name == "fd" || name == "map_files" { "ls" } else { "head" });
        look.args(if name == "fd" || name == "map_files" { vec![] } else { vec!["-c", "1"] });
        look.arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
        if rustix::process::geteuid().is_root() {
            look.uid(NOBODY).gid(NOBODY);
        }
        ensure!(!look.status()?.success(), "{path} can be read");
    }
    Ok(())
}

fn holes(field: &Field) -> Result<()> {
    let client = field.open()?;
    let (pd, (cq, _)) = (client.pd()?, client.cq(None)?);
    let qp = client.qp(pd, cq, QpType::Rc)?;
    client.mr(pd, 0, LEN as u64, RIGHTS)?;
    client.connect(&qp, (qp.new.qpn, client.gid()?))?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for _ in 0..100 {
        for (at, len) in [(0, 1 << 30), (1, 1 << 40), (3, PAGE as u64)] {
            fallocate(&client.files[at], punch, 0, len)?;
        }
        client.ring(qp.new.slot);
    }
    field.traffic_goes_on()
}

/// A counter at its end makes a write wait for ever; the router must not.
fn full_event(field: &Field) -> Result<()> {
    let mut client = field.open()?;
    let file = event()?;
    rustix::io::write(&file, &(u64::MAX - 1).to_ne_bytes())?;
    let Ok(Answer::Handle(channel)) = client.channel(&file)? else { anyhow::bail!("no channel") };
    let (pd, (cq, at)) = (client.pd()?, client.cq(Some(channel))?);
    let mut qp = client.qp(pd, cq, QpType::Rc)?;
    client.connect(&qp, (qp.new.qpn, client.gid()?))?;
    for _ in 0..3 {
        notify(&mut client, at)?;
        let mut wqe = verbs_abi::shm::wqe::SendWqe::default();
        wqe.flags = verbs_abi::shm::wqe::flag::SIGNALED;
        client.post(&qp, &wqe);
        qp.completion()?;
        field.traffic_goes_on()?;
    }
    Ok(())
}

/// Asks for an event of a CQ.
fn notify(client: &mut Client, at: u64) -> Result<()> {
    use anyhow::Context as _;
    let area = verbs_abi::shm::cq::CqArea::new(&client.arena, at).context("a CQ outside the arena")?;
    area.arm(verbs_abi::shm::cq::Arm::Any, 0);
    Ok(())
}

fn channels(field: &Field) -> Result<()> {
    let (client, file) = (field.open()?, event()?);
    let given = (0..5000).take_while(|_| matches!(client.channel(&file), Ok(Ok(_)))).count();
    ensure!(given < 5000, "a client can have any number of descriptors held");
    let reply = client.channel(&file)?;
    ensure!(reply == Err(libc::EMFILE), "{reply:?}");
    ensure!(field.open()?.ask(&Request::AllocPd)?.is_ok(), "others get nothing any more");
    Ok(())
}
