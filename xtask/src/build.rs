//! `cargo xtask build`: the install tree, relocatable, in the target directory.
//!
//! ```text
//! freeflow/bin/freeflow                                the router and the command line
//!          lib/freeflow/libfreeflow-rdmavNN.so         the provider, one file under many names
//!          lib/freeflow/libfreeflow-preload.so         the shim before libibverbs' netlink question
//!          share/freeflow/sysfs/                       where libibverbs finds ff0
//!          share/{man,bash-completion,zsh,fish}/       what clap generates
//! ```
//!
//! The tree is made beside the old one and takes its place at the end, so a failed build leaves the old one whole.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;
use xtask::tree::{PROVIDER_ABIS, Tree};

use crate::workspace;

/// How the shim is compiled; why is said in its own header, which a test compares with this.
const SHIM_OPTIONS: [&str; 20] = [
    "--edition",
    "2024",
    "--crate-type",
    "cdylib",
    "--crate-name",
    "freeflow_preload",
    "-C",
    "panic=abort",
    "-C",
    "opt-level=2",
    "-C",
    "strip=symbols",
    "-C",
    "link-arg=-nostartfiles",
    "-C",
    "link-arg=-nodefaultlibs",
    "-C",
    "link-arg=-Wl,--as-needed",
    "-C",
    "link-arg=-Wl,-soname,libfreeflow-preload.so",
];

/// The minor number of the glibc of Debian 11, the oldest system whose containers are served.
const OLDEST_GLIBC: u32 = 31;

#[derive(Args, Debug, Default)]
pub(crate) struct Options {
    /// Build without optimisation
    #[arg(long)]
    debug: bool,
}

pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let tree = build(options)?;
    println!("The install tree is in {}", tree.prefix().display());
    println!("Try: {} run -- ibv_devinfo", tree.program().display());
    Ok(ExitCode::SUCCESS)
}

/// The tree that the user names, else a fresh one.
pub(crate) fn tree(prefix: Option<&Path>) -> Result<Tree> {
    if let Some(prefix) = prefix {
        // Absolute: commands that run elsewhere (containers, namespaces) get this path.
        let tree =
            Tree::at(prefix.canonicalize().with_context(|| format!("no tree in {}", prefix.display()))?);
        tree.check()?;
        return Ok(tree);
    }
    println!("Building the install tree ...");
    build(&Options::default())
}

/// A tree at another place, with another program `freeflow` in it.
pub(crate) fn tree_with_program(program: &Path, prefix: &Path) -> Result<Tree> {
    let (ours, other) = (tree(None)?, Tree::at(prefix));
    remove(prefix)?;
    copy_folder(ours.prefix(), prefix)?;
    install(program, &other.program())?;
    other.check()?;
    Ok(other)
}

/// Builds the tree and returns it.
fn build(options: &Options) -> Result<Tree> {
    let built = compile(options)?;
    let target = built.target_directory()?;
    let fresh = Tree::at(target.join("freeflow.new"));
    remove(fresh.prefix())?;
    lay_out(&fresh, &built)?;
    fresh.check()?;

    let (tree, old) = (Tree::at(target.join("freeflow")), target.join("freeflow.old"));
    remove(&old)?;
    if tree.prefix().exists() {
        fs::rename(tree.prefix(), &old)?;
    }
    fs::rename(fresh.prefix(), tree.prefix())?;
    remove(&old)?;
    Ok(tree)
}

/// Builds the tests' own verbs program.
pub(crate) fn probe() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "freeflow", "--bin", "freeflow-probe"]);
    command.arg("--message-format=json-render-diagnostics");
    let output = command.stderr(Stdio::inherit()).output().context("could not start cargo")?;
    ensure!(output.status.success(), "cargo build failed");
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    program.context("cargo built no program `freeflow-probe`")
}

/// What cargo made.
#[derive(Debug)]
struct Built {
    program: PathBuf,
    provider: PathBuf,
}

impl Built {
    /// `target/release/freeflow` lies two levels below the target directory.
    fn target_directory(&self) -> Result<PathBuf> {
        let directory = self.program.parent().and_then(Path::parent);
        Ok(directory.context("cargo built a program in no target directory")?.to_owned())
    }
}

fn compile(options: &Options) -> Result<Built> {
    let mut command = cargo();
    command.args(["build", "--package", "provider", "--package", "router"]);
    command.arg("--message-format=json-render-diagnostics");
    if !options.debug {
        command.arg("--release");
    }
    let output = command.stderr(Stdio::inherit()).output().context("could not start cargo")?;
    ensure!(output.status.success(), "cargo build failed");
    artefacts(&String::from_utf8_lossy(&output.stdout))
}

/// The files among cargo's messages, one JSON object a line.
fn artefacts(messages: &str) -> Result<Built> {
    let (mut program, mut provider) = (None, None);
    for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        if message["target"]["name"] != "freeflow" {
            continue;
        }
        let files = message["filenames"].as_array().into_iter().flatten().filter_map(Value::as_str);
        provider = files
            .map(PathBuf::from)
            .find(|file| file.extension().is_some_and(|end| end == "so"))
            .or(provider);
        program = message["executable"].as_str().map(PathBuf::from).or(program);
    }
    Ok(Built {
        program: program.context("cargo built no program `freeflow`")?,
        provider: provider.context("cargo built no libfreeflow.so")?,
    })
}

