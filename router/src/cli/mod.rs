//! The command line of `freeflow`.
//!
//! Does: the words of the command line, exit codes, and which file answers which subcommand.
//! Leaves to others: each subcommand (its file), the daemon itself (the library).

mod autostart;
mod beside;
mod claim;
mod configuration;
mod doctor;
mod env;
mod failure;
mod host;
mod install;
mod manual;
mod namespace;
mod node;
mod ping;
mod pki;
mod probe;
mod router;
mod run;
mod runtime;
mod status;
mod variables;
mod wire;

use std::{
    ffi::OsStr,
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand, error::ErrorKind};

use failure::Failure;

const EXAMPLES: &str = "\
Examples:
  freeflow run -- ibv_devinfo        one program with the virtual RNIC
  eval \"$(freeflow env)\"             the same for a whole shell
  docker run $(freeflow env --shell docker) IMAGE CMD
                                     the same for a container
  freeflow status                    who uses the router
  freeflow doctor                    what is missing here, and how to mend it

Exit codes: 0 done; 1 failed; 2 the command line or the configuration is wrong.
`router` and `run` have more, see their --help.";

/// A virtual RDMA NIC for every container, on any host
#[derive(Debug, Parser)]
#[command(name = "freeflow", version, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the router of this host (or of this user) in the foreground
    Router(router::Args),
    /// Run a program with the virtual RNIC `ff0`
    Run(run::Args),
    /// Print the variables that give programs the virtual RNIC, for a shell or a container
    Env(env::Args),
    /// Show who uses the router
    Status(status::Args),
    /// Check what this host offers and say how to mend what is missing
    Doctor(doctor::Args),
    /// Tell step by step how a container's address resolves
    Ping(ping::Args),
    /// Make the certificates with which routers of several hosts know each other
    Pki(pki::Args),
    /// Print a completion script for a shell
    Completions(manual::CompletionsArgs),
    /// Print the manual page (roff)
    Man,
}

/// Runs the program; the result is its exit code.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let result = match cli.command {
        Command::Router(args) => router::main(args),
        Command::Run(args) => run::main(args),
        Command::Env(args) => env::main(args),
        Command::Status(args) => status::main(args),
        Command::Doctor(args) => doctor::main(args),
        Command::Ping(args) => ping::main(args),
        Command::Pki(args) => pki::main(args),
        Command::Completions(args) => manual::completions(args),
        Command::Man => manual::man(),
    };
    result.unwrap_or_else(|Failure { code, error }| {
        eprintln!("freeflow: {error:#}");
        ExitCode::from(code)
    })
}

/// Prints what clap found wrong. `run` keeps the small numbers for its program, so there it is 125.
fn refuse(error: &clap::Error) -> ExitCode {
    // Nothing can be done where not even the message can be written.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ if std::env::args_os().nth(1).as_deref() == Some(OsStr::new("run")) => {
            ExitCode::from(failure::RUN_FAILED)
        }
        _ => ExitCode::from(failure::USAGE),
    }
}

/// Writes to standard output. A reader that has seen enough (`freeflow man | head`) is no failure.
fn print(text: &str) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::from(anyhow::Error::from(error)))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
