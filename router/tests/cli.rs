//! Promises of the program `freeflow`, seen from outside: output, exit codes, what the started program finds.
//!
//! The daemon's service is not tested here. The tree of these tests has empty files for provider and shim, so the
//! dynamic linker of started programs grumbles on standard error; that output is not looked at.

#![expect(clippy::unwrap_used, reason = "what a helper of a test cannot do fails the test")]

use std::{
    fs,
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tempfile::TempDir;

/// A user that owns nothing, which root's tests become where root would be a special case.
const NOBODY: u32 = 65_534;

/// An install tree and a runtime directory of a test's own.
struct Bed {
    dir: TempDir,
    user: Option<u32>,
}

impl Bed {
    /// Runs as whoever runs the tests.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let bed = Self { dir, user: None };
        fs::create_dir(bed.session()).unwrap();
        for part in ["bin", "lib/freeflow", "share/freeflow/sysfs/class/infiniband_verbs/uverbs_ff0"] {
            fs::create_dir_all(bed.prefix().join(part)).unwrap();
        }
        for abi in [25, 33, 34, 57, 59, 64, 65] {
            fs::write(bed.prefix().join(format!("lib/freeflow/libfreeflow-rdmav{abi}.so")), "").unwrap();
        }
        fs::write(bed.shim(), "").unwrap();
        // Copied by a process of its own: a program that another test starts meanwhile would inherit our descriptor,
        // and a file that somebody can write cannot be executed.
        let target = bed.prefix().join("bin/freeflow");
        let mut copy = Command::new("cp");
        assert!(copy.arg(env!("CARGO_BIN_EXE_freeflow")).arg(target).status().unwrap().success());
        bed
    }

    /// Runs as an ordinary user with a session directory.
    fn of_a_user() -> Self {
        let mut bed = Self::new();
        let session = bed.session();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&session, Some(NOBODY), Some(NOBODY)).unwrap();
            bed.user = Some(NOBODY);
        }
        bed
    }

    fn prefix(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn shim(&self) -> PathBuf {
        self.prefix().join("lib/freeflow/libfreeflow-preload.so")
    }

    fn session(&self) -> PathBuf {
        self.dir.path().join("session")
    }

    fn socket(&self) -> PathBuf {
        self.session().join("router.sock")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.prefix().join("bin/freeflow"));
        command.args(args).stdin(Stdio::null()).current_dir("/").env("XDG_RUNTIME_DIR", self.session());
        for name in ["FREEFLOW_SOCKET", "FREEFLOW_PREFIX", "FREEFLOW_LOG", "FREEFLOW_MODE", "LD_PRELOAD"] {
            command.env_remove(name);
        }
        command.env_remove("RDMAV_DRIVERS").env_remove("SYSFS_PATH").env("PATH", "/usr/bin:/bin");
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Starts a router on this bed's socket and waits until it listens.
    fn router(&self, more: &[&str]) -> Router {
        let mut command = self.command(&["router", "--socket", self.socket().to_str().unwrap()]);
        let child = command.args(more).stderr(Stdio::null()).spawn().unwrap();
        let mut router = Router(child);
        wait_until("the router listens", || {
            assert_eq!(router.0.try_wait().unwrap(), None, "the router ended");
            answers(&self.socket())
        });
        router
    }

    /// `freeflow run` with a router of this bed, or none where this host allows no namespace.
    fn run(&self, test: &str, args: &[&str]) -> Option<Output> {
        let socket = self.socket();
        let mut all = vec!["run", "--socket", socket.to_str().unwrap()];
        all.extend(args);
        let output = self.output(&all);
        if output.stderr_has("cannot be made for this program alone") {
            println!("SKIP {test}: this host allows no mount namespace and has no device node");
            return None;
        }
        Some(output)
    }
}

/// A router process; it ends with the test.
struct Router(Child);

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

trait Said {
    fn stdout_text(&self) -> String;
    fn stderr_has(&self, text: &str) -> bool;
}

