//! `freeflow completions` and `freeflow man`: both made from the command line's own description.

use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Failure};

#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

pub(crate) fn completions(args: CompletionsArgs) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "freeflow", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}

/// One page: the program, then each subcommand with its options.
pub(crate) fn man() -> Result<ExitCode, Failure> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut page).context("cannot write the manual page")?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        let name = subcommand.get_name().to_uppercase();
        page.extend_from_slice(format!(".SH \"FREEFLOW {name}\"\n").as_bytes());
        let man = clap_mangen::Man::new(subcommand.clone());
        let sections =
            man.render_synopsis_section(&mut page).and_then(|()| man.render_description_section(&mut page));
        sections
            .and_then(|()| man.render_options_section(&mut page))
            .context("cannot write the manual page")?;
        if let Some(more) = subcommand.get_after_help() {
            let more = more.to_string().replace('\\', "\\\\").replace("\n.", "\n\\&.");
            page.extend_from_slice(format!(".nf\n{more}\n.fi\n").as_bytes());
        }
    }
    super::print(&String::from_utf8_lossy(&page))
}
