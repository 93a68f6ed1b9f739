//! Hostile clients that are processes of their own, since what is tried is done to a process: this program, started
//! again with a part to play.

use std::{
    env,
    fs::File,
    io::Write as _,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Pid, Signal, kill_process},
};
use verbs_abi::{
    proto::{Answer, Endpoint, Mode, Request},
    verbs::QpType,
};

use crate::client::{Client, LEN, RIGHTS, ask, dial, event, eventually, hello};

/// The first word of a puppet's command line.
pub(crate) const MARK: &str = "--puppet";
/// How long a puppet lives at most.
const LIFE: Duration = Duration::from_secs(120);
/// Steps of a device's life, from connecting to a connected QP.
pub(crate) const STEPS: usize = 6;

/// A puppet, as its master holds it.
#[derive(Debug)]
pub(crate) struct Puppet {
    child: Child,
    said: File,
}

impl Puppet {
    /// Starts one with these words, and something in the place of its standard input.
    pub(crate) fn start(words: &[&str], input: Option<OwnedFd>) -> Result<Self> {
        let said = tempfile::tempfile()?;
        let mut command = Command::new(env::current_exe()?);
        command.arg(MARK).args(words).stdout(said.try_clone()?).stderr(Stdio::inherit());
        command.stdin(input.map_or_else(Stdio::null, Stdio::from));
        Ok(Self { child: command.spawn()?, said })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has printed.
    pub(crate) fn said(&self) -> Result<String> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; usize::try_from(self.said.metadata()?.len())?];
        self.said.read_exact_at(&mut bytes, 0)?;
        Ok(String::from_utf8(bytes)?)
    }

    /// Waits until it has printed a whole line that begins so; returns the rest of the line.
    pub(crate) fn wait_for(&self, word: &str) -> Result<String> {
        let mut found = None;
        eventually(&format!("a puppet says {word}"), || {
            let said = self.said()?;
            let lines = said.rsplit_once('\n').map_or("", |(whole, _)| whole).lines();
            found =
                lines.filter_map(|line| line.strip_prefix(word)).map(|rest| rest.trim().to_owned()).next();
            Ok(found.is_some())
        })?;
        found.context("it was found")
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        // Not waited for yet, so the number is its own.
        kill_process(Pid::from_child(&self.child), signal)?;
        Ok(())
    }

    /// Kills it and waits for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self) -> Result<()> {
        eventually("a puppet ends", || Ok(self.child.try_wait()?.is_some()))
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Plays the part that the command line names, if it names one.
pub(crate) fn play() -> Option<ExitCode> {
    let words: Vec<String> = env::args().skip(1).collect();
    let (mark, words) = words.split_first()?;
    if mark != MARK {
        return None;
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match perform(&words) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            say(&format!("FAILED {error:#}"));
            Some(ExitCode::FAILURE)
        }
    }
}

fn say(line: &str) {
    // One write, so that a reader sees whole lines.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
    let _ = std::io::stdout().flush();
}

fn perform(words: &[&str]) -> Result<()> {
    match words {
        ["device", socket, mode, steps] => {
            let device = Device::new(Path::new(socket), mode_of(mode), steps.parse()?)?;
            say(&format!("READY {}", device.qpn));
            thread::sleep(LIFE);
        }
        ["peer", socket, mode, qpn] => {
            let device = Device::new(Path::new(socket), mode_of(mode), STEPS - 1)?;
            device.connect(qpn.parse()?)?;
            say(&format!("READY {} {} {}", device.qpn, device.key, device.private.as_ptr().addr()));
            thread::sleep(LIFE);
        }
        ["exec", socket, qpn] => {
            let device = Device::new(Path::new(socket), Mode::Isolated, STEPS - 1)?;
            device.connect(qpn.parse()?)?;
            for file in device.kept() {
                fcntl_setfd(file, FdFlags::empty())?;
            }
            say(&format!("READY {} {} {}", device.qpn, device.key, device.private.as_ptr().addr()));
            return Err(Command::new("sleep").arg(LIFE.as_secs().to_string()).exec().into());
        }
        ["speak"] => speak(Duration::ZERO)?,
        ["speak-later", parent] => {
            let parent: i32 = parent.parse()?;
            eventually("the parent is gone", || Ok(!Path::new(&format!("/proc/{parent}")).exists()))?;
            speak(Duration::ZERO)?;
        }
        ["leave", socket] => {
            let endpoint = dial(Path::new(socket))?;
            let own = std::process::id().to_string();
            let mut child = Command::new(env::current_exe()?);
            child.args([MARK, "speak-later", &own]).stdin(endpoint.as_fd().try_clone_to_owned()?);
            child.spawn()?;
        }
        ["unsealed", program, socket] => crate::unsealed::serve(Path::new(program), Path::new(socket))?,
        _ => bail!("no such part: {words:?}"),
    }
    Ok(())
}

