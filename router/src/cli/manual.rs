//! `freeflow completions` and `freeflow man`: both made from the command line's own description.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

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

/// One page: the program, each subcommand with its options, the examples.
pub(crate) fn man() -> Result<ExitCode, Failure> {
    let mut page = Vec::new();
    write_page(&mut page).context("cannot write the manual page")?;
    super::print(&String::from_utf8_lossy(&page))
}

fn write_page(page: &mut Vec<u8>) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let man = Man::new(command.clone());
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_options_section(page)?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        writeln!(page, ".SH \"FREEFLOW {}\"", subcommand.get_name().to_uppercase())?;
        let mut section = Vec::new();
        let man = Man::new(subcommand.clone());
        man.render_synopsis_section(&mut section)?;
        man.render_description_section(&mut section)?;
        man.render_options_section(&mut section)?;
        // Its parts are parts of this page's section.
        page.extend_from_slice(String::from_utf8_lossy(&section).replace(".SH ", ".SS ").as_bytes());
        write_verbatim(page, subcommand)?;
    }
    page.extend_from_slice(b".SH \"NOTES\"\n");
    write_verbatim(page, &command)
}

/// The text after the options: examples and exit codes, in lines that must stay as they are.
fn write_verbatim(page: &mut Vec<u8>, command: &Command) -> io::Result<()> {
    let Some(text) = command.get_after_help() else { return Ok(()) };
    let text = text.to_string().replace('\\', "\\e").replace('-', "\\-");
    page.extend_from_slice(b".PP\n.nf\n");
    for line in text.lines() {
        // A leading dot or quote would be a request to the formatter.
        writeln!(page, "\\&{line}")?;
    }
    page.extend_from_slice(b".fi\n");
    Ok(())
}
