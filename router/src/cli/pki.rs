//! `freeflow pki`: certificates for the links between routers.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use router::pki;

use super::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Make an authority: ca.pem, which every router gets, and ca.key, which stays where it is
    Init {
        /// Where to make it
        directory: PathBuf,
    },
    /// Make the certificate and the key of a router, signed by the authority
    Issue {
        /// Where the authority is, and where to make them
        directory: PathBuf,
        /// The router's name in the directory (links.name)
        name: String,
    },
}

pub(crate) fn main(args: Args) -> Result<ExitCode, Failure> {
    let files = match &args.what {
        What::Init { directory } => pki::authority(directory).context("no authority was made")?,
        What::Issue { directory, name } => {
            pki::issue(directory, name).with_context(|| format!("no certificate was made for {name}"))?
        }
    };
    super::print(&format!("{}\n{}\n", files.certificate.display(), files.key.display()))
}