fn mode_of(word: &str) -> Mode {
    if word == "direct" { Mode::Direct } else { Mode::Isolated }
}

/// Opens a device over a connection that another process made, and stays.
fn speak(before: Duration) -> Result<()> {
    thread::sleep(before);
    let endpoint = Endpoint::new(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (events, memory) = (event()?, File::options().read(true).write(true).open("/proc/self/mem")?);
    match ask(&endpoint, &hello(Mode::Isolated), &[events.as_fd(), memory.as_fd()])?.0 {
        Ok(_) => say("OPENED"),
        Err(errno) => {
            say(&format!("REFUSED {errno}"));
            return Ok(());
        }
    }
    while let Ok((reply, _)) = ask(&endpoint, &Request::AllocPd, &[]) {
        ensure!(matches!(reply, Ok(Answer::Handle(_)) | Err(libc::ENOMEM)), "{reply:?}");
    }
    say("DROPPED");
    Ok(())
}

/// A device that has come some steps far.
struct Device {
    _endpoint: Option<Endpoint>,
    client: Option<Client>,
    qp: Option<crate::client::Qp>,
    qpn: u32,
    key: u32,
    /// Memory that was not moved.
    private: Vec<u64>,
}

impl Device {
    fn new(socket: &Path, mode: Mode, steps: usize) -> Result<Self> {
        let mut device =
            Self { _endpoint: None, client: None, qp: None, qpn: 0, key: 0, private: vec![0x1111; 1024] };
        let endpoint = dial(socket)?;
        if steps == 0 {
            device._endpoint = Some(endpoint);
            return Ok(device);
        }
        let client = Client::on(endpoint, mode)?;
        let pd = if steps > 1 { client.pd()? } else { 0 };
        let cq = if steps > 2 { client.cq(None)?.0 } else { 0 };
        if steps > 3 {
            client.mr(pd, 0, LEN as u64, RIGHTS)?;
            let addr = device.private.as_ptr().addr() as u64;
            let reg = verbs_abi::proto::RegMr {
                addr,
                iova: addr,
                len: 8192,
                shared_start: 0,
                shared_end: 0,
                ..crate::client::reg_mr(pd, 0, 8192, RIGHTS)
            };
            let Ok(Answer::Mr { key }) = client.ask(&Request::RegMr(reg))? else { bail!("no MR") };
            device.key = key;
        }
        if steps > 4 {
            let qp = client.qp(pd, cq, QpType::Rc)?;
            device.qpn = qp.new.qpn;
            if steps > 5 {
                client.connect(&qp, (qp.new.qpn, client.gid()?))?;
            }
            device.qp = Some(qp);
        }
        device.client = Some(client);
        Ok(device)
    }

    fn connect(&self, peer: u32) -> Result<()> {
        let (client, qp) = self.client.as_ref().zip(self.qp.as_ref()).context("no QP")?;
        client.connect(qp, (peer, client.gid()?))?;
        // As a provider does in the middle of a post.
        let _ = qp.area.header.seat().enter(false);
        Ok(())
    }

    /// What an exec takes along.
    fn kept(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.client.iter().map(|client| client.endpoint.as_fd()).collect()
    }
}
