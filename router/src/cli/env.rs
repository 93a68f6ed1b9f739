//! `freeflow env`: the variables, for those who do not want `freeflow run`.
//!
//! Does: print them as a shell, a program or a container engine reads them.
//! Leaves to others: which they are (variables).

use std::{
    env,
    ffi::OsStr,
    fmt::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use super::{
    Failure,
    beside::{self, Beside},
    install::Tree,
    node::{self, MEND, Node},
    runtime::Socket,
    variables::{Mode, Variables, variables},
};

/// Where a container gets the install tree and the socket's directory. The tree works from anywhere.
const CONTAINER_TREE: &str = "/opt/freeflow";
const CONTAINER_RUN: &str = "/run/freeflow";
/// The sysfs tree that shows the kernel's devices, too.
const CONTAINER_SYSFS: &str = "/opt/freeflow-sysfs";

const MORE: &str = "\
Examples:
  eval \"$(freeflow env)\"
  freeflow env --shell fish | source
  docker run $(freeflow env --shell docker) IMAGE ib_write_bw     (podman alike)
  freeflow env --shell json";

#[derive(Debug, clap::Args)]
#[command(after_help = MORE)]
pub(crate) struct Args {
    /// The router's control socket [env: FREEFLOW_SOCKET]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Who executes the programs' work requests
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Show the kernel's RDMA devices, too, beside ff0
    #[arg(long)]
    kernel_devices: bool,
    /// How to print the variables
    #[arg(long, value_enum, default_value_t = Shell::Sh)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    /// `export` lines (sh, bash, zsh, dash)
    Sh,
    /// `set -gx` lines
    Fish,
    /// One object
    Json,
    /// Options of `docker run` and `podman run`: device, mounts and variables
    Docker,
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let tree = Tree::find_complete()?;
    let socket = Socket::choose(args.socket.as_deref())?;
    if args.shell == Shell::Docker {
        let beside =
            if args.kernel_devices { Some(beside::tree_for(&Tree::at(CONTAINER_TREE))?) } else { None };
        return super::print(&container_options(&tree, &socket.path, args.mode, beside.as_ref())?);
    }
    if node::look() != Node::Usable {
        eprintln!("freeflow: {} is missing here; as root run `{MEND}`", node::NODE);
    }
    let sysfs = if args.kernel_devices { beside::tree_for_here(&tree)? } else { tree.sysfs() };
    let variables = variables(&tree, &sysfs, &socket.path, args.mode, |name| env::var_os(name));
    super::print(&shell_text(args.shell, &variables)?)
}

fn shell_text(shell: Shell, variables: &Variables) -> anyhow::Result<String> {
    let mut text = String::new();
    if shell == Shell::Json {
        let pairs = variables.iter().map(|(name, value)| Ok(((*name).to_owned(), plain(value)?.into())));
        let object = pairs.collect::<anyhow::Result<serde_json::Map<_, _>>>()?;
        text = serde_json::to_string_pretty(&object).context("cannot write JSON")?;
        text.push('\n');
        return Ok(text);
    }
    for (name, value) in variables {
        let value = plain(value)?;
        match shell {
            Shell::Fish => {
                writeln!(text, "set -gx {name} '{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
            }
            _ => writeln!(text, "export {name}={}", quoted(value)),
        }
        .context("cannot write text")?;
    }
    Ok(text)
}

/// One line of options. The socket's directory is mounted, not the socket: a new router makes a new socket.
fn container_options(
    tree: &Tree,
    socket: &Path,
    mode: Option<Mode>,
    beside: Option<&Beside>,
) -> anyhow::Result<String> {
    let (directory, name) = socket
        .parent()
        .zip(socket.file_name())
        .with_context(|| format!("{} is no path of a socket", socket.display()))?;
    let (prefix, directory) = (plain(tree.prefix().as_os_str())?, plain(directory.as_os_str())?);
    ensure!(
        !directory.contains(':'),
        "{directory:?} has a colon in it, which -v takes for the end of a path"
    );
    let mut options = vec![
        format!("--device=/dev/null:{}", node::NODE),
        format!("--volume={prefix}:{CONTAINER_TREE}:ro"),
        format!("--volume={directory}:{CONTAINER_RUN}"),
    ];
    let inside = Tree::at(CONTAINER_TREE);
    let mut sysfs = inside.sysfs();
    if let Some(Beside { sysfs: outside, nodes }) = beside {
        options.extend(nodes.iter().map(|node| format!("--device={node}")));
        options.push(format!("--volume={}:{CONTAINER_SYSFS}:ro", plain(outside.as_os_str())?));
        sysfs = PathBuf::from(CONTAINER_SYSFS);
    }
    let socket = Path::new(CONTAINER_RUN).join(name);
    for (name, value) in variables(&inside, &sysfs, &socket, mode, |_| None) {
        options.push(format!("--env={name}={}", plain(&value)?));
    }
    let line: Vec<_> = options.iter().map(|option| quoted(option)).collect();
    Ok(line.join(" ") + "\n")
}

fn plain(value: &OsStr) -> anyhow::Result<&str> {
    value.to_str().with_context(|| format!("{value:?} is not UTF-8 and cannot be printed faithfully"))
}

/// `text` as one word of a shell; plain words stay bare, so that `$(freeflow env --shell docker)` splits right.
fn quoted(text: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "/._-+:=,@%".contains(c);
    if !text.is_empty() && text.chars().all(bare) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_special_characters_are_quoted() {
        assert_eq!(quoted("/opt/free-flow_1.0"), "/opt/free-flow_1.0");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's $HOME"), "'it'\\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn a_container_gets_device_tree_socket_and_variables_of_its_own_paths() {
        let line =
            container_options(&Tree::at("/srv/ff"), Path::new("/run/x/r.sock"), Some(Mode::Direct), None)
                .unwrap();
        for option in [
            "--device=/dev/null:/dev/infiniband/uverbs_ff0",
            "--volume=/srv/ff:/opt/freeflow:ro",
            "--volume=/run/x:/run/freeflow",
            "--env=SYSFS_PATH=/opt/freeflow/share/freeflow/sysfs",
            "--env=RDMAV_DRIVERS=/opt/freeflow/lib/freeflow/libfreeflow",
            "--env=LD_PRELOAD=/opt/freeflow/lib/freeflow/libfreeflow-preload.so",
            "--env=FREEFLOW_SOCKET=/run/freeflow/r.sock",
            "--env=FREEFLOW_MODE=direct",
        ] {
            assert!(line.split_whitespace().any(|word| word == option), "{option} not in {line}");
        }
    }

    #[test]
    fn a_container_with_the_kernels_devices_gets_their_nodes_and_a_tree_that_shows_them() {
        let beside = Beside {
            sysfs: "/run/freeflow/sysfs-1".into(),
            nodes: vec!["/dev/infiniband/uverbs0".to_owned()],
        };
        let line =
            container_options(&Tree::at("/srv/ff"), Path::new("/run/x/r.sock"), None, Some(&beside)).unwrap();
        for option in [
            "--device=/dev/infiniband/uverbs0",
            "--volume=/run/freeflow/sysfs-1:/opt/freeflow-sysfs:ro",
            "--env=SYSFS_PATH=/opt/freeflow-sysfs",
        ] {
            assert!(line.split_whitespace().any(|word| word == option), "{option} not in {line}");
        }
    }

    #[test]
    fn fish_and_sh_quote_in_their_own_way() {
        let variables: Variables = vec![("A", "it's".into())];
        assert_eq!(shell_text(Shell::Sh, &variables).unwrap(), "export A='it'\\''s'\n");
        assert_eq!(shell_text(Shell::Fish, &variables).unwrap(), "set -gx A 'it\\'s'\n");
    }
}