fn lay_out(tree: &Tree, built: &Built) -> Result<()> {
    check_glibc(&built.provider)?;
    install(&built.program, &tree.program())?;
    let [first, others @ ..] = PROVIDER_ABIS;
    install(&built.provider, &tree.provider(first))?;
    for abi in others {
        fs::hard_link(tree.provider(first), tree.provider(abi))?;
    }
    compile_shim(&tree.preload())?;
    copy_folder(&workspace().join("provider/sysfs/class"), &tree.sysfs().join("class"))?;
    write_manuals(tree)
}

/// Fails where the provider asks for a C library that the oldest system to be served does not have.
fn check_glibc(provider: &Path) -> Result<()> {
    let file = fs::read(provider).with_context(|| format!("cannot read {}", provider.display()))?;
    let newest = newest_glibc(&file);
    ensure!(
        newest <= OLDEST_GLIBC,
        "the provider asks for glibc 2.{newest}, and Debian 11 has 2.{OLDEST_GLIBC}: add what \
         `objdump -T {}` shows with that version to the table in provider/build.rs",
        provider.display()
    );
    Ok(())
}

/// The greatest N of the version names `GLIBC_2.N` in a file.
fn newest_glibc(file: &[u8]) -> u32 {
    const NAME: &[u8] = b"\0GLIBC_2.";
    let names = file.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME);
    let numbers = names.filter_map(|(at, _)| {
        let digits = file[at + NAME.len()..].split(|byte| !byte.is_ascii_digit()).next()?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    });
    numbers.max().unwrap_or(0)
}

/// The shim stands outside the workspace: it must link to nothing, or it would kill programs of older images.
fn compile_shim(to: &Path) -> Result<()> {
    let source = workspace().join("preload/nl_connect.rs");
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.args(SHIM_OPTIONS);
    command.arg("-o").arg(to).arg(&source);
    let status = command.status().context("could not start rustc")?;
    ensure!(status.success(), "could not compile {}", source.display());
    Ok(())
}

/// The man page and the shells' completions, written by the program itself.
fn write_manuals(tree: &Tree) -> Result<()> {
    let files = [
        (vec!["man"], "share/man/man1/freeflow.1"),
        (vec!["completions", "bash"], "share/bash-completion/completions/freeflow"),
        (vec!["completions", "zsh"], "share/zsh/site-functions/_freeflow"),
        (vec!["completions", "fish"], "share/fish/vendor_completions.d/freeflow.fish"),
    ];
    for (words, file) in files {
        let output = Command::new(tree.program()).args(&words).output()?;
        if !output.status.success() {
            bail!("`freeflow {}`: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        let path = tree.prefix().join(file);
        make_folder_of(&path)?;
        fs::write(path, output.stdout)?;
    }
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            install(&entry.path(), &target)?;
        }
    }
    Ok(())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    make_folder_of(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn make_folder_of(path: &Path) -> Result<()> {
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .with_context(|| format!("no folder for {}", path.display()))
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

/// Cargo, in this workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_and_the_provider_are_found_among_cargos_messages() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"router"},"filenames":["/t/release/librouter.rlib"],"executable":null}
{"reason":"compiler-artifact","target":{"name":"freeflow"},"filenames":["/t/release/libfreeflow.so","/t/release/libfreeflow.rlib"],"executable":null}
{"reason":"compiler-artifact","target":{"name":"freeflow"},"filenames":["/t/release/freeflow"],"executable":"/t/release/freeflow"}
{"reason":"build-finished","success":true}"#;
        let built = artefacts(messages).unwrap();
        assert_eq!(built.provider, Path::new("/t/release/libfreeflow.so"));
        assert_eq!(built.program, Path::new("/t/release/freeflow"));
        assert_eq!(built.target_directory().unwrap(), Path::new("/t"));
    }

    #[test]
    fn a_build_without_a_provider_is_an_error() {
        let error =
            artefacts(r#"{"target":{"name":"freeflow"},"filenames":[],"executable":"/t/release/freeflow"}"#);
        assert!(error.unwrap_err().to_string().contains("libfreeflow.so"));
    }

    #[test]
    fn the_newest_glibc_is_the_greatest_number_among_the_names() {
        assert_eq!(newest_glibc(b"x\0GLIBC_2.2.5\0GLIBC_2.30\0GLIBC_2.4\0"), 30);
        assert_eq!(newest_glibc(b"GLIBC_2.99 is not a name\0GCC_3.0\0"), 0);
    }

    #[test]
    fn the_shim_is_compiled_as_its_header_says() {
        let source = fs::read_to_string(workspace().join("preload/nl_connect.rs")).unwrap();
        let header = source.lines().take_while(|line| line.starts_with("//!"));
        let words: Vec<&str> =
            header.flat_map(|line| line[3..].split_whitespace()).filter(|&word| word != "\\").collect();
        assert!(words.windows(SHIM_OPTIONS.len()).any(|window| window == SHIM_OPTIONS));
    }
}
