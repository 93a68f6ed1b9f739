//! Where the command line meets the daemon and its control socket: two functions, no more.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use router::{config::Config, status::Status};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio},
    net::{
        SocketFlags, accept_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use verbs_abi::proto::{Endpoint, ProtoError, Reply, Request};

use super::probe::dial;

/// How long a router may take to tell its status.
const PATIENCE: Duration = Duration::from_secs(5);
/// Ten thousand QPs take about 5 MB.
const LONGEST_STATUS: u64 = 256 << 20;

/// Serves `listener` until the daemon is told to end or has been idle for as long as the configuration says.
///
/// Stands in for the daemon: it accepts connections and waits until they hang up.
pub(crate) fn run_router(config: &Config, listener: OwnedFd) -> anyhow::Result<()> {
    let idle = config.idle_exit().map(|idle| Timespec { tv_sec: idle.as_secs() as i64, tv_nsec: 0 });
    let mut clients: Vec<OwnedFd> = Vec::new();
    loop {
        let fds = std::iter::once(&listener).chain(&clients);
        let mut polled: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let ready = poll(&mut polled, idle.as_ref().filter(|_| clients.is_empty()));
        let events: Vec<_> = polled.iter().map(PollFd::revents).collect();
        match ready {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for clients"),
        }
        let mut gone = events[1..].iter().map(|events| events.contains(PollFlags::HUP));
        clients.retain(|_| !gone.next().unwrap_or(false));
        if !events[0].is_empty() {
            clients.extend(accept_with(&listener, SocketFlags::CLOEXEC));
        }
    }
}

/// Asks the router that serves `socket` about itself.
pub(crate) fn status(socket: &Path) -> anyhow::Result<Status> {
    let connection = dial(socket)?;
    ioctl_fionbio(&connection, false).context("cannot wait on the socket")?;
    set_socket_timeout(&connection, Timeout::Recv, Some(PATIENCE)).context("cannot set a time limit")?;
    let endpoint = Endpoint::new(connection);
    endpoint.send(&Request::Status, &[]).context("cannot ask")?;
    let (reply, descriptors) = match endpoint.recv::<Reply>() {
        Err(ProtoError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("no answer within {} s; it hangs, or is stopped", PATIENCE.as_secs())
        }
        result => result.context("no answer that this program understands")?,
    };
    if let Err(errno) = reply {
        bail!("it refused: {}", io::Error::from_raw_os_error(errno));
    }
    let file = File::from(descriptors.into_iter().next().context("the answer came without its text")?);
    parse(&file)
}

/// Reads the answer's text from the start, wherever the router left the file's position.
fn parse(file: &File) -> anyhow::Result<Status> {
    let length = file.metadata().context("cannot look at the answer")?.len();
    ensure!(length <= LONGEST_STATUS, "the answer is too long: {length} bytes");
    let mut text = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut text, 0).context("cannot read the answer")?;
    serde_json::from_slice(&text).context("the answer is not a status that this program understands")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::{
        fs::{MemfdFlags, memfd_create},
        net::{AddressFamily, SocketAddrUnix, SocketType, accept, bind, listen, socket},
    };
    use verbs_abi::proto::Answer;

    use super::*;

    /// Answers one status request.
    fn serve(listener: &OwnedFd, reply: Reply, text: &str) {
        let endpoint = Endpoint::new(accept(listener).unwrap());
        assert_eq!(endpoint.recv::<Request>().unwrap().0, Request::Status);
        let file = File::from(memfd_create(c"status", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(text.as_bytes(), 0).unwrap();
        endpoint.send(&reply, &[file.as_fd()]).unwrap();
    }

    #[test]
    fn a_status_crosses_the_socket_and_a_refusal_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let sent = Status { version: "1.2.3".into(), pid: 7, ..Status::default() };
        let text = serde_json::to_string(&sent).unwrap();
        let router = std::thread::spawn(move || {
            serve(&listener, Ok(Answer::Done), &text);
            serve(&listener, Ok(Answer::Done), "{ \"version\": \"9\", \"a word of the future\": 1 }");
            serve(&listener, Ok(Answer::Done), "no JSON");
            serve(&listener, Err(libc::EACCES), "");
        });
        assert_eq!(status(&path).unwrap(), sent);
        assert_eq!(status(&path).unwrap().version, "9", "another version's status can be read");
        assert!(format!("{:#}", status(&path).unwrap_err()).contains("not a status"));
        assert!(format!("{:#}", status(&path).unwrap_err()).contains("refused: Permission denied"));
        router.join().unwrap();
    }
}
