//! Virtual machines whose kernel has RDMA: a guest, or two joined by a cable, in which scripts run as root.
//!
//! A guest boots a kernel of Debian ([`kernel`]) from an initial file system of our own ([`initramfs`]). Inside, the root
//! file system is this host's: all programs, libraries and the install tree lie at the same paths. What a guest
//! writes there is its own and gone with it; only its exchange directory is shared with the host, at [`EXCHANGE`].
//! `/run`, `/dev`, `/proc` and `/sys` are the guest's. What the host changes after the boot may not be seen inside.
//!
//! How to use it:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use std::{path::Path, time::Duration};
//! use xtask::vm::{Guest, Kernel};
//!
//! let limit = Duration::from_secs(60);
//! let kernel = Kernel::prepare(Path::new("."))?; // fetched once, then cached in target/vm
//! let [left, right] = Guest::pair(&kernel)?; // or Guest::boot(&kernel) for a single one
//! for guest in [&left, &right] {
//!     guest.add_rxe()?; // `rxe0` on the guest's end of the cable, eth0
//! }
//! let server = left.start("ib_write_bw -d rxe0 -x 1 -F", limit)?; // a script for sh, in the background
//! left.wait_for_listener("", 18515)?;
//! right.run(&format!("ib_write_bw -d rxe0 -x 1 -F {}", left.address()), limit)?; // fails unless it ends with 0
//! server.wait()?.success()?;
//! # Ok(())
//! # }
//! ```
//!
//! - `eth0` is the cable, with [`Guest::address`] and [`Guest::address6`] (`10.9.0.1` and `10.9.0.2`, jumbo frames). A
//!   single guest has it as well, with nobody at the other end.
//! - A guest is a host of FreeFlow by [`Guest::add_container`] and [`Guest::start_router`]: the containers of two guests
//!   reach each other, and the routers know each other by a directory in a file. [`Guest::in_container`] makes the words
//!   for a client.
//! - Files for a script go into [`Guest::exchange`], which it sees as `$EXCHANGE`.
//! - Several jobs run side by side in a guest; each in a session of its own, so that its end takes its children along.
//! - A guest ends when its value is dropped. [`Guest::kill`] ends it like a power cut; the other end of the cable goes on.
//! - What happened stays in `target/vm/guest-*` until the next boot: `console` of the kernel, and for each script its
//!   text, `out`, `err` and `status`.
//! - There is no KVM in many places, and then a guest is some twenty times slower: boot once, check much; figures are
//!   ratios within a guest.

mod host;
mod initramfs;
mod job;
mod kernel;

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

pub use self::{job::GuestJob, kernel::Kernel};
use crate::{
    interrupt,
    process::{Job, Outcome, command, has_program},
};

/// Where a guest sees its exchange directory.
pub const EXCHANGE: &str = "/run/exchange";

/// What goes before a command to run it in the container of a guest, without the virtual RNIC.
pub const ENTER: &str = "nsenter --net=/run/netns/box";

const QEMU: &str = "qemu-system-x86_64";
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// A guest whose starter was killed ends after this many seconds.
const LIFE_SECONDS: u64 = 45 * 60;
const SHORT: Duration = Duration::from_secs(60);
const PREFIX: &str = "guest-";

/// Why no guest can be booted here, where none can.
#[must_use]
pub fn obstacle() -> Option<String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Some("guests are for x86-64".to_owned());
    }
    let missing = [QEMU, "modprobe", "depmod", "dpkg-deb"].into_iter().find(|name| !has_program(name));
    let missing = missing.or(initramfs::busybox().is_none().then_some("busybox-static"));
    missing.map(|name| format!("{name} is not installed"))
}

/// A running virtual machine.
#[derive(Debug)]
pub struct Guest {
    name: &'static str,
    /// Which end of the cable it has: 1 or 2.
    end: usize,
    machine: Mutex<Job>,
    control: Mutex<UnixStream>,
    dir: PathBuf,
    scripts: AtomicU32,
    _sockets: TempDir,
    /// Its end has a name in there, by which the other one sends.
    _cable: Arc<TempDir>,
}

