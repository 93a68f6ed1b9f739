//! The initial file system of a guest: busybox, the modules that reach the host's files, and two scripts.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{EXCHANGE, Kernel};
use crate::process::{Job, command, run};

const LIMIT: Duration = Duration::from_secs(60);
/// Devices of QEMU: network, shared directories; and a layer that takes what is written.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_net", "9pnet_virtio", "9p", "overlay"];
/// Where Debian's releases put busybox-static.
const BUSYBOX: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];

/// The first program: makes the guest's root file system out of the host's and goes there.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module || echo "init: no $module"; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /root
mount -t tmpfs run /root/run
mkdir -p /root/run/exchange /root/run/netns /root/dev /root/proc /root/sys /root/lib/modules/VERSION
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none exchange /root/run/exchange
mount --bind /hostMODULES /root/lib/modules/VERSION
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
for dir in dev proc sys; do mount --move /$dir /root/$dir; done
hostname NAME
exec switch_root /root /bin/sh /run/exchange/agent
"#;

/// What the first process becomes: it starts and kills scripts as the host tells it, line by line.
const AGENT: &str = r#"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export EXCHANGE=/run/exchange
cd $EXCHANGE
cat >job <<'END'
echo $$ >$1.pid
(cd /tmp && exec sh $EXCHANGE/$1.sh) >$1.out 2>$1.err </dev/null
echo $? >$1.ended
mv $1.ended $1.status
END
agent() {
    stty -echo
    echo >ready
    while read -r verb number; do
        case $verb in
        run) setsid sh job $number & ;;
        kill) kill -KILL -$(cat $number.pid) & ;;
        esac
    done
}
agent </dev/ttyS1 &
# The first process waits for those that nobody else waits for.
while :; do wait; sleep 1; done
"#;

/// A static busybox.
pub(super) fn busybox() -> Option<&'static str> {
    // ldd fails for what needs no libraries.
    let is_static =
        |path| Job::spawn(command(["ldd", path]), LIMIT)?.wait().map(|outcome| !outcome.succeeded());
    BUSYBOX.into_iter().find(|&path| Path::new(path).exists() && is_static(path).unwrap_or(false))
}

/// Writes it, and the agent into the exchange directory, which is where the image lies.
pub(super) fn write(image: &Path, kernel: &Kernel, name: &str) -> Result<()> {
    let busybox = busybox().context("busybox-static is not installed")?;
    let root = TempDir::with_prefix("freeflow-")?;
    for dir in ["bin", "dev", "host", "layer", "modules", "proc", "root", "sys"] {
        fs::create_dir(root.path().join(dir))?;
    }
    fs::copy(busybox, root.path().join("bin/busybox"))?;
    for (index, module) in kernel.modules_for(&MODULES)?.iter().enumerate() {
        let file = module.file_name().context("a module has a name")?.to_string_lossy();
        fs::copy(module, root.path().join(format!("modules/{index:02}-{file}")))?;
    }
    let modules = kernel.modules().display().to_string();
    let init = INIT.replace("VERSION", kernel.version()).replace("MODULES", &modules).replace("NAME", name);
    write_program(&root.path().join("init"), &init)?;
    let exchange = image.parent().context("an image has a directory")?;
    fs::write(exchange.join("agent"), AGENT.replace("/run/exchange", EXCHANGE))?;
    let pack = "cd \"$1\" && find . | \"$3\" cpio -o -H newc >\"$2\"";
    let mut pack = command(["sh", "-c", pack, "sh"]);
    pack.arg(root.path()).arg(image).arg(busybox);
    run(pack, LIMIT).map(|_| ()).context("could not pack the initial file system")
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}
