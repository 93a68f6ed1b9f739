//! What comes over the socket: messages that are none, in the wrong order, too many, never read.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use rustix::{
    io::Errno,
    net::{AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketType, connect, send, shutdown, socket},
};
use verbs_abi::proto::{Endpoint, MAX_FDS, MAX_MESSAGE, Mode, QpAttr, Reply, Request};
use verbs_abi::verbs::QpType;

use crate::{
    client::{Client, ask, create_qp, dial, ensure_dropped, event, hello, reg_mr},
    field::{Case, Field},
};

/// A request of each kind, by name. Handles are those of a fresh client: none.
pub(crate) fn requests() -> Vec<(&'static str, Request)> {
    vec![
        ("Hello", hello(Mode::Isolated)),
        ("Gids", Request::Gids),
        ("AllocPd", Request::AllocPd),
        ("DeallocPd", Request::DeallocPd { pd: 300 }),
        ("RegMr", Request::RegMr(reg_mr(300, 4096, 4096, 1))),
        ("DeregMr", Request::DeregMr { key: 300 }),
        ("ReregMr", Request::ReregMr { key: 300, reg: reg_mr(300, 4096, 4096, 1) }),
        ("AllocMw", Request::AllocMw { pd: 300, is_type_2: true }),
        ("DeallocMw", Request::DeallocMw { key: 300 }),
        ("CreateChannel", Request::CreateChannel),
        ("DestroyChannel", Request::DestroyChannel { channel: 300 }),
        ("CreateCq", Request::CreateCq { cqe: 300, channel: Some(300) }),
        ("DestroyCq", Request::DestroyCq { cq: 300 }),
        ("CreateQp", Request::CreateQp(create_qp(300, 300, QpType::Rc))),
        ("ModifyQp", Request::ModifyQp { qpn: 300, mask: 1, attr: QpAttr::default() }),
        ("QueryQp", Request::QueryQp { qpn: 300 }),
        ("AttachMcast", Request::AttachMcast { qpn: 300, group: [0xff; 16] }),
        ("DetachMcast", Request::DetachMcast { qpn: 300, group: [0xff; 16] }),
        ("DestroyQp", Request::DestroyQp { qpn: 300 }),
    ]
}

fn encoded(request: &Request) -> Vec<u8> {
    postcard::to_stdvec(request).expect("a request can be encoded")
}

pub(crate) fn cases() -> Vec<Case> {
    [nonsense(), truncated(), out_of_order(), with_descriptors(), connections()]
        .into_iter()
        .flatten()
        .collect()
}

/// Bytes that are no request: the router hangs up, before and after a Hello.
fn nonsense() -> Vec<Case> {
    let long = |byte| vec![byte; MAX_MESSAGE];
    let hello = encoded(&hello(Mode::Isolated));
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("no byte at all", Vec::new()),
        ("one byte that names no request", vec![0x7f]),
        ("forty bytes of ones", vec![0xff; 40]),
        ("the longest message, of zeros", long(0)),
        ("the longest message, of sevens", long(7)),
        ("one byte more than the longest message", vec![0; MAX_MESSAGE + 1]),
        ("a hundred thousand bytes", vec![2; 100_000]),
        ("a request number that never ends", vec![0x80; 12]),
        ("a request number beyond 32 bits", vec![0xff, 0xff, 0xff, 0xff, 0x7f]),
        ("a Hello in a mode that is none", [&hello[..hello.len() - 1], &[2]].concat()),
        ("a Hello with a byte behind it", [&hello[..], &[0]].concat()),
        ("a request with another behind it", [encoded(&Request::AllocPd), encoded(&Request::Gids)].concat()),
        ("an option that is neither there nor not", bad_option()),
        ("a flag that is neither true nor false", bad_flag()),
        ("a reply", encoded_reply(&Err(5))),
        ("half a request, the other half coming next", encoded(&requests()[4].1)[..5].to_vec()),
    ];
    let case = |(name, bytes): (&str, Vec<u8>)| {
        Case::new(format!("message: {name}"), move |field| {
            for opened in [false, true] {
                let endpoint = if opened { field.open()?.endpoint } else { dial(field.socket())? };
                send(&endpoint, &bytes, SendFlags::NOSIGNAL)?;
                ensure_dropped(&endpoint)?;
            }
            Ok(())
        })
    };
    rows.into_iter().map(case).collect()
}