impl Guest {
    /// Boots one.
    pub fn boot(kernel: &Kernel) -> Result<Arc<Self>> {
        let guest = Self::power_on(kernel, "guest", 1, &Arc::new(TempDir::with_prefix("freeflow-")?))?;
        guest.wait_until_up()?;
        Ok(guest)
    }

    /// Boots two, `left` and `right`, with a cable between their `eth0`.
    pub fn pair(kernel: &Kernel) -> Result<[Arc<Self>; 2]> {
        let cable = Arc::new(TempDir::with_prefix("freeflow-")?);
        let left = Self::power_on(kernel, "left", 1, &cable)?;
        let right = Self::power_on(kernel, "right", 2, &cable)?;
        left.wait_until_up()?;
        right.wait_until_up()?;
        Ok([left, right])
    }

    fn power_on(kernel: &Kernel, name: &'static str, end: usize, cable: &Arc<TempDir>) -> Result<Arc<Self>> {
        let dir = make_directory(kernel.cache(), name)?;
        let image = dir.join("initramfs");
        initramfs::write(&image, kernel, name)?;
        let sockets = TempDir::with_prefix("freeflow-")?;
        let control = sockets.path().join("control");
        let listener = UnixListener::bind(&control)?;
        let machine = Job::spawn(
            Machine { kernel, image: &image, dir: &dir, control: &control, cable: cable.path(), end }
                .command(),
            Duration::from_secs(LIFE_SECONDS),
        )?;
        let mut machine = machine;
        let control = accept(&listener, &mut machine)?;
        Ok(Arc::new(Self {
            name,
            end,
            machine: Mutex::new(machine),
            control: Mutex::new(control),
            dir,
            scripts: AtomicU32::new(0),
            _sockets: sockets,
            _cable: Arc::clone(cable),
        }))
    }

    fn wait_until_up(self: &Arc<Self>) -> Result<()> {
        let start = Instant::now();
        while !self.dir.join("ready").exists() {
            interrupt::check()?;
            self.check_alive()?;
            if start.elapsed() > BOOT_LIMIT {
                bail!("the guest {} did not boot within {BOOT_LIMIT:?}: {}", self.name, self.console_tail());
            }
            thread::sleep(Duration::from_millis(50));
        }
        eprintln!("vm: {} is up ({})", self.name, self.dir.display());
        let network = format!(
            "set -e; ip link set lo up; ip link set eth0 mtu 9000 up\n\
             ip address add {}/24 dev eth0; ip address add {}/64 dev eth0 nodad\n",
            self.address(),
            self.address6()
        );
        self.run(&network, SHORT).map(|_| ())
    }

    /// Its IPv4 address on the cable.
    pub fn address(&self) -> String {
        format!("10.9.0.{}", self.end)
    }

    /// Its IPv6 address on the cable.
    pub fn address6(&self) -> String {
        format!("fd09::{}", self.end)
    }

    /// Its directory that both sides see, on this side.
    pub fn exchange(&self) -> &Path {
        &self.dir
    }

    /// Gives it the software RNIC `rxe0` on `eth0`, with the kernel's rdma_cm. GID 0 is link-local, 1 IPv4, 2 IPv6.
    pub fn add_rxe(self: &Arc<Self>) -> Result<()> {
        let script = "modprobe -a rdma_rxe rdma_ucm ib_uverbs && rdma link add rxe0 type rxe netdev eth0";
        self.run(script, SHORT).map(|_| ())
    }

    /// Runs a script to its end; fails unless that is 0.
    pub fn run(self: &Arc<Self>, script: &str, limit: Duration) -> Result<Outcome> {
        let outcome = self.start(script, limit)?.wait()?;
        outcome.success()?;
        Ok(outcome)
    }

    /// Starts a script for `sh`, which may run for `limit` from now.
    pub fn start(self: &Arc<Self>, script: &str, limit: Duration) -> Result<GuestJob> {
        self.check_alive()?;
        let number = self.scripts.fetch_add(1, Ordering::Relaxed);
        let job = GuestJob::new(self, number, script, limit);
        fs::write(job.file("sh"), script)?;
        self.tell(&format!("run {number}"))?;
        Ok(job)
    }