impl Said for Output {
    fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    fn stderr_has(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.stderr).contains(text)
    }
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited too long until {what}");
        sleep(Duration::from_millis(20));
    }
}

/// Whether somebody listens there.
fn answers(path: &Path) -> bool {
    let address = SocketAddrUnix::new(path).unwrap();
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(socket, &address).is_ok()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

#[test]
fn version_and_help_need_no_install_tree() {
    let version = Command::new(env!("CARGO_BIN_EXE_freeflow")).arg("--version").output().unwrap();
    assert_eq!(version.stdout_text(), format!("freeflow {}\n", env!("CARGO_PKG_VERSION")));
    let help = Command::new(env!("CARGO_BIN_EXE_freeflow")).arg("--help").output().unwrap();
    assert!(help.status.success() && help.stdout_text().contains("freeflow run -- ibv_devinfo"));
}

#[test]
fn completions_and_the_manual_page_come_from_the_program() {
    let bed = Bed::new();
    for shell in ["bash", "fish", "zsh"] {
        let script = bed.output(&["completions", shell]);
        assert!(script.status.success() && script.stdout_text().contains("idle-exit"), "{shell}");
    }
    let page = bed.output(&["man"]).stdout_text();
    assert!(
        page.contains(".TH freeflow 1") && page.contains("FREEFLOW RUN") && page.contains("125"),
        "{page}"
    );
}

#[test]
fn a_wrong_command_line_is_two_and_for_run_125() {
    let bed = Bed::new();
    assert_eq!(code(&bed.output(&["status", "--colour"])), 2);
    assert_eq!(code(&bed.output(&["run"])), 125);
    assert_eq!(code(&bed.output(&["run", "--help"])), 0);
}

#[test]
fn an_incomplete_tree_is_named_with_the_way_to_build_one() {
    let bed = Bed::new();
    fs::remove_file(bed.shim()).unwrap();
    let output = bed.output(&["run", "--", "true"]);
    assert_eq!(code(&output), 125);
    assert!(output.stderr_has("libfreeflow-preload.so missing") && output.stderr_has("cargo xtask build"));
    assert_eq!(code(&bed.output(&["env"])), 1);
}

#[test]
fn env_prints_lines_that_a_shell_can_take() {
    let bed = Bed::new();
    let lines = bed.output(&["env", "--socket", "/tmp/a b.sock", "--mode", "direct"]).stdout_text();
    let script = format!(
        "{lines}printf '%s\\n' \"$SYSFS_PATH\" \"$RDMAV_DRIVERS\" \"$FREEFLOW_SOCKET\" \"$FREEFLOW_MODE\""
    );
    let shell = Command::new("sh").arg("-c").arg(script).output().unwrap();
    let prefix = bed.prefix().display().to_string();
    let wanted =
        format!("{prefix}/share/freeflow/sysfs\n{prefix}/lib/freeflow/libfreeflow\n/tmp/a b.sock\ndirect\n");
    assert_eq!(shell.stdout_text(), wanted);
}

#[test]
fn env_as_json_is_one_object_and_keeps_what_was_preloaded() {
    let bed = Bed::new();
    let output =
        bed.command(&["env", "--shell", "json"]).env("LD_PRELOAD", "/nonexistent/x.so").output().unwrap();
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let preload = format!("{}:/nonexistent/x.so", bed.shim().display());
    assert_eq!(object["LD_PRELOAD"], serde_json::Value::String(preload));
}

#[test]
fn a_second_router_is_refused_and_says_the_pid_of_the_first() {
    let bed = Bed::new();
    let first = bed.router(&[]);
    let second = bed.output(&["router", "--socket", bed.socket().to_str().unwrap()]);
    assert_eq!(code(&second), 3);
    assert!(second.stderr_has(&format!("pid {}", first.0.id())), "{second:?}");
}

#[test]
fn a_killed_routers_socket_is_replaced_and_an_idle_router_removes_its_own() {
    let bed = Bed::new();
    drop(bed.router(&[]));
    assert!(bed.socket().exists(), "a killed router cannot tidy up");
    let mut next = bed.router(&["--idle-exit", "1"]);
    wait_until("the idle router ends", || next.0.try_wait().unwrap().is_some());
    assert!(next.0.wait().unwrap().success());
    assert!(!bed.socket().exists());
}

#[test]
fn a_wrong_configuration_is_refused_with_its_line() {
    let bed = Bed::new();
    let file = bed.dir.path().join("router.toml");
    fs::write(&file, "lanes = 1\nlimit = 5\n").unwrap();
    let output = bed.output(&["router", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), 2);
    assert!(output.stderr_has("line 2") && output.stderr_has("limit"), "{output:?}");
    let output = bed.output(&["router", "--log", "a=b=c", "--socket", bed.socket().to_str().unwrap()]);
    assert_eq!(code(&output), 2, "{output:?}");
}

#[test]
fn without_a_router_status_and_run_say_what_to_do() {
    let bed = Bed::new();
    let socket = bed.socket();
    let status = bed.output(&["status", "--socket", socket.to_str().unwrap()]);
    assert!(code(&status) == 1 && status.stderr_has("no router serves"), "{status:?}");
    let run = bed.output(&["run", "--socket", socket.to_str().unwrap(), "--", "true"]);
    assert!(code(&run) == 125 && run.stderr_has("freeflow router --socket"), "{run:?}");
}

#[test]
fn a_program_ends_as_it_would_without_freeflow() {
    let bed = Bed::of_a_user();
    let _serving = bed.router(&[]);
    let test = "a_program_ends_as_it_would_without_freeflow";
    let Some(output) = bed.run(test, &["--", "sh", "-c", "exit 7"]) else { return };
    assert_eq!(code(&output), 7);
    assert_eq!(code(&bed.run(test, &["--", "/nonexistent/program"]).unwrap()), 127);
    assert_eq!(code(&bed.run(test, &["--", "/etc/passwd"]).unwrap()), 126);
    let killed = bed.run(test, &["--", "sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(killed.status.signal(), Some(libc::SIGTERM));
    let hung_up = bed.run(test, &["--", "sh", "-c", "trap '' PIPE; kill -PIPE $$; echo alive"]).unwrap();
    assert_eq!(hung_up.stdout_text(), "alive\n");
    let pipe = bed.run(test, &["--", "sh", "-c", "kill -PIPE $$; echo alive"]).unwrap();
    assert_eq!(pipe.status.signal(), Some(libc::SIGPIPE), "SIGPIPE is not ignored behind the program's back");
}

#[test]
fn a_program_gets_the_device_and_everything_else_stays() {
    let bed = Bed::of_a_user();
    let _serving = bed.router(&[]);
    let look = "stat -Lc '%t:%T' /dev/infiniband/uverbs_ff0; pwd; id -u; echo $RDMAV_DRIVERS; echo $FREEFLOW_SOCKET; \
                readlink /proc/self/ns/net; ls -1 /dev | grep -vx infiniband | sort | cksum; echo x > /dev/null; \
                head -c1 /dev/zero | wc -c";
    let before =
        Command::new("sh").arg("-c").arg("ls -1 /dev | grep -vx infiniband | sort | cksum").output().unwrap();
    let Some(output) =
        bed.run("a_program_gets_the_device_and_everything_else_stays", &["--", "sh", "-c", look])
    else {
        return;
    };
    let uid = bed.user.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let wanted = format!(
        "1:3\n/\n{uid}\n{}/lib/freeflow/libfreeflow\n{}\n{}\n{}1\n",
        bed.prefix().display(),
        bed.socket().display(),
        fs::read_link("/proc/self/ns/net").unwrap().display(),
        before.stdout_text(),
    );
    assert_eq!(output.stdout_text(), wanted, "{output:?}");
}

#[test]
fn a_run_for_root_leaves_nothing_in_the_hosts_dev() {
    let bed = Bed::new();
    let _serving = bed.router(&[]);
    let existed = Path::new("/dev/infiniband").exists();
    let test = "a_run_for_root_leaves_nothing_in_the_hosts_dev";
    let Some(output) = bed.run(test, &["--", "stat", "-Lc", "%t:%T", "/dev/infiniband/uverbs_ff0"]) else {
        return;
    };
    assert_eq!(output.stdout_text(), "1:3\n", "{output:?}");
    assert_eq!(Path::new("/dev/infiniband").exists(), existed);
}

#[test]
fn a_run_inside_a_run_finds_everything_there() {
    let bed = Bed::of_a_user();
    let _serving = bed.router(&[]);
    let program = bed.prefix().join("bin/freeflow");
    let inner =
        format!("{} run -- sh -c 'echo $LD_PRELOAD; grep -c infiniband /proc/mounts'", program.display());
    let test = "a_run_inside_a_run_finds_everything_there";
    let Some(output) = bed.run(test, &["--", "sh", "-c", &inner]) else { return };
    let text = output.stdout_text();
    assert_eq!(text.lines().next(), Some(bed.shim().to_str().unwrap()), "{output:?}");
}

#[test]
fn many_runs_at_once_start_one_router_that_is_nobodys_child() {
    let bed = Bed::of_a_user();
    let script = "echo $FREEFLOW_SOCKET; ps -o comm= --ppid $$ | grep -c freeflow";
    let spawn = |_| {
        let mut command = bed.command(&["run", "--", "sh", "-c", script]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..8).map(spawn).collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let directory = bed.session().join("freeflow");
    let log = fs::read_to_string(directory.join("router.log")).unwrap();
    let holder = fs::read_to_string(directory.join("router.sock.lock")).unwrap();
    let pid = rustix::process::Pid::from_raw(holder.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    if outputs[0].stderr_has("cannot be made for this program alone") {
        println!("SKIP many_runs_at_once_start_one_router_that_is_nobodys_child: no mount namespace here");
        return;
    }
    assert_eq!(log.matches("serving").count(), 1, "{log}");
    let wanted = format!("{}\n0\n", directory.join("router.sock").display());
    for output in outputs {
        assert_eq!(output.stdout_text(), wanted, "{output:?}");
    }
}

#[test]
fn a_running_program_keeps_its_users_router_from_ending() {
    let bed = Bed::of_a_user();
    let directory = bed.session().join("freeflow");
    let mut command = bed.command(&["router", "--idle-exit", "1"]);
    let mut router = Router(command.stderr(Stdio::null()).spawn().unwrap());
    wait_until("the router listens", || answers(&directory.join("router.sock")));
    let script = "sleep 2.5; ls -1 $(dirname $FREEFLOW_SOCKET)";
    let output = bed.output(&["run", "--", "sh", "-c", script]);
    if output.stderr_has("cannot be made for this program alone") {
        println!("SKIP a_running_program_keeps_its_users_router_from_ending: no mount namespace here");
        return;
    }
    assert!(!directory.join("router.log").exists(), "no second router was started");
    assert!(output.stdout_text().lines().any(|name| name == "router.sock"), "{output:?}");
    wait_until("the idle router ends", || router.0.try_wait().unwrap().is_some());
}

#[test]
fn a_router_that_cannot_start_is_reported_with_its_log() {
    let bed = Bed::of_a_user();
    let output = bed.command(&["run", "--", "true"]).env("FREEFLOW_LOG", "a=b=c").output().unwrap();
    assert_eq!(code(&output), 125);
    assert!(output.stderr_has("ended at once") && output.stderr_has("no log filter"), "{output:?}");
}

#[test]
fn doctor_fails_for_a_tree_that_is_not_complete_and_says_how_to_mend_it() {
    let bed = Bed::of_a_user();
    fs::remove_file(bed.shim()).unwrap();
    let output = bed.output(&["doctor"]);
    let text = output.stdout_text();
    assert_eq!(code(&output), 1, "{text}");
    assert!(text.contains("FAIL  install tree") && text.contains("cargo xtask build"), "{text}");
    for name in [
        "device node",
        "libibverbs",
        "kernel RDMA",
        "router",
        "namespaces",
        "client memory",
        "memfd",
        "open files",
    ] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
}