/// `CreateQp` whose last byte, `sq_sig_all`, is 2.
fn bad_flag() -> Vec<u8> {
    let mut bytes = encoded(&Request::CreateQp(create_qp(1, 1, QpType::Rc)));
    let last = bytes.len() - 1;
    bytes[last] = 2;
    bytes
}

/// `CreateCq` whose channel begins with 2.
fn bad_option() -> Vec<u8> {
    let mut bytes = encoded(&Request::CreateCq { cqe: 1, channel: None });
    let last = bytes.len() - 1;
    bytes[last] = 2;
    bytes
}

fn encoded_reply(reply: &Reply) -> Vec<u8> {
    postcard::to_stdvec(reply).expect("a reply can be encoded")
}

/// Each request, cut off at each byte.
fn truncated() -> Vec<Case> {
    let case = |(name, request): (&str, Request)| {
        let bytes = encoded(&request);
        (bytes.len() > 1).then(|| {
            Case::new(format!("truncated: {name}"), move |field| {
                for len in 1..bytes.len() {
                    let client = field.open()?;
                    send(&client.endpoint, &bytes[..len], SendFlags::NOSIGNAL)?;
                    ensure_dropped(&client.endpoint)?;
                }
                Ok(())
            })
        })
    };
    requests().into_iter().filter_map(case).collect()
}

/// Requests before the Hello, and a second Hello.
fn out_of_order() -> Vec<Case> {
    let case = |(name, request): (&'static str, Request)| {
        Case::new(
            format!("order: {name}, {}", if name == "Hello" { "twice" } else { "before Hello" }),
            move |field| {
                let endpoint = if name == "Hello" { field.open()?.endpoint } else { dial(field.socket())? };
                let file = event()?;
                let count = usize::from(matches!(request, Request::Hello { .. } | Request::CreateChannel));
                endpoint.send(&request, &vec![file.as_fd(); count])?;
                ensure_dropped(&endpoint)
            },
        )
    };
    requests().into_iter().map(case).collect()
}

/// Each request with descriptors that it must not have, and those that need one without.
fn with_descriptors() -> Vec<Case> {
    let case = |(name, request): (&'static str, Request)| {
        Case::new(format!("descriptors: {name} with a wrong number of them"), move |field| {
            let counts: &[usize] = match request {
                Request::Hello { .. } => &[0, 3, MAX_FDS],
                Request::CreateChannel => &[0, 2, MAX_FDS],
                _ => &[1, MAX_FDS],
            };
            let file = event()?;
            let before = descriptors(field)?;
            for count in counts {
                let opened = !matches!(request, Request::Hello { .. });
                let endpoint = if opened { field.open()?.endpoint } else { dial(field.socket())? };
                endpoint.send(&request, &vec![file.as_fd(); *count])?;
                ensure_dropped(&endpoint)?;
            }
            ensure_descriptors(field, before)
        })
    };
    let mut cases: Vec<Case> = requests().into_iter().map(case).collect();
    cases.push(Case::new("descriptors: more than a message may have", too_many));
    cases
}

/// Descriptors that the router holds.
fn descriptors(field: &Field) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", field.router()?))?.count())
}

fn ensure_descriptors(field: &Field, before: usize) -> Result<()> {
    crate::client::eventually("the router closes what it was sent", || Ok(descriptors(field)? <= before))
}

fn too_many(field: &Field) -> Result<()> {
    let file = event()?;
    let before = descriptors(field)?;
    for count in [MAX_FDS + 1, 64, 253] {
        let endpoint = dial(field.socket())?;
        send_raw(&endpoint, &encoded(&hello(Mode::Isolated)), &file, count)?;
        ensure_dropped(&endpoint)?;
    }
    ensure_descriptors(field, before)
}