    /// Waits until a TCP port of the guest is open; of its container, where `enter` is [`ENTER`] in place of nothing.
    pub fn wait_for_listener(self: &Arc<Self>, enter: &str, port: u16) -> Result<()> {
        let script = format!(
            "for i in $(seq 300); do [ -n \"$({enter} ss -Hltn sport = :{port})\" ] && exit 0; sleep 0.1; done; exit 1"
        );
        self.run(&script, SHORT).map(|_| ()).with_context(|| format!("nobody listens on port {port}"))
    }

    /// Ends it at once, as a power cut would.
    pub fn kill(&self) {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.kill();
    }

    /// What its kernel has said so far.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n  ")
    }

    fn check_alive(&self) -> Result<()> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        if machine.has_ended()? {
            bail!("the guest {} is gone: {}\n  {}", self.name, machine.stderr(), self.console_tail());
        }
        Ok(())
    }

    /// A line to the agent inside.
    fn tell(&self, line: &str) -> Result<()> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.write_all(format!("{line}\n").as_bytes()).context("the guest does not listen")
    }
}

/// What a machine is made of.
struct Machine<'a> {
    kernel: &'a Kernel,
    image: &'a Path,
    dir: &'a Path,
    control: &'a Path,
    cable: &'a Path,
    end: usize,
}

impl Machine<'_> {
    fn command(&self) -> Command {
        let (end, cable) = (self.end, self.cable.display());
        // Whoever kills us takes a guest's starter along, not the guest: that has a time limit of its own.
        let mut qemu = command(["timeout", "--kill-after=5", &LIFE_SECONDS.to_string(), QEMU]);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-m",
            "1536",
            "-smp",
            "2",
        ]);
        qemu.args(if kvm_is_usable() {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            // Five levels of page tables would only make the emulation slower.
            ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
        });
        qemu.arg("-kernel").arg(self.kernel.image()).arg("-initrd").arg(self.image);
        qemu.args(["-append", "console=ttyS0 panic=-1 loglevel=6 mitigations=off"]);
        qemu.args(["-serial", &format!("file:{}", self.dir.join("console").display())]);
        qemu.args(["-chardev", &format!("socket,id=control,path={}", self.control.display())]);
        qemu.args(["-serial", "chardev:control"]);
        share(&mut qemu, "host", Path::new("/"), "readonly=on,multidevs=remap");
        share(&mut qemu, "exchange", self.dir, "readonly=off");
        // Datagrams, so that either end may come and go without the other.
        let ends = format!("local.path={cable}/{end},remote.type=unix,remote.path={cable}/{}", 3 - end);
        qemu.args(["-netdev", &format!("dgram,id=cable,local.type=unix,{ends}")]);
        qemu.args(["-device", &format!("virtio-net-pci,netdev=cable,mac=52:54:00:00:00:0{end}")]);
        qemu
    }
}

fn share(qemu: &mut Command, tag: &str, path: &Path, options: &str) {
    let path = path.display();
    qemu.args(["-fsdev", &format!("local,id={tag},path={path},security_model=none,{options}")]);
    qemu.args(["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
}

/// Some virtual machines have the device, but no processor that can do it.
fn kvm_is_usable() -> bool {
    let openable = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    openable && processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// A new directory for a guest; those of makers that are no more (their process number is in the name) are removed.
fn make_directory(cache: &Path, name: &str) -> Result<PathBuf> {
    static MADE: AtomicU32 = AtomicU32::new(0);
    for entry in fs::read_dir(cache)?.flatten() {
        let file_name = entry.file_name().to_string_lossy().into_owned();
        let maker = file_name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if maker.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    let (id, count) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let dir = cache.join(format!("{PREFIX}{id}-{count}-{name}"));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// The connection of a machine that was just started.
fn accept(listener: &UnixListener, machine: &mut Job) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    loop {
        interrupt::check()?;
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            stream.set_write_timeout(Some(SHORT))?;
            return Ok(stream);
        }
        if machine.has_ended()? || start.elapsed() > SHORT {
            bail!("{QEMU} did not start: {}", machine.stderr());
        }
        thread::sleep(Duration::from_millis(10));
    }
}