/// Sends bytes with any number of descriptors.
fn send_raw(endpoint: &Endpoint, bytes: &[u8], file: &OwnedFd, count: usize) -> Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    let fds = vec![file.as_fd(); count];
    let rights = SendAncillaryMessage::ScmRights(&fds);
    let mut space = vec![std::mem::MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(control.push(rights), "no room for {count} descriptors");
    sendmsg(endpoint, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// What is done with whole connections.
fn connections() -> Vec<Case> {
    vec![
        Case::new("connection: of another socket type", |field| {
            let stream = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
            let refused = connect(&stream, &SocketAddrUnix::new(field.socket())?);
            ensure!(refused == Err(Errno::PROTOTYPE), "{refused:?}");
            Ok(())
        }),
        Case::new("connection: closed before a word", |field| {
            (0..200).try_for_each(|_| dial(field.socket()).map(drop))
        }),
        Case::new("connection: a thousand that say nothing", silent),
        Case::new("connection: half of it shut down", |field| {
            for how in [Shutdown::Read, Shutdown::Write] {
                let client = field.open()?;
                shutdown(&client.endpoint, how)?;
                let _ = client.endpoint.send(&Request::Gids, &[]);
                // Shut for writing: the router sees the end. Shut for reading: its reply has nowhere to go.
                field.traffic_goes_on()?;
            }
            Ok(())
        }),
        Case::new("connection: replies that are never read", |field| {
            let deaf = field.open()?;
            let hung_up = (0..200_000).any(|_| deaf.endpoint.send(&Request::Gids, &[]).is_err());
            ensure!(hung_up, "the router keeps replies for ever");
            Ok(())
        }),
        Case::new("connection: requests as fast as they can be sent", flood),
        Case::new("connection: status asked without end", |field| {
            for _ in 0..300 {
                let endpoint = dial(field.socket())?;
                ensure!(ask(&endpoint, &Request::Status, &[])?.0.is_ok(), "no status");
            }
            Ok(())
        }),
        Case::new("connection: ten thousand random messages", random_messages),
        Case::new("connection: a version that is none", |field| {
            let (endpoint, file) = (dial(field.socket())?, event()?);
            for version in [0, 999, u32::MAX] {
                let request = Request::Hello { version, mode: Mode::Direct };
                let (reply, _) = ask(&endpoint, &request, &[file.as_fd()])?;
                ensure!(reply == Err(libc::EPROTONOSUPPORT), "version {version}: {reply:?}");
            }
            Ok(())
        }),
    ]
}

fn silent(field: &Field) -> Result<()> {
    let mut held = Vec::new();
    for _ in 0..1000 {
        // Beyond its limit the router closes them at once, and beyond its backlog nobody waits for it here.
        held.extend(dial(field.socket()));
    }
    field.traffic_goes_on()?;
    drop(held);
    crate::client::eventually("new clients are served again", || Ok(field.open().is_ok()))
}

fn flood(field: &Field) -> Result<()> {
    let client = field.open()?;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        for (name, request) in requests() {
            if matches!(request, Request::Hello { .. } | Request::CreateChannel | Request::AllocPd) {
                continue;
            }
            let reply = client.ask(&request)?;
            ensure!(name == "Gids" || reply.is_err(), "{name} of nothing is answered {reply:?}");
        }
    }
    field.traffic_goes_on()
}

fn random_messages(field: &Field) -> Result<()> {
    let mut random = crate::noise::Noise::new(1);
    let mut client: Option<Client> = None;
    for _ in 0..10_000 {
        let there = match client.take() {
            Some(there) => there,
            None => field.open()?,
        };
        let len = 1 + random.below(40) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        // Requests are small numbers; most of these go further than the first byte.
        bytes[0] %= 20;
        if send(&there.endpoint, &bytes, SendFlags::NOSIGNAL).is_err() {
            continue;
        }
        match there.endpoint.recv::<Reply>() {
            Ok(_) => client = Some(there),
            Err(verbs_abi::proto::ProtoError::Closed) => {}
            Err(error) => bail!("neither an answer nor the end: {error}"),
        }
    }
    Ok(())
}
